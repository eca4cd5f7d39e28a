//! Output scales of a linear: what becomes of a row once product and additive terms are there.

use super::blocks::Blocks;
use super::dispatch::dispatch;
use super::packed::PANEL;

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
    /// Each block of outputs times a matrix, as a row; the last block may reach beyond the outputs.
    BlockDiag(Blocks),
}

impl PackedScale {
    /// Whether partners can lie in different panels, so that columns are scaled once the whole row is there.
    pub(super) fn needs_whole_rows(&self) -> bool {
        match self {
            Self::Diag(_) => false,
            Self::PairRot { half, .. } => !PANEL.is_multiple_of(2 * half),
            Self::BlockDiag(blocks) => !PANEL.is_multiple_of(blocks.s),
        }
    }

    /// What it has of each output (n).
    pub(super) fn vectors(&self) -> [&[f32]; 2] {
        match self {
            Self::Diag(factors) => [factors, &[]],
            Self::PairRot { p, q, .. } => [p, q],
            Self::BlockDiag(_) => [&[]; 2],
        }
    }

    /// The factors of the columns from `first` on; none where columns mix.
    pub(super) fn factors(&self, first: usize) -> &[f32] {
        match self {
            Self::Diag(factors) => &factors[first..],
            Self::PairRot { .. } | Self::BlockDiag(_) => &[],
        }
    }

    /// Mixes the columns from `first` on, of whole panels or of a row, where they mix.
    pub(super) fn mix(&self, first: usize, y: &mut [f32]) {
        match self {
            Self::Diag(_) => {}
            Self::PairRot { p, q, half } => rotate_pairs(y, (&p[first..], &q[first..]), *half),
            Self::BlockDiag(blocks) => blocks.multiply(first / blocks.s, y),
        }
    }
}

dispatch! {
    /// `y = scale ⊙ y + terms[0] + terms[1]` in as many columns as `y` has; what is empty is left out.
    pub(super) fn scale_add(scale: &[f32], terms: [&[f32]; 2], y: &mut [f32]) => scale_add_body
}

/// The sums are rounded one by one, on every processor.
#[inline(always)]
fn scale_add_body<const FMA: bool>(scale: &[f32], terms: [&[f32]; 2], y: &mut [f32]) {
    let [first, second] = terms;
    match (scale, first) {
        (&[], first) => y.iter_mut().zip(first).for_each(|(y, term)| *y += term),
        (scale, &[]) => y.iter_mut().zip(scale).for_each(|(y, scale)| *y *= scale),
        // In one pass.
        (scale, first) => y.iter_mut().zip(scale).zip(first).for_each(|((y, scale), term)| *y = *y * scale + term),
    }
    y.iter_mut().zip(second).for_each(|(y, term)| *y += term);
}

fn rotate_pairs(row: &mut [f32], (p, q): (&[f32], &[f32]), half: usize) {
    assert!(row.len().is_multiple_of(2 * half), "the groups tile the columns");
    let groups = row.chunks_exact_mut(2 * half).zip(p.chunks_exact(2 * half)).zip(q.chunks_exact(2 * half));
    for ((row, p), q) in groups {
        let (first, second) = row.split_at_mut(half);
        for (at, (a, b)) in first.iter_mut().zip(second).enumerate() {
            (*a, *b) = (p[at] * *a - q[at] * *b, p[half + at] * *b + q[half + at] * *a);
        }
    }
}
