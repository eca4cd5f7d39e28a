//! Adaption prompts: learned vectors that the attention of the last layers attends to in a softmax of their own, times a
//! gate (PEFT 0.21 `tuners/adaption_prompt`; "LLaMA-Adapter", arXiv 2303.16199).
//!
//! The layer's own projections make keys and values of the vectors, without rotation, so both are known when the adapter
//! is loaded. PEFT applies the output projection to what they give separately, so its bias is added twice.

use candle_core::Tensor;
use serde_json::Value;

use super::Kind;
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::lowering::Lowering;
use crate::adapter::{AdapterError, AttentionBranch, SiteId, SiteKind};

/// The row of the table of kinds.
pub(super) const ADAPTION_PROMPT: Kind = Kind {
    peft_type: "ADAPTION_PROMPT",
    title: "Adaption prompt",
    served_as: "keys and values beside the context of the last layers, in a softmax of their own",
    merged_as: "nothing to merge",
    shared: &[LAYERS],
    fields: &[
        ("adapter_len", Rule::Read),
        ("adapter_layers", Rule::Read),
        ("modules_to_save", Rule::Refused("adaption prompts save no modules")),
    ],
    check,
    lower,
    ..Kind::PLAIN
};

/// Where the layers are.
const LAYERS: &str = "base_model.model.model.layers";
/// The attention of a layer.
const ATTENTION: &str = "self_attn";

fn check(config: &Config) -> Result<(), AdapterError> {
    for field in ["adapter_len", "adapter_layers"] {
        config.positive(field)?.ok_or_else(|| field_error(field, "is missing"))?;
    }
    match config.get("target_modules") {
        None => Ok(()),
        Some(Value::String(name)) if name == ATTENTION => Ok(()),
        Some(found) => Err(field_error("target_modules", format!("expected \"{ATTENTION}\", found {found}"))),
    }
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let size = |field: &str| lowering.config.positive(field).map(Option::unwrap_or_default);
    let (entries, count) = (size("adapter_len")?, size("adapter_layers")?);
    let num_layers = lowering.base.shape().num_layers;
    if count > num_layers {
        let reason = format!("expected at most the {num_layers} layers of the base model, found {count}");
        return Err(field_error("adapter_layers", reason));
    }
    for layer in num_layers - count..num_layers {
        let path = format!("{LAYERS}.{layer}.{ATTENTION}");
        let hidden = lowering.base.shape().hidden_size;
        let prompt = lowering.require_shared(&format!("{path}.adaption_prompt"), &[1, entries, hidden])?.squeeze(0)?;
        let gate = lowering.require_shared(&format!("{path}.adaption_gate"), &[1])?;
        let keys = project(lowering, layer, "k_proj", &prompt)?;
        let values = project(lowering, layer, "v_proj", &prompt)?.broadcast_mul(&gate)?;
        lowering.out.layers.entry(layer).or_default().branch = Some(AttentionBranch { keys, values });
        let output = projection(lowering, layer, "o_proj")?;
        if let Some(bias) = lowering.base.bias(output)? {
            lowering.out.linears.entry(output).or_default().c = Some((bias * 2.0)?);
        }
    }
    Ok(())
}

/// `x W^T + b` with a projection of the layer, x: (entries, hidden).
fn project(lowering: &Lowering<'_>, layer: usize, name: &str, x: &Tensor) -> Result<Tensor, AdapterError> {
    let site = projection(lowering, layer, name)?;
    let y = x.matmul(&lowering.base.weight(site)?.t()?)?;
    Ok(match lowering.base.bias(site)? {
        Some(bias) => y.broadcast_add(&bias)?,
        None => y,
    })
}

/// A projection of the layer's attention. PEFT knows attentions with separate projections and no norms only.
fn projection(lowering: &Lowering<'_>, layer: usize, name: &str) -> Result<SiteId, AdapterError> {
    let sites = lowering.base.sites();
    let find = |name: &str| sites.find(&format!("model.layers.{layer}.{ATTENTION}.{name}"));
    let is_linear = |id: &SiteId| matches!(sites.get(*id).kind, SiteKind::Linear { .. });
    match (find(name).filter(is_linear), find("q_norm").or(find("k_norm"))) {
        (Some(id), None) => Ok(id),
        (None, _) => Err(field_error("target_modules", format!("needs `{name}`, which the base model does not have"))),
        (_, Some(_)) => {
            Err(field_error("target_modules", "the base model norms its queries, which PEFT would leave out"))
        }
    }
}
