//! Which modules a config means. The rules are PEFT's (0.21, `tuners_utils.check_target_module_exists`,
//! `other.get_pattern_key`, `other._set_trainable`).

use std::collections::HashSet;

use fancy_regex::{Regex, RegexBuilder};
use serde_json::Value;

use super::config::{as_strings, field_error, wrong_type};
use super::{AdapterError, Site, SiteKind, config::Config};

// The bounds keep a hostile config to seconds and to some hundred megabytes; real ones stay far below.
/// Most regular expressions in one field. Some tools write one for each module.
const PATTERNS_MAX: usize = 1024;
/// Most steps one match may take.
const BACKTRACK_MAX: usize = 10_000;
/// Most bytes one compiled expression may take.
const REGEX_BYTES_MAX: usize = 256 << 10;

/// A field that names modules.
pub(super) enum Names {
    /// The field is absent or empty.
    Unset,
    /// The word `all-linear`: every linear but the output head.
    AllLinear,
    /// A regular expression for the whole path.
    Pattern(Box<Regex>),
    /// Whole paths, or endings of paths that begin behind a dot.
    List(HashSet<String>),
}

/// Decides whether a module is adapted.
pub(super) struct Matcher {
    /// Name of the field that names the modules.
    pub(super) field: &'static str,
    names: Names,
    exclude: Names,
    saved: Vec<Regex>,
    layers: Option<Layers>,
}

/// `layers_to_transform` and `layers_pattern`.
struct Layers {
    indexes: HashSet<u64>,
    patterns: Vec<Regex>,
}

/// A field such as `rank_pattern`: the first expression that matches the end of a path decides.
pub(super) struct Patterns {
    field: &'static str,
    entries: Vec<(Regex, Value)>,
}

impl Names {
    fn parse(config: &Config, field: &'static str) -> Result<Self, AdapterError> {
        match config.get(field) {
            None => Ok(Self::Unset),
            Some(Value::String(text)) if text.is_empty() => Ok(Self::Unset),
            Some(Value::String(text)) if text.eq_ignore_ascii_case("all-linear") => Ok(Self::AllLinear),
            Some(Value::String(text)) => Ok(Self::Pattern(Box::new(regex(field, &format!(r"\A(?:{text})\z"))?))),
            Some(Value::Array(items)) if items.is_empty() => Ok(Self::Unset),
            Some(value) => Ok(Self::List(as_strings(field, value)?.into_iter().collect())),
        }
    }

    fn matches(&self, field: &str, site: &Site) -> Result<bool, AdapterError> {
        match self {
            Self::Unset => Ok(false),
            Self::AllLinear => Ok(matches!(site.kind, SiteKind::Linear { output_head: false, .. })),
            Self::Pattern(pattern) => is_match(field, pattern, &site.path),
            Self::List(names) => Ok(endings(&site.path).any(|ending| names.contains(ending))),
        }
    }

    /// Whether the whole path is in the list.
    fn have(&self, path: &str) -> bool {
        matches!(self, Self::List(names) if names.contains(path))
    }
}

impl Matcher {
    /// Reads `field` and the fields that narrow it.
    pub(super) fn parse(config: &Config, field: &'static str) -> Result<Self, AdapterError> {
        let names = Names::parse(config, field)?;
        let exclude = Names::parse(config, "exclude_modules")?;
        if matches!(exclude, Names::AllLinear) {
            return Err(field_error("exclude_modules", "`all-linear` leaves nothing to adapt"));
        }
        let layers = Layers::parse(config)?;
        if layers.is_some() && matches!(names, Names::Pattern(_)) {
            return Err(field_error("layers_to_transform", format!("needs a list in `{field}`, found a pattern")));
        }
        let saved = modules_to_save(config)?;
        let saved = saved.iter().map(|name| regex("modules_to_save", &format!(r"\A(?:|.*\.)(?:{name})(?:\z|\.)")));
        Ok(Self { field, names, exclude, saved: saved.collect::<Result<_, _>>()?, layers })
    }

    /// Whether the field is absent or empty.
    pub(super) fn is_unset(&self) -> bool {
        matches!(self.names, Names::Unset)
    }

