//! Dot products of activations with a few rows: the down projection of a low-rank term.
//!
//! The rows stay as they lie in the file, only padded to whole vectors: a rank needs no padding. Sixteen partial sums
//! run over ascending `k` and are added in a fixed order at the end.

use super::dispatch::{dispatch, fma};
use super::isa::Isa;
use super::packed::WeightFormat;
use super::words::{LANES, row_words, write_row};

/// A matrix (r, k) as padded rows of 32-bit words: bf16 pairs, or f32.
#[derive(Clone, Debug)]
pub struct RowMatrix {
    words: Vec<u32>,
    format: WeightFormat,
    r: usize,
    k: usize,
}

impl RowMatrix {
    /// Copies a row-major (r, k) matrix; with `Bf16` the values are rounded (exact when they were bf16).
    ///
    /// # Panics
    /// When `values` is not r times k long.
    pub fn new(format: WeightFormat, values: &[f32], r: usize, k: usize) -> Self {
        assert_eq!(values.len(), r * k, "the matrix is (r, k)");
        let width = row_words(format, k);
        let mut words = vec![0; r * width];
        for (row, words) in values.chunks_exact(k).zip(words.chunks_exact_mut(width)) {
            write_row(Isa::best(), format, row, words);
        }
        Self { words, format, r, k }
    }

    /// Rows.
    pub fn r(&self) -> usize {
        self.r
    }

    /// Length of a row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Number format.
    pub fn format(&self) -> WeightFormat {
        self.format
    }
}

dispatch! {
    /// `h[m, j] = sum_k x[m, k] * a[j, k]`; x: rows of padded words in `a`'s format, h: (m, r) f32.
    pub(super) fn dot_rows(x: &[u32], a: &RowMatrix, h: &mut [f32]) => dot_rows_body
}

#[inline(always)]
fn dot_rows_body<const FMA: bool>(x: &[u32], a: &RowMatrix, h: &mut [f32]) {
    if a.r == 0 {
        return;
    }
    let width = row_words(a.format, a.k);
    for (x, h) in x.chunks_exact(width).zip(h.chunks_exact_mut(a.r)) {
        let mut rows = a.words.chunks_exact(4 * width);
        let mut sums = h.chunks_exact_mut(4);
        for (rows, sums) in (&mut rows).zip(&mut sums) {
            dot::<4, FMA>(x, rows, a.format, sums);
        }
        for (row, sum) in rows.remainder().chunks_exact(width).zip(sums.into_remainder()) {
            dot::<1, FMA>(x, row, a.format, std::slice::from_mut(sum));
        }
    }
}

/// One row of `x` with `R` rows of `a`.
#[inline(always)]
fn dot<const R: usize, const FMA: bool>(x: &[u32], rows: &[u32], format: WeightFormat, sums: &mut [f32]) {
    let width = x.len();
    let mut acc = [[0.0_f32; LANES]; R];
    let rows: [&[u32]; R] = std::array::from_fn(|r| &rows[r * width..][..width]);
    for from in (0..width).step_by(LANES) {
        let x: &[u32; LANES] = x[from..from + LANES].try_into().expect("rows are padded");
        for (acc, row) in acc.iter_mut().zip(&rows) {
            let row: &[u32; LANES] = row[from..from + LANES].try_into().expect("rows are padded");
            for lane in 0..LANES {
                acc[lane] = match format {
                    WeightFormat::F32 => fma::<FMA>(f32::from_bits(x[lane]), f32::from_bits(row[lane]), acc[lane]),
                    WeightFormat::Bf16 => {
                        let low = |w: u32| f32::from_bits(w << 16);
                        let high = |w: u32| f32::from_bits(w & 0xffff_0000);
                        let sum = fma::<FMA>(low(x[lane]), low(row[lane]), acc[lane]);
                        fma::<FMA>(high(x[lane]), high(row[lane]), sum)
                    }
                };
            }
        }
    }
    for (sum, acc) in sums.iter_mut().zip(&acc) {
        let mut lanes = *acc;
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                lanes[lane] += lanes[lane + half];
            }
        }
        *sum = lanes[0];
    }
}
