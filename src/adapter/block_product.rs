//! The block product as matrices: dense, and as two factors.

use candle_core::{DType, Result, Tensor};

use super::BlockMix;

/// What a block product is made of: matrices of inputs (n or 1, r, d), the mix, and matrices of outputs (p or 1, q, r).
pub(super) type Parts<'a> = (&'a Tensor, &'a BlockMix, Option<&'a Tensor>);

/// Both sides in f32, and how many blocks of inputs and of outputs there are. No matrices of outputs are an identity.
struct Sides {
    a: Tensor,
    b: Tensor,
    n: usize,
    p: usize,
}

impl Sides {
    fn new((a, mix, b): Parts<'_>) -> Result<Self> {
        let a = a.to_dtype(DType::F32)?;
        let b = match b {
            Some(b) => b.to_dtype(DType::F32)?,
            None => Tensor::eye(a.dim(1)?, DType::F32, a.device())?.unsqueeze(0)?,
        };
        let (p, n) = match mix {
            BlockMix::Matrix(w) => w.dims2()?,
            BlockMix::Exchange => (a.dim(0)?, a.dim(0)?),
        };
        Ok(Self { a, b, n, p })
    }
}

/// The matrix (out, in) that the product multiplies with, f32.
pub(super) fn dense(parts: Parts<'_>) -> Result<Tensor> {
    let Sides { a, b, n, p } = Sides::new(parts)?;
    let (r, d, q) = (a.dim(1)?, a.dim(2)?, b.dim(1)?);
    let blocks = match parts.1 {
        BlockMix::Matrix(w) => {
            let products = b.unsqueeze(1)?.broadcast_matmul(&a.unsqueeze(0)?)?; // [p or 1, n or 1, q, d]
            products.broadcast_mul(&w.to_dtype(DType::F32)?.reshape((p, n, 1, 1))?)?
        }
        BlockMix::Exchange => {
            let (b, c) = (b.broadcast_as((p, q, r))?.contiguous()?, r / n);
            let b = b.reshape((p, q, n, c))?.transpose(1, 2)?.contiguous()?; // [p, n, q, c]
            b.matmul(&a.reshape((n, p, c, d))?.transpose(0, 1)?.contiguous()?)?
        }
    };
    blocks.transpose(1, 2)?.reshape((p * q, n * d)) // from [p, n, q, d]
}

/// The product as two factors (rank, in), (out, rank) in f32; the rank is r times the smaller number of blocks.
pub(super) fn factors(parts: Parts<'_>) -> Result<(Tensor, Tensor)> {
    let Sides { a, b, n, p } = Sides::new(parts)?;
    let (r, d, q) = (a.dim(1)?, a.dim(2)?, b.dim(1)?);
    let eye = |size: usize| Tensor::eye(size, DType::F32, a.device());
    // Matrices along the diagonal: (count rows, count columns).
    let diagonal = |m: &Tensor, count: usize| {
        let (_, rows, columns) = m.dims3()?;
        let spread = m.unsqueeze(2)?.broadcast_mul(&eye(count)?.reshape((count, 1, count, 1))?)?;
        spread.reshape((count * rows, count * columns))
    };
    match parts.1 {
        BlockMix::Matrix(w) => {
            let w = w.to_dtype(DType::F32)?.reshape((p, 1, n, 1))?;
            if p < n {
                let down = a.transpose(0, 1)?.unsqueeze(0)?.broadcast_mul(&w)?; // [p, r, n, d]
                return Ok((down.reshape((p * r, n * d))?, diagonal(&b, p)?));
            }
            let up = b.unsqueeze(2)?.broadcast_mul(&w)?; // [p, q, n, r]
            Ok((diagonal(&a, n)?, up.reshape((p * q, n * r))?))
        }
        BlockMix::Exchange => {
            // Block i of the outputs reads part i of every block of inputs.
            let parts = b.broadcast_as((p, q, r))?.reshape((p * q, n, 1, r / n))?;
            let chosen = eye(p)?.unsqueeze(1)?.broadcast_as((p, q, p))?.reshape((p * q, 1, p, 1))?;
            Ok((diagonal(&a, n)?, parts.broadcast_mul(&chosen)?.reshape((p * q, n * r))?))
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Delta;
    use super::super::fake_base::{close, random};
    use super::*;

    /// Products of 10 inputs and 12 outputs of every form, and the rank of each one's factors.
    pub(in crate::adapter) fn every_form() -> Vec<(Delta, usize)> {
        let product = |a: (usize, usize, usize), mix: Option<(usize, usize)>, b: Option<(usize, usize, usize)>| {
            let mix = mix.map_or(BlockMix::Exchange, |shape| BlockMix::Matrix(random(2, shape)));
            Delta::BlockProduct { a: random(1, a), mix, b: b.map(|shape| random(3, shape)) }
        };
        vec![
            (product((1, 3, 5), Some((4, 2)), Some((1, 3, 3))), 6),
            (product((1, 2, 1), Some((3, 10)), Some((1, 4, 2))), 6),
            (product((1, 3, 2), Some((4, 5)), None), 12),
            (product((1, 12, 2), Some((1, 5)), None), 12),
            (product((5, 2, 2), Some((3, 5)), Some((3, 4, 2))), 6),
            (product((2, 3, 5), Some((3, 2)), Some((1, 4, 3))), 6),
            (product((2, 4, 5), None, Some((2, 6, 4))), 8),
            (product((2, 6, 5), None, None), 12),
            (product((2, 2, 5), None, Some((1, 6, 2))), 4),
        ]
    }

    #[test]
    fn a_kronecker_product_has_every_product_of_two_entries() {
        let (w1, w2) = (random(1, (3, 5)), random(2, (4, 2)));
        let found = dense((&w2.unsqueeze(0).unwrap(), &BlockMix::Matrix(w1.clone()), None)).unwrap();
        let (w1, w2) = (w1.to_vec2::<f32>().unwrap(), w2.to_vec2::<f32>().unwrap());
        let entries: Vec<f32> =
            (0..12 * 10).map(|at| (at / 10, at % 10)).map(|(o, i)| w1[o / 4][i / 2] * w2[o % 4][i % 2]).collect();
        assert!(close(&found, &Tensor::from_vec(entries, (12, 10), found.device()).unwrap(), 1e-6));
    }
}
