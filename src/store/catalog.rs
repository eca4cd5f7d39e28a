//! Names, generations and loaded adapters: the store as the rest of the server sees it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::{StreamExt, stream};
use object_store::local::LocalFileSystem;
use serde::Serialize;

use super::admission::Admission;
use super::load::{Flights, Loader};
use super::local::{self, Roots};
use super::memory::{Bytes, Generation, Memory};
use super::name::{Reference, check_name, parse_reference};
use super::numbers::Numbers;
use super::objects::{DirectoryVersion, Objects};
use super::publish::UploadSlot;
use super::record::{ContentDigest, Current, NameState, Published, Record, Source};
use super::workers::Workers;
use super::{StoreConfig, StoreError};
use crate::adapter::{AdapterFiles, BaseWeights, Formats, LoadedAdapter, LowerReport};
use crate::metrics::Metrics;

/// Names looked up at once when all are listed.
const LOOKUPS_MAX: usize = 16;

/// Adapters at rest and in host memory.
pub struct Store {
    pub(super) shared: Arc<Shared>,
}

/// What loads, which outlive the request that started them, share with the store.
pub(super) struct Shared {
    pub(super) config: StoreConfig,
    pub(super) objects: Objects,
    pub(super) roots: Roots,
    pub(super) memory: Memory,
    pub(super) loader: Loader,
    pub(super) loads: Admission,
    pub(super) uploads: Admission,
    pub(super) workers: Workers,
    pub(super) flights: Flights,
    pub(super) composing: Arc<tokio::sync::Mutex<()>>,
    pub(super) metrics: Arc<Metrics>,
    known: Mutex<Known>,
}

/// What this process has read about names.
#[derive(Default)]
pub(super) struct Known {
    /// The catalogue, as far as it was read. Only names that have a record.
    pub(super) names: HashMap<String, NameState>,
    /// Plain directories that were loaded once. Only names that have a directory.
    pub(super) directories: HashMap<String, KnownDirectory>,
    /// The last load per name. Only names that were loaded once and not removed since.
    pub(super) facts: HashMap<String, LoadFacts>,
    /// Numbers of names for this process.
    numbers: Numbers,
}

/// A plain directory as it was last loaded.
#[derive(Clone, Debug)]
pub(super) struct KnownDirectory {
    pub(super) version: DirectoryVersion,
    /// Whether an equal version means equal content.
    pub(super) settled: bool,
    /// What was loaded; its number counts the contents this process has seen.
    pub(super) generation: Generation,
}

/// What a load found.
#[derive(Clone, Debug)]
pub(super) struct LoadFacts {
    pub(super) generation: Generation,
    pub(super) report: LowerReport,
    pub(super) load_ms: f64,
}

/// What a reference means now.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Target {
    /// A generation of the catalogue.
    Published(Generation),
    /// The plain directory of that name in this version.
    Directory { name: String, version: DirectoryVersion },
}

/// How to publish or load an adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PublishOptions {
    /// Serve it merged into dense weights.
    pub merge: bool,
    /// Only when the name's current generation is this (0: only when the name is new).
    pub expected_generation: Option<u64>,
    /// Only when nothing is published under the name. A plain directory does not count: it is what was not published.
    pub must_be_new: bool,
}

/// State of one name.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AdapterStatus {
    /// Name.
    pub name: String,
    /// Current generation, counted from 1.
    pub generation: u64,
    /// Content digest, hexadecimal; empty for a plain directory that was not loaded since it last changed.
    pub digest: String,
    /// Unix time of the generation's publication, seconds; for a plain directory its modification time.
    pub created: u64,
    /// Whether it is served merged into dense weights.
    pub merge: bool,
    /// What lowering found; absent until the adapter was loaded once by this process.
    pub report: Option<LowerReport>,
    /// Milliseconds the last load took: reading, checking, lowering.
    pub load_ms: Option<f64>,
    /// Whether the lowered form is in host memory now.
    pub loaded: bool,
    /// Requests that hold this generation now.
    pub leases: usize,
}

