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
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::dispatch::{dispatch, fma};
use super::isa::Isa;
use super::memory::Memory;
use super::words::LANES;

/// A matrix (m b, n b) of circulant blocks.
#[derive(Debug)]
pub struct Circulant {
    /// Blocks below one another, and side by side.
    m: usize,
    n: usize,
    /// Length of a block, and the same padded to whole vectors.
    b: usize,
    padded: usize,
    /// Transforms of the blocks' first columns, divided by b, (m, n, padded).
    spectra: Memory<f32>,
    table: Arc<Table>,
}

/// `(cos + sin)(2 pi j k / b)`, (b, padded).
#[derive(Debug)]
struct Table(Vec<f32>);

/// The tables in use by length of a block: one for all matrices.
static TABLES: Mutex<BTreeMap<usize, Weak<Table>>> = Mutex::new(BTreeMap::new());

impl Table {
    /// The table of blocks of length b, whose numbers `cas` are.
    fn of(b: usize, cas: &[f64]) -> Arc<Self> {
        let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = tables.get(&b).and_then(Weak::upgrade) {
            return table;
        }
        tables.retain(|_, table| table.strong_count() > 0);
        let padded = b.next_multiple_of(LANES);
        let mut values = vec![0.0; b * padded];
        for (j, row) in values.chunks_exact_mut(padded).enumerate() {
            row[..b].iter_mut().enumerate().for_each(|(k, value)| *value = cas[j * k % b] as f32);
        }
        let table = Arc::new(Self(values));
        tables.insert(b, Arc::downgrade(&table));
        table
    }
}

/// Working memory of a thread: what one row becomes, blocks of the padded length.
#[derive(Default)]
struct Scratch {
    /// Transforms of the inputs, then those of the outputs.
    spectrum: Vec<f32>,
    /// Halves of the inputs' transforms: the same read backwards, and of the other sign.
    even: Vec<f32>,
    odd: Vec<f32>,
    /// Sums of one block of outputs over the even and the odd parts.
    plus: Vec<f32>,
    minus: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Circulant {
    /// From the first rows (m, n, b) of the blocks.
    ///
    /// # Panics
    /// When the kernel's length is not `m n b`, or b is zero.
    pub fn new(kernel: &[f32], (m, n, b): (usize, usize, usize)) -> Self {
        assert!(kernel.len() == m * n * b && b > 0, "the kernel has the shape");
        let padded = b.next_multiple_of(LANES);
        let cas: Vec<f64> = (0..b)
            .map(|at| {
                let (sin, cos) = (std::f64::consts::TAU * at as f64 / b as f64).sin_cos();
                cos + sin
            })
            .collect();
        let mut spectra = Memory::<f32>::zeros(m * n * padded).expect("memory for an adapter");
        for (row, spectrum) in kernel.chunks_exact(b).zip(spectra.chunks_exact_mut(padded)) {
            // The first column is the first row backwards, but for its first entry.
            for (k, value) in spectrum[..b].iter_mut().enumerate() {
                let terms = (0..b).map(|j| f64::from(row[(b - j) % b]) * cas[j * k % b]);
                *value = (terms.sum::<f64>() / b as f64) as f32;
            }
        }
        Self { m, n, b, padded, spectra, table: Table::of(b, &cas) }
    }

    /// Number of outputs.
    pub(super) fn num_outputs(&self) -> usize {
        self.m * self.b
    }

    /// `y = C x` for each row of `x` (rows, n b); y: (rows, m b). A row's bits depend on that row only.
    pub(super) fn multiply(&self, x: &[f32], y: &mut [f32]) {
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.spectrum.resize(self.m.max(self.n) * self.padded, 0.0);
            scratch.even.resize(self.n * self.padded, 0.0);
            scratch.odd.resize(self.n * self.padded, 0.0);
            scratch.plus.resize(self.padded, 0.0);
            scratch.minus.resize(self.padded, 0.0);
            for (x, y) in x.chunks_exact(self.n * self.b).zip(y.chunks_exact_mut(self.m * self.b)) {
                multiply_row(Isa::best(), self, x, scratch, y);
            }
        });
    }
}

dispatch! {
    fn multiply_row(c: &Circulant, x: &[f32], scratch: &mut Scratch, y: &mut [f32]) => multiply_row_body
}

