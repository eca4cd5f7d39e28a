//! SHiRA: some entries of the weight change, `W'[row, column] = W[row, column] + value` (PEFT 0.21 `tuners/shira`), and
//! SaRA, which chooses the entries otherwise and has no PEFT type: its files have the same two tensors under its name.

use super::Kind;
use crate::adapter::AdapterError;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;

/// The row of SHiRA.
pub(super) const SHIRA: Kind = Kind {
    peft_type: "SHIRA",
    title: "SHiRA",
    served_as: "sparse delta, or an own dense weight where the entries are many",
    merged_as: "W + values at indexes",
    suffixes: &["shira_weight", "shira_indices"],
    pairs: &[("shira_weight", "shira_indices")],
    integers: &["shira_indices"],
    fields: &[
        ("r", Rule::Read),
        ("mask_type", Rule::Ignored),
        ("random_seed", Rule::Ignored),
        ("init_weights", Rule::Ignored),
    ],
    check,
    lower,
    ..Kind::PLAIN
};

/// The row of SaRA. Any number of entries is as good as another: there is no r.
pub(super) const SARA: Kind = Kind {
    peft_type: "SARA",
    title: "SaRA",
    suffixes: &["sara_weight", "sara_indices"],
    pairs: &[("sara_weight", "sara_indices")],
    integers: &["sara_indices"],
    fields: &[("threshold", Rule::Ignored), ("init_weights", Rule::Ignored)],
    ..SHIRA
};

/// PEFT's default of `r`.
const DEFAULT_R: usize = 32;

fn check(config: &Config) -> Result<(), AdapterError> {
    config.positive("r")?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let kind = lowering.kind;
    let (values_name, indexes_name) = kind.pairs[0];
    let has_r = kind.fields.iter().any(|(field, _)| *field == "r");
    let r = lowering.config.positive("r")?.unwrap_or(DEFAULT_R);
    for AdaptedLinear { id, in_features, out_features } in adapted::linears(lowering)? {
        let found = lowering.shape(id, values_name).and_then(|shape| shape.first().copied()).unwrap_or_default();
        let expected = r.saturating_mul(in_features.saturating_add(out_features));
        if has_r && found != expected {
            let reason = format!("expected {expected} values (`r` times inputs and outputs), found {found}");
            return Err(lowering.refuse(id, values_name, reason));
        }
        let places = lowering.require_indexes(id, indexes_name, (&[2, found], in_features.max(out_features)))?;
        let values = lowering.require(id, values_name, &[found])?.to_vec1::<f32>()?;
        let (rows, columns) = places.split_at(found);
        if rows.iter().any(|row| *row >= out_features) || columns.iter().any(|column| *column >= in_features) {
            let reason = format!("a place is outside of {out_features} outputs and {in_features} inputs");
            return Err(lowering.refuse(id, indexes_name, reason));
        }
        let entries = rows.iter().zip(columns).zip(values).map(|((row, column), value)| (*row, *column, value));
        lowering.add_sparse(id, entries.collect())?;
    }
    Ok(())
}
