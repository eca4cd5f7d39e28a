//! The innermost loops: a few rows of `x` times one block of one panel.
//!
//! Every output is one chain over ascending `k` that starts at zero or at what the previous block left, so its bits
//! depend on neither the number of rows nor the blocking. The chains differ between instruction sets.

use super::isa::Isa;
use super::packed::{PANEL, WeightFormat};
#[cfg(target_arch = "x86_64")]
use super::tile_avx2::tile as avx2;

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
    /// Nobody has used the block before: it comes from memory.
    pub(super) is_first: bool,
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
    pub(super) far: Fetch,
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

    /// Its length.
    pub(super) fn bytes(self) -> usize {
        self.lines * LINE_WORDS * size_of::<u32>()
    }

    /// No more than its first `bytes`.
    pub(super) fn up_to(self, bytes: usize) -> Self {
        Self { lines: self.lines.min(bytes.div_ceil(LINE_WORDS * size_of::<u32>())), ..self }
    }

    /// Share `idx` of `count` even ones.
    pub(super) fn share(self, idx: usize, count: usize) -> Self {
        self.part(idx, self.lines.div_ceil(count))
    }

    /// Part `idx` of those of `lines` lines.
    pub(super) fn part(self, idx: usize, lines: usize) -> Self {
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
pub(super) unsafe fn tile(rows: usize, isa: Isa, format: WeightFormat, mut args: TileArgs<'_>) {
    if isa != Isa::Avx2 {
        args.far.next_far(args.far.lines);
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
        (Isa::Avx512Bf16, WeightFormat::Bf16) => by_rows!(dot_bf16),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16 | Isa::Avx512Vnni | Isa::Avx512, _) => by_rows!(generic_avx512, format),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, _) => by_rows!(avx2, format),
        _ => by_rows!(generic_portable, format),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[expect(unsafe_code, reason = "vector loads and stores through raw pointers")]
unsafe fn dot_bf16<const M: usize>(args: TileArgs<'_>) {
    use std::arch::x86_64::{
        __m512bh, __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_mask_storeu_ps,
        _mm512_maskz_loadu_ps, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_setzero_si512,
    };

    /// Steps that a block's first use asks for ahead: it runs at the memory's speed.
    const AHEAD: usize = 16;

    fn as_bf16(v: __m512i) -> __m512bh {
        // SAFETY: both are 64 bytes in which every bit pattern is valid.
        unsafe { std::mem::transmute(v) }
    }

    let TileArgs { x, x_stride, w, is_first, y, y_stride, columns, from_zero, .. } = args;
    let masks: [u16; 4] = std::array::from_fn(|v| {
        let lanes = columns.saturating_sub(16 * v).min(16);
        u16::try_from((1_u32 << lanes) - 1).expect("at most 16 lanes")
    });
    let mut acc = [[_mm512_setzero_ps(); 4]; M];
    // SAFETY: masked lanes are neither read nor written, so that a vector of them may lie outside of `y`; the other lanes,
    // and `x` and `w`, are in bounds by the caller's contract. Prefetching an address past the end is harmless.
    unsafe {
        if !from_zero {
            for (r, row) in acc.iter_mut().enumerate() {
                for (v, lane) in row.iter_mut().enumerate() {
                    *lane = _mm512_maskz_loadu_ps(masks[v], y.wrapping_add(r * y_stride + 16 * v));
                }
            }
        }
        for (step, weights) in w.chunks_exact(PANEL).enumerate() {
            let mut wv = [_mm512_setzero_si512(); 4];
            for (v, lane) in wv.iter_mut().enumerate() {
                *lane = _mm512_loadu_si512(weights.as_ptr().add(16 * v).cast());
                if is_first {
                    _mm_prefetch::<_MM_HINT_T0>(weights.as_ptr().wrapping_add(AHEAD * PANEL + 16 * v).cast());
                }
            }
            for (r, row) in acc.iter_mut().enumerate() {
                let pair = _mm512_set1_epi32(x.get_unchecked(r * x_stride + step).cast_signed());
                for (v, lane) in row.iter_mut().enumerate() {
                    *lane = _mm512_dpbf16_ps(*lane, as_bf16(pair), as_bf16(wv[v]));
                }
            }
        }
        for (r, row) in acc.iter().enumerate() {
            for (v, lane) in row.iter().enumerate() {
                _mm512_mask_storeu_ps(y.wrapping_add(r * y_stride + 16 * v), masks[v], *lane);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[expect(unsafe_code, reason = "passes the caller's contract on")]
unsafe fn generic_avx512<const M: usize>(args: TileArgs<'_>, format: WeightFormat) {
    // SAFETY: the caller's contract.
    unsafe { generic::<M, 4, true>(args, format) }
}

#[expect(unsafe_code, reason = "passes the caller's contract on")]
unsafe fn generic_portable<const M: usize>(args: TileArgs<'_>, format: WeightFormat) {
    // SAFETY: the caller's contract.
    unsafe { generic::<M, 1, false>(args, format) }
}

/// Lanes that the plain loops keep together; the compiler makes them one vector or a few.
const LANES: usize = 16;

/// The plain loops, `V` groups of lanes at a time; the compiler vectorises them for the features of the function they are
/// inlined into. `FMA` says whether fused multiply-add is an instruction there.
#[inline(always)]
#[expect(unsafe_code, reason = "the output is a raw pointer")]
unsafe fn generic<const M: usize, const V: usize, const FMA: bool>(args: TileArgs<'_>, format: WeightFormat) {
    let TileArgs { x, x_stride, w, y, y_stride, columns, from_zero, .. } = args;
    let fma = |a: f32, b: f32, c: f32| if FMA { a.mul_add(b, c) } else { a * b + c };
    let (steps, _) = w.as_chunks::<PANEL>();
    assert!(x.len() >= (M - 1) * x_stride + steps.len(), "x holds every row of the tile");
    for from in (0..columns).step_by(V * LANES) {
        let width = (V * LANES).min(columns - from);
        let mut acc = [[[0.0_f32; LANES]; V]; M];
        if !from_zero {
            for (r, row) in acc.iter_mut().enumerate() {
                for (c, value) in row.as_flattened_mut()[..width].iter_mut().enumerate() {
                    // SAFETY: inside the tile by the caller's contract.
                    *value = unsafe { *y.add(r * y_stride + from + c) };
                }
            }
        }
        for (step, weights) in steps.iter().enumerate() {
            for v in 0..V {
                let weights: &[u32; LANES] =
                    weights[from + v * LANES..][..LANES].try_into().expect("the lanes divide the panel");
                let low = weights.map(|weight| f32::from_bits(weight << 16));
                let high = weights.map(|weight| f32::from_bits(weight & 0xffff_0000));
                for (r, row) in acc.iter_mut().enumerate() {
                    let word = x[r * x_stride + step];
                    for (lane, value) in row[v].iter_mut().enumerate() {
                        *value = match format {
                            WeightFormat::F32 => fma(f32::from_bits(word), f32::from_bits(weights[lane]), *value),
                            WeightFormat::Bf16 => {
                                let sum = fma(f32::from_bits(word << 16), low[lane], *value);
                                fma(f32::from_bits(word & 0xffff_0000), high[lane], sum)
                            }
                        };
                    }
                }
            }
        }
        for (r, row) in acc.iter().enumerate() {
            for (c, value) in row.as_flattened()[..width].iter().enumerate() {
                // SAFETY: inside the tile by the caller's contract.
                unsafe { *y.add(r * y_stride + from + c) = *value };
            }
        }
    }
}
