//! What orchestrators and dashboards ask: alive, ready, metrics, version. Open to everybody.

use std::sync::atomic::Ordering;

use axum::Json as JsonBody;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde_json::{Value as Json, json};

use super::{ApiError, AppState};

/// 200 while the engine lives, whatever the state of adapters.
pub(super) async fn health(State(state): State<AppState>) -> Result<StatusCode, ApiError> {
    if state.engine.is_alive() {
        return Ok(StatusCode::OK);
    }
    Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the engine is not running"))
}

/// 200 when requests should be sent here: the preload list is resident and the server is not draining.
pub(super) async fn ready(State(state): State<AppState>) -> Result<JsonBody<Json>, ApiError> {
    let not_ready = |why: &str| Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why));
    if state.draining.load(Ordering::Acquire) {
        return not_ready("the server is shutting down");
    }
    if !state.ready.load(Ordering::Acquire) {
        return not_ready("the server is still loading adapters");
    }
    if !state.engine.is_alive() {
        return not_ready("the engine is not running");
    }
    Ok(JsonBody(json!({"status": "ready"})))
}

/// Prometheus' text format.
pub(super) async fn metrics(State(state): State<AppState>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.metrics.render())
}

/// The server's version.
pub(super) async fn version() -> JsonBody<Json> {
    JsonBody(json!({"version": env!("CARGO_PKG_VERSION")}))
}
