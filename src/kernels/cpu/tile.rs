//! The innermost loops: a few rows of `x` times one block of one panel.
//!
//! Every output is one chain over ascending `k` that starts at zero or at what the previous block left, so its bits
//! depend on neither the number of rows nor the blocking. The chains differ between instruction sets.

use std::ops::Range;

use super::ahead::Share;
use super::isa::Isa;
#[cfg(target_arch = "x86_64")]
use super::lanes::Avx512;
use super::lanes::{Lanes, Plain};
use super::packed::{PANEL, WeightFormat};
#[cfg(target_arch = "x86_64")]
use super::tile_avx2::tile as avx2;
#[cfg(target_arch = "x86_64")]
use super::tile_avx512::tile as bf16;
use super::words::LANES;

/// Most rows one call takes; 6 rows of 64 columns fill the 32 registers of AVX-512, 6 of 16 the 16 of AVX2.
pub(super) const ROWS: usize = 6;

/// Words of `k` per block on AVX2: a block and the next one (16 KiB each) share the nearest cache.
pub(super) const AVX2_STEPS: usize = 64;

/// Words of `k` per block. Elsewhere a block (128 KiB) stays in the second-level cache while every row uses it.
pub(super) fn block_steps(isa: Isa) -> usize {
    match isa {
        Isa::Avx2 => AVX2_STEPS,
        Isa::Portable | Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 => 512,
    }
}

/// Rows times panels multiplied before their outputs are finished, where those are few rows: their outputs take half of the
/// nearest cache, or all of it beside a large second one.
pub(super) fn piece(isa: Isa) -> usize {
    match isa {
        Isa::Portable | Isa::Avx2 => 64,
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 => 128,
    }
}

/// Bytes of the base weight during which is asked for what comes after it: they pass through the second cache, which waits for
/// both; processors with AVX-512 have at least 1 MiB.
pub(super) fn ahead_bytes(isa: Isa) -> usize {
    match isa {
        Isa::Portable | Isa::Avx2 => 192 << 10,
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 => 384 << 10,
    }
}

/// Words of a cache line.
pub(super) const LINE_WORDS: usize = 16;

/// One block's operands. Rows of `x` are 32-bit words in the weight's format: bf16 pairs, or f32.
#[derive(Clone, Copy)]
pub(super) struct TileArgs<'a> {
    /// Words of `x` from the tile's first row and the block's first step on.
    pub(super) x: &'a [u32],
    /// Words between rows of `x`.
    pub(super) x_stride: usize,
    /// The panel's block, `[steps][PANEL]`.
    pub(super) w: &'a [u32],
    /// No other tile uses the block.
    pub(super) is_only: bool,
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
    /// What to fetch for later, to a cache further away.
    pub(super) far: Share<'a>,
}

/// Memory that is asked for while a tile is computed: it need not exist.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fetch {
    /// The first word.
    pub(super) at: *const u32,
    /// Cache lines.
    pub(super) lines: usize,
}

impl Default for Fetch {
    fn default() -> Self {
        Self::NONE
    }
}

impl Fetch {
    /// Nothing.
    pub(super) const NONE: Self = Self { at: std::ptr::null(), lines: 0 };

    /// All of `elements`.
    pub(super) fn of<T>(elements: &[T]) -> Self {
        let lines = size_of_val(elements).div_ceil(LINE_WORDS * size_of::<u32>());
        Self { at: elements.as_ptr().cast(), lines }
    }

    /// Those of `elements` in `range` that there are.
    pub(super) fn of_part<T>(elements: &[T], range: Range<usize>) -> Self {
        let part = elements.get(range.start..range.end.min(elements.len()));
        part.map_or(Self::NONE, Self::of)
    }

    /// Its length.
    pub(super) fn bytes(self) -> usize {
        self.lines * LINE_WORDS * size_of::<u32>()
    }

