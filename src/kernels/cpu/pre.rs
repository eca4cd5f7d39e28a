//! Transforms of a linear's input: what a run's rows become before they meet the weight.

use std::borrow::Cow;

use rayon::prelude::*;

use super::linear::SlotRun;

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
    fn apply(&self, row: &mut [f32]) {
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

/// The rows of `x` (m, k) as the weight reads them: those of runs with a transform transformed, all others as they are.
pub(super) fn transform_rows<'a>(x: &'a [f32], k: usize, runs: &[SlotRun<'_>]) -> Cow<'a, [f32]> {
    let mut rows = Cow::Borrowed(x);
    for run in runs {
        let Some(pre) = run.slots.and_then(|slots| slots.pre.as_ref()) else { continue };
        let rows = &mut rows.to_mut()[run.rows.start * k..run.rows.end * k];
        rows.par_chunks_exact_mut(k).for_each(|row| pre.apply(row));
    }
    rows
}
