//! Finding the model directory.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::{ModelConfig, ModelError};

const DEFAULT_REVISION: &str = "main";

/// Files of a hub repository that the server reads, beside the weights.
pub(super) const FILES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Finds the model directory: a local one as it is, a hub id by downloading it (with a progress bar).
///
/// A hub id is `org/name` in the hub's letters; everything else is a local path and is never looked for elsewhere.
/// When the hub cannot be reached, a copy downloaded earlier serves.
///
/// # Errors
/// When neither exists.
pub fn locate(config: &ModelConfig) -> Result<PathBuf, ModelError> {
    let path = Path::new(&config.path);
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    let not_found = |reason: &str| Err(ModelError::NotFound { path: config.path.clone(), reason: reason.to_owned() });
    if path.exists() {
        return not_found("it is a file; expected a directory with config.json and safetensors files");
    }
    if !is_hub_id(&config.path) {
        return not_found("there is no such directory, and it is not a hub id (org/name)");
    }
    let revision = config.revision.clone().unwrap_or_else(|| DEFAULT_REVISION.to_owned());
    let repo = Repo::with_revision(config.path.clone(), RepoType::Model, revision);
    let failed = |error: &dyn std::fmt::Display| ModelError::Download {
        id: config.path.clone(),
        reason: format!("{error}; there is no local directory of that name either"),
    };
    let mut builder = ApiBuilder::from_env().with_progress(true);
    if let Some(token) = &config.hub_token {
        builder = builder.with_token(Some(token.clone()));
    }
    let api = builder.build().map_err(|error| failed(&error))?;
    download(&api.repo(repo.clone())).or_else(|error| match Cache::from_env().repo(repo).get("config.json") {
        Some(config_file) => {
            tracing::warn!(%error, "the hub does not answer; using the copy downloaded earlier");
            Ok(parent(&config_file))
        }
        None => Err(failed(&error)),
    })
}

fn download(repo: &ApiRepo) -> Result<PathBuf, hf_hub::api::sync::ApiError> {
    let files: Vec<String> = repo.info()?.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
    let single = files.iter().any(|file| file == "model.safetensors");
    for file in &files {
        let weights = match single {
            true => file == "model.safetensors",
            false => file == "model.safetensors.index.json" || (is_shard(file)),
        };
        if weights || FILES.contains(&file.as_str()) {
            repo.get(file)?;
        }
    }
    Ok(parent(&repo.get("config.json")?))
}

/// Whether this is one of `model-00001-of-00003.safetensors`.
fn is_shard(file: &str) -> bool {
    file.starts_with("model-") && file.ends_with(".safetensors") && !file.contains('/')
}

fn parent(file: &Path) -> PathBuf {
    file.parent().map(Path::to_owned).unwrap_or_default()
}

fn is_hub_id(path: &str) -> bool {
    let part = |part: &str| {
        let letters = part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
        letters && part.starts_with(|c: char| c.is_ascii_alphanumeric())
    };
    path.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_org_and_name_make_a_hub_id() {
        for id in ["meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-0.5B", "0x/y_z"] {
            assert!(is_hub_id(id), "{id}");
        }
        for path in ["./x", "/x", "../x", "x", "sample-model", "~/x", "a/b/c", "a\\b", "a/", "/a", "a/.b", ""] {
            assert!(!is_hub_id(path), "{path}");
        }
    }

    #[test]
    fn a_missing_path_is_an_error_that_names_it() {
        let config = ModelConfig { path: "./no/such/model".to_owned(), ..ModelConfig::default() };
        insta::assert_snapshot!(locate(&config).unwrap_err(), @"model ./no/such/model: there is no such directory, and it is not a hub id (org/name)");
    }
}
