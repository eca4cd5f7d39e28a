//! The innermost loops for integers: a few rows of `x` times some groups of one panel.
//!
//! See [`super::integers`] for the formula, by which all instruction sets give the same bits.

#![expect(unsafe_code, reason = "outputs are read and written through a raw pointer")]

use super::ahead::Share;
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
    /// What to fetch for later, to a cache further away.
    pub(super) far: Share<'a>,
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
}

/// Most groups of one call for several rows: they and the next ones (17 KiB each) share the nearest cache. With VNNI they (120
/// KiB) stay in the second one while every row uses them.
pub(super) const fn block_groups(isa: Isa, width: IntegerWidth) -> usize {
    match (isa, width) {
        (Isa::Portable | Isa::Avx2 | Isa::Avx512, IntegerWidth::Eight) => 4,
        (Isa::Portable | Isa::Avx2 | Isa::Avx512, IntegerWidth::Sixteen) => 2,
        (Isa::Avx512Vnni | Isa::Avx512Bf16, IntegerWidth::Eight) => 28,
        (Isa::Avx512Vnni | Isa::Avx512Bf16, IntegerWidth::Sixteen) => 14,
    }
}

/// Whether the processor foresees what tiles of these rows read, all of them one: asking holds it up then, and blocks, which
/// keep weights near for the next tile, only interrupt it.
pub(super) fn foresees(isa: Isa, width: IntegerWidth, rows: usize) -> bool {
    match isa {
        Isa::Avx2 => width == IntegerWidth::Sixteen && rows == 1,
        Isa::Avx512Vnni | Isa::Avx512Bf16 => rows <= ROWS,
        Isa::Portable | Isa::Avx512 => false,
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
/// When the block has more than [`block_groups`] groups, more than all where the processor [`foresees`] them, or `x` lacks words.
pub(super) unsafe fn integer_tile(rows: usize, isa: Isa, width: IntegerWidth, args: &IntegerArgs<'_>) {
    let most = if foresees(isa, width, rows) { args.groups } else { block_groups(isa, width) };
    assert!(args.w.len() <= most * width.group_words(), "a block's groups");
    // SAFETY: the caller's contract.
    unsafe {
        if args.columns < PANEL {
            return narrow_tile(rows, isa, width, args);
        }
        if args.from_zero {
            for row in 0..rows {
                args.y.add(row * args.y_stride).write_bytes(0, PANEL);
            }
        }
        whole_tile(rows, isa, width, args);
    }
}

/// The columns that exist of a panel that has fewer: all of its sums are made in a copy.
///
/// # Safety
/// As for [`integer_tile`].
#[cold]
unsafe fn narrow_tile(rows: usize, isa: Isa, width: IntegerWidth, args: &IntegerArgs<'_>) {
    let mut copy = [[0.0_f32; PANEL]; ROWS];
    // SAFETY: the caller's contract; the copy has a panel's columns in every row.
    unsafe {
        let of_rows = |row: usize| args.y.add(row * args.y_stride);
        if !args.from_zero {
            for (row, copy) in copy.iter_mut().enumerate().take(rows) {
                copy.as_mut_ptr().copy_from_nonoverlapping(of_rows(row), args.columns);
            }
        }
        let y = copy.as_mut_ptr().cast();
        whole_tile(rows, isa, width, &IntegerArgs { y, y_stride: PANEL, columns: PANEL, ..*args });
        for (row, copy) in copy.iter().enumerate().take(rows) {
            of_rows(row).copy_from_nonoverlapping(copy.as_ptr(), args.columns);
        }
    }
}

/// All columns of a panel, added to what `y` holds.
///
/// # Safety
/// As for [`integer_tile`], with a panel's columns.
unsafe fn whole_tile(rows: usize, isa: Isa, width: IntegerWidth, args: &IntegerArgs<'_>) {
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
                // SAFETY: the caller's contract: a row holds a panel.
                let sum = unsafe { &mut *args.y.add(row * args.y_stride + lane) };
                *sum = match width {
                    IntegerWidth::Eight => *sum + *acc as f32 * scale,
                    IntegerWidth::Sixteen => (*acc as f32).mul_add(scale, *sum),
                };
            }
        }
    }
}
