//! The layout on storage, over any object store.
//!
//! - `blobs/sha256/<digest>/adapter_config.json` and `.../adapter_model.safetensors`: immutable content, with the adapters in
//!   sub-directories `0`, `1` and so on where the config names such
//! - `blobs/staging/<random>`: weights that are being checked; after a crash some are left, which go when they are old
//! - `catalog/<name>/<number>.json`: records, each written once with create-if-absent
//! - `<name>/adapter_config.json` and `<name>/adapter_model.safetensors`: plain directories, only ever read, with their
//!   sub-directories likewise; the weights may have the other name of [`WEIGHTS_FILES`]

use std::collections::BTreeSet;
use std::iter;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use object_store::path::Path;
use object_store::{Error, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions};

use super::StoreError;
use super::local::{self, Roots};
use super::name::check_name;
use super::record::{ContentDigest, Record};
use super::workers::Workers;
use crate::adapter::{self, AdapterFiles};

pub(super) const BLOBS: &str = "blobs";
pub(super) const CATALOG: &str = "catalog";
/// Directory of [`BLOBS`] for what has no digest yet.
const STAGING: &str = "staging";
pub(super) const CONFIG_FILE: &str = "adapter_config.json";
pub(super) const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Names that the weights have where adapters come from: PEFT's, which the store keeps them under, and AdapterHub's. In a
/// directory with both the first counts.
pub const WEIGHTS_FILES: [&str; 2] = [WEIGHTS_FILE, "adapter.safetensors"];

/// A record is some hundred bytes; a larger file is not one.
const RECORD_BYTES_MAX: usize = 64 << 10;
/// Age of staged weights that nobody can still be checking, seconds.
const STAGED_S_MAX: u64 = 24 * 60 * 60;
/// Times a directory is read again because it changed meanwhile.
const READ_TRIES: usize = 5;
/// Seconds within which a file may change again without its modification time showing it.
const MTIME_RESOLUTION_S: u64 = 2;

/// What tells, without reading them, whether a plain directory's files are the ones seen before.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct DirectoryVersion {
    config: FileVersion,
    weights: FileVersion,
    /// Name of the weights file.
    weights_file: &'static str,
    /// Those of the sub-directories that the config names.
    parts: Vec<DirectoryVersion>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct FileVersion {
    e_tag: Option<String>,
    modified_ns: Option<i64>,
    modified_s: u64,
    size: u64,
}

impl FileVersion {
    fn of(meta: &ObjectMeta) -> Self {
        Self {
            e_tag: meta.e_tag.clone(),
            modified_ns: meta.last_modified.timestamp_nanos_opt(),
            modified_s: u64::try_from(meta.last_modified.timestamp()).unwrap_or_default(),
            size: meta.size,
        }
    }
}

impl DirectoryVersion {
    /// Unix time of the latest of the files' modifications, seconds.
    pub(super) fn modified(&self) -> u64 {
        let parts = self.parts.iter().map(Self::modified).max().unwrap_or(0);
        self.config.modified_s.max(self.weights.modified_s).max(parts)
    }

    /// How many sub-directories the config names, as far as is known.
    pub(super) fn num_parts(&self) -> usize {
        self.parts.len()
    }

    /// Bytes of all files.
    fn size(&self) -> u64 {
        let own = self.config.size.saturating_add(self.weights.size);
        self.parts.iter().fold(own, |sum, part| sum.saturating_add(part.size()))
    }

    /// Whether a further change would surely change the version too: the files are not just being written.
    fn settled(&self) -> bool {
        self.modified().abs_diff(unix_now()) > MTIME_RESOLUTION_S
    }
}

/// A plain directory's content.
pub(super) struct DirectoryContent {
    pub(super) files: AdapterFiles,
    pub(super) version: DirectoryVersion,
    /// Whether `version` can be trusted to tell later changes.
    pub(super) settled: bool,
}

/// Weights that are on storage and do not belong to anything yet, with their configs: an adapter's own, then its parts'.
#[derive(Default)]
pub(super) struct Staged(Vec<(Bytes, Path)>);

/// The store's objects.
pub(super) struct Objects {
    store: Arc<dyn ObjectStore>,
    /// Where the objects are local files: what symbolic links are checked against.
    roots: Option<Roots>,
    adapter_bytes_max: usize,
}

impl Objects {
    pub(super) fn new(store: Arc<dyn ObjectStore>, roots: Option<Roots>, adapter_bytes_max: usize) -> Self {
        Self { store, roots, adapter_bytes_max }
    }

    /// The record with this number, if it exists.
    pub(super) async fn record(&self, name: &str, number: u64) -> Result<Option<Record>, StoreError> {
        let path = record_path(name, number);
        let Some(bytes) = self.read(&path, RECORD_BYTES_MAX).await? else { return Ok(None) };
        let record = serde_json::from_slice(&bytes).map_err(|error| StoreError::storage(format!("{path}: {error}")))?;
        Ok(Some(record))
    }

