//! Output scales of a linear: what becomes of a row once product and additive terms are there.

use std::ops::Range;

use super::blocks::Blocks;
use super::dispatch::dispatch;
use super::packed::PANEL;
use super::tile::Fetch;
use super::vector::{Columns, PackedVector, widened};

/// An output scale in the CPU's form.
#[derive(Clone, Debug)]
pub enum PackedScale {
    /// Elementwise product (n).
    Diag(PackedVector),
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

    /// What it has for each of some columns of outputs, to be fetched.
    pub(super) fn ahead(&self, columns: Range<usize>) -> [Fetch; 2] {
        match self {
            Self::Diag(factors) => [factors.ahead(columns), Fetch::NONE],
            Self::PairRot { p, q, .. } => [Fetch::of_part(p, columns.clone()), Fetch::of_part(q, columns)],
            Self::BlockDiag(_) => [Fetch::NONE; 2],
        }
    }

    /// The factors of the columns from `first` on; none where columns mix.
    pub(super) fn factors(&self, first: usize) -> Columns<'_> {
        match self {
            Self::Diag(factors) => factors.columns(first),
            Self::PairRot { .. } | Self::BlockDiag(_) => Columns::NONE,
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
    /// `y = scale ⊙ y + c + residual` in as many columns as `y` has; what is empty is left out. A `c` of
    /// differences is added to `bias`, another takes its place.
    pub(super) fn scale_add(
        scale: Columns<'_>, c: Columns<'_>, bias: &[f32], residual: &[f32], y: &mut [f32],
    ) => scale_add_body
}

/// The sums are rounded one by one, on every processor.
#[inline(always)]
fn scale_add_body<const FMA: bool>(scale: Columns<'_>, c: Columns<'_>, bias: &[f32], residual: &[f32], y: &mut [f32]) {
    // Scales with what is added first go in one pass.
    let (first, rest) = match c {
        Columns::F32(&[]) => (bias, &[][..]),
        Columns::F32(c) => (c, &[][..]),
        Columns::Differences(c) => (bias, c),
    };
    match (scale, first, rest) {
        (Columns::F32(&[]), first, _) => y.iter_mut().zip(first).for_each(|(y, term)| *y += term),
        (Columns::F32(scale), &[], _) => y.iter_mut().zip(scale).for_each(|(y, scale)| *y *= scale),
        (Columns::F32(scale), first, _) => {
            y.iter_mut().zip(scale).zip(first).for_each(|((y, scale), term)| *y = *y * scale + term);
        }
        (Columns::Differences(scale), &[], near) if !near.is_empty() => {
            let columns = y.iter_mut().zip(scale).zip(near);
            columns.for_each(|((y, scale), term)| *y = *y * (1.0 + widened(*scale)) + widened(*term));
        }
        (Columns::Differences(scale), &[], _) => {
            y.iter_mut().zip(scale).for_each(|(y, scale)| *y *= 1.0 + widened(*scale));
        }
        (Columns::Differences(scale), first, _) => {
            let columns = y.iter_mut().zip(scale).zip(first);
            columns.for_each(|((y, scale), term)| *y = *y * (1.0 + widened(*scale)) + term);
        }
    }
    if !matches!((scale, first), (Columns::Differences(_), &[])) {
        y.iter_mut().zip(rest).for_each(|(y, term)| *y += widened(*term));
    }
    y.iter_mut().zip(residual).for_each(|(y, term)| *y += term);
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

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::super::packed::WeightFormat;
    use super::*;
    use crate::kernels::cpu::testing::random;

    #[test]
    fn whatever_is_there_is_multiplied_and_added_one_by_one() {
        let n = 71;
        let [y, scale, c, bias, residual] = [1, 2, 3, 4, 5].map(|seed| random(n, seed));
        let scale: Vec<f32> = scale.iter().map(|v| 1.0 + v / 4.0).collect();
        for bits in 0..1_u32 << 6 {
            let [has_scale, has_c, has_bias, has_residual, near_scale, near_c] =
                [0, 1, 2, 3, 4, 5].map(|bit| bits >> bit & 1 == 1);
            let format = |near| if near { WeightFormat::Bf16 } else { WeightFormat::F32 };
            let scale = has_scale.then(|| PackedVector::factors(format(near_scale), &scale));
            let bias = if has_bias { &bias[..] } else { &[] };
            let c = has_c.then(|| PackedVector::added(format(near_c), &c, bias));
            let residual = if has_residual { &residual[..] } else { &[] };
            let expected: Vec<f32> = (0..n)
                .map(|idx| {
                    let bias = bias.get(idx).copied().unwrap_or(0.0);
                    let scaled = y[idx] * scale.as_ref().map_or(1.0, |scale: &PackedVector| scale.value(idx, 1.0));
                    let shifted = match &c {
                        Some(c) if near_c => scaled + bias + c.value(idx, 0.0),
                        Some(c) => scaled + c.value(idx, 0.0),
                        None => scaled + bias,
                    };
                    shifted + residual.get(idx).copied().unwrap_or(0.0)
                })
                .collect();
            let [scale, c] =
                [&scale, &c].map(|vector| vector.as_ref().map_or(Columns::NONE, |vector| vector.columns(0)));
            for isa in Isa::available() {
                let mut found = y.clone();
                scale_add(isa, scale, c, bias, residual, &mut found);
                assert_eq!(found, expected, "{isa:?} {bits:06b}");
            }
        }
    }
}
