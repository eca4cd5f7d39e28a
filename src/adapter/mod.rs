//! What an adapter is: the normal form, and the kinds that lower to it.
//!
//! A kind (LoRA, SSF, MiSS, ...) is a small compiler: [`lower`] reads the bytes of its files and produces a
//! [`LoweredAdapter`], the closed normal form that the model's layers apply. No kind's name is known outside
//! `kinds/`. This module does no IO, knows no path, no model family and nothing of the engine: files arrive as bytes
//! ([`AdapterFiles`]) and the base model as a table of sites with readable weights ([`BaseWeights`]).

mod activation;
mod adapted;
mod block_product;
mod compose;
mod config;
mod convert;
mod effect;
mod entries;
mod error;
#[cfg(test)]
mod fake_base;
mod files;
mod gate_network;
mod inspect;
mod keys;
mod kinds;
mod layer_slots;
mod linalg;
mod loaded;
mod lower;
mod lowering;
mod matching;
mod merge;
mod normal_form;
mod replace;
mod rotation;
mod shared_matrix;
mod site;
mod tensor_file;
mod terms;
#[cfg(test)]
mod tests;
mod token_rows;
mod torch_random;
mod wavelets;

pub use compose::{Part, compose, own_bytes_of};
pub use convert::{Converted, Form, MergedModel, convert};
pub use error::AdapterError;
pub use files::{AdapterFiles, Demand, Formats, LowerOptions, LowerReport, Need, OwnWeights};
pub use gate_network::{GateNetwork, GateRule};
pub use inspect::{Inspection, inspect, num_parts};
pub use kinds::{CombineInput, CombineMode, CombineOptions, KINDS, Kind, REFUSED, Refused, combine};
pub use layer_slots::{Activation, AttentionBranch, LayerSlots, Mix, StreamFunction};
pub use loaded::LoadedAdapter;
pub use lower::{digest, lower, lower_within};
pub use normal_form::{
    Band, Basis, BlockMix, ButterflyFactor, Delta, EmbeddingPatch, KvPrefix, LinearSlots, LoweredAdapter, NormOverride,
    Pre, Scale, Spectral, Weight,
};
pub use shared_matrix::{SharedMatrix, WeakTable};
pub use site::{BaseShape, BaseWeights, Site, SiteId, SiteKind, SiteTable};
