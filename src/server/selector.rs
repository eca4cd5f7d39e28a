//! Which model a request means: the base, or one of its adapters. Never the base by mistake.

use std::sync::Arc;

use axum::http::StatusCode;
use serde::Deserialize;
use tracing::error;

use super::body::Fields;
use super::{ApiError, AppState};
use crate::adapter::LoadedAdapter;
use crate::store::{AdapterStatus, StoreError};

/// What a request names, before anything is looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Selector {
    /// The model's name as the answer repeats it.
    pub shown: String,
    /// `name` or `name@generation` of the adapter; `None` is the bare base.
    pub adapter: Option<String>,
}

/// The fields that can name an adapter besides `model`, in every spelling that clients use.
const ADAPTER_FIELDS: &[&str] = &["adapter", "adapter_id", "lora_path"];
/// Fields that would choose adapters in ways that are not supported; ignoring them would serve the base by mistake.
const REFUSED_FIELDS: &[&str] = &["lora", "lora_request", "lora_dir", "merged_adapters"];

/// The field `adapter`: a name, or an object.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a name or an object with `name` and `generation`")]
enum AdapterField {
    Name(String),
    Parts {
        name: Option<String>,
        generation: Option<u64>,
    },
    /// One entry per prompt, as some clients send it.
    List(Vec<Option<String>>),
}

/// An adapter's name with the generation, where one was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    name: Option<String>,
    generation: Option<String>,
}

impl Selector {
    /// Reads the fields that choose a model, next to `base`, the name of the served base.
    pub(super) fn parse(fields: &mut Fields<'_>, base: &str) -> Result<Self, ApiError> {
        for name in REFUSED_FIELDS {
            fields.refuse(name, &[serde_json::json!([])])?;
        }
        let model: Option<String> = fields.take("model")?;
        let model = model.filter(|model| !model.is_empty());
        let shown = model.clone();
        let mut wanted = model.as_deref().and_then(|model| by_model(model, base));
        for field in ADAPTER_FIELDS {
            if let Some(other) = by_field(fields, field)? {
                wanted = Some(agree(wanted, other, field)?);
            }
        }
        let Some(wanted) = wanted else {
            return Ok(Self { shown: shown.unwrap_or_else(|| base.to_owned()), adapter: None });
        };
        let Some(name) = wanted.name else {
            return Err(ApiError::bad_request("adapter", "`adapter` gives a generation but nothing names the adapter"));
        };
        let adapter = match wanted.generation {
            Some(generation) => format!("{name}@{generation}"),
            None => name,
        };
        Ok(Self { shown: shown.unwrap_or_else(|| adapter.clone()), adapter: Some(adapter) })
    }

    /// The adapter, loaded and leased.
    ///
    /// # Errors
    /// 404 when there is none of that name, 429 when too many are being loaded, 400 when its files are refused.
    pub(super) async fn load(&self, state: &AppState) -> Result<Option<Arc<LoadedAdapter>>, ApiError> {
        let Some(name) = &self.adapter else { return Ok(None) };
        // The store counts a load that fails.
        state.store.resolve(name).await.map(Some).map_err(|e| store_error(e, self.shown_name()))
    }

    /// The state of the adapter, without loading it; `None` is the bare base.
    ///
    /// # Errors
    /// 404 when there is none of that name.
    pub(super) async fn status(&self, state: &AppState) -> Result<Option<AdapterStatus>, ApiError> {
        let Some(name) = &self.adapter else { return Ok(None) };
        let bare = name.split_once('@').map_or(name.as_str(), |(bare, _)| bare);
        state.store.status(bare).await.map(Some).map_err(|e| store_error(e, self.shown_name()))
    }

    /// The name to complain about: `model` where that names the adapter, else the adapter.
    fn shown_name(&self) -> &str {
        match &self.adapter {
            Some(adapter) if !self.shown.contains(adapter.as_str()) => adapter,
            _ => &self.shown,
        }
    }
}

/// What the store's refusal means to a request that named `name` as its model.
pub(super) fn store_error(error: StoreError, name: &str) -> ApiError {
    match error {
        StoreError::NotFound(_) | StoreError::InvalidName(_) => ApiError::model_not_found(name),
        StoreError::Busy => ApiError::too_many(error.to_string()),
        StoreError::Storage(source) => {
            error!(%source, "adapter storage failed");
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "adapter storage failed")
        }
        other => ApiError::bad_request("model", other.to_string()),
    }
}

/// What the field `model` names: the base (`None`), `adapter`, `base:adapter` or `base::adapter`.
fn by_model(model: &str, base: &str) -> Option<Wanted> {
    if model == base {
        return None;
    }
    let rest = model.strip_prefix(base).and_then(|rest| rest.strip_prefix("::").or_else(|| rest.strip_prefix(':')));
    Some(Wanted::named(rest.unwrap_or(model)))
}

