//! Weight matrices laid out once for the matrix product.
//!
//! Columns of the product (rows of the weight) are grouped into panels of [`PANEL`]. Inside a panel the weights of one
//! step of `k` adjoin, so the kernel reads memory strictly forward:
//!
//! - bf16: `[n / 64][k / 2][64][2]`, two neighbouring `k` share a 32-bit word, the lower `k` in the lower half
//! - f32: `[n / 64][k][64]`
//!
//! Missing columns of the last panel and the missing half of an odd `k` are zeros.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::memory::Memory;
use super::tile::Fetch;
use super::words::{LANES, bf16_bits};

/// Columns per panel.
pub(super) const PANEL: usize = 64;

/// Number format of a packed weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WeightFormat {
    /// bfloat16; the product rounds the activations to bfloat16 too and accumulates in f32.
    Bf16,
    /// f32 throughout.
    F32,
}

/// Most of a term that is fetched ahead.
pub(super) const FETCH_BYTES_MAX: usize = 8 << 10;

/// A weight matrix (n, k) in panels, immutable once packed.
pub struct PackedMatrix {
    words: Memory<u32>,
    format: WeightFormat,
    n: usize,
    k: usize,
}

/// One cache line of words.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u32; 16]);

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix({:?}, n = {}, k = {})", self.format, self.n, self.k)
    }
}

impl PackedMatrix {
    /// Packs a row-major (n, k) bf16 matrix; `row(i)` gives its i-th row.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn from_bf16<'a>(n: usize, k: usize, row: impl Fn(usize) -> &'a [bf16] + Sync) -> std::io::Result<Self> {
        Self::pack(WeightFormat::Bf16, n, k, |column, from, words| {
            for (word, pair) in words.iter_mut().zip(row(column)[2 * from..].chunks(2)) {
                let high = pair.get(1).map_or(0, |v| u32::from(v.to_bits()));
                *word = u32::from(pair[0].to_bits()) | high << 16;
            }
        })
    }

    /// Packs a row-major (n, k) bf16 matrix given as bytes, the lower first; they need no alignment.
    ///
    /// # Errors
    /// When the memory cannot be had.
    ///
    /// # Panics
    /// When there are not two bytes for every element.
    pub fn from_bf16_bytes(n: usize, k: usize, bytes: &[u8]) -> std::io::Result<Self> {
        assert_eq!(bytes.len(), 2 * n * k, "the matrix is (n, k)");
        Self::pack(WeightFormat::Bf16, n, k, |column, from, words| {
            let (pairs, last) = bytes[2 * column * k..][..2 * k].as_chunks::<4>();
            for (idx, word) in words.iter_mut().enumerate() {
                *word = match (pairs.get(from + idx), last) {
                    (Some(pair), _) => u32::from_le_bytes(*pair),
                    (None, [low, high]) => u32::from(u16::from_le_bytes([*low, *high])),
                    (None, _) => unreachable!("a row has its elements"),
                };
            }
        })
    }

    /// Packs a row-major (n, k) f32 matrix rounded to bf16; `row(i)` gives its i-th row.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn rounded<'a>(n: usize, k: usize, row: impl Fn(usize) -> &'a [f32] + Sync) -> std::io::Result<Self> {
        Self::pack(WeightFormat::Bf16, n, k, |column, from, words| {
            for (word, pair) in words.iter_mut().zip(row(column)[2 * from..].chunks(2)) {
                *word = bf16_bits(pair[0]) | pair.get(1).map_or(0, |v| bf16_bits(*v)) << 16;
            }
        })
    }

    /// Packs a row-major (n, k) f32 matrix; `row(i)` gives its i-th row.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn from_f32<'a>(n: usize, k: usize, row: impl Fn(usize) -> &'a [f32] + Sync) -> std::io::Result<Self> {
        Self::pack(WeightFormat::F32, n, k, |column, from, words| {
            words.iter_mut().zip(&row(column)[from..]).for_each(|(word, value)| *word = value.to_bits());
        })
    }

    /// Packs what `read(column, from, words)` gives: the words of a column from step `from` on.
    fn pack(
        format: WeightFormat,
        n: usize,
        k: usize,
        read: impl Fn(usize, usize, &mut [u32]) + Sync,
    ) -> std::io::Result<Self> {
        assert!(n > 0 && k > 0, "a matrix has rows and columns");
        let panel_words = format.steps(k) * PANEL;
        let mut words = Memory::<u32>::zeros(n.div_ceil(PANEL) * panel_words)?;
        words.par_chunks_mut(panel_words).enumerate().for_each(|(panel_idx, panel)| {
            // A few steps of all columns at a time stay in the nearest cache.
            for (part_idx, part) in panel.chunks_mut(LANES * PANEL).enumerate() {
                let mut line = [0; LANES];
                let line = &mut line[..part.len() / PANEL];
                for lane in 0..PANEL.min(n - panel_idx * PANEL) {
                    read(panel_idx * PANEL + lane, part_idx * LANES, line);
                    part[lane..].iter_mut().step_by(PANEL).zip(&*line).for_each(|(place, word)| *place = *word);
                }
            }
        });
        Ok(Self { words, format, n, k })
    }

    /// Columns of the product.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Length of the rows multiplied with it.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Number format.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// The matrix in row-major order (n, k), exact.
    pub fn unpack(&self) -> Vec<f32> {
        let mut w = vec![0.0; self.n * self.k];
        w.par_chunks_mut(self.k).enumerate().for_each(|(column, row)| self.read_row(column, row));
        w
    }

    /// Reads one row of the (n, k) matrix into `row` (k), exact.
    ///
    /// # Panics
    /// When `column` is not below n or `row` is not of length k.
    pub fn read_row(&self, column: usize, row: &mut [f32]) {
        assert!(column < self.n && row.len() == self.k, "row {column} of {self:?} into {} values", row.len());
        let panel = self.panel(column / PANEL);
        for (idx, value) in row.iter_mut().enumerate() {
            *value = match self.format {
                WeightFormat::F32 => f32::from_bits(panel[idx * PANEL + column % PANEL]),
                WeightFormat::Bf16 => {
                    let word = panel[idx / 2 * PANEL + column % PANEL];
                    f32::from_bits(if idx % 2 == 0 { word << 16 } else { word & 0xffff_0000 })
                }
            };
        }
    }

    /// What of some panels is worth fetching ahead; nothing of those that do not exist.
    pub(super) fn panels_ahead(&self, panels: Range<usize>) -> Fetch {
        let panels = panels.start..panels.end.min(self.n.div_ceil(PANEL));
        if panels.is_empty() { Fetch::NONE } else { Fetch::of(self.panels(panels)).up_to(FETCH_BYTES_MAX) }
    }

    /// The words of neighbouring panels.
    pub(super) fn panels(&self, panels: Range<usize>) -> &[u32] {
        let panel_words = self.format.steps(self.k) * PANEL;
        &self.words[panels.start * panel_words..panels.end * panel_words]
    }

    /// The words of one panel, `[steps][PANEL]`.
    pub(super) fn panel(&self, panel_idx: usize) -> &[u32] {
        self.panels(panel_idx..panel_idx + 1)
    }
}

impl WeightFormat {
    /// 32-bit words along `k`.
    pub(super) fn steps(self, k: usize) -> usize {
        match self {
            Self::Bf16 => k.div_ceil(2),
            Self::F32 => k,
        }
    }
}
