//! The matrix product with packed weights.

use super::ahead::Ahead;
use super::integers::{IntegerMatrix, groups};
use super::isa::Isa;
use super::packed::{PANEL, PackedMatrix};
use super::tile::{Fetch, ROWS, TileArgs, block_steps, tile};
use super::tile_integers::{IntegerArgs, block_groups, foresees, integer_tile};
use super::words::row_words;

/// Where a panel's product goes: the first row's first column, and the elements between rows.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) y: *mut f32,
    pub(super) stride: usize,
}

/// Tiles that the product of `m` rows with one block of a panel takes.
pub(super) fn num_passes(m: usize) -> usize {
    m.div_ceil(ROWS)
}

/// Rows of a tile: as even parts as possible, since few rows do not keep the arithmetic busy.
fn rows_together(m: usize) -> usize {
    m.div_ceil(num_passes(m).max(1)).max(1)
}

/// All rows `x` of padded words times one panel of `w`.
///
/// Every tile asks for its part of the next block, those of the last block for the one that `ahead` says comes after the panel,
/// and for a share of `ahead`.
///
/// # Safety
/// `target` must be valid for reads and writes of the panel's columns in each of the rows, and nobody else may touch
/// these meanwhile. `isa` must be available.
#[expect(unsafe_code, reason = "threads write different columns of one output")]
pub(super) unsafe fn multiply_panel(
    x: &[u32],
    w: &PackedMatrix,
    panel_idx: usize,
    target: Target,
    isa: Isa,
    ahead: &mut Ahead,
) {
    let x_stride = row_words(w.format(), w.k());
    let (m, columns) = (x.len() / x_stride, PANEL.min(w.n() - panel_idx * PANEL));
    let (steps, together) = (block_steps(isa), rows_together(m));
    let mut blocks = w.panel(panel_idx).chunks(steps * PANEL).enumerate().peekable();
    while let Some((block_idx, block)) = blocks.next() {
        // Every pass fetches a part of the next block.
        let next = blocks.peek().map_or(ahead.block, |(_, next)| Fetch::of(next));
        for row in (0..m).step_by(together) {
            let rows = together.min(m - row);
            let args = TileArgs {
                x: &x[row * x_stride + block_idx * steps..],
                x_stride,
                w: block,
                is_only: rows == m,
                y: target.y.wrapping_add(row * target.stride),
                y_stride: target.stride,
                columns,
                from_zero: block_idx == 0,
                fetch: next.of_rows((row, row + rows), m),
                far: ahead.share(),
            };
            // SAFETY: the rows and columns are the caller's.
            unsafe {
                tile(rows, isa, w.format(), args);
            }
        }
    }
}

