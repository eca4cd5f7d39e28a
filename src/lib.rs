//! Patchbay serves one base language model and every fine-tuned adapter of it, mixed in one continuous batch.
//!
//! The modules in reading order, from the wire down to the arithmetic:
//!
//! | module | owns |
//! |---|---|
//! | [`bench`](mod@bench) | measuring a server over HTTP: load, clock, figures |
//! | [`app`] | building the parts in order; start, drain, shutdown |
//! | [`config`] | typed settings: file, then environment, then flags |
//! | [`server`] | HTTP: routes, bodies, errors, streaming |
//! | [`text`] | strings to token ids and back; chat templates; stop strings |
//! | [`store`] | adapters at rest: blobs, generations, names |
//! | [`engine`] | one thread: scheduling, KV blocks, adapter slots, sampling |
//! | [`adapter`] | what an adapter is: the normal form and the kinds that lower to it |
//! | [`model`] | the base model: families, layers, weights, KV cache tensors |
//! | [`kernels`] | arithmetic that candle does not have, each with its plain reference |
//! | [`metrics`] | every metric the server exports |
//!
//! A module imports only modules below it; `tests/it/tidy.rs` enforces that.

pub mod adapter;
pub mod app;
pub mod bench;
pub mod cli;
pub mod config;
pub mod engine;
pub mod kernels;
pub mod metrics;
pub mod model;
pub mod server;
pub mod store;
pub mod text;
