//! Matrices of blocks that are products: blocks of inputs times matrices, mixed, and blocks of outputs from that.
//!
//! ```text
//! g_j = a_j x_j          h = mix(g)          y_i = b_i h_i
//! ```
//!
//! What the blocks have in common, or of their own, is read once: the matrices of inputs and the mix before the sweep, and
//! the matrices of outputs too when the blocks share one; those that each block has of its own lie in panels as a low-rank
//! term's do, and are multiplied in the sweep.

#![expect(unsafe_code, reason = "threads write disjoint parts of the outputs")]

use std::cell::RefCell;

use super::dispatch::{dispatch, fma};
use super::expand::{expand, expand_panels};
use super::gemm::Target;
use super::isa::Isa;
use super::packed::{PANEL, PackedMatrix, WeightFormat};
use super::rows::{RowMatrix, dot_rows};
use super::slots::{Outputs, add_outputs};
use super::words::{LANES, row_words, write_row};

/// Numbers of a block that are mixed together; they fill a register of AVX2.
const MIXED: usize = 8;
/// Blocks that are mixed together.
const MIXED_BLOCKS: usize = 4;

/// Matrices of one shape, row-major one after the other, and how many, of how many rows and columns.
pub type Matrices<'a> = (&'a [f32], (usize, usize, usize));

/// How blocks are mixed.
#[derive(Debug)]
pub enum PackedMix {
    /// `h[i, s] = sum_j w[i, j] g[j, s]`.
    Matrix {
        /// The matrix (p, n).
        w: Vec<f32>,
        /// Blocks of outputs.
        p: usize,
    },
    /// Of n blocks to n: `h[i, j*c + s] = g[j, i*c + s]` with `c = r / n`.
    Exchange,
}

/// A matrix (p q, n d) of blocks in factors.
#[derive(Debug)]
pub struct BlockProduct {
    /// Blocks of inputs, and of outputs.
    n: usize,
    p: usize,
    /// Numbers of a block between the factors.
    r: usize,
    /// One for each block of inputs, or one for all; the rows are padded with zeros to whole vectors.
    a: Vec<RowMatrix>,
    mix: PackedMix,
    b: Ups,
}

/// The matrices of the blocks of outputs.
#[derive(Debug)]
enum Ups {
    /// The mixed blocks are the outputs.
    None,
    /// All blocks have this one (q, r).
    Shared(PackedMatrix),
    /// One below the other (p q, r).
    Own(PackedMatrix),
}

/// Working memory of a thread.
#[derive(Default)]
struct Scratch {
    /// Blocks of inputs, (n, rows, words).
    words: Vec<u32>,
    /// Their products, (n, rows, padded r).
    products: Vec<f32>,
    /// The mixed blocks, (rows, p r).
    mixed: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static GATHERED: RefCell<Vec<f32>> = RefCell::default();
}

impl BlockProduct {
    /// From the matrices of inputs (n or 1, r, d), the mix, and the matrices of outputs (p or 1, q, r).
    ///
    /// # Errors
    /// When the memory cannot be had.
    ///
    /// # Panics
    /// When the shapes do not fit one another.
    pub fn new(
        format: WeightFormat,
        (a, (count, r, d)): Matrices<'_>,
        mix: PackedMix,
        b: Option<Matrices<'_>>,
    ) -> std::io::Result<Self> {
        let (n, p) = match &mix {
            PackedMix::Matrix { w, p } => (w.len() / p, *p),
            PackedMix::Exchange => (count, count),
        };
        assert!(a.len() == count * r * d && (count == 1 || count == n), "a matrix for each of {n} blocks, or for all");
        assert!(
            matches!(mix, PackedMix::Matrix { .. }) || r.is_multiple_of(n),
            "each block has a part for every other"
        );
        let padded = r.next_multiple_of(LANES);
        let pack = |matrix: &[f32]| {
            let mut rows = matrix.to_vec();
            rows.resize(padded * d, 0.0);
            RowMatrix::new(format, &rows, padded, d)
        };
        let a = a.chunks_exact(r * d).map(pack).collect();
        let b = match b {
            None => Ups::None,
            Some((values, (count, q, width))) => {
                assert!(width == r && (count == 1 || count == p), "a matrix for each of {p} blocks, or for all");
                let row = |at: usize| &values[at * r..][..r];
                let packed = match format {
                    WeightFormat::F32 => PackedMatrix::from_f32(count * q, r, row),
                    WeightFormat::Bf16 => PackedMatrix::rounded(count * q, r, row),
                }?;
                if count == p { Ups::Own(packed) } else { Ups::Shared(packed) }
            }
        };
        Ok(Self { n, p, r, a, mix, b })
    }

    /// The matrices of outputs that are multiplied in the sweep.
    pub(super) fn up(&self) -> Option<&PackedMatrix> {
        match &self.b {
            Ups::Own(b) => Some(b),
            Ups::Shared(_) | Ups::None => None,
        }
    }

