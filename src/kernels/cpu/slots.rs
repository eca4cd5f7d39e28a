//! What an adapter does to one linear, and its part in a panel of outputs.

#![expect(unsafe_code, reason = "threads write disjoint parts of the outputs")]

use std::ops::Range;

use super::base::OwnMatrix;
use super::block_product::BlockProduct;
use super::circulant::Circulant;
use super::dispatch::{dispatch, fma};
use super::gemm::Target;
use super::isa::Isa;
use super::joint::JointLowRank;
use super::packed::{PANEL, PackedMatrix, WeightFormat};
use super::pre::PackedPre;
use super::route::Router;
use super::rows::RowMatrix;
use super::scale::PackedScale;
use super::shared::Shared;
use super::sparse::SparseRows;
use super::spectral::SpectralRows;
use super::tile::Fetch;
#[cfg(target_arch = "x86_64")]
use super::tile_avx2 as avx2;
use super::words::LANES;

/// What an adapter does to one linear, in the CPU's form. All matrices but its own weight have the format of terms over the
/// base weight ([`RowForm::terms`](super::RowForm::terms)).
#[derive(Debug, Default)]
pub struct PackedSlots {
    /// Transform of the rows of `x` before they meet the weight.
    pub pre: Option<PackedPre>,
    /// Weight of the adapter's own (n, k).
    pub own: Option<OwnMatrix>,
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
    /// As `LowRank`, where a and b hold the equal factors of several experts one after the other, and every row's `a x` is
    /// weighed expert by expert.
    Routed {
        /// Down projections (experts r, k).
        a: RowMatrix,
        /// Up projections (n, experts r).
        b: PackedMatrix,
        /// Weighs the experts. It reads the row itself, which no format has rounded.
        router: Router,
    },
    /// As `LowRank`, where every number of `a x` is weighed by one of the gates that the row brings.
    Gated {
        /// Down projection.
        a: RowMatrix,
        /// Up projection.
        b: PackedMatrix,
        /// Which of a row's gates goes with each number (r).
        places: Vec<u32>,
    },
    /// `S x`, S: (n, k). It reads the row itself, which no format has rounded.
    Sparse(SparseRows),
    /// `C x`, C: (n, k) in f32. It reads the row itself too.
    Circulant(Circulant),
    /// Products of blocks, mixed.
    BlockProduct(BlockProduct),
    /// `S x`, S: (n, k) sparse in a basis, in f32. It reads the row itself too.
    Spectral(SpectralRows),
    /// A low-rank term whose matrices other adapters share. It comes before the other terms.
    Joint(JointLowRank),
}

/// Consecutive rows of `x` with one adapter.
#[derive(Clone, Debug)]
pub struct SlotRun<'a> {
    /// The rows.
    pub rows: Range<usize>,
    /// The adapter's slots; `None` is the bare base.
    pub slots: Option<&'a PackedSlots>,
    /// The rows' gates, where terms of the slots are weighed by them.
    pub gates: Option<RowGates<'a>>,
}

/// Gates of consecutive rows.
#[derive(Clone, Copy, Debug)]
pub struct RowGates<'a> {
    /// Row-major, (rows, width).
    pub values: &'a [f32],
    /// Gates of a row.
    pub width: usize,
}

impl SlotRun<'_> {
    /// Rows of the bare base.
    pub fn bare(rows: Range<usize>) -> Self {
        Self { rows, slots: None, gates: None }
    }
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

    /// Whether a row is so much work before the sweep that it is a task by itself.
    pub(super) fn computes_by_row(&self) -> bool {
        self.deltas.iter().any(|delta| match delta {
            PackedDelta::Circulant(_) | PackedDelta::Spectral(_) => true,
            PackedDelta::BlockProduct(product) => product.computes_by_row(),
            _ => false,
        })
    }
}

impl PackedDelta {
    /// The up projection; terms that are not a product of two matrices of their own have none.
    pub(super) fn up(&self) -> Option<&PackedMatrix> {
        match self {
            Self::LowRank { b, .. } | Self::Routed { b, .. } | Self::Gated { b, .. } => Some(b),
            Self::ShardSum { m } => Some(m),
            Self::BlockProduct(product) => product.up(),
            Self::Sparse(_) | Self::Circulant(_) | Self::Spectral(_) | Self::Joint(_) => None,
        }
    }

