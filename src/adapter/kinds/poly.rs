//! Poly: several low-rank skills per linear, mixed by a router that knows the task (PEFT 0.21 `tuners/poly`). With
//! S splits, K skills and task t: `w = sigmoid(logits[t])` as (S, K), divided by its sum over the skills; A and B are
//! mixed with w over K in each split, a split of A reads its part of the input, a split of B writes its part of the
//! output, and `y += B (A x) / r`.
//!
//! An adapter is one task of a file: the config field `task_id`, which is not PEFT's, names it.

use candle_core::Tensor;
use candle_nn::ops::sigmoid;

use super::Kind;
use super::task::{self, task};
use crate::adapter::AdapterError;
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::linears::{LinearSite, adapted_linears, add_factors};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;

/// The row of the table of kinds.
pub(super) const POLY: Kind = Kind {
    peft_type: "POLY",
    title: "Poly",
    served_as: "low-rank delta of one task",
    merged_as: "W + B A / r, both mixed for the task",
    suffixes: &[A, B, LOGITS],
    pairs: &[(A, B), (A, LOGITS)],
    fields: &[
        ("r", Rule::Read),
        ("poly_type", Rule::Read),
        ("n_tasks", Rule::Read),
        ("n_skills", Rule::Read),
        ("n_splits", Rule::Read),
        (task::FIELD, Rule::Read),
        ("init_weights", Rule::Ignored),
    ],
    rank: |suffix, shape| match (suffix, shape) {
        (A, [_, _, _, r]) | (B, [_, _, r, _]) => Some(*r),
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

const A: &str = "poly_lora_A";
const B: &str = "poly_lora_B";
const LOGITS: &str = "poly_router.module_logits";
/// PEFT adds this to the sum it divides by.
const EPSILON: f64 = 1e-12;

/// What the config says for all linears.
struct Options {
    r: usize,
    tasks: usize,
    skills: usize,
    splits: usize,
    task: usize,
}

fn check(config: &Config) -> Result<(), AdapterError> {
    Options::parse(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

impl Options {
    fn parse(config: &Config) -> Result<Self, AdapterError> {
        let number = |name: &str, default: usize| Ok::<_, AdapterError>(config.positive(name)?.unwrap_or(default));
        match config.string("poly_type")? {
            None | Some("poly") => {}
            Some(other) => return Err(field_error("poly_type", format!("expected `poly`, found `{other}`"))),
        }
        let tasks = number("n_tasks", 1)?;
        let task = task(config, tasks)?;
        Ok(Self { r: number("r", 8)?, tasks, skills: number("n_skills", 4)?, splits: number("n_splits", 1)?, task })
    }
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let Options { r, tasks, skills, splits, task } = Options::parse(&lowering.config)?;
    for linear in adapted_linears(lowering)? {
        let LinearSite { id, inputs, outputs } = linear;
        if inputs % splits != 0 || outputs % splits != 0 {
            let reason = format!("{splits} splits do not divide {inputs} inputs and {outputs} outputs");
            return Err(lowering.refuse(id, A, reason));
        }
        let a = lowering.require(id, A, &[splits, skills, inputs / splits, r])?;
        let b = lowering.require(id, B, &[splits, skills, r, outputs / splits])?;
        let logits = lowering.require(id, LOGITS, &[tasks, splits * skills])?;
        let weights = sigmoid(&logits.narrow(0, task, 1)?.reshape((splits, skills))?)?;
        let weights = weights.broadcast_div(&(weights.sum_keepdim(1)? + EPSILON)?)?;
        let weights = weights.reshape((splits, skills, 1, 1))?;
        let mixed = |skills: &Tensor| skills.broadcast_mul(&weights)?.sum(1);
        let a = mixed(&a)?.reshape((inputs, r))?.t()?.contiguous()?; // [r, in]
        let b = mixed(&b)?.transpose(1, 2)?.contiguous()?.reshape((outputs, r))?;
        lowering.ranks.insert(r);
        add_factors(lowering, linear, (&a, &(b / r as f64)?))?;
    }
    Ok(())
}
