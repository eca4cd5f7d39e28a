//! Weights in integers, and the rows that are multiplied with them.
//!
//! Inputs are divided into groups of [`GROUP`]. Every output of a group and every row's part in it are integers times a
//! scale:
//!
//! ```text
//! y[m, n] = sum_g ( sum_{i in g} xq[m, i] wq[n, i] ) * ( ws[n, g] xs[m, g] )
//! ```
//!
//! The inner sum is exact in i32 and the outer one takes the groups in ascending order, so all instruction sets give the same
//! bits: the scales are multiplied, then the sum by them, and the product is added; of 16 bits the last two are fused.
//!
//! | width | weights | their scale | rows | their scale |
//! |---|---|---|---|---|
//! | 8 bits | -127 to 127 | a 127th of the group's largest | -127 to 127 | a 127th of the group's largest |
//! | 16 bits | -4096 to 4096 | the power of two, 2^-126 or more, that makes the group's largest 2048 or more | -8191 to 8191 | an 8191st of the group's largest |
//!
//! 16 bits stand in for bf16 where a processor multiplies pairs of such integers at twice the rate of f32 and has no
//! product of bf16. A bf16 weight stays as it is down to a sixteenth of its group's largest, and below that loses at most
//! 2^-12 of it. A row loses at most 2^-14 of a group's largest value, where rounding to bf16 loses up to 2^-9 of that value
//! alone.
//!
//! Columns of the product are grouped into panels of 64, inside a panel everything of a group adjoins: `[steps][64]` words,
//! each of as many inputs as fit, the first in the lowest bits, then `[64]` scales, in f32 or (of powers of two) as the
//! bytes of their exponents. Missing columns and inputs are zeros.

use half::bf16;
use rayon::prelude::*;

use super::dispatch::dispatch;
use super::isa::Isa;
use super::memory::Memory;
use super::packed::{PANEL, WeightFormat};
use super::words::LANES;

/// Inputs that share a scale.
pub(super) const GROUP: usize = 64;
/// Words of a group of 8-bit integers.
pub(super) const STEPS_8: usize = GROUP / 4;
/// Words of a group of 16-bit integers.
pub(super) const STEPS_16: usize = GROUP / 2;
/// The largest 8-bit integer.
const LARGEST_8: f32 = 127.0;
/// The largest 16-bit integer of a row: 64 products with 4096 fit into 32 bits.
const LARGEST_16: f32 = 8191.0;
/// Exponent of the least that a group's largest 16-bit weight is.
const WEIGHT_EXPONENT: u32 = 11;
/// Magnitudes below it count as zero in rows and 8-bit weights, so that no scale is subnormal.
const SMALLEST: f32 = 1e-30;
/// Bits of an f32 below its exponent.
pub(super) const MANTISSA_BITS: u32 = f32::MANTISSA_DIGITS - 1;

/// Width of integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IntegerWidth {
    /// 8 bits, each group with a scale in f32: 1.06 bytes per weight.
    Eight,
    /// 16 bits, of which weights use 13 and rows 14, each group with a power of two: 2.02 bytes per weight.
    Sixteen,
}

impl IntegerWidth {
    /// The integers to make bf16 weights with rows of `k` elements, where those are faster; not where zeros would fill up more
    /// than an eighth.
    pub fn for_bf16(k: usize) -> Option<Self> {
        let fills = groups(k) * GROUP * 8 <= k * 9;
        (fills && Isa::best().prefers_integers()).then_some(Self::Sixteen)
    }

    /// Words of a row or column in a group.
    const fn steps(self) -> usize {
        match self {
            Self::Eight => STEPS_8,
            Self::Sixteen => STEPS_16,
        }
    }

    /// Words of a panel in a group: the integers, then the scales.
    pub(super) const fn group_words(self) -> usize {
        let scales = match self {
            Self::Eight => PANEL,
            Self::Sixteen => PANEL / 4,
        };
        self.steps() * PANEL + scales
    }

    /// Words of a row of `k` elements: the integers of all groups, their scales, of 8-bit integers their sums, and padding.
    pub(super) fn row_words(self, k: usize) -> usize {
        let others = match self {
            Self::Eight => 2,
            Self::Sixteen => 1,
        };
        (groups(k) * (self.steps() + others)).next_multiple_of(LANES)
    }

    /// A column's scale in a panel's group.
    pub(super) fn scale(self, group: &[u32], lane: usize) -> f32 {
        let scales = &group[self.steps() * PANEL..];
        f32::from_bits(match self {
            Self::Eight => scales[lane],
            Self::Sixteen => u32::from(scales[lane / 4].to_le_bytes()[lane % 4]) << MANTISSA_BITS,
        })
    }

