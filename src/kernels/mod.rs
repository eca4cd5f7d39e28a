//! The arithmetic that candle does not have, each function with its plain reference.
//!
//! Functions here know tensors only: no model, no adapter, no batch. Each runs on any candle device; what exists for
//! one device only sits in a submodule named after it (`cpu`) and is chosen inside the function of the same name.

mod adapter;
mod attention;
pub mod cpu;
mod gates;
mod kv;
mod linear;
mod paged;
mod spectral;
mod stream;

pub use adapter::{
    BlockMix, ButterflyFactor, InputTerm, OutputTerm, SegmentTerms, Term, apply_segments, at_places, circulant_matrix,
    transform_inputs,
};
pub use attention::AttentionShape;
pub use gates::{GateRule, GateTerm, gates};
pub use linear::linear;
pub use paged::{AttentionPlan, KvLayout, PagedKv, PagedSpan};
pub use spectral::{Band, Basis, Spectral};
pub use stream::{Factor, StreamTerm, stream_function};