    /// Whether the config means this module.
    pub(super) fn matches(&self, site: &Site) -> Result<bool, AdapterError> {
        if !self.names.matches(self.field, site)? || self.exclude.matches("exclude_modules", site)? {
            return Ok(false);
        }
        for saved in &self.saved {
            if is_match("modules_to_save", saved, &site.path)? {
                return Ok(false);
            }
        }
        match &self.layers {
            // What is named by its whole path is meant in whatever layer it is.
            Some(layers) if !self.names.have(&site.path) => layers.matches(&site.path),
            Some(_) | None => Ok(true),
        }
    }

    /// Entries of a list that are the ending of none of these paths, in alphabetical order.
    pub(super) fn idle_names<'a>(&'a self, paths: &[&str]) -> Vec<&'a str> {
        let Names::List(names) = &self.names else { return Vec::new() };
        let used: HashSet<&str> = paths.iter().flat_map(|path| endings(path)).collect();
        let mut idle: Vec<&str> = names.iter().map(String::as_str).filter(|name| !used.contains(name)).collect();
        idle.sort_unstable();
        idle
    }
}

impl Layers {
    fn parse(config: &Config) -> Result<Option<Self>, AdapterError> {
        let field = "layers_to_transform";
        let index = |value: &Value| value.as_u64().ok_or_else(|| wrong_type(field, "a layer number", value));
        let indexes: HashSet<u64> = match config.get(field) {
            None => return Ok(None),
            Some(Value::Array(items)) if items.is_empty() => return Ok(None),
            Some(Value::Array(items)) => items.iter().map(index).collect::<Result<_, _>>()?,
            Some(value) => HashSet::from([index(value)?]),
        };
        let field = "layers_pattern";
        let names = match config.get(field) {
            None => Vec::new(),
            Some(Value::String(text)) if text.is_empty() => Vec::new(),
            Some(Value::String(text)) => vec![text.clone()],
            Some(value) => as_strings(field, value)?,
        };
        check_count(field, names.len())?;
        let patterns = if names.is_empty() {
            vec![regex(field, r"\A.*?\.[^.]*\.(\d+)\.")?]
        } else {
            let pattern = |name: &String| regex(field, &format!(r"\A(?:|.*?\.)(?:{name})\.(?<idx>\d+)\."));
            names.iter().map(pattern).collect::<Result<_, _>>()?
        };
        Ok(Some(Self { indexes, patterns }))
    }

    fn matches(&self, path: &str) -> Result<bool, AdapterError> {
        for pattern in &self.patterns {
            let captures = pattern.captures(path).map_err(|error| too_hard("layers_pattern", &error))?;
            let Some(captures) = captures else { continue };
            let idx = captures.name("idx").or_else(|| captures.get(1));
            let idx = idx.and_then(|digits| digits.as_str().parse().ok());
            return Ok(idx.is_some_and(|idx: u64| self.indexes.contains(&idx)));
        }
        Ok(false)
    }
}

impl Patterns {
    /// Reads a field that maps expressions to values; an expression matches the end of a path.
    pub(super) fn parse(config: &Config, field: &'static str) -> Result<Self, AdapterError> {
        Self::parse_as(config, field, |key| format!(r"\A(?:.*\.)?(?:{key})\z"))
    }

    /// The same where an expression of the config stands for another one.
    pub(super) fn parse_as(
        config: &Config,
        field: &'static str,
        expression: impl Fn(&str) -> String,
    ) -> Result<Self, AdapterError> {
        let entries = config.entries(field)?;
        if entries.len() > PATTERNS_MAX {
            return Err(field_error(
                field,
                format!("expected at most {PATTERNS_MAX} entries, found {}", entries.len()),
            ));
        }
        let compile = |(key, value): (&String, &Value)| Ok((regex(field, &expression(key))?, value.clone()));
        Ok(Self { field, entries: entries.into_iter().map(compile).collect::<Result<_, AdapterError>>()? })
    }

