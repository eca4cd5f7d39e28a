//! The parts that the families are wired from.
//!
//! A layer knows its site and looks up what each segment's adapter says about it; it knows no family and no kind.

mod attention;
mod decoder;
mod embedding;
mod linear;
mod mlp;
mod norm;
mod rope;
mod rope_config;
mod stream;

pub(super) use attention::{Attention, Heads, Qkv};
pub(super) use decoder::{Decoder, DecoderLayer};
pub(super) use embedding::Embedding;
pub(super) use linear::{Linear, Matrix};
pub(super) use mlp::{GateUp, Mlp};
pub(super) use norm::RmsNorm;
pub(super) use rope::{Rope, Rotation};
pub(super) use rope_config::{Defaults as RopeDefaults, RopeConfig};
