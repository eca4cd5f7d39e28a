//! Linears with their adapters: one sweep over the base weights, everything else while the output is in cache.
//!
//! ```text
//! y = scale ⊙ ( W pre(x) + sum_j delta_j(x) ) + c     per run of rows with one adapter
//! ```
//!
//! Linears that read the same rows are one sweep. First the rows become words and every run shrinks its rows (`h = a x`,
//! or the sums of shards); then each panel of output columns is multiplied, expanded into, scaled, shifted and finished
//! by the thread that owns it. A scale that mixes columns of several panels comes after them, with what follows it. A
//! row's bits depend on its own input and adapter only.

#![expect(unsafe_code, reason = "threads write disjoint parts of the output and of the working memory")]

use std::cell::RefCell;
use std::ops::Range;

use super::ahead::Ahead;
use super::base::{BaseMatrix, OwnMatrix, RowForm, RowWords, multiply};
use super::gemm::{Target, num_passes};
use super::isa::Isa;
use super::packed::PANEL;
use super::pool::{for_each, for_ranges};
use super::scale::scale_add;
use super::shared::Shared;
use super::shrink::{Place, ShrinkPlan, shrink};
use super::silu::silu_mul;
use super::slots::{Outputs, PackedSlots, SlotRun, apply_slots, replace_rows};
use super::tile::{Fetch, ahead_bytes, piece};
use super::vector::Columns;

/// Rows multiplied before their outputs are finished.
const CHUNK_ROWS: usize = 192;
/// Elements converted to words by one task.
const WORDS_GRAIN: usize = 1 << 15;
/// Most panels multiplied before their outputs are finished.
const PANELS_MAX: usize = 8;
/// Most of what adapters read for the panels of a piece: it waits in the second cache.
const TERMS_BYTES_MAX: usize = 128 << 10;
/// One linear of a sweep.
#[derive(Clone, Debug)]
pub struct SweepLinear<'a> {
    /// Base weight (n, k).
    pub weight: BaseMatrix<'a>,
    /// Base bias (n).
    pub bias: Option<&'a [f32]>,
    /// What the rows' adapters do; the runs tile the rows in order.
    pub runs: Vec<SlotRun<'a>>,
}

impl SweepLinear<'_> {
    /// Whether an adapter's scale mixes columns of several panels.
    pub fn needs_whole_rows(&self) -> bool {
        self.runs.iter().any(|run| run.slots.is_some_and(PackedSlots::needs_whole_rows))
    }
}

/// What becomes of the linears' outputs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Finish<'a> {
    /// They stand side by side: y (m, n_0 + n_1 + ...).
    Join,
    /// The only linear's output is added to these rows (m, n): y (m, n).
    Add(&'a [f32]),
    /// Of two linears with equal n: `y = silu(first) * second` (m, n). Not for [`SweepLinear::needs_whole_rows`].
    SiluMul,
}

