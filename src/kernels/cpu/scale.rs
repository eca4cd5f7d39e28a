//! Output scales of a linear: what becomes of a run's rows once product and additive terms are there.

use rayon::prelude::*;

use super::linear::{BaseLinear, SlotRun};

/// An output scale in the CPU's form.
#[derive(Clone, Debug)]
pub enum PackedScale {
    /// Elementwise product (n).
    Diag(Vec<f32>),
    /// In groups of `2 half` outputs, `a = y[j]` and `b = y[half + j]` become `p[j] a - q[j] b` and
    /// `p[half + j] b + q[half + j] a`.
    PairRot {
        /// What an output keeps of itself (n).
        p: Vec<f32>,
        /// What it takes of its partner (n).
        q: Vec<f32>,
        /// Distance of the partners.
        half: usize,
    },
}

impl PackedScale {
    /// Whether columns depend on one another, so that they are scaled once the whole row is there.
    pub(super) fn needs_whole_rows(&self) -> bool {
        match self {
            Self::Diag(_) => false,
            Self::PairRot { .. } => true,
        }
    }
}

/// Scales the rows of those runs whose scale needs whole rows, and adds what is added last. y: (m, n).
pub(super) fn scale_whole_rows(base: BaseLinear<'_>, runs: &[SlotRun<'_>], y: &mut [f32]) {
    for run in runs {
        let Some(slots) = run.slots else { continue };
        let Some(PackedScale::PairRot { p, q, half }) = &slots.scale else { continue };
        let c = slots.c.as_deref().or(base.bias);
        y[run.rows.start * base.n..run.rows.end * base.n].par_chunks_exact_mut(base.n).for_each(|row| {
            rotate_pairs(row, (p, q), *half);
            if let Some(c) = c {
                row.iter_mut().zip(c).for_each(|(y, c)| *y += c);
            }
        });
    }
}

fn rotate_pairs(row: &mut [f32], (p, q): (&[f32], &[f32]), half: usize) {
    let groups = row.chunks_exact_mut(2 * half).zip(p.chunks_exact(2 * half)).zip(q.chunks_exact(2 * half));
    for ((row, p), q) in groups {
        let (first, second) = row.split_at_mut(half);
        for (at, (a, b)) in first.iter_mut().zip(second).enumerate() {
            (*a, *b) = (p[at] * *a - q[at] * *b, p[half + at] * *b + q[half + at] * *a);
        }
    }
}