impl Store {
    /// Opens the store and reads its catalogue.
    ///
    /// # Errors
    /// When the root cannot be read or created.
    pub async fn open(
        config: StoreConfig,
        base: Arc<dyn BaseWeights>,
        formats: Formats,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, StoreError> {
        let (root, extra) = (config.root.clone(), config.extra_roots.clone());
        let opened = tokio::task::spawn_blocking(move || -> Result<_, StoreError> {
            if !root.is_dir() {
                std::fs::create_dir_all(&root).map_err(StoreError::storage)?;
            }
            let roots = Roots::new(&root, &extra).map_err(StoreError::storage)?;
            let objects = LocalFileSystem::new_with_prefix(roots.store_root())?.with_fsync(true);
            Ok((roots, objects))
        });
        let (roots, objects) = opened.await.map_err(StoreError::storage)??;
        let limit = Bytes { host: config.host_bytes_max, own: config.merged_bytes_max };
        let memory = Memory::new(limit, metrics.clone());
        let shared = Shared {
            objects: Objects::new(Arc::new(objects), Some(roots.clone()), config.upload_bytes_max),
            roots,
            loader: Loader { base, formats, memory: memory.clone() },
            memory,
            loads: Admission::new(config.loads_max, config.load_queue_max),
            uploads: Admission::new(config.loads_max, config.load_queue_max),
            // Beside the loads an upload for each may have to be unpacked, and the weights of each are staged.
            workers: Workers::new(3 * config.loads_max)?,
            flights: Flights::default(),
            composing: Arc::default(),
            metrics,
            known: Mutex::default(),
            config,
        };
        let store = Arc::new(Self { shared: Arc::new(shared) });
        store.shared.objects.discard_old().await?;
        let adapters = store.list().await?;
        tracing::info!(root = %store.shared.roots.store_root().display(), adapters = adapters.len(), "adapter store");
        Ok(store)
    }

    /// The adapter that `name` or `name@generation` means now, loaded; concurrent loads of one generation are one.
    ///
    /// # Errors
    /// See [`StoreError`]. What cannot be a name is `NotFound`.
    pub async fn resolve(&self, name: &str) -> Result<Arc<LoadedAdapter>, StoreError> {
        let reference = parse_reference(name)?;
        let target = self.shared.find(reference.name, reference.generation).await?;
        let adapter = match self.shared.loaded(&target) {
            Some(adapter) => adapter,
            None => self.shared.load_once(&target).await?,
        };
        match reference.generation {
            Some(generation) if generation != adapter.generation => Err(StoreError::NotFound(name.to_owned())),
            _ => Ok(adapter),
        }
    }

    /// Largest upload in bytes.
    pub fn upload_bytes_max(&self) -> usize {
        self.shared.config.upload_bytes_max
    }

    /// Waits for leave to receive an upload; to be taken before the body is read and kept until it is published.
    ///
    /// # Errors
    /// `Busy`.
    pub async fn upload_slot(&self) -> Result<UploadSlot, StoreError> {
        Ok(UploadSlot::new(self.shared.clone(), self.shared.uploads.admit().await?))
    }

    /// As [`UploadSlot::publish`], with a slot of its own.
    ///
    /// # Errors
    /// See [`StoreError`]; the name's state is unchanged then.
    pub async fn publish(
        &self,
        name: &str,
        files: AdapterFiles,
        options: &PublishOptions,
    ) -> Result<AdapterStatus, StoreError> {
        self.upload_slot().await?.publish(name, files, options).await
    }

    /// Publishes the adapter directory at `path`, which must lie inside a configured root; its content is copied. This goes
    /// on when nobody waits for it any more.
    ///
    /// # Errors
    /// See [`StoreError`]; the name's state is unchanged then.
    pub async fn load_path(
        &self,
        name: &str,
        path: &Path,
        options: &PublishOptions,
    ) -> Result<AdapterStatus, StoreError> {
        check_name(name)?;
        // The files are in memory until they are published, as those of an upload are.
        let slot = self.upload_slot().await?;
        let (shared, name, path, options) = (self.shared.clone(), name.to_owned(), path.to_owned(), options.clone());
        slot.run(async move {
            let (roots, limit) = (shared.roots.clone(), shared.config.upload_bytes_max);
            let files = tokio::task::spawn_blocking(move || local::read_path(&roots, &path, limit));
            let files = files.await.map_err(StoreError::storage)?.inspect_err(|_| shared.count_error(&name))?;
            shared.publish(&name, files, &options, Source::Path).await
        })
        .await
    }

    /// Retires a name; running requests finish on what they hold.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn remove(&self, name: &str) -> Result<(), StoreError> {
        check_name(name).map_err(|_| StoreError::NotFound(name.to_owned()))?;
        self.shared.retire(name).await
    }

