//! The tree's own rules: who may import whom, what a module must never contain, how long a file may be.
//!
//! Comments, and for the import rules test modules too, are not looked at. The checker is tested on small bad sources.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Lines a source file may have, test modules not counted.
const FILE_LINES_MAX: usize = 500;

/// What one top-level module may import of the others, and what it must never contain.
struct Rule {
    module: &'static str,
    /// Top-level modules it may name.
    imports: &'static [&'static str],
    /// Paths and identifiers it must not name; `std::fs` also catches `use std::{fs}`, `candle*` any such prefix.
    never: &'static [&'static str],
    /// Whether names of adapter kinds are forbidden, and where.
    kinds: Names,
    /// Whether names of model families are forbidden, and where.
    families: Names,
}

/// Where a list of names is forbidden.
#[derive(Clone, Copy, PartialEq)]
enum Names {
    /// Nowhere.
    Allowed,
    /// As a whole identifier. Parts of identifiers and strings are left alone: they are the wire format's words.
    NotAsIdentifier,
    /// Also as a part of an identifier and in strings.
    Never,
}

const ASYNC: &str = "async";

const RULES: &[Rule] = &[
    Rule {
        module: "lib",
        imports: &[],
        never: &[ASYNC, "std::fs"],
        kinds: Names::NotAsIdentifier,
        families: Names::Never,
    },
    Rule { module: "main", imports: &["cli"], never: &[ASYNC], kinds: Names::Never, families: Names::Never },
    Rule {
        module: "cli",
        imports: &["bench", "app", "config", "server", "engine", "store", "text", "metrics", "model", "adapter"],
        never: &["axum"],
        kinds: Names::Never,
        families: Names::Never,
    },
    Rule {
        module: "bench",
        imports: &["app", "config", "store", "kernels"],
        never: &["axum", "candle*"],
        kinds: Names::Never,
        families: Names::Never,
    },
    Rule {
        module: "app",
        imports: &["config", "server", "engine", "store", "text", "metrics", "model", "adapter"],
        never: &["std::fs"],
        kinds: Names::Never,
        families: Names::Never,
    },
    Rule {
        module: "config",
        imports: &["server", "engine", "store", "metrics", "model"],
        never: &[ASYNC, "axum", "candle*"],
        kinds: Names::Never,
        families: Names::Never,
    },
    Rule {
        module: "server",
        imports: &["engine", "store", "text", "metrics", "model", "adapter"],
        never: &["candle*", "std::fs", "tokio::fs"],
        kinds: Names::NotAsIdentifier,
        families: Names::Never,
    },
    Rule {
        module: "text",
        imports: &[],
        never: &[ASYNC, "axum", "candle*"],
        kinds: Names::Never,
        families: Names::Never,
    },
    Rule {
        module: "store",
        imports: &["adapter", "metrics"],
        never: &["axum"],
        kinds: Names::Never,
        families: Names::Never,
    },
    Rule {
        module: "engine",
        imports: &["model", "adapter", "metrics"],
        never: &[
            ASYNC,
            "await",
            "axum",
            "tokenizers",
            "minijinja",
            "std::fs",
            "std::path",
            "tokio::fs",
            "object_store",
        ],
        kinds: Names::Never,
        families: Names::Never,
    },
    Rule {
        module: "model",
        imports: &["adapter", "kernels"],
        never: &[ASYNC, "axum", "prometheus", "Sequence", "Request", "GenerationRequest", "Metrics"],
        kinds: Names::Never,
        families: Names::Allowed,
    },
    Rule {
        module: "adapter",
        imports: &["kernels"],
        never: &[ASYNC, "axum", "tokio", "std::fs", "std::path", "std::io", "std::net", "object_store", "memmap2"],
        kinds: Names::Allowed,
        families: Names::Never,
    },
    Rule {
        module: "kernels",
        imports: &[],
        never: &[ASYNC, "axum", "tokio", "std::fs", "std::path"],
        kinds: Names::Never,
        families: Names::Never,
    },
    Rule {
        module: "metrics",
        imports: &[],
        never: &[ASYNC, "axum", "candle*", "std::fs"],
        kinds: Names::NotAsIdentifier,
        families: Names::Never,
    },
];

