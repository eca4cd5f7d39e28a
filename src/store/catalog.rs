//! Names, generations and loaded adapters.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use serde::Serialize;
use thiserror::Error;

use super::StoreConfig;
use crate::adapter::{AdapterError, AdapterFiles, BaseWeights, LoadedAdapter, LowerReport};
use crate::metrics::Metrics;

/// Adapters at rest and in host memory.
pub struct Store {}

/// How to publish or load an adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PublishOptions {
    /// Serve it merged into dense weights.
    pub merge: bool,
    /// Only when the name's current generation is this (0: only when the name is new).
    pub expected_generation: Option<u64>,
    /// Only when the name is not yet taken.
    pub must_be_new: bool,
}

/// State of one name.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AdapterStatus {
    /// Name.
    pub name: String,
    /// Current generation, counted from 1.
    pub generation: u64,
    /// Content digest, hexadecimal.
    pub digest: String,
    /// Unix time of the generation's publication, seconds.
    pub created: u64,
    /// What lowering found; absent until the adapter was loaded once by this process.
    pub report: Option<LowerReport>,
    /// Milliseconds the last load took: reading, checking, lowering.
    pub load_ms: Option<f64>,
    /// Whether the lowered form is in host memory now.
    pub loaded: bool,
    /// Requests that hold this generation now.
    pub leases: usize,
}

/// Why a store operation was refused.
#[derive(Debug, Error)]
pub enum StoreError {
    /// No such name or generation.
    #[error("adapter `{0}` does not exist")]
    NotFound(String),
    /// The name cannot be one.
    #[error("`{0}` is not an adapter name: 1 to 128 of A-Z a-z 0-9 . _ - are allowed, not starting with a dot")]
    InvalidName(String),
    /// The name is taken and the request does not allow replacing it.
    #[error("adapter `{0}` is already loaded")]
    AlreadyExists(String),
    /// `expected_generation` does not hold.
    #[error("adapter `{name}` is at generation {found}, expected {expected}")]
    Conflict {
        /// Name.
        name: String,
        /// Generation the request expected.
        expected: u64,
        /// Current generation.
        found: u64,
    },
    /// A path outside the configured roots.
    #[error("the path is not inside a configured adapter root")]
    OutsideRoots,
    /// The path holds no adapter.
    #[error("{0}")]
    FilesNotFound(String),
    /// An upload that cannot be unpacked.
    #[error("{0}")]
    BadUpload(String),
    /// An upload over the bound.
    #[error("the adapter is larger than {limit} bytes (adapters.upload_bytes_max)")]
    TooLarge {
        /// The bound.
        limit: usize,
    },
    /// Too many loads at once; try again later.
    #[error("too many adapter loads are under way")]
    Busy,
    /// The adapter was read and refused.
    #[error(transparent)]
    Refused(#[from] AdapterError),
    /// Storage failed; the text is for the log, not for clients.
    #[error("adapter storage failed")]
    Storage(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Store {
    /// Opens the store and reads its catalogue.
    ///
    /// # Errors
    /// When the root cannot be read or created.
    pub async fn open(
        _config: StoreConfig,
        _base: Arc<dyn BaseWeights>,
        _dtype: DType,
        _metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, StoreError> {
        unimplemented!()
    }

    /// The adapter that `name` or `name@generation` means now, loaded; concurrent loads of one generation are one.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn resolve(&self, _name: &str) -> Result<Arc<LoadedAdapter>, StoreError> {
        unimplemented!()
    }

    /// Checks, lowers and stores uploaded files as a new generation of `name`.
    ///
    /// # Errors
    /// See [`StoreError`]; the name's state is unchanged then.
    pub async fn publish(
        &self,
        _name: &str,
        _files: AdapterFiles,
        _options: &PublishOptions,
    ) -> Result<AdapterStatus, StoreError> {
        unimplemented!()
    }

    /// Publishes the adapter directory at `path`, which must lie inside a configured root.
    ///
    /// # Errors
    /// See [`StoreError`]; the name's state is unchanged then.
    pub async fn load_path(
        &self,
        _name: &str,
        _path: &Path,
        _options: &PublishOptions,
    ) -> Result<AdapterStatus, StoreError> {
        unimplemented!()
    }

    /// Retires a name; running requests finish on what they hold.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn remove(&self, _name: &str) -> Result<(), StoreError> {
        unimplemented!()
    }

    /// Every name's state, sorted by name.
    ///
    /// # Errors
    /// When storage fails.
    pub async fn list(&self) -> Result<Vec<AdapterStatus>, StoreError> {
        unimplemented!()
    }

    /// One name's state.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn status(&self, _name: &str) -> Result<AdapterStatus, StoreError> {
        unimplemented!()
    }
}
