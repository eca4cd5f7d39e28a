//! What an adapter does to one linear, and its part in some panels of outputs.

#![expect(unsafe_code, reason = "threads write disjoint parts of the outputs")]

use std::ops::Range;

use super::base::OwnMatrix;
use super::block_product::BlockProduct;
use super::circulant::Circulant;
use super::expand::expand_rows;
use super::gemm::Target;
use super::joint::JointLowRank;
use super::packed::{PANEL, PackedMatrix};
use super::pre::PackedPre;
use super::route::Router;
use super::rows::RowMatrix;
use super::scale::PackedScale;
use super::shared::Shared;
use super::sparse::SparseRows;
use super::spectral::SpectralRows;
use super::tile::Fetch;
use super::vector::PackedVector;

/// What an adapter does to one linear, in the CPU's form. All matrices but its own weight have the format of terms over the
/// base weight ([`RowForm::terms`](super::RowForm::terms)).
#[derive(Debug, Default)]
pub struct PackedSlots {
    /// Transform of the rows of `x` before they meet the weight.
    pub pre: Option<PackedPre>,
    /// Weight of the adapter's own (n, k).
    pub own: Option<OwnMatrix>,
    /// Rows (r, k) that take the place of the weight's, and their indexes in ascending order.
    pub rows: Option<(Vec<u32>, RowMatrix)>,
    /// Additive terms.
    pub deltas: Vec<PackedDelta>,
    /// Output scale.
    pub scale: Option<PackedScale>,
    /// Vector added last (n); `None` is the base bias.
    pub c: Option<PackedVector>,
}

/// An additive term in the CPU's form.
#[derive(Debug)]
pub enum PackedDelta {
    /// `b (a x)`, a: (r, k), b: (n, r).
    LowRank {
        /// Down projection.
        a: RowMatrix,
        /// Up projection.
        b: PackedMatrix,
    },
    /// `y[i * q + j] += sum_s m[s, j] * sum_c x[c * r + s]`; `m` is packed as a (q, r) matrix.
    ShardSum {
        /// Block matrix, transposed.
        m: PackedMatrix,
    },
    /// As `LowRank`, where a and b hold the equal factors of several experts one after the other, and every row's `a x` is
    /// weighed expert by expert.
    Routed {
        /// Down projections (experts r, k).
        a: RowMatrix,
        /// Up projections (n, experts r).
        b: PackedMatrix,
        /// Weighs the experts. It reads the row itself, which no format has rounded.
        router: Router,
    },
    /// As `LowRank`, where every number of `a x` is weighed by one of the gates that the row brings.
    Gated {
        /// Down projection.
        a: RowMatrix,
        /// Up projection.
        b: PackedMatrix,
        /// Which of a row's gates goes with each number (r).
        places: Vec<u32>,
    },
    /// `S x`, S: (n, k). It reads the row itself, which no format has rounded.
    Sparse(SparseRows),
    /// `C x`, C: (n, k) in f32. It reads the row itself too.
    Circulant(Circulant),
    /// Products of blocks, mixed.
    BlockProduct(BlockProduct),
    /// `S x`, S: (n, k) sparse in a basis, in f32. It reads the row itself too.
    Spectral(SpectralRows),
    /// A low-rank term whose matrices other adapters share. It comes before the other terms.
    Joint(JointLowRank),
}

/// Consecutive rows of `x` with one adapter.
#[derive(Clone, Debug)]
pub struct SlotRun<'a> {
    /// The rows.
    pub rows: Range<usize>,
    /// The adapter's slots; `None` is the bare base.
    pub slots: Option<&'a PackedSlots>,
    /// The rows' gates, where terms of the slots are weighed by them.
    pub gates: Option<RowGates<'a>>,
}

/// Gates of consecutive rows.
#[derive(Clone, Copy, Debug)]
pub struct RowGates<'a> {
    /// Row-major, (rows, width).
    pub values: &'a [f32],
    /// Gates of a row.
    pub width: usize,
}

impl SlotRun<'_> {
    /// Rows of the bare base.
    pub fn bare(rows: Range<usize>) -> Self {
        Self { rows, slots: None, gates: None }
    }
}