    /// Every name's state, sorted by name. A name whose state cannot be read is left out and logged.
    ///
    /// # Errors
    /// When storage fails.
    pub async fn list(&self) -> Result<Vec<AdapterStatus>, StoreError> {
        let names = self.shared.objects.names().await?;
        let found = stream::iter(names).map(|name| async move {
            match self.shared.describe(&name, None).await {
                Ok(status) => Some(status),
                Err(StoreError::NotFound(_)) => None,
                Err(error) => {
                    let source = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(adapter = name, %error, source, "adapter left out of the list");
                    None
                }
            }
        });
        let found: Vec<AdapterStatus> =
            found.buffered(LOOKUPS_MAX).filter_map(|status| async { status }).collect().await;
        let listed: Vec<&str> = found.iter().map(|status| status.name.as_str()).collect();
        self.shared.known().numbers.list(&listed);
        Ok(found)
    }

    /// The name that has this number: names are numbered from 0 as they are listed, sorted at the start, and keep their
    /// number while they exist. No other name gets it as long as the process runs.
    pub fn name_of(&self, number: usize) -> Option<String> {
        self.shared.known().numbers.name(number).map(str::to_owned)
    }

    /// The number of a name; `None` until it was listed.
    pub fn number_of(&self, name: &str) -> Option<usize> {
        self.shared.known().numbers.number(name)
    }

    /// One name's state.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn status(&self, name: &str) -> Result<AdapterStatus, StoreError> {
        check_name(name).map_err(|_| StoreError::NotFound(name.to_owned()))?;
        self.shared.describe(name, None).await
    }

    /// The state of what `name` or `name@generation` means now, without loading it.
    ///
    /// # Errors
    /// See [`StoreError`]. What cannot be a name is `NotFound`.
    pub async fn status_of(&self, reference: &str) -> Result<AdapterStatus, StoreError> {
        let Reference { name, generation } = parse_reference(reference)?;
        let status = self.shared.describe(name, generation).await?;
        // A directory has one generation, which is not looked up by its number.
        match generation {
            Some(number) if number != status.generation => Err(StoreError::NotFound(reference.to_owned())),
            _ => Ok(status),
        }
    }
}

impl Shared {
    /// What this process knows. Never held across an await.
    pub(super) fn known(&self) -> MutexGuard<'_, Known> {
        // Every change under the lock is one insertion or removal, complete before anything that could panic.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads and folds every record of the name written so far, by whatever process; answers the last one's number and
    /// what the name means.
    pub(super) async fn refresh(&self, name: &str) -> Result<(u64, Current), StoreError> {
        loop {
            let (last, current) = {
                let known = self.known();
                known.names.get(name).map_or((0, Current::Directory), |state| (state.last, state.current))
            };
            let Some(record) = self.objects.record(name, last + 1).await? else { return Ok((last, current)) };
            self.fold(name, last + 1, &record);
        }
    }

    /// Folds a record in, unless another task has done so; adapters it supersedes leave memory.
    pub(super) fn fold(&self, name: &str, number: u64, record: &Record) {
        let keep = {
            let mut known = self.known();
            let state = known.names.entry(name.to_owned()).or_default();
            if state.last + 1 != number {
                return;
            }
            state.apply(record);
            match state.current {
                Current::Directory => return,
                Current::Published(number) => {
                    state.published.get(&number).map(|published| published.generation(name, number))
                }
                Current::Retired => {
                    known.facts.remove(name);
                    None
                }
            }
        };
        self.memory.supersede(name, keep.as_ref());
        if keep.is_none() {
            self.metrics.forget_adapter(name);
        }
    }

    /// What a reference means now.
    pub(super) async fn find(&self, name: &str, generation: Option<u64>) -> Result<Target, StoreError> {
        let not_found =
            || StoreError::NotFound(generation.map_or(name.to_owned(), |number| format!("{name}@{number}")));
        match self.refresh(name).await?.1 {
            Current::Published(current) => {
                let number = generation.unwrap_or(current);
                let published = self.known().published(name, number).ok_or_else(not_found)?;
                Ok(Target::Published(published.generation(name, number)))
            }
            Current::Retired => Err(not_found()),
            Current::Directory => {
                let num_parts = self.known().directories.get(name).map_or(0, |directory| directory.version.num_parts());
                let version = self.objects.directory_version(name, num_parts).await?.ok_or_else(not_found)?;
                Ok(Target::Directory { name: name.to_owned(), version })
            }
        }
    }

