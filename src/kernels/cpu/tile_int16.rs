//! The innermost loops for 16-bit integers on x86.

#![expect(unsafe_code, reason = "vector loads and stores through raw pointers")]

use std::arch::x86_64::__m256i;
use std::hint::black_box;
use std::mem::MaybeUninit;

use super::integers::{IntegerWidth, MANTISSA_BITS, STEPS_16};
use super::packed::PANEL;
use super::tile_integers::IntegerArgs;

const GROUP_WORDS: usize = IntegerWidth::Sixteen.group_words();

/// The dot product of pairs.
///
/// # Safety
/// As for [`super::tile_integers::integer_tile`]; the processor has AVX-512 with VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn vnni<const M: usize>(args: &IntegerArgs<'_>) {
    use std::arch::x86_64::{
        _mm_loadu_si128, _mm512_castsi512_ps, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi32, _mm512_dpwssd_epi32,
        _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps,
        _mm512_setzero_si512, _mm512_slli_epi32, _mm512_storeu_ps,
    };

    /// Vectors of a panel.
    const V: usize = PANEL / 16;

    let mut fetch = args.fetch;
    // SAFETY: a group holds its steps and scales, a row of sums a panel; the rest is the caller's contract.
    unsafe {
        let mut copy = MaybeUninit::uninit();
        let (sums, stride) = args.begin::<M>(&mut copy);
        for (group, w) in args.w.chunks_exact(GROUP_WORDS).enumerate() {
            let rows: [_; M] = std::array::from_fn(|row| args.row::<STEPS_16>(row, group));
            let mut acc = [[_mm512_setzero_si512(); V]; M];
            for step in 0..STEPS_16 {
                let mut weights = [_mm512_setzero_si512(); V];
                for (v, weight) in weights.iter_mut().enumerate() {
                    *weight = _mm512_loadu_si512(w.as_ptr().add(step * PANEL + 16 * v).cast());
                }
                fetch.next(PANEL / 16);
                for (acc, (integers, _)) in acc.iter_mut().zip(&rows) {
                    let pair = _mm512_set1_epi32(integers[step].cast_signed());
                    for (acc, weight) in acc.iter_mut().zip(&weights) {
                        *acc = _mm512_dpwssd_epi32(*acc, *weight, pair);
                    }
                }
            }
            fetch.next(1);
            for v in 0..V {
                let exponents = _mm_loadu_si128(w.as_ptr().add(STEPS_16 * PANEL + 4 * v).cast());
                let scales = _mm512_slli_epi32::<MANTISSA_BITS>(_mm512_cvtepu8_epi32(exponents));
                let scales = _mm512_castsi512_ps(scales);
                for (row, (acc, (_, scale))) in acc.iter().zip(&rows).enumerate() {
                    let scale = _mm512_mul_ps(scales, _mm512_set1_ps(*scale));
                    let at = sums.add(row * stride + 16 * v);
                    let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[v]), scale, _mm512_loadu_ps(at));
                    _mm512_storeu_ps(at, sum);
                }
            }
        }
        args.end::<M>(sums);
    }
}

/// # Safety
/// As for [`super::tile_integers::integer_tile`]; the processor has AVX2.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2<const M: usize>(args: &IntegerArgs<'_>) {
    // SAFETY: the caller's contract.
    unsafe {
        match M {
            1 => strips::<M, 8>(args),
            2 => strips::<M, 4>(args),
            _ => strips::<M, 2>(args),
        }
    }
}

/// Strips of `V` vectors, which keep a tile's sums in the registers.
///
/// # Safety
/// As for [`avx2`].
#[inline(always)]
unsafe fn strips<const M: usize, const V: usize>(args: &IntegerArgs<'_>) {
    use std::arch::x86_64::{
        _mm_loadl_epi64, _mm256_add_epi32, _mm256_broadcast_ss, _mm256_castsi256_ps, _mm256_cvtepi32_ps,
        _mm256_cvtepu8_epi32, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_madd_epi16, _mm256_mul_ps, _mm256_set1_epi32,
        _mm256_setzero_si256, _mm256_slli_epi32, _mm256_storeu_ps,
    };

    /// Columns of a vector.
    const LANES: usize = 8;

    assert!(args.w.as_ptr().cast::<__m256i>().is_aligned(), "a block of a packed matrix");
    let last_group = args.first_group + args.w.len() / GROUP_WORDS;
    let row_words = args.groups * (STEPS_16 + 1);
    assert!(last_group <= args.groups && args.x.len() >= (M - 1) * args.x_stride + row_words, "x has its words");
    // SAFETY: a group holds its steps and scales, on whole vectors, and every row of `x` as many; a row of sums holds a panel;
    // the rest is the caller's contract.
    unsafe {
        let mut copy = MaybeUninit::uninit();
        let (sums, stride) = args.begin::<M>(&mut copy);
        let rows: [_; M] = std::array::from_fn(|row| args.x.as_ptr().add(row * args.x_stride));
        let count = args.columns.div_ceil(V * LANES);
        for strip in 0..count {
            let mut fetch = args.fetch.share(strip, count);
            for (group, w) in args.w.chunks_exact(GROUP_WORDS).enumerate() {
                let group = args.first_group + group;
                // The compiler would go from row to row by adding their distance, a register less and an addition more.
                let words: [_; M] = std::array::from_fn(|row| black_box(rows[row].add(group * STEPS_16)));
                let exponents = w.as_ptr().add(STEPS_16 * PANEL).cast::<u8>().add(strip * V * LANES);
                let w = w.as_ptr().add(strip * V * LANES);
                let mut acc = [[_mm256_setzero_si256(); V]; M];
                for step in 0..STEPS_16 {
                    fetch.next(V / 2);
                    let mut weights = [_mm256_setzero_si256(); V];
                    for (v, weight) in weights.iter_mut().enumerate() {
                        // Volatile, lest the compiler read them once for each row.
                        *weight = w.add(step * PANEL + v * LANES).cast::<__m256i>().read_volatile();
                    }
                    for (acc, words) in acc.iter_mut().zip(&words) {
                        let pair = _mm256_set1_epi32(words.add(step).read().cast_signed());
                        for (acc, weight) in acc.iter_mut().zip(&weights) {
                            *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(pair, *weight));
                        }
                    }
                }
                let scale_at = args.groups * STEPS_16 + group;
                for v in 0..V {
                    let exponents = _mm_loadl_epi64(exponents.add(v * LANES).cast());
                    let scales = _mm256_slli_epi32::<{ MANTISSA_BITS.cast_signed() }>(_mm256_cvtepu8_epi32(exponents));
                    let scales = _mm256_castsi256_ps(scales);
                    for (row, acc) in acc.iter().enumerate() {
                        let scale = _mm256_mul_ps(scales, _mm256_broadcast_ss(&*rows[row].add(scale_at).cast()));
                        let at = sums.add(row * stride + (strip * V + v) * LANES);
                        let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[v]), scale, _mm256_loadu_ps(at));
                        _mm256_storeu_ps(at, sum);
                    }
                }
                fetch.next(1);
            }
        }
        args.end::<M>(sums);
    }
}
