//! Adapter directories on the local disk: which paths may be opened, and reading them.
//!
//! A path is opened only after it was resolved, symbolic links included, and found inside a configured root. Only two
//! files of a directory are ever read; a pickle file is refused by name and never opened.

use std::fs;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use super::StoreError;
use super::objects::{CONFIG_FILE, WEIGHTS_FILE};
use crate::adapter::{AdapterError, AdapterFiles};

/// PEFT's older weight file, a pickle.
pub(super) const PICKLE_FILE: &str = "adapter_model.bin";

/// The directories that adapters may be read from; the store's own comes first.
#[derive(Clone, Debug)]
pub(super) struct Roots {
    /// As configured, made absolute, and as resolved.
    roots: Vec<(PathBuf, PathBuf)>,
}

impl Roots {
    /// Resolves the store's root, which must exist, and the extra ones; an extra root that does not exist is left out.
    ///
    /// # Errors
    /// When the store's root cannot be resolved.
    pub(super) fn new(root: &Path, extra: &[PathBuf]) -> io::Result<Self> {
        let mut roots = vec![(std::path::absolute(root)?, root.canonicalize()?)];
        for path in extra {
            match path.canonicalize() {
                Ok(resolved) => roots.push((std::path::absolute(path)?, resolved)),
                Err(error) => tracing::warn!(path = %path.display(), %error, "extra adapter root left out"),
            }
        }
        Ok(Self { roots })
    }

    /// The resolved form of the store's own root.
    pub(super) fn store_root(&self) -> &Path {
        &self.roots[0].1
    }

    /// The existing directory that a request's path means: absolute inside a root, or relative to one.
    fn find(&self, path: &Path) -> Result<PathBuf, StoreError> {
        if path.components().any(|part| part == Component::ParentDir) {
            return Err(StoreError::OutsideRoots);
        }
        let candidates: Vec<PathBuf> = if path.is_absolute() {
            let inside = |root: &Path| path.starts_with(root);
            if !self.roots.iter().any(|(configured, resolved)| inside(configured) || inside(resolved)) {
                return Err(StoreError::OutsideRoots);
            }
            vec![path.to_owned()]
        } else {
            self.roots.iter().map(|(_, root)| root.join(path)).collect()
        };
        for candidate in candidates {
            match candidate.canonicalize() {
                Ok(resolved) => return self.inside(&resolved).then_some(resolved).ok_or(StoreError::OutsideRoots),
                Err(error) if is_absent(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "the path of a load request cannot be resolved");
                    return Err(StoreError::FilesNotFound("the path cannot be resolved".to_owned()));
                }
            }
        }
        Err(StoreError::FilesNotFound("the path does not exist in any configured adapter root".to_owned()))
    }

    fn inside(&self, resolved: &Path) -> bool {
        self.roots.iter().any(|(_, root)| resolved.starts_with(root))
    }
}

/// Whether the store's root has a plain directory of that name whose files may be read.
///
/// # Errors
/// `OutsideRoots` when a symbolic link leads out; a refusal when the weights are a pickle.
pub(super) fn check_directory(roots: &Roots, name: &str) -> Result<bool, StoreError> {
    let dir = roots.store_root().join(name);
    if resolve_file(roots, &dir.join(CONFIG_FILE))?.is_none() {
        return Ok(false);
    }
    if resolve_file(roots, &dir.join(WEIGHTS_FILE))?.is_none() && dir.join(PICKLE_FILE).exists() {
        return Err(pickle_refusal());
    }
    Ok(true)
}

/// Reads the adapter directory that a request's path names.
///
/// # Errors
/// `OutsideRoots`, `FilesNotFound`, `TooLarge`, or a refusal when the weights are a pickle.
pub(super) fn read_path(roots: &Roots, path: &Path, bytes_max: usize) -> Result<AdapterFiles, StoreError> {
    let dir = roots.find(path)?;
    if !dir.is_dir() {
        return Err(StoreError::FilesNotFound("the path is not a directory".to_owned()));
    }
    let missing = |file: &str| StoreError::FilesNotFound(format!("the directory has no {file}"));
    let config = resolve_file(roots, &dir.join(CONFIG_FILE))?.ok_or_else(|| missing(CONFIG_FILE))?;
    let Some(weights) = resolve_file(roots, &dir.join(WEIGHTS_FILE))? else {
        return Err(if dir.join(PICKLE_FILE).exists() { pickle_refusal() } else { missing(WEIGHTS_FILE) });
    };
    let config = read_file(&config, bytes_max, bytes_max)?;
    let weights = read_file(&weights, bytes_max - config.len(), bytes_max)?;
    Ok(AdapterFiles { config, weights })
}

/// Why a pickle is not read.
pub(super) fn pickle_refusal() -> StoreError {
    let reason = format!("is a pickle file, which can run code and is never opened; convert it to {WEIGHTS_FILE}");
    StoreError::from(AdapterError::Malformed { file: PICKLE_FILE, reason })
}

/// The resolved path of a regular file inside the roots; `None` where there is none.
fn resolve_file(roots: &Roots, path: &Path) -> Result<Option<PathBuf>, StoreError> {
    let resolved = match path.canonicalize() {
        Ok(resolved) => resolved,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(StoreError::storage(error)),
    };
    if !roots.inside(&resolved) {
        return Err(StoreError::OutsideRoots);
    }
    // Opening a pipe or a device could block for ever.
    Ok(resolved.is_file().then_some(resolved))
}

/// Reads at most `left` bytes; `limit` is what the message names.
fn read_file(path: &Path, left: usize, limit: usize) -> Result<Vec<u8>, StoreError> {
    let file = fs::File::open(path).map_err(StoreError::storage)?;
    let size = file.metadata().map_err(StoreError::storage)?.len();
    if size > left as u64 {
        return Err(StoreError::TooLarge { limit });
    }
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
    file.take(left as u64 + 1).read_to_end(&mut bytes).map_err(StoreError::storage)?;
    if bytes.len() > left {
        return Err(StoreError::TooLarge { limit });
    }
    Ok(bytes)
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}
