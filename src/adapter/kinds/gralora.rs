//! GraLoRA: low-rank adaptation in a grid of k by k blocks (PEFT 0.21 `tuners/gralora`). Input block n gives
//! `z_n = A_n^T x_n` (r), cut into k parts `z_nj` of r / k; output block j is `B_j^T concat_n(z_nj)`. All times
//! `s = alpha / (r + hybrid_r)`, with a plain low-rank part of rank `hybrid_r` beside it.
//!
//! As one product it has rank k r: row (j, n, t) of the first factor reads input block n, and its column of the second
//! writes output block j.

use candle_core::{Device, Result, Tensor};

use super::Kind;
use crate::adapter::AdapterError;
use crate::adapter::config::{Config, Rule};
use crate::adapter::linears::{LinearSite, adapted_linears, add_factors};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;

/// The row of the table of kinds.
pub(super) const GRALORA: Kind = Kind {
    peft_type: "GRALORA",
    title: "GraLoRA",
    served_as: "low-rank delta of rank k r; own dense weight where that costs less",
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
    for linear in adapted_linears(lowering)? {
        let LinearSite { id, inputs, outputs } = linear;
        if [inputs, outputs, r].iter().any(|size| size % k != 0) {
            let reason =
                format!("{k} blocks (`gralora_k`) do not divide {inputs} inputs, {outputs} outputs and rank {r}");
            return Err(lowering.refuse(id, A, reason));
        }
        let a = lowering.require(id, A, &[k, inputs / k, r])?;
        let b = lowering.require(id, B, &[k, r, outputs / k])?;
        let (mut a, mut b) = factors(&a, &b)?;
        if hybrid_r > 0 {
            let general_a = lowering.require(id, GENERAL_A, &[hybrid_r, inputs])?;
            let general_b = lowering.require(id, GENERAL_B, &[outputs, hybrid_r])?;
            (a, b) = (Tensor::cat(&[&a, &general_a], 0)?, Tensor::cat(&[&b, &general_b], 1)?);
        }
        lowering.ranks.insert(r);
        add_factors(lowering, linear, (&a, &(b * scale)?))?;
    }
    Ok(())
}

/// The factors (k r, in) and (out, k r) of blocks a: (k, in / k, r), b: (k, r, out / k); all f32.
fn factors(a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
    let ((k, block_in, r), block_out) = (a.dims3()?, b.dim(2)?);
    let (inputs, outputs, part) = (k * block_in, k * block_out, r / k);
    let (a, b) = (a.to_vec3::<f32>()?, b.to_vec3::<f32>()?);
    let (mut down, mut up) = (vec![0.0f32; k * r * inputs], vec![0.0f32; outputs * k * r]);
    for row in 0..k * r {
        let (j, n, t) = (row / r, row % r / part, row % part);
        for (c, weights) in a[n].iter().enumerate() {
            down[row * inputs + n * block_in + c] = weights[j * part + t];
        }
        for (o, weight) in b[j][n * part + t].iter().enumerate() {
            up[(j * block_out + o) * k * r + row] = *weight;
        }
    }
    let device = &Device::Cpu;
    Ok((Tensor::from_vec(down, (k * r, inputs), device)?, Tensor::from_vec(up, (outputs, k * r), device)?))
}
