//! PEANuT: a small network computes the delta from the weight itself (PEFT 0.21 `tuners/peanut`),
//!
//! ```text
//! Z = f(W^T A^T);  each encoder: Z = f(Z E^T);  each decoder: Z = f(Z D^T) + the Z before the encoder it mirrors
//! W' = W + scaling B Z^T
//! ```
//!
//! so it adds a low-rank term whose down projection is `Z^T`.

use candle_core::Tensor;

use super::Kind;
use crate::adapter::AdapterError;
use crate::adapter::activation;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, field_error, wrong_type};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;

/// The row of the table of kinds.
pub(super) const PEANUT: Kind = Kind {
    peft_type: "PEANUT",
    title: "PEANuT",
    served_as: "low-rank delta made with W",
    merged_as: "W + scaling B Z^T, where a small network computes Z from W",
    suffixes: &[
        A,
        B,
        ENCODERS[0],
        ENCODERS[1],
        ENCODERS[2],
        ENCODERS[3],
        ENCODERS[4],
        ENCODERS[5],
        DECODERS[0],
        DECODERS[1],
        DECODERS[2],
        DECODERS[3],
        DECODERS[4],
        DECODERS[5],
    ],
    pairs: &[(A, B)],
    fields: &[
        ("r", Rule::Read),
        ("depth", Rule::Read),
        ("act_fn", Rule::Read),
        ("scaling", Rule::Read),
        ("init_weights", Rule::Ignored),
    ],
    rank: |suffix, shape| match (suffix, shape) {
        (A, [r, _]) | (B, [_, r]) => Some(*r),
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

const A: &str = "peanut_A.weight";
const B: &str = "peanut_B.weight";
const ENCODERS: [&str; DEPTH_MAX] = [
    "peanut_encoders.0.weight",
    "peanut_encoders.1.weight",
    "peanut_encoders.2.weight",
    "peanut_encoders.3.weight",
    "peanut_encoders.4.weight",
    "peanut_encoders.5.weight",
];
const DECODERS: [&str; DEPTH_MAX] = [
    "peanut_decoders.0.weight",
    "peanut_decoders.1.weight",
    "peanut_decoders.2.weight",
    "peanut_decoders.3.weight",
    "peanut_decoders.4.weight",
    "peanut_decoders.5.weight",
];
/// Most layers on each side; the paper uses up to three.
const DEPTH_MAX: usize = 6;
/// PEFT's default of `r`.
const DEFAULT_R: usize = 32;

fn depth(config: &Config) -> Result<usize, AdapterError> {
    let field = "depth";
    let Some(value) = config.get(field) else { return Ok(0) };
    let depth = value.as_u64().ok_or_else(|| wrong_type(field, "a number of layers", value))?;
    let fits = usize::try_from(depth).ok().filter(|depth| *depth <= DEPTH_MAX);
    fits.ok_or_else(|| field_error(field, format!("expected at most {DEPTH_MAX}, found {depth}")))
}

fn check(config: &Config) -> Result<(), AdapterError> {
    config.positive("r")?;
    config.number("scaling")?;
    depth(config)?;
    activation::find(config, "act_fn", "relu")?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let r = lowering.config.positive("r")?.unwrap_or(DEFAULT_R);
    let (depth, scaling) = (depth(&lowering.config)?, lowering.config.number("scaling")?.unwrap_or(1.0));
    let f = activation::find(&lowering.config, "act_fn", "relu")?;
    for AdaptedLinear { id, out_features, .. } in adapted::linears(lowering)? {
        lowering.ranks.insert(r);
        let a = lowering.require(id, A, &[r, out_features])?;
        let b = lowering.require(id, B, &[out_features, r])?;
        let mut z: Tensor = f(&lowering.weight(id)?.t()?.contiguous()?.matmul(&a.t()?)?)?; // [in, r]
        let mut kept = Vec::with_capacity(depth);
        for name in &ENCODERS[..depth] {
            let encoder = lowering.require(id, name, &[r, r])?;
            let next = f(&z.matmul(&encoder.t()?)?)?;
            kept.push(std::mem::replace(&mut z, next));
        }
        for name in &DECODERS[..depth] {
            let decoder = lowering.require(id, name, &[r, r])?;
            z = f(&z.matmul(&decoder.t()?)?)?;
            if let Some(kept) = kept.pop() {
                z = (z + kept)?;
            }
        }
        lowering.add_low_rank(id, z.t()?.contiguous()?, (b * scaling)?)?;
    }
    Ok(())
}