    /// What it reads for a panel of outputs that is worth fetching ahead.
    pub(super) fn ahead(&self, panel_idx: usize) -> [Fetch; 2] {
        match self {
            Self::Sparse(s) => s.panel_ahead(panel_idx),
            other => [other.up().map_or(Fetch::NONE, |up| up.panel_ahead(panel_idx)), Fetch::NONE],
        }
    }

    /// Elements per row of its short vectors: a sparse term has its inputs there, circulant and spectral ones their outputs;
    /// a joint one has none here.
    pub(super) fn short_len(&self) -> usize {
        match self {
            Self::LowRank { b: up, .. }
            | Self::Routed { b: up, .. }
            | Self::Gated { b: up, .. }
            | Self::ShardSum { m: up } => up.k(),
            Self::Sparse(s) => s.k(),
            Self::Circulant(c) => c.num_outputs(),
            Self::BlockProduct(product) => product.short_len(),
            Self::Spectral(s) => s.num_outputs(),
            Self::Joint(_) => 0,
        }
    }
}

/// Rows that are expanded together; with the columns of a panel they fill the registers of AVX-512.
pub(super) const EXPAND_ROWS: usize = 6;

/// Some neighbouring rows of a run in one panel of outputs.
#[derive(Clone, Copy)]
pub(super) struct Outputs<'a> {
    /// Where the outputs lie.
    pub(super) out: Shared<'a, f32>,
    /// First row's first column in `out`.
    pub(super) offset: usize,
    /// Elements between rows.
    pub(super) stride: usize,
    /// Number of columns.
    pub(super) columns: usize,
    /// The first column within the linear.
    pub(super) first: usize,
    /// The rows, counted from the run's first.
    pub(super) rows: (usize, usize),
}

impl Outputs<'_> {
    /// The columns of row `row`.
    ///
    /// # Safety
    /// Nobody else may use them while the result lives.
    #[expect(clippy::mut_from_ref, reason = "the caller keeps rows disjoint")]
    pub(super) unsafe fn row(&self, row: usize) -> &mut [f32] {
        let from = self.offset + (row - self.rows.0) * self.stride;
        // SAFETY: the caller's contract.
        unsafe { self.out.part(from..from + self.columns) }
    }

    /// Where the columns of row `row` and of those after it lie.
    ///
    /// # Panics
    /// When they do not lie in the output.
    fn target(&self, row: usize) -> Target {
        let last = self.offset + (self.rows.1 - 1 - self.rows.0) * self.stride;
        assert!(row < self.rows.1 && last + self.columns <= self.out.len(), "the rows lie in the output");
        Target { y: self.out.at(self.offset + (row - self.rows.0) * self.stride), stride: self.stride }
    }
}

/// Replaced rows of the weight. `short` are the run's short vectors, of `run_rows` rows.
///
/// # Safety
/// Nobody else may use the outputs meanwhile.
pub(super) unsafe fn replace_rows(slots: &PackedSlots, (short, run_rows): (&[f32], usize), outputs: &Outputs<'_>) {
    let Some((indexes, _)) = &slots.rows else { return };
    let before = slots.deltas.iter().map(PackedDelta::short_len).sum::<usize>() * run_rows;
    let begin = indexes.partition_point(|index| (*index as usize) < outputs.first);
    for row in outputs.rows.0..outputs.rows.1 {
        let replaced = &short[before + row * indexes.len()..][..indexes.len()];
        // SAFETY: the caller's contract; one row at a time.
        let y = unsafe { outputs.row(row) };
        for (index, value) in indexes.iter().zip(replaced).skip(begin) {
            let Some(y) = y.get_mut(*index as usize - outputs.first) else { break };
            *y = *value;
        }
    }
}