    /// No more than its first `bytes`.
    pub(super) fn up_to(self, bytes: usize) -> Self {
        Self { lines: self.lines.min(bytes.div_ceil(LINE_WORDS * size_of::<u32>())), ..self }
    }

    /// The part that rows `from..to` of `m` ask for.
    pub(super) fn of_rows(self, (from, to): (usize, usize), m: usize) -> Self {
        let (first, end) = (self.lines * from / m, self.lines * to / m);
        Self { at: self.at.wrapping_add(first * LINE_WORDS), lines: end - first }
    }

    /// Share `idx` of `count` even ones.
    pub(super) fn share(self, idx: usize, count: usize) -> Self {
        let lines = self.lines.div_ceil(count);
        Self { at: self.at.wrapping_add(idx * lines * LINE_WORDS), lines }
    }

    /// Asks for the next up to `lines` lines, for the nearest cache.
    #[inline(always)]
    pub(super) fn next(&mut self, lines: usize) {
        if self.lines > 0 {
            self.ask::<true>(lines);
        }
    }

    /// The same for a cache further away.
    #[inline(always)]
    pub(super) fn next_far(&mut self, lines: usize) {
        if self.lines > 0 {
            self.ask::<false>(lines);
        }
    }

    /// Takes up to `lines` lines off its beginning.
    pub(super) fn take(&mut self, lines: usize) -> Self {
        let taken = Self { lines: lines.min(self.lines), ..*self };
        self.at = self.at.wrapping_add(taken.lines * LINE_WORDS);
        self.lines -= taken.lines;
        taken
    }

    #[inline(always)]
    fn ask<const NEAR: bool>(&mut self, lines: usize) {
        #[cfg(target_arch = "x86_64")]
        for line in 0..lines {
            use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
            let at = self.at.wrapping_add(line * LINE_WORDS).cast();
            #[expect(unsafe_code, reason = "an instruction without effect but on the caches")]
            // SAFETY: SSE is part of the architecture, and any address may be asked for.
            unsafe {
                if NEAR { _mm_prefetch::<_MM_HINT_T0>(at) } else { _mm_prefetch::<_MM_HINT_T1>(at) }
            }
        }
        self.at = self.at.wrapping_add(lines * LINE_WORDS);
        self.lines = self.lines.saturating_sub(lines);
    }
}

/// Accumulates `rows` rows.
///
/// # Safety
/// `y` must be valid for reads and writes of `columns` elements in each of `rows` rows at `y_stride`, and nobody else may
/// touch them meanwhile. `isa` must be available.
#[expect(unsafe_code, reason = "the output pointer is shared by panels that write different columns")]
pub(super) unsafe fn tile(rows: usize, isa: Isa, format: WeightFormat, args: TileArgs<'_>) {
    let spreads = matches!((isa, format), (Isa::Avx2, _) | (Isa::Avx512Bf16, WeightFormat::Bf16));
    if !spreads {
        args.far.all();
    }
    let steps = args.w.len() / PANEL;
    assert!(args.x.len() >= (rows - 1) * args.x_stride + steps, "x holds every row of the tile");
    macro_rules! by_rows {
        ($f:ident $(, $p:expr)*) => {
            // SAFETY: the caller's contract, and the assertion above for `x`.
            unsafe {
                match rows {
                    1 => $f::<1>(args $(, $p)*),
                    2 => $f::<2>(args $(, $p)*),
                    3 => $f::<3>(args $(, $p)*),
                    4 => $f::<4>(args $(, $p)*),
                    5 => $f::<5>(args $(, $p)*),
                    6 => $f::<ROWS>(args $(, $p)*),
                    _ => unreachable!("a tile has 1 to 6 rows"),
                }
            }
        };
    }
    match (isa, format) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16, WeightFormat::Bf16) => by_rows!(bf16),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16 | Isa::Avx512Vnni | Isa::Avx512, _) => by_rows!(generic_avx512, format),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, _) => by_rows!(avx2, format),
        _ => by_rows!(generic_portable, format),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[expect(unsafe_code, reason = "passes the caller's contract on")]
