//! Which model a request means: the base, one of its adapters, or several of them together. Never the base by mistake.

use std::sync::Arc;

use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::value::RawValue;
use tracing::error;

use super::body::{Fields, parse_value};
use super::{ApiError, AppState};
use crate::adapter::LoadedAdapter;
use crate::store::{AdapterStatus, StoreError};

/// What a request names, before anything is looked up.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Selector {
    /// The model's name as the answer repeats it.
    pub shown: String,
    /// The adapters that act, in order; none is the bare base.
    pub parts: Vec<Part>,
    /// The field that names them, for messages.
    field: &'static str,
}

/// An adapter at a strength.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Part {
    /// Which.
    pub adapter: Handle,
    /// Its strength; 1 is the adapter as it is, 0 is without it.
    pub scale: f32,
}

/// How a request points to an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Handle {
    /// `name` or `name@generation`.
    Name(String),
    /// The number that `GET /lora-adapters` shows.
    Number(usize),
}

/// Strengths from minus this to this are accepted; what is beyond is a mistake, not a strength.
const SCALE_MAX: f32 = 100.0;
/// The fields that can name one adapter besides `model`, in every spelling that clients use.
const ADAPTER_FIELDS: &[&str] = &["adapter", "adapter_id", "lora_path"];
/// Fields that would choose adapters in ways that are not supported; ignoring them would serve the base by mistake.
const REFUSED_FIELDS: &[&str] = &["lora_request", "lora_dir"];

/// An object that names an adapter.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AdapterObject {
    name: Option<String>,
    generation: Option<u64>,
    scale: Option<f32>,
}

/// An entry of `lora`, llama.cpp's list.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LoraObject {
    id: Option<usize>,
    name: Option<String>,
    scale: f32,
}

/// `merged_adapters`, LoRAX's object.
#[derive(Deserialize)]
struct MergedAdapters {
    ids: Vec<String>,
    weights: Vec<f32>,
    merge_strategy: Option<String>,
}

/// An adapter's name with the generation and the strength, where they were asked for.
#[derive(Clone, Debug, PartialEq)]
struct Wanted {
    name: Option<String>,
    generation: Option<String>,
    scale: Option<f32>,
}

/// What a field that can name adapters says.
enum Named {
    Nothing,
    One(Wanted),
    Several(Vec<Part>),
}

