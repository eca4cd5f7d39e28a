//! Up projections: short vectors times a packed matrix, added to outputs.

#![expect(unsafe_code, reason = "threads write disjoint parts of the outputs, through raw pointers")]

use super::dispatch::{dispatch, fma};
use super::gemm::Target;
use super::isa::Isa;
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{Lanes, Plain};
use super::packed::{PANEL, PackedMatrix, WeightFormat};
use super::slots::Outputs;
#[cfg(target_arch = "x86_64")]
use super::tile_avx2 as avx2;
use super::words::LANES;

/// Rows that are expanded together; with the columns of a panel they fill the registers of AVX-512.
pub(super) const EXPAND_ROWS: usize = 6;
/// Vectors of a panel's columns.
const VECTORS: usize = PANEL / LANES;

/// `y[m, j] += sum_s b[(first + j) mod q, s] * h[m, s]`, b: (q, r) packed, h: (m, r) f32.
///
/// # Safety
/// Nobody else may use the outputs meanwhile.
pub(super) unsafe fn expand_rows(h: &[f32], b: &PackedMatrix, outputs: &Outputs<'_>) {
    let (r, first, (from, to)) = (b.k(), outputs.first % b.n(), outputs.rows);
    // Panels of the term and of the linear coincide unless the term repeats over the outputs.
    if first.is_multiple_of(PANEL) && first + outputs.columns <= b.n() {
        assert_eq!(h.len(), (to - from) * r, "h has the rows of the outputs");
        // SAFETY: the caller's contract; the outputs hold the rows.
        unsafe { expand_panels(h, b, first / PANEL, outputs.target(from), outputs.columns, false) };
        return;
    }
    // Which way a panel takes depends on nothing but the panel, as the ways round differently.
    if outputs.columns > PANEL {
        // SAFETY: the caller's contract.
        return outputs.panels().for_each(|panel| unsafe { expand_rows(h, b, &panel) });
    }
    for (row, h) in (from..to).zip(h.chunks_exact(r)) {
        // SAFETY: the caller's contract; one row at a time.
        expand(Isa::best(), h, b, first, unsafe { outputs.row(row) });
    }
}

/// `sums[m, j] = sum_s b[j, s] * h[m, s]` for the columns of one panel and up to [`EXPAND_ROWS`] rows h of f32; one chain per
/// sum, whatever the number of rows.
pub(super) fn expand_sums(h: &[f32], b: &PackedMatrix, panel_idx: usize, sums: &mut [[f32; PANEL]; EXPAND_ROWS]) {
    assert!(h.len() <= EXPAND_ROWS * b.k(), "no more rows than sums");
    let y = Target { y: sums.as_mut_ptr().cast(), stride: PANEL };
    // SAFETY: the sums have the rows, and the panel as many columns.
    unsafe { expand_panels(h, b, panel_idx, y, PANEL, true) };
}

/// `y[m, j] += sum_s b[PANEL first + j, s] * h[m, s]` for `columns` columns and the rows h of r numbers in f32; with `from_zero`
/// the sums replace what y held. One chain over ascending `s` per output, from `y` on, whatever the number of rows.
///
/// # Safety
/// `y` must be valid for reads and writes of the columns in each row of `h`, and nobody else may touch them meanwhile.
pub(super) unsafe fn expand_panels(
    h: &[f32],
    b: &PackedMatrix,
    first: usize,
    y: Target,
    columns: usize,
    from_zero: bool,
) {
    let (isa, r) = (Isa::best(), b.k());
    let panels = b.panels(first..first + columns.div_ceil(PANEL));
    for (tile_idx, h) in h.chunks(EXPAND_ROWS * r).enumerate() {
        let y = Target { y: y.y.wrapping_add(tile_idx * EXPAND_ROWS * y.stride), ..y };
        let up = Up { h, r, panels, format: b.format(), y, columns, from_zero };
        // SAFETY: the caller's contract; the instruction set was detected.
        unsafe {
            match h.len() / r {
                1 => up.tile::<1>(isa),
                2 => up.tile::<2>(isa),
                3 => up.tile::<3>(isa),
                4 => up.tile::<4>(isa),
                5 => up.tile::<5>(isa),
                _ => up.tile::<EXPAND_ROWS>(isa),
            }
        }
    }
}

/// A few rows of an up projection.
#[derive(Clone, Copy)]
struct Up<'a> {
    /// Short vectors (rows, r).
    h: &'a [f32],
    r: usize,
    /// Neighbouring panels.
    panels: &'a [u32],
    format: WeightFormat,
    y: Target,
    columns: usize,
    from_zero: bool,
}

