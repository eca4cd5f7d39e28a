//! LoKr: a Kronecker product, `W' = W + s kron(w1, w2)`, `s = alpha / r` (PEFT 0.21 `tuners/lokr`). w1 is (a, c), w2 is
//! (b, d), with `out = a b` and `in = c d`; either may come in two parts of rank r.
//!
//! It is served as a product of blocks: w2 (or its parts, where they cost less) for each block of inputs and outputs, w1
//! between the blocks. Where terms must be low-rank ones, `w1 = l1 r1` and `w2 = l2 r2` give `kron(l1, l2) kron(r1, r2)`:
//! the ranks of the parts multiply.

use candle_core::{DType, Device, Result, Tensor};

use super::Kind;
use super::scaling::{FIELDS, Scaling};
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::Config;
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, BlockMix, Delta, SiteId};

/// The row of the table of kinds.
pub(super) const LOKR: Kind = Kind {
    peft_type: "LOKR",
    title: "LoKr",
    served_as: "products of blocks by w2, mixed by w1; own dense weight where that costs less",
    merged_as: "W + s kron(w1, w2)",
    suffixes: &[FIRST[0], FIRST[1], FIRST[2], SECOND[0], SECOND[1], SECOND[2]],
    pairs: &[(FIRST[1], FIRST[2]), (SECOND[1], SECOND[2])],
    fields: FIELDS,
    rank: |suffix, shape| match shape {
        [_, r] if suffix == FIRST[1] || suffix == SECOND[1] => Some(*r),
        [r, _] if suffix == FIRST[2] || suffix == SECOND[2] => Some(*r),
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

/// A factor as a whole, and its two parts.
const FIRST: [&str; 3] = ["lokr_w1", "lokr_w1_a", "lokr_w1_b"];
const SECOND: [&str; 3] = ["lokr_w2", "lokr_w2_a", "lokr_w2_b"];

fn check(config: &Config) -> std::result::Result<(), AdapterError> {
    Scaling::parse(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> std::result::Result<(), AdapterError> {
    let scaling = Scaling::parse(&lowering.config)?;
    for linear in adapted::linears(lowering)? {
        let AdaptedLinear { id, in_features: inputs, out_features: outputs } = linear;
        let (r, scale) = scaling.of(&lowering.site(id).path)?;
        let first = factor(lowering, id, FIRST, r)?;
        let second = factor(lowering, id, SECOND, r)?;
        let found = (first.outputs()? * second.outputs()?, first.inputs()? * second.inputs()?);
        if found != (outputs, inputs) {
            let reason = format!("the two factors make a matrix {found:?}, expected {:?}", (outputs, inputs));
            return Err(lowering.refuse(id, SECOND[if second.is_whole() { 0 } else { 1 }], reason));
        }
        // Two whole factors have no rank to show.
        if !first.is_whole() || !second.is_whole() {
            lowering.ranks.insert(r);
        }
        let first = first.scaled(scale)?;
        if lowering.keep_terms {
            let ((l1, r1), (l2, r2)) = (first.parts()?, second.parts()?);
            lowering.add_low_rank(id, kron(&r1, &r2)?, kron(&l1, &l2)?)?;
            continue;
        }
        let (delta, cost) = block_product(&first, &second)?;
        lowering.add_delta(id, delta, (cost, "blocks of these sizes cost more than a dense weight"))?;
    }
    Ok(())
}

/// `kron(first, second)` as a product of blocks, and its multiplications.
fn block_product(first: &Factor, second: &Factor) -> Result<(Delta, usize)> {
    let (w1, (q, d)) = (first.matrix()?, (second.outputs()?, second.inputs()?));
    let (p, n) = w1.dims2()?;
    let whole = n * q * d + p * n * q;
    let (a, b, cost) = match second {
        Factor::Parts(left, right) if left.dim(1)? * (n * d + p * n + p * q) < whole => {
            (right.clone(), Some(left.unsqueeze(0)?), left.dim(1)? * (n * d + p * n + p * q))
        }
        Factor::Whole(_) | Factor::Parts(..) => (second.matrix()?, None, whole),
    };
    Ok((Delta::BlockProduct { a: a.unsqueeze(0)?, mix: BlockMix::Matrix(w1), b }, cost))
}

/// One factor of the product, f32.
enum Factor {
    /// A whole matrix.
    Whole(Tensor),
    /// Two parts (outputs, r), (r, inputs).
    Parts(Tensor, Tensor),
}

/// Takes one factor: as a whole, or in two parts of rank `r`.
fn factor(
    lowering: &mut Lowering<'_>,
    id: SiteId,
    [whole, left, right]: [&str; 3],
    r: usize,
) -> std::result::Result<Factor, AdapterError> {
    let sizes = |lowering: &Lowering<'_>, suffix: &str| match lowering.shape(id, suffix) {
        None => Err(lowering.refuse(id, suffix, "is missing")),
        Some([rows, columns]) => Ok((*rows, *columns)),
        Some(shape) => Err(lowering.refuse(id, suffix, format!("expected two dimensions, found shape {shape:?}"))),
    };
    if !lowering.has(id, left) && !lowering.has(id, right) {
        let (rows, columns) = sizes(lowering, whole)?;
        return Ok(Factor::Whole(lowering.require(id, whole, &[rows, columns])?));
    }
    let ((rows, _), (_, columns)) = (sizes(lowering, left)?, sizes(lowering, right)?);
    let left = lowering.require(id, left, &[rows, r])?;
    Ok(Factor::Parts(left, lowering.require(id, right, &[r, columns])?))
}

impl Factor {
    fn is_whole(&self) -> bool {
        matches!(self, Self::Whole(_))
    }

    fn outputs(&self) -> Result<usize> {
        match self {
            Self::Whole(w) | Self::Parts(w, _) => w.dim(0),
        }
    }

    fn inputs(&self) -> Result<usize> {
        match self {
            Self::Whole(w) | Self::Parts(_, w) => w.dim(1),
        }
    }

    /// The inner size of [`Factor::parts`].
    fn rank(&self) -> Result<usize> {
        let most = self.outputs()?.min(self.inputs()?);
        match self {
            Self::Whole(_) => Ok(most),
            Self::Parts(left, _) => Ok(left.dim(1)?.min(most)),
        }
    }

    fn scaled(self, scale: f64) -> Result<Self> {
        Ok(match self {
            Self::Whole(w) => Self::Whole((w * scale)?),
            Self::Parts(left, right) => Self::Parts((left * scale)?, right),
        })
    }

    /// (outputs, inputs).
    fn matrix(&self) -> Result<Tensor> {
        match self {
            Self::Whole(w) => Ok(w.clone()),
            Self::Parts(left, right) => left.matmul(right),
        }
    }

    /// Two matrices (outputs, k), (k, inputs) of the smallest k that the sizes show.
    fn parts(&self) -> Result<(Tensor, Tensor)> {
        if let Self::Parts(left, right) = self
            && left.dim(1)? == self.rank()?
        {
            return Ok((left.clone(), right.clone()));
        }
        let (matrix, k) = (self.matrix()?, self.rank()?);
        let identity = Tensor::eye(k, DType::F32, &Device::Cpu)?;
        Ok(if k == self.inputs()? { (matrix, identity) } else { (identity, matrix) })
    }
}

/// The Kronecker product of x (m, n) and y (p, q): (m p, n q), `[i p + k, j q + l] = x[i, j] y[k, l]`.
fn kron(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let ((m, n), (p, q)) = (x.dims2()?, y.dims2()?);
    let product = x.reshape((m, 1, n, 1))?.broadcast_mul(&y.reshape((1, p, 1, q))?)?; // [m, p, n, q]
    product.reshape((m * p, n * q))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::block_product as adapter_block_product;
    use crate::adapter::fake_base::{close, random};

    #[test]
    fn parts_and_blocks_multiply_to_the_kronecker_product() {
        let factors = [
            Factor::Whole(random(1, (3, 4))),
            Factor::Whole(random(2, (4, 2))),
            Factor::Parts(random(3, (5, 2)), random(4, (2, 3))),
            Factor::Parts(random(5, (2, 4)), random(6, (4, 3))),
            Factor::Parts(random(7, (6, 1)), random(8, (1, 5))),
        ];
        for first in &factors {
            for second in &factors {
                let (Delta::BlockProduct { a, mix, b }, _) = block_product(first, second).unwrap() else { panic!() };
                let blocks = adapter_block_product::dense((&a, &mix, b.as_ref())).unwrap();
                let ((l1, r1), (l2, r2)) = (first.parts().unwrap(), second.parts().unwrap());
                assert_eq!(l1.dim(1).unwrap(), first.rank().unwrap());
                let found = kron(&l1, &l2).unwrap().matmul(&kron(&r1, &r2).unwrap()).unwrap();
                let expected = kron(&first.matrix().unwrap(), &second.matrix().unwrap()).unwrap();
                assert!(close(&found, &expected, 1e-6));
                assert!(close(&blocks, &expected, 1e-6));
            }
        }
    }
}
