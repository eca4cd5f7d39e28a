//! The innermost loops for 8-bit integers: a few rows of `x` times some groups of one panel.
//!
//! See [`super::int8`] for the formula, by which all instruction sets give the same bits.

#![expect(unsafe_code, reason = "vector loads and stores through raw pointers")]

use super::int8::{GROUP_STEPS, GROUP_WORDS};
use super::isa::Isa;
use super::packed::PANEL;
use super::tile::{Fetch, ROWS};

/// Most groups of one call: they and the next ones (17 KiB each) share the nearest cache.
pub(super) const BLOCK_GROUPS: usize = 4;

/// One block's operands.
#[derive(Clone, Copy)]
pub(super) struct Int8Args<'a> {
    /// Rows of `x`, from the tile's first on.
    pub(super) x: &'a [u32],
    /// Words between rows of `x`.
    pub(super) x_stride: usize,
    /// Groups of a row.
    pub(super) groups: usize,
    /// The block's first group.
    pub(super) first_group: usize,
    /// The panel's block, `[groups of the block][GROUP_WORDS]`.
    pub(super) w: &'a [u32],
    /// Where the tile's first output goes.
    pub(super) y: *mut f32,
    /// Elements between rows of `y`.
    pub(super) y_stride: usize,
    /// Columns of the panel that exist.
    pub(super) columns: usize,
    /// Start from zero rather than from `y`.
    pub(super) from_zero: bool,
    /// What to fetch meanwhile.
    pub(super) fetch: Fetch,
}

impl Int8Args<'_> {
    /// The integers of a row in a group of the block, their scale and their sum.
    #[inline(always)]
    fn row(&self, row: usize, group: usize) -> (&[u32; GROUP_STEPS], f32, i32) {
        let (row, group) = (&self.x[row * self.x_stride..], self.first_group + group);
        let scales = self.groups * GROUP_STEPS;
        let integers = row[group * GROUP_STEPS..].first_chunk().expect("a group has its words");
        (integers, f32::from_bits(row[scales + group]), row[scales + self.groups + group].cast_signed())
    }
}

/// Accumulates `rows` rows.
///
/// # Safety
/// `y` must be valid for reads and writes of `columns` elements in each of `rows` rows at `y_stride`, and nobody else may
/// touch them meanwhile. `isa` must be available.
///
/// # Panics
/// When the block has more than [`BLOCK_GROUPS`] groups or `x` lacks words.
pub(super) unsafe fn int8_tile(rows: usize, isa: Isa, args: &Int8Args<'_>) {
    assert!(args.w.len() <= BLOCK_GROUPS * GROUP_WORDS, "a block's groups");
    macro_rules! by_rows {
        ($f:ident) => {
            // SAFETY: the caller's contract.
            unsafe {
                match rows {
                    1 => $f::<1>(args),
                    2 => $f::<2>(args),
                    3 => $f::<3>(args),
                    4 => $f::<4>(args),
                    5 => $f::<5>(args),
                    6 => $f::<ROWS>(args),
                    _ => unreachable!("a tile has 1 to 6 rows"),
                }
            }
        };
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni | Isa::Avx512Bf16 => by_rows!(vnni),
        // Without the dot product of bytes, wider vectors of 32-bit products take longer than pairs of 16-bit ones.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 => by_rows!(avx2),
        _ => by_rows!(plain),
    }
}

/// The tile's outputs so far, in memory that has all columns of a panel.
///
/// # Safety
/// As for [`int8_tile`].
#[inline(always)]
unsafe fn load<const M: usize>(args: &Int8Args<'_>) -> [[f32; PANEL]; M] {
    let mut sums = [[0.0; PANEL]; M];
    for (row, sums) in sums.iter_mut().enumerate().take(if args.from_zero { 0 } else { M }) {
        // SAFETY: the caller's contract.
        unsafe { args.y.add(row * args.y_stride).copy_to_nonoverlapping(sums.as_mut_ptr(), args.columns) };
    }
    sums
}

/// # Safety
/// As for [`int8_tile`].
#[inline(always)]
unsafe fn store<const M: usize>(args: &Int8Args<'_>, sums: &[[f32; PANEL]; M]) {
    for (row, sums) in sums.iter().enumerate() {
        // SAFETY: the caller's contract.
        unsafe { args.y.add(row * args.y_stride).copy_from_nonoverlapping(sums.as_ptr(), args.columns) };
    }
}

/// The plain loops.
#[inline(always)]
unsafe fn plain<const M: usize>(args: &Int8Args<'_>) {
    // SAFETY: the caller's contract.
    let mut sums = unsafe { load::<M>(args) };
    for (group, w) in args.w.chunks_exact(GROUP_WORDS).enumerate() {
        let (steps, _) = w.as_chunks::<PANEL>();
        for (row, sums) in sums.iter_mut().enumerate() {
            let (integers, scale, _) = args.row(row, group);
            let mut acc = [0_i32; PANEL];
            for (word, weights) in integers.iter().zip(steps) {
                let [a, b, c, d] = word.to_le_bytes().map(|byte| i32::from(byte.cast_signed()));
                for (acc, weights) in acc.iter_mut().zip(weights) {
                    let at = |place: u32| (weights << (24 - 8 * place)).cast_signed() >> 24;
                    *acc += a * at(0) + b * at(1) + c * at(2) + d * at(3);
                }
            }
            for ((sum, acc), weight_scale) in sums.iter_mut().zip(acc).zip(&steps[GROUP_STEPS]) {
                *sum += acc as f32 * (f32::from_bits(*weight_scale) * scale);
            }
        }
    }
    // SAFETY: the caller's contract.
    unsafe { store(args, &sums) };
}

