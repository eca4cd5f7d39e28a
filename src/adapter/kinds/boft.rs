//! BOFT: the input is rotated by a product of block-diagonal rotations under butterfly permutations, and the product with
//! the weight is scaled (PEFT 0.21 `tuners/boft`),
//!
//! ```text
//! W' = diag(s) W R^T          R = F_{m-1} ... F_0,  F_f = P_f blkdiag(K_f) P_f^T,  K = (I - S) (I + S)^-1
//! ```
//!
//! with S the skew part of a block. With one factor P is the identity. The bias is not scaled.

use candle_core::{Device, Tensor};

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, wrong_type};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::rotation::{self, Map};
use crate::adapter::{AdapterError, Pre, Scale, linalg};
use crate::kernels::ButterflyFactor;

/// The row of the table of kinds.
pub(super) const BOFT: Kind = Kind {
    peft_type: "BOFT",
    title: "BOFT",
    served_as: "blocks that multiply the input, under permutations with several factors, and a diagonal output scale",
    merged_as: "diag(s) W R^T",
    suffixes: &[R, S],
    pairs: &[(R, S)],
    fields: &[
        ("boft_block_size", Rule::Read),
        ("boft_block_num", Rule::Read),
        // Without its CUDA extension PEFT makes one factor whatever this says; the tensor tells.
        ("boft_n_butterfly_factor", Rule::Ignored),
        ("bias", Rule::Read),
        ("boft_dropout", Rule::Ignored),
        ("init_weights", Rule::Ignored),
    ],
    check,
    lower,
    ..Kind::PLAIN
};

const R: &str = "boft_R";
const S: &str = "boft_s";

/// A field that is a size, or zero when the other field gives it.
fn size(config: &Config, field: &str) -> Result<usize, AdapterError> {
    let Some(value) = config.get(field) else { return Ok(0) };
    let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
    size.ok_or_else(|| wrong_type(field, "a size", value))
}

fn check(config: &Config) -> Result<(), AdapterError> {
    size(config, "boft_block_size")?;
    size(config, "boft_block_num")?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let (block_size, block_num) =
        (size(&lowering.config, "boft_block_size")?, size(&lowering.config, "boft_block_num")?);
    for AdaptedLinear { id, in_features, out_features } in adapted::linears(lowering)? {
        let shape = lowering.shape(id, R).unwrap_or_default().to_vec();
        let &[factors, blocks, s, _] = shape.as_slice() else {
            return Err(lowering.refuse(id, R, format!("expected shape [factors, blocks, s, s], found {shape:?}")));
        };
        let fits = |wanted: usize, found: usize| wanted == 0 || wanted == found;
        if blocks.checked_mul(s) != Some(in_features) || !fits(block_size, s) || !fits(block_num, blocks) {
            let reason = format!(
                "{blocks} blocks of {s} do not fit {in_features} inputs, `boft_block_size` {block_size} and \
                 `boft_block_num` {block_num}"
            );
            return Err(lowering.refuse(id, R, reason));
        }
        if factors > 1 && (s % 2 != 0 || blocks % (1 << (factors - 1).min(63)) != 0) {
            let reason = format!("{factors} factors do not fit {blocks} blocks of {s}");
            return Err(lowering.refuse(id, R, reason));
        }
        let r = linalg::values(&lowering.require(id, R, &[factors, blocks, s, s])?)?;
        let scale = lowering.require(id, S, &[out_features, 1])?.squeeze(1)?;
        let rotations = rotation::rotations(&rotation::skew_part(&r, s), s, Map::Cayley)?; // [factors blocks, s, s]
        if factors == 1 {
            lowering.out.linears.entry(id).or_default().pre = Pre::BlockDiag(rotations);
        } else {
            // The last factor meets the input first.
            let factor = |f: usize| -> Result<ButterflyFactor, AdapterError> {
                let places = inverse(&butterfly(in_features, blocks >> f, s / 2));
                let places = Tensor::from_vec(places, in_features, &Device::Cpu)?;
                Ok(ButterflyFactor { places, blocks: rotations.narrow(0, f * blocks, blocks)?.contiguous()? })
            };
            let factors = (0..factors).rev().map(factor).collect::<Result<_, _>>()?;
            lowering.out.linears.entry(id).or_default().pre = Pre::Butterfly(factors);
        }
        lowering.out.linears.entry(id).or_default().scale = Scale::Diag(scale);
    }
    Ok(())
}

/// The butterfly permutation: within each of `segments` parts, chunks of `chunk` at even places come before those at odd
/// places.
fn butterfly(n: usize, segments: usize, chunk: usize) -> Vec<u32> {
    let segment = n / segments;
    let chunks = segment / chunk;
    let order = (0..chunks).step_by(2).chain((1..chunks).step_by(2));
    let within: Vec<usize> = order.flat_map(|at| at * chunk..(at + 1) * chunk).collect();
    (0..segments).flat_map(|part| within.iter().map(move |at| (part * segment + at) as u32)).collect()
}

fn inverse(order: &[u32]) -> Vec<u32> {
    let mut inverse = vec![0; order.len()];
    for (at, to) in order.iter().enumerate() {
        inverse[*to as usize] = at as u32;
    }
    inverse
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_at_even_places_come_first_in_each_segment() {
        assert_eq!(butterfly(8, 1, 1), [0, 2, 4, 6, 1, 3, 5, 7]);
        assert_eq!(butterfly(8, 1, 2), [0, 1, 4, 5, 2, 3, 6, 7]);
        assert_eq!(butterfly(8, 2, 1), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(inverse(&butterfly(8, 1, 1)), [0, 4, 1, 5, 2, 6, 3, 7]);
    }
}
