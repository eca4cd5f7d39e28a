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
use super::base::{BaseMatrix, RowForm, RowWords, multiply};
use super::gemm::{Target, num_tiles};
use super::isa::Isa;
use super::packed::{PANEL, PackedMatrix};
use super::pool::{for_each, for_ranges, num_threads};
use super::shared::Shared;
use super::shrink::{Place, ShrinkPlan, shrink};
use super::silu::silu_mul;
use super::slots::{Outputs, PackedDelta, PackedSlots, SlotRun, apply_slots, replace_rows};

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
        let terms_width = if plan.has_slots || !form.is_int8() { form.terms_width(k) } else { 0 };
        let widths = (terms_width, form.int8_width(k));
        let terms = grown(&mut scratch.terms, plan.word_rows * widths.0);
        let int8 = grown(&mut scratch.int8, plan.word_rows * widths.1);
        let short = grown(&mut scratch.short, plan.short);
        let (plain_terms, own_terms) = terms.split_at_mut(m * widths.0);
        let (plain_int8, own_int8) = int8.split_at_mut(m * widths.1);
        to_words(x, k, form, widths, (plain_terms, plain_int8));
        shrink((x, plain_terms, form), k, &plan, ((own_terms, own_int8), short));
        let words = RowWords { terms, int8 };
        let sweep = Sweep { linears, finish, x, k, words, plan: &plan, short, row, y: Shared::new(y), m };
        sweep.run();
        sweep.finish_whole_rows();
    });
}

fn check(linear: &SweepLinear<'_>, m: usize, k: usize, form: RowForm) {
    let mut next = 0;
    let fits = |w: &PackedMatrix| (w.n(), w.k(), w.format()) == (linear.weight.n(), k, form.terms());
    assert_eq!((linear.weight.k(), linear.weight.form()), (k, form), "the weights of a sweep have one width and form");
    for run in &linear.runs {
        assert_eq!(run.rows.start, next, "the runs tile the rows in order");
        next = run.rows.end;
        assert!(run.slots.and_then(|slots| slots.own.as_ref()).is_none_or(fits), "an own weight fits the linear");
    }
    assert_eq!(next, m, "the runs tile the rows");
}

