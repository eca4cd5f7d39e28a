//! The supported families: one file each, and a row in [`FAMILIES`].
//!
//! A family is a `Config` in Hugging Face's own keys and the wiring of shared layers under the checkpoint's module
//! paths. Nothing is computed here.

mod llama;
mod mistral;
mod phi3;
mod qwen2;
mod qwen3;

use candle_nn::Activation;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::ModelError;
use super::layers::{Decoder, Heads};
use super::loader::Loader;

/// A family's constructor.
pub(super) struct Family {
    /// `architectures[0]` of config.json.
    pub(super) architecture: &'static str,
    /// Reads config.json and makes the layers in forward order.
    pub(super) build: fn(&Value, &mut Loader) -> Result<Built, ModelError>,
    /// Fields of config.json that give linears a bias, each with the last components of their paths.
    pub(super) bias_fields: &'static [(&'static str, &'static [&'static str])],
}

/// A family's result.
pub(super) struct Built {
    /// The layers.
    pub(super) decoder: Decoder,
    /// Longest context in tokens that the checkpoint supports.
    pub(super) context_tokens_max: usize,
    /// Whether the head shares the embedding's weight.
    pub(super) tied_embeddings: bool,
}

const ATTENTION_BIAS: (&str, &[&str]) = ("attention_bias", &["q_proj", "k_proj", "v_proj", "o_proj"]);
const MLP_BIAS: (&str, &[&str]) = ("mlp_bias", &["gate_proj", "up_proj", "down_proj"]);

/// Every supported family.
pub(super) const FAMILIES: &[Family] = &[
    Family { architecture: "LlamaForCausalLM", build: llama::build, bias_fields: &[ATTENTION_BIAS, MLP_BIAS] },
    Family { architecture: "MistralForCausalLM", build: mistral::build, bias_fields: &[] },
    Family { architecture: "Qwen2ForCausalLM", build: qwen2::build, bias_fields: &[] },
    Family { architecture: "Qwen3ForCausalLM", build: qwen3::build, bias_fields: &[ATTENTION_BIAS] },
    Family { architecture: "Phi3ForCausalLM", build: phi3::build, bias_fields: &[] },
];

/// Architectures of the supported families, as config.json spells them.
pub fn supported_architectures() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.architecture)
}

/// The family of an architecture.
pub(super) fn find(architecture: &str) -> Result<&'static Family, ModelError> {
    FAMILIES.iter().find(|family| family.architecture == architecture).ok_or_else(|| {
        ModelError::UnsupportedArchitecture {
            found: architecture.to_owned(),
            supported: supported_architectures().collect::<Vec<_>>().join(", "),
        }
    })
}

/// Reads a family's `Config`; unknown keys are ignored, as transformers writes many that change nothing.
fn parse<C: DeserializeOwned>(config: &Value) -> Result<C, ModelError> {
    C::deserialize(config).map_err(|error| ModelError::file("config.json", &error))
}

/// Sizes of the heads, checked against each other. Absent `num_key_value_heads` means one per query head, absent
/// `head_dim` an even share of `hidden_size`.
fn heads(
    hidden_size: usize,
    num_heads: usize,
    num_kv_heads: Option<usize>,
    head_dim: Option<usize>,
) -> Result<Heads, ModelError> {
    let num_kv_heads = num_kv_heads.unwrap_or(num_heads);
    if num_heads == 0 || num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
        let reason = format!("{num_kv_heads} does not divide num_attention_heads, which is {num_heads}");
        return Err(ModelError::config("num_key_value_heads", reason));
    }
    let head_dim = match head_dim {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            let reason = format!("{num_heads} does not divide hidden_size, which is {hidden_size}");
            return Err(ModelError::config("num_attention_heads", reason));
        }
    };
    if head_dim == 0 {
        return Err(ModelError::config("head_dim", "must be at least 1"));
    }
    Ok(Heads { num_heads, num_kv_heads, head_dim })
}

/// A sliding window of 0 tokens would show a token nothing, itself included.
fn checked_window(window: Option<usize>) -> Result<Option<usize>, ModelError> {
    match window {
        Some(0) => Err(ModelError::config("sliding_window", "must be at least 1")),
        window => Ok(window),
    }
}

/// The sliding window of each layer, as Qwen's configs say it: `layer_types` where present, else every layer from
/// `max_window_layers` on; none at all unless `use_sliding_window`.
fn layer_windows(
    num_layers: usize,
    window: Option<usize>,
    max_window_layers: usize,
    layer_types: Option<&[String]>,
) -> Result<Vec<Option<usize>>, ModelError> {
    let Some(types) = layer_types else {
        return Ok((0..num_layers).map(|idx| window.filter(|_| idx >= max_window_layers)).collect());
    };
    if types.len() != num_layers {
        let reason = format!("expected {num_layers} entries, found {}", types.len());
        return Err(ModelError::config("layer_types", reason));
    }
    let of_type = |kind: &String| match kind.as_str() {
        "full_attention" => Ok(None),
        "sliding_attention" => Ok(window),
        other => Err(ModelError::config("layer_types", format!("{other} is not supported"))),
    };
    types.iter().map(of_type).collect()
}

fn silu() -> Activation {
    Activation::Silu
}

fn checked_layers(num_layers: usize) -> Result<usize, ModelError> {
    match num_layers {
        0 => Err(ModelError::config("num_hidden_layers", "must be at least 1")),
        num_layers => Ok(num_layers),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_architecture_is_refused_with_the_supported_ones() {
        let message = find("GPT2LMHeadModel").map(|family| family.architecture).unwrap_err().to_string();
        insta::assert_snapshot!(message, @"config.json: architecture GPT2LMHeadModel is not supported; supported are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Phi3ForCausalLM");
    }

    #[test]
    fn windows_follow_layer_types_or_max_window_layers() {
        let types = ["sliding_attention".to_owned(), "full_attention".to_owned()];
        assert_eq!(layer_windows(2, Some(8), 0, Some(&types)).unwrap(), [Some(8), None]);
        assert_eq!(layer_windows(3, Some(8), 1, None).unwrap(), [None, Some(8), Some(8)]);
        assert_eq!(layer_windows(2, None, 0, None).unwrap(), [None, None]);
        assert!(layer_windows(1, Some(8), 0, Some(&types)).is_err());
    }
}
