//! The KV cache's tensors. Who owns which block is the engine's business.

use candle_core::{DType, Device, Result, Tensor};

use super::ModelInfo;
use crate::kernels;

/// Keys and values of all layers, in blocks of `block_tokens` slots.
pub struct KvCache {
    pub(super) layers: Vec<LayerCache>,
    pub(super) num_blocks: usize,
    pub(super) block_tokens: usize,
}

/// Keys and values of one layer, each (blocks, block tokens, kv heads * head_dim).
pub(super) struct LayerCache {
    pub(super) k: Tensor,
    pub(super) v: Tensor,
}

impl KvCache {
    /// Takes the memory for `num_blocks` blocks on the model's device.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(info: &ModelInfo, num_blocks: usize, block_tokens: usize) -> Result<Self> {
        let shape = (num_blocks, block_tokens, info.num_kv_heads * info.head_dim);
        let mut layers = Vec::with_capacity(info.num_layers);
        for _ in 0..info.num_layers {
            let k = Tensor::zeros(shape, info.dtype, &info.device)?;
            let v = Tensor::zeros(shape, info.dtype, &info.device)?;
            layers.push(LayerCache { k, v });
        }
        Ok(Self { layers, num_blocks, block_tokens })
    }

    /// Where the cache lies. A model has at least one layer.
    pub(super) fn device(&self) -> &Device {
        self.layers[0].k.device()
    }

    /// Format of keys and values.
    pub(super) fn dtype(&self) -> DType {
        self.layers[0].k.dtype()
    }

    /// Length of one token's keys in one layer.
    pub(super) fn width(&self) -> usize {
        self.layers[0].k.dims()[2]
    }
}

impl LayerCache {
    /// Writes keys and values (tokens, width) in place at the slots of `index` (`kernels::slot_index`).
    pub(super) fn write(&self, index: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        kernels::write_kv(&self.k.flatten_to(1)?, index, k)?;
        kernels::write_kv(&self.v.flatten_to(1)?, index, v)
    }
}