/// Names of adapter kinds, lower case.
const KINDS: &[&str] = &[
    "lora",
    "dora",
    "alora",
    "ssf",
    "bone",
    "miss",
    "cpt",
    "cartridge",
    "multitask",
    "ia3",
    "beft",
    "adalora",
    "loha",
    "lokr",
    "vera",
    "pvera",
    "randlora",
    "delora",
    "gralora",
    "vblora",
    "tinylora",
    "unilora",
    "hra",
    "deft",
    "peanut",
    "hira",
    "glora",
    "osf",
    "svfit",
    "flora",
    "frod",
    "shira",
    "sara",
    "supertuning",
    "c3a",
    "fourierft",
    "waveft",
    "road",
    "oft",
    "boft",
    "bottleneck",
    "arrow",
    "xlora",
];
/// Names of model families, lower case.
const FAMILIES: &[&str] = &["llama", "mistral", "qwen2", "qwen3", "phi3"];

#[test]
fn modules_keep_to_their_layer() {
    let (sources, _) = sources();
    let problems: Vec<_> = sources.iter().flat_map(check).collect();
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn every_top_level_module_has_a_rule() {
    let found: BTreeSet<_> = sources().0.iter().map(|source| source.module().to_owned()).collect();
    let ruled: BTreeSet<_> = RULES.iter().map(|rule| rule.module.to_owned()).collect();
    assert_eq!(found, ruled);
}

#[test]
fn files_are_short() {
    for source in sources().0 {
        let lines = lines_without_tests(&source.text);
        assert!(
            lines <= FILE_LINES_MAX,
            "src/{} has {lines} lines without tests, at most {FILE_LINES_MAX}",
            source.path
        );
    }
}

#[test]
fn no_file_names_a_path_of_one_machine() {
    let mut found = Vec::new();
    for path in text_files(root()) {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for (idx, line) in text.lines().enumerate() {
            if let Some(name) = machine_path(line) {
                found.push(format!("{}:{}: {name}", path.display(), idx + 1));
            }
        }
    }
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

/// One source file below src/.
struct Source {
    /// Path below src/, with `/`.
    path: String,
    text: String,
}

impl Source {
    /// The top-level module the file belongs to.
    fn module(&self) -> &str {
        let first = self.path.split('/').next().unwrap_or_default();
        first.strip_suffix(".rs").unwrap_or(first)
    }

    /// How many `super` lead from the file's module to the crate's root.
    fn depth(&self) -> usize {
        let parts = self.path.split('/').count();
        if self.path.ends_with("/mod.rs") { parts - 1 } else { parts }
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every source file but test modules, and the test modules.
fn sources() -> (Vec<Source>, Vec<Source>) {
    let base = root().join("src");
    let mut paths = Vec::new();
    collect(&base, &mut |path| paths.push(path));
    let all: Vec<Source> = paths
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .map(|path| {
            let below = path.strip_prefix(&base).expect("collected below base");
            let below = below.components().map(|c| c.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/");
            Source { text: fs::read_to_string(&path).expect("sources are UTF-8"), path: below }
        })
        .collect();
    let tests: HashSet<String> = all.iter().flat_map(test_files).collect();
    all.into_iter()
        .partition(|s| !tests.iter().any(|t| s.path == format!("{t}.rs") || s.path.starts_with(&format!("{t}/"))))
}

fn collect(dir: &Path, found: &mut impl FnMut(PathBuf)) {
    let mut entries: Vec<_> = fs::read_dir(dir).expect("a directory").map(|e| e.expect("an entry").path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() { collect(&path, found) } else { found(path) }
    }
}

/// Modules that the file declares as `#[cfg(test)] mod name;`, as paths below src/ without extension.
fn test_files(source: &Source) -> Vec<String> {
    let code = strip(&source.text, Strings::Blank);
    let dir = match source.path.rsplit_once('/') {
        Some((dir, "mod.rs")) => format!("{dir}/"),
        Some((dir, file)) => format!("{dir}/{}/", file.trim_end_matches(".rs")),
        None if ["lib.rs", "main.rs"].contains(&source.path.as_str()) => String::new(),
        None => format!("{}/", source.path.trim_end_matches(".rs")),
    };
    let mut found = Vec::new();
    for (at, attribute) in code.match_indices("#[cfg(test)]") {
        let after = tokens(&code[at + attribute.len()..]);
        let Some(at) = after.iter().take(5).position(|t| t == "mod") else { continue };
        if after.get(at + 2).is_some_and(|t| t == ";") {
            found.push(format!("{dir}{}", after[at + 1]));
        }
    }
    found
}

/// What is wrong with a file, as `file: problem`.
fn check(source: &Source) -> Vec<String> {
    let Some(rule) = RULES.iter().find(|rule| rule.module == source.module()) else {
        return vec![format!("src/{}: the module has no rule in tests/it/tidy.rs", source.path)];
    };
    let code = without_test_modules(&strip(&source.text, Strings::Blank));
    let code_tokens = tokens(&code);
    let mut problems = BTreeSet::new();
    let paths = paths(&code_tokens);
    for path in &paths {
        if let Some(module) = module_named(path, source.depth())
            && module != rule.module
            && RULES.iter().any(|r| r.module == module)
            && !rule.imports.contains(&module)
        {
            problems.insert(format!("{} must not import {module}", rule.module));
        }
        for never in rule.never {
            if names_path(path, never) {
                problems.insert(format!("{} must not contain {never}", rule.module));
            }
        }
    }
    let with_strings = tokens(&without_test_modules(&strip(&source.text, Strings::Keep)));
    for (names, place) in [(KINDS, rule.kinds), (FAMILIES, rule.families)] {
        let among = if place == Names::Never { &with_strings } else { &code_tokens };
        for token in among.iter().filter(|_| place != Names::Allowed) {
            if let Some(name) = names.iter().find(|name| is_named(token, name, place)) {
                problems.insert(format!("{} must not name {name} ({token})", rule.module));
            }
        }
    }
    problems.into_iter().map(|problem| format!("src/{}: {problem}", source.path)).collect()
}

/// The top-level module a path names, when it starts at the crate's root.
fn module_named(path: &[String], depth: usize) -> Option<&str> {
    let after = match path.first()?.as_str() {
        "crate" | "patchbay" => 1,
        "super" => path.iter().take_while(|part| *part == "super").count(),
        _ => return None,
    };
    let climbs = path[0] != "super" || after >= depth;
    path.get(after).filter(|_| climbs).map(String::as_str)
}

fn names_path(path: &[String], never: &str) -> bool {
    if let Some(prefix) = never.strip_suffix('*') {
        return path.iter().any(|part| part.starts_with(prefix));
    }
    let never: Vec<_> = never.split("::").collect();
    path.windows(never.len()).any(|window| window.iter().zip(&never).all(|(a, b)| a == b))
}

fn is_named(token: &str, name: &str, place: Names) -> bool {
    if token.eq_ignore_ascii_case(name) {
        return true;
    }
    // "miss" is an English word that caches need; only the bare word is a kind.
    place == Names::Never && name != "miss" && parts(token).contains(&name.to_owned())
}

/// The words of an identifier, lower case: `LoadLora` and `load_lora` are `load`, `lora`.
fn parts(identifier: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut previous = '_';
    for c in identifier.chars() {
        if c == '_' || (c.is_uppercase() && !previous.is_uppercase()) {
            parts.push(String::new());
        }
        if c != '_' {
            parts.last_mut().expect("never empty").extend(c.to_lowercase());
        }
        previous = c;
    }
    parts
}

/// Whether [`strip`] keeps the contents of strings.
#[derive(Clone, Copy, PartialEq)]
enum Strings {
    Keep,
    Blank,
}

/// The source without comments, strings blanked where asked; lines stay lines.
fn strip(text: &str, strings: Strings) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let rest = &chars[at..];
        let keeps = |c: char| strings == Strings::Keep || c == '\n';
        let len = match rest {
            ['/', '/', ..] => rest.iter().position(|c| *c == '\n').unwrap_or(rest.len()),
            ['/', '*', ..] => {
                let len = block_comment_len(rest);
                out.extend(rest[..len].iter().filter(|c| **c == '\n'));
                len
            }
            ['r', '"' | '#', ..] if !ends_identifier(&out) && raw_string_len(rest).is_some() => {
                let len = raw_string_len(rest).expect("just asked");
                out.extend(rest[1..len].iter().map(|c| if keeps(*c) && *c != '"' { *c } else { ' ' }));
                len
            }
            ['"', ..] => {
                let len = string_len(rest);
                out.extend(rest[..len].iter().map(|c| if keeps(*c) && *c != '"' { *c } else { ' ' }));
                len
            }
            ['\'', '\\', ..] => 3 + rest[3..].iter().position(|c| *c == '\'').map_or(0, |p| p + 1),
            ['\'', _, '\'', ..] => 3,
            [c, ..] => {
                out.push(*c);
                1
            }
            [] => break,
        };
        at += len;
    }
    out
}

fn ends_identifier(text: &str) -> bool {
    text.chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_') && !text.ends_with('b')
}

fn block_comment_len(rest: &[char]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        match &rest[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn string_len(rest: &[char]) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != '"' {
        at += if rest[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(rest.len())
}

fn raw_string_len(rest: &[char]) -> Option<usize> {
    let hashes = rest[1..].iter().take_while(|c| **c == '#').count();
    if rest.get(1 + hashes) != Some(&'"') {
        return None;
    }
    let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let body = &rest[2 + hashes..];
    body.windows(end.len()).position(|w| w == end).map(|at| 2 + hashes + at + end.len())
}

/// The stripped source without its `#[cfg(test)] mod name { ... }` blocks.
fn without_test_modules(code: &str) -> String {
    let mut out = String::new();
    let mut rest = code;
    while let Some(start) = rest.find("#[cfg(test)]") {
        let after = &rest[start..];
        let is_module = tokens(after).iter().skip_while(|t| *t != "]").take(6).any(|t| t == "mod");
        let open = after.find('{').filter(|open| is_module && !after[..*open].contains(';'));
        out.push_str(&rest[..start]);
        let Some(open) = open else {
            let len = "#[cfg(test)]".len();
            rest = &after[len..];
            continue;
        };
        let mut depth = 0;
        let close = after[open..].char_indices().find(|(_, c)| {
            depth += i32::from(*c == '{') - i32::from(*c == '}');
            depth == 0
        });
        rest = close.map_or("", |(at, _)| &after[open + at + 1..]);
    }
    out + rest
}

fn lines_without_tests(text: &str) -> usize {
    // Strings are blanked so that their braces do not count.
    let code = strip(text, Strings::Blank);
    let kept = without_test_modules(&code).lines().count();
    // Comment lines count; `strip` leaves their line ends in place.
    kept.min(text.lines().count())
}

/// Identifiers, `::` and single other characters.
fn tokens(code: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut chars = code.chars().peekable();
    while let Some(c) = chars.next() {
        if c.is_alphanumeric() || c == '_' {
            let mut word = String::from(c);
            while let Some(next) = chars.next_if(|c| c.is_alphanumeric() || *c == '_') {
                word.push(next);
            }
            tokens.push(word);
        } else if c == ':' && chars.next_if_eq(&':').is_some() {
            tokens.push("::".to_owned());
        } else if !c.is_whitespace() {
            tokens.push(c.to_string());
        }
    }
    tokens
}

/// Every path in the code with groups written out: `a::{b, c::d}` is `a::b` and `a::c::d`. Single words count too.
fn paths(tokens: &[String]) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        at = path(tokens, at, &[], &mut paths).max(at + 1);
    }
    paths
}

fn is_word(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Reads one path at `at` behind `prefix`; returns where it ends.
fn path(tokens: &[String], mut at: usize, prefix: &[String], found: &mut Vec<Vec<String>>) -> usize {
    let mut path = prefix.to_vec();
    while let Some(word) = tokens.get(at).filter(|t| is_word(t)) {
        path.push(word.clone());
        at += 1;
        if tokens.get(at).is_none_or(|t| t != "::") {
            found.push(path);
            return at;
        }
        at += 1;
    }
    if tokens.get(at).is_some_and(|t| t == "{") && !path.is_empty() {
        at += 1;
        while tokens.get(at).is_some_and(|t| t != "}") {
            let next = self::path(tokens, at, &path, found);
            at = next.max(at + 1);
            // `as name` and commas between the members.
            while tokens.get(at).is_some_and(|t| t == "," || t == "as") {
                at += if tokens[at] == "as" { 2 } else { 1 };
            }
        }
        return at + 1;
    }
    if !path.is_empty() {
        found.push(path);
    }
    at
}

/// Text files that people write: no fixtures, no models, no build output.
fn text_files(root: &Path) -> Vec<PathBuf> {
    const DIRS: &[&str] =
        &["src", "tests/it", "tools", "docs", "docker", "config", "benches", "examples", "fuzz", ".ci"];
    const KINDS: &[&str] = &["rs", "toml", "md", "sh", "py", "yaml", "yml", "json", "txt", "cuda"];
    let mut files = Vec::new();
    for dir in DIRS.iter().map(|dir| root.join(dir)).filter(|dir| dir.is_dir()) {
        collect(&dir, &mut |path| files.push(path));
    }
    let is_text = |path: &Path| path.extension().is_some_and(|e| KINDS.iter().any(|kind| e == *kind));
    files.retain(|path| is_text(path) || path.extension().is_none());
    let top = fs::read_dir(root).expect("the repository").map(|e| e.expect("an entry").path());
    files.extend(top.filter(|path| path.is_file() && is_text(path)));
    files
}

/// A directory of one machine that the line names, if any.
fn machine_path(line: &str) -> Option<&'static str> {
    // Written in two parts so that this file does not name them itself.
    const NAMES: &[&str] =
        &[concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/"), concat!("/fa", "rm/")];
    NAMES.iter().copied().find(|name| {
        line.match_indices(name).any(|(at, _)| {
            let before = line[..at].chars().next_back();
            before.is_none_or(|c| !c.is_ascii_alphanumeric() && !"_.-$}/".contains(c))
        })
    })
}

/// The checker itself.
mod checker {
    use super::*;

    fn problems(path: &str, text: &str) -> Vec<String> {
        check(&Source { path: path.to_owned(), text: text.to_owned() })
    }

    fn refuses(path: &str, text: &str, problem: &str) {
        let found = problems(path, text);
        assert!(found.iter().any(|p| p.contains(problem)), "{text:?} in {path}: {found:?}");
    }

    fn accepts(path: &str, text: &str) {
        assert_eq!(problems(path, text), Vec::<String>::new(), "{text:?} in {path}");
    }

    #[test]
    fn upward_imports_are_found_however_they_are_written() {
        refuses("engine/step.rs", "use crate::server::ApiError;", "engine must not import server");
        refuses("engine/step.rs", "use crate::{adapter::Site, text::Text};", "engine must not import text");
        refuses("engine/step.rs", "fn f() { crate::store::Store::open() }", "engine must not import store");
        refuses("engine/step.rs", "use super::super::store;", "engine must not import store");
        refuses("adapter/mod.rs", "use super::engine::Forward;", "adapter must not import engine");
        refuses("kernels/cpu/gemm.rs", "use crate::model::Batch as B;", "kernels must not import model");
        refuses("main.rs", "fn main() { patchbay::app::run() }", "main must not import app");
    }

    #[test]
    fn downward_imports_pass() {
        accepts("engine/step.rs", "use super::store_of_blocks; use crate::model::{Batch, KvCache};");
        accepts("engine/cache/mod.rs", "use super::text; // a submodule of engine called text");
        accepts("server/chat.rs", "use crate::{engine, store::Store, text::Text};");
        accepts("engine/step.rs", "pub(crate) fn step() {}");
    }

    #[test]
    fn forbidden_paths_are_found_in_groups_and_bodies() {
        refuses("server/a.rs", "use std::{collections::HashMap, fs};", "server must not contain std::fs");
        refuses("server/a.rs", "fn f() { let _ = std::fs::read(p); }", "server must not contain std::fs");
        refuses("server/a.rs", "use candle_core::Tensor;", "server must not contain candle*");
        refuses("engine/a.rs", "async fn step() {}", "engine must not contain async");
        refuses("engine/a.rs", "fn f() { g().await }", "engine must not contain await");
        refuses("adapter/a.rs", "use std::path::Path;", "adapter must not contain std::path");
    }

    #[test]
    fn kind_and_family_names_are_found() {
        refuses("engine/a.rs", "struct LoraSlot;", "engine must not name lora (LoraSlot)");
        refuses("engine/a.rs", "let x = \"SSF\";", "engine must not name ssf (SSF)");
        refuses("model/a.rs", "let bone = 1;", "model must not name bone");
        refuses("adapter/a.rs", "if arch == \"llama\" {}", "adapter must not name llama");
        refuses("server/a.rs", "let lora = 1;", "server must not name lora");
        accepts("server/a.rs", "struct Body { lora_name: String } const ROUTE: &str = \"/v1/load_lora_adapter\";");
        accepts("engine/a.rs", "let cache_miss = 1;");
        accepts("model/families/llama.rs", "struct Llama;");
    }

    #[test]
    fn comments_and_tests_are_left_alone() {
        accepts("engine/a.rs", "/// Not async, unlike lora. /* */\nfn f() {} /* crate::server */");
        accepts("engine/a.rs", "fn f() { let c = '\"'; }\n#[cfg(test)]\nmod tests {\n use crate::text::Text;\n}\n");
        refuses(
            "engine/a.rs",
            "#[cfg(test)]\nmod tests { fn f() { let a = \"}\"; } }\nuse crate::text::Text;",
            "engine must not import text",
        );
    }

    #[test]
    fn test_modules_in_files_of_their_own_are_known() {
        let source = |path: &str| Source { path: path.to_owned(), text: "#[cfg(test)]\nmod tests;".to_owned() };
        assert_eq!(test_files(&source("engine/mod.rs")), ["engine/tests"]);
        assert_eq!(test_files(&source("engine/step.rs")), ["engine/step/tests"]);
    }

    #[test]
    fn lines_of_tests_do_not_count() {
        assert_eq!(lines_without_tests("fn a() {}\n\n#[cfg(test)]\nmod tests {\n  fn b() {}\n\n}\n"), 3);
        assert_eq!(lines_without_tests("// a\n// b\nfn a() {}\n"), 3);
    }

    #[test]
    fn machine_paths_are_found() {
        assert_eq!(machine_path(&format!("see {}x", concat!("/wo", "rk/"))), Some(concat!("/wo", "rk/")));
        assert_eq!(machine_path("a/work/b and ./work/c"), None);
    }
}
