//! Sparse matrices whose rows are the lanes of vectors.
//!
//! The rows of a panel of outputs that have entries are sorted by their number, the most first, and go in eights: step s of
//! an eight has the s-th entry of each of its rows, or zero where a row has fewer. So eight sums run beside one another, and
//! few entries are zeros. An entry is one word where the matrix is bf16 and its columns fit 16 bits.

#![expect(unsafe_code, reason = "gathers without checks, and threads write disjoint parts of the outputs")]

use std::ops::Range;

use super::dispatch::{dispatch, fma};
use super::isa::Isa;
use super::memory::Memory;
use super::packed::{FETCH_BYTES_MAX, PANEL, WeightFormat};
use super::slots::Outputs;
use super::tile::Fetch;
use super::words::bf16_bits;

/// Rows of an eight, and rows of `x` that are multiplied together.
const EIGHT: usize = 8;

/// A sparse matrix (n, k).
#[derive(Debug)]
pub struct SparseRows {
    k: usize,
    /// Where each panel's eights begin, and where the last one's end.
    panels: Vec<u32>,
    eights: Vec<Eight>,
    steps: Steps,
}

/// Up to eight rows.
#[derive(Debug)]
struct Eight {
    /// Its steps.
    from: u32,
    to: u32,
    /// The outputs, counted from the panel's first, and how many there are.
    rows: [u8; EIGHT],
    count: u8,
}

/// Entries, eight in a step.
#[derive(Debug)]
enum Steps {
    /// The columns in the lower halves of words, bf16 values in the upper ones.
    Narrow(Memory<[u32; EIGHT]>),
    Wide(Vec<WideStep>),
}

#[derive(Clone, Copy, Debug, Default)]
struct WideStep {
    columns: [u32; EIGHT],
    values: [f32; EIGHT],
}

/// A step of eight rows.
trait Step {
    /// Column and value of a lane.
    fn entry(&self, lane: usize) -> (usize, f32);
}

impl Step for [u32; EIGHT] {
    #[inline(always)]
    fn entry(&self, lane: usize) -> (usize, f32) {
        ((self[lane] & 0xffff) as usize, f32::from_bits(self[lane] & 0xffff_0000))
    }
}

impl Step for WideStep {
    #[inline(always)]
    fn entry(&self, lane: usize) -> (usize, f32) {
        (self.columns[lane] as usize, self.values[lane])
    }
}

impl SparseRows {
    /// Entries sorted by row, of k columns; with `Bf16` the values are rounded (exact when they were bf16).
    ///
    /// # Panics
    /// When an entry lacks a part or lies outside of the columns, or the rows are not sorted.
    pub fn new(format: WeightFormat, k: usize, rows: &[u32], (columns, values): (&[u32], &[f32])) -> Self {
        assert!(rows.len() == columns.len() && rows.len() == values.len(), "an entry has a row, a column and a value");
        assert!(rows.is_sorted(), "the entries are sorted by row");
        assert!(columns.iter().all(|column| (*column as usize) < k), "the entries are in {k} columns");
        let narrow = format == WeightFormat::Bf16 && k <= 1 << 16;
        let (mut panels, mut eights) = (vec![0], Vec::new());
        let (mut narrow_steps, mut wide_steps) = (Vec::new(), Vec::new());
        let mut from = 0;
        let num_panels = rows.last().map_or(0, |last| *last as usize / PANEL + 1);
        for panel_idx in 0..num_panels {
            let end = from + rows[from..].partition_point(|row| (*row as usize) < (panel_idx + 1) * PANEL);
            let mut runs = Vec::new();
            while from < end {
                let next = from + rows[from..end].partition_point(|row| *row == rows[from]);
                runs.push(from..next);
                from = next;
            }
            runs.sort_by_key(|run| std::cmp::Reverse(run.len()));
            for runs in runs.chunks(EIGHT) {
                for step in 0..runs[0].len() {
                    let entries = runs.iter().map(|run| run.clone().nth(step).map(|at| (columns[at], values[at])));
                    let entries = entries.map(Option::unwrap_or_default);
                    if narrow {
                        narrow_steps.push(narrow_step(entries));
                    } else {
                        wide_steps.push(WideStep::of(entries));
                    }
                }
                let to = u32::try_from(narrow_steps.len() + wide_steps.len()).expect("fewer steps than 2^32");
                let begin = to - runs[0].len() as u32;
                let mut eight = Eight { from: begin, to, rows: [0; EIGHT], count: runs.len() as u8 };
                for (lane, run) in eight.rows.iter_mut().zip(runs) {
                    *lane = (rows[run.start] as usize % PANEL) as u8;
                }
                eights.push(eight);
            }
            panels.push(eights.len() as u32);
        }
        let steps = if narrow { Steps::Narrow(Memory::copy_of(&narrow_steps)) } else { Steps::Wide(wide_steps) };
        Self { k, panels, eights, steps }
    }

