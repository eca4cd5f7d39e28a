//! Arrow: every token chooses among LoRA experts of one base, linear by linear, by how its input lies to what each expert
//! amplifies most; optionally with general experts subtracted first (PEFT 0.21 `tuners/lora/arrow.py`; arXiv 2405.11157).
//!
//! PEFT puts an Arrow model together from several directories when it runs, so there is no file of it. This is the format
//! of the collected experts that `docs/adapters.md` describes, with the tensors stacked as PEFT's forward stacks them.

use candle_core::{DType, Device, Tensor};

use super::Kind;
use crate::adapter::config::{Config, Rule, as_number, field_error};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::{Matcher, Patterns};
use crate::adapter::torch_random::TorchRandom;
use crate::adapter::{AdapterError, Delta, SiteId, SiteKind};

/// The row of the table of kinds.
pub(super) const ARROW: Kind = Kind {
    peft_type: "ARROW",
    title: "Arrow (routed LoRA experts)",
    served_as: "low-rank deltas with gates for each token and linear",
    merged_as: "not merged: each token has its own",
    suffixes: &[A, B, GENERAL_A, GENERAL_B],
    pairs: &[(A, B), (GENERAL_A, GENERAL_B)],
    fields: &[
        ("arrow_config", Rule::Read),
        ("experts", Rule::Read),
        ("general_experts", Rule::Read),
        ("modules_to_save", Rule::Refused("PEFT's routing knows LoRA on linears only")),
    ],
    rank: |suffix, shape| match (suffix, shape) {
        (A | GENERAL_A, [_, r, _]) | (B | GENERAL_B, [_, _, r]) => Some(*r),
        _ => None,
    },
    check: |config| Options::read(config).map(drop),
    lower,
    ..Kind::PLAIN
};

/// Down projections (experts, r, in).
const A: &str = "lora_A";
/// Up projections (experts, out, r).
const B: &str = "lora_B";
/// Down projections of the general experts (general experts, r, in).
const GENERAL_A: &str = "general_lora_A";
/// Up projections of the general experts (general experts, out, r).
const GENERAL_B: &str = "general_lora_B";

/// Steps of PEFT's power iteration.
const STEPS: usize = 15;
/// Steps at most where the start is arbitrary and only the limit counts.
const STEPS_MAX: usize = 2000;

const ROUTER_FIELDS: &[(&str, Rule)] = &[
    ("top_k", Rule::Read),
    ("router_temperature", Rule::Read),
    ("use_gks", Rule::Read),
    ("rng_seed", Rule::Read),
    ("task_adapter_names", Rule::Ignored),
    ("gks_adapter_names", Rule::Ignored),
];

/// What of an expert's own config, beside the common fields, is read or does not matter. The tensors tell which modules it
/// adapts.
const EXPERT_FIELDS: &[(&str, Rule)] = &[
    ("r", Rule::Ignored),
    ("lora_alpha", Rule::Read),
    ("use_rslora", Rule::Read),
    ("alpha_pattern", Rule::Read),
    ("bias", Rule::Read),
    ("init_lora_weights", Rule::Read),
    ("use_dora", Rule::Refused("Arrow of PEFT leaves DoRA's magnitudes out")),
    ("lora_bias", Rule::Refused("Arrow of PEFT leaves the biases of lora_B out")),
    ("modules_to_save", Rule::Refused("Arrow of PEFT routes LoRA on linears only")),
    ("rank_pattern", Rule::Ignored),
    ("lora_dropout", Rule::Ignored),
    ("qalora_group_size", Rule::Ignored),
    ("name", Rule::Ignored),
    ("megatron_core", Rule::Ignored),
    ("loftq_config", Rule::Ignored),
    ("eva_config", Rule::Ignored),
];

/// What the config says.
struct Options {
    experts: Vec<Expert>,
    general: usize,
    top_k: usize,
    temperature: f64,
    seed: Option<u64>,
}

