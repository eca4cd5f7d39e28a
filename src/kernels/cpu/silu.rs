//! The gated activation.

use super::dispatch::dispatch;
use super::exp::exp;
use super::isa::Isa;
use super::pool::for_ranges;
use super::shared::Shared;

/// Elements per task.
const GRAIN: usize = 1 << 14;

/// `y = silu(first half) * second half` of each row of `x` (rows, 2 n); y: (rows, n).
///
/// # Panics
/// When lengths do not fit.
pub(super) fn silu_mul_rows(x: &[f32], n: usize, y: &mut [f32]) {
    assert_eq!(x.len(), 2 * y.len(), "y is half of x");
    let y = Shared::new(y);
    for_ranges(x.len() / (2 * n), GRAIN / n, |rows| {
        #[expect(unsafe_code, reason = "tasks write disjoint rows")]
        // SAFETY: a task has rows of its own.
        let y = unsafe { y.part(rows.start * n..rows.end * n) };
        for (x, y) in x[rows.start * 2 * n..].chunks_exact(2 * n).zip(y.chunks_exact_mut(n)) {
            silu_mul(Isa::best(), &x[..n], &x[n..], y);
        }
    });
}

dispatch! {
    /// `y = silu(gate) * up` elementwise, `silu(g) = g / (1 + e^-g)`.
    pub(super) fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) => silu_mul_body
}

#[inline(always)]
fn silu_mul_body<const FMA: bool>(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, g), up) in y.iter_mut().zip(gate).zip(up) {
        // The exponential of a number that is not positive, whatever the sign of g.
        let e = exp::<FMA>(-g.abs());
        let sigmoid = if *g < 0.0 { e } else { 1.0 } / (1.0 + e);
        *y = g * sigmoid * up;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::testing::random;

    #[test]
    fn equals_the_formula_in_f64() {
        let mut gate: Vec<f32> = random(1000, 1).iter().map(|v| v * 30.0).collect();
        gate.extend([0.0, -0.0, 90.0, -90.0, 1e30, -1e30]);
        let up = random(gate.len(), 2);
        for isa in Isa::available() {
            let mut y = vec![f32::NAN; gate.len()];
            silu_mul(isa, &gate, &up, &mut y);
            for ((found, g), up) in y.iter().zip(&gate).zip(&up) {
                let g = f64::from(*g);
                let expected = g / (1.0 + (-g).exp()) * f64::from(*up);
                let error = (f64::from(*found) - expected).abs();
                assert!(error <= 1e-6 * expected.abs() + 1e-30, "{isa:?} {g} {found} {expected}");
            }
        }
    }

    #[test]
    fn numbers_that_are_none_stay_none() {
        let mut y = [0.0; 2];
        silu_mul(Isa::best(), &[f32::NAN, 1.0], &[1.0, f32::NAN], &mut y);
        assert!(y.iter().all(|y| y.is_nan()));
    }
}