/// Computes the linears of `x` (m, k) with their adapters: y, f32 row-major; see the module's formula and [`Finish`]. All
/// weights have k inputs and one form.
///
/// # Panics
/// When lengths or formats do not fit.
pub(crate) fn sweep(x: &[f32], linears: &[SweepLinear<'_>], finish: Finish<'_>) -> Vec<f32> {
    let Some(first) = linears.first() else { return Vec::new() };
    let (k, form) = (first.weight.k(), first.weight.form());
    let m = x.len() / k;
    let widths: Vec<usize> = linears.iter().map(|linear| linear.weight.n()).collect();
    let row = match finish {
        Finish::Join => widths.iter().sum(),
        Finish::Add(residual) => {
            assert!(
                linears.len() == 1 && residual.len() == m * widths[0],
                "one linear, and y is as long as the residual"
            );
            widths[0]
        }
        Finish::SiluMul => {
            assert!(widths.len() == 2 && widths[0] == widths[1], "two linears of one width");
            widths[0]
        }
    };
    assert_eq!(x.len(), m * k, "x is (m, k)");
    for linear in linears {
        check(linear, m, k, form);
        let can_finish = !matches!(finish, Finish::SiluMul) || !linear.needs_whole_rows();
        assert!(can_finish, "the panels of gated linears are finished one by one");
    }
    // Zeros first would be one more pass over the memory, by one thread.
    let mut y = Vec::with_capacity(m * row);
    let outputs = Shared::unwritten(&mut y.spare_capacity_mut()[..m * row]);
    SCRATCH.with_borrow_mut(|scratch| {
        let plan = ShrinkPlan::new(linears, m);
        // Integers suffice where no row has an adapter.
        let terms_width = if plan.has_slots || form.integers().is_none() { form.terms_width(k) } else { 0 };
        let widths = (terms_width, form.integers_width(k));
        let terms = grown(&mut scratch.terms, plan.word_rows * widths.0);
        let integers = grown(&mut scratch.integers, plan.word_rows * widths.1);
        let short = grown(&mut scratch.short, plan.short);
        let (plain_terms, own_terms) = terms.split_at_mut(m * widths.0);
        let (plain_integers, own_integers) = integers.split_at_mut(m * widths.1);
        to_words(x, k, form, widths, (plain_terms, plain_integers));
        shrink((x, plain_terms, form), k, &plan, ((own_terms, own_integers), short));
        let words = RowWords { terms, integers };
        let products = linears.iter().zip(&plan.places).map(|(linear, places)| products(linear, places)).collect();
        let sweep = Sweep { linears, finish, x, k, words, products, plan: &plan, short, row, y: outputs, m };
        sweep.run();
        sweep.finish_whole_rows();
    });
    // SAFETY: the panels of all linears, each written in every row, tile the outputs.
    unsafe { y.set_len(m * row) };
    y
}

fn check(linear: &SweepLinear<'_>, m: usize, k: usize, form: RowForm) {
    let mut next = 0;
    let fits = |w: BaseMatrix<'_>| (w.n(), w.k()) == (linear.weight.n(), k) && form.serves(w);
    assert_eq!((linear.weight.k(), linear.weight.form()), (k, form), "the weights of a sweep have one width and form");
    for run in &linear.runs {
        assert_eq!(run.rows.start, next, "the runs tile the rows in order");
        next = run.rows.end;
        assert!(own_weight(run).is_none_or(fits), "an own weight fits the linear");
    }
    assert_eq!(next, m, "the runs tile the rows");
}

/// Working memory of a thread, kept between calls.
#[derive(Default)]
struct Scratch {
    terms: Vec<u32>,
    integers: Vec<u32>,
    short: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static AHEAD: RefCell<Ahead> = RefCell::default();
    static PANELS: RefCell<Vec<f32>> = RefCell::default();
}

/// The first `len` elements of memory that grows to hold them.
fn grown<T: Clone + Default>(memory: &mut Vec<T>, len: usize) -> &mut [T] {
    if memory.len() < len {
        memory.resize(len, T::default());
    }
    &mut memory[..len]
}

/// Rows of `x` in both forms, of the given widths.
fn to_words(
    x: &[f32],
    k: usize,
    form: RowForm,
    (terms_width, integers_width): (usize, usize),
    (terms, integers): (&mut [u32], &mut [u32]),
) {
    let (terms, integers) = (Shared::new(terms), Shared::new(integers));
    for_ranges(x.len() / k, WORDS_GRAIN / k, |rows| {
        for row in rows {
            // SAFETY: every task has rows of its own.
            let (terms, integers) = unsafe {
                (
                    terms.part(row * terms_width..(row + 1) * terms_width),
                    integers.part(row * integers_width..(row + 1) * integers_width),
                )
            };
            form.write(&x[row * k..][..k], terms, integers);
        }
    });
}

/// A sweep whose rows are prepared.
struct Sweep<'a> {
    linears: &'a [SweepLinear<'a>],
    finish: Finish<'a>,
    x: &'a [f32],
    /// Elements per row of `x`.
    k: usize,
    words: RowWords<'a>,
    /// By linear.
    products: Vec<Vec<Product<'a>>>,
    plan: &'a ShrinkPlan<'a>,
    short: &'a [f32],
    /// Elements per row of `y`.
    row: usize,
    y: Shared<'a, f32>,
    m: usize,
}

