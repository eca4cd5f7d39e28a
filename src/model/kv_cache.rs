//! The KV cache's tensors. Who owns which block is the engine's business.

use candle_core::{DType, Device, Result};

use super::{ModelInfo, PrefixWrite};
use crate::kernels::{KvLayout, PagedKv};

/// Keys and values of all layers, in blocks of `block_tokens` slots.
pub struct KvCache {
    pub(super) layers: Vec<PagedKv>,
    pub(super) num_blocks: usize,
    pub(super) block_tokens: usize,
    /// Length of one token's keys in one layer.
    pub(super) width: usize,
    /// Key and value heads, and the length of their vectors.
    heads: (usize, usize),
}

impl KvCache {
    /// Takes the memory for `num_blocks` blocks on the model's device, keys and values in `dtype`.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(info: &ModelInfo, num_blocks: usize, block_tokens: usize, dtype: DType) -> Result<Self> {
        let heads = (info.num_kv_heads, info.head_dim);
        let mut layers = Vec::with_capacity(info.num_layers);
        for _ in 0..info.num_layers {
            layers.push(PagedKv::new(info.kv_layout, (num_blocks, block_tokens), heads, dtype, &info.device)?);
        }
        Ok(Self { layers, num_blocks, block_tokens, width: info.num_kv_heads * info.head_dim, heads })
    }

    /// Copies entries of adapters' prefixes to their slots.
    pub(super) fn write_prefixes(&self, writes: &[PrefixWrite]) -> Result<()> {
        for PrefixWrite { first_entry, slots, adapter } in writes {
            let Some(prefix) = adapter.tensors.kv_prefix.as_ref().filter(|_| !slots.is_empty()) else { continue };
            assert_eq!(prefix.layers.len(), self.layers.len(), "the prefix was lowered for this model");
            for (cache, (keys, values)) in self.layers.iter().zip(&prefix.layers) {
                let rows = (keys.narrow(0, *first_entry, slots.len())?, values.narrow(0, *first_entry, slots.len())?);
                cache.write_slots(slots, (&rows.0, &rows.1), self.heads)?;
            }
        }
        Ok(())
    }

    /// How it is laid out. A model has at least one layer.
    pub(super) fn layout(&self) -> KvLayout {
        self.layers[0].layout()
    }

    /// Where it lies.
    pub(super) fn device(&self) -> &Device {
        self.layers[0].device()
    }
}