    /// The generation a target surely is, without reading its files.
    fn generation(&self, target: &Target) -> Option<Generation> {
        match target {
            Target::Published(generation) => Some(generation.clone()),
            Target::Directory { name, version } => {
                let known = self.known();
                let directory = known.directories.get(name)?;
                (directory.settled && directory.version == *version).then(|| directory.generation.clone())
            }
        }
    }

    /// The target's adapter if it is loaded.
    fn loaded(&self, target: &Target) -> Option<Arc<LoadedAdapter>> {
        self.memory.get(&self.generation(target)?)
    }

    /// The state of a name's generation; of the current one where none is given.
    pub(super) async fn describe(&self, name: &str, generation: Option<u64>) -> Result<AdapterStatus, StoreError> {
        match self.find(name, generation).await? {
            Target::Published(generation) => {
                let published = self.known().published(name, generation.number);
                Ok(self.status_of(&generation, published.map_or(0, |published| published.created)))
            }
            Target::Directory { version, .. } => {
                let directory = self.known().directories.get(name).cloned();
                let number = directory.as_ref().map_or(1, |directory| directory.generation.number);
                match directory.filter(|directory| directory.version == version) {
                    Some(directory) => Ok(self.status_of(&directory.generation, version.modified())),
                    None => Ok(AdapterStatus::unread(name, number, version.modified())),
                }
            }
        }
    }

    /// The state of a generation that was read once.
    pub(super) fn status_of(&self, generation: &Generation, created: u64) -> AdapterStatus {
        let facts = self.known().facts.get(&generation.name).filter(|facts| facts.generation == *generation).cloned();
        let leases = self.memory.leases(generation);
        AdapterStatus {
            generation: generation.number,
            digest: generation.digest.to_string(),
            merge: generation.merge,
            report: facts.as_ref().map(|facts| facts.report.clone()),
            load_ms: facts.map(|facts| facts.load_ms),
            loaded: leases.is_some(),
            leases: leases.unwrap_or_default(),
            ..AdapterStatus::unread(&generation.name, generation.number, created)
        }
    }

    /// Counts a failed load under the adapter's name, or under none where the name is not in use.
    pub(super) fn count_error(&self, name: &str) {
        let label = {
            let known = self.known();
            let published = known.names.get(name).is_some_and(|state| state.current != Current::Retired);
            published || known.directories.contains_key(name)
        };
        let label = if label { self.metrics.claim_adapter_label(name) } else { "other" };
        self.metrics.adapter_errors.with_label_values(&[label]).inc();
    }
}

impl Known {
    /// What the name means, as far as is known.
    pub(super) fn current(&self, name: &str) -> Current {
        self.names.get(name).map_or(Current::Directory, |state| state.current)
    }

    fn published(&self, name: &str, number: u64) -> Option<Published> {
        self.names.get(name)?.published.get(&number).copied()
    }

    /// The generation that a plain directory with this content is, or would be the next time it is counted.
    pub(super) fn directory_generation(&self, name: &str, digest: ContentDigest) -> Generation {
        let state = self.names.get(name).filter(|state| state.current == Current::Directory);
        let last = state.map_or(0, |state| state.last);
        let number = match self.directories.get(name).map(|directory| &directory.generation) {
            None => 1,
            Some(known) if known.digest == digest => known.number,
            Some(known) => known.number + 1,
        };
        Generation { name: name.to_owned(), number: number.max(last), digest, merge: false }
    }
}

impl Published {
    fn generation(&self, name: &str, number: u64) -> Generation {
        Generation { name: name.to_owned(), number, digest: self.digest, merge: self.merge }
    }
}

impl AdapterStatus {
    /// The state of an adapter that this process has not read.
    fn unread(name: &str, generation: u64, created: u64) -> Self {
        Self {
            name: name.to_owned(),
            generation,
            digest: String::new(),
            created,
            merge: false,
            report: None,
            load_ms: None,
            loaded: false,
            leases: 0,
        }
    }
}
