//! The route table and the layers around it.

use axum::Router;

use super::{AppState, adapters};

/// The whole HTTP service over `state`.
pub fn router(state: AppState) -> Router {
    Router::new().merge(adapters::admin_routes()).merge(adapters::read_routes()).with_state(state)
}
