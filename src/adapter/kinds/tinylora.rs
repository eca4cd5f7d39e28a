//! TinyLoRA: a few numbers per group of linears mix fixed random matrices between fixed factors,
//! `W' = W + B (sum_q v_g[q] P[q]) A` (PEFT 0.21 `tuners/tinylora`).
//!
//! `weight_tying` t makes `max(1, round(n (1 - t)))` groups of the n linears in the order of the model, all of the same
//! size but the last, which takes what is left.

use super::Kind;
use crate::adapter::AdapterError;
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::linears::{LinearSite, adapted_linears, add_factors};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;

/// The row of the table of kinds.
pub(super) const TINYLORA: Kind = Kind {
    peft_type: "TINYLORA",
    title: "TinyLoRA",
    served_as: "low-rank delta",
    merged_as: "W + B (sum v P) A",
    suffixes: &[A, B, P],
    shared: &[V],
    pairs: &[(A, B), (A, P)],
    fields: &[
        ("r", Rule::Read),
        ("u", Rule::Read),
        (TYING, Rule::Read),
        (SAVED, Rule::Read),
        ("bias", Rule::Read),
        ("projection_seed", Rule::Ignored),
        ("init_v_bound", Rule::Ignored),
        ("init_weights", Rule::Ignored),
        ("tinylora_dropout", Rule::Ignored),
    ],
    rank: |suffix, shape| match (suffix, shape) {
        (A, [r, _]) | (B, [_, r]) | (P, [_, _, r]) => Some(*r),
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

const A: &str = "tinylora_A";
const B: &str = "tinylora_B";
const P: &str = "tinylora_P";
const V: &str = "base_model.tinylora_v";
const TYING: &str = "weight_tying";
const SAVED: &str = "save_projection";

fn check(config: &Config) -> Result<(), AdapterError> {
    options(config)?;
    if config.get(SAVED).is_some() && !config.flag(SAVED)? {
        let reason = "the file does not hold the random matrices; load it with PEFT and save it with true";
        return Err(field_error(SAVED, reason));
    }
    Matcher::parse(config, "target_modules").map(drop)
}

/// `r`, `u` and `weight_tying`.
fn options(config: &Config) -> Result<(usize, usize, f64), AdapterError> {
    let tying = config.number(TYING)?.unwrap_or(0.0);
    if !(0.0..=1.0).contains(&tying) {
        return Err(field_error(TYING, format!("expected a number between 0 and 1, found {tying}")));
    }
    Ok((config.positive("r")?.unwrap_or(2), config.positive("u")?.unwrap_or(64), tying))
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let (r, u, tying) = options(&lowering.config)?;
    let linears = adapted_linears(lowering)?;
    let count = linears.len();
    let groups = ((count as f64 * (1.0 - tying)).round_ties_even() as usize).max(1);
    let size = (count / groups).max(1);
    let fused = linears.iter().find(|linear| lowering.site(linear.id).path.ends_with("qkv_proj"));
    if let Some(fused) = fused.filter(|_| groups > 1) {
        // There the order in which PEFT counts the linears is not that of the forward pass.
        let reason = "groups of linears are not served on models with fused projections; use `weight_tying` 1";
        return Err(lowering.refuse(fused.id, A, reason));
    }
    let mut mixtures = Vec::with_capacity(groups);
    for group in 0..groups {
        let name = format!("{V}.{group}");
        if let Some(found) = lowering.shared_shape(&name)
            && found != [u]
        {
            return Err(lowering.refuse_shared(&name, format!("expected shape [{u}] (`u`), found {found:?}")));
        }
        mixtures.push(lowering.require_shared(&name, &[u])?);
    }
    for (idx, linear) in linears.into_iter().enumerate() {
        let LinearSite { id, inputs, outputs } = linear;
        let a = lowering.require(id, A, &[r, inputs])?;
        let b = lowering.require(id, B, &[outputs, r])?;
        let p = lowering.require(id, P, &[u, r, r])?;
        let v = &mixtures[(idx / size).min(groups - 1)];
        let inner = p.broadcast_mul(&v.reshape((u, 1, 1))?)?.sum(0)?; // [r, r]
        lowering.ranks.insert(r);
        add_factors(lowering, linear, (&a, &b.matmul(&inner)?))?;
    }
    Ok(())
}
