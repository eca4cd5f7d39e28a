//! Up projections: short vectors times a packed matrix, added to outputs.

#![expect(unsafe_code, reason = "threads write disjoint parts of the outputs")]

use super::dispatch::{dispatch, fma};
#[cfg(target_arch = "x86_64")]
use super::gemm::Target;
use super::isa::Isa;
use super::lanes::Lanes;
use super::packed::{PANEL, PackedMatrix, WeightFormat};
use super::slots::Outputs;
#[cfg(target_arch = "x86_64")]
use super::tile_avx2 as avx2;
use super::words::LANES;

/// Rows that are expanded together; with the columns of a panel they fill the registers of AVX-512.
pub(super) const EXPAND_ROWS: usize = 6;

/// `y[m, j] += sum_s b[(first + j) mod q, s] * h[m, s]`, b: (q, r) packed, h: (m, r) f32.
///
/// # Safety
/// Nobody else may use the outputs meanwhile.
pub(super) unsafe fn expand_rows(h: &[f32], b: &PackedMatrix, outputs: &Outputs<'_>) {
    let (r, first, (from, to)) = (b.k(), outputs.first % b.n(), outputs.rows);
    // Panels of the term and of the linear coincide unless the term repeats over the outputs.
    let coincide = first.is_multiple_of(PANEL) && first + outputs.columns <= b.n();
    #[cfg(target_arch = "x86_64")]
    if let (true, Isa::Avx2, WeightFormat::Bf16) = (coincide, Isa::best(), b.format()) {
        let panels = b.panels(first / PANEL..(first + outputs.columns).div_ceil(PANEL));
        for (tile_idx, h) in h.chunks(EXPAND_ROWS * r).enumerate() {
            let target = outputs.target(from + tile_idx * EXPAND_ROWS);
            // SAFETY: the caller's contract.
            unsafe { expand_pairs((h, r), panels, target, outputs.columns, false) };
        }
        return;
    }
    if outputs.columns > PANEL {
        // SAFETY: the caller's contract.
        return outputs.panels().for_each(|panel| unsafe { expand_rows(h, b, &panel) });
    }
    for (tile_idx, h) in h.chunks(EXPAND_ROWS * r).enumerate() {
        let mut rows: [&mut [f32]; EXPAND_ROWS] = Default::default();
        for (row, y) in (from + tile_idx * EXPAND_ROWS..to).zip(&mut rows) {
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
unsafe fn expand_pairs((h, r): (&[f32], usize), panels: &[u32], y: Target, columns: usize, from_zero: bool) {
    // SAFETY: the caller's contract.
    unsafe {
        match h.len() / r {
            1 => avx2::expand::<1>((h, r), panels, y, columns, from_zero),
            2 => avx2::expand::<2>((h, r), panels, y, columns, from_zero),
            3 => avx2::expand::<3>((h, r), panels, y, columns, from_zero),
            4 => avx2::expand::<4>((h, r), panels, y, columns, from_zero),
            5 => avx2::expand::<5>((h, r), panels, y, columns, from_zero),
            _ => avx2::expand::<EXPAND_ROWS>((h, r), panels, y, columns, from_zero),
        }
    }
}

/// Vectors per panel.
const VECTORS: usize = PANEL / LANES;

/// The columns of one panel in up to [`EXPAND_ROWS`] rows; rows that are not there are empty.
pub(super) type PanelRows<'a> = [&'a mut [f32]; EXPAND_ROWS];

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
    /// `y[m, j] += sum_s b[j, s] * h[m, s]` for the columns of one panel and up to [`EXPAND_ROWS`] rows.
    pub(super) fn expand_tile(h: &[f32], panel: &[u32], b: &PackedMatrix, y: &mut PanelRows<'_>) => lanes expand_tile_body
}

#[inline(always)]
fn expand_tile_body<L: Lanes>(h: &[f32], panel: &[u32], b: &PackedMatrix, y: &mut PanelRows<'_>) {
    match (h.len() / b.k(), L::WIDE) {
        (1, _) => expand_some::<1, VECTORS, L>(h, panel, b, y),
        (2, true) => expand_some::<2, VECTORS, L>(h, panel, b, y),
        (3, true) => expand_some::<3, VECTORS, L>(h, panel, b, y),
        (4, true) => expand_some::<4, VECTORS, L>(h, panel, b, y),
        (5, true) => expand_some::<5, VECTORS, L>(h, panel, b, y),
        (_, true) => expand_some::<EXPAND_ROWS, VECTORS, L>(h, panel, b, y),
        (2, false) => expand_some::<2, 2, L>(h, panel, b, y),
        (3, false) => expand_some::<3, 1, L>(h, panel, b, y),
        (4, false) => expand_some::<4, 1, L>(h, panel, b, y),
        (5, false) => expand_some::<5, 1, L>(h, panel, b, y),
        (_, false) => expand_some::<EXPAND_ROWS, 1, L>(h, panel, b, y),
    }
}

/// `M` rows and `V` vectors at a time, one chain over ascending `s` per output.
#[inline(always)]
fn expand_some<const M: usize, const V: usize, L: Lanes>(
    h: &[f32],
    panel: &[u32],
    b: &PackedMatrix,
    y: &mut PanelRows<'_>,
) {
    let r = b.k();
    assert_eq!((h.len(), panel.len()), (M * r, b.format().steps(r) * PANEL), "h has the rows, and b its panel");
    let columns = y[0].len().div_ceil(LANES);
    for from in (0..columns).step_by(V) {
        let mut sums = [[[0.0_f32; LANES]; V]; M];
        // SAFETY: the panel holds as many steps as the rows, and `V` divides its vectors; the lanes are those of the
        // instruction set that this is compiled for.
        unsafe {
            let mut acc = [[L::splat(0.0); V]; M];
            for step in 0..panel.len() / PANEL {
                let words = panel.as_ptr().add(step * PANEL + from * LANES);
                match b.format() {
                    WeightFormat::F32 => {
                        let weights: [L; V] = std::array::from_fn(|v| L::load(words.add(v * LANES).cast()));
                        for (m, acc) in acc.iter_mut().enumerate() {
                            let h = L::splat(*h.get_unchecked(m * r + step));
                            for (sum, weight) in acc.iter_mut().zip(weights) {
                                *sum = sum.add_product(h, weight);
                            }
                        }
                    }
                    WeightFormat::Bf16 => {
                        let has_second = 2 * step + 1 < r;
                        let weights: [[L; 2]; V] = std::array::from_fn(|v| L::load_pairs(words.add(v * LANES)));
                        for (m, acc) in acc.iter_mut().enumerate() {
                            let h = h.as_ptr().add(m * r + 2 * step);
                            let pair = [L::splat(*h), L::splat(if has_second { *h.add(1) } else { 0.0 })];
                            for (sum, [low, high]) in acc.iter_mut().zip(weights) {
                                *sum = sum.add_product(pair[0], low).add_product(pair[1], high);
                            }
                        }
                    }
                }
            }
            for (sum, to) in acc.as_flattened().iter().zip(sums.as_flattened_mut()) {
                sum.store(to.as_mut_ptr());
            }
        }
        for (y, sums) in y.iter_mut().zip(&sums) {
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
