//! Qwen3: norms over each query and key head; head length apart from the hidden size.

use candle_nn::Activation;
use serde::Deserialize;
use serde_json::Value;

use super::{Built, checked_layers, checked_window, heads, layer_windows, parse, silu};
use crate::model::ModelError;
use crate::model::layers::{Attention, Decoder, DecoderLayer, GateUp, Heads, Mlp, Qkv, Rope, RopeConfig, RopeDefaults};
use crate::model::loader::Loader;

const DEFAULTS: RopeDefaults = RopeDefaults { theta: 10_000., max_position_embeddings: 32_768 };
const DEFAULT_HEAD_DIM: usize = 128;

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
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    sliding_window: Option<usize>,
    #[serde(default = "default_max_window_layers")]
    max_window_layers: usize,
    layer_types: Option<Vec<String>>,
    #[serde(flatten)]
    rope: RopeConfig,
}

fn default_rms_norm_eps() -> f64 {
    1e-6
}

fn default_max_window_layers() -> usize {
    28
}

pub(super) fn build(config: &Value, loader: &mut Loader) -> Result<Built, ModelError> {
    let config: Config = parse(config)?;
    let num_layers = checked_layers(config.num_hidden_layers)?;
    let heads = heads(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        Some(config.head_dim.unwrap_or(DEFAULT_HEAD_DIM)),
    )?;
    let window = checked_window(config.sliding_window.filter(|_| config.use_sliding_window))?;
    let windows = layer_windows(num_layers, window, config.max_window_layers, config.layer_types.as_deref())?;
    let rope = Rope::new(&config.rope, heads.head_dim, DEFAULTS)?;
    let mut embed_tokens = loader.embedding("model.embed_tokens", config.vocab_size, config.hidden_size)?;
    let mut layers = Vec::with_capacity(num_layers);
    for (idx, window) in windows.into_iter().enumerate() {
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
    let qkv = Qkv::Split {
        q_proj: loader.linear(&format!("{path}.self_attn.q_proj"), hidden, heads.q_size(), config.attention_bias)?,
        k_proj: loader.linear(&format!("{path}.self_attn.k_proj"), hidden, heads.kv_size(), config.attention_bias)?,
        v_proj: loader.linear(&format!("{path}.self_attn.v_proj"), hidden, heads.kv_size(), config.attention_bias)?,
    };
    let self_attn = Attention {
        qkv,
        q_norm: Some(loader.rms_norm(&format!("{path}.self_attn.q_norm"), heads.head_dim, config.rms_norm_eps)?),
        k_norm: Some(loader.rms_norm(&format!("{path}.self_attn.k_norm"), heads.head_dim, config.rms_norm_eps)?),
        o_proj: loader.linear(&format!("{path}.self_attn.o_proj"), heads.q_size(), hidden, config.attention_bias)?,
        heads,
        window,
    };
    let post_attention_layernorm =
        loader.rms_norm(&format!("{path}.post_attention_layernorm"), hidden, config.rms_norm_eps)?;
    let mlp = Mlp {
        gate_up: GateUp::Split {
            gate_proj: loader.linear(&format!("{path}.mlp.gate_proj"), hidden, intermediate, false)?,
            up_proj: loader.linear(&format!("{path}.mlp.up_proj"), hidden, intermediate, false)?,
        },
        down_proj: loader.linear(&format!("{path}.mlp.down_proj"), intermediate, hidden, false)?,
        hidden_act: config.hidden_act,
    };
    Ok(DecoderLayer { input_layernorm, self_attn, post_attention_layernorm, mlp })
}