/// Working memory of a thread, kept between calls.
#[derive(Default)]
struct Scratch {
    terms: Vec<u32>,
    int8: Vec<u32>,
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
    (terms_width, int8_width): (usize, usize),
    (terms, int8): (&mut [u32], &mut [u32]),
) {
    let (terms, int8) = (Shared::new(terms), Shared::new(int8));
    for_ranges(x.len() / k, WORDS_GRAIN / k, |rows| {
        for row in rows {
            // SAFETY: every task has rows of its own.
            let (terms, int8) = unsafe {
                (
                    terms.part(row * terms_width..(row + 1) * terms_width),
                    int8.part(row * int8_width..(row + 1) * int8_width),
                )
            };
            form.write(&x[row * k..][..k], terms, int8);
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
        let ups = slots.flat_map(|slots| slots.deltas.iter().filter_map(PackedDelta::up));
        let tiles = num_tiles(piece.to - piece.from, linear.weight.form().terms(), self.k);
        ahead.start(ups.map(|up| up.panel_ahead(piece.panel_idx + 1)), tiles);
        let mut runs = linear.runs.iter().zip(places).filter(|(run, _)| overlaps(&run.rows, piece)).peekable();
        // The adapter's own weight, and how far a run's rows of words lie from its rows.
        let source = |(run, place): &(&SlotRun<'_>, &Place)| -> (Option<*const PackedMatrix>, usize) {
            (own_weight(run).map(std::ptr::from_ref), place.word_row - run.rows.start)
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
            let weight = (linear.weight, own_weight(run));
            // SAFETY: in bounds by the assertion; a panel's columns are written by its task only.
            unsafe { multiply(self.words, (from + shift, to + shift), weight, piece.panel_idx, target, ahead) };
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
            self.add_last(linear, run.slots, (row, outputs.first), y);
        }
    }

    /// What is added last, in the columns of a row from `first` on.
    fn add_last(
        &self,
        linear: &SweepLinear<'_>,
        slots: Option<&PackedSlots>,
        (row, first): (usize, usize),
        y: &mut [f32],
    ) {
        if let Some(c) = slots.and_then(|slots| slots.c.as_deref()).or(linear.bias) {
            y.iter_mut().zip(&c[first..]).for_each(|(y, c)| *y += c);
        }
        if let Finish::Add(residual) = self.finish {
            let residual = &residual[row * self.row + first..][..y.len()];
            y.iter_mut().zip(residual).for_each(|(y, r)| *y += r);
        }
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
                    if let Some(scale) = &slots.scale {
                        scale.apply(0, y);
                    }
                    self.add_last(linear, Some(slots), (row, 0), y);
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
fn own_weight<'a>(run: &SlotRun<'a>) -> Option<&'a PackedMatrix> {
    run.slots.and_then(|slots| slots.own.as_ref())
}

fn overlaps(rows: &Range<usize>, piece: &Piece<'_>) -> bool {
    rows.start < piece.to && rows.end > piece.from
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::{Arc, LazyLock, Mutex};

    use proptest::prelude::*;

    use super::super::block_product::{BlockProduct, PackedMix};
    use super::super::blocks::Blocks;
    use super::super::circulant::Circulant;
    use super::super::int8::Int8Matrix;
    use super::super::joint::JointLowRank;
    use super::super::packed::WeightFormat;
    use super::super::pre::PackedPre;
    use super::super::route::Router;
    use super::super::rows::RowMatrix;
    use super::super::scale::PackedScale;
    use super::super::slots::{PackedDelta, PackedSlots, RowGates};
    use super::super::sparse::SparseRows;

    use super::*;
    use crate::kernels::cpu::testing::random;

    /// An adapter's slots as plain f32 matrices.
    #[derive(Default)]
    struct Plain {
        /// Factors: places, length of a block, blocks.
        pre: Vec<(Vec<u32>, usize, Vec<f32>)>,
        own: Option<Vec<f32>>,
        rows: Option<(Vec<u32>, Vec<f32>)>,
        low_rank: Option<(usize, Vec<f32>, Vec<f32>)>,
        shard_sum: Option<(usize, usize, Vec<f32>)>,
        sparse: Option<(Vec<u32>, Vec<u32>, Vec<f32>)>,
        circulant: Option<(usize, Vec<f32>)>,
        blocks: Option<PlainBlocks>,
        /// Which of two pairs of matrices, d and g; the first ones twice.
        joint: Option<(u64, Vec<f32>, Vec<f32>)>,
        scale: Option<PackedScale>,
        /// Experts, how many are chosen, and prototypes.
        router: Option<(usize, usize, Vec<f32>)>,
        /// Rank of a term that the gates of [`row_gates`] weigh, in turn.
        gated: Option<usize>,
        c: Option<Vec<f32>>,
    }

    /// A product of blocks.
    struct PlainBlocks {
        /// Blocks of inputs and of outputs, and numbers of a block between.
        sizes: (usize, usize, usize),
        /// Matrices of inputs.
        a: Vec<f32>,
        /// The mix of blocks, or none where they exchange their parts.
        mix: Option<Vec<f32>>,
        /// Matrices of outputs.
        b: Option<Vec<f32>>,
    }

    impl PlainBlocks {
        fn random((n, k): (usize, usize), seed: u64) -> Self {
            let has = |bit: u64| seed >> bit & 1 == 1;
            let divisor = |of: usize, most: usize| (1..=most).rev().find(|d| of.is_multiple_of(*d)).unwrap_or(1);
            let (blocks, p, r) =
                (divisor(k, 6), divisor(n, if has(25) { 3 } else { 9 }), 1 + (seed >> 26) as usize % 20);
            let (mix, p, r) = if has(27) {
                let both = (1..=4).rev().find(|d| k.is_multiple_of(*d) && n.is_multiple_of(*d)).unwrap_or(1);
                return Self {
                    sizes: (both, both, r * both),
                    a: random(both * r * k, seed ^ 31),
                    mix: None,
                    b: Some(random(n * r * both, seed ^ 32)),
                };
            } else {
                (Some(random(p * blocks, seed ^ 33)), p, if has(28) { n / p } else { r })
            };
            let (d, q) = (k / blocks, n / p);
            Self {
                sizes: (blocks, p, r),
                a: random(if has(29) { r * d } else { r * k }, seed ^ 31),
                mix,
                b: (!has(28)).then(|| random(if has(30) { q * r } else { n * r }, seed ^ 32)),
            }
        }

        fn pack(&self, (n, k): (usize, usize)) -> BlockProduct {
            let (blocks, p, r) = self.sizes;
            let (d, q) = (k / blocks, n / p);
            let mix = self.mix.clone().map_or(PackedMix::Exchange, |w| PackedMix::Matrix { w, p });
            let b = self.b.as_ref().map(|b| (b.as_slice(), (b.len() / (q * r), q, r)));
            BlockProduct::new(WeightFormat::F32, (&self.a, (self.a.len() / (r * d), r, d)), mix, b).expect("memory")
        }

        fn output(&self, x: &[f32], n: usize, o: usize) -> f64 {
            let (blocks, p, r) = self.sizes;
            let (d, q) = (x.len() / blocks, n / p);
            let (i, t) = (o / q, o % q);
            let g = |j: usize, s: usize| -> f64 {
                let row = &self.a[(j * r + s) * d % self.a.len()..][..d];
                row.iter().zip(&x[j * d..]).map(|(a, x)| f64::from(*a) * f64::from(*x)).sum()
            };
            let h = |s: usize| match &self.mix {
                Some(w) => (0..blocks).map(|j| f64::from(w[i * blocks + j]) * g(j, s)).sum(),
                None => g(s / (r / blocks), i * (r / blocks) + s % (r / blocks)),
            };
            let Some(b) = &self.b else { return h(t) };
            (0..r).map(|s| f64::from(b[(o * r + s) % b.len()]) * h(s)).sum()
        }
    }

    /// Ranks of the two pairs of matrices that adapters share.
    fn joint_rank(which: u64) -> usize {
        [21, 5][which as usize]
    }

    /// Down and up projection of a pair.
    fn joint_matrices(which: u64, (n, k): (usize, usize)) -> (Vec<f32>, Vec<f32>) {
        let r = joint_rank(which);
        (random(r * k, 90 + which), random(n * r, 92 + which))
    }

    /// The same packed: one pair for all adapters.
    fn kept_matrices(which: u64, (n, k): (usize, usize)) -> (Arc<PackedMatrix>, Arc<PackedMatrix>) {
        type Pairs = HashMap<(u64, usize, usize), (Arc<PackedMatrix>, Arc<PackedMatrix>)>;
        static PAIRS: LazyLock<Mutex<Pairs>> = LazyLock::new(Mutex::default);
        let mut pairs = PAIRS.lock().expect("no test panics with it");
        let pair = pairs.entry((which, n, k)).or_insert_with(|| {
            let ((a, b), r) = (joint_matrices(which, (n, k)), joint_rank(which));
            let b = PackedMatrix::from_f32(n, r, |i| &b[i * r..][..r]).expect("b");
            let a = PackedMatrix::from_f32(r, k, |i| &a[i * k..][..k]).expect("a");
            (Arc::new(a), Arc::new(b))
        });
        pair.clone()
    }

    /// Two gates for each row of `x`: two of its own values.
    fn row_gates(x: &[f32], k: usize) -> Vec<f32> {
        x.chunks_exact(k).flat_map(|row| [row[0], row[k / 2]]).collect()
    }

    /// The gates of a run's rows.
    fn gates_of(gates: &[f32], rows: Range<usize>) -> Option<RowGates<'_>> {
        Some(RowGates { values: &gates[2 * rows.start..2 * rows.end], width: 2 })
    }

    impl Plain {
        fn random((n, k): (usize, usize), seed: u64) -> Self {
            let has = |bit: u64| seed >> bit & 1 == 1;
            let r = 1 + (seed >> 8) as usize % 20;
            let q = if has(5) { n } else { (1..=n).rev().find(|q| n.is_multiple_of(*q) && *q < n).unwrap_or(n) };
            let some = |bit: u64, len: usize| has(bit).then(|| random(len, seed ^ bit));
            Self {
                // Blocks of one number are a diagonal. Only the last of several factors has its inputs in order.
                pre: (0..if has(12) { 3 } else { u64::from(has(7)) })
                    .map(|factor| {
                        let s = (1..=8).rev().find(|s| has(10) && k.is_multiple_of(*s)).unwrap_or(1);
                        let mut places: Vec<u32> = (0..k as u32).collect();
                        places.rotate_left(factor as usize * 7 % k);
                        places.reverse();
                        if factor == 0 {
                            places.sort_unstable();
                        }
                        (places, s, random(k * s, seed ^ 7 ^ factor << 20))
                    })
                    .rev()
                    .collect(),
                own: some(0, n * k),
                rows: has(6).then(|| {
                    let indexes: Vec<u32> = (0..n as u32).filter(|i| seed >> (i % 60) & 1 == 1).collect();
                    let rows = random(indexes.len() * k, seed ^ 6);
                    (indexes, rows)
                }),
                low_rank: some(1, r * k).map(|a| (r, a, random(n * r, seed ^ 99))),
                shard_sum: some(2, r * q).map(|m| (r, q, m)),
                sparse: has(8).then(|| {
                    let places: Vec<usize> = (0..n * k).filter(|at| (seed >> (at % 61)) & 3 == 1).collect();
                    let (rows, columns) = places.iter().map(|at| ((at / k) as u32, (at % k) as u32)).unzip();
                    (rows, columns, random(places.len(), seed ^ 8))
                }),
                circulant: has(13).then(|| {
                    let b = (1..=k).rev().find(|b| k.is_multiple_of(*b) && n.is_multiple_of(*b)).unwrap_or(1);
                    (b, random(n * k / b, seed ^ 13))
                }),
                blocks: has(24).then(|| PlainBlocks::random((n, k), seed)),
                joint: has(31).then(|| {
                    let which = u64::from(has(32));
                    (which, random(joint_rank(which), seed ^ 31), random(n, seed ^ 32))
                }),
                router: has(21).then(|| {
                    let experts = 1 + (seed >> 16) as usize % 4;
                    (experts, 1 + (seed >> 20) as usize % experts, random(experts * k, seed ^ 12))
                }),
                gated: has(22).then(|| 1 + (seed >> 23) as usize % 9),
                // Pairs and blocks within a panel, and across.
                scale: some(3, n).map(|p| {
                    if has(14) {
                        let s = [3, 16, 70][(seed >> 15) as usize % 3];
                        let values = random(n.div_ceil(s) * s * s, seed ^ 14);
                        return PackedScale::BlockDiag(Blocks { s, values });
                    }
                    match (1..=n / 2).rfind(|half| n.is_multiple_of(2 * half) && !(has(11) && *half > 4)) {
                        Some(half) if has(9) => PackedScale::PairRot { p, q: random(n, seed ^ 9), half },
                        _ => PackedScale::Diag(p),
                    }
                }),
                c: some(4, n),
            }
        }

        fn pack(&self, (n, k): (usize, usize)) -> PackedSlots {
            let mut deltas = Vec::new();
            if let Some((r, a, b)) = &self.low_rank {
                let b = PackedMatrix::from_f32(n, *r, |i| &b[i * r..][..*r]).expect("b");
                deltas.push(PackedDelta::LowRank { a: RowMatrix::new(WeightFormat::F32, a, *r, k), b });
            }
            if let Some((r, q, m)) = &self.shard_sum {
                let transposed: Vec<f32> = (0..q * r).map(|i| m[i % r * q + i / r]).collect();
                let m = PackedMatrix::from_f32(*q, *r, |i| &transposed[i * r..][..*r]).expect("m");
                deltas.push(PackedDelta::ShardSum { m });
            }
            if let Some((experts, top_k, prototypes)) = &self.router {
                let (a, b) = self.routed_factors(*experts, (n, k));
                let b = PackedMatrix::from_f32(n, 2 * experts, |i| &b[i * 2 * experts..][..2 * experts]).expect("b");
                let a = RowMatrix::new(WeightFormat::F32, &a, 2 * experts, k);
                deltas.push(PackedDelta::Routed { a, b, router: Router::new(prototypes.clone(), k, *top_k, 0.7) });
            }
            if let Some(r) = self.gated {
                let (a, b) = (random(r * k, 79), random(n * r, 80));
                let b = PackedMatrix::from_f32(n, r, |i| &b[i * r..][..r]).expect("b");
                let places = (0..r as u32).map(|j| j % 2).collect();
                deltas.push(PackedDelta::Gated { a: RowMatrix::new(WeightFormat::F32, &a, r, k), b, places });
            }
            if let Some((rows, columns, values)) = &self.sparse {
                deltas.push(PackedDelta::Sparse(SparseRows::new(WeightFormat::F32, k, rows, (columns, values))));
            }
            if let Some((b, kernel)) = &self.circulant {
                deltas.push(PackedDelta::Circulant(Circulant::new(kernel, (n / b, k / b, *b))));
            }
            deltas.extend(self.blocks.iter().map(|blocks| PackedDelta::BlockProduct(blocks.pack((n, k)))));
            if let Some((which, d, g)) = &self.joint {
                for _ in 0..2 - which {
                    let (a, b) = kept_matrices(*which, (n, k));
                    deltas.insert(0, PackedDelta::Joint(JointLowRank { a, b, d: d.clone(), g: g.clone() }));
                }
            }
            let own = self.own.as_ref().map(|w| PackedMatrix::from_f32(n, k, |i| &w[i * k..][..k]).expect("own"));
            let rows = self
                .rows
                .as_ref()
                .map(|(indexes, rows)| (indexes.clone(), RowMatrix::new(WeightFormat::F32, rows, indexes.len(), k)));
            let blocks = |s: &usize, values: &Vec<f32>| Blocks { s: *s, values: values.clone() };
            let pre = match self.pre.as_slice() {
                [] => None,
                [(_, 1, values)] => Some(PackedPre::Diag(values.clone())),
                [(_, s, values)] => Some(PackedPre::BlockDiag(blocks(s, values))),
                several => {
                    let factors = several.iter().map(|(places, s, values)| (places.clone(), blocks(s, values)));
                    Some(PackedPre::Butterfly(factors.collect()))
                }
            };
            PackedSlots { pre, own, rows, deltas, scale: self.scale.clone(), c: self.c.clone() }
        }

        /// Down and up projections of experts with rank 2.
        fn routed_factors(&self, experts: usize, (n, k): (usize, usize)) -> (Vec<f32>, Vec<f32>) {
            (random(2 * experts * k, 77), random(n * 2 * experts, 78))
        }

        /// The gates of a row, in f64.
        fn gates(x: &[f32], top_k: usize, prototypes: &[f32]) -> Vec<f64> {
            let dot = |p: &[f32]| p.iter().zip(x).map(|(p, x)| f64::from(*p) * f64::from(*x)).sum::<f64>().abs();
            let magnitudes: Vec<f64> = prototypes.chunks_exact(x.len()).map(dot).collect();
            let rank = |m: f64| magnitudes.iter().filter(|other| **other > m).count();
            let weights: Vec<f64> =
                magnitudes.iter().map(|m| if rank(*m) < top_k { (m / 0.7).exp() } else { 0.0 }).collect();
            weights.iter().map(|w| w / weights.iter().sum::<f64>()).collect()
        }

        /// One output before scale and bias, in f64.
        fn unscaled(&self, x: &[f32], w: &[f32], o: usize) -> f64 {
            let k = x.len();
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            let weight = &self.own.as_deref().unwrap_or(w)[o * k..][..k];
            let replaced = self.rows.as_ref().and_then(|(indexes, rows)| {
                indexes.binary_search(&(o as u32)).ok().map(|found| &rows[found * k..][..k])
            });
            let mut pre_x = x.to_vec();
            for (places, s, blocks) in &self.pre {
                let v: Vec<f32> = places.iter().map(|from| pre_x[*from as usize]).collect();
                for (j, to) in places.iter().enumerate() {
                    let products = (0..*s).map(|i| v[j / s * s + i] * blocks[(j / s * s + i) * s + j % s]);
                    pre_x[*to as usize] = products.sum();
                }
            }
            let mut y = dot(&pre_x, replaced.unwrap_or(weight));
            if let Some((r, a, b)) = &self.low_rank {
                y += (0..*r).map(|j| f64::from(b[o * r + j]) * dot(x, &a[j * k..][..k])).sum::<f64>();
            }
            if let Some((experts, top_k, prototypes)) = &self.router {
                let (a, b) = self.routed_factors(*experts, (w.len() / k, k));
                for (expert, gate) in Self::gates(x, *top_k, prototypes).into_iter().enumerate() {
                    let part = |j: usize| f64::from(b[o * 2 * experts + j]) * dot(x, &a[j * k..][..k]);
                    y += gate * (part(2 * expert) + part(2 * expert + 1));
                }
            }
            if let Some(r) = self.gated {
                let (a, b) = (random(r * k, 79), random(w.len() / k * r, 80));
                let gate = |j: usize| f64::from(if j.is_multiple_of(2) { x[0] } else { x[k / 2] });
                y += (0..r).map(|j| gate(j) * f64::from(b[o * r + j]) * dot(x, &a[j * k..][..k])).sum::<f64>();
            }
            if let Some((r, q, m)) = &self.shard_sum {
                y += x.iter().enumerate().map(|(i, x)| f64::from(*x) * f64::from(m[i % r * q + o % q])).sum::<f64>();
            }
            if let Some((rows, columns, values)) = &self.sparse {
                let entries = rows.iter().zip(columns).zip(values).filter(|((row, _), _)| **row as usize == o);
                y +=
                    entries.map(|((_, column), value)| f64::from(x[*column as usize]) * f64::from(*value)).sum::<f64>();
            }
            if let Some((which, d, g)) = &self.joint {
                let (a, b) = joint_matrices(*which, (w.len() / k, k));
                let part = |j: usize| f64::from(b[o * d.len() + j]) * f64::from(d[j]) * dot(x, &a[j * k..][..k]);
                y += (2 - which) as f64 * f64::from(g[o]) * (0..d.len()).map(part).sum::<f64>();
            }
            if let Some((b, kernel)) = &self.circulant {
                let value = |i: usize| kernel[(o / b * (k / b) + i / b) * b + (i % b + b - o % b) % b];
                y += (0..k).map(|i| f64::from(value(i)) * f64::from(x[i])).sum::<f64>();
            }
            y + self.blocks.as_ref().map_or(0.0, |blocks| blocks.output(x, w.len() / k, o))
        }

        /// One output in f64.
        fn output(&self, x: &[f32], w: &[f32], bias: &[f32], o: usize) -> f64 {
            let y = self.unscaled(x, w, o);
            let scaled = match &self.scale {
                None => y,
                Some(PackedScale::Diag(scale)) => y * f64::from(scale[o]),
                Some(PackedScale::PairRot { p, q, half }) => {
                    let is_first = (o / half).is_multiple_of(2);
                    let partner = self.unscaled(x, w, if is_first { o + half } else { o - half });
                    y * f64::from(p[o]) + partner * f64::from(if is_first { -q[o] } else { q[o] })
                }
                Some(PackedScale::BlockDiag(Blocks { s, values })) => {
                    let (first, n) = (o / s * s, w.len() / x.len());
                    let of_block = first..n.min(first + s);
                    of_block.map(|i| self.unscaled(x, w, i) * f64::from(values[i * s + o % s])).sum()
                }
            };
            scaled + f64::from(self.c.as_ref().map_or(bias[o], |c| c[o]))
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_row_equals_the_plain_formula_and_itself_alone(
            n in 1_usize..150, k in 1_usize..90, lens in proptest::collection::vec(1_usize..5, 1..5), seed: u64,
        ) {
            let m: usize = lens.iter().sum();
            let (x, w, bias) = (random(m * k, seed), random(n * k, seed ^ 1), random(n, seed ^ 2));
            let packed = PackedMatrix::from_f32(n, k, |i| &w[i * k..][..k]).expect("w");
            let linear = |runs| SweepLinear { weight: (&packed).into(), bias: Some(&bias), runs };
            let adapters: Vec<Plain> = (0..lens.len()).map(|i| Plain::random((n, k), seed.rotate_left(11 * i as u32))).collect();
            let slots: Vec<PackedSlots> = adapters.iter().map(|a| a.pack((n, k))).collect();
            let gates = row_gates(&x, k);
            let mut from = 0;
            let runs: Vec<SlotRun<'_>> = lens.iter().zip(&slots).map(|(len, slots)| {
                from += len;
                SlotRun { rows: from - len..from, slots: Some(slots), gates: gates_of(&gates, from - len..from) }
            }).collect();
            let mut y = vec![f32::NAN; m * n];
            sweep(&x, &[linear(runs.clone())], Finish::Join, &mut y);
            for (run, plain) in runs.iter().zip(&adapters) {
                for row in run.rows.clone() {
                    let x = &x[row * k..][..k];
                    let mut alone = vec![f32::NAN; n];
                    let runs = vec![SlotRun { rows: 0..1, slots: run.slots, gates: gates_of(&gates, row..row + 1) }];
                    sweep(x, &[linear(runs)], Finish::Join, &mut alone);
                    prop_assert_eq!(&alone[..], &y[row * n..][..n]);
                    for (o, found) in alone.iter().enumerate() {
                        let expected = plain.output(x, &w, &bias, o);
                        // Chained f32 sums of at most 90, 20, 8 and 70 products in [-1, 1]; three factors and a block of 70
                        // outputs let a value grow to some thousands.
                        let bound = 6e-4 * expected.abs().max(1.0);
                        prop_assert!((f64::from(*found) - expected).abs() < bound, "{found} {expected}");
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn adapters_over_integers_equal_the_plain_formula_and_a_row_itself_alone(
            n in 1_usize..150, k in 1_usize..150, lens in proptest::collection::vec(1_usize..5, 1..5), seed: u64,
        ) {
            let m: usize = lens.iter().sum();
            // Multiples of 1/127, the largest of every group 1: quantising them changes nothing but the last bit.
            let mut x: Vec<f32> = random(m * k, seed).iter().map(|v| (v * 127.0).round() / 127.0).collect();
            x.chunks_exact_mut(k).for_each(|row| row.chunks_mut(64).for_each(|group| group[0] = 1.0));
            let (w, bias) = (random(n * k, seed ^ 1), random(n, seed ^ 2));
            let packed = Int8Matrix::new(WeightFormat::F32, n, k, |i, row| row.copy_from_slice(&w[i * k..][..k])).expect("w");
            let w = packed.unpack();
            let linear = |runs| SweepLinear { weight: (&packed).into(), bias: Some(&bias), runs };
            let adapters: Vec<Plain> = (0..lens.len()).map(|i| Plain::random((n, k), seed.rotate_left(11 * i as u32))).collect();
            let slots: Vec<PackedSlots> = adapters.iter().map(|a| a.pack((n, k))).collect();
            let gates = row_gates(&x, k);
            let mut from = 0;
            let runs: Vec<SlotRun<'_>> = lens.iter().zip(&slots).enumerate().map(|(i, (len, slots))| {
                from += len;
                SlotRun {
                    rows: from - len..from,
                    slots: (i != 1).then_some(slots),
                    gates: gates_of(&gates, from - len..from),
                }
            }).collect();
            let mut y = vec![f32::NAN; m * n];
            sweep(&x, &[linear(runs.clone())], Finish::Join, &mut y);
            for (run, plain) in runs.iter().zip(&adapters) {
                for row in run.rows.clone() {
                    let x = &x[row * k..][..k];
                    let mut alone = vec![f32::NAN; n];
                    let runs = vec![SlotRun { rows: 0..1, slots: run.slots, gates: gates_of(&gates, row..row + 1) }];
                    sweep(x, &[linear(runs)], Finish::Join, &mut alone);
                    prop_assert_eq!(&alone[..], &y[row * n..][..n]);
                    let bare = Plain::default();
                    let plain = if run.slots.is_some() { plain } else { &bare };
                    let scales = match &plain.scale {
                        Some(PackedScale::BlockDiag(blocks)) => blocks.s as f64,
                        _ => 2.0,
                    };
                    for (o, found) in alone.iter().enumerate() {
                        let expected = plain.output(x, &w, &bias, o);
                        // Transformed rows are quantised after the transform: half a unit of a group's largest, which each
                        // factor lets grow to 8 times as much, for each of 150 inputs that meet weights up to 1 and scales
                        // that add up.
                        let bound = if plain.pre.is_empty() || plain.own.is_some() {
                            6e-4 * expected.abs().max(1.0)
                        } else {
                            8f64.powi(plain.pre.len() as i32) / 254.0 * 150.0 * scales
                        };
                        prop_assert!((f64::from(*found) - expected).abs() < bound, "{found} {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn bf16_terms_are_exact_on_bf16_values() {
        let (n, k, r) = (70, 40, 3);
        let round = |v: Vec<f32>| v.into_iter().map(|v| half::bf16::from_f32(v).to_f32()).collect::<Vec<_>>();
        let (x, a, b) = (round(random(2 * k, 1)), round(random(r * k, 2)), round(random(n * r, 3)));
        let bits: Vec<half::bf16> = b.iter().map(|v| half::bf16::from_f32(*v)).collect();
        let up = |format| match format {
            WeightFormat::F32 => PackedMatrix::from_f32(n, r, |i| &b[i * r..][..r]),
            WeightFormat::Bf16 => PackedMatrix::from_bf16(n, r, |i| &bits[i * r..][..r]),
        };
        let run = |format| {
            let zeros = vec![half::bf16::ZERO; k];
            let weight = match format {
                WeightFormat::F32 => PackedMatrix::from_f32(n, k, |_| &[0.0; 40]),
                WeightFormat::Bf16 => PackedMatrix::from_bf16(n, k, |_| &zeros),
            };
            let weight = weight.expect("weight");
            let b = up(format).expect("b");
            let deltas = vec![PackedDelta::LowRank { a: RowMatrix::new(format, &a, r, k), b }];
            let slots = PackedSlots { deltas, ..PackedSlots::default() };
            let mut y = vec![0.0; 2 * n];
            let runs = vec![SlotRun { rows: 0..2, slots: Some(&slots), gates: None }];
            sweep(&x, &[SweepLinear { weight: (&weight).into(), bias: None, runs }], Finish::Join, &mut y);
            y
        };
        for (a, b) in run(WeightFormat::F32).iter().zip(run(WeightFormat::Bf16)) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
    }

    #[test]
    fn joined_added_and_gated_outputs_are_those_of_the_linears_alone() {
        let (k, widths, m) = (37, [70, 130, 70], 5);
        let x = random(m * k, 1);
        let weights: Vec<PackedMatrix> = widths
            .iter()
            .map(|n| {
                let w = random(n * k, *n as u64 + 7);
                PackedMatrix::from_f32(*n, k, |i| &w[i * k..][..k]).expect("w")
            })
            .collect();
        let mut plain: Vec<Plain> = (0..3).map(|i| Plain::random((widths[i], k), 0x1234_5678_9abc_0f1b << i)).collect();
        plain[1].scale = Some(PackedScale::PairRot { p: random(130, 3), q: random(130, 4), half: 65 });
        let slots: Vec<PackedSlots> = (0..3).map(|i| plain[i].pack((widths[i], k))).collect();
        let gates = row_gates(&x, k);
        let linear = |i: usize| SweepLinear {
            weight: (&weights[i]).into(),
            bias: None,
            runs: vec![
                SlotRun::bare(0..2),
                SlotRun { rows: 2..5, slots: Some(&slots[i]), gates: gates_of(&gates, 2..5) },
            ],
        };
        let alone: Vec<Vec<f32>> = (0..3)
            .map(|i| {
                let mut y = vec![f32::NAN; m * widths[i]];
                sweep(&x, &[linear(i)], Finish::Join, &mut y);
                y
            })
            .collect();
        let mut joined = vec![f32::NAN; m * 270];
        sweep(&x, &[linear(0), linear(1), linear(2)], Finish::Join, &mut joined);
        for row in 0..m {
            let expected: Vec<f32> = (0..3).flat_map(|i| alone[i][row * widths[i]..][..widths[i]].to_vec()).collect();
            assert_eq!(joined[row * 270..][..270], expected);
        }
        let residual = random(m * 130, 5);
        let mut added = vec![f32::NAN; m * 130];
        sweep(&x, &[linear(1)], Finish::Add(&residual), &mut added);
        assert!(added.iter().zip(&alone[1]).zip(&residual).all(|((found, y), r)| *found == y + r));
        let mut gated = vec![f32::NAN; m * 70];
        sweep(&x, &[linear(0), linear(2)], Finish::SiluMul, &mut gated);
        let mut expected = vec![0.0; m * 70];
        silu_mul(Isa::best(), &alone[0], &alone[2], &mut expected);
        assert_eq!(gated, expected);
    }
}
