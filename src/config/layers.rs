//! Laying file, environment and flags over the defaults.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use super::keys::{self, SECTIONS, Section};
use super::{Config, ConfigError, DEFAULT_TOML, Origin, Resolved, validate};

/// Effective values by (section, key), with where they came from. Keys that are not set are absent.
pub(super) type Entries = BTreeMap<(&'static str, &'static str), (Value, Origin)>;

const PREFIX: &str = "PATCHBAY_";

/// Variables that start with our prefix but are no settings: the file's path and the client commands' address; and what
/// tests read.
const NOT_SETTINGS: &[&str] = &["CONFIG", "URL", "TEST_"];

/// Variables of other programs that are read too: the setting that each gives. Empty ones are as good as not set, and our
/// own name for the setting counts more.
const FOREIGN: &[(&str, &str)] = &[("HF_TOKEN", "model.hub_token")];

/// One value given as text, by a flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The flag, for messages.
    pub flag: &'static str,
    /// `section.key`.
    pub key: String,
    /// The value: as in TOML, or bare text, a size such as `256MiB`, or a list separated by commas.
    pub text: String,
}

/// Everything that settings are read from, beside the defaults.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// A TOML file.
    pub file: Option<PathBuf>,
    /// Variables, from [`environment`].
    pub environment: Vec<(String, String)>,
    /// Flags, in the order given; the last one for a key counts.
    pub flags: Vec<Setting>,
}

/// The process's variables that start with `PATCHBAY_`, and the few of other programs that are read.
///
/// # Errors
/// When one of them is not UTF-8.
pub fn environment() -> Result<Vec<(String, String)>, ConfigError> {
    let mut variables = Vec::new();
    for (name, value) in std::env::vars_os() {
        let is_read = |name: &&str| name.starts_with(PREFIX) || foreign(name).is_some();
        let Some(name) = name.to_str().filter(is_read) else { continue };
        let value = value.into_string().map_err(|_| ConfigError::Value {
            origin: Origin::Environment(name.to_owned()),
            key: name.to_owned(),
            reason: "the value is not UTF-8".to_owned(),
        })?;
        variables.push((name.to_owned(), value));
    }
    variables.sort();
    Ok(variables)
}

impl Sources {
    /// The effective settings: default < file < environment < flags, checked.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn resolve(self) -> Result<Resolved, ConfigError> {
        let mut entries = Entries::new();
        let defaults: Table = toml::from_str(DEFAULT_TOML).expect("config/default.toml is tested");
        lay_table(&mut entries, defaults, &Origin::Default)?;
        if let Some(path) = &self.file {
            lay_table(&mut entries, read(path)?, &Origin::File(path.clone()))?;
        }
        for (variable, text) in &self.environment {
            if let Some(key) = foreign(variable) {
                lay_foreign(&mut entries, variable, key, text)?;
            }
        }
        for (variable, text) in self.environment.iter().filter(|(variable, _)| foreign(variable).is_none()) {
            let rest = variable.strip_prefix(PREFIX).unwrap_or(variable);
            let is_ours =
                NOT_SETTINGS.iter().any(|name| rest == *name || (name.ends_with('_') && rest.starts_with(name)));
            if !is_ours && !is_of_a_service(variable, text) {
                lay_variable(&mut entries, variable, text)?;
            }
        }
        for setting in &self.flags {
            lay_flag(&mut entries, setting)?;
        }
        let config = build(&entries);
        validate::validate(&config, &entries)?;
        Ok(Resolved { config, entries })
    }
}

/// The setting that a variable of another program gives.
fn foreign(variable: &str) -> Option<&'static str> {
    FOREIGN.iter().find(|(name, _)| *name == variable).map(|(_, key)| *key)
}

fn lay_foreign(entries: &mut Entries, variable: &str, key: &'static str, text: &str) -> Result<(), ConfigError> {
    if text.trim().is_empty() {
        return Ok(());
    }
    let origin = Origin::Environment(variable.to_owned());
    let (name, key) = key.split_once('.').expect("section.key");
    let section = keys::find(name).expect("the section exists");
    let key = find_key(section, key, &origin, "variable", variable)?;
    let value = parse_text(section, key, text, &origin)?;
    entries.insert((section.name, key), (value, origin));
    Ok(())
}

