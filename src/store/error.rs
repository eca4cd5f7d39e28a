//! Why a store operation was refused.

use std::sync::Arc;

use thiserror::Error;

use crate::adapter::AdapterError;

/// Why a store operation was refused. Clones share their causes: requests that wait for one load fail alike.
#[derive(Clone, Debug, Error)]
pub enum StoreError {
    /// No such name or generation.
    #[error("adapter `{0}` does not exist")]
    NotFound(String),
    /// The name cannot be one.
    #[error("`{0}` is not an adapter name: 1 to 128 of A-Z a-z 0-9 . _ - are allowed, not starting with a dot")]
    InvalidName(String),
    /// The name is one that the store's own directories have.
    #[error("`{0}` is a reserved name")]
    ReservedName(String),
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
        /// Current generation; 0 where the name is not in use.
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
    /// The lowered form alone is over the bound on host memory.
    #[error("the loaded adapter takes {needed} bytes, more than {limit} (adapters.host_bytes_max)")]
    OverHostMemory {
        /// Bytes of the lowered form, or of as much of it as was counted.
        needed: usize,
        /// The bound.
        limit: usize,
    },
    /// More adapters than may act together.
    #[error("at most {limit} adapters can act together (adapters.composition_parts_max)")]
    TooManyParts {
        /// The bound.
        limit: usize,
    },
    /// An adapter that is to act together with itself; whether its strengths add up would be a guess.
    #[error("adapter `{0}` is named twice")]
    NamedTwice(String),
    /// Too many loads at once, or requests hold the memory that a load needs; try again later.
    #[error("too many adapter loads are under way, or running requests hold the memory for adapters")]
    Busy,
    /// The adapter was read and refused.
    #[error(transparent)]
    Refused(Arc<AdapterError>),
    /// Storage failed; the text is for the log, not for clients.
    #[error("adapter storage failed")]
    Storage(#[source] Arc<dyn std::error::Error + Send + Sync>),
}

impl StoreError {
    /// A storage failure for the log.
    pub(super) fn storage(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Storage(Arc::from(source.into()))
    }
}

impl From<AdapterError> for StoreError {
    fn from(error: AdapterError) -> Self {
        Self::Refused(Arc::new(error))
    }
}

impl From<object_store::Error> for StoreError {
    fn from(error: object_store::Error) -> Self {
        Self::storage(error)
    }
}
