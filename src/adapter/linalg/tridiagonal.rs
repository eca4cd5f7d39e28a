//! Eigenvalues and eigenvectors of a symmetric tridiagonal matrix.

use std::ops::Range;

use super::dot;

/// Most QL steps for one eigenvalue; two or three are usual.
const STEPS_MAX: usize = 60;
/// Most inverse iterations for one eigenvector; two are usual.
const ITERATIONS_MAX: usize = 8;
/// Vectors of eigenvalues closer than this share of the largest are made orthogonal to each other. Those of others are by
/// themselves, up to the precision of f64 divided by this.
const CLOSE: f64 = 1e-6;
/// Largest element of `T x - value x` for an eigenvector, relative to the largest eigenvalue; a few roundings are usual.
const RESIDUAL_MAX: f64 = 1e-13;

/// The matrix.
#[derive(Debug)]
pub(super) struct Tridiagonal {
    pub(super) diagonal: Vec<f64>,
    /// Beside the diagonal, one element less.
    pub(super) off: Vec<f64>,
}

impl Tridiagonal {
    /// All eigenvalues in ascending order.
    pub(super) fn eigenvalues(&self) -> Vec<f64> {
        let n = self.diagonal.len();
        let mut d = self.diagonal.clone();
        let mut e: Vec<f64> = self.off.iter().copied().chain([0.0]).collect();
        for low in 0..n {
            for _ in 0..STEPS_MAX {
                let small = |at: &usize| e[*at].abs() <= f64::EPSILON * (d[*at].abs() + d[at + 1].abs());
                let high = (low..n - 1).find(small).unwrap_or(n - 1);
                if high == low {
                    break;
                }
                step(&mut d, &mut e, (low, high));
            }
        }
        d.sort_by(f64::total_cmp);
        d
    }

    /// Orthonormal eigenvectors of the eigenvalues in `which`; `values` are all, ascending.
    pub(super) fn eigenvectors(&self, values: &[f64], which: Range<usize>) -> Vec<Vec<f64>> {
        let n = values.len();
        // What is divided by the smallest pivot must stay finite, even for a matrix of zeros.
        let least = f64::MIN_POSITIVE / f64::EPSILON;
        let most = values.iter().fold(least, |most, value| most.max(value.abs()));
        let mut random = Random(1);
        let mut found: Vec<Vec<f64>> = Vec::with_capacity(which.len());
        for at in which.clone() {
            let value = values[at];
            let factors = Factors::new(self, value, f64::EPSILON * most);
            let is_close = |other: &usize| value - values[*other] <= CLOSE * most;
            let close = &found[(which.start..at).find(is_close).unwrap_or(at) - which.start..];
            let mut x: Vec<f64> = (0..n).map(|_| random.next()).collect();
            let mut good = 0;
            for _ in 0..ITERATIONS_MAX {
                factors.solve(&mut x);
                normalise(&mut x);
                // Once leaves what the first pass lost to rounding.
                for other in close.iter().chain(close) {
                    let share = dot(other, &x);
                    x.iter_mut().zip(other).for_each(|(x, other)| *x -= share * other);
                }
                normalise(&mut x);
                good += usize::from(self.residual(value, &x) <= RESIDUAL_MAX * most);
                if good == 2 {
                    break;
                }
            }
            found.push(x);
        }
        found
    }

    /// The largest element of `T x - value x`.
    fn residual(&self, value: f64, x: &[f64]) -> f64 {
        let at = |vector: &[f64], k: Option<usize>| k.and_then(|k| vector.get(k)).copied().unwrap_or_default();
        let row = |k: usize| {
            let before = k.checked_sub(1);
            let beside = at(&self.off, before) * at(x, before) + at(&self.off, Some(k)) * at(x, Some(k + 1));
            (self.diagonal[k] - value) * x[k] + beside
        };
        (0..x.len()).map(|k| row(k).abs()).fold(0.0, f64::max)
    }
}

/// One implicit QL step on the block `low..=high`; `e` has a last element that means nothing.
fn step(d: &mut [f64], e: &mut [f64], (low, high): (usize, usize)) {
    let delta = (d[low + 1] - d[low]) / (2.0 * e[low]);
    let root = delta.hypot(1.0);
    let mut g = d[high] - d[low] + e[low] / (delta + if delta < 0.0 { -root } else { root });
    let (mut sine, mut cosine, mut p) = (1.0, 1.0, 0.0);
    for at in (low..high).rev() {
        let (f, b) = (sine * e[at], cosine * e[at]);
        let r = f.hypot(g);
        e[at + 1] = r;
        if r == 0.0 {
            d[at + 1] -= p;
            e[high] = 0.0;
            return;
        }
        (sine, cosine) = (f / r, g / r);
        g = d[at + 1] - p;
        let r = (d[at] - g) * sine + 2.0 * cosine * b;
        p = sine * r;
        d[at + 1] = g + p;
        g = cosine * r - b;
    }
    d[low] -= p;
    e[low] = g;
    e[high] = 0.0;
}

/// `T - value` as a product of row exchanges, a lower and an upper matrix.
struct Factors {
    /// The upper matrix by rows: the diagonal and the two elements behind it.
    upper: Vec<[f64; 3]>,
    /// How often a row is subtracted from the next one, and whether the two change places before.
    lower: Vec<(f64, bool)>,
}

impl Factors {
    /// Pivots below `tiny` are made `tiny`: the matrix is singular, up to rounding.
    fn new(t: &Tridiagonal, value: f64, tiny: f64) -> Self {
        let n = t.diagonal.len();
        let (mut upper, mut lower) = (Vec::with_capacity(n), Vec::with_capacity(n));
        let off = |at: usize| t.off.get(at).copied().unwrap_or_default();
        let (mut p, mut q) = (t.diagonal[0] - value, off(0));
        for at in 0..n - 1 {
            let (a, b, c) = (off(at), t.diagonal[at + 1] - value, off(at + 1));
            if a.abs() > p.abs() {
                let share = p / a;
                upper.push([a, b, c]);
                lower.push((share, true));
                (p, q) = (q - share * b, -share * c);
            } else {
                let share = if p == 0.0 { 0.0 } else { a / p };
                upper.push([p, q, 0.0]);
                lower.push((share, false));
                (p, q) = (b - share * q, c);
            }
        }
        upper.push([p, 0.0, 0.0]);
        upper.iter_mut().filter(|row| row[0].abs() < tiny).for_each(|row| row[0] = tiny);
        Self { upper, lower }
    }

    /// `x` becomes `(T - value)^-1 x`.
    fn solve(&self, x: &mut [f64]) {
        for (at, (share, exchanged)) in self.lower.iter().enumerate() {
            if *exchanged {
                x.swap(at, at + 1);
            }
            x[at + 1] -= share * x[at];
        }
        let (mut next, mut second) = (0.0, 0.0);
        for (x, [p, q, r]) in x.iter_mut().zip(&self.upper).rev() {
            *x = (*x - q * next - r * second) / p;
            (next, second) = (*x, next);
        }
    }
}

/// Brings `x` to length one; divides by the largest element first, whose square may be too large.
fn normalise(x: &mut [f64]) {
    let most = x.iter().fold(f64::MIN_POSITIVE, |most, x| most.max(x.abs()));
    x.iter_mut().for_each(|x| *x /= most);
    let norm = dot(x, x).sqrt().max(f64::MIN_POSITIVE);
    x.iter_mut().for_each(|x| *x /= norm);
}

/// Where the iterations start: anything that is orthogonal to no eigenvector, the same each time.
struct Random(u64);

impl Random {
    /// From -0.5 to 0.5.
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64 - 0.5
    }
}
