//! GraLoRA: low-rank adaptation in a grid of k by k blocks (PEFT 0.21 `tuners/gralora`). Input block n gives
//! `z_n = A_n^T x_n` (r), cut into k parts `z_nj` of r / k; output block j is `B_j^T concat_n(z_nj)`. All times
//! `s = alpha / (r + hybrid_r)`, with a plain low-rank part of rank `hybrid_r` beside it.
//!
//! It is served as a product of blocks that exchange their parts; as one product it has rank k r.

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, BlockMix, Delta};

/// The row of the table of kinds.
pub(super) const GRALORA: Kind = Kind {
    peft_type: "GRALORA",
    title: "GraLoRA",
    served_as: "products of blocks that exchange parts, and a low-rank delta; own dense weight where that costs less",
    merged_as: "W + s (blocks A_n B_j + B A)",
    suffixes: &[A, B, GENERAL_A, GENERAL_B],
    pairs: &[(A, B), (GENERAL_A, GENERAL_B)],
    fields: &[
        ("r", Rule::Read),
        ("alpha", Rule::Read),
        ("hybrid_r", Rule::Read),
        ("gralora_k", Rule::Read),
        ("bias", Rule::Read),
        ("gralora_dropout", Rule::Ignored),
        ("init_weights", Rule::Ignored),
    ],
    rank: |suffix, shape| match (suffix, shape) {
        (A, [_, _, r]) | (B, [_, r, _]) => Some(*r),
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

const A: &str = "gralora_A";
const B: &str = "gralora_B";
const GENERAL_A: &str = "gralora_A_general.weight";
const GENERAL_B: &str = "gralora_B_general.weight";

/// What the config says for all linears.
struct Options {
    r: usize,
    hybrid_r: usize,
    k: usize,
    scale: f64,
}

fn check(config: &Config) -> std::result::Result<(), AdapterError> {
    Options::parse(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

impl Options {
    fn parse(config: &Config) -> std::result::Result<Self, AdapterError> {
        let r = config.positive("r")?.unwrap_or(32);
        let hybrid_r = config.count("hybrid_r")?.unwrap_or(0);
        let alpha = config.number("alpha")?.unwrap_or(64.0);
        let k = config.positive("gralora_k")?.unwrap_or(2);
        Ok(Self { r, hybrid_r, k, scale: alpha / (r as f64 + hybrid_r as f64) })
    }
}

fn lower(lowering: &mut Lowering<'_>) -> std::result::Result<(), AdapterError> {
    let Options { r, hybrid_r, k, scale } = Options::parse(&lowering.config)?;
    for linear in adapted::linears(lowering)? {
        let AdaptedLinear { id, in_features: inputs, out_features: outputs } = linear;
        if [inputs, outputs, r].iter().any(|size| size % k != 0) {
            let reason =
                format!("{k} blocks (`gralora_k`) do not divide {inputs} inputs, {outputs} outputs and rank {r}");
            return Err(lowering.refuse(id, A, reason));
        }
        let a = lowering.require(id, A, &[k, inputs / k, r])?;
        let b = lowering.require(id, B, &[k, r, outputs / k])?;
        let (a, b) = (a.transpose(1, 2)?.contiguous()?, (b.transpose(1, 2)?.contiguous()? * scale)?);
        let delta = Delta::BlockProduct { a, mix: BlockMix::Exchange, b: Some(b) };
        let (cost, reason) = (r * (inputs + outputs), "blocks of this rank would cost more than a dense weight");
        lowering.add_delta(id, delta, (cost, reason))?;
        if hybrid_r > 0 {
            let a = lowering.require(id, GENERAL_A, &[hybrid_r, inputs])?;
            let b = lowering.require(id, GENERAL_B, &[outputs, hybrid_r])?;
            lowering.add_low_rank(id, a, (b * scale)?)?;
        }
        lowering.ranks.insert(r);
    }
    Ok(())
}