#[inline(always)]
fn multiply_row_body<const FMA: bool>(c: &Circulant, x: &[f32], scratch: &mut Scratch, y: &mut [f32]) {
    let Scratch { spectrum, even, odd, plus, minus } = scratch;
    let (b, padded) = (c.b, c.padded);
    transform::<FMA>(c, (x, b), (spectrum, padded));
    let parts = even.chunks_exact_mut(padded).zip(odd.chunks_exact_mut(padded));
    for (spectrum, (even, odd)) in spectrum.chunks_exact(padded).zip(parts) {
        (even[0], odd[0]) = (spectrum[0], 0.0);
        let (forward, backward) = (&spectrum[1..b], spectrum[1..b].iter().rev());
        for (((even, odd), value), mirrored) in even[1..b].iter_mut().zip(&mut odd[1..b]).zip(forward).zip(backward) {
            *even = 0.5 * (value + mirrored);
            *odd = 0.5 * (value - mirrored);
        }
        even[b..].fill(0.0);
        odd[b..].fill(0.0);
    }
    for (spectra, mixed) in c.spectra.chunks_exact(c.n * padded).zip(spectrum.chunks_exact_mut(padded)) {
        mix::<FMA>(spectra, (even, odd), (plus, minus));
        // The odd part changes its sign where the spectrum is read backwards.
        mixed[0] = plus[0] - minus[0];
        for ((mixed, plus), minus) in mixed[1..b].iter_mut().zip(&plus[1..b]).zip(minus[1..b].iter().rev()) {
            *mixed = plus - minus;
        }
    }
    transform::<FMA>(c, (&spectrum[..c.m * padded], padded), (y, b));
}

/// Sums the products of one row of blocks' spectra with the parts of the inputs, over the blocks in turn.
#[inline(always)]
fn mix<const FMA: bool>(spectra: &[f32], (even, odd): (&[f32], &[f32]), (plus, minus): (&mut [f32], &mut [f32])) {
    let (plus, _) = plus.as_chunks_mut::<LANES>();
    let (minus, _) = minus.as_chunks_mut::<LANES>();
    let vectors = plus.len();
    let (spectra, even, odd) =
        (spectra.as_chunks::<LANES>().0, even.as_chunks::<LANES>().0, odd.as_chunks::<LANES>().0);
    for (at, (plus, minus)) in plus.iter_mut().zip(minus).enumerate() {
        let (mut sums, mut differences) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        let parts = even.iter().zip(odd).zip(spectra).skip(at).step_by(vectors);
        for ((even, odd), spectrum) in parts {
            for ((sum, spectrum), even) in sums.iter_mut().zip(spectrum).zip(even) {
                *sum = fma::<FMA>(*spectrum, *even, *sum);
            }
            for ((difference, spectrum), odd) in differences.iter_mut().zip(spectrum).zip(odd) {
                *difference = fma::<FMA>(*spectrum, *odd, *difference);
            }
        }
        (*plus, *minus) = (sums, differences);
    }
}

/// The Hartley transforms of blocks that lie a stride apart, likewise in `spectra`, whose stride decides how much of a
/// padded block is kept. One chain over ascending `j` per output.
#[inline(always)]
fn transform<const FMA: bool>(c: &Circulant, (x, from): (&[f32], usize), (spectra, to): (&mut [f32], usize)) {
    for (x, spectrum) in x.chunks_exact(from).zip(spectra.chunks_exact_mut(to)) {
        spectrum.fill(0.0);
        let (fours, rest) = x[..c.b].as_chunks::<4>();
        let (four_rows, rest_rows) = c.table.0.split_at(fours.len() * 4 * c.padded);
        for (x, rows) in fours.iter().zip(four_rows.chunks_exact(4 * c.padded)) {
            // Four at a time spare most of the sums' way through memory.
            let (first, others) = rows.split_at(c.padded);
            let (second, others) = others.split_at(c.padded);
            let (third, fourth) = others.split_at(c.padded);
            let rows = first.iter().zip(second).zip(third.iter().zip(fourth));
            for (sum, ((first, second), (third, fourth))) in spectrum.iter_mut().zip(rows) {
                let half = fma::<FMA>(x[1], *second, fma::<FMA>(x[0], *first, *sum));
                *sum = fma::<FMA>(x[3], *fourth, fma::<FMA>(x[2], *third, half));
            }
        }
        for (x, row) in rest.iter().zip(rest_rows.chunks_exact(c.padded)) {
            for (sum, cas) in spectrum.iter_mut().zip(row) {
                *sum = fma::<FMA>(*x, *cas, *sum);
            }
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
