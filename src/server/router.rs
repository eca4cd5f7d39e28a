//! The route table and the layers around it.

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;

use super::auth::{self, Keys};
use super::{AppState, adapters, chat, completions, health, layers, models, tokenize};

/// The whole HTTP service over `state`.
pub fn router(state: AppState) -> Router {
    let keys = Keys::new(&state.config);
    let body_limit = DefaultBodyLimit::max(state.config.body_bytes_max);
    let api = Router::new()
        .route("/v1/completions", post(completions::completions))
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::get))
        .route("/lora-adapters", get(models::list_numbered).post(models::set_scales))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .merge(adapters::read_routes())
        .route_layer(body_limit)
        .route_layer(from_fn_with_state(keys.clone(), auth::api));
    // Uploads set their own limit.
    let admin = adapters::admin_routes().route_layer(from_fn_with_state(keys, auth::admin));
    let open = Router::new()
        .route("/health", get(health::health))
        .route("/ping", get(health::health).post(health::health))
        .route("/ready", get(health::ready))
        .route("/metrics", get(health::metrics))
        .route("/version", get(health::version));
    api.merge(admin)
        .merge(open)
        .fallback(layers::not_found)
        .method_not_allowed_fallback(layers::method_not_allowed)
        .layer(from_fn_with_state(state.clone(), layers::time_limit))
        .layer(CatchPanicLayer::custom(layers::panicked))
        .layer(from_fn_with_state(state.clone(), layers::observe))
        .with_state(state)
}
