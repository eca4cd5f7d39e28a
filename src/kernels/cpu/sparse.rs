//! Sparse matrices in compressed rows.

use rayon::prelude::*;

/// A sparse matrix (n, k): for each output its inputs and their values.
#[derive(Debug)]
pub struct SparseRows {
    /// Outputs that have entries, and where these end; they begin where the previous ones end.
    ends: Vec<(u32, u32)>,
    columns: Vec<u32>,
    values: Vec<f32>,
}

impl SparseRows {
    /// Entries sorted by row.
    pub fn new(rows: &[u32], columns: Vec<u32>, values: Vec<f32>) -> Self {
        assert!(rows.len() == columns.len() && rows.len() == values.len(), "an entry has a row, a column and a value");
        assert!(rows.is_sorted(), "the entries are sorted by row");
        let mut ends: Vec<(u32, u32)> = Vec::new();
        for (at, row) in rows.iter().enumerate() {
            match ends.last_mut() {
                Some((last, end)) if last == row => *end = at as u32 + 1,
                _ => ends.push((*row, at as u32 + 1)),
            }
        }
        Self { ends, columns, values }
    }

    /// The products with the rows of `x` (m, k), (m, n). Each sum runs in the order of the entries.
    pub(super) fn multiply(&self, x: &[f32], k: usize, n: usize) -> Vec<f32> {
        let mut y = vec![0.0; x.len() / k * n];
        y.par_chunks_exact_mut(n).zip(x.par_chunks_exact(k)).for_each(|(y, x)| {
            let mut from = 0;
            for (row, end) in &self.ends {
                let entries = from..*end as usize;
                from = entries.end;
                let products = self.columns[entries.clone()].iter().zip(&self.values[entries]);
                y[*row as usize] = products.map(|(column, value)| x[*column as usize] * value).sum();
            }
        });
        y
    }
}
