//! Transforms of a linear's input: what a run's rows become before they meet the weight.

/// A transform of the rows of `x`, each by itself, in the CPU's form.
#[derive(Debug)]
pub enum PackedPre {
    /// Elementwise product, (k).
    Diag(Vec<f32>),
}

impl PackedPre {
    /// Transforms one row in place.
    pub(super) fn apply(&self, row: &mut [f32]) {
        match self {
            Self::Diag(scale) => {
                assert_eq!(row.len(), scale.len(), "the transform is of the length of x");
                row.iter_mut().zip(scale).for_each(|(x, scale)| *x *= scale);
            }
        }
    }
}
