//! All integration tests, in one binary.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics, in helpers too")]

mod fixtures;
mod golden_base;
mod mixed_adapters;
mod model_load;
mod quantized_base;
mod runner;
