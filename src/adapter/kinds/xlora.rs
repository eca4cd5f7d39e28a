//! X-LoRA: LoRA experts that every token mixes by gates of its own. A small classifier reads the last hidden state that the
//! bare base has of the token, and `y = W x + w sum_e gate[layer, e] s_e B_e A_e x` (PEFT 0.21 `tuners/xlora`;
//! arXiv 2402.07148).
//!
//! PEFT names the experts by number, and keeps each as a LoRA directory of its own. A layer, to PEFT, is a linear that some
//! expert adapts; they are counted in the order in which the base model declares its modules.

use std::collections::BTreeSet;

use candle_core::{Device, Tensor};

use super::Kind;
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::lower::{open, run};
use crate::adapter::lowering::Lowering;
use crate::adapter::{
    AdapterError, AdapterFiles, Delta, GateNetwork, GateRule, LinearSlots, LowerOptions, LoweredAdapter, Pre, Scale,
    SiteId, Weight,
};

/// The row of the table of kinds.
pub(super) const XLORA: Kind = Kind {
    peft_type: "XLORA",
    title: "X-LoRA (gated LoRA experts)",
    served_as: "low-rank deltas with gates that the bare base's pass over the same tokens gives",
    merged_as: "not merged: each token has its own",
    shared: &[CLASSIFIER],
    parts: experts,
    fields: &[
        ("adapters", Rule::Read),
        ("hidden_size", Rule::Read),
        ("enable_softmax", Rule::Read),
        ("enable_softmax_topk", Rule::Read),
        ("softmax_temperature", Rule::Read),
        ("layerwise_scalings", Rule::Read),
        ("top_k_lora", Rule::Read),
        ("xlora_depth", Rule::Read),
        ("xlora_size", Rule::Read),
        ("xlora_dropout_p", Rule::Read),
        ("scaling_pass_value", Rule::Read),
        ("global_scaling_weight", Rule::Read),
        ("use_trainable_adapters", Rule::Ignored),
        ("target_modules", Rule::Refused(EXPERTS_SAY)),
        ("exclude_modules", Rule::Refused(EXPERTS_SAY)),
        ("layers_to_transform", Rule::Refused(EXPERTS_SAY)),
        ("layers_pattern", Rule::Refused(EXPERTS_SAY)),
        ("modules_to_save", Rule::Refused("PEFT's gates weigh LoRA on linears only")),
    ],
    check: |config| Options::parse(config).map(drop),
    lower,
    ..Kind::PLAIN
};

/// What the names of the classifier's tensors begin with.
const CLASSIFIER: &str = "base_model.internal_xlora_classifier";
const EXPERTS_SAY: &str = "each expert says itself what it adapts";
/// Experts at most.
const EXPERTS_MAX: usize = 64;

/// What PEFT's X-LoRA leaves out of an expert, or computes in another way than LoRA alone does.
const EXPERT_FIELDS: &[&str] = &[
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "modules_to_save",
];

/// What the config says.
struct Options {
    experts: usize,
    hidden_size: usize,
    /// Linears of the classifier.
    depth: usize,
    /// What its inner layers put out.
    width: usize,
    /// Between one linear's number and the next: a ReLU is between them, and a dropout where there is one.
    stride: usize,
    by_layer: bool,
    weight: f64,
    rule: GateRule,
}

/// How many experts the config names.
fn experts(config: &Config) -> Result<usize, AdapterError> {
    let names = config.entries("adapters")?;
    let count = names.len();
    if !(1..=EXPERTS_MAX).contains(&count) {
        return Err(field_error("adapters", format!("expected 1 to {EXPERTS_MAX} experts, found {count}")));
    }
    for number in 0..count {
        if !names.iter().any(|(name, _)| **name == number.to_string()) {
            let reason =
                format!("expected the names `0` to `{}`, as PEFT loads them; `{number}` is missing", count - 1);
            return Err(field_error("adapters", reason));
        }
    }
    Ok(count)
}

impl Options {
    fn parse(config: &Config) -> Result<Self, AdapterError> {
        let experts = experts(config)?;
        let top_k = config.positive("top_k_lora")?;
        if let Some(k) = top_k.filter(|k| *k > experts) {
            return Err(field_error("top_k_lora", format!("expected at most the {experts} experts, found {k}")));
        }
        let temperature = config.number("softmax_temperature")?.unwrap_or(1.0);
        if temperature <= 0.0 {
            return Err(field_error("softmax_temperature", format!("expected a positive number, found {temperature}")));
        }
        if let Some(value) = config.number("scaling_pass_value")?.filter(|value| *value != 0.0) {
            let reason = format!("expected 0, which makes the first pass one of the bare base; found {value}");
            return Err(field_error("scaling_pass_value", reason));
        }
        let softmax = config.get("enable_softmax").is_none() || config.flag("enable_softmax")?;
        let dropout = config.number("xlora_dropout_p")?.unwrap_or(0.2);
        Ok(Self {
            experts,
            hidden_size: config.positive("hidden_size")?.unwrap_or(4096),
            depth: config.positive("xlora_depth")?.unwrap_or(1),
            width: config.positive("xlora_size")?.unwrap_or(2048),
            stride: if dropout > 0.0 { 3 } else { 2 },
            by_layer: config.flag("layerwise_scalings")?,
            weight: config.number("global_scaling_weight")?.unwrap_or(1.0),
            rule: GateRule {
                temperature: softmax.then_some(temperature as f32),
                top_k,
                softmax_of_kept: config.flag("enable_softmax_topk")?,
            },
        })
    }