/// All rows `x` of integers, as [`super::integers`] lays them out, times one panel of `w`.
///
/// # Safety
/// As for [`multiply_panel`].
#[expect(unsafe_code, reason = "threads write different columns of one output")]
pub(super) unsafe fn multiply_integer_panel(
    x: &[u32],
    w: &IntegerMatrix,
    panel_idx: usize,
    target: Target,
    isa: Isa,
    ahead: &mut Ahead,
) {
    let width = w.width();
    let x_stride = width.row_words(w.k());
    let m = x.len() / x_stride;
    let asks = !foresees(isa, width, m);
    let block_groups = if asks { block_groups(isa, width) } else { groups(w.k()) };
    let together = rows_together(m);
    let mut blocks = w.panel(panel_idx).chunks(block_groups * width.group_words()).enumerate().peekable();
    while let Some((block_idx, block)) = blocks.next() {
        let next = if asks { blocks.peek().map_or(ahead.block, |(_, next)| Fetch::of(next)) } else { Fetch::NONE };
        for row in (0..m).step_by(together) {
            let rows = together.min(m - row);
            let args = IntegerArgs {
                x: &x[row * x_stride..],
                x_stride,
                groups: groups(w.k()),
                first_group: block_idx * block_groups,
                w: block,
                y: target.y.wrapping_add(row * target.stride),
                y_stride: target.stride,
                columns: PANEL.min(w.n() - panel_idx * PANEL),
                from_zero: block_idx == 0,
                fetch: next.of_rows((row, row + rows), m),
                far: ahead.share(),
            };
            // SAFETY: the rows and columns are the caller's.
            unsafe { integer_tile(rows, isa, width, &args) };
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::super::integers::{GROUP, IntegerWidth, quantise_row};
    use super::super::packed::WeightFormat;
    use super::super::pool::for_each;
    use super::super::shared::Shared;
    use super::super::words::write_row;
    use super::*;
    use crate::kernels::cpu::testing::random;

    /// The whole product, panels spread over threads as the linear does.
    #[expect(unsafe_code, reason = "calls the kernel")]
    fn matmul_packed(x: &[f32], m: usize, w: &PackedMatrix, y: &mut [f32], isa: Isa) {
        assert_eq!(x.len(), m * w.k(), "x is (m, k)");
        assert_eq!(y.len(), m * w.n(), "y is (m, n)");
        let width = row_words(w.format(), w.k());
        let mut words = vec![0; m * width];
        for (row, words) in x.chunks_exact(w.k()).zip(words.chunks_exact_mut(width)) {
            write_row(isa, w.format(), row, words);
        }
        let output = Shared::new(y);
        for_each(w.n().div_ceil(PANEL), |panel_idx| {
            let target = Target { y: output.at(panel_idx * PANEL), stride: w.n() };
            // SAFETY: a panel's columns are written by its task only.
            unsafe { multiply_panel(&words, w, panel_idx, target, isa, &mut Ahead::default()) };
        });
    }

    /// The plain reference: rounds as the kernel does, sums in f64.
    fn reference(x: &[f32], w: &[f32], (m, n, k): (usize, usize, usize), format: WeightFormat) -> Vec<f64> {
        let round = |v: f32| match format {
            WeightFormat::F32 => f64::from(v),
            WeightFormat::Bf16 => bf16::from_f32(v).to_f64(),
        };
        let mut y = vec![0.0; m * n];
        for (row, out) in y.chunks_exact_mut(n).enumerate() {
            for (column, value) in out.iter_mut().enumerate() {
                *value = (0..k).map(|i| round(x[row * k + i]) * round(w[column * k + i])).sum();
            }
        }
        y
    }

    fn pack(w: &[f32], n: usize, k: usize, format: WeightFormat) -> PackedMatrix {
        let rounded: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
        match format {
            WeightFormat::F32 => PackedMatrix::from_f32(n, k, |i| &w[i * k..][..k]),
            WeightFormat::Bf16 => PackedMatrix::from_bf16(n, k, |i| &rounded[i * k..][..k]),
        }
        .expect("memory for a small matrix")
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn product_equals_the_plain_reference(
            m in 1_usize..14, n in 1_usize..150, k in 1_usize..1100, f32_weights: bool, seed: u64,
        ) {
            let format = if f32_weights { WeightFormat::F32 } else { WeightFormat::Bf16 };
            let (x, w) = (random(m * k, seed), random(n * k, !seed));
            let packed = pack(&w, n, k, format);
            let expected = reference(&x, &w, (m, n, k), format);
            for isa in Isa::available() {
                let mut y = vec![f32::NAN; m * n];
                matmul_packed(&x, m, &packed, &mut y, isa);
                for (found, expected) in y.iter().zip(&expected) {
                    // f32 summation of up to 1,100 products in [-1, 1].
                    prop_assert!((f64::from(*found) - expected).abs() < 2e-4, "{isa:?} {found} {expected}");
                }
            }
        }

        #[test]
        fn a_row_has_the_same_bits_alone_and_among_others(
            m in 2_usize..20, n in 1_usize..100, k in 1_usize..1100, f32_weights: bool, seed: u64,
        ) {
            let format = if f32_weights { WeightFormat::F32 } else { WeightFormat::Bf16 };
            let (x, w) = (random(m * k, seed), random(n * k, !seed));
            let packed = pack(&w, n, k, format);
            for isa in Isa::available() {
                let mut together = vec![0.0; m * n];
                matmul_packed(&x, m, &packed, &mut together, isa);
                for (row, expected) in together.chunks_exact(n).enumerate() {
                    let mut alone = vec![0.0; n];
                    matmul_packed(&x[row * k..][..k], 1, &packed, &mut alone, isa);
                    prop_assert_eq!(expected, &alone[..]);
                }
            }
        }
    }

    /// The whole product with integers.
    #[expect(unsafe_code, reason = "calls the kernel")]
    fn matmul_integers(x: &[f32], m: usize, w: &IntegerMatrix, y: &mut [f32], isa: Isa) {
        let width = w.width().row_words(w.k());
        let mut words = vec![0; m * width];
        for (row, words) in x.chunks_exact(w.k()).zip(words.chunks_exact_mut(width)) {
            quantise_row(isa, w.width(), row, words);
        }
        let output = Shared::new(y);
        for_each(w.n().div_ceil(PANEL), |panel_idx| {
            let target = Target { y: output.at(panel_idx * PANEL), stride: w.n() };
            // SAFETY: a panel's columns are written by its task only.
            unsafe { multiply_integer_panel(&words, w, panel_idx, target, isa, &mut Ahead::default()) };
        });
    }

    /// The formula of [`super::super::integers`] with everything quantised here, in other words than there.
    fn integer_reference(x: &[f32], w: &[f32], (m, n, k): (usize, usize, usize), width: IntegerWidth) -> Vec<f32> {
        let largest = |values: &[f32]| values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        let to = |integer: f32| move |values: &[f32]| (integer / largest(values), largest(values) / integer);
        let power = |values: &[f32]| {
            let exponent = (f64::from(largest(values)).log2().floor() as i32 - 11).max(-126);
            (2_f32.powi(-exponent), 2_f32.powi(exponent))
        };
        let rows = |matrix: &[f32], scale: &dyn Fn(&[f32]) -> (f32, f32)| -> Vec<Vec<(Vec<i64>, f32)>> {
            let group = |values: &[f32]| {
                let (inverse, scale) = scale(values);
                (values.iter().map(|value| (value * inverse).round_ties_even() as i64).collect(), scale)
            };
            matrix.chunks_exact(k).map(|row| row.chunks(GROUP).map(group).collect()).collect()
        };
        let (x, w) = match width {
            IntegerWidth::Eight => (rows(x, &to(127.0)), rows(w, &to(127.0))),
            IntegerWidth::Sixteen => (rows(x, &to(8191.0)), rows(w, &power)),
        };
        let mut y = vec![0.0; m * n];
        for (row, out) in x.iter().zip(y.chunks_exact_mut(n)) {
            for (column, value) in w.iter().zip(out) {
                for ((xq, xs), (wq, ws)) in row.iter().zip(column) {
                    let sum: i64 = xq.iter().zip(wq).map(|(x, w)| x * w).sum();
                    *value = match width {
                        IntegerWidth::Eight => *value + sum as f32 * (ws * xs),
                        IntegerWidth::Sixteen => (sum as f32).mul_add(ws * xs, *value),
                    };
                }
            }
        }
        y
    }

    const WIDTHS: [IntegerWidth; 2] = [IntegerWidth::Eight, IntegerWidth::Sixteen];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn integers_give_the_bits_of_the_formula_on_every_processor(
            m in 1_usize..14, n in 1_usize..150, k in 1_usize..700, seed: u64,
        ) {
            let (x, mut w) = (random(m * k, seed), random(n * k, !seed));
            // The extremes too, whose products would overflow 16 bits in pairs.
            w.iter_mut().take(k).for_each(|w| *w = w.signum());
            for width in WIDTHS {
                let read = |i: usize, row: &mut [f32]| row.copy_from_slice(&w[i * k..][..k]);
                let packed = IntegerMatrix::new(width, WeightFormat::F32, (n, k), read);
                let packed = packed.expect("memory for a small matrix");
                let expected = integer_reference(&x, &w, (m, n, k), width);
                for isa in Isa::available() {
                    let mut y = vec![f32::NAN; m * n];
                    matmul_integers(&x, m, &packed, &mut y, isa);
                    prop_assert_eq!(&y, &expected, "{:?} {:?}", isa, width);
                }
            }
        }

        #[test]
        fn sixteen_bits_are_nearer_to_the_exact_product_than_rounding_to_bf16(
            n in 1_usize..70, k in 64_usize..700, outlier in 0_usize..64, size in 0_i32..10, seed: u64,
        ) {
            let (mut x, mut w) = (random(k, seed), random(n * k, !seed));
            w.iter_mut().for_each(|w| *w = bf16::from_f32(*w).to_f32());
            x[outlier] *= 2_f32.powi(size);
            let read = |i: usize, row: &mut [f32]| row.copy_from_slice(&w[i * k..][..k]);
            let packed = IntegerMatrix::new(IntegerWidth::Sixteen, WeightFormat::Bf16, (n, k), read).expect("w");
            let mut y = vec![f32::NAN; n];
            matmul_integers(&x, 1, &packed, &mut y, Isa::best());
            let exact = reference(&x, &w, (1, n, k), WeightFormat::F32);
            let rounded = reference(&x, &w, (1, n, k), WeightFormat::Bf16);
            let squares = |found: &mut dyn Iterator<Item = f64>| -> f64 { found.zip(&exact).map(|(f, e)| (f - e).powi(2)).sum() };
            let integers = squares(&mut y.iter().map(|y| f64::from(*y)));
            // A single output may be lucky; what both lose is that of many products.
            let largest = x.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
            let luck = n as f64 * (f64::from(largest) / 8192.0).powi(2) * k as f64;
            prop_assert!(integers <= squares(&mut rounded.iter().copied()) + luck, "{integers}");
        }
    }

    #[test]
    fn the_largest_integers_do_not_overflow() {
        let (m, n, k) = (7, 65, 130);
        // As large as its exponent allows.
        for (width, value) in [(IntegerWidth::Eight, 1.0), (IntegerWidth::Sixteen, f32::from_bits(0x3fff_ffff))] {
            let values = |len: usize| vec![-value; len];
            let read = |_: usize, row: &mut [f32]| row.fill(-value);
            let packed = IntegerMatrix::new(width, WeightFormat::F32, (n, k), read).expect("w");
            for isa in Isa::available() {
                let mut y = vec![f32::NAN; m * n];
                matmul_integers(&values(m * k), m, &packed, &mut y, isa);
                assert!(y.iter().all(|y| (y / (value * value) - 130.0).abs() < 1e-3), "{isa:?} {y:?}");
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none_and_extremes_stay_in_range() {
        let (n, k) = (3, 70);
        for (weight, row) in [(f32::INFINITY, 1.0), (f32::NAN, 1.0), (1.0, f32::NAN), (1.0, f32::NEG_INFINITY)] {
            for width in WIDTHS {
                let read = |i: usize, w: &mut [f32]| w.fill(if i == 1 { weight } else { 1.0 });
                let packed = IntegerMatrix::new(width, WeightFormat::F32, (n, k), read).expect("w");
                for isa in Isa::available() {
                    let mut y = vec![0.0; n];
                    matmul_integers(&vec![row; k], 1, &packed, &mut y, isa);
                    let finite = if row.is_finite() { [true, false, true] } else { [false; 3] };
                    assert_eq!(y.iter().map(|y| y.is_finite()).collect::<Vec<_>>(), finite, "{isa:?} {width:?} {y:?}");
                }
            }
        }
        for tiny in [0.0, 1e-44, 1e-38, 1e-35] {
            let read = |_: usize, w: &mut [f32]| w.fill(tiny);
            let packed = IntegerMatrix::new(IntegerWidth::Sixteen, WeightFormat::F32, (n, k), read).expect("w");
            assert!(packed.unpack().iter().all(|w| (w - tiny).abs() < 2_f32.powi(-126)), "{tiny}");
        }
    }

    #[test]
    fn unpacking_gives_the_matrix_back() {
        for format in [WeightFormat::F32, WeightFormat::Bf16] {
            let (n, k) = (70, 33);
            let w: Vec<f32> = random(n * k, 5).iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
            assert_eq!(pack(&w, n, k, format).unpack(), w);
            let bytes: Vec<u8> = w.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
            assert_eq!(PackedMatrix::from_bf16_bytes(n, k, &bytes).expect("memory").unpack(), w);
        }
    }
}
