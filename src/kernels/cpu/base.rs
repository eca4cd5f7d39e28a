//! The shared weight of a linear, in whichever form it is kept.

use super::ahead::Ahead;
use super::gemm::{Target, multiply_integer_panel, multiply_panel};
use super::integers::{IntegerMatrix, IntegerWidth, groups, quantise_row};
use super::isa::Isa;
use super::packed::{PANEL, PackedMatrix, WeightFormat};
use super::tile::{Fetch, block_steps};
use super::tile_integers::block_groups;
use super::words::{row_words, write_row};

/// A linear's shared weight (n, k).
#[derive(Clone, Copy, Debug)]
pub enum BaseMatrix<'a> {
    /// In the format of what adapters add to it.
    Float(&'a PackedMatrix),
    /// In integers.
    Integers(&'a IntegerMatrix),
}

impl<'a> From<&'a PackedMatrix> for BaseMatrix<'a> {
    fn from(w: &'a PackedMatrix) -> Self {
        Self::Float(w)
    }
}

impl<'a> From<&'a IntegerMatrix> for BaseMatrix<'a> {
    fn from(w: &'a IntegerMatrix) -> Self {
        Self::Integers(w)
    }
}

impl BaseMatrix<'_> {
    /// Columns of the product.
    pub fn n(self) -> usize {
        match self {
            Self::Float(w) => w.n(),
            Self::Integers(w) => w.n(),
        }
    }

    /// Length of the rows multiplied with it.
    pub fn k(self) -> usize {
        match self {
            Self::Float(w) => w.k(),
            Self::Integers(w) => w.k(),
        }
    }

    /// The first block of a panel, to be fetched; nothing where there is no such panel.
    pub(super) fn first_block(self, panel_idx: usize) -> Fetch {
        if panel_idx >= self.n().div_ceil(PANEL) {
            return Fetch::NONE;
        }
        let (panel, words) = match self {
            Self::Float(w) => (w.panel(panel_idx), block_steps(Isa::best()) * PANEL),
            Self::Integers(w) => (w.panel(panel_idx), block_groups(Isa::best(), w.width()) * w.width().group_words()),
        };
        Fetch::of(&panel[..words.min(panel.len())])
    }

    /// Blocks of a panel.
    pub(super) fn num_blocks(self) -> usize {
        match self {
            Self::Float(w) => w.format().steps(w.k()).div_ceil(block_steps(Isa::best())),
            Self::Integers(w) => groups(w.k()).div_ceil(block_groups(Isa::best(), w.width())),
        }
    }

    /// What rows of activations are made into for it and for what adapters add.
    pub fn form(self) -> RowForm {
        match self {
            Self::Float(w) => RowForm { terms: w.format(), integers: None },
            Self::Integers(w) => RowForm { terms: w.terms(), integers: Some(w.width()) },
        }
    }
}

/// An adapter's weight in the place of the shared one (n, k).
#[derive(Debug)]
pub enum OwnMatrix {
    /// In the format of an adapter's terms.
    Float(PackedMatrix),
    /// In the integers of the shared one.
    Integers(IntegerMatrix),
}

impl OwnMatrix {
    /// The weight as the kernels take it.
    pub(super) fn matrix(&self) -> BaseMatrix<'_> {
        match self {
            Self::Float(w) => BaseMatrix::Float(w),
            Self::Integers(w) => BaseMatrix::Integers(w),
        }
    }
}

/// The forms of words that rows of activations are needed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowForm {
    /// For the adapters' terms and weights, and for a shared weight that is not in integers.
    terms: WeightFormat,
    /// For a shared weight in integers.
    integers: Option<IntegerWidth>,
}

/// Rows of activations as words.
#[derive(Clone, Copy)]
pub(super) struct RowWords<'a> {
    /// In the terms' format, each of [`RowForm::terms_width`]; may be missing where only a base in integers reads them.
    pub(super) terms: &'a [u32],
    /// In integers, each of [`RowForm::integers_width`], for a base in integers.
    pub(super) integers: &'a [u32],
}

impl RowForm {
    /// Format of the adapters' terms.
    pub fn terms(self) -> WeightFormat {
        self.terms
    }

    /// The integers of the shared weight.
    pub fn integers(self) -> Option<IntegerWidth> {
        self.integers
    }

    /// Whether the rows' words serve a weight.
    pub(super) fn serves(self, weight: BaseMatrix<'_>) -> bool {
        match weight {
            BaseMatrix::Float(w) => w.format() == self.terms,
            BaseMatrix::Integers(w) => Some(w.width()) == self.integers,
        }
    }

    /// Words of a row of `k` elements in the terms' format.
    pub(super) fn terms_width(self, k: usize) -> usize {
        row_words(self.terms, k)
    }

    /// Words of a row of `k` elements in integers; none where the base is not.
    pub(super) fn integers_width(self, k: usize) -> usize {
        self.integers.map_or(0, |width| width.row_words(k))
    }

    /// Writes one row in both forms; terms without room are left out.
    pub(super) fn write(self, row: &[f32], terms: &mut [u32], integers: &mut [u32]) {
        if !terms.is_empty() {
            write_row(Isa::best(), self.terms, row, terms);
        }
        if let Some(width) = self.integers {
            quantise_row(Isa::best(), width, row, integers);
        }
    }
}

/// Rows `from..to` of `words` in `form` times one panel of a weight.
///
/// # Safety
/// As for [`multiply_panel`].
#[expect(unsafe_code, reason = "threads write different columns of one output")]
pub(super) unsafe fn multiply(
    (words, form): (RowWords<'_>, RowForm),
    (from, to): (usize, usize),
    weight: BaseMatrix<'_>,
    panel_idx: usize,
    target: Target,
    ahead: &mut Ahead,
) {
    // SAFETY: the caller's contract; the best instruction set is available.
    unsafe {
        match weight {
            BaseMatrix::Float(w) => {
                let width = form.terms_width(w.k());
                multiply_panel(&words.terms[from * width..to * width], w, panel_idx, target, Isa::best(), ahead);
            }
            BaseMatrix::Integers(w) => {
                let width = form.integers_width(w.k());
                multiply_integer_panel(
                    &words.integers[from * width..to * width],
                    w,
                    panel_idx,
                    target,
                    Isa::best(),
                    ahead,
                );
            }
        }
    }
}