impl Selector {
    /// Reads the fields that choose a model, next to `base`, the name of the served base.
    pub(super) fn parse(fields: &mut Fields<'_>, base: &str) -> Result<Self, ApiError> {
        for name in REFUSED_FIELDS {
            fields.refuse(name, &[serde_json::json!([])])?;
        }
        let model: Option<String> = fields.take("model")?;
        let model = model.filter(|model| !model.is_empty());
        let mut wanted = model.as_deref().and_then(|model| by_model(model, base));
        let mut several: Option<(&'static str, Vec<Part>)> = None;
        let lists = [("lora", by_lora(fields)?), ("merged_adapters", by_merged_adapters(fields)?)];
        let mut singles = Vec::new();
        for field in ADAPTER_FIELDS {
            singles.push((*field, by_field(fields, field)?));
        }
        for (field, named) in singles.into_iter().chain(lists) {
            match named {
                Named::Nothing => {}
                Named::One(other) => wanted = Some(agree(wanted, other, field)?),
                Named::Several(parts) => {
                    if several.is_some() {
                        return Err(disagree(field));
                    }
                    several = Some((field, parts));
                }
            }
        }
        match several {
            Some((field, _)) if wanted.is_some() => Err(disagree(field)),
            Some((field, parts)) => {
                let shown = model.unwrap_or_else(|| together(&parts));
                Ok(Self { shown, parts, field })
            }
            None => Self::of_one(model, wanted, base),
        }
    }

    fn of_one(model: Option<String>, wanted: Option<Wanted>, base: &str) -> Result<Self, ApiError> {
        let field = "adapter";
        let Some(wanted) = wanted else {
            return Ok(Self { shown: model.unwrap_or_else(|| base.to_owned()), parts: Vec::new(), field });
        };
        let Some(name) = wanted.name else {
            return Err(ApiError::bad_request(field, "`adapter` names no adapter, and nothing else does"));
        };
        let name = match wanted.generation {
            Some(generation) => format!("{name}@{generation}"),
            None => name,
        };
        let scale = wanted.scale.unwrap_or(1.0);
        let shown = model.unwrap_or_else(|| name.clone());
        Ok(Self { shown, parts: vec![Part { adapter: Handle::Name(name), scale }], field })
    }

    /// The adapter or the composition, loaded and leased; `None` is the bare base.
    ///
    /// # Errors
    /// 404 when there is none of that name, 429 when too many are being loaded, 400 when its files are refused or several
    /// cannot act together.
    pub(super) async fn load(&self, state: &AppState) -> Result<Option<Arc<LoadedAdapter>>, ApiError> {
        let parts = self.named(state)?;
        // The store counts a load that fails.
        match parts.as_slice() {
            [] => Ok(None),
            [(name, 1.0)] => {
                state.store.resolve(name).await.map(Some).map_err(|e| store_error(e, self.shown_name(name)))
            }
            parts => state.store.compose(parts).await.map_err(|error| match error {
                StoreError::NotFound(name) => ApiError::model_not_found(&name),
                error => {
                    let error = store_error(error, "");
                    let param = error.param.map(|_| self.field.to_owned());
                    ApiError { param, ..error }
                }
            }),
        }
    }

    /// The state of the first adapter, without loading any; `None` is the bare base.
    ///
    /// # Errors
    /// 404 when there is none of one of the names, or not in the generation that was asked for.
    pub(super) async fn status(&self, state: &AppState) -> Result<Option<AdapterStatus>, ApiError> {
        let mut first = None;
        for (name, _) in self.named(state)? {
            let status = state.store.status_of(&name).await.map_err(|e| store_error(e, self.shown_name(&name)))?;
            first.get_or_insert(status);
        }
        Ok(first)
    }

    /// The parts by name.
    fn named(&self, state: &AppState) -> Result<Vec<(String, f32)>, ApiError> {
        let name = |part: &Part| match &part.adapter {
            Handle::Name(name) => Ok((name.clone(), part.scale)),
            Handle::Number(id) => match state.store.name_of(*id) {
                Some(name) => Ok((name, part.scale)),
                None => Err(ApiError {
                    param: Some(self.field.to_owned()),
                    ..ApiError::new(StatusCode::NOT_FOUND, format!("No adapter has the id {id}."))
                }),
            },
        };
        self.parts.iter().map(name).collect()
    }

    /// The name to complain about: `model` where that names the adapter, else the adapter.
    fn shown_name<'a>(&'a self, adapter: &'a str) -> &'a str {
        if self.shown.contains(adapter) && self.parts.len() == 1 { &self.shown } else { adapter }
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

/// A field that names one adapter: a name, an object, or a list. In `adapter` a list is what acts together, in the others
/// it has one entry per prompt, which must be the same.
fn by_field(fields: &mut Fields<'_>, field: &str) -> Result<Named, ApiError> {
    let Some(raw) = fields.take::<&RawValue>(field)? else { return Ok(Named::Nothing) };
    if !raw.get().starts_with('[') {
        return wanted(field, raw).map(Named::One);
    }
    let entries: Vec<Option<&RawValue>> = parse_value(field, raw)?;
    let entries = entries.into_iter().enumerate().map(|(i, entry)| {
        let path = format!("{field}[{i}]");
        entry.map(|entry| wanted(&path, entry)).transpose()
    });
    let entries: Vec<Option<Wanted>> = entries.collect::<Result<_, ApiError>>()?;
    match entries.as_slice() {
        [] => Ok(Named::Nothing),
        entries if field == "adapter" => {
            let parts = entries.iter().enumerate().map(|(i, entry)| match entry {
                Some(Wanted { name: Some(name), generation, scale }) => {
                    let generation = generation.as_ref().map(|generation| format!("@{generation}"));
                    let name = format!("{name}{}", generation.unwrap_or_default());
                    Ok(Part { adapter: Handle::Name(name), scale: scale.unwrap_or(1.0) })
                }
                _ => Err(ApiError::bad_request(&format!("{field}[{i}]"), format!("`{field}[{i}]` names no adapter"))),
            });
            parts.collect::<Result<_, ApiError>>().map(Named::Several)
        }
        [first, rest @ ..] if rest.iter().all(|entry| entry == first) => {
            Ok(first.clone().map_or(Named::Nothing, Named::One))
        }
        _ => Err(ApiError::bad_request(field, format!("`{field}` must be the same for all prompts of a request"))),
    }
}

/// A name, or an object with a name, a generation and a scale.
fn wanted(path: &str, raw: &RawValue) -> Result<Wanted, ApiError> {
    let wanted = if raw.get().starts_with('{') {
        let object: AdapterObject = parse_value(path, raw)?;
        let generation = object.generation.map(|generation| generation.to_string());
        if let Some(scale) = object.scale {
            check_scale(&format!("{path}.scale"), scale)?;
        }
        let wanted = object.name.as_deref().map(Wanted::named);
        let named = wanted.as_ref().and_then(|wanted| wanted.generation.clone());
        if let (Some(named), Some(generation)) = (&named, &generation)
            && named != generation
        {
            return Err(ApiError::bad_request(path, format!("`{path}` names two generations")));
        }
        let name = wanted.and_then(|wanted| wanted.name);
        Wanted { name, generation: generation.or(named), scale: object.scale }
    } else {
        let name: String = parse_value(path, raw).map_err(|_| {
            let message = format!("`{path}`: expected a name or an object with `name`, `generation` and `scale`");
            ApiError::bad_request(path, message)
        })?;
        Wanted::named(&name)
    };
    let is_empty = wanted.name.as_deref() == Some("");
    if is_empty || (wanted.name.is_none() && wanted.generation.is_none() && wanted.scale.is_none()) {
        return Err(ApiError::bad_request(path, format!("`{path}` is empty; leave it out for the base model")));
    }
    Ok(wanted)
}

/// llama.cpp's list: ids as `GET /lora-adapters` shows them, or names; adapters that are not listed do not act.
fn by_lora(fields: &mut Fields<'_>) -> Result<Named, ApiError> {
    let entries: Vec<LoraObject> = fields.take("lora")?.unwrap_or_default();
    if entries.is_empty() {
        return Ok(Named::Nothing);
    }
    let parts = entries.into_iter().enumerate().map(|(i, entry)| {
        check_scale(&format!("lora[{i}].scale"), entry.scale)?;
        let adapter = match (entry.id, entry.name) {
            (Some(id), None) => Handle::Number(id),
            (None, Some(name)) => Handle::Name(name),
            _ => {
                let message = format!("`lora[{i}]` must have either `id` or `name`");
                return Err(ApiError::bad_request(&format!("lora[{i}]"), message));
            }
        };
        Ok(Part { adapter, scale: entry.scale })
    });
    parts.collect::<Result<_, ApiError>>().map(Named::Several)
}

/// LoRAX's weighted adapters, of which the linear strategy is a composition.
fn by_merged_adapters(fields: &mut Fields<'_>) -> Result<Named, ApiError> {
    let field = "merged_adapters";
    let Some(merged) = fields.take::<MergedAdapters>(field)? else { return Ok(Named::Nothing) };
    let strategy = merged.merge_strategy.as_deref().unwrap_or("linear");
    if strategy != "linear" {
        let message = "only the strategy `linear` acts per request; `ties` and `dare` make an adapter of its own: \
                       POST /v1/adapters/{name}:combine";
        return Err(ApiError::bad_request("merged_adapters.merge_strategy", message));
    }
    if merged.ids.len() != merged.weights.len() {
        let (ids, weights) = (merged.ids.len(), merged.weights.len());
        let message = format!("`merged_adapters` has {ids} ids and {weights} weights");
        return Err(ApiError::bad_request("merged_adapters.weights", message));
    }
    if merged.ids.is_empty() {
        return Err(ApiError::bad_request("merged_adapters.ids", "`merged_adapters.ids` is empty"));
    }
    let parts = merged.ids.into_iter().zip(merged.weights).enumerate().map(|(i, (name, scale))| {
        check_scale(&format!("merged_adapters.weights[{i}]"), scale)?;
        Ok(Part { adapter: Handle::Name(name), scale })
    });
    parts.collect::<Result<_, ApiError>>().map(Named::Several)
}

fn check_scale(path: &str, scale: f32) -> Result<(), ApiError> {
    if (-SCALE_MAX..=SCALE_MAX).contains(&scale) {
        return Ok(());
    }
    Err(ApiError::bad_request(path, format!("`{path}` must be from -{SCALE_MAX} to {SCALE_MAX}, found {scale}")))
}

/// The parts as one name, for answers.
fn together(parts: &[Part]) -> String {
    let part = |part: &Part| match &part.adapter {
        Handle::Name(name) => format!("{name}*{}", part.scale),
        Handle::Number(id) => format!("#{id}*{}", part.scale),
    };
    parts.iter().map(part).collect::<Vec<_>>().join("+")
}

fn disagree(field: &str) -> ApiError {
    ApiError::bad_request(field, format!("`{field}` and the rest of the request name different adapters"))
}

/// Two namings of an adapter as one, if they can both be meant.
fn agree(first: Option<Wanted>, second: Wanted, field: &str) -> Result<Wanted, ApiError> {
    let Some(first) = first else { return Ok(second) };
    let clash = |a: &Option<String>, b: &Option<String>| matches!((a, b), (Some(a), Some(b)) if a != b);
    let scales = matches!((first.scale, second.scale), (Some(a), Some(b)) if a != b);
    if clash(&first.name, &second.name) || clash(&first.generation, &second.generation) || scales {
        return Err(disagree(field));
    }
    Ok(Wanted {
        name: first.name.or(second.name),
        generation: first.generation.or(second.generation),
        scale: first.scale.or(second.scale),
    })
}

impl Wanted {
    fn named(name: &str) -> Self {
        let (name, generation) = match name.split_once('@') {
            Some((name, generation)) => (name, Some(generation.to_owned())),
            None => (name, None),
        };
        Self { name: Some(name.to_owned()), generation, scale: None }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value as Json, json};

    use super::*;

    fn select(body: &Json) -> Result<Option<String>, ApiError> {
        let body = body.to_string();
        let selector = Selector::parse(&mut Fields::parse(body.as_bytes())?, "org/base")?;
        Ok(match selector.parts.as_slice() {
            [] => None,
            [Part { adapter: Handle::Name(name), scale: 1.0 }] => Some(name.clone()),
            parts => Some(together(parts)),
        })
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
    fn several_adapters_and_strengths_are_read_from_every_dialect() {
        let check = |body: Json, expected: Option<&str>| {
            assert_eq!(select(&body).unwrap().as_deref(), expected, "{body}");
        };
        check(json!({"adapter": {"name": "sql", "scale": 0.5}}), Some("sql*0.5"));
        check(json!({"model": "sql", "adapter": {"scale": -0.5}}), Some("sql*-0.5"));
        check(json!({"adapter": {"name": "sql", "scale": 1}}), Some("sql"));
        check(
            json!({"adapter": [{"name": "sql", "scale": 0.7}, {"name": "brand@2", "scale": 0.3}]}),
            Some("sql*0.7+brand@2*0.3"),
        );
        check(json!({"model": "org/base", "adapter": ["sql", {"name": "b", "generation": 3}]}), Some("sql*1+b@3*1"));
        check(json!({"adapter": []}), None);
        check(json!({"lora": [{"id": 0, "scale": 0.5}, {"name": "b", "scale": 0}]}), Some("#0*0.5+b*0"));
        check(json!({"model": "sql", "lora": []}), Some("sql"));
        check(json!({"merged_adapters": {"ids": ["a", "b"], "weights": [0.5, 2]}}), Some("a*0.5+b*2"));
        let merged = json!({"ids": ["a"], "weights": [1], "merge_strategy": "linear", "density": 0.2});
        check(json!({"merged_adapters": merged}), Some("a"));
    }

    #[test]
    fn strengths_and_lists_that_mean_nothing_are_refused_by_field() {
        let check = |body: &str, param: &str| {
            let error = Selector::parse(&mut Fields::parse(body.as_bytes()).unwrap(), "org/base").unwrap_err();
            assert_eq!((error.status, error.param.as_deref()), (StatusCode::BAD_REQUEST, Some(param)), "{body}");
        };
        check(r#"{"adapter": {"name": "a", "scale": 1e9}}"#, "adapter.scale");
        check(r#"{"adapter": {"name": "a", "scale": 1e39}}"#, "adapter.scale");
        check(r#"{"adapter": {"name": "a", "scale": "x"}}"#, "adapter.scale");
        check(r#"{"adapter": [{"name": "a"}, {"name": "b", "scale": -101}]}"#, "adapter[1].scale");
        check(r#"{"adapter": [{"name": "a"}, {"scale": 1}]}"#, "adapter[1]");
        check(r#"{"adapter": [{"name": "a"}, null]}"#, "adapter[1]");
        check(r#"{"adapter": {"name": "a", "weight": 1}}"#, "adapter.weight");
        check(r#"{"adapter": {"name": "a@1", "generation": 2}}"#, "adapter");
        check(r#"{"model": "a", "adapter": ["a", "b"]}"#, "adapter");
        check(r#"{"adapter": ["a", "b"], "lora": [{"id": 0, "scale": 1}]}"#, "lora");
        check(r#"{"model": "a", "lora": [{"id": 0, "scale": 1}]}"#, "lora");
        check(r#"{"lora": [{"id": 0, "scale": 1e9}]}"#, "lora[0].scale");
        check(r#"{"lora": [{"scale": 1}]}"#, "lora[0]");
        check(r#"{"lora": [{"id": -1, "scale": 1}]}"#, "lora[0].id");
        check(r#"{"merged_adapters": {"ids": ["a", "b"], "weights": [1]}}"#, "merged_adapters.weights");
        check(r#"{"merged_adapters": {"ids": [], "weights": []}}"#, "merged_adapters.ids");
        check(r#"{"merged_adapters": {"ids": ["a"], "weights": [1e9]}}"#, "merged_adapters.weights[0]");
        let ties = r#"{"merged_adapters": {"ids": ["a"], "weights": [1], "merge_strategy": "ties"}}"#;
        check(ties, "merged_adapters.merge_strategy");
        check(r#"{"model": "a", "merged_adapters": {"ids": ["b"], "weights": [1]}}"#, "merged_adapters");
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
        check(json!({"lora_request": {"lora_name": "x"}}), "lora_request");
    }
}
