//! All integration tests, in one binary.

mod fixtures;
mod golden_base;
mod runner;
mod engine_sim;
