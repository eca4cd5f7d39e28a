//! AdaLoRA: LoRA in the form of a singular value decomposition, pruned during training,
//! `y += s B ((A * E) x)` with `s = alpha / (init_r + 1e-5)` (PEFT 0.21 `tuners/adalora`).
//!
//! A pruned linear keeps fewer ranks than `init_r`, as `rank_pattern` lists them; the scale stays that of `init_r`.

use std::collections::BTreeMap;

use serde_json::Value;

use super::Kind;
use crate::adapter::AdapterError;
use crate::adapter::config::{Config, Rule, field_error, wrong_type};
use crate::adapter::linears::{LinearSite, adapted_linears, add_factors};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;

/// The row of the table of kinds.
pub(super) const ADALORA: Kind = Kind {
    peft_type: "ADALORA",
    title: "AdaLoRA",
    served_as: "low-rank delta of the ranks that are left",
    merged_as: "W + s B diag(E) A",
    suffixes: &[A, B, E, RANKNUM],
    may_be_empty: true,
    pairs: &[(A, B), (A, E)],
    fields: FIELDS,
    rank: |suffix, shape| match (suffix, shape) {
        (A | E, [r, _]) | (B, [_, r]) if *r > 0 => Some(*r),
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

const A: &str = "lora_A";
const B: &str = "lora_B";
const E: &str = "lora_E";
/// A number that old releases wrote; it is `init_r`.
const RANKNUM: &str = "ranknum";
const PATTERN: &str = "rank_pattern";
/// PEFT adds this to the rank it divides by.
const EPSILON: f64 = 1e-5;

/// PEFT's config inherits every field of plain LoRA, most of which this kind never reads.
const FIELDS: &[(&str, Rule)] = &[
    ("init_r", Rule::Read),
    ("lora_alpha", Rule::Read),
    (PATTERN, Rule::Read),
    ("bias", Rule::Read),
    ("r", Rule::Ignored),
    ("target_r", Rule::Ignored),
    ("tinit", Rule::Ignored),
    ("tfinal", Rule::Ignored),
    ("deltaT", Rule::Ignored),
    ("beta1", Rule::Ignored),
    ("beta2", Rule::Ignored),
    ("orth_reg_weight", Rule::Ignored),
    ("total_step", Rule::Ignored),
    ("init_lora_weights", Rule::Ignored),
    ("lora_dropout", Rule::Ignored),
    ("loftq_config", Rule::Ignored),
    ("megatron_config", Rule::Ignored),
    ("megatron_core", Rule::Ignored),
    ("runtime_config", Rule::Ignored),
    ("qalora_group_size", Rule::Ignored),
    ("use_rslora", Rule::Ignored),
    ("alpha_pattern", Rule::Ignored),
    ("lora_bias", Rule::Ignored),
];

fn check(config: &Config) -> Result<(), AdapterError> {
    options(config)?;
    masks(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

/// `init_r` and alpha.
fn options(config: &Config) -> Result<(usize, f64), AdapterError> {
    Ok((config.positive("init_r")?.unwrap_or(12), config.number("lora_alpha")?.unwrap_or(8.0)))
}

/// The ranks that are left, by module path.
fn masks(config: &Config) -> Result<BTreeMap<String, usize>, AdapterError> {
    let mut ranks = BTreeMap::new();
    for (name, mask) in config.entries(PATTERN)? {
        let path = name.strip_suffix(".default").unwrap_or(name);
        let reason = || field_error(PATTERN, format!("`{name}` does not end with `.{E}`"));
        let path = path.strip_suffix(E).and_then(|path| path.strip_suffix('.')).ok_or_else(reason)?;
        let items = mask.as_array().ok_or_else(|| wrong_type(PATTERN, "a list of booleans", mask))?;
        let mut left = 0;
        for item in items {
            let Value::Bool(kept) = item else { return Err(wrong_type(PATTERN, "a boolean", item)) };
            left += usize::from(*kept);
        }
        ranks.insert(path.to_owned(), left);
    }
    Ok(ranks)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let (init_r, alpha) = options(&lowering.config)?;
    let masks = masks(&lowering.config)?;
    if let Some(path) = masks.keys().find(|path| lowering.base.sites().find(path).is_none()) {
        return Err(field_error(PATTERN, format!("names `{path}`, which the base model does not have")));
    }
    for linear in adapted_linears(lowering)? {
        let LinearSite { id, inputs, outputs } = linear;
        lowering.discard(id, RANKNUM);
        let r = masks.get(&lowering.site(id).path).copied().unwrap_or(init_r);
        let found = lowering.shape(id, A).and_then(|shape| shape.first().copied()).unwrap_or(r);
        if found != r {
            return Err(lowering.refuse(id, A, format!("expected rank {r} (`init_r`, `{PATTERN}`), found {found}")));
        }
        if r == 0 {
            for suffix in [A, B, E] {
                lowering.discard(id, suffix);
            }
            continue;
        }
        let a = lowering.require(id, A, &[r, inputs])?;
        let e = lowering.require(id, E, &[r, 1])?;
        let b = lowering.require(id, B, &[outputs, r])?;
        // PEFT takes the rank that is left where there is no alpha.
        let alpha = if alpha > 0.0 { alpha } else { r as f64 };
        let b = (b * (alpha / (init_r as f64 + EPSILON)))?;
        lowering.ranks.insert(r);
        add_factors(lowering, linear, (&a.broadcast_mul(&e)?, &b))?;
    }
    Ok(())
}
