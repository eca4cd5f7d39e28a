//! The grammar of tensor keys: `base_model.model.<module path>.<suffix>`, and keys of their own for what belongs to no
//! module in particular.

use std::collections::BTreeMap;

use super::kinds::Kind;
use super::tensor_file::TensorFile;
use super::{AdapterError, SiteId, SiteTable};

/// What PEFT puts before every module path.
const PREFIX: &str = "base_model.model.";
/// The adapter's own name, which some tools leave inside the keys.
const ADAPTER_NAME: &str = "default";

/// Suffixes that any kind's file may have, for modules and biases that are replaced as a whole.
pub(super) const COMMON_SUFFIXES: &[&str] =
    &["weight", "bias", "base_layer.weight", "base_layer.bias", "modules_to_save.weight", "modules_to_save.bias"];

/// A file's keys by module and suffix.
pub(super) type ModuleKeys<T> = BTreeMap<T, BTreeMap<String, String>>;

/// The keys of tensors that belong to no module, by name: the key without the adapter's own.
pub(super) type SharedKeys = BTreeMap<String, String>;

/// Finds each key's site and suffix, or its name where it belongs to no module. Every suffix must be the kind's or one of
/// [`COMMON_SUFFIXES`].
pub(super) fn group_by_site(
    file: &TensorFile<'_>,
    sites: &SiteTable,
    kind: &Kind,
) -> Result<(ModuleKeys<SiteId>, SharedKeys), AdapterError> {
    let (mut modules, mut shared) = (ModuleKeys::new(), SharedKeys::new());
    for key in file.keys() {
        if let Some(name) = shared_name(key, kind.shared) {
            if let Some(other) = shared.insert(name, key.to_owned()) {
                return Err(refuse(key, &format!("means the same as `{other}`")));
            }
            continue;
        }
        let components = components(key)?;
        let place = (1..components.len()).rev().find_map(|at| Some((at, sites.find(&components[..at].join("."))?)));
        let (at, site) = place.ok_or_else(|| refuse(key, "the base model has no such module"))?;
        let suffix = suffix_of(&components[at..]);
        if !is_known(&suffix, kind.suffixes) {
            return Err(refuse(key, &format!("`{suffix}` is not part of this kind of adapter")));
        }
        insert(&mut modules, site, suffix, key)?;
    }
    Ok((modules, shared))
}

/// Finds each key's module path and suffix without a base model, from the suffixes alone; leaves out what is shared.
pub(super) fn group_by_path(file: &TensorFile<'_>, kind: &Kind) -> (ModuleKeys<String>, Vec<AdapterError>) {
    let (mut modules, mut faults) = (ModuleKeys::new(), Vec::new());
    for key in file.keys().filter(|key| shared_name(key, kind.shared).is_none()) {
        let place = components(key).and_then(|components| {
            let known = |at: &usize| is_known(&suffix_of(&components[*at..]), kind.suffixes);
            let at = (1..components.len()).find(known);
            let at = at.ok_or_else(|| refuse(key, "its suffix is not part of this kind of adapter"))?;
            insert(&mut modules, components[..at].join("."), suffix_of(&components[at..]), key)
        });
        faults.extend(place.err());
    }
    (modules, faults)
}

/// The name of a tensor that belongs to no module: it is one of `shared`, or one of them and more components.
pub(super) fn shared_name(key: &str, shared: &[&str]) -> Option<String> {
    let name = suffix_of(&key.split('.').collect::<Vec<_>>());
    shared.iter().any(|beginning| begins_with(&name, beginning)).then_some(name)
}

/// The part of a layer that a tensor without a module belongs to, from its shared name: the path up to the component
/// behind the layer's number.
pub(super) fn layer_part(name: &str) -> Option<String> {
    let components: Vec<&str> = name.strip_prefix(PREFIX).unwrap_or(name).split('.').collect();
    let is_layer = |pair: &[&str]| pair[0] == "layers" && pair[1].parse::<usize>().is_ok();
    let at = components.windows(2).position(is_layer)?;
    Some(components.get(..at + 3)?.join("."))
}

/// Whether a tensor's values are integers: those of the kind's suffixes and shared names that say so.
pub(super) fn holds_integers(kind: &Kind, key: &str) -> bool {
    let shared = shared_name(key, kind.shared);
    kind.integers.iter().any(|name| match &shared {
        Some(shared) => begins_with(shared, name),
        None => key.trim_end_matches(".default").ends_with(&format!(".{name}")),
    })
}

fn begins_with(name: &str, beginning: &str) -> bool {
    name.strip_prefix(beginning).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The usual spelling of a key, for messages about tensors that are missing.
pub(super) fn key_of(path: &str, suffix: &str) -> String {
    format!("{PREFIX}{path}.{suffix}")
}

fn components(key: &str) -> Result<Vec<&str>, AdapterError> {
    let rest = key.strip_prefix(PREFIX).ok_or_else(|| refuse(key, &format!("expected the prefix `{PREFIX}`")))?;
    Ok(rest.split('.').collect())
}

fn suffix_of(components: &[&str]) -> String {
    let kept: Vec<&str> = components.iter().copied().filter(|component| *component != ADAPTER_NAME).collect();
    kept.join(".")
}

fn is_known(suffix: &str, suffixes: &[&str]) -> bool {
    suffixes.iter().chain(COMMON_SUFFIXES).any(|known| *known == suffix)
}

fn insert<T: Ord>(modules: &mut ModuleKeys<T>, module: T, suffix: String, key: &str) -> Result<(), AdapterError> {
    match modules.entry(module).or_default().insert(suffix, key.to_owned()) {
        Some(other) => Err(refuse(key, &format!("means the same as `{other}`"))),
        None => Ok(()),
    }
}

fn refuse(key: &str, reason: &str) -> AdapterError {
    AdapterError::Tensor { tensor: key.to_owned(), reason: reason.to_owned() }
}
