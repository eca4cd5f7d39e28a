//! The innermost loops for 8-bit integers on x86.

#![expect(unsafe_code, reason = "vector loads and stores through raw pointers")]

use super::integers::{IntegerWidth, STEPS_8};
use super::isa::Isa;
use super::packed::PANEL;
use super::tile_integers::{IntegerArgs, block_groups};

const GROUP_WORDS: usize = IntegerWidth::Eight.group_words();
const BLOCK_GROUPS: usize = block_groups(Isa::Avx2, IntegerWidth::Eight);
/// Steps between which memory is asked for.
const ASK_STEPS: usize = 4;

/// The dot product of four bytes: weights are made unsigned by adding 128, which is taken off by the sum of the row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn vnni<const M: usize>(args: &IntegerArgs<'_>) {
    use std::arch::x86_64::{
        _mm512_add_ps, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps,
        _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512, _mm512_storeu_ps, _mm512_xor_si512,
    };

    /// Vectors of a panel.
    const V: usize = PANEL / 16;

    let (mut fetch, mut far) = (args.fetch, args.far);
    let times = args.w.len() / GROUP_WORDS * (STEPS_8 / ASK_STEPS);
    let (lines, far_lines) = (fetch.lines.div_ceil(times), far.lines_of(times));
    // SAFETY: a group holds its steps and scales; the rest is the caller's contract.
    unsafe {
        let flip = _mm512_set1_epi8(-128);
        for (group, w) in args.w.chunks_exact(GROUP_WORDS).enumerate() {
            // Loops rather than closures, which would be calls.
            let mut rows = [(std::ptr::null(), 0.0); M];
            let mut acc = [[_mm512_setzero_si512(); V]; M];
            for (row, (of_row, acc)) in rows.iter_mut().zip(&mut acc).enumerate() {
                let (integers, scale) = args.row::<STEPS_8>(row, group);
                *of_row = (integers.as_ptr(), scale);
                *acc = [_mm512_set1_epi32(-128 * args.sum(row, group)); V];
            }
            for step in 0..STEPS_8 {
                if step % ASK_STEPS == 0 {
                    fetch.next_far(lines);
                    far.next(far_lines);
                }
                let mut weights = [_mm512_setzero_si512(); V];
                for (v, weight) in weights.iter_mut().enumerate() {
                    let words = _mm512_loadu_si512(w.as_ptr().add(step * PANEL + 16 * v).cast());
                    *weight = _mm512_xor_si512(words, flip);
                }
                for (acc, (integers, _)) in acc.iter_mut().zip(&rows) {
                    let four = _mm512_set1_epi32((*integers.add(step)).cast_signed());
                    for (acc, weight) in acc.iter_mut().zip(&weights) {
                        *acc = _mm512_dpbusd_epi32(*acc, *weight, four);
                    }
                }
            }
            for (row, (acc, (_, scale))) in acc.iter().zip(&rows).enumerate() {
                for (v, acc) in acc.iter().enumerate() {
                    let scales = _mm512_loadu_ps(w.as_ptr().add(STEPS_8 * PANEL + 16 * v).cast());
                    let product =
                        _mm512_mul_ps(_mm512_cvtepi32_ps(*acc), _mm512_mul_ps(scales, _mm512_set1_ps(*scale)));
                    let at = args.y.add(row * args.y_stride + 16 * v);
                    _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), product));
                }
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2<const M: usize>(args: &IntegerArgs<'_>) {
    // SAFETY: the caller's contract.
    unsafe {
        match M {
            1 => strips::<M, 8>(args),
            2 | 3 => strips::<M, 4>(args),
            _ => strips::<M, 2>(args),
        }
    }
}

/// Both of a word's halves, every second byte each, as pairs of 16-bit integers: the products of two pairs add up in 32 bits
/// without overflow. Strips of `V` vectors keep a tile's sums in the registers.
///
/// # Safety
/// As for [`super::tile_integers::integer_tile`]; the processor has AVX2.
#[inline(always)]
unsafe fn strips<const M: usize, const V: usize>(args: &IntegerArgs<'_>) {
    use std::arch::x86_64::{
        __m256i, _mm256_add_epi32, _mm256_add_ps, _mm256_cvtepi32_ps, _mm256_loadu_ps, _mm256_madd_epi16,
        _mm256_mul_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_si256, _mm256_slli_epi16, _mm256_srai_epi16,
        _mm256_storeu_ps,
    };

    /// Columns of a vector.
    const LANES: usize = 8;

    assert!(args.w.as_ptr().cast::<__m256i>().is_aligned(), "a block of a packed matrix");
    // SAFETY: a group holds its steps and scales, on whole vectors; the rest is the caller's contract.
    unsafe {
        let mut halves = [[[[0_u32; STEPS_8]; 2]; M]; BLOCK_GROUPS];
        let mut scales = [[0.0_f32; M]; BLOCK_GROUPS];
        let of_groups = halves.iter_mut().zip(&mut scales).take(args.w.len() / GROUP_WORDS);
        for (group, (halves, scales)) in of_groups.enumerate() {
            for (row, ([odd, even], scale)) in halves.iter_mut().zip(scales).enumerate() {
                let (integers, of_row) = args.row::<STEPS_8>(row, group);
                *scale = of_row;
                for ((word, odd), even) in integers.iter().zip(odd).zip(even) {
                    let wide = |byte: u8| u32::from(i16::from(byte.cast_signed()).cast_unsigned());
                    let [a, b, c, d] = word.to_le_bytes().map(wide);
                    (*odd, *even) = (b | d << 16, a | c << 16);
                }
            }
        }
        let count = PANEL / (V * LANES);
        for strip in 0..count {
            let (mut fetch, mut far) = (args.fetch.share(strip, count), args.far.of_strip(strip, count));
            let far_lines = far.lines_of(args.w.len() / GROUP_WORDS * STEPS_8);
            for (group, w) in args.w.chunks_exact(GROUP_WORDS).enumerate() {
                let w = w.as_ptr().add(strip * V * LANES);
                let mut acc = [[_mm256_setzero_si256(); V]; M];
                for step in 0..STEPS_8 {
                    fetch.next(V / 2);
                    far.next(far_lines);
                    for half in 0..2 {
                        let mut weights = [_mm256_setzero_si256(); V];
                        for (v, weight) in weights.iter_mut().enumerate() {
                            // Volatile, lest the compiler keep both halves in registers that the sums need.
                            let words = w.add(step * PANEL + v * LANES).cast::<__m256i>().read_volatile();
                            *weight =
                                _mm256_srai_epi16::<8>(if half == 0 { words } else { _mm256_slli_epi16::<8>(words) });
                        }
                        for (acc, halves) in acc.iter_mut().zip(&halves[group]) {
                            let pair = _mm256_set1_epi32(halves[half][step].cast_signed());
                            for (acc, weight) in acc.iter_mut().zip(&weights) {
                                *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(pair, *weight));
                            }
                        }
                    }
                }
                fetch.next(V / 2);
                for (row, (acc, scale)) in acc.iter().zip(&scales[group]).enumerate() {
                    for (v, acc) in acc.iter().enumerate() {
                        let weight_scales = _mm256_loadu_ps(w.add(STEPS_8 * PANEL + v * LANES).cast());
                        let scale = _mm256_mul_ps(weight_scales, _mm256_set1_ps(*scale));
                        let at = args.y.add(row * args.y_stride + (strip * V + v) * LANES);
                        let product = _mm256_mul_ps(_mm256_cvtepi32_ps(*acc), scale);
                        _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), product));
                    }
                }
            }
        }
    }
}
