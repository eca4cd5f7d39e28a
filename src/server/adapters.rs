//! Adapter lifecycle: native routes, and vLLM's two.

use axum::Router;

use super::AppState;

/// Routes that change adapters; the router puts them behind the admin key.
pub(super) fn admin_routes() -> Router<AppState> {
    Router::new()
}

/// Routes that only look; the router puts them behind the API key.
pub(super) fn read_routes() -> Router<AppState> {
    Router::new()
}