    /// Integer `idx` of a group's column in a panel.
    fn integer(self, group: &[u32], lane: usize, idx: usize) -> f32 {
        match self {
            Self::Eight => f32::from(group[idx / 4 * PANEL + lane].to_le_bytes()[idx % 4].cast_signed()),
            Self::Sixteen => f32::from(((group[idx / 2 * PANEL + lane] >> (idx % 2 * 16)) as u16).cast_signed()),
        }
    }
}

/// A weight matrix (n, k) in integers, immutable once packed.
pub struct IntegerMatrix {
    words: Memory<u32>,
    width: IntegerWidth,
    terms: WeightFormat,
    n: usize,
    k: usize,
}

impl std::fmt::Debug for IntegerMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IntegerMatrix({:?}, n = {}, k = {})", self.width, self.n, self.k)
    }
}

impl IntegerMatrix {
    /// Makes a matrix (n, k) integers; `read(i, row)` writes its i-th row. `terms` is the format of what adapters add or
    /// put in the place of it.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn new(
        width: IntegerWidth,
        terms: WeightFormat,
        (n, k): (usize, usize),
        read: impl Fn(usize, &mut [f32]) + Sync,
    ) -> std::io::Result<Self> {
        assert!(n > 0 && k > 0, "a matrix has rows and columns");
        let (steps, panel_words) = (width.steps(), groups(k) * width.group_words());
        let mut words = Memory::<u32>::zeros(n.div_ceil(PANEL) * panel_words)?;
        words.par_chunks_mut(panel_words).enumerate().for_each(|(panel_idx, panel)| {
            let columns = PANEL.min(n - panel_idx * PANEL);
            let (mut row, mut column) = (vec![0.0; k], vec![0; width.row_words(k)]);
            for lane in 0..columns {
                read(panel_idx * PANEL + lane, &mut row);
                match width {
                    IntegerWidth::Eight => quantise_row(Isa::best(), width, &row, &mut column),
                    IntegerWidth::Sixteen => quantise_weights(Isa::best(), &row, &mut column),
                }
                let (integers, scales) = column.split_at(groups(k) * steps);
                let of_groups = integers.chunks_exact(steps).zip(scales);
                for ((integers, scale), group) in of_groups.zip(panel.chunks_exact_mut(width.group_words())) {
                    let places = group[lane..].iter_mut().step_by(PANEL);
                    places.zip(integers).for_each(|(place, word)| *place = *word);
                    let scales = &mut group[steps * PANEL..];
                    match width {
                        IntegerWidth::Eight => scales[lane] = *scale,
                        IntegerWidth::Sixteen => scales[lane / 4] |= (scale >> MANTISSA_BITS) << (lane % 4 * 8),
                    }
                }
            }
        });
        Ok(Self { words, width, terms, n, k })
    }

    /// Columns of the product.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Length of the rows multiplied with it.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Width of its integers.
    pub fn width(&self) -> IntegerWidth {
        self.width
    }

    /// Format of what adapters add to it.
    pub fn terms(&self) -> WeightFormat {
        self.terms
    }

    /// Bytes it takes in memory.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.words)
    }

    /// The matrix that is multiplied with in row-major order (n, k): integers times scales, rounded to f32.
    pub fn unpack(&self) -> Vec<f32> {
        let mut w = vec![0.0; self.n * self.k];
        w.par_chunks_mut(self.k).enumerate().for_each(|(column, row)| self.read_row(column, row));
        w
    }

    /// Whether the row-major matrix `w` (n, k), or what a half-precision format rounds it to, may be what was made integers:
    /// every value lies within half a unit of its integer. 16-bit integers are taken to be made of bf16.
    ///
    /// # Panics
    /// When `w` is not n times k long.
    pub fn may_be_of(&self, w: &[f32]) -> bool {
        /// Of a unit; the rest is for what computing it rounds.
        const HALF: f32 = 0.505;
        /// Of a value: bf16 keeps 8 bits.
        const ROUNDING: f32 = 1.0 / 256.0;
        assert_eq!(w.len(), self.n * self.k, "the matrix is (n, k)");
        let near = |value: f32, kept: f32, unit: f32| match self.width {
            IntegerWidth::Eight => (value - kept).abs() <= HALF * unit + ROUNDING * value.abs(),
            IntegerWidth::Sixteen => (bf16::from_f32(value).to_f32() - kept).abs() <= HALF * unit,
        };
        w.par_chunks(self.k).enumerate().all(|(column, values)| {
            let mut kept = vec![0.0; self.k];
            self.read_row(column, &mut kept);
            let groups = self.panel(column / PANEL).chunks_exact(self.width.group_words());
            values.chunks(GROUP).zip(kept.chunks(GROUP)).zip(groups).all(|((values, kept), group)| {
                let unit = self.width.scale(group, column % PANEL);
                values.iter().zip(kept).all(|(value, kept)| near(*value, *kept, unit))
            })
        })
    }

    /// Reads one row of the (n, k) matrix into `row` (k), as [`IntegerMatrix::unpack`] does.
    ///
    /// # Panics
    /// When `column` is not below n or `row` is not of length k.
    pub fn read_row(&self, column: usize, row: &mut [f32]) {
        assert!(column < self.n && row.len() == self.k, "row {column} of {self:?} into {} values", row.len());
        let (panel, lane) = (self.panel(column / PANEL), column % PANEL);
        for (values, group) in row.chunks_mut(GROUP).zip(panel.chunks_exact(self.width.group_words())) {
            let scale = self.width.scale(group, lane);
            for (idx, value) in values.iter_mut().enumerate() {
                *value = self.width.integer(group, lane, idx) * scale;
            }
        }
    }

    /// One panel, groups of [`IntegerWidth::group_words`].
    pub(super) fn panel(&self, panel_idx: usize) -> &[u32] {
        let panel_words = groups(self.k) * self.width.group_words();
        &self.words[panel_idx * panel_words..][..panel_words]
    }
}

