//! Norms of a weight plus its low-rank delta, for DoRA, without forming the sum.
//!
//! With `V = W + B A`: `|V[o, :]|^2 = |W[o, :]|^2 + 2 (W A^T)[o, :] . B[o, :] + (B (A A^T))[o, :] . B[o, :]`
//! (PEFT 0.21 `tuners/lora/dora.py` forms V and takes the same norm).

use candle_core::{Result, Tensor};

/// Norm of each row of `weight + b a`. weight: (out, in), a: (r, in), b: (out, r); result: (out). All f32.
pub(super) fn row_norms(weight: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    norms(&weight.sqr()?.sum(1)?, &weight.matmul(&a.t()?)?, a, b)
}

/// Norm of each column of `table + (b a)^T`. table: (vocab, dim), a: (r, vocab), b: (dim, r); result: (dim). All f32.
pub(super) fn column_norms(table: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    norms(&table.sqr()?.sum(0)?, &a.matmul(table)?.t()?.contiguous()?, a, b)
}

/// `sqrt(squares + 2 rowsum(product * b) + rowsum((b (a a^T)) * b))`, where `product` is `W A^T`.
fn norms(squares: &Tensor, product: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let cross = ((product * b)?.sum(1)? * 2.0)?;
    let gram = a.matmul(&a.t()?)?; // [r, r]
    let delta = (b.matmul(&gram)? * b)?.sum(1)?;
    ((squares + cross)? + delta)?.relu()?.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::fake_base::{close, random};

    #[test]
    fn norms_equal_those_of_the_sum() {
        let (weight, a, b) = (random(1, (7, 5)), random(2, (3, 5)), random(3, (7, 3)));
        let sum = (&weight + b.matmul(&a).unwrap()).unwrap();
        let expected = sum.sqr().unwrap().sum(1).unwrap().sqrt().unwrap();
        assert!(close(&row_norms(&weight, &a, &b).unwrap(), &expected, 1e-6));
        let table = weight.t().unwrap().contiguous().unwrap();
        assert!(close(&column_norms(&table, &a, &b).unwrap(), &expected, 1e-6));
    }
}