/// Whether Kubernetes sets the variable for a service that is called `patchbay` or `patchbay-...`: `X_SERVICE_HOST`,
/// `X_SERVICE_PORT_HTTP`, `X_PORT_8000_TCP_ADDR`, and `X_PORT` with a URL in it, which `server.port` never has.
fn is_of_a_service(variable: &str, text: &str) -> bool {
    const PROTOCOLS: [&str; 3] = ["tcp", "udp", "sctp"];
    let is_protocol = |word: &str| PROTOCOLS.iter().any(|protocol| word.eq_ignore_ascii_case(protocol));
    let is_number = |word: &str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit());
    let words: Vec<&str> = variable.split('_').collect();
    variable.ends_with("_SERVICE_HOST")
        || variable.ends_with("_SERVICE_PORT")
        || variable.contains("_SERVICE_PORT_")
        || words.windows(3).any(|words| words[0] == "PORT" && is_number(words[1]) && is_protocol(words[2]))
        || (variable.ends_with("_PORT") && text.split_once("://").is_some_and(|(protocol, _)| is_protocol(protocol)))
}

fn read(path: &Path) -> Result<Table, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    toml::from_str(&text).map_err(|e| {
        let end = e.span().map_or(0, |span| span.start).min(text.len());
        let line = text.as_bytes()[..end].iter().filter(|b| **b == b'\n').count() + 1;
        ConfigError::Syntax { path: path.to_owned(), line, reason: e.message().to_owned() }
    })
}

fn lay_table(entries: &mut Entries, table: Table, origin: &Origin) -> Result<(), ConfigError> {
    for (name, value) in table {
        let section = keys::find(&name).ok_or_else(|| unknown_section(origin, &name))?;
        let Value::Table(values) = value else {
            return Err(ConfigError::Value {
                origin: origin.clone(),
                key: name,
                reason: "expected a section with keys".to_owned(),
            });
        };
        for (key, value) in values {
            let key = find_key(section, &key, origin, "key", &key)?;
            let value = match &value {
                Value::String(text) if keys::is_bytes(key) => parse_bytes(text).unwrap_or(value),
                _ => value,
            };
            accept(section, key, value.clone(), origin)?;
            entries.insert((section.name, key), (value, origin.clone()));
        }
    }
    Ok(())
}

fn lay_variable(entries: &mut Entries, variable: &str, text: &str) -> Result<(), ConfigError> {
    let origin = Origin::Environment(variable.to_owned());
    let path = variable.strip_prefix(PREFIX).unwrap_or(variable).to_lowercase();
    let found = path.split_once('_').and_then(|(name, key)| Some((keys::find(name)?, key)));
    let Some((section, key)) = found else {
        let known: Vec<_> = all_variables().collect();
        let hint = hint(keys::nearest(variable, known.iter().map(String::as_str)));
        return Err(ConfigError::Unknown { origin, what: "variable", found: variable.to_owned(), hint });
    };
    let key = find_key(section, key, &origin, "variable", variable)?;
    let value = parse_text(section, key, text, &origin)?;
    entries.insert((section.name, key), (value, origin));
    Ok(())
}

fn lay_flag(entries: &mut Entries, setting: &Setting) -> Result<(), ConfigError> {
    let origin = Origin::Flag(setting.flag);
    let Some((name, key)) = setting.key.split_once('.') else {
        return Err(ConfigError::Value {
            origin,
            key: setting.key.clone(),
            reason: "expected section.key=value".to_owned(),
        });
    };
    let section = keys::find(name).ok_or_else(|| unknown_section(&origin, name))?;
    let key = find_key(section, key, &origin, "key", &setting.key)?;
    let value = parse_text(section, key, &setting.text, &origin)?;
    entries.insert((section.name, key), (value, origin));
    Ok(())
}