    /// The classifier for so many adapted linears.
    fn network(&self, lowering: &mut Lowering<'_>, layers: usize) -> Result<GateNetwork, AdapterError> {
        let hidden = lowering.base.shape().hidden_size;
        if self.hidden_size != hidden {
            let reason = format!("expected the base model's {hidden}, found {}", self.hidden_size);
            return Err(field_error("hidden_size", reason));
        }
        let gates = self.experts * if self.by_layer { layers } else { 1 };
        let mut network = Vec::with_capacity(self.depth.min(EXPERTS_MAX));
        for number in 0..self.depth {
            let inputs = if number == 0 { hidden } else { self.width };
            let outputs = if number + 1 == self.depth { gates } else { self.width };
            let mut take = |tensor: &str, shape: &[usize]| {
                let name = format!("{CLASSIFIER}.layers.{}.{tensor}", number * self.stride);
                if lowering.shared_shape(&name).is_none() {
                    let reason = "is missing; `save_pretrained` of PEFT 0.21 leaves out layers of the classifier with an \
                                  expert's number, and tools/xlora.py does not";
                    return Err(lowering.refuse_shared(&name, reason));
                }
                lowering.require_shared(&name, shape)
            };
            network.push((take("weight", &[outputs, inputs])?, take("bias", &[outputs])?));
        }
        Ok(GateNetwork { layers: network, group: self.experts, rule: self.rule })
    }
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let options = Options::parse(&lowering.config)?;
    let mut experts = Vec::with_capacity(options.experts);
    for (number, files) in lowering.parts.iter().enumerate() {
        let part = |fault| AdapterError::Part { name: number.to_string(), fault: Box::new(fault) };
        experts.push(expert(lowering, files).map_err(part)?);
    }
    // Sites are in the order of the base model's modules.
    let sites: BTreeSet<SiteId> = experts.iter().flat_map(|expert| expert.linears.keys().copied()).collect();
    lowering.out.gates = Some(options.network(lowering, sites.len())?);
    for (layer, site) in sites.into_iter().enumerate() {
        let first = if options.by_layer { layer * options.experts } else { 0 };
        let delta = gated(&experts, site, (first, options.weight))?;
        lowering.out.linears.entry(site).or_default().deltas.push(delta);
    }
    Ok(())
}

/// An expert as the LoRA that it is, which must do nothing but add low-rank terms to linears.
fn expert(lowering: &mut Lowering<'_>, files: &AdapterFiles) -> Result<LoweredAdapter, AdapterError> {
    match Config::parse(&files.config)?.peft_type()? {
        "LORA" => {}
        other => return Err(field_error("peft_type", format!("expected a LORA expert, found `{other}`"))),
    }
    let options = LowerOptions { merge: false, ..lowering.options };
    let mut own = open(files, lowering.base, &options)?;
    if let Some(field) = EXPERT_FIELDS.iter().find(|field| own.config.is_set(field)) {
        return Err(field_error(field, "PEFT's X-LoRA does not compute it for an expert"));
    }
    if let Some(bias) = own.config.string("bias")?.filter(|bias| *bias != "none") {
        return Err(field_error("bias", format!("expected none for an expert, found `{bias}`")));
    }
    if let Some(start) = own.config.get("init_lora_weights").and_then(|value| value.as_str())
        && !["gaussian", "eva", "orthogonal"].contains(&start)
    {
        let reason = format!("the expert was trained on a base that `{start}` changed; convert it with PEFT first");
        return Err(field_error("init_lora_weights", reason));
    }
    own.keep_terms = true;
    own.ask = lowering.ask;
    run(&mut own)?;
    // Taken apart in full, so that a further slot cannot be forgotten here.
    let LoweredAdapter { linears, norms, embeddings, layers, virtual_tokens, kv_prefix, invocation_tokens, gates } =
        &own.out;
    let beside = norms.keys().chain(embeddings.keys()).next().copied();
    let other = linears.iter().find(|(_, slots)| !is_low_rank(slots)).map(|(site, _)| *site);
    if let Some(site) = beside.or(other) {
        let reason = format!("gates weigh LoRA on linears only, and `{}` is changed otherwise", own.site(site).path);
        return Err(field_error("target_modules", reason));
    }
    let stands_alone = virtual_tokens.is_none() && kv_prefix.is_none() && invocation_tokens.is_empty();
    assert!(stands_alone && layers.is_empty() && gates.is_none(), "a LoRA without the fields refused above");
    lowering.ranks.extend(&own.ranks);
    lowering.warnings.append(&mut own.warnings);
    Ok(own.out)
}

fn is_low_rank(slots: &LinearSlots) -> bool {
    let LinearSlots { pre, weight, rows, deltas, scale, c } = slots;
    matches!((pre, weight, rows, scale, c), (Pre::Identity, Weight::Base, None, Scale::One, None))
        && deltas.iter().all(|delta| matches!(delta, Delta::LowRank { .. }))
}

/// The terms of all experts at one linear as one, where the first gate is that of the first expert.
fn gated(experts: &[LoweredAdapter], site: SiteId, (first, weight): (usize, f64)) -> Result<Delta, AdapterError> {
    let (mut downs, mut ups, mut places) = (Vec::new(), Vec::new(), Vec::new());
    for (number, expert) in experts.iter().enumerate() {
        for delta in expert.linears.get(&site).into_iter().flat_map(|slots| &slots.deltas) {
            let Delta::LowRank { a, b } = delta else { unreachable!("it was checked") };
            places.extend(std::iter::repeat_n((first + number) as u32, a.dim(0)?));
            downs.push(a.clone());
            ups.push((b * weight)?);
        }
    }
    Ok(Delta::Gated {
        a: Tensor::cat(&downs, 0)?,
        b: Tensor::cat(&ups, 1)?, // [out, all ranks]
        places: Tensor::new(places, &Device::Cpu)?,
    })
}
