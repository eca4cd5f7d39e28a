//! `POST /v1/adapters/{name}:combine`.

use axum::Json;
use axum::extract::Request;
use axum::http::StatusCode;
use serde::Deserialize;

use super::super::{ApiError, AppState};
use super::native::{Answer, success_status};
use super::{check_not_base, upload};
use crate::adapter::{CombineMode, CombineOptions};
use crate::store::PublishOptions;

/// What to make.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CombineBody {
    mode: CombineMode,
    adapters: Vec<PartBody>,
    rank: Option<usize>,
    density: Option<f64>,
    seed: Option<u64>,
    lambda: Option<f64>,
    #[serde(default)]
    merge: bool,
    expected_generation: Option<u64>,
}

/// An adapter that goes into it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PartBody {
    name: String,
    weight: Option<f32>,
}

/// Combines adapters and publishes the result under `name`.
pub(super) async fn combine(state: &AppState, name: &str, request: Request) -> Answer {
    check_not_base(state, name)?;
    let body = upload::receive_json(request, state.config.body_bytes_max).await?;
    let mut deserializer = serde_json::Deserializer::from_slice(&body);
    let body: CombineBody = serde_path_to_error::deserialize(&mut deserializer).map_err(|e| {
        let error = ApiError::new(StatusCode::BAD_REQUEST, format!("`{}`: {}", e.path(), e.inner()));
        ApiError { param: Some(e.path().to_string()).filter(|path| path != "."), ..error }
    })?;
    let success = success_status(state, name).await;
    let CombineBody { mode, rank, density, seed, lambda, .. } = body;
    let how = CombineOptions { mode, rank, density, seed, lambda };
    let parts: Vec<(String, f32)> =
        body.adapters.into_iter().map(|part| (part.name, part.weight.unwrap_or(1.0))).collect();
    let options = PublishOptions {
        merge: body.merge,
        expected_generation: body.expected_generation,
        ..PublishOptions::default()
    };
    let status = state.store.combine(name, &parts, how, &options).await?;
    Ok((success, Json(status)))
}