    /// The value for a module, if any expression matches its path.
    pub(super) fn get(&self, path: &str) -> Result<Option<&Value>, AdapterError> {
        for (pattern, value) in &self.entries {
            if is_match(self.field, pattern, path)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }
}

/// A field that names modules by any ending of their path, even within a word, or by an expression for the whole path.
pub(super) enum Endings {
    /// Endings; none when the field is absent.
    List(Vec<String>),
    /// An expression for the whole path.
    Pattern(&'static str, Box<Regex>),
}

/// Reads a field whose entries match any ending of a path.
pub(super) fn any_ending(config: &Config, field: &'static str) -> Result<Endings, AdapterError> {
    Ok(match config.get(field) {
        None => Endings::List(Vec::new()),
        Some(Value::String(text)) => Endings::Pattern(field, Box::new(regex(field, &format!(r"\A(?:{text})\z"))?)),
        Some(value) => Endings::List(as_strings(field, value)?),
    })
}

impl Endings {
    /// Whether the module at `path` is meant.
    pub(super) fn matches(&self, path: &str) -> Result<bool, AdapterError> {
        match self {
            Self::List(names) => Ok(names.iter().any(|name| path.ends_with(name.as_str()))),
            Self::Pattern(field, pattern) => is_match(field, pattern, path),
        }
    }
}

/// The names in `modules_to_save`.
pub(super) fn modules_to_save(config: &Config) -> Result<Vec<String>, AdapterError> {
    let field = "modules_to_save";
    let names = config.get(field).map_or(Ok(Vec::new()), |value| as_strings(field, value))?;
    check_count(field, names.len())?;
    match names.iter().find(|name| name.is_empty()) {
        Some(_) => Err(field_error(field, "an entry is empty")),
        None => Ok(names),
    }
}

/// Whether the module at `path`, or one that contains it, is named. Unlike targets these match by any ending of the
/// path: `norm` means `input_layernorm` too.
pub(super) fn is_saved(names: &[String], path: &str) -> bool {
    let containers = path.match_indices('.').map(|(end, _)| &path[..end]).chain([path]);
    containers.into_iter().any(|container| names.iter().any(|name| container.ends_with(name.as_str())))
}

/// The path, and its endings that begin behind a dot.
fn endings(path: &str) -> impl Iterator<Item = &str> {
    std::iter::once(path).chain(path.match_indices('.').map(|(dot, _)| &path[dot + 1..]))
}

fn check_count(field: &str, count: usize) -> Result<(), AdapterError> {
    if count > PATTERNS_MAX {
        return Err(field_error(field, format!("expected at most {PATTERNS_MAX} entries, found {count}")));
    }
    Ok(())
}

fn regex(field: &str, pattern: &str) -> Result<Regex, AdapterError> {
    RegexBuilder::new(pattern)
        .backtrack_limit(BACKTRACK_MAX)
        .delegate_size_limit(REGEX_BYTES_MAX)
        .build()
        .map_err(|error| field_error(field, format!("is not a regular expression: {error}")))
}

fn is_match(field: &str, pattern: &Regex, path: &str) -> Result<bool, AdapterError> {
    pattern.is_match(path).map_err(|error| too_hard(field, &error))
}

fn too_hard(field: &str, error: &fancy_regex::Error) -> AdapterError {
    field_error(field, format!("the regular expression cannot be evaluated: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATHS: [&str; 6] = [
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.input_layernorm",
        "lm_head",
    ];

    fn site(path: &str) -> Site {
        let linear = SiteKind::Linear { in_features: 2, out_features: 2, bias: false, output_head: path == "lm_head" };
        let kind = match path.rsplit('.').next() {
            Some("embed_tokens") => SiteKind::Embedding { vocab: 2, dim: 2 },
            Some("input_layernorm") => SiteKind::Norm { dim: 2, bias: false },
            _ => linear,
        };
        Site { path: path.to_owned(), kind }
    }

    #[track_caller]
    fn check(config: &str, expected: &[usize]) {
        let config = Config::parse(config.as_bytes()).unwrap();
        let matcher = Matcher::parse(&config, "target_modules").unwrap();
        let found: Vec<usize> = (0..PATHS.len()).filter(|idx| matcher.matches(&site(PATHS[*idx])).unwrap()).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn lists_match_whole_components_at_the_end() {
        check(r#"{"target_modules": ["q_proj", "head", "model.embed_tokens"]}"#, &[0, 1, 3]);
        check(r#"{"target_modules": ["0.mlp.down_proj", "lm_head"]}"#, &[2, 5]);
        check(r#"{"target_modules": []}"#, &[]);
    }

    #[test]
    fn strings_match_the_whole_path() {
        check(r#"{"target_modules": "model\\.layers\\.\\d+\\.self_attn\\.q_proj|lm"}"#, &[1, 3]);
        check(r#"{"target_modules": ".*proj"}"#, &[1, 2, 3]);
        check(r#"{"target_modules": "(?!.*layers\\.0).*q_proj"}"#, &[3]);
        check(r#"{"target_modules": "All-Linear"}"#, &[1, 2, 3]);
        // Of the shape that fine-tuning tools write.
        let parts = "(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)";
        let names = "(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)";
        let long = format!(
            r"(?:.*?(?:language|text).*?{parts}.*?{names}.*?)|(?:\\bmodel\\.layers\\.[\\d]{{1,}}\\.{parts}\\.(?:{names}))"
        );
        check(&format!(r#"{{"target_modules": "{long}"}}"#), &[1, 2, 3]);
    }

    #[test]
    fn exclusions_and_layers_narrow() {
        check(r#"{"target_modules": ["q_proj", "down_proj"], "exclude_modules": "model.layers.1.*"}"#, &[1, 2]);
        check(r#"{"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["q_proj"]}"#, &[2]);
        check(r#"{"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1}"#, &[3]);
        // Whole paths are not narrowed, `lm_head` among them.
        check(r#"{"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 1}"#, &[3, 5]);
        check(
            r#"{"target_modules": ["down_proj", "model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]}"#,
            &[1],
        );
        check(
            r#"{"target_modules": ["lm_head", "model.layers.0.self_attn.q_proj"], "layers_to_transform": [1],
                "exclude_modules": ["lm_head"]}"#,
            &[1],
        );
        check(r#"{"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]}"#, &[1]);
        check(r#"{"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}"#, &[1, 3]);
        check(r#"{"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["mlp"]}"#, &[1, 3]);
    }

    #[test]
    fn the_first_pattern_in_file_order_decides() {
        let config = br#"{"rank_pattern": {".*\\.1\\..*q_proj": 7, "q_proj": 5, "layers.0.mlp.down_proj": 3}}"#;
        let patterns = Patterns::parse(&Config::parse(config).unwrap(), "rank_pattern").unwrap();
        let found: Vec<Option<u64>> = PATHS.iter().map(|path| patterns.get(path).unwrap()?.as_u64()).collect();
        assert_eq!(found, [None, Some(5), Some(3), Some(7), None, None]);
    }

    #[test]
    fn saved_modules_match_any_ending_and_contain_others() {
        assert!(is_saved(&["norm".to_owned()], "model.layers.1.input_layernorm"));
        assert!(is_saved(&["mlp".to_owned()], "model.layers.0.mlp.down_proj"));
        assert!(!is_saved(&["proj.x".to_owned()], "model.layers.0.mlp.down_proj"));
    }

    #[test]
    fn expensive_expressions_are_refused() {
        let many = format!(r#"{{"layers_to_transform": 1, "layers_pattern": {:?}}}"#, vec!["a"; PATTERNS_MAX + 1]);
        assert!(Matcher::parse(&Config::parse(many.as_bytes()).unwrap(), "target_modules").is_err());
        for pattern in ["(", r"(?:(?:a{999}){999}){999}", r"(?:.*)*(?:.*)*(?=x)(.+)+\\1\\1z"] {
            let config = Config::parse(format!(r#"{{"target_modules": "{pattern}"}}"#).as_bytes()).unwrap();
            let result = Matcher::parse(&config, "target_modules").and_then(|matcher| matcher.matches(&site(PATHS[1])));
            assert!(!matches!(result, Ok(true)), "{pattern}");
        }
    }
}