    /// Elements per row of its short vectors: the mixed blocks, or the outputs when these are computed before the sweep.
    pub(super) fn short_len(&self) -> usize {
        match &self.b {
            Ups::Own(_) | Ups::None => self.p * self.r,
            Ups::Shared(b) => self.p * b.n(),
        }
    }

    /// Whether its matrices are small beside what a row takes.
    pub(super) fn computes_by_row(&self) -> bool {
        self.a.len() == 1
    }

    /// The short vectors of each row of `x` (rows, n d). A row's bits depend on that row only.
    pub(super) fn shrink(&self, x: &[f32], short: &mut [f32]) {
        let isa = Isa::best();
        let (d, format, padded) = (self.a[0].k(), self.a[0].format(), self.a[0].r());
        let (rows, width) = (x.len() / (self.n * d), row_words(format, d));
        SCRATCH.with_borrow_mut(|Scratch { words, products, mixed }| {
            words.resize(self.n * rows * width, 0);
            products.resize(self.n * rows * padded, 0.0);
            for (at, block) in x.chunks_exact(d).enumerate() {
                let (row, j) = (at / self.n, at % self.n);
                write_row(isa, format, block, &mut words[(j * rows + row) * width..][..width]);
            }
            let each = self.n / self.a.len() * rows;
            let blocks = words.chunks_exact(each * width).zip(products.chunks_exact_mut(each * padded));
            for (a, (words, products)) in self.a.iter().zip(blocks) {
                dot_rows(isa, words, a, products);
            }
            let Ups::Shared(b) = &self.b else { return self.mix(isa, rows, products, short) };
            mixed.resize(rows * self.p * self.r, 0.0);
            self.mix(isa, rows, products, mixed);
            for (h, y) in mixed.chunks_exact(self.p * self.r).zip(short.chunks_exact_mut(self.p * b.n())) {
                expand_shared(h, b, y);
            }
        });
    }

    /// The mixed blocks h (rows, p r) from the products g (n, rows, padded r).
    fn mix(&self, isa: Isa, rows: usize, g: &[f32], h: &mut [f32]) {
        let (r, padded) = (self.r, self.a[0].r());
        for (row, h) in h.chunks_exact_mut(self.p * r).enumerate() {
            match &self.mix {
                PackedMix::Matrix { w, .. } => mix_row(isa, (w, self.n), (&g[row * padded..], rows * padded), r, h),
                PackedMix::Exchange => {
                    let c = r / self.n;
                    for (at, part) in h.chunks_exact_mut(c).enumerate() {
                        let (i, j) = (at / self.n, at % self.n);
                        part.copy_from_slice(&g[(j * rows + row) * padded + i * c..][..c]);
                    }
                }
            }
        }
    }

    /// Adds a run's part in a panel of outputs, from the short vectors of its rows.
    ///
    /// # Safety
    /// Nobody else may use the outputs meanwhile.
    pub(super) unsafe fn add(&self, short: &[f32], outputs: &Outputs<'_>) {
        let Ups::Own(b) = &self.b else {
            // SAFETY: the caller's contract.
            return unsafe { add_outputs(short, self.short_len(), outputs) };
        };
        let (width, q) = (self.p * self.r, b.n() / self.p);
        let (first, end) = (outputs.first, outputs.first + outputs.columns);
        let (from, to) = outputs.rows;
        if first / q == (end - 1) / q {
            let of_block = first / q * self.r..(first / q + 1) * self.r;
            GATHERED.with_borrow_mut(|h| {
                h.clear();
                short.chunks_exact(width).for_each(|short| h.extend_from_slice(&short[of_block.clone()]));
                assert_eq!(h.len(), (to - from) * self.r, "short vectors for the rows of the outputs");
                // SAFETY: the caller's contract; the outputs hold the rows.
                unsafe { expand_panels(h, b, first / PANEL, outputs.target(from), outputs.columns, false) };
            });
            return;
        }
        for (row, short) in (from..to).zip(short.chunks_exact(width)) {
            // SAFETY: the caller's contract; one row at a time.
            let y = unsafe { outputs.row(row) };
            for (i, h) in short.chunks_exact(self.r).enumerate().take((end - 1) / q + 1).skip(first / q) {
                let (begin, end) = ((i * q).max(first), (i * q + q).min(end));
                expand(Isa::best(), h, b, begin, &mut y[begin - first..end - first]);
            }
        }
    }
}

/// Each block of h (p, r) times one matrix b (q, r): y (p, q).
fn expand_shared(h: &[f32], b: &PackedMatrix, y: &mut [f32]) {
    let (q, r) = (b.n(), b.k());
    assert_eq!(h.len() / r, y.len() / q, "y has the blocks of h");
    // SAFETY: y has a row for each of h's, and is borrowed for as long.
    unsafe { expand_panels(h, b, 0, Target { y: y.as_mut_ptr(), stride: q }, q, true) };
}

dispatch! {
    /// `h[i, s] = sum_j w[i, j] g[j, s]`, w: (p, n), g: n rows of r numbers at a stride, padded to whole vectors; h: (p, r).
    fn mix_row(w: (&[f32], usize), g: (&[f32], usize), r: usize, h: &mut [f32]) => mix_row_body
}