/// Terms, but for joint ones. `x` are the rows' inputs (rows, k); `short` the run's short vectors, of `run_rows` rows.
///
/// # Safety
/// Nobody else may use the outputs meanwhile.
pub(super) unsafe fn apply_slots(
    slots: &PackedSlots,
    x: &[f32],
    (short, run_rows): (&[f32], usize),
    outputs: &Outputs<'_>,
) {
    let (from, to) = outputs.rows;
    let mut start = 0;
    for delta in &slots.deltas {
        let r = delta.short_len();
        let h = &short[start + from * r..start + to * r];
        start += run_rows * r;
        match delta {
            PackedDelta::LowRank { b: up, .. }
            | PackedDelta::Routed { b: up, .. }
            | PackedDelta::Gated { b: up, .. }
            | PackedDelta::ShardSum { m: up } => {
                // SAFETY: the caller's contract.
                unsafe { expand_rows(h, up, outputs) };
            }
            // SAFETY: the caller's contract.
            PackedDelta::Circulant(_) | PackedDelta::Spectral(_) => unsafe { add_outputs(h, r, outputs) },
            // SAFETY: the caller's contract.
            PackedDelta::BlockProduct(product) => unsafe { product.add(h, outputs) },
            PackedDelta::Joint(_) => {}
            PackedDelta::Sparse(s) => {
                // Rows are in eights unless they were prepared one by one.
                let run = if slots.computes_by_row() { &[] } else { &short[start - run_rows * r..start] };
                // SAFETY: the caller's contract.
                unsafe { s.add(x, run, outputs) };
            }
        }
    }
}

/// Adds what was computed of every row before the sweep, (rows, n).
///
/// # Safety
/// Nobody else may use the outputs meanwhile.
pub(super) unsafe fn add_outputs(h: &[f32], n: usize, outputs: &Outputs<'_>) {
    for (row, h) in (outputs.rows.0..outputs.rows.1).zip(h.chunks_exact(n)) {
        // SAFETY: the caller's contract; one row at a time.
        let y = unsafe { outputs.row(row) };
        y.iter_mut().zip(&h[outputs.first..]).for_each(|(y, h)| *y += h);
    }
}

/// `y[m, j] += sum_s b[(first + j) mod q, s] * h[m, s]`, b: (q, r) packed, h: (m, r) f32.
///
/// # Safety
/// Nobody else may use the outputs meanwhile.
unsafe fn expand_rows(h: &[f32], b: &PackedMatrix, outputs: &Outputs<'_>) {
    let (r, (from, to)) = (b.k(), outputs.rows);
    // Panels of the term and of the linear coincide unless the term repeats over the outputs.
    let first = outputs.first % b.n();
    let coincide = first.is_multiple_of(PANEL) && first + outputs.columns <= b.n();
    for (tile_idx, h) in h.chunks(EXPAND_ROWS * r).enumerate() {
        let first_row = from + tile_idx * EXPAND_ROWS;
        #[cfg(target_arch = "x86_64")]
        if let (true, Isa::Avx2, WeightFormat::Bf16) = (coincide, Isa::best(), b.format()) {
            // SAFETY: the caller's contract.
            unsafe { expand_pairs((h, r), b.panel(first / PANEL), outputs.target(first_row), outputs.columns, false) };
            continue;
        }
        let mut rows: [&mut [f32]; EXPAND_ROWS] = Default::default();
        for (row, y) in (first_row..to).zip(&mut rows) {
            // SAFETY: the caller's contract; every row is there once.
            *y = unsafe { outputs.row(row) };
        }
        if coincide {
            expand_tile(Isa::best(), h, b.panel(first / PANEL), b, &mut rows);
        } else {
            rows.iter_mut().zip(h.chunks_exact(r)).for_each(|(y, h)| expand(Isa::best(), h, b, first, y));
        }
    }
}

