//! Terms whose matrices several adapters share: their rows are multiplied together, whichever adapter each belongs to.
//!
//! ```text
//! y += g * (b (d * (a x)))
//! ```
//!
//! Before the sweep each `a` meets all rows that need it, once, also where several linears of the sweep do; every term
//! gets the product times its own `d`. In a panel of outputs each `b` meets the rows of all its terms.

#![expect(unsafe_code, reason = "threads write disjoint parts of the outputs and of the working memory")]

use std::ops::Range;
use std::sync::Arc;

use super::base::RowForm;
use super::isa::Isa;
use super::linear::SweepLinear;
use super::packed::{PANEL, PackedMatrix};
use super::rows::{RowMatrix, dot_groups};
use super::shared::Shared;
use super::slots::{EXPAND_ROWS, Outputs, PackedDelta, expand_tile};
use super::words::LANES;

/// A low-rank term with vectors of its own between and behind matrices that others read too.
#[derive(Debug)]
pub struct JointLowRank {
    /// Down projection (r, k).
    pub a: Arc<RowMatrix>,
    /// Up projection (n, r).
    pub b: Arc<PackedMatrix>,
    /// Scales the numbers between them (r).
    pub d: Vec<f32>,
    /// Scales the outputs (n).
    pub g: Vec<f32>,
}

/// Rows of `x` of one task.
const TASK_ROWS: usize = 48;
/// Groups of a matrix's rows of one task.
const TASK_GROUPS: usize = 2;

/// Which rows meet which matrices, and where the numbers between lie.
#[derive(Default)]
pub(super) struct JointPlan<'a> {
    downs: Vec<Down<'a>>,
    /// By linear; terms that follow one another in a run are in different ones, in their order.
    ups: Vec<Vec<Up<'a>>>,
    tasks: Vec<Task>,
}

/// A down projection, and what needs it, by ascending row.
struct Down<'a> {
    a: &'a RowMatrix,
    uses: Vec<Use<'a>>,
}

/// A row of `x`, what scales its product, and where that goes.
struct Use<'a> {
    row: usize,
    d: &'a [f32],
    at: usize,
}

/// An up projection of one linear, its rows in ascending order, and where their short vectors begin.
struct Up<'a> {
    b: &'a PackedMatrix,
    rows: Vec<(usize, &'a JointLowRank)>,
    start: usize,
}

/// Some rows that adjoin and need one down projection, and some groups of it.
struct Task {
    down: usize,
    uses: Range<usize>,
    groups: Range<usize>,
}

