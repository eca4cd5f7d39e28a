//! OSF: the strongest singular directions of the weight stay, the others are trained (PEFT 0.21 `tuners/osf`). With
//! `W = U diag(S) V` sorted by singular value and `e` directions kept,
//!
//! ```text
//! W' = U[:, :e] diag(S[:e]) V[:e] + U_low diag(S_low) V_low
//! ```
//!
//! The kept part is computed again from W; as a projection of W it does not depend on the signs that a decomposition
//! happens to choose. What W loses has rank `q = min(in, out) - e`, so the change has rank 2q.

use candle_core::Tensor;
use rayon::prelude::*;
use serde_json::Value;

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, wrong_type};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::{Matcher, Patterns};
use crate::adapter::{AdapterError, linalg};

/// The row of the table of kinds.
pub(super) const OSF: Kind = Kind {
    peft_type: "OSF",
    title: "OSF",
    served_as: "own dense weight, or a low-rank delta where few directions are trained",
    merged_as: "the strongest part of W + U diag(S) V",
    suffixes: &[U, S, V],
    pairs: &[(U, S), (S, V)],
    fields: &[
        ("effective_rank", Rule::Read),
        ("rank_pattern", Rule::Read),
        ("target_svd_config", Rule::Ignored),
        ("init_weights", Rule::Ignored),
    ],
    rank: |suffix, shape| match (suffix, shape) {
        (U, [_, q]) | (S, [q]) | (V, [q, _]) => Some(*q),
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

const U: &str = "osf_svd_params.U_low";
const S: &str = "osf_svd_params.S_low";
const V: &str = "osf_svd_params.V_low";

/// Linears decomposed at a time: each takes memory for several copies of its weight in f64.
const DECOMPOSED_TOGETHER: usize = 4;

/// The field whose expressions are searched for anywhere in a path.
fn patterns(config: &Config) -> Result<Patterns, AdapterError> {
    Patterns::parse_as(config, "rank_pattern", str::to_owned)
}

/// How many directions stay of `least`: all the config says is a number, or a fraction of `least` up to 1.
fn kept(field: &str, value: Option<&Value>, least: usize) -> Result<usize, AdapterError> {
    let Some(value) = value else { return Ok(least / 2) };
    let wrong = || wrong_type(field, "a rank, or a fraction up to 1", value);
    let number = value.as_f64().filter(|number| *number >= 0.0).ok_or_else(wrong)?;
    let is_fraction = value.is_f64() && number > 0.0 && number <= 1.0;
    let rank = if is_fraction { least as f64 * number } else { number };
    Ok((rank as usize).min(least))
}

fn check(config: &Config) -> Result<(), AdapterError> {
    kept("effective_rank", config.get("effective_rank"), 1)?;
    patterns(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let patterns = patterns(&lowering.config)?;
    let default = lowering.config.get("effective_rank").cloned();
    let mut trained = Vec::new();
    for AdaptedLinear { id, in_features, out_features } in adapted::linears(lowering)? {
        let least = in_features.min(out_features);
        let kept = match patterns.get(&lowering.site(id).path)? {
            Some(value) => kept("rank_pattern", Some(value), least)?,
            None => kept("effective_rank", default.as_ref(), least)?,
        };
        let q = least - kept;
        if let Some(found) = lowering.shape(id, S).filter(|shape| *shape != [q]) {
            let reason = format!("expected {q} trained directions (`effective_rank`, `rank_pattern`), found {found:?}");
            return Err(lowering.refuse(id, S, reason));
        }
        let u = lowering.require(id, U, &[out_features, q])?;
        let s = lowering.require(id, S, &[q])?;
        let v = lowering.require(id, V, &[q, in_features])?;
        lowering.ranks.insert(q);
        trained.push((id, v, u.broadcast_mul(&s)?));
    }
    for some in trained.chunks(DECOMPOSED_TOGETHER) {
        let weights = some.iter().map(|(id, ..)| lowering.weight(*id)).collect::<Result<Vec<_>, _>>()?;
        // Most of a decomposition is one step after the other, so several go side by side.
        let lost = weights.par_iter().zip(some).map(|(weight, (_, v, _))| linalg::weakest_part(weight, v.dim(0)?));
        let lost = lost.collect::<candle_core::Result<Vec<_>>>()?;
        for ((id, v, u), (a, b)) in some.iter().zip(lost) {
            lowering.add_low_rank(*id, Tensor::cat(&[v, &a], 0)?, Tensor::cat(&[u, &b.neg()?], 1)?)?;
        }
    }
    Ok(())
}