/// The section's own spelling of `key`. `what` and `written` describe in the message what the user wrote.
fn find_key(
    section: &Section,
    key: &str,
    origin: &Origin,
    what: &'static str,
    written: &str,
) -> Result<&'static str, ConfigError> {
    let known = (section.keys)();
    if let Some(found) = known.iter().find(|known| **known == key) {
        return Ok(found);
    }
    let nearest = keys::nearest(key, known.iter().copied());
    let hint = match what {
        "variable" => hint(nearest.map(|key| variable_of(section.name, key)).as_deref()),
        _ => hint(nearest.map(|key| format!("{}.{key}", section.name)).as_deref()),
    };
    let found = if written.contains('.') || what == "variable" {
        written.to_owned()
    } else {
        format!("{}.{written}", section.name)
    };
    Err(ConfigError::Unknown { origin: origin.clone(), what, found, hint })
}

fn unknown_section(origin: &Origin, name: &str) -> ConfigError {
    let hint = match keys::nearest(name, SECTIONS.iter().map(|s| s.name)) {
        Some(nearest) => hint(Some(nearest)),
        None => format!("; sections are {}", SECTIONS.iter().map(|s| s.name).collect::<Vec<_>>().join(", ")),
    };
    ConfigError::Unknown { origin: origin.clone(), what: "section", found: name.to_owned(), hint }
}

fn hint(nearest: Option<&str>) -> String {
    nearest.map_or_else(|| "; `patchbay config` prints all keys".to_owned(), |name| format!("; did you mean `{name}`?"))
}

fn variable_of(section: &str, key: &str) -> String {
    format!("{PREFIX}{section}_{key}").to_uppercase()
}

fn all_variables() -> impl Iterator<Item = String> {
    SECTIONS.iter().flat_map(|section| (section.keys)().iter().map(|key| variable_of(section.name, key)))
}

/// Checks one value against the section's type. The reason of a refusal never shows a secret.
fn accept(section: &Section, key: &'static str, value: Value, origin: &Origin) -> Result<(), ConfigError> {
    let table = Table::from_iter([(key.to_owned(), value)]);
    (section.accepts)(table).map_err(|reason| ConfigError::Value {
        origin: origin.clone(),
        key: format!("{}.{key}", section.name),
        reason: if keys::is_secret(key) { "expected a string".to_owned() } else { reason },
    })
}

/// The first reading of `text` that the section's type takes: bare text, a size, TOML, a list separated by commas.
fn parse_text(section: &Section, key: &'static str, text: &str, origin: &Origin) -> Result<Value, ConfigError> {
    let bare = Value::String(text.to_owned());
    let bytes = keys::is_bytes(key).then(|| parse_bytes(text)).flatten();
    let toml = toml::from_str::<Table>(&format!("value = {text}"))
        .ok()
        .filter(|table| table.len() == 1)
        .and_then(|mut table| table.remove("value"));
    let list = text.split(',').map(str::trim).filter(|item| !item.is_empty());
    let list = Value::Array(list.map(|item| Value::String(item.to_owned())).collect());
    let mut refusal = None;
    for value in [Some(bare), bytes, toml, Some(list)].into_iter().flatten() {
        match accept(section, key, value.clone(), origin) {
            Ok(()) => return Ok(value),
            Err(e) => refusal.get_or_insert(e),
        };
    }
    Err(refusal.expect("bare text was tried"))
}

/// `1536`, `512KiB`, `256 MiB`, `2GiB`, `1TiB`; also decimal `kB`, `MB`, `GB`, `TB`.
fn parse_bytes(text: &str) -> Option<Value> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '_').unwrap_or(text.len());
    let number: i64 = text[..digits].replace('_', "").parse().ok()?;
    let unit: i64 = match text[digits..].trim() {
        "" | "B" => 1,
        "kB" | "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return None,
    };
    number.checked_mul(unit).map(Value::Integer)
}

