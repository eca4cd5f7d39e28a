//! Typed settings. Each section belongs to the module that uses it; this module composes them.
//!
//! A value comes from `config/default.toml` (compiled in), a file, an environment variable or a flag; a later one
//! replaces an earlier one. An unknown key is an error that suggests the nearest known one. This is the only module
//! that reads the environment. It opens nothing but the file it is told to, and starts nothing.

mod keys;
mod layers;
mod print;
mod validate;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::engine::EngineConfig;
use crate::metrics::MetricsConfig;
use crate::model::ModelConfig;
use crate::server::ServerConfig;
use crate::store::StoreConfig;

pub use keys::is_secret;
pub use layers::{Setting, Sources, environment};

/// The text of `config/default.toml`: every key with its unit, its default and the effect of raising it.
pub const DEFAULT_TOML: &str = include_str!("../../config/default.toml");

/// All settings of a server.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// HTTP: address, keys, bounds of a request.
    pub server: ServerConfig,
    /// The base model.
    pub model: ModelConfig,
    /// Bounds of the engine.
    pub engine: EngineConfig,
    /// Where adapters lie and how many are held.
    pub adapters: StoreConfig,
    /// Bounds of the metrics.
    pub metrics: MetricsConfig,
    /// What is logged, and how.
    pub log: LogConfig,
}

/// The `[log]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// How log lines look.
    pub format: LogFormat,
    /// Least severe level that is logged, as `level` or `module=level` directives separated by commas.
    pub level: String,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Human on a terminal, JSON otherwise.
    Auto,
    /// One readable line per event.
    Human,
    /// One JSON object per event.
    Json,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Auto, level: "info".to_owned() }
    }
}

/// The effective settings, and where each came from.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The settings.
    pub config: Config,
    entries: layers::Entries,
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `config/default.toml`, compiled in.
    Default,
    /// A configuration file.
    File(PathBuf),
    /// An environment variable.
    Environment(String),
    /// A command-line flag.
    Flag(&'static str),
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Environment(variable) => write!(f, "environment variable {variable}"),
            Self::Flag(flag) => write!(f, "flag {flag}"),
        }
    }
}

/// Why the settings cannot be used. Every message names the key and where it was set; none shows a secret.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("configuration file {path}, line {line}: {reason}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: usize,
        /// Why.
        reason: String,
    },
    /// There is no such section or key.
    #[error("{origin}: unknown {what} `{found}`{hint}")]
    Unknown {
        /// Where it was set.
        origin: Origin,
        /// `section`, `key` or `variable`.
        what: &'static str,
        /// What was written.
        found: String,
        /// The nearest known one, or a list; empty or starting with a semicolon.
        hint: String,
    },
    /// The value has the wrong type or cannot be read.
    #[error("{origin}: `{key}`: {reason}")]
    Value {
        /// Where it was set.
        origin: Origin,
        /// `section.key`.
        key: String,
        /// What is wrong.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::keys::SECTIONS;
    use super::*;

    #[test]
    fn default_toml_holds_the_defaults_of_every_section() {
        let resolved = Sources::default().resolve().expect("the defaults are valid");
        assert_eq!(resolved.config, Config::default());
    }

    #[test]
    fn default_toml_documents_every_key() {
        for section in SECTIONS {
            let start = DEFAULT_TOML.find(&format!("[{}]", section.name)).expect("the section is there");
            let text = &DEFAULT_TOML[start + 1..];
            let text = &text[..text.find("\n[").unwrap_or(text.len())];
            for key in (section.keys)() {
                let line = text.lines().position(|l| l.trim_start_matches("# ").starts_with(&format!("{key} = ")));
                let line = line.unwrap_or_else(|| panic!("config/default.toml lacks {}.{key}", section.name));
                let above = text.lines().nth(line.wrapping_sub(1)).unwrap_or_default();
                assert!(above.starts_with("# "), "{}.{key} has no comment above it", section.name);
            }
        }
    }

    #[test]
    fn every_section_is_in_the_table() {
        let names: Vec<_> = SECTIONS.iter().map(|s| s.name).collect();
        assert_eq!(names, keys::keys_of::<Config>());
    }
}
