//! Down projections of several rows in bf16 with AVX2.
//!
//! What a vector of weights costs to unpack is shared by the rows, and the rows' pairs are split into their factors once
//! for both halves of the lanes. Each sum takes the same products in the same order as that of a row alone.

#![expect(unsafe_code, reason = "vector loads and stores through raw pointers")]

use std::arch::x86_64::{
    __m256, _mm256_add_ps, _mm256_and_si256, _mm256_castsi256_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32, _mm256_storeu_ps,
};
use std::mem::MaybeUninit;

use super::packed::Line;
use super::rows::CHAINS;
use super::tile_avx2::split;
use super::words::LANES;

/// Rows of `x` whose sums the registers hold.
pub(super) const ROWS: usize = 3;
/// Lines whose factors stay in the nearest cache, whole rounds of the chains.
const BLOCK: usize = 256;
/// Lanes of a register.
const HALF: usize = LANES / 2;

/// The products of `M` rows `x` of words, `width` apart, with the lines: a row of sums for each.
///
/// # Safety
/// The processor has the features.
///
/// # Panics
/// When a row of `x` or of sums is missing.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn dot<const M: usize>((x, width): (&[u32], usize), lines: &[Line], sums: &mut [[f32; LANES]]) {
    const { assert!(BLOCK.is_multiple_of(CHAINS) && M <= ROWS, "a block begins with the first chain") };
    assert!(lines.len() <= width && x.len() >= M * width && sums.len() >= M, "rows hold the steps");
    let mut chains = [[[0.0_f32; LANES]; CHAINS]; M];
    for (block_idx, block) in lines.chunks(BLOCK).enumerate() {
        let mut factors = [[[MaybeUninit::<f32>::uninit(); BLOCK]; 2]; M];
        for (row, [first, second]) in factors.iter_mut().enumerate() {
            let words = &x[row * width + block_idx * BLOCK..][..block.len()];
            // SAFETY: both have room for the block's words.
            unsafe { split(words, first.as_mut_ptr().cast(), second.as_mut_ptr().cast()) };
        }
        let factors = std::array::from_fn(|row| factors[row].each_ref().map(|part| part.as_ptr().cast()));
        for lane in [0, HALF] {
            // SAFETY: every row has the block's factors, and half of the lanes lie behind `lane`.
            unsafe { half(&factors, block, lane, &mut chains) };
        }
    }
    for (sums, chains) in sums.iter_mut().zip(&chains) {
        for lane in [0, HALF] {
            // SAFETY: both halves lie in a row's lanes.
            unsafe {
                let [a, b, c, d] = chains.each_ref().map(|chain| _mm256_loadu_ps(chain.as_ptr().add(lane)));
                let sum = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
                _mm256_storeu_ps(sums.as_mut_ptr().add(lane), sum);
            }
        }
    }
}

/// Half of the lanes, from `lane` on, of a block of lines; `factors` are each row's first and second ones.
///
/// # Safety
/// As for [`dot`], the factors hold one for each line, and half of the lanes lie behind `lane`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn half<const M: usize>(
    factors: &[[*const f32; 2]; M],
    block: &[Line],
    lane: usize,
    chains: &mut [[[f32; LANES]; CHAINS]; M],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut sums: [[__m256; CHAINS]; M] = std::array::from_fn(|row| {
            std::array::from_fn(|chain| _mm256_loadu_ps(chains[row][chain].as_ptr().add(lane)))
        });
        let (fours, rest) = block.as_chunks::<CHAINS>();
        for (four_idx, four) in fours.iter().enumerate() {
            for (chain, line) in four.iter().enumerate() {
                add_line(factors, four_idx * CHAINS + chain, line.0.as_ptr().add(lane), chain, &mut sums);
            }
        }
        // The chains by number, so that the sums stay in registers.
        for chain in 0..CHAINS {
            if let Some(line) = rest.get(chain) {
                add_line(factors, fours.len() * CHAINS + chain, line.0.as_ptr().add(lane), chain, &mut sums);
            }
        }
        for (chains, sums) in chains.iter_mut().zip(&sums) {
            for (chain, sum) in chains.iter_mut().zip(sums) {
                _mm256_storeu_ps(chain.as_mut_ptr().add(lane), *sum);
            }
        }
    }
}

/// Adds the products with half a line of weights, number `at` of the block, to one of the chains.
///
/// # Safety
/// As for [`half`]; `words` are half a line.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_line<const M: usize>(
    factors: &[[*const f32; 2]; M],
    at: usize,
    words: *const u32,
    chain: usize,
    sums: &mut [[__m256; CHAINS]; M],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let words = _mm256_loadu_si256(words.cast());
        let low = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words));
        let high = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xffff_0000_u32.cast_signed())));
        for (sums, [first, second]) in sums.iter_mut().zip(factors) {
            let sum = _mm256_fmadd_ps(_mm256_set1_ps(*first.add(at)), low, sums[chain]);
            sums[chain] = _mm256_fmadd_ps(_mm256_set1_ps(*second.add(at)), high, sum);
        }
    }
}
