//! The innermost loops for 16-bit integers on x86.

#![expect(unsafe_code, reason = "vector loads and stores through raw pointers")]

use super::integers::{IntegerWidth, MANTISSA_BITS, STEPS_16};
use super::packed::PANEL;
use super::tile::LINE_WORDS;
use super::tile_integers::IntegerArgs;
use std::arch::asm;
use std::arch::x86_64::__m256i;

const GROUP_WORDS: usize = IntegerWidth::Sixteen.group_words();
/// Steps between which memory is asked for, with AVX-512.
const ASK_STEPS: usize = 8;

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

    let (mut fetch, mut far) = (args.fetch, args.far);
    let times = args.w.len() / GROUP_WORDS * (STEPS_16 / ASK_STEPS);
    let (lines, far_lines) = (fetch.lines.div_ceil(times), far.lines_of(times));
    // SAFETY: a group holds its steps and scales; the rest is the caller's contract.
    unsafe {
        for (group, w) in args.w.chunks_exact(GROUP_WORDS).enumerate() {
            // A loop rather than a closure, which would be a call.
            let mut rows = [(std::ptr::null(), 0.0); M];
            for (row, of_row) in rows.iter_mut().enumerate() {
                let (integers, scale) = args.row::<STEPS_16>(row, group);
                *of_row = (integers.as_ptr(), scale);
            }
            let mut acc = [[_mm512_setzero_si512(); V]; M];
            for step in 0..STEPS_16 {
                if step % ASK_STEPS == 0 {
                    fetch.next_far(lines);
                    far.next(far_lines);
                }
                let mut weights = [_mm512_setzero_si512(); V];
                for (v, weight) in weights.iter_mut().enumerate() {
                    *weight = _mm512_loadu_si512(w.as_ptr().add(step * PANEL + 16 * v).cast());
                }
                for (acc, (integers, _)) in acc.iter_mut().zip(&rows) {
                    let pair = _mm512_set1_epi32((*integers.add(step)).cast_signed());
                    for (acc, weight) in acc.iter_mut().zip(&weights) {
                        *acc = _mm512_dpwssd_epi32(*acc, *weight, pair);
                    }
                }
            }
            for v in 0..V {
                let exponents = _mm_loadu_si128(w.as_ptr().add(STEPS_16 * PANEL + 4 * v).cast());
                let scales = _mm512_slli_epi32::<MANTISSA_BITS>(_mm512_cvtepu8_epi32(exponents));
                let scales = _mm512_castsi512_ps(scales);
                for (row, (acc, (_, scale))) in acc.iter().zip(&rows).enumerate() {
                    let scale = _mm512_mul_ps(scales, _mm512_set1_ps(*scale));
                    let at = args.y.add(row * args.y_stride + 16 * v);
                    let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[v]), scale, _mm512_loadu_ps(at));
                    _mm512_storeu_ps(at, sum);
                }
            }
        }
    }
}

/// Columns of a vector of AVX2.
const LANES: usize = 8;
/// The bits below an exponent, as the shift wants them.
const SHIFT: i32 = MANTISSA_BITS.cast_signed();

/// # Safety
/// As for [`super::tile_integers::integer_tile`]; the processor has AVX2.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2<const M: usize>(args: &IntegerArgs<'_>) {
    // SAFETY: the caller's contract.
    unsafe {
        match M {
            1 => row(args),
            2 => strips::<M, 4, 4>(args),
            _ => strips::<M, 2, 4>(args),
        }
    }
}

/// One row: all columns, `U` steps at a time. The weights are operands in memory, one after the other, so that the processor
/// has as many of them under way as it can.
///
/// # Safety
/// As for [`avx2`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn row(args: &IntegerArgs<'_>) {
    use std::arch::x86_64::{
        _mm_loadl_epi64, _mm256_add_epi32, _mm256_castsi256_ps, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi32,
        _mm256_fmadd_ps, _mm256_load_si256, _mm256_loadu_ps, _mm256_madd_epi16, _mm256_mul_ps, _mm256_set1_epi32,
        _mm256_set1_ps, _mm256_setzero_si256, _mm256_slli_epi32, _mm256_storeu_ps,
    };

    /// Steps between branches.
    const U: usize = 4;
    /// Vectors of a panel.
    const V: usize = PANEL / LANES;

    const { assert!(STEPS_16.is_multiple_of(U), "whole rounds") };
    assert!(args.w.as_ptr().cast::<__m256i>().is_aligned(), "a block of a packed matrix");
    let mut fetch = args.fetch;
    for (group, w) in args.w.chunks_exact(GROUP_WORDS).enumerate() {
        let (integers, of_row) = args.row::<STEPS_16>(0, group);
        // SAFETY: a group holds its steps and scales, on whole vectors; the rest is the caller's contract.
        unsafe {
            let mut at = w.as_ptr().cast::<__m256i>();
            let mut acc = [_mm256_setzero_si256(); V];
            for pairs in integers.as_chunks::<U>().0 {
                fetch.next(U * PANEL / LINE_WORDS);
                for (step, pair) in pairs.iter().enumerate() {
                    let pair = _mm256_set1_epi32(pair.cast_signed());
                    for (v, acc) in acc.iter_mut().enumerate() {
                        let weights = _mm256_load_si256(at.add(step * V + v));
                        *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(pair, weights));
                    }
                }
                at = at.add(U * V);
            }
            for (v, acc) in acc.iter().enumerate() {
                let exponents = _mm_loadl_epi64(at.cast::<u8>().add(v * LANES).cast());
                let scales = _mm256_castsi256_ps(_mm256_slli_epi32::<SHIFT>(_mm256_cvtepu8_epi32(exponents)));
                let (scales, y) = (_mm256_mul_ps(scales, _mm256_set1_ps(of_row)), args.y.add(v * LANES));
                _mm256_storeu_ps(y, _mm256_fmadd_ps(_mm256_cvtepi32_ps(*acc), scales, _mm256_loadu_ps(y)));
            }
        }
    }
}

