//! RMS normalisation, with rows that have parameters of their own.

use std::ops::Range;

use super::dispatch::{dispatch, fma};
use super::isa::Isa;
use super::pool::for_ranges;
use super::shared::Shared;

/// Elements normalised by one task.
const GRAIN: usize = 1 << 14;
/// Partial sums of a row.
const LANES: usize = 16;

/// What an adapter does to one norm, in the CPU's form.
#[derive(Clone, Debug, Default)]
pub struct NormSlots {
    /// Complete weight (dim); `None` is the base weight.
    pub weight: Option<Vec<f32>>,
    /// Complete shift (dim); `None` is no shift.
    pub shift: Option<Vec<f32>>,
}

/// Rows that are normalised with the same parameters.
#[derive(Clone, Debug)]
pub struct NormRun<'a> {
    /// The rows.
    pub rows: Range<usize>,
    /// The adapter's parameters; `None` are the base's.
    pub slots: Option<&'a NormSlots>,
}

/// A norm for one call: `y = weight * x / sqrt(mean(x^2) + eps) + shift`, each run of rows with its own weight and shift.
#[derive(Clone, Debug)]
pub struct Norm<'a> {
    /// The base's weight (dim).
    pub weight: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
    /// What the rows' adapters do; the runs tile the rows in order.
    pub runs: Vec<NormRun<'a>>,
}

impl Norm<'_> {
    /// Weight and shift of row `row`.
    pub(super) fn parameters(&self, row: usize) -> (&[f32], Option<&[f32]>) {
        let run = &self.runs[self.runs.partition_point(|run| run.rows.end <= row)];
        match run.slots {
            Some(slots) => (slots.weight.as_deref().unwrap_or(self.weight), slots.shift.as_deref()),
            None => (self.weight, None),
        }
    }
}

/// Normalises rows of `x` into `y`, both (rows, dim) f32.
///
/// # Panics
/// When lengths do not fit.
pub(super) fn rms_norm(x: &[f32], norm: &Norm<'_>, y: &mut [f32]) {
    let dim = norm.weight.len();
    assert_eq!(x.len(), y.len(), "x and y are of one shape");
    assert_eq!(norm.runs.last().map(|run| run.rows.end), Some(x.len() / dim), "the runs tile the rows");
    let y = Shared::new(y);
    for_ranges(x.len() / dim, GRAIN / dim, |rows| {
        #[expect(unsafe_code, reason = "tasks write disjoint rows")]
        // SAFETY: a task has rows of its own.
        let y = unsafe { y.part(rows.start * dim..rows.end * dim) };
        for ((row, x), y) in rows.clone().zip(x[rows.start * dim..].chunks_exact(dim)).zip(y.chunks_exact_mut(dim)) {
            let (weight, shift) = norm.parameters(row);
            norm_row(Isa::best(), x, weight, norm.eps, y);
            if let Some(shift) = shift {
                y.iter_mut().zip(shift).for_each(|(y, s)| *y += s);
            }
        }
    });
}

dispatch! {
    /// `y = weight * x / sqrt(mean(x^2) + eps)` for one row.
    pub(super) fn norm_row(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) => norm_row_body
}

#[inline(always)]
fn norm_row_body<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == y.len(), "x, weight and y are of one length");
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut sums = [0.0_f32; LANES];
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum = fma::<FMA>(*value, *value, *sum);
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        *sum = fma::<FMA>(*value, *value, *sum);
    }
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
    }
    let scale = 1.0 / (sums[0] / x.len() as f32 + eps).sqrt();
    for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
        *y = x * scale * weight;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::cpu::testing::random;

    proptest! {
        #[test]
        fn every_row_equals_the_formula(dim in 1_usize..70, lens in proptest::collection::vec(1_usize..4, 1..5), seed: u64) {
            let m: usize = lens.iter().sum();
            let (x, weight) = (random(m * dim, seed), random(dim, seed ^ 1));
            let slots: Vec<NormSlots> = (0..lens.len() as u64).map(|i| NormSlots {
                weight: (seed >> i & 1 == 1).then(|| random(dim, i)),
                shift: (seed >> (8 + i) & 1 == 1).then(|| random(dim, 100 + i)),
            }).collect();
            let mut from = 0;
            let runs = lens.iter().zip(&slots).enumerate().map(|(i, (len, slots))| {
                from += len;
                NormRun { rows: from - len..from, slots: (i % 3 != 2).then_some(slots) }
            });
            let norm = Norm { weight: &weight, eps: 1e-5, runs: runs.collect() };
            let mut y = vec![f32::NAN; x.len()];
            rms_norm(&x, &norm, &mut y);
            for run in &norm.runs {
                for row in run.rows.clone() {
                    let x = &x[row * dim..][..dim];
                    let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / dim as f64;
                    let of = run.slots.cloned().unwrap_or_default();
                    for (i, found) in y[row * dim..][..dim].iter().enumerate() {
                        let weight = of.weight.as_ref().unwrap_or(&weight)[i];
                        let shift = of.shift.as_ref().map_or(0.0, |shift| shift[i]);
                        let expected = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight) + f64::from(shift);
                        prop_assert!((f64::from(*found) - expected).abs() < 1e-4 * expected.abs().max(1.0));
                    }
                }
            }
        }
    }
}