fn build(entries: &Entries) -> Config {
    let mut table = Table::new();
    for ((section, key), (value, _)) in entries {
        let section = table.entry(*section).or_insert_with(|| Value::Table(Table::new()));
        let Value::Table(section) = section else { unreachable!("sections are inserted as tables") };
        section.insert((*key).to_owned(), value.clone());
    }
    Config::deserialize(Value::Table(table)).expect("each value was accepted by its section")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(variables: &[(&str, &str)]) -> Sources {
        let environment = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Sources { environment, ..Sources::default() }
    }

    fn flag(key: &str, text: &str) -> Setting {
        Setting { flag: "--set", key: key.to_owned(), text: text.to_owned() }
    }

    fn file(text: &str) -> (tempfile::TempDir, Sources) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("patchbay.toml");
        std::fs::write(&path, text).unwrap();
        (dir, Sources { file: Some(path), ..Sources::default() })
    }

    fn message(sources: Sources) -> String {
        sources.resolve().expect_err("refused").to_string()
    }

    #[test]
    fn flags_beat_environment_beats_file() {
        let (_dir, mut sources) = file("[server]\nport = 1\nhost = \"::1\"\nlogprobs_max = 7\n");
        sources.environment = env(&[("PATCHBAY_SERVER_PORT", "2"), ("PATCHBAY_SERVER_HOST", "0.0.0.0")]).environment;
        sources.flags = vec![flag("server.port", "3")];
        let config = sources.resolve().unwrap().config;
        assert_eq!((config.server.port, config.server.logprobs_max), (3, 7));
        assert_eq!(config.server.host, "0.0.0.0");
    }

    #[test]
    fn the_hubs_own_variable_gives_the_token_unless_ours_does() {
        let token = |variables: &[(&str, &str)]| {
            let environment = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            Sources { environment, ..Sources::default() }.resolve().unwrap().config.model.hub_token
        };
        assert_eq!(token(&[("HF_TOKEN", "hf_1")]).as_deref(), Some("hf_1"));
        assert_eq!(token(&[("PATCHBAY_MODEL_HUB_TOKEN", "2"), ("HF_TOKEN", "1")]).as_deref(), Some("2"));
        assert_eq!(token(&[("HF_TOKEN", " ")]), None);
        assert_eq!(token(&[]), None);
    }

    #[test]
    fn text_is_read_as_the_key_needs_it() {
        let sources = Sources {
            flags: vec![
                flag("engine.kv_cache_bytes", "2GiB"),
                flag("engine.prefix_cache", "false"),
                flag("adapters.preload", "a, b"),
                flag("adapters.extra_roots", "[\"x,y\"]"),
                flag("server.api_key", "1234"),
                flag("model.quant", "q8_0"),
            ],
            ..Sources::default()
        };
        let config = sources.resolve().unwrap().config;
        assert_eq!(config.engine.kv_cache_bytes, 2 << 30);
        assert!(!config.engine.prefix_cache);
        assert_eq!(config.adapters.preload, ["a", "b"]);
        assert_eq!(config.adapters.extra_roots, [PathBuf::from("x,y")]);
        assert_eq!(config.server.api_key.as_deref(), Some("1234"));
        assert_eq!(config.model.quant, Some(crate::model::QuantChoice::Q8_0));
    }

    #[test]
    fn an_unknown_key_in_a_file_is_named_with_a_suggestion() {
        let (dir, sources) = file("[engine]\nsequence_max = 3\n");
        let expected = format!(
            "file {}: unknown key `engine.sequence_max`; did you mean `engine.sequences_max`?",
            dir.path().join("patchbay.toml").display()
        );
        assert_eq!(message(sources), expected);
        let (_dir, sources) = file("[adaptors]\nroot = \"x\"\n");
        assert!(message(sources).ends_with("unknown section `adaptors`; did you mean `adapters`?"));
    }

    #[test]
    fn an_unknown_variable_is_named_with_a_suggestion() {
        assert_eq!(
            message(env(&[("PATCHBAY_SERVER_PROT", "1")])),
            "environment variable PATCHBAY_SERVER_PROT: unknown variable `PATCHBAY_SERVER_PROT`; \
             did you mean `PATCHBAY_SERVER_PORT`?"
        );
        assert!(message(env(&[("PATCHBAY_SEVER_PORT", "1")])).ends_with("did you mean `PATCHBAY_SERVER_PORT`?"));
    }

    #[test]
    fn an_unknown_flag_key_is_named_with_a_suggestion() {
        let set = |key| Sources { flags: vec![flag(key, "1")], ..Sources::default() };
        assert_eq!(
            message(set("engine.blocktokens")),
            "flag --set: unknown key `engine.blocktokens`; did you mean `engine.block_tokens`?"
        );
        assert!(message(set("port")).contains("expected section.key=value"));
    }

    #[test]
    fn variables_of_an_orchestrator_and_of_tests_are_no_settings() {
        let sources = env(&[
            ("PATCHBAY_PORT", "tcp://10.0.0.1:8000"),
            ("PATCHBAY_PORT_8000_TCP_ADDR", "10.0.0.1"),
            ("PATCHBAY_SERVICE_HOST", "10.0.0.1"),
            ("PATCHBAY_SERVICE_PORT", "8000"),
            ("PATCHBAY_SERVICE_PORT_HTTP", "8000"),
            ("PATCHBAY_CANARY_SERVICE_HOST", "10.0.0.1"),
            ("PATCHBAY_CANARY_SERVICE_PORT", "8000"),
            ("PATCHBAY_CANARY_SERVICE_PORT_METRICS", "9000"),
            ("PATCHBAY_CANARY_PORT", "udp://10.0.0.1:53"),
            ("PATCHBAY_CANARY_PORT_53_UDP", "udp://10.0.0.1:53"),
            ("PATCHBAY_CANARY_PORT_9_SCTP_PROTO", "sctp"),
            ("PATCHBAY_PORT_PORT_80_TCP", "tcp://10.0.0.1:80"),
            ("PATCHBAY_SERVER_SERVICE_HOST", "10.0.0.1"),
            ("PATCHBAY_SERVER_PORT", "tcp://10.0.0.1:80"),
            ("PATCHBAY_SERVER_PORT_80_TCP_PORT", "80"),
            ("PATCHBAY_TEST_DEVICE", "cuda"),
            ("PATCHBAY_CONFIG", "x.toml"),
        ]);
        assert_eq!(sources.resolve().unwrap().config, Config::default());
        let others = [
            ("PATCHBAY_PORTAL", "1"),
            ("PATCHBAY_CANARY_PORT", "80"),
            ("PATCHBAY_SERVER_PORT_80", "80"),
            ("PATCHBAY_SERVER_PORT_TCP", "80"),
            ("PATCHBAY_SERVER_SERVICE", "x"),
        ];
        for (variable, text) in others {
            assert!(message(env(&[(variable, text)])).contains(variable), "{variable}");
        }
        assert!(message(env(&[("PATCHBAY_SERVER_PORT", "http://10.0.0.1:80")])).contains("`server.port`"));
    }

    #[test]
    fn a_wrong_type_names_key_and_place_and_shows_no_secret() {
        assert_eq!(
            message(env(&[("PATCHBAY_SERVER_PORT", "many")])),
            "environment variable PATCHBAY_SERVER_PORT: `server.port`: invalid type: string \"many\", expected u16"
        );
        let (_dir, sources) = file("[server]\napi_key = 424242\n");
        let message = message(sources);
        assert!(message.ends_with("`server.api_key`: expected a string") && !message.contains("424242"), "{message}");
    }

    #[test]
    fn broken_toml_names_the_line() {
        let (_dir, sources) = file("[server]\nport = = 1\n");
        assert!(message(sources).contains("patchbay.toml, line 2: "));
    }

    #[test]
    fn text_cannot_smuggle_in_a_second_key() {
        let sources = Sources { flags: vec![flag("server.port", "1\nhost = \"x\"")], ..Sources::default() };
        assert!(message(sources).contains("`server.port`"));
    }

    #[test]
    fn sizes_have_binary_and_decimal_units() {
        for (text, bytes) in [("7", 7), ("1_000", 1000), ("3 KiB", 3072), ("2MB", 2_000_000), ("1TiB", 1 << 40)] {
            assert_eq!(parse_bytes(text), Some(Value::Integer(bytes)), "{text}");
        }
        for text in ["", "x", "1 furlong", "-1", "99999999999TiB"] {
            assert_eq!(parse_bytes(text), None, "{text}");
        }
    }
}