/// Strips of `V` vectors, which keep a tile's sums in the registers, `U` steps at a time: what decides is the number of
/// instructions.
///
/// # Safety
/// As for [`avx2`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn strips<const M: usize, const V: usize, const U: usize>(args: &IntegerArgs<'_>) {
    use std::arch::x86_64::{
        _mm_loadl_epi64, _mm256_add_epi32, _mm256_broadcast_ss, _mm256_castsi256_ps, _mm256_cvtepi32_ps,
        _mm256_cvtepu8_epi32, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_madd_epi16, _mm256_mul_ps, _mm256_set1_epi32,
        _mm256_setzero_ps, _mm256_setzero_si256, _mm256_slli_epi32, _mm256_storeu_ps,
    };

    const { assert!(STEPS_16.is_multiple_of(U) && V.is_multiple_of(2), "whole rounds, and whole lines of a step") };
    assert!(args.w.as_ptr().cast::<__m256i>().is_aligned(), "a block of a packed matrix");
    let last_group = args.first_group + args.w.len() / GROUP_WORDS;
    let row_words = args.groups * (STEPS_16 + 1);
    assert!(last_group <= args.groups && args.x.len() >= (M - 1) * args.x_stride + row_words, "x has its words");
    // SAFETY: a group holds its steps and scales, on whole vectors, and every row of `x` as many; the rest is the caller's
    // contract.
    unsafe {
        let count = PANEL / (V * LANES);
        for strip in 0..count {
            let (mut fetch, mut far) = (args.fetch.share(strip, count), args.far.of_strip(strip, count));
            let rounds = args.w.len() / GROUP_WORDS * (STEPS_16 / U);
            let far_lines = far.lines_of(rounds);
            for (group, w) in args.w.chunks_exact(GROUP_WORDS).enumerate() {
                let group = args.first_group + group;
                let exponents = w.as_ptr().add(STEPS_16 * PANEL).cast::<u8>().add(strip * V * LANES);
                let mut w = w.as_ptr().add(strip * V * LANES);
                let of_row = |row: usize| args.x.as_ptr().add(row * args.x_stride + group * STEPS_16);
                let mut words: [_; M] = std::array::from_fn(of_row);
                let mut acc = [[_mm256_setzero_si256(); V]; M];
                for _ in 0..STEPS_16 / U {
                    fetch.next(U * V / 2);
                    far.next(far_lines);
                    for step in 0..U {
                        let mut weights = [_mm256_setzero_si256(); V];
                        for (v, weight) in weights.iter_mut().enumerate() {
                            // Volatile, lest the compiler read them once for each row.
                            *weight = w.add(step * PANEL + v * LANES).cast::<__m256i>().read_volatile();
                        }
                        for (acc, words) in acc.iter_mut().zip(&words) {
                            let pair = _mm256_set1_epi32(words.add(step).read_volatile().cast_signed());
                            for (acc, weight) in acc.iter_mut().zip(&weights) {
                                *acc = in_order(_mm256_add_epi32(*acc, _mm256_madd_epi16(pair, *weight)));
                            }
                        }
                    }
                    // The compiler would go from row to row by adding their distance, a register less and an addition more.
                    words = words.map(|words| in_register(words.add(U)));
                    w = w.add(U * PANEL);
                }
                let mut scales = [_mm256_setzero_ps(); V];
                for (v, scales) in scales.iter_mut().enumerate() {
                    let exponents = _mm_loadl_epi64(exponents.add(v * LANES).cast());
                    *scales = _mm256_castsi256_ps(_mm256_slli_epi32::<SHIFT>(_mm256_cvtepu8_epi32(exponents)));
                }
                for (row, acc) in acc.iter().enumerate() {
                    let of_row = args.x.as_ptr().add(row * args.x_stride + args.groups * STEPS_16 + group);
                    let of_row = _mm256_broadcast_ss(&*of_row.cast());
                    for (v, acc) in acc.iter().enumerate() {
                        let at = args.y.add(row * args.y_stride + (strip * V + v) * LANES);
                        let scale = _mm256_mul_ps(scales[v], of_row);
                        _mm256_storeu_ps(at, _mm256_fmadd_ps(_mm256_cvtepi32_ps(*acc), scale, _mm256_loadu_ps(at)));
                    }
                }
                fetch.next(1);
            }
        }
    }
}

/// The sums as they are. The compiler may not add the next products up first, for which it lacks registers.
#[inline]
#[target_feature(enable = "avx2")]
fn in_order(mut sums: __m256i) -> __m256i {
    // SAFETY: no instruction at all.
    unsafe {
        asm!("/* {0} */", inout(ymm_reg) sums, options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

/// The pointer as it is, in a register of its own.
#[inline]
#[expect(clippy::pointers_in_nomem_asm_block, reason = "what it points to is not looked at")]
fn in_register(mut pointer: *const u32) -> *const u32 {
    // SAFETY: no instruction at all.
    unsafe {
        asm!("/* {0} */", inout(reg) pointer, options(pure, nomem, nostack, preserves_flags));
    }
    pointer
}