/// Rows that adjoin and meet one weight, which is then read once for all of them.
struct Product<'a> {
    rows: Range<usize>,
    weight: BaseMatrix<'a>,
    /// How far the rows of words lie behind the rows.
    shift: usize,
}

/// The products of a linear, which tile its rows.
fn products<'a>(linear: &SweepLinear<'a>, places: &[Place]) -> Vec<Product<'a>> {
    let mut products: Vec<Product<'a>> = Vec::new();
    let mut last = None;
    for (run, place) in linear.runs.iter().zip(places) {
        let own = run.slots.and_then(|slots| slots.own.as_ref());
        let shift = place.word_row - run.rows.start;
        let source = (own.map(std::ptr::from_ref), shift);
        match products.last_mut() {
            Some(product) if last == Some(source) => product.rows.end = run.rows.end,
            _ => {
                let weight = own.map_or(linear.weight, OwnMatrix::matrix);
                products.push(Product { rows: run.rows.clone(), weight, shift });
            }
        }
        last = Some(source);
    }
    products
}

/// Some rows of neighbouring panels of one linear.
struct Piece<'a> {
    linear_idx: usize,
    panels: Range<usize>,
    from: usize,
    to: usize,
    /// Where the piece's outputs go.
    out: Shared<'a, f32>,
    /// First row's first column in `out`, and elements between rows.
    offset: usize,
    stride: usize,
    /// The block that is multiplied after the piece.
    after: Fetch,
}

impl Piece<'_> {
    /// Columns of a linear with `n` outputs.
    fn columns(&self, n: usize) -> usize {
        n.min(self.panels.end * PANEL) - self.panels.start * PANEL
    }
}

