//! Adapter lifecycle: native routes, and vLLM's two.
//!
//! | route | does |
//! |---|---|
//! | `PUT /v1/adapters/{name}` | publishes uploaded files: multipart, tar or gzip-compressed tar |
//! | `POST /v1/adapters/{name}` | publishes a directory inside the configured roots |
//! | `POST /v1/adapters/{name}:combine` | makes one of several and publishes it |
//! | `GET /v1/adapters`, `GET /v1/adapters/{name}` | what there is |
//! | `DELETE /v1/adapters/{name}` | removes a name |
//! | `POST /v1/load_lora_adapter`, `POST /v1/unload_lora_adapter` | the same in vLLM's words |
//!
//! The native routes refuse unknown fields: a misspelt `expected_generation` must not replace an adapter unguarded.

mod combine;
mod native;
mod upload;
mod vllm;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::routing::{get, post, put};

use super::{ApiError, AppState};
use crate::adapter::AdapterError;
use crate::store::StoreError;

/// Routes that change adapters; the router puts them behind the admin key. Each bounds the body it reads itself:
/// uploads by `adapters.upload_bytes_max`, the others by `server.body_bytes_max`.
pub(super) fn admin_routes() -> Router<AppState> {
    Router::new()
        .route("/v1/adapters/{name}", put(native::upload).post(native::load).delete(native::remove))
        .route("/v1/load_lora_adapter", post(vllm::load))
        .route("/v1/unload_lora_adapter", post(vllm::unload))
        .layer(DefaultBodyLimit::disable())
}

/// Routes that only look; the router puts them behind the API key.
pub(super) fn read_routes() -> Router<AppState> {
    Router::new().route("/v1/adapters", get(native::list)).route("/v1/adapters/{name}", get(native::show))
}

impl From<StoreError> for ApiError {
    /// The answer to a store operation that failed. What is not the client's business is logged here and not sent.
    fn from(error: StoreError) -> Self {
        let message = error.to_string();
        match &error {
            StoreError::NotFound(_) => Self::new(StatusCode::NOT_FOUND, message),
            StoreError::InvalidName(_) | StoreError::ReservedName(_) => Self::bad_request("name", message),
            StoreError::AlreadyExists(_) => Self::new(StatusCode::CONFLICT, message),
            StoreError::Conflict { .. } => {
                Self { param: Some("expected_generation".to_owned()), ..Self::new(StatusCode::CONFLICT, message) }
            }
            StoreError::OutsideRoots => Self::bad_request("path", message),
            StoreError::FilesNotFound(_) => {
                Self { param: Some("path".to_owned()), ..Self::new(StatusCode::NOT_FOUND, message) }
            }
            StoreError::BadUpload(_) => Self::new(StatusCode::BAD_REQUEST, message),
            StoreError::TooLarge { .. } | StoreError::OverHostMemory { .. } => {
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, message)
            }
            StoreError::TooManyParts { .. } | StoreError::NamedTwice(_) => Self::new(StatusCode::BAD_REQUEST, message),
            StoreError::Busy => Self::too_many(message),
            StoreError::Refused(refusal) => match &**refusal {
                AdapterError::Compute(_) => internal(&error),
                AdapterError::Combination { field, .. } => Self::bad_request(field, message),
                _ => Self::new(StatusCode::BAD_REQUEST, message),
            },
            StoreError::Storage(_) => internal(&error),
        }
    }
}

fn internal(error: &StoreError) -> ApiError {
    tracing::error!(error = error as &dyn std::error::Error, "an adapter operation failed");
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
}

/// Refuses the base model's name for an adapter.
fn check_not_base(state: &AppState, name: &str) -> Result<(), ApiError> {
    if name == state.model.name {
        return Err(ApiError::bad_request("name", format!("`{name}` is the name of the base model")));
    }
    Ok(())
}
