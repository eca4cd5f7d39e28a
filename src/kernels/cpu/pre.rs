//! Transforms of a linear's input: what a run's rows become before they meet the weight.

/// A transform of the rows of `x`, each by itself, in the CPU's form.
#[derive(Debug)]
pub enum PackedPre {
    /// Elementwise product, (k).
    Diag(Vec<f32>),
    /// Each block of `s` inputs times a matrix, as a row.
    BlockDiag {
        /// Length of a block.
        s: usize,
        /// Matrices (k / s, s, s), or one that all blocks share.
        blocks: Vec<f32>,
    },
}

impl PackedPre {
    /// Transforms one row in place.
    pub(super) fn apply(&self, row: &mut [f32]) {
        match self {
            Self::Diag(scale) => {
                assert_eq!(row.len(), scale.len(), "the transform is of the length of x");
                row.iter_mut().zip(scale).for_each(|(x, scale)| *x *= scale);
            }
            Self::BlockDiag { s, blocks } => {
                assert!(row.len().is_multiple_of(*s), "the blocks tile x");
                let mut product = vec![0.0; *s];
                for (x, m) in row.chunks_exact_mut(*s).zip(blocks.chunks_exact(s * s).cycle()) {
                    product.fill(0.0);
                    for (x, m) in x.iter().zip(m.chunks_exact(*s)) {
                        product.iter_mut().zip(m).for_each(|(sum, m)| *sum += x * m);
                    }
                    x.copy_from_slice(&product);
                }
            }
        }
    }
}