impl<'a> JointPlan<'a> {
    /// Lays out the short vectors of `linears` from `start` on; answers where they end, too.
    pub(super) fn new(linears: &'a [SweepLinear<'a>], start: usize) -> (Self, usize) {
        let (mut plan, mut end) = (Self::default(), start);
        for linear in linears {
            let mut ups = expansions(linear);
            for up in &mut ups {
                let r = up.b.k();
                up.start = end;
                end += up.rows.len() * r;
                for (idx, (row, term)) in up.rows.iter().enumerate() {
                    assert_eq!((term.a.r(), term.a.k()), (r, linear.weight.k()), "the matrices fit the linear");
                    plan.down(&term.a).push(Use { row: *row, d: &term.d, at: up.start + idx * r });
                }
            }
            plan.ups.push(ups);
        }
        for (idx, down) in plan.downs.iter_mut().enumerate() {
            down.uses.sort_by_key(|use_| use_.row);
            down.add_tasks(idx, &mut plan.tasks);
        }
        (plan, end)
    }

    fn down(&mut self, a: &'a Arc<RowMatrix>) -> &mut Vec<Use<'a>> {
        let found = self.downs.iter().position(|down| std::ptr::eq(down.a, a.as_ref()));
        let idx = found.unwrap_or_else(|| {
            self.downs.push(Down { a, uses: Vec::new() });
            self.downs.len() - 1
        });
        &mut self.downs[idx].uses
    }

    /// Tasks before the sweep.
    pub(super) fn num_tasks(&self) -> usize {
        self.tasks.len()
    }

    /// One task: the products of some rows with some groups of a down projection. `words` are the rows of `x`.
    ///
    /// # Safety
    /// Every task runs once, and nobody else uses the plan's part of `short` meanwhile.
    pub(super) unsafe fn shrink(&self, task: usize, words: &[u32], form: RowForm, short: Shared<'_, f32>) {
        let Task { down, uses, groups } = &self.tasks[task];
        let Down { a, uses: all } = &self.downs[*down];
        assert_eq!(a.format(), form.terms(), "the rows are like those of x");
        let (uses, width) = (&all[uses.clone()], form.terms_width(a.k()));
        let (from, to) = (uses[0].row, uses[uses.len() - 1].row + 1);
        dot_groups(Isa::best(), &words[from * width..to * width], a, groups.clone(), |row, column, sums| {
            let begin = uses.partition_point(|use_| use_.row < from + row);
            for Use { d, at, .. } in uses[begin..].iter().take_while(|use_| use_.row == from + row) {
                // SAFETY: every use has its place, and every group its part of that.
                let h = unsafe { short.part(at + column..at + column + sums.len()) };
                h.iter_mut().zip(sums).zip(&d[column..]).for_each(|((h, sum), d)| *h = sum * d);
            }
        });
    }

    /// Adds the terms of a linear in one panel to the outputs, whose rows are those of `x`.
    ///
    /// # Safety
    /// Nobody else may use the outputs meanwhile.
    pub(super) unsafe fn expand(&self, linear: usize, short: &[f32], outputs: &Outputs<'_>) {
        for up in &self.ups[linear] {
            let r = up.b.k();
            let place = |row: usize| up.rows.partition_point(|(other, _)| *other < row);
            let (begin, end) = (place(outputs.rows.0), place(outputs.rows.1));
            for from in (begin..end).step_by(EXPAND_ROWS) {
                let rows = &up.rows[from..end.min(from + EXPAND_ROWS)];
                let mut sums = [[0.0_f32; PANEL]; EXPAND_ROWS];
                let h = &short[up.start + from * r..][..rows.len() * r];
                let panel = up.b.panel(outputs.first / PANEL);
                expand_tile(Isa::best(), h, panel, up.b, &mut sums.each_mut().map(|sums| sums.as_mut_slice()));
                for ((row, term), sums) in rows.iter().zip(&sums) {
                    // SAFETY: the caller's contract; one row at a time.
                    let y = unsafe { outputs.row(*row) };
                    y.iter_mut().zip(sums).zip(&term.g[outputs.first..]).for_each(|((y, sum), g)| *y += sum * g);
                }
            }
        }
    }
}

/// The joint terms of a linear by up projection: first those that come first in their runs, and so on.
fn expansions<'a>(linear: &'a SweepLinear<'a>) -> Vec<Up<'a>> {
    let mut ups: Vec<Up<'a>> = Vec::new();
    for round in 0.. {
        let begin = ups.len();
        for run in &linear.runs {
            let deltas = run.slots.map(|slots| slots.deltas.as_slice()).unwrap_or_default();
            let mut terms = deltas.iter().filter_map(|delta| match delta {
                PackedDelta::Joint(term) => Some(term),
                _ => None,
            });
            let Some(term) = terms.nth(round) else { continue };
            let rows = run.rows.clone().map(|row| (row, term));
            match ups[begin..].iter_mut().find(|up| std::ptr::eq(up.b, term.b.as_ref())) {
                Some(up) => up.rows.extend(rows),
                None => {
                    assert_eq!(term.b.n(), linear.weight.n(), "the term has the linear's outputs");
                    ups.push(Up { b: &term.b, rows: rows.collect(), start: 0 });
                }
            }
        }
        if ups.len() == begin {
            break;
        }
    }
    ups
}

impl Down<'_> {
    fn add_tasks(&self, down: usize, tasks: &mut Vec<Task>) {
        let num_groups = self.a.r().div_ceil(LANES);
        let mut from = 0;
        while from < self.uses.len() {
            let first = self.uses[from].row;
            let mut to = from + 1;
            // Rows that adjoin; a row can have several uses.
            while self
                .uses
                .get(to)
                .is_some_and(|use_| use_.row <= self.uses[to - 1].row + 1 && use_.row < first + TASK_ROWS)
            {
                to += 1;
            }
            for group in (0..num_groups).step_by(TASK_GROUPS) {
                let groups = group..num_groups.min(group + TASK_GROUPS);
                tasks.push(Task { down, uses: from..to, groups });
            }
            from = to;
        }
    }
}
