//! Weights in 8-bit integers, and the rows that are multiplied with them.
//!
//! Inputs are divided into groups of [`GROUP`]. Every output of a group and every row's part in it are integers of -127 to
//! 127 times a scale, the group's largest magnitude over 127:
//!
//! ```text
//! y[m, n] = sum_g ( sum_{i in g} xq[m, i] wq[n, i] ) * ( ws[n, g] xs[m, g] )
//! ```
//!
//! The inner sum is exact in i32 and the outer one takes the groups in ascending order, a multiplication, a multiplication
//! and an addition each, so all instruction sets give the same bits.
//!
//! Columns of the product are grouped into panels of 64, inside a panel everything of a group adjoins: `[k / 4][64][4]`
//! integers, then `[64]` scales in f32. Missing columns and inputs are zeros.

use rayon::prelude::*;

use super::dispatch::dispatch;
use super::isa::Isa;
use super::memory::Memory;
use super::packed::{PANEL, WeightFormat};
use super::words::LANES;

/// Inputs that share a scale.
pub(super) const GROUP: usize = 64;
/// Words of a row in a group, four integers each, the first in the lowest byte.
pub(super) const GROUP_STEPS: usize = GROUP / 4;
/// Words of a panel in a group: the integers, then the scales.
pub(super) const GROUP_WORDS: usize = (GROUP_STEPS + 1) * PANEL;
/// The largest integer.
const LARGEST: f32 = 127.0;
/// Magnitudes below it count as zero, so that no scale is subnormal.
const SMALLEST: f32 = 1e-30;

/// A weight matrix (n, k) in 8-bit integers, immutable once packed.
pub struct Int8Matrix {
    words: Memory<u32>,
    terms: WeightFormat,
    n: usize,
    k: usize,
}

impl std::fmt::Debug for Int8Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Int8Matrix(n = {}, k = {})", self.n, self.k)
    }
}

impl Int8Matrix {
    /// Quantises a matrix (n, k); `read(i, row)` writes its i-th row. `terms` is the format of what adapters add or put in
    /// the place of it.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn new(
        terms: WeightFormat,
        n: usize,
        k: usize,
        read: impl Fn(usize, &mut [f32]) + Sync,
    ) -> std::io::Result<Self> {
        assert!(n > 0 && k > 0, "a matrix has rows and columns");
        let panel_words = groups(k) * GROUP_WORDS;
        let mut words = Memory::<u32>::zeros(n.div_ceil(PANEL) * panel_words)?;
        words.par_chunks_mut(panel_words).enumerate().for_each(|(panel_idx, panel)| {
            let columns = PANEL.min(n - panel_idx * PANEL);
            let (mut row, mut rows) = (vec![0.0; k], vec![0; columns * int8_row_words(k)]);
            for (lane, words) in rows.chunks_exact_mut(int8_row_words(k)).enumerate() {
                read(panel_idx * PANEL + lane, &mut row);
                quantise_row(Isa::best(), &row, words);
            }
            let scales = groups(k) * GROUP_STEPS;
            for (group_idx, group) in panel.chunks_exact_mut(GROUP_WORDS).enumerate() {
                for (lane, words) in rows.chunks_exact(int8_row_words(k)).enumerate() {
                    let integers = &words[group_idx * GROUP_STEPS..][..GROUP_STEPS];
                    let words = integers.iter().chain([&words[scales + group_idx]]);
                    group[lane..].iter_mut().step_by(PANEL).zip(words).for_each(|(place, word)| *place = *word);
                }
            }
        });
        Ok(Self { words, terms, n, k })
    }

    /// Columns of the product.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Length of the rows multiplied with it.
    pub fn k(&self) -> usize {
        self.k
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

    /// Whether the row-major matrix `w` (n, k), or what a half-precision format rounds it to, may be what was quantised: every
    /// value lies within half a unit of its integer.
    ///
    /// # Panics
    /// When `w` is not n times k long.
    pub fn may_be_of(&self, w: &[f32]) -> bool {
        /// Of a unit; the rest is for what computing it rounds.
        const HALF: f32 = 0.505;
        /// Of a value: bf16 keeps 8 bits.
        const ROUNDING: f32 = 1.0 / 256.0;
        assert_eq!(w.len(), self.n * self.k, "the matrix is (n, k)");
        w.par_chunks(self.k).enumerate().all(|(column, values)| {
            let mut kept = vec![0.0; self.k];
            self.read_row(column, &mut kept);
            let groups = self.panel(column / PANEL).chunks_exact(GROUP_WORDS);
            values.chunks(GROUP).zip(kept.chunks(GROUP)).zip(groups).all(|((values, kept), group)| {
                let unit = f32::from_bits(group[GROUP_STEPS * PANEL + column % PANEL]);
                let near = |(v, q): (&f32, &f32)| (v - q).abs() <= HALF * unit + ROUNDING * v.abs();
                values.iter().zip(kept).all(near)
            })
        })
    }

    /// Reads one row of the (n, k) matrix into `row` (k), as [`Int8Matrix::unpack`] does.
    ///
    /// # Panics
    /// When `column` is not below n or `row` is not of length k.
    pub fn read_row(&self, column: usize, row: &mut [f32]) {
        assert!(column < self.n && row.len() == self.k, "row {column} of {self:?} into {} values", row.len());
        let (panel, lane) = (self.panel(column / PANEL), column % PANEL);
        for (values, group) in row.chunks_mut(GROUP).zip(panel.chunks_exact(GROUP_WORDS)) {
            let scale = f32::from_bits(group[GROUP_STEPS * PANEL + lane]);
            for (idx, value) in values.iter_mut().enumerate() {
                let byte = group[idx / 4 * PANEL + lane].to_le_bytes()[idx % 4];
                *value = f32::from(byte.cast_signed()) * scale;
            }
        }
    }

    /// One panel, `[groups][GROUP_WORDS]`.
    pub(super) fn panel(&self, panel_idx: usize) -> &[u32] {
        let panel_words = groups(self.k) * GROUP_WORDS;
        &self.words[panel_idx * panel_words..][..panel_words]
    }
}

