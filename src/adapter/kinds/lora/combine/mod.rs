//! One LoRA out of several, as a directory that PEFT reads too: what `patchbay adapter combine` and `:combine` make.
//!
//! Adapter `k` has weight `w_k` and at a module the factors `A_k` (r, in), `B_k` (out, r) and the scale `s_k`. Where an
//! adapter does not touch a module it adds nothing there. The result has its scales folded in: its own are 1.
//!
//! | mode | result | source |
//! |---|---|---|
//! | `stack` | `[A_k]`, `[w_k s_k B_k]`: exactly the weighted sum; with `rank` the nearest of that rank | PEFT 0.21 `add_weighted_adapter`, `cat` and `svd` |
//! | `mean` | `sum p_k A_k`, `sum p_k B_k` | LoRA-FAIR, arXiv 2411.14961, its starting point |
//! | `fair` | the same `A`, and `B` moved so that `B A` is near `sum p_k B_k A_k` | LoRA-FAIR in closed form |
//! | `ties` | factors trimmed to `density`, signs elected, the agreeing ones averaged | PEFT 0.21 `merge_utils.ties` |
//! | `dare` | factors dropped to `density` at random and scaled up, then the weighted sum | PEFT 0.21 `merge_utils.dare_linear` |
//!
//! In `mean` and `fair` `p_k = w_k / sum w`, and `sqrt s_k` is folded into each factor first; in `ties` and `dare` the
//! factors are weighted with `sqrt(w_k s_k)`, the sign with `A`, as PEFT does.

mod factors;
mod read;

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;
use serde::Deserialize;
use serde_json::{Map, Value, json};

pub(super) use self::factors::Factors;
use self::read::Source;
use crate::adapter::{AdapterError, AdapterFiles, keys};

/// Most adapters that are combined at once.
const INPUTS_MAX: usize = 64;
/// Weights from minus this to this are accepted.
const WEIGHT_MAX: f32 = 100.0;
/// `lambda` of `fair` where it is not given; LoRA-FAIR's own.
const LAMBDA_DEFAULT: f64 = 0.01;

/// An adapter that goes into a combination.
#[derive(Clone, Copy, Debug)]
pub struct CombineInput<'a> {
    /// Name, for messages.
    pub name: &'a str,
    /// Its files.
    pub files: &'a AdapterFiles,
    /// Its weight.
    pub weight: f32,
}

/// How adapters are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CombineMode {
    /// Factor means.
    Mean,
    /// Concatenation: the weighted sum, exactly.
    Stack,
    /// Factor means, corrected towards the weighted sum.
    Fair,
    /// Trimmed factors with elected signs.
    Ties,
    /// Randomly dropped factors.
    Dare,
}

/// A mode with its parameters, as they were given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CombineOptions {
    /// How.
    pub mode: CombineMode,
    /// Rank that `stack` is cut down to.
    pub rank: Option<usize>,
    /// Share of the values that `ties` and `dare` keep, in (0, 1]; they need it.
    pub density: Option<f64>,
    /// Seed of `dare`; 0 where it is not given.
    pub seed: Option<u64>,
    /// Weight of the correction's own size in `fair`, at least 0. More keeps it nearer to `mean`.
    pub lambda: Option<f64>,
}

/// A mode with checked parameters.
#[derive(Clone, Copy, Debug)]
enum Method {
    Mean,
    Stack { rank: Option<usize> },
    Fair { lambda: f64 },
    Ties { density: f64 },
    Dare { density: f64, seed: u64 },
}

/// Combines LoRAs to one.
///
/// # Errors
/// `Part` where one of the files cannot be combined; `Combination` that names an option, the weights or a module.
pub fn combine(inputs: &[CombineInput<'_>], options: &CombineOptions) -> Result<AdapterFiles, AdapterError> {
    let method = options.method()?;
    check_weights(inputs, method)?;
    let sources: Vec<Source> = inputs.iter().map(Source::read).collect::<Result<_, _>>()?;
    let paths: BTreeSet<&String> = sources.iter().flat_map(|source| source.modules.keys()).collect();
    let total: f32 = inputs.iter().map(|input| input.weight).sum();
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    let mut ranks: BTreeMap<&str, usize> = BTreeMap::new();
    for path in paths {
        let concerned = inputs.iter().zip(&sources).enumerate();
        let terms: Vec<Term<'_>> = concerned
            .filter_map(|(idx, (input, source))| {
                let (weight, factors) = (input.weight, source.modules.get(path)?);
                Some(Term { idx, name: input.name, weight, share: weight / total, factors })
            })
            .collect();
        check_shapes(path, &terms, method)?;
        let [a, b] = factors::combined(path, &terms, method)?;
        ranks.insert(path, a.dim(0)?);
        let [name_a, name_b] = terms[0].factors.suffixes();
        tensors.insert(keys::key_of(path, name_a), a);
        tensors.insert(keys::key_of(path, name_b), b);
    }
    let config = config(&sources[0], &ranks);
    let format = Some([("format".to_owned(), "pt".to_owned())].into());
    let weights = safetensors::serialize(&tensors, format)
        .map_err(|error| AdapterError::Malformed { file: "adapter_model.safetensors", reason: error.to_string() })?;
    Ok(AdapterFiles::new(format!("{config:#}\n").into_bytes(), weights))
}

/// What one adapter brings to a module.
struct Term<'a> {
    /// Place of the adapter among all.
    idx: usize,
    name: &'a str,
    weight: f32,
    /// Its part of the sum of all weights.
    share: f32,
    factors: &'a Factors,
}

