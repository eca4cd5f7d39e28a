//! What the rest of the server needs to know of the loaded model.

use candle_core::{DType, Device};

use crate::adapter::Formats;
use crate::kernels::KvLayout;

/// Facts about the loaded base model.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// `architectures[0]` of config.json.
    pub architecture: String,
    /// Rows of the logits.
    pub vocab_size: usize,
    /// Length of the residual stream's vectors.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Length of one head's vectors.
    pub head_dim: usize,
    /// Longest context in tokens.
    pub context_tokens_max: usize,
    /// Format of activations.
    pub dtype: DType,
    /// Format of keys and values where none is asked for.
    pub kv_dtype: DType,
    /// Formats in which adapters are kept.
    pub adapter_formats: Formats,
    /// Where the weights lie.
    pub device: Device,
    /// How the KV cache is laid out.
    pub kv_layout: KvLayout,
    /// Bytes of all base weights in memory.
    pub weight_bytes: usize,
    /// How RoPE depends on the context length.
    pub rope_length_rule: RopeLengthRule,
    /// Sampling defaults and end tokens of generation_config.json (end tokens also from config.json).
    pub generation: GenerationDefaults,
}

/// How a model's RoPE depends on the context length. Two tokens' keys are interchangeable (for the prefix cache) only
/// when the rule gives their `rope_len` the same regime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLengthRule {
    /// Not at all.
    Fixed,
    /// One set of frequencies up to `threshold` tokens and another beyond (longrope).
    Switch {
        /// Longest context of the first regime.
        threshold: usize,
    },
    /// Frequencies change with every token beyond `threshold` (dynamic NTK).
    Dynamic {
        /// Longest context with unchanged frequencies.
        threshold: usize,
    },
}

/// Defaults of generation_config.json; `None` where the file is silent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Sampling temperature; 0 when the file says `do_sample: false`.
    pub temperature: Option<f32>,
    /// Nucleus mass.
    pub top_p: Option<f32>,
    /// Keep the k most likely tokens.
    pub top_k: Option<usize>,
    /// Lower bound relative to the most likely token.
    pub min_p: Option<f32>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
}

impl ModelInfo {
    /// Bytes one token's keys and values take over all layers, kept in `dtype`.
    pub fn kv_bytes_per_token(&self, dtype: DType) -> usize {
        2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.size_in_bytes()
    }
}

impl RopeLengthRule {
    /// Identifies the frequencies used at `rope_len`; equal regimes mean equal frequencies.
    pub fn regime(self, rope_len: usize) -> u64 {
        match self {
            Self::Fixed => 0,
            Self::Switch { threshold } => u64::from(rope_len > threshold),
            Self::Dynamic { threshold } => {
                if rope_len > threshold {
                    rope_len as u64
                } else {
                    0
                }
            }
        }
    }
}
