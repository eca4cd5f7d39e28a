//! The product with a weight matrix.

use candle_core::{Result, Tensor};

/// Elements of `W` that one block of the mixed-format product converts at a time (4 MiB of f32 scratch).
const BLOCK_ELEMENTS: usize = 1 << 20;

/// `y = x W^T`.
///
/// `x` is (rows, in) and `w` (out, in), both on one device; the result is (rows, out) in the format of `x`. When `w`
/// has another float format than `x` (half-precision weights under f32 activations, the rule on the CPU, where candle
/// has no bf16 product) each element of `w` is converted exactly and the product runs in the format of `x`.
///
/// # Errors
/// When the shapes do not fit or the device fails.
pub fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    if x.dtype() == w.dtype() { x.matmul(&w.t()?) } else { mixed_format_reference(x, w) }
}

/// The plain form of [`linear`] for a weight in another format: converts blocks of rows of `w`, so that no full copy
/// of it ever exists.
fn mixed_format_reference(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (out_features, in_features) = w.dims2()?;
    let block_rows = (BLOCK_ELEMENTS / in_features.max(1)).clamp(1, out_features.max(1));
    let mut blocks = Vec::with_capacity(out_features.div_ceil(block_rows));
    for start in (0..out_features).step_by(block_rows) {
        let rows = block_rows.min(out_features - start);
        let block = w.narrow(0, start, rows)?.to_dtype(x.dtype())?;
        blocks.push(x.matmul(&block.t()?)?);
    }
    Tensor::cat(&blocks, 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn half_weights_multiply_as_their_exact_values() -> Result<()> {
        let x = Tensor::randn(0f32, 1., (3, 1000), &Device::Cpu)?;
        let w = Tensor::randn(0f32, 1., (2100, 1000), &Device::Cpu)?.to_dtype(DType::BF16)?;
        let expected = x.matmul(&w.to_dtype(DType::F32)?.t()?)?;
        let difference = (linear(&x, &w)? - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(difference < 1e-3, "differs by {difference}");
        Ok(())
    }
}
