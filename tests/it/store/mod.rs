//! The store from outside: what survives, what others see, what stays within its bounds.

mod bounds;
mod concurrency;
mod directories;
mod history;
mod publishing;

use std::path::Path;

use patchbay::store::{Store, StoreConfig, StoreError};

use crate::store_support::value;

async fn served(store: &Store, reference: &str) -> f32 {
    value(&store.resolve(reference).await.expect(reference))
}

async fn check_absent(store: &Store, reference: &str) {
    let error = store.resolve(reference).await.expect_err(reference);
    assert!(matches!(error, StoreError::NotFound(_)), "{reference}: {error}");
}

/// The error and everything below it, as a log shows it.
fn chain(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

fn bounded(root: &Path, host_bytes_max: usize, merged_bytes_max: usize) -> StoreConfig {
    StoreConfig { root: root.to_owned(), host_bytes_max, merged_bytes_max, ..StoreConfig::default() }
}