impl Sweep<'_> {
    fn run(&self) {
        let panels = |linear: &SweepLinear<'_>| linear.weight.n().div_ceil(PANEL);
        let count = match self.finish {
            Finish::SiluMul => panels(&self.linears[0]),
            Finish::Join | Finish::Add(_) => self.linears.iter().map(panels).sum(),
        };
        for_ranges(count, self.panels_together(), |range| {
            if let Finish::SiluMul = self.finish {
                return self.gated(range);
            }
            let (mut first, mut column) = (0, 0);
            for (linear_idx, linear) in self.linears.iter().enumerate() {
                let (from, to) = (range.start.max(first), range.end.min(first + panels(linear)));
                if from < to {
                    self.joined(linear_idx, from - first..to - first, column);
                }
                first += panels(linear);
                column += linear.weight.n();
            }
        });
    }

    /// Panels of a piece: several of few rows, so that what is done for each of the rows is done less often.
    fn panels_together(&self) -> usize {
        let read = |linear: &SweepLinear<'_>| -> usize {
            let slots = linear.runs.iter().filter_map(|run| run.slots);
            slots.flat_map(|slots| slots.ahead(0..1)).map(Fetch::bytes).sum()
        };
        let bytes = self.linears.iter().map(read).max().unwrap_or(0);
        (piece(Isa::best()) / self.m.max(1)).min(TERMS_BYTES_MAX / bytes.max(1)).clamp(1, PANELS_MAX)
    }

    /// Panels of a linear whose outputs go to `y`, from `column` of its rows on.
    fn joined(&self, linear_idx: usize, panels: Range<usize>, column: usize) {
        for from in (0..self.m).step_by(CHUNK_ROWS) {
            let to = self.m.min(from + CHUNK_ROWS);
            let offset = from * self.row + column + panels.start * PANEL;
            let after = self.block(linear_idx, if to < self.m { panels.start } else { panels.end });
            let panels = panels.clone();
            self.piece(&Piece { linear_idx, panels, from, to, out: self.y, offset, stride: self.row, after });
        }
    }

    /// Panels of both linears, and their gated product.
    fn gated(&self, panels: Range<usize>) {
        let first = panels.start * PANEL;
        let (columns, stride) = (self.row.min(panels.end * PANEL) - first, panels.len() * PANEL);
        let rows_max = CHUNK_ROWS.min(self.m);
        PANELS.with_borrow_mut(|scratch| {
            let (gates, ups) = grown(scratch, 2 * rows_max * stride).split_at_mut(rows_max * stride);
            for from in (0..self.m).step_by(CHUNK_ROWS) {
                let to = self.m.min(from + CHUNK_ROWS);
                let next = if to < self.m { panels.start } else { panels.end };
                for (linear_idx, out, after) in [(0, &mut *gates, (1, panels.start)), (1, &mut *ups, (0, next))] {
                    let (out, after, panels) = (Shared::new(out), self.block(after.0, after.1), panels.clone());
                    self.piece(&Piece { linear_idx, panels, from, to, out, offset: 0, stride, after });
                }
                for row in from..to {
                    let start = row * self.row + first;
                    // SAFETY: a panel's columns are written by its task only.
                    let y = unsafe { self.y.part(start..start + columns) };
                    let of_row = (row - from) * stride..(row - from) * stride + columns;
                    silu_mul(Isa::best(), &gates[of_row.clone()], &ups[of_row], y);
                }
            }
        });
    }

    /// The first block of a panel of a linear's shared weight.
    fn block(&self, linear_idx: usize, panel_idx: usize) -> Fetch {
        self.linears[linear_idx].weight.first_block(panel_idx)
    }

    fn piece(&self, piece: &Piece<'_>) {
        let linear = &self.linears[piece.linear_idx];
        let places = &self.plan.places[piece.linear_idx];
        AHEAD.with_borrow_mut(|ahead| {
            self.ask_ahead(linear, piece, ahead);
            piece.panels.clone().for_each(|panel_idx| self.products(linear, (piece, panel_idx), ahead));
        });
        let touched = || linear.runs.iter().zip(places).filter(|(run, _)| overlaps(&run.rows, piece));
        for (run, place) in touched() {
            let Some(slots) = run.slots else { continue };
            let short = (&self.short[place.short..], run.rows.len());
            // SAFETY: a panel's columns are written by its task only.
            unsafe { replace_rows(slots, short, &outputs(linear, &run.rows, piece)) };
        }
        // SAFETY: as above.
        unsafe { self.plan.joint.expand(piece.linear_idx, self.short, &outputs(linear, &(0..self.m), piece)) };
        for (run, place) in touched() {
            self.finish_run(linear, (run, place.short), piece);
        }
    }

    /// What adapters have for a piece comes from memory while its last products are computed.
    fn ask_ahead(&self, linear: &SweepLinear<'_>, piece: &Piece<'_>, ahead: &mut Ahead) {
        let slots = linear.runs.iter().filter(|run| overlaps(&run.rows, piece)).filter_map(|run| run.slots);
        let parts = slots.flat_map(|slots| slots.ahead(piece.panels.clone()));
        let (passes, blocks) = (num_passes(piece.to - piece.from), piece.panels.len() * linear.weight.num_blocks());
        let asking = (ahead_bytes(Isa::best()) / linear.weight.first_block(0).bytes().max(1)).max(1);
        ahead.start(parts, passes * asking, passes * blocks);
    }

    /// The dense products of a piece in one of its panels.
    fn products(&self, linear: &SweepLinear<'_>, (piece, panel_idx): (&Piece<'_>, usize), ahead: &mut Ahead) {
        let products = &self.products[piece.linear_idx];
        let mut products = products.iter().filter(|product| overlaps(&product.rows, piece)).peekable();
        while let Some(product) = products.next() {
            ahead.block = match products.peek() {
                Some(next) => next.weight.first_block(panel_idx),
                None if panel_idx + 1 < piece.panels.end => linear.weight.first_block(panel_idx + 1),
                None => piece.after,
            };
            let (from, to) = (product.rows.start.max(piece.from), product.rows.end.min(piece.to));
            let column = (panel_idx - piece.panels.start) * PANEL;
            let target = piece.offset + (from - piece.from) * piece.stride + column;
            let columns = PANEL.min(linear.weight.n() - panel_idx * PANEL);
            assert!(
                target + (to - from - 1) * piece.stride + columns <= piece.out.len(),
                "the piece lies in its output"
            );
            let target = Target { y: piece.out.at(target), stride: piece.stride };
            let words = (self.words, linear.weight.form());
            let rows = (from + product.shift, to + product.shift);
            // SAFETY: in bounds by the assertion; a panel's columns are written by its task only.
            unsafe { multiply(words, rows, product.weight, panel_idx, target, ahead) };
        }
    }

    /// Everything one run needs in its rows of a piece, once the dense product is there.
    fn finish_run(&self, linear: &SweepLinear<'_>, (run, start): (&SlotRun<'_>, usize), piece: &Piece<'_>) {
        let (from, to) = (run.rows.start.max(piece.from), run.rows.end.min(piece.to));
        let outputs = outputs(linear, &run.rows, piece);
        if let Some(slots) = run.slots {
            let x = &self.x[from * self.k..to * self.k];
            // SAFETY: a panel's columns are written by its task only.
            unsafe { apply_slots(slots, x, (&self.short[start..], run.rows.len()), &outputs) };
        }
        if run.slots.is_some_and(PackedSlots::needs_whole_rows) {
            return;
        }
        for row in from..to {
            // SAFETY: as above, one row at a time.
            let y = unsafe { outputs.row(row - run.rows.start) };
            self.finish_row(linear, run.slots, (row, outputs.first), y);
        }
    }

    /// Scales the columns of a row from `first` on, and adds what is added last.
    fn finish_row(
        &self,
        linear: &SweepLinear<'_>,
        slots: Option<&PackedSlots>,
        (row, first): (usize, usize),
        y: &mut [f32],
    ) {
        let scale = slots.and_then(|slots| slots.scale.as_ref()).map_or(Columns::NONE, |scale| {
            scale.mix(first, y);
            scale.factors(first)
        });
        let c = slots.and_then(|slots| slots.c.as_ref()).map_or(Columns::NONE, |c| c.columns(first));
        let bias = linear.bias.map_or(&[][..], |bias| &bias[first..]);
        let residual = match self.finish {
            Finish::Add(residual) => &residual[row * self.row + first..][..y.len()],
            Finish::Join | Finish::SiluMul => &[],
        };
        scale_add(Isa::best(), scale, c, bias, residual, y);
    }

    /// Once all panels are there: the rows whose scale mixes columns of several.
    fn finish_whole_rows(&self) {
        let mut column = 0;
        for linear in self.linears {
            let columns = column..column + linear.weight.n();
            column = columns.end;
            for run in &linear.runs {
                let Some(slots) = run.slots.filter(|slots| slots.needs_whole_rows()) else { continue };
                for_each(run.rows.len(), |idx| {
                    let row = run.rows.start + idx;
                    // SAFETY: every task has a row of its own, and the panels are done.
                    let y = unsafe { self.y.part(row * self.row + columns.start..row * self.row + columns.end) };
                    self.finish_row(linear, Some(slots), (row, 0), y);
                });
            }
        }
    }
}

/// Those of `rows` that a piece has, counted from their first.
fn outputs<'a>(linear: &SweepLinear<'_>, rows: &Range<usize>, piece: &Piece<'a>) -> Outputs<'a> {
    let (from, to) = (rows.start.max(piece.from), rows.end.min(piece.to));
    Outputs {
        out: piece.out,
        offset: piece.offset + (from - piece.from) * piece.stride,
        stride: piece.stride,
        columns: piece.columns(linear.weight.n()),
        first: piece.panels.start * PANEL,
        rows: (from - rows.start, to - rows.start),
    }
}

/// The weight that a run has in the place of the shared one.
fn own_weight<'a>(run: &SlotRun<'a>) -> Option<BaseMatrix<'a>> {
    run.slots.and_then(|slots| slots.own.as_ref()).map(OwnMatrix::matrix)
}

fn overlaps(rows: &Range<usize>, piece: &Piece<'_>) -> bool {
    rows.start < piece.to && rows.end > piece.from
}

#[cfg(test)]
mod plain;
#[cfg(test)]
mod tests;
