//! Block-diagonal matrices that rows are multiplied with.

/// Square matrices along a diagonal.
#[derive(Clone, Debug)]
pub struct Blocks {
    /// Length of a block.
    pub s: usize,
    /// Matrices (n, s, s) one after the other; they repeat when a row has more blocks.
    pub values: Vec<f32>,
}

impl Blocks {
    /// Multiplies consecutive blocks of a row, the first of them with matrix `first`, each as a row with its matrix. The
    /// last block may be shorter: then the rest of it counts as zero.
    pub(super) fn multiply(&self, first: usize, row: &mut [f32]) {
        let s = self.s;
        let mut product = vec![0.0; s];
        let matrices = self.values.chunks_exact(s * s).cycle().skip(first % (self.values.len() / (s * s)));
        for (x, matrix) in row.chunks_mut(s).zip(matrices) {
            product.fill(0.0);
            for (x, m) in x.iter().zip(matrix.chunks_exact(s)) {
                product.iter_mut().zip(m).for_each(|(sum, m)| *sum += x * m);
            }
            x.copy_from_slice(&product[..x.len()]);
        }
    }
}
