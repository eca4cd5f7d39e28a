//! Ranges and relations that the sections' types do not express.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use super::layers::Entries;
use super::{Config, ConfigError, Origin};
use crate::engine::EngineConfigError;

/// Checks every bound; the first broken one is the error.
pub(super) fn validate(config: &Config, entries: &Entries) -> Result<(), ConfigError> {
    let broken = server(config).or_else(|| model(config)).or_else(|| engine(config)).or_else(|| rest(config));
    let Some((section, key, reason)) = broken else { return Ok(()) };
    let origin = entries.get(&(section, key)).map_or(Origin::Default, |(_, origin)| origin.clone());
    Err(ConfigError::Value { origin, key: format!("{section}.{key}"), reason })
}

/// A broken bound: section, key, what was expected and found.
type Broken = Option<(&'static str, &'static str, String)>;

fn empty(section: &'static str, key: &'static str, value: &Option<String>) -> Broken {
    (value.as_deref().map(str::trim) == Some("")).then(|| (section, key, "a key must not be empty".to_owned()))
}

fn server(config: &Config) -> Broken {
    let s = &config.server;
    (s.host.trim().is_empty().then(|| ("server", "host", "expected an address".to_owned())))
        .or_else(|| empty("server", "api_key", &s.api_key))
        .or_else(|| empty("server", "admin_key", &s.admin_key))
        .or_else(|| at_least("server", "body_bytes_max", s.body_bytes_max, 1024))
        .or_else(|| at_least("server", "request_timeout_s", s.request_timeout_s, 1))
        .or_else(|| at_least("server", "sequences_per_request_max", s.sequences_per_request_max, 1))
        .or_else(|| at_most("server", "logprobs_max", s.logprobs_max, 1000))
}

fn model(config: &Config) -> Broken {
    let m = &config.model;
    (m.path.trim().is_empty().then(|| ("model", "path", "expected a directory or a hub id".to_owned())))
        .or_else(|| {
            let empty = m.served_name.as_deref().map(str::trim) == Some("");
            empty.then(|| ("model", "served_name", "expected a name".to_owned()))
        })
        .or_else(|| empty("model", "hub_token", &m.hub_token))
        .or_else(|| m.context_tokens_max.and_then(|n| at_least("model", "context_tokens_max", n, 1)))
}

fn engine(config: &Config) -> Broken {
    let e = &config.engine;
    let broken = e.check().err().map(|error| match error {
        EngineConfigError::Zero { field } => ("engine", field, "expected at least 1, found 0".to_owned()),
        EngineConfigError::StepTooSmall { step_tokens_max, sequences_max } => (
            "engine",
            "step_tokens_max",
            format!("expected at least engine.sequences_max ({sequences_max}), found {step_tokens_max}"),
        ),
    });
    broken
        .or_else(|| at_most("engine", "sequences_max", e.sequences_max, 65_536))
        .or_else(|| e.step_tokens_max.and_then(|n| at_most("engine", "step_tokens_max", n, 1 << 20)))
        .or_else(|| at_most("engine", "block_tokens", e.block_tokens, 1024))
}

fn rest(config: &Config) -> Broken {
    let a = &config.adapters;
    (a.root.as_os_str().is_empty().then(|| ("adapters", "root", "expected a directory".to_owned())))
        .or_else(|| at_least("adapters", "upload_bytes_max", a.upload_bytes_max, 1))
        .or_else(|| at_least("adapters", "loads_max", a.loads_max, 1))
        .or_else(|| at_most("metrics", "labelled_adapters_max", config.metrics.labelled_adapters_max, 100_000))
        .or_else(|| log_level(&config.log.level).map(|reason| ("log", "level", reason)))
}

/// What is wrong with log directives. The filter's own parser takes a misspelt level for the name of a module.
fn log_level(directives: &str) -> Option<String> {
    let bare =
        directives.split(',').map(str::trim).find(|d| !d.contains(['=', '[']) && d.parse::<LevelFilter>().is_err());
    match bare {
        Some(directive) => {
            Some(format!("expected error, warn, info, debug, trace or module=level, found `{directive}`"))
        }
        None => EnvFilter::try_new(directives).err().map(|e| e.to_string()),
    }
}

fn at_least<T: Copy + PartialOrd + std::fmt::Display>(
    section: &'static str,
    key: &'static str,
    found: T,
    min: T,
) -> Broken {
    (found < min).then(|| (section, key, format!("expected at least {min}, found {found}")))
}

fn at_most<T: Copy + PartialOrd + std::fmt::Display>(
    section: &'static str,
    key: &'static str,
    found: T,
    max: T,
) -> Broken {
    (found > max).then(|| (section, key, format!("expected at most {max}, found {found}")))
}

#[cfg(test)]
mod tests {
    use crate::config::{Setting, Sources};

    fn check(key: &str, text: &str, expected: &str) {
        let flags = vec![Setting { flag: "--set", key: key.to_owned(), text: text.to_owned() }];
        let error = Sources { flags, ..Sources::default() }.resolve().expect_err(key);
        assert_eq!(error.to_string(), format!("flag --set: `{key}`: {expected}"));
    }

    #[test]
    fn values_out_of_range_are_refused_by_key() {
        check("engine.sequences_max", "0", "expected at least 1, found 0");
        check("engine.block_tokens", "4096", "expected at most 1024, found 4096");
        check("engine.step_tokens_max", "8", "expected at least engine.sequences_max (64), found 8");
        check("server.body_bytes_max", "1000", "expected at least 1024, found 1000");
        check("server.request_timeout_s", "0", "expected at least 1, found 0");
        check("model.context_tokens_max", "0", "expected at least 1, found 0");
        check("model.path", "", "expected a directory or a hub id");
        check("adapters.loads_max", "0", "expected at least 1, found 0");
    }

    #[test]
    fn an_empty_key_is_not_an_open_door() {
        check("server.api_key", "", "a key must not be empty");
        check("server.admin_key", " ", "a key must not be empty");
    }

    #[test]
    fn log_directives_are_checked() {
        check("log.level", "deubg", "expected error, warn, info, debug, trace or module=level, found `deubg`");
        let flags = vec![Setting { flag: "", key: "log.level".into(), text: "patchbay=loud".into() }];
        assert!(Sources { flags, ..Sources::default() }.resolve().is_err());
        let flags = vec![Setting { flag: "", key: "log.level".into(), text: "info,patchbay::engine=debug".into() }];
        assert!(Sources { flags, ..Sources::default() }.resolve().is_ok());
    }
}
