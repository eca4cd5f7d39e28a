//! Matrices of circulant blocks, applied by Hartley transforms.
//!
//! The discrete Hartley transform of b numbers is real and, but for a factor of b, its own inverse:
//! `X[k] = sum_j x[j] (cos + sin)(2 pi j k / b)`. A circulant block is a convolution with its first column, and for the
//! convolution of w and x, with indexes modulo b,
//!
//! ```text
//! Z[k] = W[k] (X[k] + X[-k]) / 2 + W[-k] (X[k] - X[-k]) / 2
//! ```
//!
//! so a block costs 2 b multiplications instead of b^2, and the transforms of inputs and outputs are shared by all blocks.

use std::cell::RefCell;

use super::dispatch::{dispatch, fma};
use super::isa::Isa;

/// A matrix (m b, n b) of circulant blocks.
#[derive(Debug)]
pub struct Circulant {
    /// Blocks below one another, and side by side.
    m: usize,
    n: usize,
    /// Length of a block.
    b: usize,
    /// Transforms of the blocks' first columns, divided by b, (m, n, b).
    spectra: Vec<f32>,
    /// `(cos + sin)(2 pi j k / b)`, (b, b).
    table: Vec<f32>,
}

thread_local! {
    /// Even and odd parts of the rows' transforms.
    static PARTS: RefCell<Vec<f32>> = RefCell::default();
}

impl Circulant {
    /// From the first rows (m, n, b) of the blocks.
    ///
    /// # Panics
    /// When the kernel's length is not `m n b`, or b is zero.
    pub fn new(kernel: &[f32], (m, n, b): (usize, usize, usize)) -> Self {
        assert!(kernel.len() == m * n * b && b > 0, "the kernel has the shape");
        let cas: Vec<f64> = (0..b)
            .map(|at| {
                let (sin, cos) = (std::f64::consts::TAU * at as f64 / b as f64).sin_cos();
                cos + sin
            })
            .collect();
        let table: Vec<f32> = (0..b * b).map(|at| cas[(at / b) * (at % b) % b] as f32).collect();
        let mut spectra = Vec::with_capacity(kernel.len());
        for row in kernel.chunks_exact(b) {
            // The first column is the first row backwards, but for its first entry.
            spectra.extend((0..b).map(|k| {
                let terms = (0..b).map(|j| f64::from(row[(b - j) % b]) * cas[j * k % b]);
                (terms.sum::<f64>() / b as f64) as f32
            }));
        }
        Self { m, n, b, spectra, table }
    }

    /// Number of outputs.
    pub(super) fn num_outputs(&self) -> usize {
        self.m * self.b
    }

    /// `y = C x` for each row of `x` (rows, n b); y: (rows, m b). A row's bits depend on that row only.
    pub(super) fn multiply(&self, x: &[f32], y: &mut [f32]) {
        PARTS.with_borrow_mut(|parts| {
            parts.resize(2 * x.len(), 0.0);
            multiply(Isa::best(), self, x, parts, y);
        });
    }
}

dispatch! {
    fn multiply(c: &Circulant, x: &[f32], parts: &mut [f32], y: &mut [f32]) => multiply_body
}

#[inline(always)]
fn multiply_body<const FMA: bool>(c: &Circulant, x: &[f32], parts: &mut [f32], y: &mut [f32]) {
    let (b, width) = (c.b, c.n * c.b);
    let mut spectrum = vec![0.0; b];
    let (even, odd) = parts.split_at_mut(x.len());
    for ((x, even), odd) in x.chunks_exact(b).zip(even.chunks_exact_mut(b)).zip(odd.chunks_exact_mut(b)) {
        transform::<FMA>(x, &c.table, &mut spectrum);
        for k in 0..b {
            let mirrored = spectrum[(b - k) % b];
            even[k] = 0.5 * (spectrum[k] + mirrored);
            odd[k] = 0.5 * (spectrum[k] - mirrored);
        }
    }
    let (mut plus, mut minus) = (vec![0.0; b], vec![0.0; b]);
    for (block, spectra) in c.spectra.chunks_exact(width).enumerate() {
        let rows = even.chunks_exact(width).zip(odd.chunks_exact(width)).zip(y.chunks_exact_mut(c.m * b));
        for ((even, odd), y) in rows {
            plus.fill(0.0);
            minus.fill(0.0);
            let parts = even.chunks_exact(b).zip(odd.chunks_exact(b));
            for (spectrum, (even, odd)) in spectra.chunks_exact(b).zip(parts) {
                for k in 0..b {
                    plus[k] = fma::<FMA>(spectrum[k], even[k], plus[k]);
                    minus[k] = fma::<FMA>(spectrum[k], odd[k], minus[k]);
                }
            }
            // The odd part changes its sign where the spectrum is read backwards.
            for k in 0..b {
                spectrum[k] = plus[k] - minus[(b - k) % b];
            }
            transform::<FMA>(&spectrum, &c.table, &mut y[block * b..(block + 1) * b]);
        }
    }
}

/// The Hartley transform of `x` (b).
#[inline(always)]
fn transform<const FMA: bool>(x: &[f32], table: &[f32], spectrum: &mut [f32]) {
    spectrum.fill(0.0);
    for (x, row) in x.iter().zip(table.chunks_exact(x.len())) {
        for (sum, cas) in spectrum.iter_mut().zip(row) {
            *sum = fma::<FMA>(*x, *cas, *sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::cpu::testing::random;

    proptest! {
        #[test]
        fn equals_the_matrix_and_a_row_has_the_same_bits_alone(
            rows in 1_usize..5, m in 1_usize..4, n in 1_usize..4, b in 1_usize..40, seed: u64,
        ) {
            let (x, kernel) = (random(rows * n * b, seed), random(m * n * b, !seed));
            let c = Circulant::new(&kernel, (m, n, b));
            let mut y = vec![f32::NAN; rows * m * b];
            c.multiply(&x, &mut y);
            for (row, y) in y.chunks_exact(m * b).enumerate() {
                let x = &x[row * n * b..][..n * b];
                let mut alone = vec![f32::NAN; m * b];
                c.multiply(x, &mut alone);
                prop_assert_eq!(&y, &alone);
                for (at, found) in y.iter().enumerate() {
                    let (block, t) = (at / b, at % b);
                    let product = |from: usize| kernel[(block * n + from / b) * b + (from % b + b - t) % b] * x[from];
                    let expected: f64 = (0..n * b).map(|from| f64::from(product(from))).sum();
                    // Sums of up to 120 products in [-1, 1] by transforms of up to 40 numbers.
                    prop_assert!((f64::from(*found) - expected).abs() < 1e-4, "{found} {expected}");
                }
            }
        }
    }
}
