//! All integration tests, in one binary.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics, in helpers too")]

mod bench;
mod cli_adapter;
mod combined;
mod composed;
mod config;
mod convert;
mod engine_golden;
mod engine_sim;
mod fixtures;
mod golden_adapters;
mod golden_base;
mod http_adapters;
mod http_chat;
mod http_completions;
mod http_composition;
mod http_malformed;
mod http_service;
mod http_support;
mod hub;
mod metrics;
mod mixed_adapters;
mod model_load;
mod ops;
mod process;
mod quantized_base;
mod refusals;
mod runner;
mod sample;
mod store;
mod store_support;
mod tidy;