/// [`avx2::expand`] for the number of rows that `h` has.
///
/// # Safety
/// As there.
#[cfg(target_arch = "x86_64")]
unsafe fn expand_pairs((h, r): (&[f32], usize), panel: &[u32], y: Target, columns: usize, from_zero: bool) {
    // SAFETY: the caller's contract.
    unsafe {
        match h.len() / r {
            1 => avx2::expand::<1>((h, r), panel, y, columns, from_zero),
            2 => avx2::expand::<2>((h, r), panel, y, columns, from_zero),
            3 => avx2::expand::<3>((h, r), panel, y, columns, from_zero),
            4 => avx2::expand::<4>((h, r), panel, y, columns, from_zero),
            5 => avx2::expand::<5>((h, r), panel, y, columns, from_zero),
            _ => avx2::expand::<EXPAND_ROWS>((h, r), panel, y, columns, from_zero),
        }
    }
}

/// Vectors per panel.
const VECTORS: usize = PANEL / LANES;

/// The columns of one panel in up to [`EXPAND_ROWS`] rows; rows that are not there are empty.
pub(super) type PanelRows<'a> = [&'a mut [f32]; EXPAND_ROWS];

/// `y[m, j] += sum_s b[j, s] * h[m, s]` for the columns of one panel and up to [`EXPAND_ROWS`] rows.
pub(super) fn expand_tile(isa: Isa, h: &[f32], panel: &[u32], b: &PackedMatrix, y: &mut PanelRows<'_>) {
    match isa {
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 => expand_wide(isa, h, panel, b, y),
        Isa::Avx2 | Isa::Portable => expand_narrow(isa, h, panel, b, y),
    }
}

/// `sums[m, j] = sum_s b[j, s] * h[m, s]` for the columns of one panel and up to [`EXPAND_ROWS`] rows h of f32; one chain per
/// sum, whatever the number of rows.
pub(super) fn expand_sums(h: &[f32], b: &PackedMatrix, panel_idx: usize, sums: &mut [[f32; PANEL]; EXPAND_ROWS]) {
    let (isa, panel, r) = (Isa::best(), b.panel(panel_idx), b.k());
    #[cfg(target_arch = "x86_64")]
    if let (Isa::Avx2, WeightFormat::Bf16) = (isa, b.format()) {
        let y = Target { y: sums.as_mut_ptr().cast(), stride: PANEL };
        // SAFETY: the sums have the rows, and the instruction set was detected.
        unsafe { expand_pairs((h, r), panel, y, PANEL, true) };
        return;
    }
    sums.as_flattened_mut().fill(0.0);
    expand_tile(isa, h, panel, b, &mut sums.each_mut().map(|sums| sums.as_mut_slice()));
}

