//! The tile for AVX2 with fused multiply-add.
//!
//! A panel's 64 columns are passed in strips of so many vectors that a tile's sums stay in the 16 registers. The words of
//! `x` are split into their factors once per tile, those of the weights once per strip. Meanwhile the next block is
//! fetched, evenly over the tiles and strips, so that the memory works all the time however many rows share a block.

#![expect(unsafe_code, reason = "vector loads and stores through raw pointers")]

use std::arch::x86_64::{
    __m256i, _mm256_and_si256, _mm256_castsi256_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps,
};
use std::mem::MaybeUninit;

use super::ahead::Share;
use super::gemm::Target;
use super::packed::{PANEL, WeightFormat};
use super::tile::{AVX2_STEPS, Fetch, TileArgs};

/// Columns of a vector.
const LANES: usize = 8;

/// Accumulates `M` rows.
///
/// # Safety
/// As for the tile of any instruction set; the processor has the features.
///
/// # Panics
/// When the block is longer than [`AVX2_STEPS`] or does not lie on whole vectors.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn tile<const M: usize>(args: TileArgs<'_>, format: WeightFormat) {
    assert!(args.w.as_ptr().cast::<__m256i>().is_aligned(), "a block of a packed matrix");
    // SAFETY: the caller's contract.
    unsafe {
        match (M, format) {
            (1, WeightFormat::Bf16) => pairs::<M, 8>(&args),
            (2 | 3, WeightFormat::Bf16) => pairs::<M, 4>(&args),
            (_, WeightFormat::Bf16) => pairs::<M, 2>(&args),
            (1, WeightFormat::F32) => singles::<M, 8>(&args),
            (2 | 3, WeightFormat::F32) => singles::<M, 4>(&args),
            (_, WeightFormat::F32) => singles::<M, 2>(&args),
        }
    }
}

/// Words that are pairs of bf16.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn pairs<const M: usize, const V: usize>(args: &TileArgs<'_>) {
    let steps = args.w.len() / PANEL;
    // Clearing them first would cost as much as a twentieth of the product.
    let mut x = [[[MaybeUninit::<f32>::uninit(); AVX2_STEPS]; 2]; M];
    for (row, [first, second]) in x.iter_mut().enumerate() {
        let words = &args.x[row * args.x_stride..][..steps];
        // SAFETY: the caller's contract; both have room for the block's steps.
        unsafe { split(words, first[..steps].as_mut_ptr().cast(), second[..steps].as_mut_ptr().cast()) };
    }
    // SAFETY: the caller's contract; the rows hold the two factors of each of the block's steps.
    unsafe { strips::<M, V, 2>(args, std::array::from_fn(|row| x[row].as_ptr().cast())) };
}

/// `y[m, j] += sum_s w[j, s] h[m, s]` for the first `columns` of neighbouring panels of bf16 and `M` rows `h` of `r` numbers
/// in f32; with `from_zero` the sums replace what y held. One chain over ascending `s` per output, from `y` on.
///
/// # Safety
/// `y` must be valid for reads and writes of the columns in each of `M` rows, and nobody else may touch them meanwhile. The
/// processor has the features.
///
/// # Panics
/// When lengths do not fit.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn expand<const M: usize>(
    (h, r): (&[f32], usize),
    panels: &[u32],
    y: Target,
    columns: usize,
    from_zero: bool,
) {
    let panel_words = r.div_ceil(2) * PANEL;
    assert!(h.len() == M * r && panels.len() == columns.div_ceil(PANEL) * panel_words, "rows and panels fit");
    assert!(panels.as_ptr().cast::<__m256i>().is_aligned(), "panels of a packed matrix");
    for block in (0..panel_words).step_by(AVX2_STEPS * PANEL) {
        let words = (AVX2_STEPS * PANEL).min(panel_words - block);
        let mut x = [[[MaybeUninit::<f32>::uninit(); AVX2_STEPS]; 2]; M];
        for ([first, second], h) in x.iter_mut().zip(h.chunks_exact(r)) {
            let (pairs, rest) = h[block / PANEL * 2..].as_chunks::<2>();
            let steps = pairs.len().min(words / PANEL);
            for ((first, second), pair) in first.iter_mut().zip(&mut *second).zip(&pairs[..steps]) {
                first.write(pair[0]);
                second.write(pair[1]);
            }
            if let ([last], true) = (rest, steps < words / PANEL) {
                first[steps].write(*last);
                second[steps].write(0.0);
            }
        }
        let x = std::array::from_fn(|row| x[row].as_ptr().cast());
        for (panel_idx, panel) in panels.chunks_exact(panel_words).enumerate() {
            let args = TileArgs {
                x: &[],
                x_stride: 0,
                w: &panel[block..block + words],
                is_only: true,
                y: y.y.wrapping_add(panel_idx * PANEL),
                y_stride: y.stride,
                columns: PANEL.min(columns - panel_idx * PANEL),
                from_zero: from_zero && block == 0,
                fetch: Fetch::NONE,
                far: Share::NONE,
            };
            // SAFETY: the rows hold the two factors of each of the block's steps; y is the caller's.
            unsafe {
                match M {
                    1 => strips::<M, 8, 2>(&args, x),
                    2 | 3 => strips::<M, 4, 2>(&args, x),
                    _ => strips::<M, 2, 2>(&args, x),
                }
            }
        }
    }
}

