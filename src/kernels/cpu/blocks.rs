//! Block-diagonal matrices that rows are multiplied with.

use std::cell::RefCell;

use super::dispatch::{dispatch, fma};
use super::isa::Isa;
use super::memory::Memory;

/// Square matrices along a diagonal.
#[derive(Clone, Debug)]
pub struct Blocks {
    /// Length of a block.
    pub(super) s: usize,
    /// Matrices (n, s, s) one after the other.
    pub(super) values: Memory<f32>,
}

impl Blocks {
    /// Matrices (n, s, s) one after the other; they repeat when a row has more blocks.
    ///
    /// # Panics
    /// When `values` are not whole matrices, at least one.
    pub fn new(s: usize, values: &[f32]) -> Self {
        assert!(s > 0 && !values.is_empty() && values.len().is_multiple_of(s * s), "whole matrices of length {s}");
        Self { s, values: Memory::copy_of(values) }
    }

    /// Multiplies consecutive blocks of a row, the first of them with matrix `first`, each as a row with its matrix. The
    /// last block may be shorter: then the rest of it counts as zero.
    pub(super) fn multiply(&self, first: usize, row: &mut [f32]) {
        PRODUCT.with_borrow_mut(|product| {
            product.resize(self.s, 0.0);
            multiply(Isa::best(), self, first, product, row);
        });
    }
}

thread_local! {
    /// A block's product.
    static PRODUCT: RefCell<Vec<f32>> = RefCell::default();
}

dispatch! {
    fn multiply(blocks: &Blocks, first: usize, product: &mut [f32], row: &mut [f32]) => multiply_body
}

#[inline(always)]
fn multiply_body<const FMA: bool>(blocks: &Blocks, first: usize, product: &mut [f32], row: &mut [f32]) {
    let s = blocks.s;
    let matrices = blocks.values.chunks_exact(s * s).cycle().skip(first % (blocks.values.len() / (s * s)));
    for (x, matrix) in row.chunks_mut(s).zip(matrices) {
        product.fill(0.0);
        for (x, m) in x.iter().zip(matrix.chunks_exact(s)) {
            for (sum, m) in product.iter_mut().zip(m) {
                *sum = fma::<FMA>(*x, *m, *sum);
            }
        }
        x.copy_from_slice(&product[..x.len()]);
    }
}