    /// Elements per row of its short vectors: those of the row, for [`SparseRows::transpose`].
    pub(super) fn k(&self) -> usize {
        self.k
    }

    /// What of some panels is worth fetching ahead: their eights and the first entries.
    pub(super) fn panels_ahead(&self, panels: Range<usize>) -> [Fetch; 2] {
        let Some(eights) = self.eights_of(panels) else { return [Fetch::NONE; 2] };
        let (Some(first), Some(last)) = (eights.first(), eights.last()) else { return [Fetch::NONE; 2] };
        let steps = first.from as usize..last.to as usize;
        let steps = match &self.steps {
            Steps::Narrow(all) => Fetch::of(&all[steps]),
            Steps::Wide(all) => Fetch::of(&all[steps]),
        };
        [Fetch::of(eights), steps.up_to(FETCH_BYTES_MAX)]
    }

    /// The eights of neighbouring panels; none beyond the last panel that has any.
    fn eights_of(&self, panels: Range<usize>) -> Option<&[Eight]> {
        let from = self.panels.get(panels.start)?;
        let to = self.panels.get(panels.end).or(self.panels.last())?;
        Some(&self.eights[*from as usize..*to as usize])
    }

    /// Eights of rows of `x` (rows, k) as (k, 8). Rows beyond the last whole eight are left out.
    pub(super) fn transpose(&self, x: &[f32], tiles: &mut [f32]) {
        for (x, tile) in x.chunks_exact(EIGHT * self.k).zip(tiles.chunks_exact_mut(EIGHT * self.k)) {
            for (column, values) in tile.as_chunks_mut::<EIGHT>().0.iter_mut().enumerate() {
                for (value, row) in values.iter_mut().zip(x.chunks_exact(self.k)) {
                    *value = row[column];
                }
            }
        }
    }

    /// Adds the products with rows of `x` (rows, k) to a panel of outputs. `tiles` are the run's rows as
    /// [`SparseRows::transpose`] leaves them, unless there are none. Each sum is one chain in the order of the entries.
    ///
    /// # Safety
    /// Nobody else may use the outputs meanwhile.
    pub(super) unsafe fn add(&self, x: &[f32], tiles: &[f32], outputs: &Outputs<'_>) {
        assert!(outputs.first.is_multiple_of(PANEL) && outputs.columns <= PANEL, "the outputs are those of a panel");
        let panel_idx = outputs.first / PANEL;
        let Some(eights) = self.eights_of(panel_idx..panel_idx + 1) else { return };
        let (mut row, to) = outputs.rows;
        let first = row;
        while row < to {
            let tile = tiles.get(row * self.k..(row + EIGHT) * self.k);
            if let Some(tile) = tile.filter(|_| row.is_multiple_of(EIGHT) && row + EIGHT <= to) {
                // SAFETY: the caller's contract; every row is there once.
                let mut rows: [&mut [f32]; EIGHT] = std::array::from_fn(|at| unsafe { outputs.row(row + at) });
                match &self.steps {
                    Steps::Narrow(steps) => narrow_tile(Isa::best(), eights, (steps, self.k), tile, &mut rows),
                    Steps::Wide(steps) => wide_tile(Isa::best(), eights, (steps, self.k), tile, &mut rows),
                }
                row += EIGHT;
                continue;
            }
            let x = &x[(row - first) * self.k..][..self.k];
            // SAFETY: the caller's contract; one row at a time.
            let y = unsafe { outputs.row(row) };
            match &self.steps {
                Steps::Narrow(steps) => narrow_row(Isa::best(), eights, (steps, self.k), x, y),
                Steps::Wide(steps) => wide_row(Isa::best(), eights, (steps, self.k), x, y),
            }
            row += 1;
        }
    }
}

/// The entries of up to eight rows, the rest zeros.
fn narrow_step(entries: impl Iterator<Item = (u32, f32)>) -> [u32; EIGHT] {
    let mut step = [0; EIGHT];
    step.iter_mut().zip(entries).for_each(|(word, (column, value))| *word = column | bf16_bits(value) << 16);
    step
}

impl WideStep {
    /// The entries of up to eight rows, the rest zeros.
    fn of(entries: impl Iterator<Item = (u32, f32)>) -> Self {
        let mut step = Self::default();
        for (lane, entry) in entries.enumerate() {
            (step.columns[lane], step.values[lane]) = entry;
        }
        step
    }
}

dispatch! {
    fn narrow_row(eights: &[Eight], steps: (&[[u32; EIGHT]], usize), x: &[f32], y: &mut [f32]) => row_body
}

dispatch! {
    fn wide_row(eights: &[Eight], steps: (&[WideStep], usize), x: &[f32], y: &mut [f32]) => row_body
}

