//! The `[engine]` section: the bounds of everything the engine holds.

use serde::{Deserialize, Serialize};

/// Bounds of the engine. All memory they imply is taken at start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Sequences running at once. More raises throughput and the time between one sequence's tokens.
    pub sequences_max: usize,
    /// Tokens computed per step. More speeds prefill and lengthens the longest gap between tokens.
    pub step_tokens_max: usize,
    /// Tokens per KV block. Smaller wastes less memory and shares prefixes more finely.
    pub block_tokens: usize,
    /// KV cache size in bytes; sets the number of blocks. More holds more and longer sequences and prefixes.
    pub kv_cache_bytes: usize,
    /// Requests waiting at most; one more is answered 429.
    pub queue_max: usize,
    /// Different adapters on the device at once. More avoids copies when many adapters are busy.
    pub adapter_slots: usize,
    /// Reuse the KV of equal prefixes (of equal adapter and salt).
    pub prefix_cache: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            sequences_max: 64,
            step_tokens_max: 512,
            block_tokens: 16,
            kv_cache_bytes: 256 << 20,
            queue_max: 512,
            adapter_slots: 64,
            prefix_cache: true,
        }
    }
}