dispatch! {
    /// For 32 registers of 16 lanes: all columns at once.
    fn expand_wide(h: &[f32], panel: &[u32], b: &PackedMatrix, y: &mut PanelRows<'_>) => expand_wide_body
}

dispatch! {
    /// For 16 registers of 8 lanes: the more rows the fewer columns.
    fn expand_narrow(h: &[f32], panel: &[u32], b: &PackedMatrix, y: &mut PanelRows<'_>) => expand_narrow_body
}

#[inline(always)]
fn expand_wide_body<const FMA: bool>(h: &[f32], panel: &[u32], b: &PackedMatrix, y: &mut PanelRows<'_>) {
    match h.len() / b.k() {
        1 => expand_some::<1, VECTORS, FMA>(h, panel, b, y),
        2 => expand_some::<2, VECTORS, FMA>(h, panel, b, y),
        3 => expand_some::<3, VECTORS, FMA>(h, panel, b, y),
        4 => expand_some::<4, VECTORS, FMA>(h, panel, b, y),
        5 => expand_some::<5, VECTORS, FMA>(h, panel, b, y),
        _ => expand_some::<EXPAND_ROWS, VECTORS, FMA>(h, panel, b, y),
    }
}

#[inline(always)]
fn expand_narrow_body<const FMA: bool>(h: &[f32], panel: &[u32], b: &PackedMatrix, y: &mut PanelRows<'_>) {
    match h.len() / b.k() {
        1 => expand_some::<1, VECTORS, FMA>(h, panel, b, y),
        2 => expand_some::<2, 2, FMA>(h, panel, b, y),
        3 => expand_some::<3, 1, FMA>(h, panel, b, y),
        4 => expand_some::<4, 1, FMA>(h, panel, b, y),
        5 => expand_some::<5, 1, FMA>(h, panel, b, y),
        _ => expand_some::<EXPAND_ROWS, 1, FMA>(h, panel, b, y),
    }
}

/// `M` rows and `V` vectors at a time, one chain over ascending `s` per output.
#[inline(always)]
fn expand_some<const M: usize, const V: usize, const FMA: bool>(
    h: &[f32],
    panel: &[u32],
    b: &PackedMatrix,
    y: &mut PanelRows<'_>,
) {
    let r = b.k();
    assert_eq!(h.len(), M * r, "h has the rows");
    let (steps, _) = panel.as_chunks::<PANEL>();
    let columns = y[0].len().div_ceil(LANES);
    for from in (0..columns).step_by(V) {
        let mut acc = [[[0.0_f32; LANES]; V]; M];
        for (step, words) in steps.iter().enumerate() {
            let (vectors, _) = words.as_chunks::<LANES>();
            for v in 0..V {
                let words = &vectors[from + v];
                match b.format() {
                    WeightFormat::F32 => {
                        for (m, acc) in acc.iter_mut().enumerate() {
                            let h = h[m * r + step];
                            for (sum, word) in acc[v].iter_mut().zip(words) {
                                *sum = fma::<FMA>(h, f32::from_bits(*word), *sum);
                            }
                        }
                    }
                    WeightFormat::Bf16 => {
                        let low = words.map(|word| f32::from_bits(word << 16));
                        let high = words.map(|word| f32::from_bits(word & 0xffff_0000));
                        for (m, acc) in acc.iter_mut().enumerate() {
                            let first = h[m * r + 2 * step];
                            let second = if 2 * step + 1 < r { h[m * r + 2 * step + 1] } else { 0.0 };
                            for ((sum, low), high) in acc[v].iter_mut().zip(&low).zip(&high) {
                                *sum = fma::<FMA>(second, *high, fma::<FMA>(first, *low, *sum));
                            }
                        }
                    }
                }
            }
        }
        for (y, sums) in y.iter_mut().zip(&acc) {
            let Some(y) = y.get_mut(from * LANES..) else { continue };
            for (y, sum) in y.iter_mut().zip(sums.as_flattened()) {
                *y += sum;
            }
        }
    }
}

dispatch! {
    /// `y[j] += sum_s b[(from + j) mod q, s] * h[s]`, b: (q, r) packed, h: (r) f32.
    pub(super) fn expand(h: &[f32], b: &PackedMatrix, from: usize, y: &mut [f32]) => expand_body
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::cpu::testing::random;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn sums_are_products_with_f32_whatever_the_number_of_rows(
            n in 1_usize..150, r in 1_usize..300, rows in 1_usize..=EXPAND_ROWS, f32_weights: bool, seed: u64,
        ) {
            let (h, b) = (random(rows * r, seed), random(n * r, !seed));
            let row = |i: usize| &b[i * r..][..r];
            let b = if f32_weights { PackedMatrix::from_f32(n, r, row) } else { PackedMatrix::rounded(n, r, row) };
            let b = b.expect("memory for a small matrix");
            let plain = b.unpack();
            for panel_idx in 0..n.div_ceil(PANEL) {
                let mut together = [[f32::NAN; PANEL]; EXPAND_ROWS];
                expand_sums(&h, &b, panel_idx, &mut together);
                for (h, sums) in h.chunks_exact(r).zip(&together) {
                    let mut alone = [[f32::NAN; PANEL]; EXPAND_ROWS];
                    expand_sums(h, &b, panel_idx, &mut alone);
                    prop_assert_eq!(&alone[0], sums);
                    for (sum, b) in sums.iter().zip(plain.chunks_exact(r).skip(panel_idx * PANEL)) {
                        let expected: f64 = h.iter().zip(b).map(|(h, b)| f64::from(*h) * f64::from(*b)).sum();
                        // f32 summation of up to 300 products in [-1, 1].
                        prop_assert!((f64::from(*sum) - expected).abs() < 1e-4, "{sum} {expected}");
                    }
                }
            }
        }
    }
}
