//! The real model behind [`Forward`]: a loaded base model and the KV cache's memory.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use thiserror::Error;

use super::config::EngineConfigError;
use super::{EngineConfig, Forward, ForwardLimits};
use crate::adapter::LoweredAdapter;
use crate::model::{Batch, DeviceAdapter, KvCache, Model, ModelInfo};

/// Tokens of a step that keep a CPU busy: with more only the gap between two steps grows.
const STEP_TOKENS_CPU: usize = 256;
/// The same of a GPU.
const STEP_TOKENS_GPU: usize = 512;

/// A loaded base model with its KV cache.
pub struct ModelRunner {
    model: Arc<Model>,
    cache: KvCache,
    limits: ForwardLimits,
}

/// Why a model cannot be run under the configured bounds.
#[derive(Debug, Error)]
pub enum RunnerError {
    /// A bound is wrong in itself.
    #[error(transparent)]
    Config(#[from] EngineConfigError),
    /// Not one KV block fits.
    #[error("engine.kv_cache_bytes is {kv_cache_bytes}, but one block of {block_tokens} tokens takes {block_bytes}")]
    CacheTooSmall {
        /// Configured size.
        kv_cache_bytes: usize,
        /// Tokens per block.
        block_tokens: usize,
        /// Bytes one block takes.
        block_bytes: usize,
    },
    /// The cache's memory could not be taken.
    #[error("taking {kv_cache_bytes} bytes for the KV cache failed")]
    Memory {
        /// Size asked for.
        kv_cache_bytes: usize,
        /// Why.
        #[source]
        source: candle_core::Error,
    },
}

impl ModelRunner {
    /// Takes the KV cache's memory and logs every bound with the memory it takes.
    ///
    /// A cache smaller than the model's context is allowed: it bounds the context instead, with a warning.
    ///
    /// # Errors
    /// See [`RunnerError`].
    pub fn new(model: Arc<Model>, config: &EngineConfig) -> std::result::Result<Self, RunnerError> {
        config.check()?;
        let info = model.info();
        let dtype = config.kv_cache_dtype.dtype(info.kv_dtype);
        let num_blocks = num_blocks(info.kv_bytes_per_token(dtype), config)?;
        let kv_cache_bytes = num_blocks * config.block_tokens * info.kv_bytes_per_token(dtype);
        let cache = KvCache::new(info, num_blocks, config.block_tokens, dtype)
            .map_err(|source| RunnerError::Memory { kv_cache_bytes, source })?;
        tracing::info!(
            num_blocks,
            block_tokens = config.block_tokens,
            cache_tokens = num_blocks * config.block_tokens,
            dtype = dtype.as_str(),
            bytes = kv_cache_bytes,
            prefix_cache = config.prefix_cache,
            "KV cache"
        );
        let step_tokens = if info.device.is_cpu() { STEP_TOKENS_CPU } else { STEP_TOKENS_GPU };
        log_bounds(info, config, num_blocks, config.step_tokens(step_tokens));
        let limits = ForwardLimits {
            vocab_size: info.vocab_size,
            context_tokens_max: info.context_tokens_max,
            num_blocks,
            step_tokens,
            rope_length_rule: info.rope_length_rule,
        };
        Ok(Self { model, cache, limits })
    }
}

impl Forward for ModelRunner {
    fn limits(&self) -> ForwardLimits {
        self.limits
    }

    fn forward(&mut self, batch: &Batch) -> Result<Tensor> {
        self.model.forward(batch, &mut self.cache)
    }

    fn adapter_to_device(&self, adapter: &LoweredAdapter) -> Result<DeviceAdapter> {
        self.model.adapter_to_device(adapter)
    }
}

/// Blocks that fit the configured bytes; slot numbers stay within u32.
fn num_blocks(kv_bytes_per_token: usize, config: &EngineConfig) -> std::result::Result<usize, RunnerError> {
    let block_bytes = config.block_tokens * kv_bytes_per_token;
    let num_blocks = (config.kv_cache_bytes / block_bytes).min(u32::MAX as usize / config.block_tokens);
    if num_blocks == 0 {
        let EngineConfig { kv_cache_bytes, block_tokens, .. } = *config;
        return Err(RunnerError::CacheTooSmall { kv_cache_bytes, block_tokens, block_bytes });
    }
    Ok(num_blocks)
}

fn log_bounds(info: &ModelInfo, config: &EngineConfig, num_blocks: usize, step_tokens_max: usize) {
    let cache_tokens = num_blocks * config.block_tokens;
    tracing::info!(
        sequences_max = config.sequences_max,
        step_tokens_max,
        // Drawing reads one row per sequence; scoring prompts can need one per token of the step.
        logits_bytes = config.sequences_max * info.vocab_size * size_of::<f32>(),
        logits_bytes_max = step_tokens_max * info.vocab_size * size_of::<f32>(),
        "step"
    );
    tracing::info!(
        adapter_slots = config.adapter_slots,
        queue_max = config.queue_max,
        "adapters and queue: a slot takes as many bytes as the adapter in it"
    );
    if cache_tokens < info.context_tokens_max {
        tracing::warn!(
            cache_tokens,
            model_context_tokens = info.context_tokens_max,
            "the KV cache is smaller than the model's context and bounds it; raise engine.kv_cache_bytes"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fill_the_configured_bytes() {
        let config = EngineConfig { kv_cache_bytes: 1000, block_tokens: 4, ..EngineConfig::default() };
        assert_eq!(num_blocks(10, &config).unwrap(), 25);
    }

    #[test]
    fn a_cache_without_a_block_is_refused_with_its_numbers() {
        let config = EngineConfig { kv_cache_bytes: 39, block_tokens: 4, ..EngineConfig::default() };
        assert_eq!(
            num_blocks(10, &config).unwrap_err().to_string(),
            "engine.kv_cache_bytes is 39, but one block of 4 tokens takes 40"
        );
    }
}
