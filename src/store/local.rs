//! Adapter directories on the local disk: which paths may be opened, and reading them.
//!
//! A path is opened only after it was resolved, symbolic links included, and found inside a configured root. Only two
//! files of a directory are ever read, and those of sub-directories with numbers for names where the config asks for such; a
//! pickle file is refused by name and never opened.

use std::fs;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use super::StoreError;
use super::objects::{CONFIG_FILE, WEIGHTS_FILE, WEIGHTS_FILES};
use crate::adapter::{self, AdapterError, AdapterFiles};

/// Weight files that are pickles: PEFT's older one, and AdapterHub's.
pub(super) const PICKLE_FILES: [&str; 2] = ["adapter_model.bin", "pytorch_adapter.bin"];

/// The directories that adapters may be read from; the store's own comes first.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    match find_weights(&dir, |path| resolve_file(roots, path))? {
        Some(_) => Ok(true),
        None => pickle_in(&dir).map_or(Ok(true), |file| Err(pickle_refusal(file))),
    }
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
    AdapterDirectory::find(&dir, Some(roots))?.read(bytes_max)
}

/// The weights in a directory, resolved.
fn find_weights(
    dir: &Path,
    resolve: impl Fn(&Path) -> Result<Option<PathBuf>, StoreError>,
) -> Result<Option<PathBuf>, StoreError> {
    for file in WEIGHTS_FILES {
        if let Some(weights) = resolve(&dir.join(file))? {
            return Ok(Some(weights));
        }
    }
    Ok(None)
}

/// The name of a pickle in a directory.
fn pickle_in(dir: &Path) -> Option<&'static str> {
    PICKLE_FILES.into_iter().find(|file| dir.join(file).exists())
}

/// The files of an adapter directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterDirectory {
    /// `adapter_config.json`, resolved.
    pub config: PathBuf,
    /// `adapter_model.safetensors`, or AdapterHub's `adapter.safetensors`, resolved.
    pub weights: PathBuf,
    /// Where they lie.
    dir: PathBuf,
    /// What its files must be inside of; `None` where links may lead anywhere.
    roots: Option<Roots>,
}

impl AdapterDirectory {
    /// The adapter in a directory that the operator names: links may lead anywhere.
    ///
    /// # Errors
    /// `FilesNotFound`, or a refusal when the weights are a pickle.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        if !dir.is_dir() {
            return Err(StoreError::FilesNotFound(format!("{} is not a directory", dir.display())));
        }
        Self::find(dir, None)
    }

    /// Reads its files, those of sub-directories too, at most `bytes_max` bytes together.
    ///
    /// # Errors
    /// `TooLarge`, or when a file is missing or cannot be read.
    pub fn read(&self, bytes_max: usize) -> Result<AdapterFiles, StoreError> {
        let mut left = bytes_max;
        let mut files = self.read_own(&mut left, bytes_max)?;
        for part in self.parts_of(&files.config)? {
            files.parts.push(part.read_own(&mut left, bytes_max)?);
        }
        Ok(files)
    }

    /// The directories in it, `0`, `1` and so on, that its config names.
    ///
    /// # Errors
    /// When one is missing, or the config is larger than `bytes_max` or cannot be read.
    pub fn parts(&self, bytes_max: usize) -> Result<Vec<Self>, StoreError> {
        self.parts_of(&read_file(&self.config, bytes_max, bytes_max)?)
    }

    fn parts_of(&self, config: &[u8]) -> Result<Vec<Self>, StoreError> {
        let part = |number: usize| {
            Self::find(&self.dir.join(number.to_string()), self.roots.as_ref()).map_err(|error| match error {
                StoreError::FilesNotFound(reason) => {
                    StoreError::FilesNotFound(format!("sub-directory {number}: {reason}"))
                }
                other => other,
            })
        };
        (0..adapter::num_parts(config)).map(part).collect()
    }

    /// Reads the two files, at most `left` bytes, which it takes off.
    fn read_own(&self, left: &mut usize, bytes_max: usize) -> Result<AdapterFiles, StoreError> {
        let config = read_file(&self.config, *left, bytes_max)?;
        *left -= config.len();
        let weights = read_file(&self.weights, *left, bytes_max)?;
        *left -= weights.len();
        Ok(AdapterFiles::new(config, weights))
    }

    /// Writes an adapter's two files into an existing directory.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(dir: &Path, files: &AdapterFiles) -> Result<(), StoreError> {
        assert!(files.parts.is_empty(), "what is written has no parts");
        for (name, bytes) in [(CONFIG_FILE, &files.config), (WEIGHTS_FILE, &files.weights)] {
            fs::write(dir.join(name), bytes).map_err(StoreError::storage)?;
        }
        Ok(())
    }

    /// The files in `dir`, which must be inside `roots` where these are given.
    fn find(dir: &Path, roots: Option<&Roots>) -> Result<Self, StoreError> {
        let resolve = |path: &Path| match roots {
            Some(roots) => resolve_file(roots, path),
            None => Ok(path.is_file().then(|| path.to_owned())),
        };
        let missing = |file: &str| StoreError::FilesNotFound(format!("the directory has no {file}"));
        let config = resolve(&dir.join(CONFIG_FILE))?.ok_or_else(|| missing(CONFIG_FILE))?;
        match (find_weights(dir, resolve)?, pickle_in(dir)) {
            (Some(weights), _) => Ok(Self { config, weights, dir: dir.to_owned(), roots: roots.cloned() }),
            (None, Some(pickle)) => Err(pickle_refusal(pickle)),
            (None, None) => Err(missing(WEIGHTS_FILE)),
        }
    }
}