/// Groups of `k` inputs.
pub(super) fn groups(k: usize) -> usize {
    k.div_ceil(GROUP)
}

/// Words of a row of `k` elements: the integers of all groups, their scales, their sums, and padding.
pub(super) fn int8_row_words(k: usize) -> usize {
    (groups(k) * (GROUP_STEPS + 2)).next_multiple_of(LANES)
}

dispatch! {
    /// Writes one row as [`int8_row_words`]: its integers, then the groups' scales, then the sums of their integers.
    pub(super) fn quantise_row(row: &[f32], words: &mut [u32]) => quantise_row_body
}

#[inline(always)]
fn quantise_row_body<const FMA: bool>(row: &[f32], words: &mut [u32]) {
    assert_eq!(words.len(), int8_row_words(row.len()), "a padded row");
    let groups = groups(row.len());
    let (integers, rest) = words.split_at_mut(groups * GROUP_STEPS);
    let (scales, sums) = rest.split_at_mut(groups);
    let (integers, _) = integers.as_chunks_mut::<GROUP_STEPS>();
    for (((values, steps), scale), sum) in row.chunks(GROUP).zip(integers).zip(scales).zip(sums) {
        let (of_group, total) = quantise_group(values, steps);
        (*scale, *sum) = (of_group.to_bits(), total.cast_unsigned());
    }
}

