//! All integration tests, in one binary.

mod config;
mod engine_sim;
mod fixtures;
mod golden_adapters;
mod golden_base;
mod http_chat;
mod http_completions;
mod http_malformed;
mod http_service;
mod http_support;
mod metrics;
mod ops;
mod refusals;
mod runner;
mod store;
mod store_support;
mod tidy;
