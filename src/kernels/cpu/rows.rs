//! Products of activations with a few rows: the down projection of a low-rank term.
//!
//! Sixteen rows of the matrix are the lanes of a vector: `[r / 16][steps][16]`. Four partial sums per output take the
//! steps in turn and are added in a fixed order at the end, so an output's bits depend on its own row of `x` only.

#![expect(unsafe_code, reason = "vector loads and stores through raw pointers")]

use half::bf16;

use super::dispatch::{dispatch, fma};
#[cfg(target_arch = "x86_64")]
use super::dot_avx2;
use super::isa::Isa;
use super::memory::Memory;
use super::packed::{Line, WeightFormat};
#[cfg(target_arch = "x86_64")]
use super::tile_avx512::as_bf16;
use super::words::{LANES, bf16_bits, row_words};

/// Rows of `x` that are multiplied together; with four sums each they fill the registers of AVX-512.
const TILE_ROWS: usize = 6;
/// Partial sums per output.
pub(super) const CHAINS: usize = 4;

/// A matrix (r, k) whose rows are the lanes of vectors of 32-bit words: bf16 pairs, or f32.
#[derive(Clone, Debug)]
pub struct RowMatrix {
    lines: Memory<Line>,
    format: WeightFormat,
    r: usize,
    k: usize,
}

impl RowMatrix {
    /// Copies a row-major (r, k) matrix; with `Bf16` the values are rounded.
    ///
    /// # Panics
    /// When `values` is not r times k long.
    pub fn new(format: WeightFormat, values: &[f32], r: usize, k: usize) -> Self {
        match format {
            WeightFormat::F32 => Self::of_words(format, values, (r, k), |value| value[0].to_bits()),
            WeightFormat::Bf16 => Self::of_words(format, values, (r, k), |pair| {
                bf16_bits(pair[0]) | pair.get(1).map_or(0, |v| bf16_bits(*v)) << 16
            }),
        }
    }

    /// Copies a row-major (r, k) matrix of bf16.
    ///
    /// # Panics
    /// When `values` is not r times k long.
    pub fn from_bf16(values: &[bf16], r: usize, k: usize) -> Self {
        let bits = |value: &bf16| u32::from(value.to_bits());
        Self::of_words(WeightFormat::Bf16, values, (r, k), |pair| bits(&pair[0]) | pair.get(1).map_or(0, bits) << 16)
    }

