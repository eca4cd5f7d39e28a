//! `GET /v1/models` and `GET /v1/models/{id}`: the base model first, then its adapters. `GET /lora-adapters`: the
//! adapters with numbers, as llama.cpp's clients know them.

use axum::Json as JsonBody;
use axum::extract::{Path, State};
use serde_json::{Value as Json, json};

use super::body::Fields;
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
