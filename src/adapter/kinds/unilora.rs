//! Uni-LoRA: all low-rank factors are read from one short vector that all linears share, `A = theta[indices] * scales`
//! (PEFT 0.21 `tuners/unilora`). The indices are drawn at random; a file without them (`save_indices` false, PEFT's
//! default) does not determine the adapter here.

use candle_core::{Device, Tensor};

use super::Kind;
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::linears::{LinearSite, adapted_linears, add_factors};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, SiteId};

/// The row of the table of kinds.
pub(super) const UNILORA: Kind = Kind {
    peft_type: "UNILORA",
    title: "Uni-LoRA",
    served_as: "low-rank delta; refused without saved indices",
    merged_as: "W + B A, both read from theta",
    suffixes: &[INDEXES[0], INDEXES[1], SCALES[0], SCALES[1]],
    shared: &[THETA],
    integers: &INDEXES,
    pairs: &[(INDEXES[0], INDEXES[1]), (INDEXES[0], SCALES[0]), (INDEXES[1], SCALES[1])],
    fields: &[
        ("r", Rule::Read),
        ("theta_d_length", Rule::Read),
        (SAVED, Rule::Read),
        ("bias", Rule::Read),
        ("proj_seed", Rule::Ignored),
        ("init_theta_d_bound", Rule::Ignored),
        ("init_weights", Rule::Ignored),
        ("unilora_dropout", Rule::Ignored),
    ],
    rank: |suffix, shape| match shape {
        [r, _] if suffix == INDEXES[0] || suffix == SCALES[0] => Some(*r),
        [_, r] if suffix == INDEXES[1] || suffix == SCALES[1] => Some(*r),
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

const INDEXES: [&str; 2] = ["unilora_indices_A", "unilora_indices_B"];
const SCALES: [&str; 2] = ["unilora_scales_A", "unilora_scales_B"];
const THETA: &str = "base_model.unilora_theta_d";
const SAVED: &str = "save_indices";

fn check(config: &Config) -> Result<(), AdapterError> {
    options(config)?;
    if !config.flag(SAVED)? {
        let reason = "the file does not hold the random indices; load it with PEFT and save it with true";
        return Err(field_error(SAVED, reason));
    }
    Matcher::parse(config, "target_modules").map(drop)
}

/// `r` and `theta_d_length`.
fn options(config: &Config) -> Result<(usize, usize), AdapterError> {
    Ok((config.positive("r")?.unwrap_or(4), config.positive("theta_d_length")?.unwrap_or(256)))
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let (r, length) = options(&lowering.config)?;
    let linears = adapted_linears(lowering)?;
    if let Some(found) = lowering.shared_shape(THETA)
        && found != [length]
    {
        let reason = format!("expected shape [{length}] (`theta_d_length`), found {found:?}");
        return Err(lowering.refuse_shared(THETA, reason));
    }
    let theta = lowering.require_shared(THETA, &[length])?.to_vec1::<f32>()?;
    for linear in linears {
        let LinearSite { id, inputs, outputs } = linear;
        let a = factor(lowering, id, 0, [r, inputs], &theta)?;
        let b = factor(lowering, id, 1, [outputs, r], &theta)?;
        lowering.ranks.insert(r);
        add_factors(lowering, linear, (&a, &b))?;
    }
    Ok(())
}

/// `theta[indices] * scales` of the first or second factor, in f32.
fn factor(
    lowering: &mut Lowering<'_>,
    id: SiteId,
    which: usize,
    shape: [usize; 2],
    theta: &[f32],
) -> Result<Tensor, AdapterError> {
    let indexes = lowering.require_indexes(id, INDEXES[which], &shape)?;
    if let Some(index) = indexes.iter().find(|index| **index as usize >= theta.len()) {
        let reason = format!("index {index} is not below {} (`theta_d_length`)", theta.len());
        return Err(lowering.refuse(id, INDEXES[which], reason));
    }
    let values: Vec<f32> = indexes.iter().map(|index| theta[*index as usize]).collect();
    let scales = lowering.require(id, SCALES[which], &shape)?;
    Ok((Tensor::from_vec(values, &shape, &Device::Cpu)? * scales)?)
}