    /// Writes a record unless its number is taken; whether it was written.
    pub(super) async fn create_record(&self, name: &str, number: u64, record: &Record) -> Result<bool, StoreError> {
        let text = serde_json::to_vec(record).map_err(StoreError::storage)?;
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.store.put_opts(&record_path(name, number), text.into(), options).await {
            Ok(_) => Ok(true),
            Err(Error::AlreadyExists { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Every name that has a record or a plain directory, sorted.
    pub(super) async fn names(&self) -> Result<BTreeSet<String>, StoreError> {
        let mut names = BTreeSet::new();
        for prefix in [None, Some(Path::from(CATALOG))] {
            let listed = match self.store.list_with_delimiter(prefix.as_ref()).await {
                Err(Error::NotFound { .. }) => continue,
                listed => listed?,
            };
            let found = listed.common_prefixes.iter().filter_map(Path::filename);
            names.extend(found.filter(|name| check_name(name).is_ok()).map(str::to_owned));
        }
        Ok(names)
    }

    /// Writes the weights before it is known whether they are good, on threads that give way to the engine's.
    /// [`Objects::put_blob`] or [`Objects::discard`] follows.
    pub(super) async fn stage(&self, workers: &Workers, files: &AdapterFiles) -> Result<Staged, StoreError> {
        let (store, files) = (self.store.clone(), files.clone());
        // Away from the runtime's threads local files are written by the thread that asks for it.
        workers.run(move || futures::executor::block_on(stage(store.as_ref(), &files))).await
    }

    /// Takes back what was staged.
    pub(super) async fn discard(&self, staged: Staged) {
        discard(self.store.as_ref(), staged).await;
    }

    /// Takes back what a process that ended before it could left staged.
    pub(super) async fn discard_old(&self) -> Result<(), StoreError> {
        let listed = match self.store.list_with_delimiter(Some(&Path::from_iter([BLOBS, STAGING]))).await {
            Err(Error::NotFound { .. }) => return Ok(()),
            listed => listed?,
        };
        let age = |meta: &ObjectMeta| unix_now().saturating_sub(FileVersion::of(meta).modified_s);
        let old = listed.objects.into_iter().filter(|meta| age(meta) > STAGED_S_MAX);
        self.discard(Staged(old.map(|meta| (Bytes::new(), meta.location)).collect())).await;
        Ok(())
    }

    /// Stores staged content under its digest. Writing it again changes nothing, and repairs what a power cut tore.
    pub(super) async fn put_blob(&self, digest: &ContentDigest, staged: Staged) -> Result<(), StoreError> {
        let mut files = staged.0.into_iter().enumerate();
        while let Some((idx, (config, weights))) = files.next() {
            let own = blob_path(digest);
            let dir = if idx == 0 { own } else { own.join((idx - 1).to_string()) };
            let put = async {
                self.store.put(&dir.clone().join(CONFIG_FILE), config.into()).await?;
                self.store.rename(&weights, &dir.join(WEIGHTS_FILE)).await
            };
            if let Err(error) = put.await {
                let rest = files.map(|(_, rest)| rest);
                self.discard(Staged(iter::once((Bytes::new(), weights)).chain(rest).collect())).await;
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// The content with this digest, not yet checked against it.
    pub(super) async fn blob(&self, digest: &ContentDigest) -> Result<AdapterFiles, StoreError> {
        let mut files = self.blob_files(&blob_path(digest)).await?;
        for number in 0..adapter::num_parts(&files.config) {
            files.parts.push(self.blob_files(&blob_path(digest).join(number.to_string())).await?);
        }
        Ok(files)
    }

    async fn blob_files(&self, dir: &Path) -> Result<AdapterFiles, StoreError> {
        let [mut config, mut weights] = [Bytes::new(), Bytes::new()];
        for (name, bytes) in [(CONFIG_FILE, &mut config), (WEIGHTS_FILE, &mut weights)] {
            let path = dir.clone().join(name);
            let missing = || StoreError::storage(format!("{path} is missing"));
            *bytes = self.read(&path, self.adapter_bytes_max).await?.ok_or_else(missing)?;
        }
        Ok(AdapterFiles::new(config, weights))
    }

    /// Whether there is a plain directory of that name, usable or not.
    pub(super) async fn directory_exists(&self, name: &str) -> Result<bool, StoreError> {
        match self.check_local(name).await {
            Ok(true) => Ok(self.head(&directory_path(name, CONFIG_FILE)).await?.is_some()),
            Ok(false) => Ok(false),
            Err(StoreError::Refused(_)) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// The plain directory's version, if there is a plain directory of that name; `num_parts` is how many sub-directories its
    /// config named when it was last read.
    pub(super) async fn directory_version(
        &self,
        name: &str,
        num_parts: usize,
    ) -> Result<Option<DirectoryVersion>, StoreError> {
        let Some(mut version) = self.files_version(name).await? else { return Ok(None) };
        for number in 0..num_parts {
            // Where one is missing the version is another, which reading the directory explains.
            let Some(part) = self.files_version(&format!("{name}/{number}")).await? else { break };
            version.parts.push(part);
        }
        Ok(Some(version))
    }

    /// The version of the two files in a directory, if it has them.
    async fn files_version(&self, name: &str) -> Result<Option<DirectoryVersion>, StoreError> {
        if !self.check_local(name).await? {
            return Ok(None);
        }
        let Some(config) = self.head(&directory_path(name, CONFIG_FILE)).await? else { return Ok(None) };
        for file in WEIGHTS_FILES {
            if let Some(weights) = self.head(&directory_path(name, file)).await? {
                let (config, weights) = (FileVersion::of(&config), FileVersion::of(&weights));
                return Ok(Some(DirectoryVersion { config, weights, weights_file: file, parts: Vec::new() }));
            }
        }
        Err(StoreError::FilesNotFound(format!("the directory of adapter `{name}` has no {WEIGHTS_FILE}")))
    }

    /// Whether local files of that name may be opened, if they are there; object stores have no links to check.
    async fn check_local(&self, name: &str) -> Result<bool, StoreError> {
        let Some(roots) = &self.roots else { return Ok(true) };
        let (roots, name) = (roots.clone(), name.to_owned());
        let checked = tokio::task::spawn_blocking(move || local::check_directory(&roots, &name));
        checked.await.map_err(StoreError::storage)?
    }

    /// Reads the plain directory of that name; all files are of one version.
    pub(super) async fn read_directory(&self, name: &str) -> Result<DirectoryContent, StoreError> {
        let not_found = || StoreError::NotFound(name.to_owned());
        let mut num_parts = 0;
        for _ in 0..READ_TRIES {
            let version = self.directory_version(name, num_parts).await?.ok_or_else(not_found)?;
            let settled = version.settled();
            if version.size() > self.adapter_bytes_max as u64 {
                return Err(StoreError::TooLarge { limit: self.adapter_bytes_max });
            }
            let Some(mut files) = self.read_files(name, &version).await? else { continue };
            let named = adapter::num_parts(&files.config);
            if named != num_parts {
                // Now that it is known which files there are, once more.
                num_parts = named;
                continue;
            }
            if version.parts.len() < num_parts {
                let missing = format!("{}/{CONFIG_FILE}", version.parts.len());
                return Err(StoreError::FilesNotFound(format!("the directory of adapter `{name}` has no {missing}")));
            }
            for (number, part) in version.parts.iter().enumerate() {
                files.parts.extend(self.read_files(&format!("{name}/{number}"), part).await?);
            }
            if self.directory_version(name, num_parts).await?.as_ref() == Some(&version) {
                return Ok(DirectoryContent { files, version, settled });
            }
        }
        Err(StoreError::FilesNotFound(format!("the directory of adapter `{name}` changes while it is read")))
    }

    /// The two files of a directory; `None` when one is gone.
    async fn read_files(&self, name: &str, version: &DirectoryVersion) -> Result<Option<AdapterFiles>, StoreError> {
        let config = self.read(&directory_path(name, CONFIG_FILE), self.adapter_bytes_max).await?;
        let weights = self.read(&directory_path(name, version.weights_file), self.adapter_bytes_max).await?;
        Ok(config.zip(weights).map(|(config, weights)| AdapterFiles::new(config, weights)))
    }

    async fn head(&self, path: &Path) -> Result<Option<ObjectMeta>, StoreError> {
        match self.store.head(path).await {
            Ok(meta) => Ok(Some(meta)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn read(&self, path: &Path, bytes_max: usize) -> Result<Option<Bytes>, StoreError> {
        let object = match self.store.get(path).await {
            Ok(object) => object,
            Err(Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if object.meta.size > bytes_max as u64 {
            return Err(StoreError::TooLarge { limit: bytes_max });
        }
        Ok(Some(object.bytes().await?))
    }
}

/// Unix time in seconds.
pub(super) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

async fn stage(store: &dyn ObjectStore, files: &AdapterFiles) -> Result<Staged, StoreError> {
    let mut staged = Staged::default();
    for files in iter::once(files).chain(&files.parts) {
        let weights = Path::from_iter([BLOBS, STAGING, &format!("{:032x}", rand::random::<u128>())]);
        staged.0.push((files.config.clone(), weights.clone()));
        if let Err(error) = store.put(&weights, files.weights.clone().into()).await {
            discard(store, staged).await;
            return Err(error.into());
        }
    }
    Ok(staged)
}

async fn discard(store: &dyn ObjectStore, staged: Staged) {
    for (_, path) in staged.0 {
        match store.delete(&path).await {
            Ok(()) | Err(Error::NotFound { .. }) => {}
            Err(error) => tracing::warn!(%path, %error, "staged weights not removed"),
        }
    }
}

fn record_path(name: &str, number: u64) -> Path {
    Path::from_iter([CATALOG, name, &format!("{number}.json")])
}

fn blob_path(digest: &ContentDigest) -> Path {
    Path::from_iter([BLOBS, "sha256", &digest.to_string()])
}

/// A file of the directory `name`, or of a sub-directory with `/` before its name.
fn directory_path(name: &str, file: &str) -> Path {
    Path::from_iter(name.split('/').chain([file]))
}
