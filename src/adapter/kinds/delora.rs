//! DeLoRA: a delta of normalised factors and one learned strength,
//! `W' = W + B diag(lambda / (r |A_k| |B_k|)) A diag(w_norm)`, where `|A_k|` is the norm of a row, `|B_k|` of a column,
//! both at least 1e-4, and `w_norm` the norms of the base weight's columns (PEFT 0.21 `tuners/delora`).

use candle_core::{Result, Tensor};

use super::Kind;
use crate::adapter::AdapterError;
use crate::adapter::config::{Config, Rule, as_positive};
use crate::adapter::linears::{LinearSite, adapted_linears, add_factors};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::{Matcher, Patterns};

/// The row of the table of kinds.
pub(super) const DELORA: Kind = Kind {
    peft_type: "DELORA",
    title: "DeLoRA",
    served_as: "low-rank delta",
    merged_as: "W + B diag(lambda / (r norm(A) norm(B))) A diag(w_norm)",
    suffixes: &[A, B, LAMBDA, W_NORM],
    pairs: &[(A, B), (A, LAMBDA)],
    fields: &[
        ("r", Rule::Read),
        ("rank_pattern", Rule::Read),
        ("bias", Rule::Read),
        // Where training starts; the file has what it learned.
        ("delora_lambda", Rule::Ignored),
        ("lambda_pattern", Rule::Ignored),
        ("module_dropout", Rule::Ignored),
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

const A: &str = "delora_A";
const B: &str = "delora_B";
const LAMBDA: &str = "delora_lambda";
const W_NORM: &str = "delora_w_norm";
/// The least norm that is divided by.
const NORM_MIN: f32 = 1e-4;

fn check(config: &Config) -> std::result::Result<(), AdapterError> {
    config.positive("r")?;
    Patterns::parse(config, "rank_pattern")?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> std::result::Result<(), AdapterError> {
    let config_r = lowering.config.positive("r")?.unwrap_or(8);
    let ranks = Patterns::parse(&lowering.config, "rank_pattern")?;
    for linear in adapted_linears(lowering)? {
        let LinearSite { id, inputs, outputs } = linear;
        let pattern = ranks.get(&lowering.site(id).path)?;
        let r = pattern.map_or(Ok(config_r), |value| as_positive("rank_pattern", value))?;
        let a = lowering.require(id, A, &[r, inputs])?;
        let b = lowering.require(id, B, &[outputs, r])?;
        let lambda = lowering.require(id, LAMBDA, &[1])?;
        let w_norm = match lowering.take(id, W_NORM, &[inputs])? {
            Some(w_norm) => w_norm,
            None => lowering.weight(id)?.sqr()?.sum(0)?.sqrt()?,
        };
        lowering.ranks.insert(r);
        let strength = strength(&a, &b, &lambda)?;
        add_factors(lowering, linear, (&a.broadcast_mul(&w_norm)?, &b.broadcast_mul(&strength)?))?;
    }
    Ok(())
}

/// `lambda / (r |A_k| |B_k|)`. a: (r, in), b: (out, r), lambda: (1); result: (r). All f32.
fn strength(a: &Tensor, b: &Tensor, lambda: &Tensor) -> Result<Tensor> {
    let norms = |squares: Tensor| squares.sqrt()?.maximum(NORM_MIN);
    let divisor = (norms(a.sqr()?.sum(1)?)? * norms(b.sqr()?.sum(0)?)?)?;
    (lambda / a.dim(0)? as f64)?.broadcast_div(&divisor)
}