/// Elements per row of a run's short vectors: those of the terms in order, then the outputs of the replaced rows.
pub(super) fn short_len(slots: &PackedSlots) -> usize {
    let terms: usize = slots.deltas.iter().map(PackedDelta::short_len).sum();
    terms + slots.rows.as_ref().map_or(0, |(indexes, _)| indexes.len())
}

impl PackedSlots {
    /// Whether columns depend on one another across panels, so that they are scaled once the whole row is there.
    pub(super) fn needs_whole_rows(&self) -> bool {
        self.scale.as_ref().is_some_and(PackedScale::needs_whole_rows)
    }

    /// What it reads for panels of outputs that is worth fetching ahead.
    pub(super) fn ahead(&self, panels: Range<usize>) -> impl Iterator<Item = Fetch> {
        let columns = panels.start * PANEL..panels.end * PANEL;
        let scale = self.scale.as_ref().map_or([Fetch::NONE; 2], |scale| scale.ahead(columns.clone()));
        let c = self.c.as_ref().map_or(Fetch::NONE, |c| c.ahead(columns));
        self.deltas.iter().flat_map(move |delta| delta.ahead(panels.clone())).chain(scale).chain([c])
    }

    /// Whether a row is so much work before the sweep that it is a task by itself.
    pub(super) fn computes_by_row(&self) -> bool {
        self.deltas.iter().any(|delta| match delta {
            PackedDelta::Circulant(_) | PackedDelta::Spectral(_) => true,
            PackedDelta::BlockProduct(product) => product.computes_by_row(),
            _ => false,
        })
    }
}

impl PackedDelta {
    /// The up projection; terms that are not a product of two matrices of their own have none.
    pub(super) fn up(&self) -> Option<&PackedMatrix> {
        match self {
            Self::LowRank { b, .. } | Self::Routed { b, .. } | Self::Gated { b, .. } => Some(b),
            Self::ShardSum { m } => Some(m),
            Self::BlockProduct(product) => product.up(),
            Self::Sparse(_) | Self::Circulant(_) | Self::Spectral(_) | Self::Joint(_) => None,
        }
    }

    /// What it reads for panels of outputs that is worth fetching ahead.
    fn ahead(&self, panels: Range<usize>) -> [Fetch; 2] {
        match self {
            Self::Sparse(s) => s.panels_ahead(panels),
            other => [other.up().map_or(Fetch::NONE, |up| up.panels_ahead(panels)), Fetch::NONE],
        }
    }

    /// Elements per row of its short vectors: a sparse term has its inputs there, circulant and spectral ones their outputs;
    /// a joint one has none here.
    pub(super) fn short_len(&self) -> usize {
        match self {
            Self::LowRank { b: up, .. }
            | Self::Routed { b: up, .. }
            | Self::Gated { b: up, .. }
            | Self::ShardSum { m: up } => up.k(),
            Self::Sparse(s) => s.k(),
            Self::Circulant(c) => c.num_outputs(),
            Self::BlockProduct(product) => product.short_len(),
            Self::Spectral(s) => s.num_outputs(),
            Self::Joint(_) => 0,
        }
    }
}

/// Some neighbouring rows of a run in neighbouring panels of outputs.
#[derive(Clone, Copy)]
pub(super) struct Outputs<'a> {
    /// Where the outputs lie.
    pub(super) out: Shared<'a, f32>,
    /// First row's first column in `out`.
    pub(super) offset: usize,
    /// Elements between rows.
    pub(super) stride: usize,
    /// Number of columns.
    pub(super) columns: usize,
    /// The first column within the linear.
    pub(super) first: usize,
    /// The rows, counted from the run's first.
    pub(super) rows: (usize, usize),
}

