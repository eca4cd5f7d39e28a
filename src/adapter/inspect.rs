//! What can be said of an adapter's files without its base model.

use std::collections::BTreeSet;

use serde::Serialize;

use super::config::{CONFIG_FILE, Config};
use super::keys::{COMMON_SUFFIXES, group_by_path, holds_integers, key_of, layer_part, shared_name};
use super::kinds::{self, Kind};
use super::matching::{is_saved, modules_to_save};
use super::tensor_file::TensorFile;
use super::{AdapterError, AdapterFiles};

/// What an adapter's files hold, and what is wrong with them as far as that shows without the base model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// `peft_type` of the config.
    pub kind: String,
    /// Module paths that have tensors, and places inside layers that have some beside the modules, in alphabetical order.
    pub modules: Vec<String>,
    /// Distinct ranks, ascending; empty for kinds without one.
    pub ranks: Vec<usize>,
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of the tensors in the file.
    pub bytes: usize,
    /// Why the adapter would be refused; empty when nothing speaks against it.
    pub problems: Vec<String>,
}

/// Reads an adapter's files without a base model: kind, modules, ranks, sizes and problems.
///
/// Shapes and modules are checked against the base only when the adapter is loaded.
///
/// # Errors
/// When a file cannot be read at all, or the kind is unknown.
pub fn inspect(files: &AdapterFiles) -> Result<Inspection, AdapterError> {
    let config = Config::parse(&files.config)?;
    let kind = kinds::of(&config);
    let may_be_empty = kind.as_ref().is_ok_and(|kind| kind.may_be_empty);
    let file = TensorFile::parse(&files.weights, may_be_empty)?;
    let kind = kind?;
    let mut problems = config.faults(kind.fields);
    problems.extend((kind.check)(&config).err());
    let (modules, faults) = group_by_path(&file, kind);
    problems.extend(faults);
    problems.extend(file.keys().filter_map(|key| match holds_integers(kind, key) {
        true => file.read_integers(key).err(),
        false => file.read_f32(key).err(),
    }));
    if file.len() == 0 {
        problems.push(AdapterError::Empty { reason: "the file holds no tensors".to_owned() });
    }
    let saved = modules_to_save(&config).unwrap_or_else(|fault| {
        problems.push(fault);
        Vec::new()
    });
    // A saved embedding may bring its tied head along, which only the base model can tell.
    let may_follow = !saved.is_empty() && config.flag("ensure_weight_tying").unwrap_or(false);
    let replaces_biases = config.string("bias").is_ok_and(|bias| bias.is_some_and(|bias| bias != "none"));
    let mut ranks = BTreeSet::new();
    for (path, keys) in &modules {
        let suffixes: Vec<&str> = keys.keys().map(String::as_str).collect();
        problems.extend(missing_partner(kind, path, &suffixes));
        let mut found: BTreeSet<usize> = keys
            .iter()
            .filter(|(suffix, _)| kind.suffixes.contains(&suffix.as_str()))
            .filter_map(|(suffix, key)| file.shape(key).and_then(|shape| (kind.rank)(suffix, shape)))
            .collect();
        if (kind.shows_parts)(&config) {
            found = found.last().copied().into_iter().collect();
        }
        if found.len() > 1 {
            let reason = format!("its tensors have different ranks: {found:?}");
            problems.push(AdapterError::Tensor { tensor: path.clone(), reason });
        }
        ranks.extend(found);
        let is_covered = |suffix: &str| {
            !COMMON_SUFFIXES.contains(&suffix)
                || suffix.starts_with("base_layer")
                || is_saved(&saved, path)
                || may_follow
                || (replaces_biases && suffix.ends_with("bias"))
        };
        let stray = keys.iter().find(|(suffix, _)| !is_covered(suffix));
        if let Some((_, key)) = stray {
            let reason = "nothing in the config accounts for it".to_owned();
            problems.push(AdapterError::Tensor { tensor: key.clone(), reason });
        }
    }
    let parts = file.keys().filter_map(|key| layer_part(&shared_name(key, kind.shared)?));
    let modules: BTreeSet<String> = parts.chain(modules.into_keys()).collect();
    let mut found = Inspection {
        kind: kind.peft_type.to_owned(),
        modules: modules.into_iter().collect(),
        ranks: ranks.into_iter().collect(),
        tensors: file.len(),
        bytes: file.num_bytes(),
        problems: problems.iter().map(ToString::to_string).collect(),
    };
    let named = (kind.parts)(&config).unwrap_or(0);
    for number in 0..named {
        found.add_part(number, files.parts.get(number));
    }
    Ok(found)
}

/// How many adapters an adapter's config names that lie in sub-directories `0`, `1` and so on beside it. None where the
/// config is faulty, which [`lower`](super::lower) tells.
pub fn num_parts(config: &[u8]) -> usize {
    let parts = || {
        let config = Config::parse(config)?;
        (kinds::of(&config)?.parts)(&config)
    };
    parts().unwrap_or(0)
}

impl Inspection {
    /// Adds what an adapter in a sub-directory holds.
    fn add_part(&mut self, number: usize, files: Option<&AdapterFiles>) {
        let missing = || AdapterError::Malformed { file: CONFIG_FILE, reason: "is missing".to_owned() };
        match files.map_or_else(|| Err(missing()), inspect) {
            Ok(part) => {
                self.modules =
                    self.modules.drain(..).chain(part.modules).collect::<BTreeSet<_>>().into_iter().collect();
                self.ranks = self.ranks.drain(..).chain(part.ranks).collect::<BTreeSet<_>>().into_iter().collect();
                self.tensors += part.tensors;
                self.bytes += part.bytes;
                self.problems.extend(part.problems.iter().map(|problem| format!("adapter `{number}`: {problem}")));
            }
            Err(error) => self.problems.push(format!("adapter `{number}`: {error}")),
        }
    }
}

/// A tensor that a present one needs.
fn missing_partner(kind: &Kind, path: &str, suffixes: &[&str]) -> Option<AdapterError> {
    let both = kind.pairs.iter().flat_map(|(first, second)| [(first, second), (second, first)]);
    let missing = both.into_iter().find(|(present, other)| suffixes.contains(present) && !suffixes.contains(other));
    missing.map(|(_, other)| AdapterError::Tensor { tensor: key_of(path, other), reason: "is missing".to_owned() })
}
