//! The innermost loops for integers: a few rows of `x` times some groups of one panel.
//!
//! See [`super::integers`] for the formula, by which all instruction sets give the same bits.

#![expect(unsafe_code, reason = "outputs are read and written through a raw pointer")]

use std::mem::MaybeUninit;

use super::integers::{GROUP, IntegerWidth, STEPS_8, STEPS_16};
use super::isa::Isa;
use super::packed::PANEL;
use super::tile::{Fetch, ROWS};
#[cfg(target_arch = "x86_64")]
use super::{tile_int8, tile_int16};

/// One block's operands.
#[derive(Clone, Copy)]
pub(super) struct IntegerArgs<'a> {
    /// Rows of `x`, from the tile's first on.
    pub(super) x: &'a [u32],
    /// Words between rows of `x`.
    pub(super) x_stride: usize,
    /// Groups of a row.
    pub(super) groups: usize,
    /// The block's first group.
    pub(super) first_group: usize,
    /// The panel's block, groups of [`IntegerWidth::group_words`].
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

impl IntegerArgs<'_> {
    /// The words of a row in a group of the block, and their scale.
    #[inline(always)]
    pub(super) fn row<const STEPS: usize>(&self, row: usize, group: usize) -> (&[u32; STEPS], f32) {
        let (row, group) = (&self.x[row * self.x_stride..], self.first_group + group);
        let integers = row[group * STEPS..].first_chunk().expect("a group has its words");
        (integers, f32::from_bits(row[self.groups * STEPS + group]))
    }

    /// The sum of a row's 8-bit integers in a group of the block.
    #[inline(always)]
    pub(super) fn sum(&self, row: usize, group: usize) -> i32 {
        let sums = row * self.x_stride + self.groups * (STEPS_8 + 1);
        self.x[sums + self.first_group + group].cast_signed()
    }

    /// Where sums of all columns of a panel are, and the elements between rows: the outputs, or where the panel has fewer
    /// columns `copy`, which [`IntegerArgs::end`] writes back.
    ///
    /// # Safety
    /// As for [`integer_tile`].
    #[inline(always)]
    pub(super) unsafe fn begin<const M: usize>(&self, copy: &mut MaybeUninit<[[f32; PANEL]; M]>) -> (*mut f32, usize) {
        let is_whole = self.columns == PANEL;
        let sums = if is_whole { self.y } else { copy.write([[0.0; PANEL]; M]).as_mut_ptr().cast() };
        for row in 0..M {
            // SAFETY: the caller's contract; the copy has a panel's columns in every row.
            unsafe {
                let y = self.y.add(row * self.y_stride);
                match (is_whole, self.from_zero) {
                    (true, true) => y.write_bytes(0, PANEL),
                    (false, false) => sums.add(row * PANEL).copy_from_nonoverlapping(y, self.columns),
                    (true, false) | (false, true) => {}
                }
            }
        }
        (sums, if is_whole { self.y_stride } else { PANEL })
    }

    /// # Safety
    /// As for [`integer_tile`]; `sums` is what [`IntegerArgs::begin`] answered.
    #[inline(always)]
    pub(super) unsafe fn end<const M: usize>(&self, sums: *const f32) {
        if self.columns < PANEL {
            for row in 0..M {
                // SAFETY: the caller's contract.
                unsafe {
                    let y = self.y.add(row * self.y_stride);
                    y.copy_from_nonoverlapping(sums.add(row * PANEL), self.columns);
                }
            }
        }
    }
}

/// Most groups of one call: they and the next ones (17 KiB each) share the nearest cache.
pub(super) const fn block_groups(width: IntegerWidth) -> usize {
    match width {
        IntegerWidth::Eight => 4,
        IntegerWidth::Sixteen => 2,
    }
}

