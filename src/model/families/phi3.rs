//! Phi-3: queries, keys and values in one linear, gate and up in another; longrope; a sliding window over all layers.

use candle_nn::Activation;
use serde::Deserialize;
use serde_json::Value;

use super::{Built, checked_layers, checked_window, heads, parse, silu};
use crate::model::ModelError;
use crate::model::layers::{Attention, Decoder, DecoderLayer, GateUp, Heads, Mlp, Qkv, Rope, RopeConfig, RopeDefaults};
use crate::model::loader::Loader;

const DEFAULTS: RopeDefaults = RopeDefaults { theta: 10_000., max_position_embeddings: 4096 };

#[derive(Deserialize)]
struct Config {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    #[serde(default = "silu")]
    hidden_act: Activation,
    #[serde(default = "default_rms_norm_eps")]
    rms_norm_eps: f64,
    #[serde(default)]
    tie_word_embeddings: bool,
    head_dim: Option<usize>,
    sliding_window: Option<usize>,
    #[serde(flatten)]
    rope: RopeConfig,
}

fn default_rms_norm_eps() -> f64 {
    1e-5
}

pub(super) fn build(config: &Value, loader: &mut Loader) -> Result<Built, ModelError> {
    let mut config: Config = parse(config)?;
    config.rope.rename_type("yarn", "longrope");
    let num_layers = checked_layers(config.num_hidden_layers)?;
    let heads = heads(config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)?;
    let window = checked_window(config.sliding_window)?;
    let rope = Rope::new(&config.rope, heads.head_dim, DEFAULTS)?;
    let mut embed_tokens = loader.embedding("model.embed_tokens", config.vocab_size, config.hidden_size)?;
    let mut layers = Vec::with_capacity(num_layers);
    for idx in 0..num_layers {
        layers.push(layer(&config, heads, window, &format!("model.layers.{idx}"), loader)?);
    }
    let norm = loader.rms_norm("model.norm", config.hidden_size, config.rms_norm_eps)?;
    let lm_head = loader.lm_head(&mut embed_tokens, config.tie_word_embeddings)?;
    Ok(Built {
        decoder: Decoder { embed_tokens, layers, norm, lm_head, rope },
        context_tokens_max: config.rope.context_tokens_max(DEFAULTS.max_position_embeddings),
        tied_embeddings: config.tie_word_embeddings,
    })
}

fn layer(
    config: &Config,
    heads: Heads,
    window: Option<usize>,
    path: &str,
    loader: &mut Loader,
) -> Result<DecoderLayer, ModelError> {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let input_layernorm = loader.rms_norm(&format!("{path}.input_layernorm"), hidden, config.rms_norm_eps)?;
    let qkv_size = heads.q_size() + 2 * heads.kv_size();
    // The order of sites is that in which transformers declares the modules.
    let o_proj = loader.linear(&format!("{path}.self_attn.o_proj"), heads.q_size(), hidden, false)?;
    let self_attn = Attention {
        qkv: Qkv::Fused(loader.linear(&format!("{path}.self_attn.qkv_proj"), hidden, qkv_size, false)?),
        q_norm: None,
        k_norm: None,
        o_proj,
        heads,
        window,
    };
    let post_attention_layernorm =
        loader.rms_norm(&format!("{path}.post_attention_layernorm"), hidden, config.rms_norm_eps)?;
    let mlp = Mlp {
        gate_up: GateUp::Fused(loader.linear(&format!("{path}.mlp.gate_up_proj"), hidden, 2 * intermediate, false)?),
        down_proj: loader.linear(&format!("{path}.mlp.down_proj"), intermediate, hidden, false)?,
        hidden_act: config.hidden_act,
    };
    Ok(DecoderLayer { input_layernorm, self_attn, post_attention_layernorm, mlp })
}
