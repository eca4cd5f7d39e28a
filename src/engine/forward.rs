//! What the engine needs of a model.

use candle_core::{Result, Tensor};

use crate::adapter::LoweredAdapter;
use crate::model::{Batch, DeviceAdapter, RopeLengthRule};

/// What the engine needs of a model; the real one, or a fake in simulations.
pub trait Forward: Send {
    /// Sizes that bound scheduling.
    fn limits(&self) -> ForwardLimits;

    /// Logits (rows, vocab) in f32 of `batch.logit_rows`; writes the batch's keys and values.
    ///
    /// # Errors
    /// When the device fails.
    fn forward(&mut self, batch: &Batch) -> Result<Tensor>;

    /// An adapter's tensors on the model's device.
    ///
    /// # Errors
    /// When the device is out of memory.
    fn adapter_to_device(&self, adapter: &LoweredAdapter) -> Result<DeviceAdapter>;
}

/// What the model, its KV cache and its device set to scheduling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardLimits {
    /// Rows of the logits.
    pub vocab_size: usize,
    /// Longest context in tokens.
    pub context_tokens_max: usize,
    /// KV blocks there are.
    pub num_blocks: usize,
    /// Tokens per step that keep the device busy.
    pub step_tokens: usize,
    /// How RoPE depends on the context length (for the prefix cache).
    pub rope_length_rule: RopeLengthRule,
}