/// Groups of `k` inputs.
pub(super) fn groups(k: usize) -> usize {
    k.div_ceil(GROUP)
}

dispatch! {
    /// Writes one row of activations as [`IntegerWidth::row_words`]. A group with a value that is no number has a scale that
    /// is none, one with an infinite value an infinite scale.
    pub(super) fn quantise_row(width: IntegerWidth, row: &[f32], words: &mut [u32]) => quantise_row_body
}

dispatch! {
    /// Writes one row of a weight as [`IntegerWidth::row_words`] of 16-bit integers, whose scales are powers of two, zero, or
    /// where a value is not finite infinite.
    fn quantise_weights(row: &[f32], words: &mut [u32]) => quantise_weights_body
}

#[inline(always)]
fn quantise_row_body<const FMA: bool>(width: IntegerWidth, row: &[f32], words: &mut [u32]) {
    assert_eq!(words.len(), width.row_words(row.len()), "a padded row");
    let groups = groups(row.len());
    let (integers, rest) = words.split_at_mut(groups * width.steps());
    let (scales, sums) = rest.split_at_mut(groups);
    let of_groups = row.chunks(GROUP).zip(scales);
    match width {
        IntegerWidth::Eight => {
            let (integers, _) = integers.as_chunks_mut::<STEPS_8>();
            for (((values, scale), steps), sum) in of_groups.zip(integers).zip(sums) {
                let (values, largest) = padded(values);
                let (of_group, inverse) = scale_to(largest, LARGEST_8);
                let integers = rounded(&values, inverse);
                pack_8(&integers, steps);
                // As the bytes are read, whatever the integers are where the scale is none.
                let total: i32 = integers.iter().map(|integer| i32::from(*integer as i8)).sum();
                (*scale, *sum) = (of_group.to_bits(), total.cast_unsigned());
            }
        }
        IntegerWidth::Sixteen => {
            let (integers, _) = integers.as_chunks_mut::<STEPS_16>();
            for ((values, scale), steps) in of_groups.zip(integers) {
                let (values, largest) = padded(values);
                let (of_group, inverse) = scale_to(largest, LARGEST_16);
                pack_16(&rounded(&values, inverse), steps);
                *scale = of_group.to_bits();
            }
        }
    }
}

#[inline(always)]
fn quantise_weights_body<const FMA: bool>(row: &[f32], words: &mut [u32]) {
    assert_eq!(words.len(), IntegerWidth::Sixteen.row_words(row.len()), "a padded row");
    let (integers, scales) = words.split_at_mut(groups(row.len()) * STEPS_16);
    let (integers, _) = integers.as_chunks_mut::<STEPS_16>();
    for ((values, scale), steps) in row.chunks(GROUP).zip(scales).zip(integers) {
        let (values, largest) = padded(values);
        let exponent = match largest.to_bits() >> MANTISSA_BITS {
            exponent if largest.is_finite() => exponent.saturating_sub(WEIGHT_EXPONENT).max(1),
            infinite => infinite,
        };
        // 2^-126 to 2^126, and a unit's inverse beside it; infinity has none.
        let inverse = f32::from_bits((2 * 127_u32).saturating_sub(exponent) << MANTISSA_BITS);
        pack_16(&rounded(&values, inverse), steps);
        *scale = exponent << MANTISSA_BITS;
    }
}