impl Outputs<'_> {
    /// The columns of row `row`.
    ///
    /// # Safety
    /// Nobody else may use them while the result lives.
    #[expect(clippy::mut_from_ref, reason = "the caller keeps rows disjoint")]
    pub(super) unsafe fn row(&self, row: usize) -> &mut [f32] {
        let from = self.offset + (row - self.rows.0) * self.stride;
        // SAFETY: the caller's contract.
        unsafe { self.out.part(from..from + self.columns) }
    }

    /// Panel by panel.
    pub(super) fn panels(&self) -> impl Iterator<Item = Self> {
        (0..self.columns).step_by(PANEL).map(|from| Self {
            offset: self.offset + from,
            columns: PANEL.min(self.columns - from),
            first: self.first + from,
            ..*self
        })
    }

    /// Where the columns of row `row` and of those after it lie.
    ///
    /// # Panics
    /// When they do not lie in the output.
    pub(super) fn target(&self, row: usize) -> Target {
        let last = self.offset + (self.rows.1 - 1 - self.rows.0) * self.stride;
        assert!(row < self.rows.1 && last + self.columns <= self.out.len(), "the rows lie in the output");
        Target { y: self.out.at(self.offset + (row - self.rows.0) * self.stride), stride: self.stride }
    }
}

/// Replaced rows of the weight. `short` are the run's short vectors, of `run_rows` rows.
///
/// # Safety
/// Nobody else may use the outputs meanwhile.
pub(super) unsafe fn replace_rows(slots: &PackedSlots, (short, run_rows): (&[f32], usize), outputs: &Outputs<'_>) {
    let Some((indexes, _)) = &slots.rows else { return };
    let before = slots.deltas.iter().map(PackedDelta::short_len).sum::<usize>() * run_rows;
    let begin = indexes.partition_point(|index| (*index as usize) < outputs.first);
    for row in outputs.rows.0..outputs.rows.1 {
        let replaced = &short[before + row * indexes.len()..][..indexes.len()];
        // SAFETY: the caller's contract; one row at a time.
        let y = unsafe { outputs.row(row) };
        for (index, value) in indexes.iter().zip(replaced).skip(begin) {
            let Some(y) = y.get_mut(*index as usize - outputs.first) else { break };
            *y = *value;
        }
    }
}

/// Terms, but for joint ones. `x` are the rows' inputs (rows, k); `short` the run's short vectors, of `run_rows` rows.
///
/// # Safety
/// Nobody else may use the outputs meanwhile.
pub(super) unsafe fn apply_slots(
    slots: &PackedSlots,
    x: &[f32],
    (short, run_rows): (&[f32], usize),
    outputs: &Outputs<'_>,
) {
    let (from, to) = outputs.rows;
    let mut start = 0;
    for delta in &slots.deltas {
        let r = delta.short_len();
        let h = &short[start + from * r..start + to * r];
        start += run_rows * r;
        match delta {
            PackedDelta::LowRank { b: up, .. }
            | PackedDelta::Routed { b: up, .. }
            | PackedDelta::Gated { b: up, .. }
            | PackedDelta::ShardSum { m: up } => {
                // SAFETY: the caller's contract.
                unsafe { expand_rows(h, up, outputs) };
            }
            // SAFETY: the caller's contract.
            PackedDelta::Circulant(_) | PackedDelta::Spectral(_) => unsafe { add_outputs(h, r, outputs) },
            // SAFETY: the caller's contract.
            PackedDelta::BlockProduct(product) => outputs.panels().for_each(|panel| unsafe { product.add(h, &panel) }),
            PackedDelta::Joint(_) => {}
            PackedDelta::Sparse(s) => {
                // Rows are in eights unless they were prepared one by one.
                let run = if slots.computes_by_row() { &[] } else { &short[start - run_rows * r..start] };
                // SAFETY: the caller's contract.
                outputs.panels().for_each(|panel| unsafe { s.add(x, run, &panel) });
            }
        }
    }
}

/// Adds what was computed of every row before the sweep, (rows, n).
///
/// # Safety
/// Nobody else may use the outputs meanwhile.
pub(super) unsafe fn add_outputs(h: &[f32], n: usize, outputs: &Outputs<'_>) {
    for (row, h) in (outputs.rows.0..outputs.rows.1).zip(h.chunks_exact(n)) {
        // SAFETY: the caller's contract; one row at a time.
        let y = unsafe { outputs.row(row) };
        y.iter_mut().zip(&h[outputs.first..]).for_each(|(y, h)| *y += h);
    }
}
