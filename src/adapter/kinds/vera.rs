//! VeRA: random projections that all linears share, scaled by two learned vectors,
//! `y += lambda_b * (B[:out] (lambda_d * (A[:, :in] x)))` (PEFT 0.21 `tuners/vera`). PVeRA learns a distribution of the
//! inner vector; its mean, the first half of A and lambda_d, is what serves (`tuners/pvera`).

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, Delta, SharedMatrix};

/// The row of VeRA.
pub(super) const VERA: Kind = Kind {
    peft_type: "VERA",
    title: "VeRA",
    served_as: "low-rank delta whose matrices all linears and adapters share",
    merged_as: "W + diag(lambda_b) B diag(lambda_d) A",
    suffixes: &["vera_lambda_b", "vera_lambda_d"],
    shared: &["base_model.vera_A", "base_model.vera_B"],
    pairs: &[("vera_lambda_b", "vera_lambda_d")],
    fields: &[
        ("r", Rule::Read),
        ("bias", Rule::Read),
        (SAVED, Rule::Read),
        ("projection_prng_key", Rule::Ignored),
        ("d_initial", Rule::Ignored),
        ("init_weights", Rule::Ignored),
        ("vera_dropout", Rule::Ignored),
    ],
    rank: |suffix, shape| match (suffix, shape) {
        ("vera_lambda_d", [r]) => Some(*r),
        _ => None,
    },
    check,
    lower: |lowering| scaled_projections(lowering, "vera", 1),
    ..Kind::PLAIN
};

/// The row of PVeRA.
pub(super) const PVERA: Kind = Kind {
    peft_type: "PVERA",
    title: "PVeRA",
    served_as: "low-rank delta of the mean, with shared matrices",
    suffixes: &["pvera_lambda_b", "pvera_lambda_d"],
    shared: &["base_model.pvera_A", "base_model.pvera_B"],
    pairs: &[("pvera_lambda_b", "pvera_lambda_d")],
    fields: &[
        ("r", Rule::Read),
        ("bias", Rule::Read),
        (SAVED, Rule::Read),
        ("projection_prng_key", Rule::Ignored),
        ("generator_seed", Rule::Ignored),
        ("d_initial", Rule::Ignored),
        ("init_weights", Rule::Ignored),
        ("pvera_dropout", Rule::Ignored),
        ("sample_at_inference", Rule::Refused("answers would differ from one request to the next")),
    ],
    rank: |suffix, shape| match (suffix, shape) {
        ("pvera_lambda_d", [halves]) => Some(halves / 2),
        _ => None,
    },
    lower: |lowering| scaled_projections(lowering, "pvera", 2),
    ..VERA
};

const SAVED: &str = "save_projection";
/// PEFT's default of `r`.
const DEFAULT_R: usize = 256;

fn check(config: &Config) -> std::result::Result<(), AdapterError> {
    config.positive("r")?;
    if config.get(SAVED).is_some() && !config.flag(SAVED)? {
        let reason = "the file does not hold the random projections; load it with PEFT and save it with true";
        return Err(field_error(SAVED, reason));
    }
    Matcher::parse(config, "target_modules").map(drop)
}

/// Lowers tensors that begin with `prefix`; A and lambda_d have `parts` times r rows, the first r of which count.
fn scaled_projections(
    lowering: &mut Lowering<'_>,
    prefix: &str,
    parts: usize,
) -> std::result::Result<(), AdapterError> {
    let linears = adapted::linears(lowering)?;
    let r = lowering.config.positive("r")?.unwrap_or(DEFAULT_R);
    let name = |end: &str| format!("{prefix}_{end}");
    let shared = |end: &str| format!("base_model.{prefix}_{end}");
    let inputs = linears.iter().map(|linear| linear.in_features).max().unwrap_or(0);
    let outputs = linears.iter().map(|linear| linear.out_features).max().unwrap_or(0);
    let a = projection(lowering, &shared("A"), |shape| {
        (shape.len() == 2 && shape[0] == parts * r && shape[1] >= inputs, format!("[{}, {inputs} or more]", parts * r))
    })?;
    let b = projection(lowering, &shared("B"), |shape| {
        (shape.len() == 2 && shape[0] >= outputs && shape[1] == r, format!("[{outputs} or more, {r}]"))
    })?;
    let (mut downs, mut ups) = (BTreeMap::new(), BTreeMap::new());
    for linear in linears {
        let AdaptedLinear { id, in_features: inputs, out_features: outputs } = linear;
        let d = lowering.require(id, &name("lambda_d"), &[parts * r])?.narrow(0, 0, r)?;
        let g = lowering.require(id, &name("lambda_b"), &[outputs])?;
        let a = slice(&mut downs, inputs, || a.narrow(0, 0, r)?.narrow(1, 0, inputs))?;
        let b = slice(&mut ups, outputs, || b.narrow(0, 0, outputs))?;
        lowering.ranks.insert(r);
        lowering.out.linears.entry(id).or_default().deltas.push(Delta::SharedLowRank { a, b, d, g });
    }
    Ok(())
}

/// The slice of a projection for so many features; `cut` makes it for the first linear that has them.
fn slice(
    slices: &mut BTreeMap<usize, Arc<SharedMatrix>>,
    features: usize,
    cut: impl FnOnce() -> Result<Tensor>,
) -> Result<Arc<SharedMatrix>> {
    if let Some(slice) = slices.get(&features) {
        return Ok(slice.clone());
    }
    let slice = Arc::new(SharedMatrix::new(&cut()?)?);
    slices.insert(features, slice.clone());
    Ok(slice)
}

/// Takes a shared tensor; `fits` tells whether its shape does, and what was expected.
fn projection(
    lowering: &mut Lowering<'_>,
    name: &str,
    fits: impl Fn(&[usize]) -> (bool, String),
) -> std::result::Result<Tensor, AdapterError> {
    let shape = lowering.shared_shape(name).unwrap_or_default().to_vec();
    match fits(&shape) {
        (false, expected) if !shape.is_empty() => {
            Err(lowering.refuse_shared(name, format!("expected shape {expected}, found {shape:?}")))
        }
        _ => lowering.require_shared(name, &shape),
    }
}
