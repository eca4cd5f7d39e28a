//! Sparse matrices in compressed rows.

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

    /// Adds the products with `x` (k) to the outputs from `first` on. Each sum runs in the order of the entries.
    pub(super) fn add(&self, x: &[f32], first: usize, y: &mut [f32]) {
        let begin = self.ends.partition_point(|(row, _)| (*row as usize) < first);
        let mut from = if begin == 0 { 0 } else { self.ends[begin - 1].1 as usize };
        for (row, end) in &self.ends[begin..] {
            let Some(y) = y.get_mut(*row as usize - first) else { break };
            let entries = from..*end as usize;
            from = entries.end;
            let products = self.columns[entries.clone()].iter().zip(&self.values[entries]);
            *y += products.map(|(column, value)| x[*column as usize] * value).sum::<f32>();
        }
    }
}
