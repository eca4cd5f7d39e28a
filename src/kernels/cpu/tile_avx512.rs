//! The tile for AVX-512 with the dot product of bf16.
//!
//! A panel's 64 columns are four vectors, which with six rows fill the registers. Where several tiles use a block, all of them
//! ask for the next one meanwhile, for the second cache, so that the memory works all the time. What a single tile reads the
//! processor foresees, forward and all of it: asking would hold it up.

#![expect(unsafe_code, reason = "vector loads and stores through raw pointers")]

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps,
    _mm512_set1_epi32, _mm512_setzero_ps,
};

use super::packed::PANEL;
use super::tile::TileArgs;
use super::words::LANES;

/// Vectors of a panel's columns.
const VECTORS: usize = PANEL / LANES;
/// Steps between which memory is asked for.
const GROUP: usize = 8;

/// Accumulates `M` rows.
///
/// # Safety
/// As for the tile of any instruction set; the processor has the features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn tile<const M: usize>(args: TileArgs<'_>) {
    let TileArgs { x, x_stride, w, is_only, y, y_stride, columns, from_zero, mut fetch, mut far } = args;
    let masks: [u16; VECTORS] = std::array::from_fn(|v| {
        let lanes = columns.saturating_sub(LANES * v).min(LANES);
        u16::try_from((1_u32 << lanes) - 1).expect("at most 16 lanes")
    });
    let groups = w.len().div_ceil(GROUP * PANEL);
    let (lines, far_lines) = (fetch.lines.div_ceil(groups), far.lines_of(groups));
    // SAFETY: masked lanes are neither read nor written, so that a vector of them may lie outside of `y`; the other lanes,
    // and `x` and `w`, are in bounds by the caller's contract.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; M];
        for (r, sums) in sums.iter_mut().enumerate().take(if from_zero { 0 } else { M }) {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_maskz_loadu_ps(masks[v], y.wrapping_add(r * y_stride + LANES * v));
            }
        }
        let mut x = x.as_ptr();
        for group in w.chunks(GROUP * PANEL) {
            if !is_only {
                fetch.next_far(lines);
            }
            far.next(far_lines);
            for weights in group.chunks_exact(PANEL) {
                let weights: [__m512bh; VECTORS] =
                    std::array::from_fn(|v| as_bf16(_mm512_loadu_si512(weights.as_ptr().add(LANES * v).cast())));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let pair = as_bf16(_mm512_set1_epi32((*x.add(r * x_stride)).cast_signed()));
                    for (sum, weights) in sums.iter_mut().zip(weights) {
                        *sum = _mm512_dpbf16_ps(*sum, pair, weights);
                    }
                }
                x = x.add(1);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                _mm512_mask_storeu_ps(y.wrapping_add(r * y_stride + LANES * v), masks[v], *sum);
            }
        }
    }
}

/// The same bits as pairs.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn as_bf16(v: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes in which every bit pattern is valid.
    unsafe { std::mem::transmute(v) }
}
