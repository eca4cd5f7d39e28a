//! The KV cache's tensors. Who owns which block is the engine's business.

use candle_core::Result;

use super::ModelInfo;

/// Keys and values of all layers, in blocks of `block_tokens` slots.
pub struct KvCache {}

impl KvCache {
    /// Takes the memory for `num_blocks` blocks on the model's device.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(_info: &ModelInfo, _num_blocks: usize, _block_tokens: usize) -> Result<Self> {
        unimplemented!()
    }
}