/// Up to [`GROUP`] values with zeros behind them, and the largest magnitude; what is no number is larger than all numbers.
#[inline(always)]
fn padded(values: &[f32]) -> ([f32; GROUP], f32) {
    let mut padded = [0.0_f32; GROUP];
    padded[..values.len()].copy_from_slice(values);
    // Magnitudes are ordered as their bits are, and what is no number comes last.
    let largest = padded.iter().fold(0, |largest: u32, value| largest.max(value.abs().to_bits()));
    (padded, f32::from_bits(largest))
}

/// The scale by which `largest` becomes the integer `to`, and its inverse.
#[inline(always)]
fn scale_to(largest: f32, to: f32) -> (f32, f32) {
    if largest < SMALLEST { (0.0, 0.0) } else { (largest / to, to / largest) }
}

/// The integers nearest to `values` times `inverse`, of a magnitude below 2^22; ties to even.
#[inline(always)]
fn rounded(values: &[f32; GROUP], inverse: f32) -> [i32; GROUP] {
    /// 1.5 * 2^23: adding it rounds to an integer that sits in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    values.map(|value| (value * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).cast_signed())
}

#[inline(always)]
fn pack_8(integers: &[i32; GROUP], words: &mut [u32; STEPS_8]) {
    let (fours, _) = integers.as_chunks::<4>();
    for (word, [a, b, c, d]) in words.iter_mut().zip(fours) {
        *word = u32::from_le_bytes([*a as u8, *b as u8, *c as u8, *d as u8]);
    }
}