    /// `word` makes one of the one or two values that it holds.
    fn of_words<T>(format: WeightFormat, values: &[T], (r, k): (usize, usize), word: impl Fn(&[T]) -> u32) -> Self {
        assert_eq!(values.len(), r * k, "the matrix is (r, k)");
        let steps = format.steps(k);
        let mut lines = Memory::<Line>::zeros(r.div_ceil(LANES) * steps).expect("memory for an adapter");
        for (row_idx, row) in values.chunks_exact(k).enumerate() {
            let (group, lane) = (row_idx / LANES, row_idx % LANES);
            let group = &mut lines[group * steps..][..steps];
            for (line, values) in group.iter_mut().zip(row.chunks(k.div_ceil(steps))) {
                line.0[lane] = word(values);
            }
        }
        Self { lines, format, r, k }
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

/// `h[m, j] = sum_k x[m, k] * a[j, k]`; x: rows of padded words in `a`'s format, h: (m, r) f32.
///
/// # Panics
/// When lengths do not fit.
pub(super) fn dot_rows(isa: Isa, x: &[u32], a: &RowMatrix, h: &mut [f32]) {
    if a.r == 0 {
        return;
    }
    let (width, steps) = (row_words(a.format, a.k), a.format.steps(a.k));
    assert_eq!(x.len() / width, h.len() / a.r, "a row of h for every row of x");
    for (group_idx, lines) in a.lines.chunks_exact(steps).enumerate() {
        let columns = LANES.min(a.r - group_idx * LANES);
        for (x, h) in x.chunks(TILE_ROWS * width).zip(h.chunks_mut(TILE_ROWS * a.r)) {
            let mut sums = [[0.0; LANES]; TILE_ROWS];
            dot_tile(isa, (x, width), lines, a.format, &mut sums);
            for (h, sums) in h.chunks_exact_mut(a.r).zip(&sums) {
                h[group_idx * LANES..][..columns].copy_from_slice(&sums[..columns]);
            }
        }
    }
}

/// Up to [`TILE_ROWS`] rows of `x` with one group.
fn dot_tile(
    isa: Isa,
    (x, width): (&[u32], usize),
    lines: &[Line],
    format: WeightFormat,
    sums: &mut [[f32; LANES]; TILE_ROWS],
) {
    let rows = x.len() / width;
    assert!(lines.len() <= width && (1..=TILE_ROWS).contains(&rows), "{rows} rows hold the steps");
    #[cfg(target_arch = "x86_64")]
    if let (Isa::Avx512Bf16, WeightFormat::Bf16) = (isa, format) {
        // SAFETY: `x` has this many rows by the assertion, and the instruction set was detected.
        unsafe {
            match rows {
                1 => dot_bf16::<1>(x, width, lines, sums),
                2 => dot_bf16::<2>(x, width, lines, sums),
                3 => dot_bf16::<3>(x, width, lines, sums),
                4 => dot_bf16::<4>(x, width, lines, sums),
                5 => dot_bf16::<5>(x, width, lines, sums),
                _ => dot_bf16::<TILE_ROWS>(x, width, lines, sums),
            }
        }
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if let (Isa::Avx2, WeightFormat::Bf16, 2..) = (isa, format, rows) {
        for (x, sums) in x.chunks(dot_avx2::ROWS * width).zip(sums.chunks_mut(dot_avx2::ROWS)) {
            // SAFETY: the instruction set was detected.
            unsafe {
                match x.len() / width {
                    1 => dot_avx2::dot::<1>((x, width), lines, sums),
                    2 => dot_avx2::dot::<2>((x, width), lines, sums),
                    _ => dot_avx2::dot::<{ dot_avx2::ROWS }>((x, width), lines, sums),
                }
            }
        }
        return;
    }
    for (x, sums) in x.chunks_exact(width).zip(sums) {
        dot_one(isa, x, lines, format, sums);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn dot_bf16<const M: usize>(x: &[u32], width: usize, lines: &[Line], sums: &mut [[f32; LANES]; TILE_ROWS]) {
    use std::arch::x86_64::{
        _mm512_add_ps, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    let mut acc = [[_mm512_setzero_ps(); CHAINS]; M];
    let (fours, rest) = lines.as_chunks::<CHAINS>();
    // SAFETY: the rows of `x` hold a word for every line by the caller's contract; a row of sums is one vector.
    unsafe {
        for (four_idx, four) in fours.iter().enumerate() {
            for (chain, line) in four.iter().enumerate() {
                let weights = as_bf16(_mm512_loadu_si512(line.0.as_ptr().cast()));
                for (row, acc) in acc.iter_mut().enumerate() {
                    let pair = *x.get_unchecked(row * width + four_idx * CHAINS + chain);
                    acc[chain] = _mm512_dpbf16_ps(acc[chain], as_bf16(_mm512_set1_epi32(pair.cast_signed())), weights);
                }
            }
        }
        for (chain, line) in rest.iter().enumerate() {
            let weights = as_bf16(_mm512_loadu_si512(line.0.as_ptr().cast()));
            for (row, acc) in acc.iter_mut().enumerate() {
                let pair = *x.get_unchecked(row * width + fours.len() * CHAINS + chain);
                acc[chain] = _mm512_dpbf16_ps(acc[chain], as_bf16(_mm512_set1_epi32(pair.cast_signed())), weights);
            }
        }
        for (acc, sums) in acc.iter().zip(sums) {
            let sum = _mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3]));
            _mm512_storeu_ps(sums.as_mut_ptr(), sum);
        }
    }
}

dispatch! {
    /// One row of `x` with one group: the plain loops for the other instruction sets.
    fn dot_one(x: &[u32], lines: &[Line], format: WeightFormat, sums: &mut [f32; LANES]) => dot_one_body
}

#[inline(always)]
fn dot_one_body<const FMA: bool>(x: &[u32], lines: &[Line], format: WeightFormat, sums: &mut [f32; LANES]) {
    match format {
        WeightFormat::F32 => dot_chains::<false, FMA>(x, lines, sums),
        WeightFormat::Bf16 => dot_chains::<true, FMA>(x, lines, sums),
    }
}

/// The lines in turn into the chains, which are added at the end.
#[inline(always)]
fn dot_chains<const BF16: bool, const FMA: bool>(x: &[u32], lines: &[Line], sums: &mut [f32; LANES]) {
    let mut acc = [[0.0_f32; LANES]; CHAINS];
    let (fours, rest) = lines.as_chunks::<CHAINS>();
    let (words, rest_words) = x[..lines.len()].as_chunks::<CHAINS>();
    for ([a, b, c, d], words) in fours.iter().zip(words) {
        add_line::<BF16, FMA>(words[0], &a.0, &mut acc[0]);
        add_line::<BF16, FMA>(words[1], &b.0, &mut acc[1]);
        add_line::<BF16, FMA>(words[2], &c.0, &mut acc[2]);
        add_line::<BF16, FMA>(words[3], &d.0, &mut acc[3]);
    }
    for ((acc, line), word) in acc.iter_mut().zip(rest).zip(rest_words) {
        add_line::<BF16, FMA>(*word, &line.0, acc);
    }
    for (lane, sum) in sums.iter_mut().enumerate() {
        *sum = (acc[0][lane] + acc[1][lane]) + (acc[2][lane] + acc[3][lane]);
    }
}

/// `sums += word * line`, of one f32 or two bf16 each. A closure in its place would be compiled apart from the function that
/// calls it, for the plainest processor, where a fused multiply-add is a function call.
#[inline(always)]
fn add_line<const BF16: bool, const FMA: bool>(word: u32, line: &[u32; LANES], sums: &mut [f32; LANES]) {
    let low = |w: u32| f32::from_bits(w << 16);
    let high = |w: u32| f32::from_bits(w & 0xffff_0000);
    for (sum, weight) in sums.iter_mut().zip(line) {
        *sum = if BF16 {
            let first = fma::<FMA>(low(word), low(*weight), *sum);
            fma::<FMA>(high(word), high(*weight), first)
        } else {
            fma::<FMA>(f32::from_bits(word), f32::from_bits(*weight), *sum)
        };
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::super::words::write_row;
    use super::*;
    use crate::kernels::cpu::testing::random;

    proptest! {
        #[test]
        fn equals_the_formula_and_a_row_has_the_same_bits_alone(
            m in 1_usize..15, r in 1_usize..40, k in 1_usize..300, f32_values: bool, seed: u64,
        ) {
            let format = if f32_values { WeightFormat::F32 } else { WeightFormat::Bf16 };
            let round = |v: &f32| if f32_values { *v } else { bf16::from_f32(*v).to_f32() };
            let (x, a) = (random(m * k, seed), random(r * k, !seed));
            let matrix = RowMatrix::new(format, &a, r, k);
            let width = row_words(format, k);
            for isa in Isa::available() {
                let mut words = vec![0; m * width];
                for (row, words) in x.chunks_exact(k).zip(words.chunks_exact_mut(width)) {
                    write_row(isa, format, row, words);
                }
                let mut h = vec![f32::NAN; m * r];
                dot_rows(isa, &words, &matrix, &mut h);
                for (row, h) in h.chunks_exact(r).enumerate() {
                    let mut alone = vec![f32::NAN; r];
                    dot_rows(isa, &words[row * width..][..width], &matrix, &mut alone);
                    prop_assert_eq!(h, &alone[..]);
                    for (j, found) in h.iter().enumerate() {
                        let expected: f64 = (0..k)
                            .map(|i| f64::from(round(&x[row * k + i])) * f64::from(round(&a[j * k + i])))
                            .sum();
                        // f32 summation of up to 300 products in [-1, 1].
                        prop_assert!((f64::from(*found) - expected).abs() < 1e-4, "{isa:?} {found} {expected}");
                    }
                }
            }
        }
    }
}