/// Up to [`GROUP`] values as integers; returns their scale and the integers' sum. A value that is no number makes the scale
/// none.
#[inline(always)]
fn quantise_group(values: &[f32], steps: &mut [u32; GROUP_STEPS]) -> (f32, i32) {
    /// 1.5 * 2^23: adding it rounds to an integer, ties to even, that sits in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let mut padded = [0.0_f32; GROUP];
    padded[..values.len()].copy_from_slice(values);
    // Magnitudes are ordered as their bits are, and what is no number comes last.
    let largest = padded.iter().fold(0, |largest: u32, value| largest.max(value.abs().to_bits()));
    let largest = f32::from_bits(largest);
    let (scale, inverse) = if largest < SMALLEST { (0.0, 0.0) } else { (largest / LARGEST, LARGEST / largest) };
    let mut integers = [0_i32; GROUP];
    for (integer, value) in integers.iter_mut().zip(&padded) {
        *integer = (value * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
    }
    let (fours, _) = integers.as_chunks::<4>();
    for (step, [a, b, c, d]) in steps.iter_mut().zip(fours) {
        *step = u32::from_le_bytes([*a as u8, *b as u8, *c as u8, *d as u8]);
    }
    // As the bytes are read, whatever the integers are where the scale is none.
    (scale, integers.iter().map(|integer| i32::from(*integer as i8)).sum())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::cpu::testing::random;

    /// A row's integers, scales and sums.
    fn parts(words: &[u32], k: usize) -> (Vec<i8>, Vec<f32>, Vec<i32>) {
        let (integers, rest) = words.split_at(groups(k) * GROUP_STEPS);
        let (scales, sums) = rest[..2 * groups(k)].split_at(groups(k));
        (
            integers.iter().flat_map(|word| word.to_le_bytes()).map(u8::cast_signed).collect(),
            scales.iter().map(|bits| f32::from_bits(*bits)).collect(),
            sums.iter().map(|sum| sum.cast_signed()).collect(),
        )
    }

    proptest! {
        #[test]
        fn integers_times_scales_are_the_nearest_values(k in 1_usize..300, magnitude in -20_i32..20, seed: u64) {
            let row: Vec<f32> = random(k, seed).iter().map(|v| v * 2_f32.powi(magnitude)).collect();
            let mut first: Option<Vec<u32>> = None;
            for isa in Isa::available() {
                let mut words = vec![0; int8_row_words(k)];
                quantise_row(isa, &row, &mut words);
                prop_assert_eq!(first.get_or_insert_with(|| words.clone()), &words, "{:?}", isa);
                let (integers, scales, sums) = parts(&words, k);
                for (group, values) in row.chunks(GROUP).enumerate() {
                    let integers = &integers[group * GROUP..][..GROUP];
                    prop_assert!(integers.iter().all(|q| *q >= -127));
                    prop_assert_eq!(sums[group], integers.iter().map(|q| i32::from(*q)).sum::<i32>());
                    prop_assert!(integers[values.len()..].iter().all(|q| *q == 0));
                    for (value, q) in values.iter().zip(integers) {
                        let error = (value - f32::from(*q) * scales[group]).abs();
                        prop_assert!(error <= 0.5001 * scales[group], "{} {} {}", value, q, scales[group]);
                    }
                }
            }
        }

        #[test]
        fn a_matrix_holds_its_rows_quantised(n in 1_usize..140, k in 1_usize..200, seed: u64) {
            let w = random(n * k, seed);
            let matrix = Int8Matrix::new(WeightFormat::F32, n, k, |i, row| row.copy_from_slice(&w[i * k..][..k]));
            let matrix = matrix.expect("memory for a small matrix");
            let halved: Vec<f32> = w.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect();
            prop_assert!(matrix.may_be_of(&w) && matrix.may_be_of(&halved));
            let mut other = w.clone();
            other[(seed % w.len() as u64) as usize] += 0.02;
            prop_assert!(!matrix.may_be_of(&other));
            let unpacked = matrix.unpack();
            for (row, found) in w.chunks_exact(k).zip(unpacked.chunks_exact(k)) {
                let mut words = vec![0; int8_row_words(k)];
                quantise_row(Isa::Portable, row, &mut words);
                let (integers, scales, _) = parts(&words, k);
                let expected: Vec<f32> = (0..k).map(|i| f32::from(integers[i]) * scales[i / GROUP]).collect();
                prop_assert_eq!(&expected[..], found);
            }
        }
    }

    #[test]
    fn zeros_stay_zero_and_what_is_no_number_shows() {
        for isa in Isa::available() {
            let mut row = vec![0.0; 3 * GROUP];
            row[GROUP + 3] = f32::NAN;
            row[GROUP + 4] = 1.0;
            row[2 * GROUP] = 1e-38;
            let mut words = vec![0; int8_row_words(row.len())];
            quantise_row(isa, &row, &mut words);
            let (integers, scales, _) = parts(&words, row.len());
            assert!(integers[..GROUP].iter().all(|q| *q == 0) && scales[0] == 0.0);
            assert!(scales[1].is_nan() && scales[2] == 0.0);
            row[GROUP + 3] = f32::INFINITY;
            quantise_row(isa, &row, &mut words);
            assert!(parts(&words, row.len()).1[1].is_infinite());
        }
    }
}