#[inline(always)]
fn pack_16(integers: &[i32; GROUP], words: &mut [u32; STEPS_16]) {
    let (pairs, _) = integers.as_chunks::<2>();
    for (word, [low, high]) in words.iter_mut().zip(pairs) {
        *word = low.cast_unsigned() & 0xffff | high.cast_unsigned() << 16;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::cpu::testing::random;

    /// A row's integers, scales, and sums where it has them.
    fn parts(width: IntegerWidth, words: &[u32], k: usize) -> (Vec<i16>, Vec<f32>, Vec<i32>) {
        let (integers, rest) = words.split_at(groups(k) * width.steps());
        let (scales, sums) = rest.split_at(groups(k));
        let bytes = integers.iter().flat_map(|word| word.to_le_bytes());
        let integers = match width {
            IntegerWidth::Eight => bytes.map(|byte| i16::from(byte.cast_signed())).collect(),
            IntegerWidth::Sixteen => {
                bytes.collect::<Vec<_>>().as_chunks().0.iter().map(|pair| i16::from_le_bytes(*pair)).collect()
            }
        };
        let sums = sums.iter().map(|sum| sum.cast_signed()).collect();
        (integers, scales.iter().map(|bits| f32::from_bits(*bits)).collect(), sums)
    }

    proptest! {
        #[test]
        fn integers_times_scales_are_the_nearest_values(
            k in 1_usize..300, magnitude in -20_i32..20, sixteen: bool, seed: u64,
        ) {
            let (width, largest) =
                if sixteen { (IntegerWidth::Sixteen, 8191) } else { (IntegerWidth::Eight, 127) };
            let row: Vec<f32> = random(k, seed).iter().map(|v| v * 2_f32.powi(magnitude)).collect();
            let mut first: Option<Vec<u32>> = None;
            for isa in Isa::available() {
                let mut words = vec![0; width.row_words(k)];
                quantise_row(isa, width, &row, &mut words);
                prop_assert_eq!(first.get_or_insert_with(|| words.clone()), &words, "{:?}", isa);
                let (integers, scales, sums) = parts(width, &words, k);
                for (group, values) in row.chunks(GROUP).enumerate() {
                    let integers = &integers[group * GROUP..][..GROUP];
                    prop_assert_eq!(integers.iter().map(|q| q.abs()).max(), Some(largest));
                    if !sixteen {
                        prop_assert_eq!(sums[group], integers.iter().map(|q| i32::from(*q)).sum::<i32>());
                    }
                    prop_assert!(integers[values.len()..].iter().all(|q| *q == 0));
                    for (value, q) in values.iter().zip(integers) {
                        let error = (value - f32::from(*q) * scales[group]).abs();
                        prop_assert!(error <= 0.501 * scales[group], "{} {} {}", value, q, scales[group]);
                    }
                }
            }
        }

        #[test]
        fn a_matrix_holds_its_rows_quantised(n in 1_usize..140, k in 1_usize..200, seed: u64) {
            let w = random(n * k, seed);
            let read = |i: usize, row: &mut [f32]| row.copy_from_slice(&w[i * k..][..k]);
            let matrix = IntegerMatrix::new(IntegerWidth::Eight, WeightFormat::F32, (n, k), read);
            let matrix = matrix.expect("memory for a small matrix");
            let halved: Vec<f32> = w.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
            prop_assert!(matrix.may_be_of(&w) && matrix.may_be_of(&halved));
            let mut other = w.clone();
            other[(seed % w.len() as u64) as usize] += 0.02;
            prop_assert!(!matrix.may_be_of(&other));
            let unpacked = matrix.unpack();
            for (row, found) in w.chunks_exact(k).zip(unpacked.chunks_exact(k)) {
                let mut words = vec![0; IntegerWidth::Eight.row_words(k)];
                quantise_row(Isa::Portable, IntegerWidth::Eight, row, &mut words);
                let (integers, scales, _) = parts(IntegerWidth::Eight, &words, k);
                let expected: Vec<f32> = (0..k).map(|i| f32::from(integers[i]) * scales[i / GROUP]).collect();
                prop_assert_eq!(&expected[..], found);
            }
        }

        #[test]
        fn sixteen_bits_keep_bf16_down_to_a_sixteenth_of_the_largest(
            n in 1_usize..140, k in 1_usize..200, magnitude in -60_i32..100, seed: u64,
        ) {
            /// The least unit is 2^-126, so what has bits below it loses them.
            const LEAST_EXACT: f32 = f32::MIN_POSITIVE * 128.0;
            let of_seed = random(n * k, seed);
            // Powers, so that some are far below the largest.
            let w: Vec<f32> = of_seed.iter().map(|v| bf16::from_f32(v.powi(3) * 2_f32.powi(magnitude)).to_f32()).collect();
            let read = |i: usize, row: &mut [f32]| row.copy_from_slice(&w[i * k..][..k]);
            let matrix = IntegerMatrix::new(IntegerWidth::Sixteen, WeightFormat::Bf16, (n, k), read);
            let matrix = matrix.expect("memory for a small matrix");
            prop_assert!(matrix.may_be_of(&w));
            for (row, found) in w.chunks_exact(k).zip(matrix.unpack().chunks_exact(k)) {
                for (values, found) in row.chunks(GROUP).zip(found.chunks(GROUP)) {
                    let largest = values.iter().fold(0.0_f32, |largest, v| largest.max(v.abs()));
                    for (value, found) in values.iter().zip(found) {
                        if value.abs() >= (largest / 16.0).max(LEAST_EXACT) {
                            prop_assert_eq!(value, found);
                        }
                        let bound = (largest * 2_f32.powi(-12)).max(f32::MIN_POSITIVE / 2.0);
                        prop_assert!((value - found).abs() <= bound, "{} {}", value, found);
                    }
                }
            }
            // The least change that bf16 knows of the largest value.
            let mut other = w.clone();
            let largest = (0..w.len()).max_by(|a, b| w[*a].abs().total_cmp(&w[*b].abs())).expect("values");
            other[largest] *= 1.0 - 1.0 / 128.0;
            prop_assert!(!matrix.may_be_of(&other));
        }
    }

    #[test]
    fn zeros_stay_zero_and_what_is_no_number_shows() {
        for (isa, width) in
            Isa::available().into_iter().flat_map(|isa| [(isa, IntegerWidth::Eight), (isa, IntegerWidth::Sixteen)])
        {
            let mut row = vec![0.0; 3 * GROUP];
            row[GROUP + 3] = f32::NAN;
            row[GROUP + 4] = 1.0;
            row[2 * GROUP] = 1e-38;
            let mut words = vec![0; width.row_words(row.len())];
            quantise_row(isa, width, &row, &mut words);
            let (integers, scales, _) = parts(width, &words, row.len());
            assert!(integers[..GROUP].iter().all(|q| *q == 0) && scales[0] == 0.0);
            assert!(scales[1].is_nan() && scales[2] == 0.0);
            row[GROUP + 3] = f32::INFINITY;
            quantise_row(isa, width, &row, &mut words);
            assert!(parts(width, &words, row.len()).1[1].is_infinite());
        }
    }
}