/// One expert's scale factor.
struct Expert {
    alpha: f64,
    alphas: Patterns,
    rslora: bool,
}

impl Options {
    fn read(config: &Config) -> Result<Self, AdapterError> {
        let router = config.section("arrow_config")?.ok_or_else(|| field_error("arrow_config", "is missing"))?;
        if let Some(fault) = router.faults_among(&[ROUTER_FIELDS]).into_iter().next() {
            return Err(fault);
        }
        let experts = config.sections("experts")?.iter().map(Expert::read).collect::<Result<Vec<_>, _>>()?;
        let general = config.sections("general_experts")?;
        for expert in &general {
            Expert::read(expert)?;
        }
        let subtracts = router.flag("use_gks")?;
        if subtracts == general.is_empty() {
            let reason = format!("`use_gks` is {subtracts}, and there are {} of these", general.len());
            return Err(field_error("general_experts", reason));
        }
        let top_k = router.positive("top_k")?.unwrap_or(3);
        if top_k > experts.len() {
            return Err(field_error("top_k", format!("expected at most the {} experts, found {top_k}", experts.len())));
        }
        let temperature = router.number("router_temperature")?.unwrap_or(1.0);
        if temperature <= 0.0 {
            return Err(field_error("router_temperature", format!("expected a positive number, found {temperature}")));
        }
        let seed = router.count("rng_seed")?.map(|seed| seed as u64);
        Ok(Self { experts, general: general.len(), top_k, temperature, seed })
    }
}

impl Expert {
    fn read(config: &Config) -> Result<Self, AdapterError> {
        if let Some(fault) = config.faults(EXPERT_FIELDS).into_iter().next() {
            return Err(fault);
        }
        match config.string("peft_type")? {
            None | Some("LORA") => {}
            Some(other) => return Err(field_error("experts", format!("an expert is `{other}`, expected LORA"))),
        }
        if let Some(bias) = config.string("bias")?.filter(|bias| *bias != "none") {
            return Err(field_error("bias", format!("an expert has `{bias}`, expected none")));
        }
        if let Some(start) = config.get("init_lora_weights").and_then(|value| value.as_str())
            && !["gaussian", "eva", "orthogonal"].contains(&start)
        {
            let reason = format!("an expert was trained on a base that `{start}` changed; convert it with PEFT first");
            return Err(field_error("init_lora_weights", reason));
        }
        Ok(Self {
            alpha: config.number("lora_alpha")?.unwrap_or(8.0),
            alphas: Patterns::parse(config, "alpha_pattern")?,
            rslora: config.flag("use_rslora")?,
        })
    }

    fn scale(&self, path: &str, r: usize) -> Result<f64, AdapterError> {
        let alpha = self.alphas.get(path)?.map_or(Ok(self.alpha), |value| as_number("alpha_pattern", value))?;
        let r = r as f64;
        Ok(alpha / if self.rslora { r.sqrt() } else { r })
    }
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let options = Options::read(&lowering.config)?;
    let matcher = Matcher::parse(&lowering.config, "target_modules")?;
    let targets = lowering.targets(&matcher, |kind| matches!(kind, SiteKind::Linear { .. }))?;
    for id in lowering.unread_sites() {
        let Some(suffix) = lowering.kind_suffixes(id).first().map(|suffix| (*suffix).to_owned()) else { continue };
        if !targets.contains(&id) && !matcher.is_unset() {
            return Err(lowering.refuse(id, &suffix, "`target_modules` does not name its module"));
        }
        let SiteKind::Linear { in_features, out_features, .. } = lowering.site(id).kind else {
            let found = lowering.site(id).kind.noun();
            return Err(lowering.refuse(id, &suffix, format!("expected a linear, found {found}")));
        };
        let delta = routed(lowering, &options, id, (in_features, out_features))?;
        lowering.out.linears.entry(id).or_default().deltas.push(delta);
    }
    Ok(())
}

