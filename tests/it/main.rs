//! All integration tests, in one binary.

mod fixtures;
mod golden_adapters;
mod golden_base;
mod refusals;
mod runner;
