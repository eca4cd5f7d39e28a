//! HTTP: routes, bodies, errors, streaming. The one module that knows axum and JSON bodies.

mod adapters;
mod config;
mod error;
mod router;
mod state;

pub use config::ServerConfig;
pub use error::ApiError;
pub use router::router;
pub use state::{AppState, ServedModel};
