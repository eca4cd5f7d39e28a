//! The shared weight of a linear, in whichever form it is kept.

use super::ahead::Ahead;
use super::gemm::{Target, multiply_int8_panel, multiply_panel};
use super::int8::{Int8Matrix, int8_row_words, quantise_row};
use super::isa::Isa;
use super::packed::{PackedMatrix, WeightFormat};
use super::words::{row_words, write_row};

/// A linear's shared weight (n, k).
#[derive(Clone, Copy, Debug)]
pub enum BaseMatrix<'a> {
    /// In the format of what adapters add to it.
    Float(&'a PackedMatrix),
    /// In 8-bit integers.
    Int8(&'a Int8Matrix),
}

impl<'a> From<&'a PackedMatrix> for BaseMatrix<'a> {
    fn from(w: &'a PackedMatrix) -> Self {
        Self::Float(w)
    }
}

impl<'a> From<&'a Int8Matrix> for BaseMatrix<'a> {
    fn from(w: &'a Int8Matrix) -> Self {
        Self::Int8(w)
    }
}

impl BaseMatrix<'_> {
    /// Columns of the product.
    pub fn n(self) -> usize {
        match self {
            Self::Float(w) => w.n(),
            Self::Int8(w) => w.n(),
        }
    }

    /// Length of the rows multiplied with it.
    pub fn k(self) -> usize {
        match self {
            Self::Float(w) => w.k(),
            Self::Int8(w) => w.k(),
        }
    }

    /// What rows of activations are made into for it and for what adapters add.
    pub fn form(self) -> RowForm {
        match self {
            Self::Float(w) => RowForm { terms: w.format(), int8: false },
            Self::Int8(w) => RowForm { terms: w.terms(), int8: true },
        }
    }
}

/// The forms of words that rows of activations are needed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowForm {
    /// For the adapters' terms and weights, and for a shared weight that is not in integers.
    terms: WeightFormat,
    /// Whether the shared weight is in integers.
    int8: bool,
}

/// Rows of activations as words.
#[derive(Clone, Copy)]
pub(super) struct RowWords<'a> {
    /// In the terms' format, each of [`RowForm::terms_width`]; may be missing where only a base in integers reads them.
    pub(super) terms: &'a [u32],
    /// In integers, each of [`RowForm::int8_width`], for a base in integers.
    pub(super) int8: &'a [u32],
}

impl RowForm {
    /// Format of the adapters' terms.
    pub fn terms(self) -> WeightFormat {
        self.terms
    }

    /// Whether the shared weight is in integers.
    pub(super) fn is_int8(self) -> bool {
        self.int8
    }

    /// Words of a row of `k` elements in the terms' format.
    pub(super) fn terms_width(self, k: usize) -> usize {
        row_words(self.terms, k)
    }

    /// Words of a row of `k` elements in integers; none where the base is not.
    pub(super) fn int8_width(self, k: usize) -> usize {
        if self.int8 { int8_row_words(k) } else { 0 }
    }

    /// Writes one row in both forms; a form without room is left out.
    pub(super) fn write(self, row: &[f32], terms: &mut [u32], int8: &mut [u32]) {
        if !terms.is_empty() {
            write_row(Isa::best(), self.terms, row, terms);
        }
        if !int8.is_empty() {
            quantise_row(Isa::best(), row, int8);
        }
    }
}

/// Rows `from..to` of `words` times one panel of the shared weight, or of `own` where there is one.
///
/// # Safety
/// As for [`multiply_panel`].
#[expect(unsafe_code, reason = "threads write different columns of one output")]
pub(super) unsafe fn multiply(
    words: RowWords<'_>,
    (from, to): (usize, usize),
    (base, own): (BaseMatrix<'_>, Option<&PackedMatrix>),
    panel_idx: usize,
    target: Target,
    ahead: &mut Ahead,
) {
    let form = base.form();
    let (terms_width, int8_width) = (form.terms_width(base.k()), form.int8_width(base.k()));
    // SAFETY: the caller's contract; the best instruction set is available.
    unsafe {
        match (own, base) {
            (Some(w), _) | (None, BaseMatrix::Float(w)) => {
                let rows = &words.terms[from * terms_width..to * terms_width];
                multiply_panel(rows, w, panel_idx, target, Isa::best(), ahead);
            }
            (None, BaseMatrix::Int8(w)) => {
                let rows = &words.int8[from * int8_width..to * int8_width];
                multiply_int8_panel(rows, w, panel_idx, target, Isa::best(), ahead);
            }
        }
    }
}
