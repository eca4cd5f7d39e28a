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
use super::gemm::{Target, num_tiles};
use super::isa::Isa;
use super::packed::PANEL;
use super::pool::{for_each, for_ranges, num_threads};
use super::scale::{PackedScale, scale_add};
use super::shared::Shared;
use super::shrink::{Place, ShrinkPlan, shrink};
use super::silu::silu_mul;
use super::slots::{Outputs, PackedSlots, SlotRun, apply_slots, replace_rows};

/// Rows multiplied before their outputs are finished.
const CHUNK_ROWS: usize = 192;
/// Elements converted to words by one task.
const WORDS_GRAIN: usize = 1 << 15;
/// Tasks per thread that a sweep's panels are dealt out in.
const TASKS_PER_THREAD: usize = 8;

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

/// Computes the linears of `x` (m, k) with their adapters into `y`, all f32 row-major; see the module's formula and
/// [`Finish`]. All weights have k inputs and one form.
///
/// # Panics
/// When lengths or formats do not fit.
pub(crate) fn sweep(x: &[f32], linears: &[SweepLinear<'_>], finish: Finish<'_>, y: &mut [f32]) {
    let Some(first) = linears.first() else { return };
    let (k, form) = (first.weight.k(), first.weight.form());
    let m = x.len() / k;
    let widths: Vec<usize> = linears.iter().map(|linear| linear.weight.n()).collect();
    let row = match finish {
        Finish::Join => widths.iter().sum(),
        Finish::Add(residual) => {
            assert!(linears.len() == 1 && residual.len() == y.len(), "one linear, and y is as long as the residual");
            widths[0]
        }
        Finish::SiluMul => {
            assert!(widths.len() == 2 && widths[0] == widths[1], "two linears of one width");
            widths[0]
        }
    };
    assert_eq!((x.len(), y.len()), (m * k, m * row), "x is (m, k) and y is (m, n)");
    for linear in linears {
        check(linear, m, k, form);
        let can_finish = !matches!(finish, Finish::SiluMul) || !linear.needs_whole_rows();
        assert!(can_finish, "the panels of gated linears are finished one by one");
    }
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
        let sweep = Sweep { linears, finish, x, k, words, plan: &plan, short, row, y: Shared::new(y), m };
        sweep.run();
        sweep.finish_whole_rows();
    });
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
    plan: &'a ShrinkPlan<'a>,
    short: &'a [f32],
    /// Elements per row of `y`.
    row: usize,
    y: Shared<'a, f32>,
    m: usize,
}

/// Some rows of one panel of one linear.
#[derive(Clone, Copy)]
struct Piece<'a> {
    linear_idx: usize,
    panel_idx: usize,
    from: usize,
    to: usize,
    /// Where the piece's outputs go.
    out: Shared<'a, f32>,
    /// First row's first column in `out`, and elements between rows.
    offset: usize,
    stride: usize,
}