/// Each with `M` rows.
///
/// # Safety
/// As for [`expand_panels`]; the processor has the instructions.
impl Up<'_> {
    unsafe fn tile<const M: usize>(self, isa: Isa) {
        assert_eq!(self.h.len(), M * self.r, "h has the rows");
        // SAFETY: the caller's contract.
        unsafe {
            match (isa, self.format) {
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, WeightFormat::Bf16) => {
                    avx2::expand::<M>((self.h, self.r), self.panels, self.y, self.columns, self.from_zero);
                }
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, WeightFormat::F32) => self.avx2::<M>(),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16, _) => self.avx512::<M>(),
                _ => self.strips::<M, 1, Plain>(),
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn avx512<const M: usize>(self) {
        // SAFETY: the caller's contract.
        unsafe { self.strips::<M, VECTORS, Avx512>() }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2<const M: usize>(self) {
        // SAFETY: the caller's contract.
        unsafe {
            match M {
                1 => self.strips::<M, VECTORS, Avx2>(),
                2 => self.strips::<M, 2, Avx2>(),
                _ => self.strips::<M, 1, Avx2>(),
            }
        }
    }

    /// `V` vectors of columns at a time.
    #[inline(always)]
    unsafe fn strips<const M: usize, const V: usize, L: Lanes>(self) {
        let panel_words = self.format.steps(self.r) * PANEL;
        assert_eq!(self.panels.len(), self.columns.div_ceil(PANEL) * panel_words, "the panels have the columns");
        for from in (0..self.columns).step_by(V * LANES) {
            let columns = (V * LANES).min(self.columns - from);
            let words = &self.panels[from / PANEL * panel_words + from % PANEL..];
            let y = self.y.y.wrapping_add(from);
            // SAFETY: the panel holds the strip's columns in every step, and `y` is the caller's; where there are fewer columns
            // than the strip has the sums go through memory that has all.
            unsafe {
                if columns == V * LANES {
                    self.strip::<M, V, L>(words, y, self.y.stride);
                    continue;
                }
                let mut copy = [[0.0_f32; PANEL]; M];
                let at = copy.as_flattened_mut().as_mut_ptr();
                for row in 0..if self.from_zero { 0 } else { M } {
                    y.add(row * self.y.stride).copy_to_nonoverlapping(at.add(row * PANEL), columns);
                }
                self.strip::<M, V, L>(words, at, PANEL);
                for row in 0..M {
                    at.add(row * PANEL).copy_to_nonoverlapping(y.add(row * self.y.stride), columns);
                }
            }
        }
    }

    /// One strip: `words` start at its first column of the first step.
    #[inline(always)]
    unsafe fn strip<const M: usize, const V: usize, L: Lanes>(self, words: &[u32], y: *mut f32, stride: usize) {
        let (h, r) = (self.h.as_ptr(), self.r);
        // SAFETY: the caller's contract; h has `M` rows by the assertion in `tile`.
        unsafe {
            let mut acc = [[L::splat(0.0); V]; M];
            for (m, acc) in acc.iter_mut().enumerate().take(if self.from_zero { 0 } else { M }) {
                for (v, sum) in acc.iter_mut().enumerate() {
                    *sum = L::load(y.add(m * stride + v * LANES));
                }
            }
            for step in 0..self.format.steps(r) {
                let words = words.as_ptr().add(step * PANEL);
                match self.format {
                    WeightFormat::F32 => {
                        let weights: [L; V] = std::array::from_fn(|v| L::load(words.add(v * LANES).cast()));
                        for (m, acc) in acc.iter_mut().enumerate() {
                            let h = L::splat(*h.add(m * r + step));
                            for (sum, weight) in acc.iter_mut().zip(weights) {
                                *sum = sum.add_product(h, weight);
                            }
                        }
                    }
                    WeightFormat::Bf16 => {
                        let has_second = 2 * step + 1 < r;
                        let weights: [[L; 2]; V] = std::array::from_fn(|v| L::load_pairs(words.add(v * LANES)));
                        for (m, acc) in acc.iter_mut().enumerate() {
                            let h = h.add(m * r + 2 * step);
                            let pair = [L::splat(*h), L::splat(if has_second { *h.add(1) } else { 0.0 })];
                            for (sum, [low, high]) in acc.iter_mut().zip(weights) {
                                *sum = sum.add_product(pair[0], low).add_product(pair[1], high);
                            }
                        }
                    }
                }
            }
            for (m, acc) in acc.iter().enumerate() {
                for (v, sum) in acc.iter().enumerate() {
                    sum.store(y.add(m * stride + v * LANES));
                }
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
