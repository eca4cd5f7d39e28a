//! HTTP: routes, bodies, errors, streaming. The one module that knows axum and JSON bodies.

mod adapters;
mod auth;
mod body;
mod chat;
mod completions;
mod config;
mod error;
mod generate;
mod health;
mod layers;
mod logprobs;
mod models;
mod router;
mod sampling;
mod selector;
mod sse;
mod state;
mod tokenize;

pub use auth::is_loopback;
pub use config::ServerConfig;
pub use error::ApiError;
pub use router::router;
pub use state::{AppState, ServedModel};
