//! `/v1/adapters` and `/v1/adapters/{name}`.

use std::path::PathBuf;

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::{ApiError, AppState};
use super::upload::{self, Upload};
use super::{check_not_base, combine};
use crate::store::{AdapterStatus, PublishOptions, StoreError};

/// Query of an upload.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UploadQuery {
    #[serde(default)]
    merge: bool,
    expected_generation: Option<u64>,
}

/// Body of a load from a path.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LoadBody {
    path: PathBuf,
    #[serde(default)]
    merge: bool,
    expected_generation: Option<u64>,
}

type Named = Result<Path<String>, PathRejection>;
pub(super) type Answer = Result<(StatusCode, Json<AdapterStatus>), ApiError>;

/// `PUT /v1/adapters/{name}`: publishes the files in the body.
pub(super) async fn upload(
    State(state): State<AppState>,
    name: Named,
    query: Result<Query<UploadQuery>, QueryRejection>,
    request: Request,
) -> Answer {
    let name = adapter_name(name)?;
    let Query(query) = query.map_err(|e| ApiError::new(StatusCode::BAD_REQUEST, e.body_text()))?;
    check_not_base(&state, &name)?;
    // The memory that uploads take is bounded: this waits before anything of the body is read.
    let slot = state.store.upload_slot().await?;
    let success = success_status(&state, &name).await;
    let options = PublishOptions {
        merge: query.merge,
        expected_generation: query.expected_generation,
        ..PublishOptions::default()
    };
    let status = match upload::receive(request, state.store.upload_bytes_max()).await? {
        Upload::Files(files) => slot.publish(&name, files, &options).await?,
        Upload::Archive(archive) => slot.publish_archive(&name, archive, &options).await?,
    };
    Ok((success, Json(status)))
}

/// `POST /v1/adapters/{name}`: publishes the directory that the body names, or with `:combine` behind the name what
/// several adapters make.
pub(super) async fn load(State(state): State<AppState>, name: Named, request: Request) -> Answer {
    let name = adapter_name(name)?;
    if let Some(name) = name.strip_suffix(":combine") {
        return combine::combine(&state, name, request).await;
    }
    check_not_base(&state, &name)?;
    let body = upload::receive_json(request, state.config.body_bytes_max).await?;
    let body: LoadBody = serde_json::from_slice(&body).map_err(|e| {
        ApiError::new(StatusCode::BAD_REQUEST, format!("the body is not `{{\"path\": ..., \"merge\": ...}}`: {e}"))
    })?;
    let success = success_status(&state, &name).await;
    let options = PublishOptions {
        merge: body.merge,
        expected_generation: body.expected_generation,
        ..PublishOptions::default()
    };
    let status = state.store.load_path(&name, &body.path, &options).await?;
    Ok((success, Json(status)))
}

/// `GET /v1/adapters`: every adapter, sorted by name.
pub(super) async fn list(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    Ok(Json(json!({"object": "list", "data": state.store.list().await?})))
}

/// `GET /v1/adapters/{name}`: one adapter.
pub(super) async fn show(State(state): State<AppState>, name: Named) -> Result<Json<AdapterStatus>, ApiError> {
    Ok(Json(state.store.status(&adapter_name(name)?).await?))
}

/// `DELETE /v1/adapters/{name}`: removes an adapter.
pub(super) async fn remove(State(state): State<AppState>, name: Named) -> Result<Json<Value>, ApiError> {
    let name = adapter_name(name)?;
    state.store.remove(&name).await?;
    Ok(Json(json!({"name": name, "removed": true})))
}

fn adapter_name(name: Named) -> Result<String, ApiError> {
    name.map(|Path(name)| name).map_err(|e| ApiError::bad_request("name", e.body_text()))
}

/// 201 where the name is not in use yet, else 200.
pub(super) async fn success_status(state: &AppState, name: &str) -> StatusCode {
    match state.store.status(name).await {
        Err(StoreError::NotFound(_)) => StatusCode::CREATED,
        _ => StatusCode::OK,
    }
}