unsafe fn generic_avx512<const M: usize>(args: TileArgs<'_>, format: WeightFormat) {
    // SAFETY: the caller's contract.
    unsafe { generic::<M, 4, Avx512>(args, format) }
}

#[expect(unsafe_code, reason = "passes the caller's contract on")]
unsafe fn generic_portable<const M: usize>(args: TileArgs<'_>, format: WeightFormat) {
    // SAFETY: the caller's contract.
    unsafe { generic::<M, 1, Plain>(args, format) }
}

/// The loops without a product of bf16, `V` vectors of columns at a time.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
#[expect(unsafe_code, reason = "vector loads and stores through raw pointers")]
unsafe fn generic<const M: usize, const V: usize, L: Lanes>(args: TileArgs<'_>, format: WeightFormat) {
    for from in (0..args.columns).step_by(V * LANES) {
        let columns = (V * LANES).min(args.columns - from);
        let part = TileArgs { w: &args.w[from..], y: args.y.wrapping_add(from), ..args };
        // SAFETY: the strip lies in the tile; where the panel has fewer columns than the strip the sums go through memory
        // that has all.
        unsafe {
            if columns == V * LANES {
                strip::<M, V, L>(&part, format);
                continue;
            }
            let mut copy = [[0.0_f32; PANEL]; M];
            let at = copy.as_flattened_mut().as_mut_ptr();
            for row in 0..if args.from_zero { 0 } else { M } {
                part.y.add(row * args.y_stride).copy_to_nonoverlapping(at.add(row * PANEL), columns);
            }
            strip::<M, V, L>(&TileArgs { y: at, y_stride: PANEL, ..part }, format);
            for row in 0..M {
                at.add(row * PANEL).copy_to_nonoverlapping(part.y.add(row * args.y_stride), columns);
            }
        }
    }
}

/// One strip of [`generic`]: `w` starts at its first column of the first step.
///
/// # Safety
/// `y` must be valid for reads and writes of `V` vectors in each of `M` rows; else as for [`tile`].
#[inline(always)]
#[expect(unsafe_code, reason = "vector loads and stores through raw pointers")]
unsafe fn strip<const M: usize, const V: usize, L: Lanes>(args: &TileArgs<'_>, format: WeightFormat) {
    let TileArgs { x, x_stride, w, y, y_stride, .. } = *args;
    // SAFETY: every step of `w` holds the strip's columns, every row of `x` a word for each step, and `y` is the caller's.
    unsafe {
        let mut sums = [[L::splat(0.0); V]; M];
        for (row, sums) in sums.iter_mut().enumerate().take(if args.from_zero { 0 } else { M }) {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = L::load(y.add(row * y_stride + v * LANES));
            }
        }
        for step in 0..w.len().div_ceil(PANEL) {
            let words = w.as_ptr().add(step * PANEL);
            let x = x.as_ptr().add(step);
            match format {
                WeightFormat::F32 => {
                    let weights: [L; V] = std::array::from_fn(|v| L::load(words.add(v * LANES).cast()));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let x = L::splat(f32::from_bits(*x.add(row * x_stride)));
                        for (sum, weight) in sums.iter_mut().zip(weights) {
                            *sum = sum.add_product(x, weight);
                        }
                    }
                }
                WeightFormat::Bf16 => {
                    for v in 0..V {
                        let [first, second] = L::load_pairs(words.add(v * LANES));
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let word = *x.add(row * x_stride);
                            let sum = sums[v].add_product(L::splat(f32::from_bits(word << 16)), first);
                            sums[v] = sum.add_product(L::splat(f32::from_bits(word & 0xffff_0000)), second);
                        }
                    }
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                sum.store(y.add(row * y_stride + v * LANES));
            }
        }
    }
}
