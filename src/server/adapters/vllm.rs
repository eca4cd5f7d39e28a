//! vLLM's two routes: its bodies, success texts, statuses and error types.

use std::path::PathBuf;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::super::{ApiError, AppState};
use super::upload;
use crate::store::{PublishOptions, StoreError};

const INVALID_USER_INPUT: &str = "InvalidUserInput";

/// Body of a load. Unknown fields are ignored, as vLLM does.
#[derive(Debug, Deserialize)]
struct LoadBody {
    lora_name: Option<String>,
    lora_path: Option<String>,
    #[serde(default)]
    load_inplace: Option<bool>,
}

/// Body of an unload. `lora_int_id` is ignored: names are the only handle.
#[derive(Debug, Deserialize)]
struct UnloadBody {
    lora_name: Option<String>,
}

/// `POST /v1/load_lora_adapter`
pub(super) async fn load(State(state): State<AppState>, request: Request) -> Result<String, ApiError> {
    let body: LoadBody = receive(&state, request).await?;
    let (Some(name), Some(path)) = (given(body.lora_name), given(body.lora_path)) else {
        return Err(invalid("both 'lora_name' and 'lora_path' must be given"));
    };
    if name == state.model.name {
        return Err(invalid(format!("'{name}' is the name of the base model")));
    }
    let must_be_new = !body.load_inplace.unwrap_or_default();
    let options = PublishOptions { must_be_new, ..PublishOptions::default() };
    state.store.load_path(&name, &PathBuf::from(path), &options).await.map_err(load_error)?;
    Ok(format!("Success: LoRA adapter '{name}' added successfully."))
}

/// `POST /v1/unload_lora_adapter`
pub(super) async fn unload(State(state): State<AppState>, request: Request) -> Result<String, ApiError> {
    let body: UnloadBody = receive(&state, request).await?;
    let Some(name) = given(body.lora_name) else {
        return Err(invalid("'lora_name' must be given"));
    };
    state.store.remove(&name).await?;
    Ok(format!("Success: LoRA adapter '{name}' removed successfully."))
}

async fn receive<T: DeserializeOwned>(state: &AppState, request: Request) -> Result<T, ApiError> {
    let body = upload::receive_json(request, state.config.body_bytes_max).await?;
    serde_json::from_slice(&body)
        .map_err(|e| ApiError::new(StatusCode::BAD_REQUEST, format!("the body is not usable: {e}")))
}

/// A field that is there and not empty.
fn given(field: Option<String>) -> Option<String> {
    field.filter(|text| !text.is_empty())
}

fn invalid(message: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, message).with_kind(INVALID_USER_INPUT)
}

/// vLLM's statuses: what the request got wrong is 400, files that are not there 404, everything else about a load 500.
fn load_error(error: StoreError) -> ApiError {
    match error {
        StoreError::AlreadyExists(name) => {
            invalid(format!("LoRA adapter '{name}' is already loaded; set 'load_inplace' to true to replace it"))
        }
        StoreError::InvalidName(_) | StoreError::ReservedName(_) | StoreError::OutsideRoots => {
            invalid(error.to_string())
        }
        StoreError::TooLarge { .. } | StoreError::OverHostMemory { .. } | StoreError::Refused(_) => {
            let message = ApiError::from(error).message;
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
        }
        StoreError::NotFound(_)
        | StoreError::Conflict { .. }
        | StoreError::FilesNotFound(_)
        | StoreError::BadUpload(_)
        | StoreError::TooManyParts { .. }
        | StoreError::NamedTwice(_)
        | StoreError::Busy
        | StoreError::Storage(_) => ApiError { param: None, ..ApiError::from(error) },
    }
}
