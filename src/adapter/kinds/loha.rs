//! LoHa: the elementwise product of two low-rank matrices, `W' = W + s (w1_a w1_b) * (w2_a w2_b)`, `s = alpha / r`
//! (PEFT 0.21 `tuners/loha`).
//!
//! As one product of factors it has rank r^2: row (j, k) of A is `w1_b[j] * w2_b[k]`, column (j, k) of B is
//! `w1_a[:, j] * w2_a[:, k]`.

use candle_core::{Result, Tensor};

use super::Kind;
use super::scaling::{FIELDS, Scaling};
use crate::adapter::AdapterError;
use crate::adapter::config::Config;
use crate::adapter::linears::{LinearSite, adapted_linears, add_delta};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;

/// The row of the table of kinds.
pub(super) const LOHA: Kind = Kind {
    peft_type: "LOHA",
    title: "LoHa",
    served_as: "low-rank delta of rank r^2; own dense weight where that costs less",
    merged_as: "W + s (w1_a w1_b) * (w2_a w2_b)",
    suffixes: &[W1_A, W1_B, W2_A, W2_B],
    pairs: &[(W1_A, W1_B), (W1_A, W2_A), (W1_A, W2_B)],
    fields: FIELDS,
    rank: |suffix, shape| match (suffix, shape) {
        (W1_A | W2_A, [_, r]) | (W1_B | W2_B, [r, _]) => Some(*r),
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

const W1_A: &str = "hada_w1_a";
const W1_B: &str = "hada_w1_b";
const W2_A: &str = "hada_w2_a";
const W2_B: &str = "hada_w2_b";

fn check(config: &Config) -> std::result::Result<(), AdapterError> {
    Scaling::parse(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> std::result::Result<(), AdapterError> {
    let scaling = Scaling::parse(&lowering.config)?;
    for linear in adapted_linears(lowering)? {
        let LinearSite { id, inputs, outputs } = linear;
        let (r, scale) = scaling.of(&lowering.site(id).path)?;
        let first = (lowering.require(id, W1_A, &[outputs, r])? * scale)?;
        let first = (first, lowering.require(id, W1_B, &[r, inputs])?);
        let second = (lowering.require(id, W2_A, &[outputs, r])?, lowering.require(id, W2_B, &[r, inputs])?);
        lowering.ranks.insert(r);
        let dense = || first.0.matmul(&first.1)? * second.0.matmul(&second.1)?;
        add_delta(lowering, linear, r.saturating_mul(r), || factors(&first, &second), dense)?;
    }
    Ok(())
}

/// A: (r^2, in) and B: (out, r^2) of two pairs (out, r), (r, in); all f32.
fn factors(first: &(Tensor, Tensor), second: &(Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
    let (outputs, r) = first.0.dims2()?;
    let inputs = first.1.dim(1)?;
    let a = first.1.unsqueeze(1)?.broadcast_mul(&second.1.unsqueeze(0)?)?; // [r, r, in]
    let b = first.0.unsqueeze(2)?.broadcast_mul(&second.0.unsqueeze(1)?)?; // [out, r, r]
    Ok((a.reshape((r * r, inputs))?, b.reshape((outputs, r * r))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::fake_base::{close, random};

    #[test]
    fn factors_multiply_to_the_elementwise_product() {
        let first = (random(1, (5, 3)), random(2, (3, 4)));
        let second = (random(3, (5, 3)), random(4, (3, 4)));
        let (a, b) = factors(&first, &second).unwrap();
        let expected = first.0.matmul(&first.1).unwrap() * second.0.matmul(&second.1).unwrap();
        assert!(close(&b.matmul(&a).unwrap(), &expected.unwrap(), 1e-6));
    }
}
