//! What an adapter does to one linear, and its part in a panel of outputs.

use std::ops::Range;

use super::dispatch::{dispatch, fma};
use super::isa::Isa;
use super::packed::{PANEL, PackedMatrix, WeightFormat};
use super::pre::PackedPre;
use super::rows::RowMatrix;
use super::scale::PackedScale;
use super::sparse::SparseRows;

/// What an adapter does to one linear, in the CPU's form. All matrices have the format of the base weight.
#[derive(Debug, Default)]
pub struct PackedSlots {
    /// Transform of the rows of `x` before they meet the weight.
    pub pre: Option<PackedPre>,
    /// Weight of the adapter's own (n, k).
    pub own: Option<PackedMatrix>,
    /// Rows (r, k) that take the place of the weight's, and their indexes in ascending order.
    pub rows: Option<(Vec<u32>, RowMatrix)>,
    /// Additive terms.
    pub deltas: Vec<PackedDelta>,
    /// Output scale.
    pub scale: Option<PackedScale>,
    /// Vector added last (n); `None` is the base bias.
    pub c: Option<Vec<f32>>,
}

/// An additive term in the CPU's form.
#[derive(Debug)]
pub enum PackedDelta {
    /// `b (a x)`, a: (r, k), b: (n, r).
    LowRank {
        /// Down projection.
        a: RowMatrix,
        /// Up projection.
        b: PackedMatrix,
    },
    /// `y[i * q + j] += sum_s m[s, j] * sum_c x[c * r + s]`; `m` is packed as a (q, r) matrix.
    ShardSum {
        /// Block matrix, transposed.
        m: PackedMatrix,
    },
    /// `S x`, S: (n, k) in f32. It reads the row itself, which no format has rounded.
    Sparse(SparseRows),
}

/// Consecutive rows of `x` with one adapter.
#[derive(Clone, Debug)]
pub struct SlotRun<'a> {
    /// The rows.
    pub rows: Range<usize>,
    /// The adapter's slots; `None` is the bare base.
    pub slots: Option<&'a PackedSlots>,
}

/// Elements per row of a run's short vectors: those of the terms in order, then the outputs of the replaced rows.
pub(super) fn short_len(slots: &PackedSlots) -> usize {
    let terms: usize = slots.deltas.iter().map(PackedDelta::short_len).sum();
    terms + slots.rows.as_ref().map_or(0, |(indexes, _)| indexes.len())
}

impl PackedSlots {
    /// Whether columns depend on one another across panels, so that they are scaled once the whole row is there.
    pub(super) fn needs_whole_rows(&self) -> bool {
        self.scale.as_ref().is_some_and(PackedScale::needs_whole_rows)
    }
}

impl PackedDelta {
    /// Elements per row of its short vectors; a sparse term has none.
    pub(super) fn short_len(&self) -> usize {
        match self {
            Self::LowRank { b, .. } => b.k(),
            Self::ShardSum { m } => m.k(),
            Self::Sparse(_) => 0,
        }
    }
}

/// One row of a run: its input (k), and its short vectors.
#[derive(Clone, Copy)]
pub(super) struct RunRow<'a> {
    /// Its row of `x`.
    pub(super) x: &'a [f32],
    /// Short vectors, from the run's first on.
    pub(super) short: &'a [f32],
    /// Rows of the run.
    pub(super) rows: usize,
    /// The row, counted from the run's first.
    pub(super) row: usize,
}

/// Replaced rows, terms and scale, in a panel's columns from `first` on; no scale that needs whole rows.
pub(super) fn apply_slots(slots: &PackedSlots, row: RunRow<'_>, first: usize, y: &mut [f32]) {
    let mut start = 0;
    let mut next = |r: usize| {
        let of_row = start + row.row * r;
        start += row.rows * r;
        &row.short[of_row..of_row + r]
    };
    let before = slots.deltas.iter().map(PackedDelta::short_len).sum::<usize>() * row.rows;
    if let Some((indexes, _)) = &slots.rows {
        let replaced = &row.short[before + row.row * indexes.len()..][..indexes.len()];
        let begin = indexes.partition_point(|index| (*index as usize) < first);
        for (index, value) in indexes.iter().zip(replaced).skip(begin) {
            let Some(y) = y.get_mut(*index as usize - first) else { break };
            *y = *value;
        }
    }
    for delta in &slots.deltas {
        let h = next(delta.short_len());
        match delta {
            PackedDelta::LowRank { b: up, .. } | PackedDelta::ShardSum { m: up } => {
                expand(Isa::best(), h, up, first, y);
            }
            PackedDelta::Sparse(s) => s.add(row.x, first, y),
        }
    }
    if let Some(scale) = slots.scale.as_ref().filter(|scale| !scale.needs_whole_rows()) {
        scale.apply(first, y);
    }
}

dispatch! {
    /// `y[j] += sum_s b[(from + j) mod q, s] * h[s]`, b: (q, r) packed, h: (r) f32.
    fn expand(h: &[f32], b: &PackedMatrix, from: usize, y: &mut [f32]) => expand_body
}

#[inline(always)]
fn expand_body<const FMA: bool>(h: &[f32], b: &PackedMatrix, from: usize, y: &mut [f32]) {
    let mut done = 0;
    while done < y.len() {
        let column = (from + done) % b.n();
        let lane = column % PANEL;
        let count = (PANEL - lane).min(b.n() - column).min(y.len() - done);
        let mut sums = [0.0_f32; PANEL];
        let panel = b.panel(column / PANEL);
        for (step, words) in panel.chunks_exact(PANEL).enumerate() {
            let words: &[u32; PANEL] = words.try_into().expect("a panel's step has 64 words");
            match b.format() {
                WeightFormat::F32 => {
                    for (sum, word) in sums.iter_mut().zip(words) {
                        *sum = fma::<FMA>(h[step], f32::from_bits(*word), *sum);
                    }
                }
                WeightFormat::Bf16 => {
                    let (low, high) = (h[2 * step], h.get(2 * step + 1).copied().unwrap_or(0.0));
                    for (sum, word) in sums.iter_mut().zip(words) {
                        let first = fma::<FMA>(low, f32::from_bits(*word << 16), *sum);
                        *sum = fma::<FMA>(high, f32::from_bits(*word & 0xffff_0000), first);
                    }
                }
            }
        }
        y[done..done + count].iter_mut().zip(&sums[lane..]).for_each(|(y, sum)| *y += sum);
        done += count;
    }
}
