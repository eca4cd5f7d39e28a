//! All integration tests, in one binary.

mod engine_sim;
mod fixtures;
mod golden_base;
mod runner;
