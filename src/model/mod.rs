//! The base model: families, layers, weights and the KV cache's tensors.
//!
//! The model knows tokens, positions, KV slots and adapter segments ([`Batch`]); it knows nothing of requests,
//! sequences, sampling or metrics, and no adapter kind. A checkpoint directory comes in through [`Model::load`]; what
//! leaves is the logits of the rows asked for.

mod batch;
mod causal_lm;
mod checkpoint;
mod config;
mod device;
mod device_adapter;
mod error;
mod export;
mod families;
mod gates;
mod generation;
mod info;
mod kv_cache;
mod layers;
mod loader;
mod locate;
mod shared_forms;
mod step;

pub use batch::{AdapterSegment, AttentionSpan, Batch, PrefixWrite, VirtualRun};
pub use causal_lm::Model;
pub use config::{DeviceChoice, DtypeChoice, KernelChoice, ModelConfig, QuantChoice};
pub use device::open_device;
pub use device_adapter::DeviceAdapter;
pub use error::ModelError;
pub use export::{stored_dtype, write_merged};
pub use families::supported_architectures;
pub use info::{GenerationDefaults, ModelInfo, RopeLengthRule};
pub use kv_cache::KvCache;
pub use locate::locate;
