//! Adapters at rest: blobs, generations, names. The one module that reads adapter bytes.

mod catalog;
mod config;

pub use catalog::{AdapterStatus, PublishOptions, Store, StoreError};
pub use config::StoreConfig;
