//! The `[engine]` section: the bounds of everything the engine holds.

use candle_core::DType;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Bounds of the engine. All memory they imply is taken at start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Sequences running at once. More raises throughput and the time between one sequence's tokens.
    pub sequences_max: usize,
    /// Tokens computed per step; `None` is as many as the device needs to be busy
    /// ([`ForwardLimits::step_tokens`](super::ForwardLimits::step_tokens)), and no fewer than `sequences_max`. More lengthens the
    /// longest gap between tokens.
    pub step_tokens_max: Option<usize>,
    /// Tokens per KV block. Smaller wastes less memory and shares prefixes more finely.
    pub block_tokens: usize,
    /// KV cache size in bytes; sets the number of blocks. More holds more and longer sequences and prefixes.
    pub kv_cache_bytes: usize,
    /// Number format of keys and values. bf16 holds twice the tokens of f32, rounded.
    pub kv_cache_dtype: KvDtypeChoice,
    /// Requests waiting at most, and prompts waiting to be tokenized; one more is answered 429.
    pub queue_max: usize,
    /// Different adapters on the device at once. More avoids copies when many adapters are busy.
    pub adapter_slots: usize,
    /// Reuse the KV of equal prefixes (of equal adapter and salt).
    pub prefix_cache: bool,
}

/// Number format of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KvDtypeChoice {
    /// bf16 with weights in bf16; with others that of the activations.
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
}

impl KvDtypeChoice {
    /// The format of keys and values for a model whose own is `auto`.
    pub fn dtype(self, auto: DType) -> DType {
        match self {
            Self::Auto => auto,
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            sequences_max: 64,
            step_tokens_max: None,
            block_tokens: 16,
            kv_cache_bytes: 256 << 20,
            kv_cache_dtype: KvDtypeChoice::Auto,
            queue_max: 512,
            adapter_slots: 64,
            prefix_cache: true,
        }
    }
}

/// Why the bounds cannot be kept.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum EngineConfigError {
    /// A bound that must be at least one is zero.
    #[error("engine.{field} is 0, expected at least 1")]
    Zero {
        /// Key in the section.
        field: &'static str,
    },
    /// Not every running sequence could get its token in a step.
    #[error("engine.step_tokens_max is {step_tokens_max}, expected at least engine.sequences_max ({sequences_max})")]
    StepTooSmall {
        /// Tokens per step.
        step_tokens_max: usize,
        /// Sequences running at once.
        sequences_max: usize,
    },
}

impl EngineConfig {
    /// Whether the bounds can be kept.
    ///
    /// # Errors
    /// Names the first bound that is wrong.
    pub fn check(&self) -> Result<(), EngineConfigError> {
        let positive = [
            ("sequences_max", self.sequences_max),
            ("block_tokens", self.block_tokens),
            ("queue_max", self.queue_max),
            ("adapter_slots", self.adapter_slots),
        ];
        if let Some((field, _)) = positive.into_iter().find(|(_, value)| *value == 0) {
            return Err(EngineConfigError::Zero { field });
        }
        match self.step_tokens_max {
            Some(step_tokens_max) if step_tokens_max < self.sequences_max => {
                Err(EngineConfigError::StepTooSmall { step_tokens_max, sequences_max: self.sequences_max })
            }
            _ => Ok(()),
        }
    }

    /// Tokens computed per step on a device that is busy with `busy` of them.
    pub(super) fn step_tokens(&self, busy: usize) -> usize {
        self.step_tokens_max.unwrap_or(busy.max(self.sequences_max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_consistent() {
        assert_eq!(EngineConfig::default().check(), Ok(()));
    }

    #[test]
    fn wrong_bounds_are_named() {
        let config = EngineConfig { block_tokens: 0, ..EngineConfig::default() };
        assert_eq!(config.check().unwrap_err().to_string(), "engine.block_tokens is 0, expected at least 1");
        let config = EngineConfig { step_tokens_max: Some(8), ..EngineConfig::default() };
        assert_eq!(
            config.check().unwrap_err().to_string(),
            "engine.step_tokens_max is 8, expected at least engine.sequences_max (64)"
        );
    }

    #[test]
    fn a_step_that_is_not_set_holds_a_token_of_every_sequence() {
        let steps = |step_tokens_max, sequences_max| {
            EngineConfig { step_tokens_max, sequences_max, ..EngineConfig::default() }.step_tokens(256)
        };
        assert_eq!([steps(None, 64), steps(None, 300), steps(Some(100), 64)], [256, 300, 100]);
    }
}