impl CombineOptions {
    /// Refuses parameters that the mode does not have, lacks, or has out of range.
    fn method(&self) -> Result<Method, AdapterError> {
        use CombineMode::{Dare, Fair, Mean, Stack, Ties};
        let given = [
            ("rank", self.rank.is_some(), &[Stack][..], "`stack`"),
            ("density", self.density.is_some(), &[Ties, Dare], "`ties` and `dare`"),
            ("seed", self.seed.is_some(), &[Dare], "`dare`"),
            ("lambda", self.lambda.is_some(), &[Fair], "`fair`"),
        ];
        for (field, is_given, modes, names) in given {
            if is_given && !modes.contains(&self.mode) {
                return Err(fault(field, format!("belongs to the mode {names}")));
            }
        }
        if self.rank == Some(0) {
            return Err(fault("rank", "expected at least 1, found 0"));
        }
        let density = || match self.density {
            Some(density) if density > 0.0 && density <= 1.0 => Ok(density),
            Some(density) => Err(fault("density", format!("expected more than 0 and at most 1, found {density}"))),
            None => Err(fault("density", "is missing: the share of values that this mode keeps")),
        };
        Ok(match self.mode {
            Mean => Method::Mean,
            Stack => Method::Stack { rank: self.rank },
            Fair => {
                let lambda = self.lambda.unwrap_or(LAMBDA_DEFAULT);
                if !(0.0..=f64::MAX).contains(&lambda) {
                    return Err(fault("lambda", format!("expected a number of at least 0, found {lambda}")));
                }
                Method::Fair { lambda }
            }
            Ties => Method::Ties { density: density()? },
            Dare => Method::Dare { density: density()?, seed: self.seed.unwrap_or_default() },
        })
    }
}

impl Method {
    /// Whether weights are shares of a whole.
    fn averages(self) -> bool {
        matches!(self, Self::Mean | Self::Fair { .. })
    }
}

fn check_weights(inputs: &[CombineInput<'_>], method: Method) -> Result<(), AdapterError> {
    if !(1..=INPUTS_MAX).contains(&inputs.len()) {
        return Err(fault("adapters", format!("expected 1 to {INPUTS_MAX}, found {}", inputs.len())));
    }
    for CombineInput { name, weight, .. } in inputs {
        let least = if method.averages() { 0.0 } else { -WEIGHT_MAX };
        if !(least..=WEIGHT_MAX).contains(weight) {
            let reason = format!("`{name}` must have one from {least} to {WEIGHT_MAX} here, found {weight}");
            return Err(fault("weight", reason));
        }
    }
    if method.averages() && inputs.iter().all(|input| input.weight == 0.0) {
        return Err(fault("weight", "all are 0"));
    }
    Ok(())
}

fn check_shapes(path: &str, terms: &[Term<'_>], method: Method) -> Result<(), AdapterError> {
    let first = &terms[0];
    for other in &terms[1..] {
        let (sizes, found) = (first.factors.sizes(), other.factors.sizes());
        if sizes != found {
            let reason = format!(
                "`{path}` has {} inputs and {} outputs in `{}`, but {} and {} in `{}`: they belong to different base models",
                sizes.0, sizes.1, first.name, found.0, found.1, other.name
            );
            return Err(fault("adapters", reason));
        }
        let (rank, found) = (first.factors.rank(), other.factors.rank());
        if rank != found && !matches!(method, Method::Stack { .. }) {
            let (name, other) = (first.name, other.name);
            let reason =
                format!("`{path}` has rank {rank} in `{name}` and {found} in `{other}`: only `stack` combines these");
            return Err(fault("mode", reason));
        }
    }
    Ok(())
}

/// The config of an adapter with these ranks, whose scales are 1: alpha is the rank everywhere.
fn config(first: &Source, ranks: &BTreeMap<&str, usize>) -> Value {
    let usual = ranks.values().copied().max().unwrap_or(1);
    let others: Map<String, Value> = ranks
        .iter()
        .filter(|(_, rank)| **rank != usual)
        .map(|(path, rank)| ((*path).to_owned(), Value::from(*rank)))
        .collect();
    json!({
        "base_model_name_or_path": first.base_model,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": usual,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "peft_type": super::LORA.peft_type,
        "r": usual,
        "rank_pattern": others,
        "target_modules": ranks.keys().collect::<Vec<_>>(),
        "task_type": first.task_type,
        "use_rslora": false,
    })
}

fn fault(field: &str, reason: impl Into<String>) -> AdapterError {
    AdapterError::Combination { field: field.to_owned(), reason: reason.into() }
}

#[cfg(test)]
mod tests;