/// The first and second numbers of pairs of bf16.
///
/// # Safety
/// The processor has the features, and both places are valid for writes of as many numbers as there are words.
#[inline(always)]
pub(super) unsafe fn split(words: &[u32], first: *mut f32, second: *mut f32) {
    let (vectors, rest) = words.as_chunks::<LANES>();
    // SAFETY: the caller's contract.
    unsafe {
        let high = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
        for (idx, vector) in vectors.iter().enumerate() {
            let words = _mm256_loadu_si256(vector.as_ptr().cast());
            _mm256_storeu_ps(first.add(idx * LANES), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)));
            _mm256_storeu_ps(second.add(idx * LANES), _mm256_castsi256_ps(_mm256_and_si256(words, high)));
        }
        for (idx, word) in rest.iter().enumerate() {
            first.add(vectors.len() * LANES + idx).write(f32::from_bits(word << 16));
            second.add(vectors.len() * LANES + idx).write(f32::from_bits(word & 0xffff_0000));
        }
    }
}

/// Words that are f32.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn singles<const M: usize, const V: usize>(args: &TileArgs<'_>) {
    let steps = args.w.len() / PANEL;
    let x = std::array::from_fn(|row| args.x[row * args.x_stride..][..steps].as_ptr().cast());
    // SAFETY: the caller's contract; the rows hold a factor for each of the block's steps.
    unsafe { strips::<M, V, 1>(args, x) };
}

/// Strips of `V` vectors; `x` are rows of factors: those of all steps, and where a step has a second one (`PARTS`), these
/// [`AVX2_STEPS`] further on.
///
/// # Safety
/// As for [`tile`], and the rows of `x` must hold the factors of all steps.
#[inline(always)]
unsafe fn strips<const M: usize, const V: usize, const PARTS: usize>(args: &TileArgs<'_>, x: [*const f32; M]) {
    let (width, count) = (V * LANES, args.columns.div_ceil(V * LANES));
    for idx in 0..count {
        let from = idx * width;
        let columns = width.min(args.columns - from);
        let (w, y) = (&args.w[from..], args.y.wrapping_add(from));
        let part = TileArgs { w, y, fetch: args.fetch.share(idx, count), far: args.far.of_strip(idx, count), ..*args };
        // SAFETY: the strip lies in the tile; where the panel has fewer columns than the strip the sums go through memory
        // that has all.
        unsafe {
            if columns == width {
                strip::<M, V, PARTS>(&part, x);
                continue;
            }
            let mut copy = [[0.0_f32; PANEL]; M];
            let at = copy.as_flattened_mut().as_mut_ptr();
            for row in 0..if args.from_zero { 0 } else { M } {
                part.y.add(row * args.y_stride).copy_to_nonoverlapping(at.add(row * PANEL), columns);
            }
            strip::<M, V, PARTS>(&TileArgs { y: at, y_stride: PANEL, ..part }, x);
            for row in 0..M {
                at.add(row * PANEL).copy_to_nonoverlapping(part.y.add(row * args.y_stride), columns);
            }
        }
    }
}

/// One strip: `w` starts at its first column of the first step.
///
/// # Safety
/// `y` must be valid for reads and writes of `V` vectors in each of `M` rows; else as for [`strips`].
#[inline(always)]
unsafe fn strip<const M: usize, const V: usize, const PARTS: usize>(args: &TileArgs<'_>, x: [*const f32; M]) {
    let (mut fetch, mut far) = (args.fetch, args.far);
    let steps = args.w.len().div_ceil(PANEL);
    let far_lines = far.lines_of(steps);
    // SAFETY: every step of `w` holds the strip's columns, on whole vectors of a packed matrix's lines; every row of `x`
    // holds its factors, and `y` is the caller's.
    unsafe {
        let high = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
        let mut acc = [[_mm256_setzero_ps(); V]; M];
        for (row, acc) in acc.iter_mut().enumerate().take(if args.from_zero { 0 } else { M }) {
            for (v, sum) in acc.iter_mut().enumerate() {
                *sum = _mm256_loadu_ps(args.y.add(row * args.y_stride + v * LANES));
            }
        }
        for step in 0..steps {
            let w = args.w.as_ptr().add(step * PANEL);
            // All strips together fetch as many lines as a step has.
            fetch.next(V / 2);
            far.next(far_lines);
            for part in 0..PARTS {
                let mut weights = [_mm256_setzero_ps(); V];
                for (v, weight) in weights.iter_mut().enumerate() {
                    // Volatile, lest the compiler keep both parts of the weights in registers that the sums need.
                    let words = w.add(v * LANES).cast::<__m256i>().read_volatile();
                    *weight = _mm256_castsi256_ps(match (PARTS, part) {
                        (1, _) => words,
                        (_, 0) => _mm256_slli_epi32::<16>(words),
                        _ => _mm256_and_si256(words, high),
                    });
                }
                for (x, acc) in x.iter().zip(&mut acc) {
                    let factor = _mm256_set1_ps(*x.add(part * AVX2_STEPS + step));
                    for (sum, weight) in acc.iter_mut().zip(&weights) {
                        *sum = _mm256_fmadd_ps(factor, *weight, *sum);
                    }
                }
            }
        }
        for (row, acc) in acc.iter().enumerate() {
            for (v, sum) in acc.iter().enumerate() {
                _mm256_storeu_ps(args.y.add(row * args.y_stride + v * LANES), *sum);
            }
        }
    }
}