impl Sweep<'_> {
    fn run(&self) {
        let panels = |linear: &SweepLinear<'_>| linear.weight.n().div_ceil(PANEL);
        let count = match self.finish {
            Finish::SiluMul => panels(&self.linears[0]),
            Finish::Join | Finish::Add(_) => self.linears.iter().map(panels).sum(),
        };
        // Neighbouring panels go to one thread, so that it reads memory in a forward sweep.
        for_ranges(count, count / (num_threads() * TASKS_PER_THREAD), |range| {
            for mut panel_idx in range {
                if let Finish::SiluMul = self.finish {
                    self.gated(panel_idx);
                    continue;
                }
                let (mut linear_idx, mut column) = (0, 0);
                while panel_idx >= panels(&self.linears[linear_idx]) {
                    panel_idx -= panels(&self.linears[linear_idx]);
                    column += self.linears[linear_idx].weight.n();
                    linear_idx += 1;
                }
                let column = column + panel_idx * PANEL;
                for from in (0..self.m).step_by(CHUNK_ROWS) {
                    let to = self.m.min(from + CHUNK_ROWS);
                    let offset = from * self.row + column;
                    self.piece(Piece { linear_idx, panel_idx, from, to, out: self.y, offset, stride: self.row });
                }
            }
        });
    }

    /// One panel of both linears, and their gated product.
    fn gated(&self, panel_idx: usize) {
        let columns = PANEL.min(self.row - panel_idx * PANEL);
        PANELS.with_borrow_mut(|scratch| {
            let scratch = grown(scratch, 2 * CHUNK_ROWS * PANEL);
            for from in (0..self.m).step_by(CHUNK_ROWS) {
                let to = self.m.min(from + CHUNK_ROWS);
                for linear_idx in 0..2 {
                    let out = Shared::new(&mut scratch[linear_idx * CHUNK_ROWS * PANEL..][..CHUNK_ROWS * PANEL]);
                    self.piece(Piece { linear_idx, panel_idx, from, to, out, offset: 0, stride: PANEL });
                }
                let (gates, ups) = scratch.split_at(CHUNK_ROWS * PANEL);
                for row in from..to {
                    let start = row * self.row + panel_idx * PANEL;
                    // SAFETY: a panel's columns are written by its task only.
                    let y = unsafe { self.y.part(start..start + columns) };
                    let of_row = (row - from) * PANEL..(row - from) * PANEL + columns;
                    silu_mul(Isa::best(), &gates[of_row.clone()], &ups[of_row], y);
                }
            }
        });
    }

    fn piece(&self, piece: Piece<'_>) {
        let linear = &self.linears[piece.linear_idx];
        let places = &self.plan.places[piece.linear_idx];
        AHEAD.with_borrow_mut(|ahead| self.product(linear, places, &piece, ahead));
        let touched = || linear.runs.iter().zip(places).filter(|(run, _)| overlaps(&run.rows, &piece));
        for (run, place) in touched() {
            let Some(slots) = run.slots else { continue };
            let short = (&self.short[place.short..], run.rows.len());
            // SAFETY: a panel's columns are written by its task only.
            unsafe { replace_rows(slots, short, &outputs(linear, &run.rows, &piece)) };
        }
        // SAFETY: as above.
        unsafe { self.plan.joint.expand(piece.linear_idx, self.short, &outputs(linear, &(0..self.m), &piece)) };
        for (run, place) in touched() {
            self.finish_run(linear, (run, place.short), &piece);
        }
    }

    /// The dense products of a piece. The terms of the next panel come from memory meanwhile.
    fn product(&self, linear: &SweepLinear<'_>, places: &[Place], piece: &Piece<'_>, ahead: &mut Ahead) {
        let slots = linear.runs.iter().filter(|run| overlaps(&run.rows, piece)).filter_map(|run| run.slots);
        let tiles = num_tiles(piece.to - piece.from, linear.weight.form().terms(), self.k);
        let parts = slots.flat_map(|slots| &slots.deltas).flat_map(|delta| delta.ahead(piece.panel_idx + 1));
        ahead.start(parts, tiles);
        let mut runs = linear.runs.iter().zip(places).filter(|(run, _)| overlaps(&run.rows, piece)).peekable();
        // The adapter's own weight, and how far a run's rows of words lie from its rows.
        let source = |(run, place): &(&SlotRun<'_>, &Place)| -> (Option<*const OwnMatrix>, usize) {
            let own = run.slots.and_then(|slots| slots.own.as_ref());
            (own.map(std::ptr::from_ref), place.word_row - run.rows.start)
        };
        // Rows that adjoin and share a weight are one product, so the base weight is read once for all of them.
        while let Some((run, place)) = runs.next() {
            let mut to = run.rows.end;
            let first = source(&(run, place));
            while let Some((run, _)) = runs.next_if(|next| source(next) == first) {
                to = run.rows.end;
            }
            let (from, to) = (run.rows.start.max(piece.from), to.min(piece.to));
            let target = piece.offset + (from - piece.from) * piece.stride;
            let columns = PANEL.min(linear.weight.n() - piece.panel_idx * PANEL);
            assert!(
                target + (to - from - 1) * piece.stride + columns <= piece.out.len(),
                "the piece lies in its output"
            );
            let target = Target { y: piece.out.at(target), stride: piece.stride };
            let shift = place.word_row - run.rows.start;
            let weight = own_weight(run).unwrap_or(linear.weight);
            let words = (self.words, linear.weight.form());
            // SAFETY: in bounds by the assertion; a panel's columns are written by its task only.
            unsafe { multiply(words, (from + shift, to + shift), weight, piece.panel_idx, target, ahead) };
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
        let scale = match slots.and_then(|slots| slots.scale.as_ref()) {
            Some(PackedScale::Diag(scale)) => &scale[first..],
            Some(scale) => {
                scale.apply(first, y);
                &[]
            }
            None => &[],
        };
        let c = slots.and_then(|slots| slots.c.as_deref()).or(linear.bias).map_or(&[][..], |c| &c[first..]);
        let residual = match self.finish {
            Finish::Add(residual) => &residual[row * self.row + first..][..y.len()],
            Finish::Join | Finish::SiluMul => &[],
        };
        scale_add(Isa::best(), scale, [c, residual], y);
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
    let first = piece.panel_idx * PANEL;
    let (from, to) = (rows.start.max(piece.from), rows.end.min(piece.to));
    Outputs {
        out: piece.out,
        offset: piece.offset + (from - piece.from) * piece.stride,
        stride: piece.stride,
        columns: PANEL.min(linear.weight.n() - first),
        first,
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
