//! Super-Tuning, and Supra with a low-rank term beside it: some entries of the weight change, at flat row-major places
//! (PEFT 0.21 `tuners/supertuning`),
//!
//! ```text
//! W'.flat[index] = W.flat[index] + value          and, with r, + (alpha / r) B A
//! ```

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, Delta};

/// The row of the table of kinds.
pub(super) const SUPERTUNING: Kind = Kind {
    peft_type: "SUPERTUNING",
    title: "Super-Tuning, Supra",
    served_as: "sparse delta, or an own dense weight where the entries are many; low-rank delta with r",
    merged_as: "W + values at indexes + (alpha / r) B A",
    suffixes: &[VALUES, INDEXES, A, B],
    pairs: &[(A, B)],
    integers: &[INDEXES],
    fields: &[
        ("r", Rule::Read),
        ("lora_alpha", Rule::Read),
        ("save_precomputed_indices", Rule::Read),
        ("sparsity", Rule::Read),
        ("select_top", Rule::Ignored),
        ("lora_dropout", Rule::Ignored),
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

const VALUES: &str = "supertuning_values";
const INDEXES: &str = "supertuning_indices";
const A: &str = "supertuning_lora_A.weight";
const B: &str = "supertuning_lora_B.weight";
/// PEFT's default of `sparsity`.
const DEFAULT_SPARSITY: f64 = 0.99;

fn check(config: &Config) -> Result<(), AdapterError> {
    let field = "save_precomputed_indices";
    if config.get(field).is_some() && !config.flag(field)? {
        let reason = "the file does not say which entries it changes, and equal magnitudes make them ambiguous; \
                      save it with `save_precomputed_indices` true";
        return Err(field_error(field, reason));
    }
    config.positive("r")?;
    config.number("lora_alpha")?;
    config.number("sparsity")?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let r = lowering.config.positive("r")?;
    let alpha = lowering.config.number("lora_alpha")?;
    let sparsity = lowering.config.number("sparsity")?.unwrap_or(DEFAULT_SPARSITY);
    for AdaptedLinear { id, in_features, out_features } in adapted::linears(lowering)? {
        let all = in_features.saturating_mul(out_features);
        let count = (all as f64 * (1.0 - sparsity)) as usize;
        if !lowering.has(id, INDEXES) {
            let reason = "is missing: the file does not say which entries it changes; save it with \
                          `save_precomputed_indices` true";
            return Err(lowering.refuse(id, INDEXES, reason));
        }
        if let Some(found) = lowering.shape(id, VALUES).filter(|shape| *shape != [count]) {
            let reason = format!("expected {count} values (`sparsity`), found shape {found:?}");
            return Err(lowering.refuse(id, VALUES, reason));
        }
        let places = lowering.require_indexes(id, INDEXES, (&[count], all))?;
        let values = lowering.require(id, VALUES, &[count])?.to_vec1::<f32>()?;
        let entries = places.iter().zip(values).map(|(at, value)| (at / in_features, at % in_features, value));
        lowering.add_sparse(id, entries.collect())?;
        if let Some(r) = r {
            let a = lowering.require(id, A, &[r, in_features])?;
            let b = lowering.require(id, B, &[out_features, r])?;
            let scale = alpha.map_or(2.0, |alpha| alpha / r as f64);
            lowering.ranks.insert(r);
            lowering.out.linears.entry(id).or_default().deltas.push(Delta::LowRank { a, b: (b * scale)? });
        }
    }
    Ok(())
}
