//! Transforms of a linear's input: what a run's rows become before they meet the weight.

use std::borrow::Cow;

use super::linear::SlotRun;

/// A transform of the rows of `x`, each by itself, in the CPU's form.
#[derive(Debug)]
pub enum PackedPre {
    /// Elementwise product, (k).
    Diag(Vec<f32>),
}

impl PackedPre {
    /// Transforms one row in place.
    fn apply(&self, row: &mut [f32]) {
        match self {
            Self::Diag(scale) => {
                assert_eq!(row.len(), scale.len(), "the transform is of the length of x");
                row.iter_mut().zip(scale).for_each(|(x, scale)| *x *= scale);
            }
        }
    }
}

/// The rows of `x` (m, k) as the weight reads them: those of runs with a transform transformed, all others as they are.
pub(super) fn transform_rows<'a>(x: &'a [f32], k: usize, runs: &[SlotRun<'_>]) -> Cow<'a, [f32]> {
    let mut rows = Cow::Borrowed(x);
    for run in runs {
        let Some(pre) = run.slots.and_then(|slots| slots.pre.as_ref()) else { continue };
        for row in rows.to_mut()[run.rows.start * k..run.rows.end * k].chunks_exact_mut(k) {
            pre.apply(row);
        }
    }
    rows
}