#[inline(always)]
fn mix_row_body<const FMA: bool>((w, n): (&[f32], usize), (g, stride): (&[f32], usize), r: usize, h: &mut [f32]) {
    for (w, h) in w.chunks(MIXED_BLOCKS * n).zip(h.chunks_mut(MIXED_BLOCKS * r)) {
        for from in (0..r).step_by(MIXED) {
            let mut sums = [[0.0_f32; MIXED]; MIXED_BLOCKS];
            // Blocks that are not there repeat the first one.
            let row = |i: usize| if i * n < w.len() { &w[i * n..][..n] } else { &w[..n] };
            let rows = row(0).iter().zip(row(1)).zip(row(2).iter().zip(row(3)));
            for (g, ((w0, w1), (w2, w3))) in g.chunks(stride).zip(rows) {
                let Some(g) = g[from..].first_chunk::<MIXED>() else { break };
                add_scaled::<FMA>(*w0, g, &mut sums[0]);
                add_scaled::<FMA>(*w1, g, &mut sums[1]);
                add_scaled::<FMA>(*w2, g, &mut sums[2]);
                add_scaled::<FMA>(*w3, g, &mut sums[3]);
            }
            for (h, sums) in h.chunks_exact_mut(r).zip(&sums) {
                h[from..].iter_mut().zip(sums).for_each(|(h, sum)| *h = *sum);
            }
        }
    }
}

/// `sums += w g`.
#[inline(always)]
fn add_scaled<const FMA: bool>(w: f32, g: &[f32; MIXED], sums: &mut [f32; MIXED]) {
    for (sum, g) in sums.iter_mut().zip(g) {
        *sum = fma::<FMA>(w, *g, *sum);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::cpu::testing::random;

    /// The short vectors of one row by the formula, in f64.
    fn plain(x: &[f32], (a, (count, r, d)): Matrices<'_>, mix: &PackedMix, b: Option<Matrices<'_>>) -> Vec<f64> {
        let dot = |u: &[f32], v: &[f64]| u.iter().zip(v).map(|(u, v)| f64::from(*u) * v).sum::<f64>();
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let n = x.len() / d;
        let g = |j: usize, s: usize| dot(&a[(j % count * r + s) * d..][..d], &x[j * d..][..d]);
        let h: Vec<f64> = match mix {
            PackedMix::Matrix { w, p } => (0..p * r)
                .map(|at| dot(&w[at / r * n..][..n], &(0..n).map(|j| g(j, at % r)).collect::<Vec<_>>()))
                .collect(),
            PackedMix::Exchange => {
                let c = r / n;
                (0..n * r).map(|at| g(at % r / c, at / r * c + at % c)).collect()
            }
        };
        match b {
            Some((b, (1, q, _))) if h.len() > r => {
                (0..h.len() / r * q).map(|at| dot(&b[at % q * r..][..r], &h[at / q * r..][..r])).collect()
            }
            _ => h,
        }
    }

    proptest! {
        #[test]
        fn equals_the_formula_and_a_row_has_the_same_bits_alone(
            rows in 1_usize..5, (n, p, d) in (1_usize..7, 1_usize..12, 1_usize..40), (r, q) in (1_usize..40, 1_usize..150),
            (exchange, shared, outputs) in any::<(bool, bool, u8)>(), seed: u64,
        ) {
            let (p, r) = if exchange { (n, r.next_multiple_of(n)) } else { (p, r) };
            let count = if shared && !exchange { 1 } else { n };
            let a = random(count * r * d, seed);
            let mix = || if exchange { PackedMix::Exchange } else { PackedMix::Matrix { w: random(p * n, seed ^ 1), p } };
            let ups = [0, 1, p][usize::from(outputs) % 3];
            let b = random(ups * q * r, seed ^ 2);
            let b = (ups > 0).then_some((b.as_slice(), (ups, q, r)));
            let product = BlockProduct::new(WeightFormat::F32, (&a, (count, r, d)), mix(), b).expect("memory");
            let x = random(rows * n * d, seed ^ 3);
            let mut short = vec![f32::NAN; rows * product.short_len()];
            product.shrink(&x, &mut short);
            for (x, short) in x.chunks_exact(n * d).zip(short.chunks_exact(product.short_len())) {
                let mut alone = vec![f32::NAN; product.short_len()];
                product.shrink(x, &mut alone);
                prop_assert_eq!(&alone[..], short);
                let expected = plain(x, (&a, (count, r, d)), &mix(), b);
                prop_assert_eq!(expected.len(), short.len());
                for (found, expected) in short.iter().zip(expected) {
                    // Sums of up to 40 products of sums of up to 6 products of sums of up to 40 products in [-1, 1].
                    prop_assert!((f64::from(*found) - expected).abs() < 1e-5 * expected.abs().max(100.0), "{found} {expected}");
                }
            }
        }
    }
}
