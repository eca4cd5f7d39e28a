//! Before the sweep: what every run's rows have in few numbers.

#![expect(unsafe_code, reason = "threads write disjoint parts of the working memory")]

use std::ops::Range;

use super::base::RowForm;
use super::isa::Isa;
use super::joint::JointPlan;
use super::linear::SweepLinear;
use super::pool::for_each;
use super::rows::{RowMatrix, dot_rows};
use super::shared::Shared;
use super::slots::{PackedDelta, RowGates, SlotRun, short_len};

/// Rows of one shrinking task, a multiple of those that sparse terms take together.
const SHRINK_ROWS: usize = 16;
/// The same of a run of no more than [`SHRINK_ROWS`], which would keep one thread busy.
const SHRINK_ROWS_OF_FEW: usize = 8;

/// Where the working memory of every run lies.
pub(super) struct ShrinkPlan<'a> {
    /// By linear, then by run.
    pub(super) places: Vec<Vec<Place>>,
    /// What is to be computed: a run, some of its rows, and its place.
    tasks: Vec<(&'a SlotRun<'a>, Range<usize>, Place)>,
    /// The terms whose matrices several runs share.
    pub(super) joint: JointPlan<'a>,
    /// Elements of short vectors in total.
    pub(super) short: usize,
    /// Rows of words in total.
    pub(super) word_rows: usize,
    /// Whether any run has an adapter's slots.
    pub(super) has_slots: bool,
}

/// Where a run's working memory lies.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Its first short vector.
    pub(super) short: usize,
    /// Its first row of words: that of `x`, or one of its own where the run transforms its rows.
    pub(super) word_row: usize,
}

impl<'a> ShrinkPlan<'a> {
    /// Lays out the memory for `linears` of `m` rows.
    pub(super) fn new(linears: &'a [SweepLinear<'a>], m: usize) -> Self {
        let places = Vec::with_capacity(linears.len());
        let joint = JointPlan::default();
        let mut plan = Self { places, tasks: Vec::new(), joint, short: 0, word_rows: m, has_slots: false };
        for linear in linears {
            let places = linear.runs.iter().map(|run| plan.place(run)).collect();
            plan.places.push(places);
        }
        (plan.joint, plan.short) = JointPlan::new(linears, plan.short);
        plan
    }

    fn place(&mut self, run: &'a SlotRun<'a>) -> Place {
        let mut place = Place { short: self.short, word_row: run.rows.start };
        let Some(slots) = run.slots else { return place };
        self.has_slots = true;
        let short = short_len(slots);
        self.short += run.rows.len() * short;
        if slots.pre.is_some() {
            place.word_row = self.word_rows;
            self.word_rows += run.rows.len();
        }
        if short > 0 || slots.pre.is_some() {
            // Rows that share what is read from memory go together, others to whoever is free.
            let rows = match run.rows.len() {
                _ if slots.computes_by_row() => 1,
                ..=SHRINK_ROWS => SHRINK_ROWS_OF_FEW,
                _ => SHRINK_ROWS,
            };
            for from in run.rows.clone().step_by(rows) {
                self.tasks.push((run, from..run.rows.end.min(from + rows), place));
            }
        }
        place
    }
}

/// Transforms rows of `x` where a run does, and computes what every run's rows have in few numbers. Within a run, the
/// short vectors of one term adjoin. `words` are those of `x` in the terms' format; the transformed rows go behind those of
/// `x`, in the terms' format and in integers.
pub(super) fn shrink(
    (x, words, form): (&[f32], &[u32], RowForm),
    k: usize,
    plan: &ShrinkPlan<'_>,
    ((own_terms, own_integers), short): ((&mut [u32], &mut [u32]), &mut [f32]),
) {
    let (width, integers_width, m) = (form.terms_width(k), form.integers_width(k), x.len() / k);
    let (own_terms, own_integers, short) = (Shared::new(own_terms), Shared::new(own_integers), Shared::new(short));
    for_each(plan.tasks.len() + plan.joint.num_tasks(), |task| {
        let Some((run, rows, place)) = plan.tasks.get(task) else {
            // SAFETY: every task runs once, and the joint terms have short vectors of their own.
            unsafe { plan.joint.shrink(task - plan.tasks.len(), words, form, short) };
            return;
        };
        let slots = run.slots.expect("a task has slots");
        let plain = &words[rows.start * width..rows.end * width];
        let x = &x[rows.start * k..rows.end * k];
        let mut weighed = plain;
        if let Some(pre) = &slots.pre {
            let from = place.word_row - m + rows.start - run.rows.start;
            // SAFETY: every task has rows of its own.
            let words = unsafe { own_terms.part(from * width..(from + rows.len()) * width) };
            let mut copy = vec![0.0; k];
            for (idx, (row, words)) in x.chunks_exact(k).zip(words.chunks_exact_mut(width)).enumerate() {
                // SAFETY: as above.
                let integers =
                    unsafe { own_integers.part((from + idx) * integers_width..(from + idx + 1) * integers_width) };
                copy.copy_from_slice(row);
                pre.apply(&mut copy);
                form.write(&copy, words, integers);
            }
            weighed = words;
        }
        let mut start = place.short;
        // SAFETY: every task has rows of its own within every term of its run.
        let mut next = |r: usize| unsafe {
            let from = start + (rows.start - run.rows.start) * r;
            start += run.rows.len() * r;
            short.part(from..from + rows.len() * r)
        };
        let dot = |words: &[u32], a: &RowMatrix, h: &mut [f32]| {
            assert_eq!((a.k(), a.format()), (k, form.terms()), "the rows are like those of x");
            dot_rows(Isa::best(), words, a, h);
        };
        for delta in &slots.deltas {
            let h = next(delta.short_len());
            match delta {
                PackedDelta::LowRank { a, .. } => dot(plain, a, h),
                PackedDelta::Routed { a, router, .. } => {
                    dot(plain, a, h);
                    x.chunks_exact(k).zip(h.chunks_exact_mut(a.r())).for_each(|(row, h)| router.gate(row, h));
                }
                PackedDelta::Gated { a, places, .. } => {
                    dot(plain, a, h);
                    let RowGates { values, width } = run.gates.expect("rows with a gated term bring their gates");
                    let gates = values.chunks_exact(width).skip(rows.start - run.rows.start);
                    for (h, gates) in h.chunks_exact_mut(a.r()).zip(gates) {
                        h.iter_mut().zip(places).for_each(|(h, place)| *h *= gates[*place as usize]);
                    }
                }
                PackedDelta::ShardSum { m } => {
                    x.chunks_exact(k).zip(h.chunks_exact_mut(m.k())).for_each(|(row, h)| shard_sum(row, h));
                }
                PackedDelta::Sparse(s) => s.transpose(x, h),
                PackedDelta::Circulant(c) => c.multiply(x, h),
                PackedDelta::BlockProduct(product) => product.shrink(x, h),
                PackedDelta::Spectral(s) => s.multiply(x, h),
                PackedDelta::Joint(_) => {}
            }
        }
        if let Some((indexes, replaced)) = &slots.rows {
            dot(weighed, replaced, next(indexes.len()));
        }
    });
}

/// Sums the shards of the width of `sums`, in ascending order.
fn shard_sum(row: &[f32], sums: &mut [f32]) {
    sums.fill(0.0);
    for shard in row.chunks(sums.len()) {
        for (sum, value) in sums.iter_mut().zip(shard) {
            *sum += value;
        }
    }
}
