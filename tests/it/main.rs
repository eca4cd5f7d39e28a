//! All integration tests, in one binary.

mod engine_sim;
mod fixtures;
mod golden_adapters;
mod golden_base;
mod metrics;
mod refusals;
mod runner;
mod tidy;