dispatch! {
    fn narrow_tile(eights: &[Eight], steps: (&[[u32; EIGHT]], usize), x: &[f32], y: &mut TileRows<'_>) => tile_body
}

dispatch! {
    fn wide_tile(eights: &[Eight], steps: (&[WideStep], usize), x: &[f32], y: &mut TileRows<'_>) => tile_body
}

/// The columns of a panel in eight rows.
type TileRows<'a> = [&'a mut [f32]; EIGHT];

/// One row x (k).
#[inline(always)]
fn row_body<const FMA: bool>(eights: &[Eight], (steps, k): (&[impl Step], usize), x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), k, "x is a row");
    for eight in eights {
        let mut sums = [0.0_f32; EIGHT];
        for step in &steps[eight.from as usize..eight.to as usize] {
            for (lane, sum) in sums.iter_mut().enumerate() {
                let (column, value) = step.entry(lane);
                // SAFETY: the columns of a matrix are below k.
                *sum = fma::<FMA>(value, unsafe { *x.get_unchecked(column) }, *sum);
            }
        }
        for (row, sum) in eight.rows.iter().zip(&sums).take(eight.count as usize) {
            y[*row as usize] += sum;
        }
    }
}

/// Eight rows as (k, 8).
#[inline(always)]
fn tile_body<const FMA: bool>(eights: &[Eight], (steps, k): (&[impl Step], usize), x: &[f32], y: &mut TileRows<'_>) {
    let (x, _) = x.as_chunks::<EIGHT>();
    assert_eq!(x.len(), k, "x are eight rows");
    for eight in eights {
        let mut sums = [[0.0_f32; EIGHT]; EIGHT];
        for step in &steps[eight.from as usize..eight.to as usize] {
            for (lane, sums) in sums.iter_mut().enumerate() {
                let (column, value) = step.entry(lane);
                // SAFETY: the columns of a matrix are below k.
                add_scaled::<FMA>(value, unsafe { x.get_unchecked(column) }, sums);
            }
        }
        for (row, sums) in eight.rows.iter().zip(&sums).take(eight.count as usize) {
            for (y, sum) in y.iter_mut().zip(sums) {
                y[*row as usize] += sum;
            }
        }
    }
}

/// `sums += value x`.
#[inline(always)]
fn add_scaled<const FMA: bool>(value: f32, x: &[f32; EIGHT], sums: &mut [f32; EIGHT]) {
    for (sum, x) in sums.iter_mut().zip(x) {
        *sum = fma::<FMA>(value, *x, *sum);
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::super::shared::Shared;
    use super::*;
    use crate::kernels::cpu::testing::random;

    proptest! {
        #[test]
        fn equals_the_formula_and_a_row_has_the_same_bits_alone(
            m in 1_usize..20, (n, k) in (1_usize..150, 1_usize..90), share in 1_u64..12, narrow: bool, seed: u64,
        ) {
            let mut draw = seed | 1;
            let mut next = || {
                draw = draw.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
                draw >> 33
            };
            // Rows with many entries, few, and none.
            let places: Vec<usize> = (0..n * k).filter(|at| next() % 12 < share * (at / k % 3) as u64 / 2).collect();
            let rows: Vec<u32> = places.iter().map(|at| (at / k) as u32).collect();
            let columns: Vec<u32> = places.iter().map(|at| (at % k) as u32).collect();
            let values = random(places.len(), seed);
            let format = if narrow { WeightFormat::Bf16 } else { WeightFormat::F32 };
            let s = SparseRows::new(format, k, &rows, (&columns, &values));
            let x = random(m * k, !seed);
            let mut tiles = vec![f32::NAN; m * k];
            s.transpose(&x, &mut tiles);
            let apply = |rows: (usize, usize), tiles: &[f32]| {
                let mut y = vec![1.0; (rows.1 - rows.0) * n];
                let out = Shared::new(&mut y);
                for first in (0..n).step_by(PANEL) {
                    let outputs = Outputs { out, offset: first, stride: n, columns: PANEL.min(n - first), first, rows };
                    // SAFETY: nobody else has the outputs.
                    unsafe { s.add(&x[rows.0 * k..rows.1 * k], tiles, &outputs) };
                }
                y
            };
            let alone = apply((0, m), &[]);
            prop_assert_eq!(&alone, &apply((0, m), &tiles));
            // Rows that begin and end within an eight.
            let some = (m / 3, m - m / 4);
            prop_assert_eq!(&alone[some.0 * n..some.1 * n], &apply(some, &tiles)[..]);
            for (at, found) in alone.iter().enumerate() {
                let (x, o) = (&x[at / n * k..][..k], at % n);
                let rounded = |value: f32| if narrow { bf16::from_f32(value).to_f32() } else { value };
                let entries = rows.iter().zip(&columns).zip(&values).filter(|((row, _), _)| **row as usize == o);
                let products = entries.map(|((_, column), value)| f64::from(x[*column as usize]) * f64::from(rounded(*value)));
                let expected = 1.0 + products.sum::<f64>();
                // f32 summation of up to 90 products in [-1, 1].
                prop_assert!((f64::from(*found) - expected).abs() < 1e-4, "{found} {expected}");
            }
        }
    }
}