/// Why a pickle is not read.
pub(super) fn pickle_refusal(file: &'static str) -> StoreError {
    let convert_to = if file == PICKLE_FILES[0] { WEIGHTS_FILE } else { WEIGHTS_FILES[1] };
    let reason = format!("is a pickle file, which can run code and is never opened; convert it to {convert_to}");
    StoreError::from(AdapterError::Malformed { file, reason })
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const LIMIT: usize = 100;

    struct Dirs {
        _temp: tempfile::TempDir,
        base: PathBuf,
        roots: Roots,
    }

    /// `root/good`, `extra/good` and `outside/good`, each an adapter, with the first two as roots.
    fn dirs() -> Dirs {
        let temp = tempfile::tempdir().unwrap();
        let base = temp.path().canonicalize().unwrap();
        for dir in ["root", "extra", "outside"] {
            write_adapter(&base.join(dir).join("good"), dir);
        }
        let roots = Roots::new(&base.join("root"), &[base.join("extra"), base.join("absent")]).unwrap();
        Dirs { _temp: temp, base, roots }
    }

    fn write_adapter(dir: &Path, content: &str) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join(CONFIG_FILE), content).unwrap();
        fs::write(dir.join(WEIGHTS_FILE), "weights").unwrap();
    }

    #[test]
    fn absolute_and_relative_paths_inside_the_roots_are_read() {
        let Dirs { base, roots, _temp } = dirs();
        write_adapter(&base.join("extra/second"), "second");
        for (path, content) in [
            (base.join("root/good"), "root"),
            (base.join("extra/good"), "extra"),
            (PathBuf::from("good"), "root"),
            (PathBuf::from("./good/"), "root"),
            (PathBuf::from("second"), "second"),
        ] {
            let files = read_path(&roots, &path, LIMIT).unwrap();
            assert_eq!(files.config, content.as_bytes(), "{}", path.display());
        }
    }

    #[test]
    fn nothing_outside_the_roots_is_opened_or_told_about() {
        let Dirs { base, roots, _temp } = dirs();
        symlink(base.join("outside/good"), base.join("root/link")).unwrap();
        fs::create_dir(base.join("root/linked-file")).unwrap();
        symlink(base.join("outside/good").join(CONFIG_FILE), base.join("root/linked-file").join(CONFIG_FILE)).unwrap();
        for path in [
            base.join("outside/good"),
            base.join("outside/absent"),
            base.join("root/../outside/good"),
            PathBuf::from("../outside/good"),
            PathBuf::from("link"),
            PathBuf::from("linked-file"),
            PathBuf::from("/"),
        ] {
            let error = read_path(&roots, &path, LIMIT).unwrap_err();
            assert!(matches!(error, StoreError::OutsideRoots), "{}: {error}", path.display());
        }
        assert!(matches!(check_directory(&roots, "link"), Err(StoreError::OutsideRoots)));
    }

    #[test]
    fn links_that_stay_inside_are_followed() {
        let Dirs { base, roots, _temp } = dirs();
        symlink(base.join("extra/good"), base.join("root/link")).unwrap();
        assert_eq!(read_path(&roots, Path::new("link"), LIMIT).unwrap().config, "extra");
        assert!(check_directory(&roots, "link").unwrap());
    }

    #[test]
    fn what_is_missing_is_named() {
        let Dirs { base, roots, _temp } = dirs();
        fs::create_dir(base.join("root/empty")).unwrap();
        fs::create_dir(base.join("root/half")).unwrap();
        fs::write(base.join("root/half").join(CONFIG_FILE), "{}").unwrap();
        fs::write(base.join("root/file"), "x").unwrap();
        for (path, message) in [
            ("absent", "does not exist"),
            ("empty", "has no adapter_config.json"),
            ("half", "has no adapter_model.safetensors"),
            ("file", "not a directory"),
            ("nul\0", "cannot be resolved"),
        ] {
            let error = read_path(&roots, Path::new(path), LIMIT).unwrap_err();
            assert!(matches!(error, StoreError::FilesNotFound(_)) && error.to_string().contains(message), "{error}");
        }
    }

    #[test]
    fn a_pickle_is_refused_with_advice() {
        for (pickle, advice) in [
            ("adapter_model.bin", "convert it to adapter_model.safetensors"),
            ("pytorch_adapter.bin", "convert it to adapter.safetensors"),
        ] {
            let Dirs { base, roots, _temp } = dirs();
            fs::remove_file(base.join("root/good").join(WEIGHTS_FILE)).unwrap();
            fs::write(base.join("root/good").join(pickle), "x").unwrap();
            for error in [
                read_path(&roots, Path::new("good"), LIMIT).map(drop).unwrap_err(),
                check_directory(&roots, "good").map(drop).unwrap_err(),
            ] {
                let error = error.to_string();
                assert!(error.contains(pickle) && error.contains(advice), "{error}");
            }
        }
    }

    #[test]
    fn weights_may_have_the_name_of_adapterhub() {
        let Dirs { base, roots, _temp } = dirs();
        let good = base.join("root/good");
        fs::rename(good.join(WEIGHTS_FILE), good.join("adapter.safetensors")).unwrap();
        assert!(check_directory(&roots, "good").unwrap());
        assert_eq!(read_path(&roots, Path::new("good"), LIMIT).unwrap().weights, "weights");
        fs::write(good.join(WEIGHTS_FILE), "other").unwrap();
        assert_eq!(read_path(&roots, Path::new("good"), LIMIT).unwrap().weights, "other");
    }

    /// `root/good` becomes an adapter that names two in sub-directories.
    fn write_mixture(base: &Path) {
        let config = r#"{"peft_type": "XLORA", "adapters": {"0": "../../outside/good", "1": "/etc"}}"#;
        write_adapter(&base.join("root/good"), config);
        write_adapter(&base.join("root/good/0"), "first");
        write_adapter(&base.join("root/good/1"), "second");
    }

    #[test]
    fn named_sub_directories_are_read_and_no_path_in_a_config_is_opened() {
        let Dirs { base, roots, _temp } = dirs();
        write_mixture(&base);
        let files = read_path(&roots, Path::new("good"), 200).unwrap();
        let configs: Vec<_> = files.parts.iter().map(|part| &*part.config).collect();
        assert_eq!(configs, [&b"first"[..], b"second"]);
        let total = files.num_bytes();
        assert!(read_path(&roots, Path::new("good"), total).is_ok());
        assert!(matches!(read_path(&roots, Path::new("good"), total - 1), Err(StoreError::TooLarge { .. })));
    }

    #[test]
    fn a_sub_directory_may_not_be_missing_or_lead_out() {
        let Dirs { base, roots, _temp } = dirs();
        write_mixture(&base);
        fs::remove_dir_all(base.join("root/good/1")).unwrap();
        let error = read_path(&roots, Path::new("good"), 200).unwrap_err();
        assert!(error.to_string().contains("sub-directory 1: the directory has no adapter_config.json"), "{error}");
        symlink(base.join("outside/good"), base.join("root/good/1")).unwrap();
        assert!(matches!(read_path(&roots, Path::new("good"), 200), Err(StoreError::OutsideRoots)));
        assert!(AdapterDirectory::open(&base.join("root/good")).unwrap().read(200).is_ok(), "the operator may");
    }

    #[test]
    fn reading_is_bounded_over_both_files() {
        let Dirs { base, roots, _temp } = dirs();
        assert!(read_path(&roots, Path::new("good"), "root".len() + "weights".len()).is_ok());
        let error = read_path(&roots, Path::new("good"), "root".len() + "weights".len() - 1).unwrap_err();
        assert!(matches!(error, StoreError::TooLarge { limit: 10 }), "{error}");
        fs::write(base.join("root/good").join(CONFIG_FILE), "x".repeat(LIMIT + 1)).unwrap();
        assert!(matches!(read_path(&roots, Path::new("good"), LIMIT), Err(StoreError::TooLarge { .. })));
    }
}