fn by_field(fields: &mut Fields<'_>, field: &str) -> Result<Option<Wanted>, ApiError> {
    let empty = || ApiError::bad_request(field, format!("`{field}` is empty; leave it out for the base model"));
    let named = |name: &str| if name.is_empty() { Err(empty()) } else { Ok(Some(Wanted::named(name))) };
    match fields.take(field)? {
        None => Ok(None),
        Some(AdapterField::Name(name)) => named(&name),
        Some(AdapterField::Parts { name: None, generation: None }) => Err(empty()),
        Some(AdapterField::Parts { name, generation }) => {
            Ok(Some(Wanted { name, generation: generation.map(|generation| generation.to_string()) }))
        }
        Some(AdapterField::List(names)) => match names.as_slice() {
            [] => Ok(None),
            [first, rest @ ..] if rest.iter().all(|name| name == first) => match first {
                Some(name) => named(name),
                None => Ok(None),
            },
            _ => Err(ApiError::bad_request(field, format!("`{field}` must be the same for all prompts of a request"))),
        },
    }
}

/// Two namings of an adapter as one, if they can both be meant.
fn agree(first: Option<Wanted>, second: Wanted, field: &str) -> Result<Wanted, ApiError> {
    let Some(first) = first else { return Ok(second) };
    let clash = |a: &Option<String>, b: &Option<String>| matches!((a, b), (Some(a), Some(b)) if a != b);
    if clash(&first.name, &second.name) || clash(&first.generation, &second.generation) {
        return Err(ApiError::bad_request(
            field,
            format!("`{field}` and the rest of the request name different adapters"),
        ));
    }
    Ok(Wanted { name: first.name.or(second.name), generation: first.generation.or(second.generation) })
}

impl Wanted {
    fn named(name: &str) -> Self {
        let (name, generation) = match name.split_once('@') {
            Some((name, generation)) => (name, Some(generation.to_owned())),
            None => (name, None),
        };
        Self { name: Some(name.to_owned()), generation }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value as Json, json};

    use super::*;

    fn select(body: &Json) -> Result<Option<String>, ApiError> {
        let body = body.to_string();
        Selector::parse(&mut Fields::parse(body.as_bytes())?, "org/base").map(|selector| selector.adapter)
    }

    #[test]
    fn every_dialect_names_its_adapter() {
        let check = |body: Json, expected: Option<&str>| {
            assert_eq!(select(&body).unwrap().as_deref(), expected, "{body}");
        };
        check(json!({}), None);
        check(json!({"model": ""}), None);
        check(json!({"model": null}), None);
        check(json!({"model": "org/base"}), None);
        check(json!({"model": "sql"}), Some("sql"));
        check(json!({"model": "sql@3"}), Some("sql@3"));
        check(json!({"model": "org/base:sql"}), Some("sql"));
        check(json!({"model": "org/base::sql@2"}), Some("sql@2"));
        check(json!({"adapter": "sql"}), Some("sql"));
        check(json!({"model": "org/base", "adapter": "sql@1"}), Some("sql@1"));
        check(json!({"model": "sql", "adapter": {"generation": 4}}), Some("sql@4"));
        check(json!({"adapter": {"name": "sql", "generation": 4}}), Some("sql@4"));
        check(json!({"model": "sql", "adapter": "sql@2", "lora_path": "sql"}), Some("sql@2"));
        check(json!({"model": "org/base", "lora_path": null}), None);
        check(json!({"lora_path": "sql"}), Some("sql"));
        check(json!({"lora_path": ["sql", "sql"]}), Some("sql"));
        check(json!({"adapter_id": "sql"}), Some("sql"));
        check(json!({"model": "base"}), Some("base"));
        check(json!({"model": "org/base:"}), Some(""));
        check(json!({"model": "other:sql"}), Some("other:sql"));
        check(json!({"model": "org/base2"}), Some("org/base2"));
    }

    #[test]
    fn contradictions_are_refused() {
        let check = |body: Json, param: &str| {
            let error = select(&body).unwrap_err();
            assert_eq!((error.status, error.param.as_deref()), (StatusCode::BAD_REQUEST, Some(param)), "{body}");
        };
        check(json!({"model": "sql", "adapter": "other"}), "adapter");
        check(json!({"model": "sql@1", "adapter": "sql@2"}), "adapter");
        check(json!({"model": "sql", "lora_path": "other"}), "lora_path");
        check(json!({"lora_path": ["a", "b"]}), "lora_path");
        check(json!({"lora_path": ["a", null]}), "lora_path");
        check(json!({"adapter": ""}), "adapter");
        check(json!({"adapter": {}}), "adapter");
        check(json!({"adapter": {"generation": 1}}), "adapter");
        check(json!({"adapter": 5}), "adapter");
        check(json!({"model": 5}), "model");
        check(json!({"lora": [{"id": 0, "scale": 0.5}]}), "lora");
        check(json!({"lora_request": {"lora_name": "x"}}), "lora_request");
    }
}