/// The routed term of one linear.
fn routed(
    lowering: &mut Lowering<'_>,
    options: &Options,
    id: SiteId,
    (inputs, outputs): (usize, usize),
) -> Result<Delta, AdapterError> {
    let count = options.experts.len();
    let r = match lowering.shape(id, A) {
        Some([_, r, _]) => *r,
        Some(found) => return Err(lowering.refuse(id, A, format!("expected 3 dimensions, found shape {found:?}"))),
        None => return Err(lowering.refuse(id, A, "is missing")),
    };
    lowering.ranks.insert(r);
    let mut a = lowering.require(id, A, &[count, r, inputs])?;
    let mut b = lowering.require(id, B, &[count, outputs, r])?;
    if options.general > 0 {
        let mean = |general: Tensor| general.mean_keepdim(0);
        a = a.broadcast_sub(&mean(lowering.require(id, GENERAL_A, &[options.general, r, inputs])?)?)?;
        b = b.broadcast_sub(&mean(lowering.require(id, GENERAL_B, &[options.general, outputs, r])?)?)?;
    }
    let path = &lowering.site(id).path;
    let (mut prototypes, mut scaled) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for (expert, options_of) in options.experts.iter().enumerate() {
        let (a, b) = (a.get(expert)?, b.get(expert)?);
        prototypes.push(prototype(&a, &b, options.seed)?);
        scaled.push((b * options_of.scale(path, r)?)?);
    }
    Ok(Delta::Routed {
        a: a.reshape((count * r, inputs))?,
        b: Tensor::cat(&scaled, 1)?, // [out, experts r]
        prototypes: Tensor::stack(&prototypes, 0)?,
        top_k: options.top_k,
        temperature: options.temperature as f32,
    })
}

/// The direction that `B A` amplifies most, up to its sign (in): by PEFT's power iteration on `(B A)^T (B A)` from the vector
/// that the seed draws; without a seed PEFT starts anywhere, so its limit is taken.
///
/// Each step is `v <- A^T (B^T B) (A v)`. It is followed in the r numbers of `z = A v`, where a step costs r^2.
fn prototype(a: &Tensor, b: &Tensor, seed: Option<u64>) -> Result<Tensor, AdapterError> {
    let (r, inputs) = a.dims2()?;
    let exact = |m: Tensor| m.to_dtype(DType::F64)?.to_vec2::<f64>();
    let start = Tensor::from_vec(TorchRandom::new(seed.unwrap_or(0)).normals(inputs), (inputs, 1), &Device::Cpu)?;
    let (down, up) = (a.to_dtype(DType::F64)?, b.to_dtype(DType::F64)?);
    let inner = up.t()?.matmul(&up)?; // [r, r]
    let step = exact(down.matmul(&down.t()?)?.matmul(&inner)?)?;
    let mut z: Vec<f64> = exact(a.matmul(&start)?)?.into_iter().flatten().collect();
    for _ in 1..if seed.is_some() { STEPS } else { STEPS_MAX } {
        let next = step.iter().map(|row| row.iter().zip(&z).map(|(m, z)| m * z).sum::<f64>());
        z = unit(next.collect());
    }
    let z = Tensor::from_vec(z, (r, 1), &Device::Cpu)?;
    let v = down.t()?.matmul(&inner.matmul(&z)?)?.flatten_all()?.to_vec1::<f64>()?;
    let v: Vec<f32> = unit(v).into_iter().map(|value| value as f32).collect();
    Ok(Tensor::from_vec(v, inputs, &Device::Cpu)?)
}

/// The vector at length one; zeros stay zeros.
fn unit(mut v: Vec<f64>) -> Vec<f64> {
    let norm = v.iter().map(|value| value * value).sum::<f64>().sqrt();
    if norm > 0.0 {
        v.iter_mut().for_each(|value| *value /= norm);
    }
    v
}