/// Calls `$f` for the number of rows of a tile.
macro_rules! by_rows {
    ($rows:expr, $args:expr, $($f:ident)::+ $(, $steps:expr)?) => {
        match $rows {
            1 => $($f)::+::<1 $(, $steps)?>($args),
            2 => $($f)::+::<2 $(, $steps)?>($args),
            3 => $($f)::+::<3 $(, $steps)?>($args),
            4 => $($f)::+::<4 $(, $steps)?>($args),
            5 => $($f)::+::<5 $(, $steps)?>($args),
            6 => $($f)::+::<ROWS $(, $steps)?>($args),
            _ => unreachable!("a tile has 1 to 6 rows"),
        }
    };
}

/// Accumulates `rows` rows.
///
/// # Safety
/// `y` must be valid for reads and writes of `columns` elements in each of `rows` rows at `y_stride`, and nobody else may
/// touch them meanwhile. `isa` must be available.
///
/// # Panics
/// When the block has more than [`block_groups`] groups or `x` lacks words.
pub(super) unsafe fn integer_tile(rows: usize, isa: Isa, width: IntegerWidth, args: &IntegerArgs<'_>) {
    assert!(args.w.len() <= block_groups(width) * width.group_words(), "a block's groups");
    // SAFETY: the caller's contract.
    unsafe {
        match (isa, width) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Vnni | Isa::Avx512Bf16, IntegerWidth::Eight) => by_rows!(rows, args, tile_int8::vnni),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Vnni | Isa::Avx512Bf16, IntegerWidth::Sixteen) => by_rows!(rows, args, tile_int16::vnni),
            // Without dot products of integers, wider vectors of 32-bit products take longer than pairs of 16-bit ones.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2 | Isa::Avx512, IntegerWidth::Eight) => by_rows!(rows, args, tile_int8::avx2),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2 | Isa::Avx512, IntegerWidth::Sixteen) => by_rows!(rows, args, tile_int16::avx2),
            (_, IntegerWidth::Eight) => by_rows!(rows, args, plain, STEPS_8),
            (_, IntegerWidth::Sixteen) => by_rows!(rows, args, plain, STEPS_16),
        }
    }
}

/// The plain loops over integers of which `STEPS` words hold a group.
#[inline(always)]
unsafe fn plain<const M: usize, const STEPS: usize>(args: &IntegerArgs<'_>) {
    let width = if STEPS == STEPS_8 { IntegerWidth::Eight } else { IntegerWidth::Sixteen };
    let per_word = GROUP / STEPS;
    let bits = u32::BITS / per_word as u32;
    let integer =
        |word: u32, idx: usize| (word << (u32::BITS - bits * (idx as u32 + 1))).cast_signed() >> (u32::BITS - bits);
    let mut copy = MaybeUninit::uninit();
    // SAFETY: the caller's contract.
    let (sums, stride) = unsafe { args.begin::<M>(&mut copy) };
    for (group, w) in args.w.chunks_exact(width.group_words()).enumerate() {
        let (steps, _) = w.as_chunks::<PANEL>();
        for row in 0..M {
            let (integers, scale) = args.row::<STEPS>(row, group);
            // Sums of what are no numbers may wrap.
            let mut acc = [0_i32; PANEL];
            for (word, weights) in integers.iter().zip(steps) {
                for (acc, weights) in acc.iter_mut().zip(weights) {
                    for idx in 0..per_word {
                        *acc = acc.wrapping_add(integer(*word, idx) * integer(*weights, idx));
                    }
                }
            }
            for (lane, acc) in acc.iter().enumerate() {
                let scale = width.scale(w, lane) * scale;
                // SAFETY: a row of sums holds a panel.
                let sum = unsafe { &mut *sums.add(row * stride + lane) };
                *sum = match width {
                    IntegerWidth::Eight => *sum + *acc as f32 * scale,
                    IntegerWidth::Sixteen => (*acc as f32).mul_add(scale, *sum),
                };
            }
        }
    }
    // SAFETY: the caller's contract.
    unsafe { args.end::<M>(sums) };
}
