//! `GET /v1/models` and `GET /v1/models/{id}`: the base model first, then its adapters. `/lora-adapters`: the adapters
//! with numbers, as llama.cpp's clients know them.

use axum::Json as JsonBody;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::body::{Body, Fields};
use super::generate::context;
use super::selector::{Selector, store_error};
use super::{ApiError, AppState};
use crate::store::AdapterStatus;

/// Lists what `model` may name.
pub(super) async fn list(State(state): State<AppState>) -> Result<JsonBody<Json>, ApiError> {
    let adapters = state.store.list().await.map_err(|e| store_error(e, ""))?;
    let adapters = adapters.iter().map(|status| adapter(&state, status));
    let data: Vec<Json> = std::iter::once(base(&state)).chain(adapters).collect();
    Ok(JsonBody(json!({"object": "list", "data": data})))
}

/// `GET /lora-adapters`: the adapters by the ids that the field `lora` takes. None acts unless a request names it.
pub(super) async fn list_numbered(State(state): State<AppState>) -> Result<JsonBody<Json>, ApiError> {
    let adapters = state.store.list().await.map_err(|e| store_error(e, ""))?;
    let numbered = adapters.iter().filter_map(|status| Some((state.store.number_of(&status.name)?, &status.name)));
    let mut numbered: Vec<_> = numbered.collect();
    numbered.sort_unstable();
    let data = numbered.into_iter().map(|(id, name)| json!({"id": id, "path": name, "scale": 0.0}));
    Ok(JsonBody(data.collect()))
}

/// An entry of what llama.cpp's clients set for all requests.
#[derive(Deserialize)]
struct GlobalScale {
    id: usize,
    scale: f32,
}

/// `POST /lora-adapters`: llama.cpp's strengths for all requests. A request chooses its adapters here, whatever others
/// do, so zeros are what already is and any other strength is refused.
pub(super) async fn set_scales(Body(body): Body) -> Result<JsonBody<Json>, ApiError> {
    let scales: Vec<GlobalScale> = serde_json::from_slice(&body).map_err(|e| {
        let message = format!("the body is not `[{{\"id\": ..., \"scale\": ...}}, ...]`: {e}");
        ApiError::new(StatusCode::BAD_REQUEST, message)
    })?;
    if let Some(at) = scales.iter().position(|entry| entry.scale != 0.0) {
        let GlobalScale { id, scale } = scales[at];
        let message = format!(
            "adapters have no strength for all requests here; send it with each request that wants it: \
             \"lora\": [{{\"id\": {id}, \"scale\": {scale}}}]"
        );
        return Err(ApiError::bad_request(&format!("[{at}].scale"), message));
    }
    Ok(JsonBody(json!({"success": true})))
}

/// One entry of the list, by any name that `model` accepts.
pub(super) async fn get(State(state): State<AppState>, Path(id): Path<String>) -> Result<JsonBody<Json>, ApiError> {
    let body = json!({"model": id}).to_string();
    let selector = Selector::parse(&mut Fields::parse(body.as_bytes())?, &state.model.name)?;
    match selector.status(&state).await? {
        Some(status) => Ok(JsonBody(adapter(&state, &status))),
        None => Ok(JsonBody(base(&state))),
    }
}

fn base(state: &AppState) -> Json {
    let model = &state.model;
    entry(&model.name, model.created, json!({"parent": null, "max_model_len": context(state)}))
}

fn adapter(state: &AppState, status: &AdapterStatus) -> Json {
    let own = json!({"parent": state.model.name, "max_model_len": null, "adapter_generation": status.generation});
    entry(&status.name, status.created, own)
}

/// `root` repeats the name: a path on the server is nobody's business.
fn entry(name: &str, created: u64, own: Json) -> Json {
    let mut entry = json!({
        "id": name, "object": "model", "created": created, "owned_by": "patchbay", "root": name,
        "permission": [{
            "id": format!("modelperm-{name}"), "object": "model_permission", "created": created,
            "allow_create_engine": false, "allow_sampling": true, "allow_logprobs": true,
            "allow_search_indices": false, "allow_view": true, "allow_fine_tuning": false,
            "organization": "*", "group": null, "is_blocking": false,
        }],
    });
    if let (Json::Object(entry), Json::Object(own)) = (&mut entry, own) {
        entry.extend(own);
    }
    entry
}
