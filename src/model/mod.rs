//! The base model: families, layers, weights and the KV cache's tensors.
//!
//! The model knows tokens, positions, KV slots and adapter segments ([`Batch`]); it knows nothing of requests,
//! sequences, sampling or metrics, and no adapter kind.

mod batch;
mod causal_lm;
mod config;
mod info;
mod kv_cache;

pub use batch::{AdapterSegment, AttentionSpan, Batch};
pub use causal_lm::{Model, ModelError, locate};
pub use config::{DeviceChoice, DtypeChoice, ModelConfig, QuantChoice};
pub use info::{GenerationDefaults, ModelInfo, RopeLengthRule};
pub use kv_cache::KvCache;
