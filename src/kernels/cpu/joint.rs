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

use super::ahead::Ahead;
use super::base::RowForm;
use super::expand::{EXPAND_ROWS, expand_sums};
use super::gemm::{Target, multiply_panel};
use super::isa::Isa;
use super::linear::SweepLinear;
use super::packed::{PANEL, PackedMatrix};
use super::shared::Shared;
use super::slots::{Outputs, PackedDelta};

/// A low-rank term with vectors of its own between and behind matrices that others read too.
#[derive(Debug)]
pub struct JointLowRank {
    /// Down projection (r, k).
    pub a: Arc<PackedMatrix>,
    /// Up projection (n, r).
    pub b: Arc<PackedMatrix>,
    /// Scales the numbers between them (r).
    pub d: Vec<f32>,
    /// Scales the outputs (n).
    pub g: Vec<f32>,
}

/// Rows of `x` of one task.
const TASK_ROWS: usize = 48;

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
    a: &'a PackedMatrix,
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

/// Some rows that adjoin and need one down projection, and a panel of it.
struct Task {
    down: usize,
    uses: Range<usize>,
    panel: usize,
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
                    assert_eq!((term.a.n(), term.a.k()), (r, linear.weight.k()), "the matrices fit the linear");
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

    fn down(&mut self, a: &'a Arc<PackedMatrix>) -> &mut Vec<Use<'a>> {
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

    /// One task: the products of some rows with a panel of a down projection. `words` are the rows of `x`.
    ///
    /// # Safety
    /// Every task runs once, and nobody else uses the plan's part of `short` meanwhile.
    pub(super) unsafe fn shrink(&self, task: usize, words: &[u32], form: RowForm, short: Shared<'_, f32>) {
        let Task { down, uses, panel } = &self.tasks[task];
        let Down { a, uses: all } = &self.downs[*down];
        assert_eq!(a.format(), form.terms(), "the rows are like those of x");
        let (uses, width) = (&all[uses.clone()], form.terms_width(a.k()));
        let (from, to) = (uses[0].row, uses[uses.len() - 1].row + 1);
        let (first, columns) = (panel * PANEL, PANEL.min(a.n() - panel * PANEL));
        let mut sums = [[0.0_f32; PANEL]; TASK_ROWS];
        let target = Target { y: sums[..to - from].as_mut_ptr().cast(), stride: PANEL };
        // SAFETY: there is a row of sums for each row.
        unsafe {
            let rows = &words[from * width..to * width];
            multiply_panel(rows, a, *panel, target, Isa::best(), &mut Ahead::default());
        }
        for Use { row, d, at } in uses {
            // SAFETY: every use has its place, and every panel its part of that.
            let h = unsafe { short.part(at + first..at + first + columns) };
            h.iter_mut().zip(&sums[row - from]).zip(&d[first..]).for_each(|((h, sum), d)| *h = sum * d);
        }
    }

    /// Adds the terms of a linear to the outputs, whose rows are those of `x`.
    ///
    /// # Safety
    /// Nobody else may use the outputs meanwhile.
    pub(super) unsafe fn expand(&self, linear: usize, short: &[f32], outputs: &Outputs<'_>) {
        for up in &self.ups[linear] {
            let r = up.b.k();
            let place = |row: usize| up.rows.partition_point(|(other, _)| *other < row);
            let (begin, end) = (place(outputs.rows.0), place(outputs.rows.1));
            for (outputs, from) in
                outputs.panels().flat_map(|panel| (begin..end).step_by(EXPAND_ROWS).map(move |from| (panel, from)))
            {
                let rows = &up.rows[from..end.min(from + EXPAND_ROWS)];
                let mut sums = [[0.0_f32; PANEL]; EXPAND_ROWS];
                let h = &short[up.start + from * r..][..rows.len() * r];
                expand_sums(h, up.b, outputs.first / PANEL, &mut sums);
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
            tasks.extend((0..self.a.n().div_ceil(PANEL)).map(|panel| Task { down, uses: from..to, panel }));
            from = to;
        }
    }
}