/// The dot product of four bytes: weights are made unsigned by adding 128, which is taken off by the sum of the row.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn vnni<const M: usize>(args: &Int8Args<'_>) {
    use std::arch::x86_64::{
        _mm512_add_ps, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps,
        _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512, _mm512_storeu_ps, _mm512_xor_si512,
    };

    /// Vectors of a panel.
    const V: usize = PANEL / 16;

    let mut fetch = args.fetch;
    // SAFETY: a group holds its steps and scales, a row of sums a panel; the rest is the caller's contract.
    unsafe {
        let mut sums = load::<M>(args);
        let flip = _mm512_set1_epi8(-128);
        for (group, w) in args.w.chunks_exact(GROUP_WORDS).enumerate() {
            let rows: [_; M] = std::array::from_fn(|row| args.row(row, group));
            let mut acc = [[_mm512_setzero_si512(); V]; M];
            for (acc, (_, _, sum)) in acc.iter_mut().zip(&rows) {
                *acc = [_mm512_set1_epi32(-128 * sum); V];
            }
            for step in 0..GROUP_STEPS {
                let mut weights = [_mm512_setzero_si512(); V];
                for (v, weight) in weights.iter_mut().enumerate() {
                    let words = _mm512_loadu_si512(w.as_ptr().add(step * PANEL + 16 * v).cast());
                    *weight = _mm512_xor_si512(words, flip);
                }
                fetch.next(PANEL / 16);
                for (acc, (integers, _, _)) in acc.iter_mut().zip(&rows) {
                    let four = _mm512_set1_epi32(integers[step].cast_signed());
                    for (acc, weight) in acc.iter_mut().zip(&weights) {
                        *acc = _mm512_dpbusd_epi32(*acc, *weight, four);
                    }
                }
            }
            fetch.next(PANEL / 16);
            for ((acc, sums), (_, scale, _)) in acc.iter().zip(&mut sums).zip(&rows) {
                for (v, acc) in acc.iter().enumerate() {
                    let scales = _mm512_loadu_ps(w.as_ptr().add(GROUP_STEPS * PANEL + 16 * v).cast());
                    let product =
                        _mm512_mul_ps(_mm512_cvtepi32_ps(*acc), _mm512_mul_ps(scales, _mm512_set1_ps(*scale)));
                    let at = sums.as_mut_ptr().add(16 * v);
                    _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), product));
                }
            }
        }
        store(args, &sums);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const M: usize>(args: &Int8Args<'_>) {
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
/// As for [`int8_tile`]; the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn strips<const M: usize, const V: usize>(args: &Int8Args<'_>) {
    use std::arch::x86_64::{
        __m256i, _mm256_add_epi32, _mm256_add_ps, _mm256_cvtepi32_ps, _mm256_loadu_ps, _mm256_madd_epi16,
        _mm256_mul_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_si256, _mm256_slli_epi16, _mm256_srai_epi16,
        _mm256_storeu_ps,
    };

    /// Columns of a vector.
    const LANES: usize = 8;

    assert!(args.w.as_ptr().cast::<__m256i>().is_aligned(), "a block of a packed matrix");
    // SAFETY: a group holds its steps and scales, on whole vectors; a row of sums holds a panel; the rest is the caller's
    // contract.
    unsafe {
        let mut sums = load::<M>(args);
        let mut halves = [[[[0_u32; GROUP_STEPS]; 2]; M]; BLOCK_GROUPS];
        let mut scales = [[0.0_f32; M]; BLOCK_GROUPS];
        let of_groups = halves.iter_mut().zip(&mut scales).take(args.w.len() / GROUP_WORDS);
        for (group, (halves, scales)) in of_groups.enumerate() {
            for (row, ([odd, even], scale)) in halves.iter_mut().zip(scales).enumerate() {
                let (integers, of_row, _) = args.row(row, group);
                *scale = of_row;
                for ((word, odd), even) in integers.iter().zip(odd).zip(even) {
                    let wide = |byte: u8| u32::from(i16::from(byte.cast_signed()).cast_unsigned());
                    let [a, b, c, d] = word.to_le_bytes().map(wide);
                    (*odd, *even) = (b | d << 16, a | c << 16);
                }
            }
        }
        let count = args.columns.div_ceil(V * LANES);
        for strip in 0..count {
            let mut fetch = args.fetch.share(strip, count);
            for (group, w) in args.w.chunks_exact(GROUP_WORDS).enumerate() {
                let w = w.as_ptr().add(strip * V * LANES);
                let mut acc = [[_mm256_setzero_si256(); V]; M];
                for step in 0..GROUP_STEPS {
                    fetch.next(V / 2);
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
                for ((acc, sums), scale) in acc.iter().zip(&mut sums).zip(&scales[group]) {
                    for (v, acc) in acc.iter().enumerate() {
                        let weight_scales = _mm256_loadu_ps(w.add(GROUP_STEPS * PANEL + v * LANES).cast());
                        let scale = _mm256_mul_ps(weight_scales, _mm256_set1_ps(*scale));
                        let at = sums.as_mut_ptr().add((strip * V + v) * LANES);
                        let product = _mm256_mul_ps(_mm256_cvtepi32_ps(*acc), scale);
                        _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), product));
                    }
                }
            }
        }
        store(args, &sums);
    }
}
