//! A lowered adapter under its name.

use std::sync::Arc;

use super::LoweredAdapter;

/// One generation of a named adapter, ready to run. Requests hold it by `Arc`: that is the lease.
#[derive(Debug)]
pub struct LoadedAdapter {
    /// Name it is served under.
    pub name: String,
    /// Generation of the name, counted from 1.
    pub generation: u64,
    /// SHA-256 over the adapter's content and over the options that change its effect; keys every cache.
    pub digest: [u8; 32],
    /// The normal form in host memory.
    pub lowered: LoweredAdapter,
    /// Bytes of all tensors in `lowered`.
    pub bytes: usize,
    /// What it was composed of; empty for an adapter that was loaded. It shares tensors with them, so they stay leased.
    pub parts: Vec<Arc<LoadedAdapter>>,
}

impl LoadedAdapter {
    /// The adapters that work for it: itself, or its parts. Whatever counts by name counts these.
    pub fn sources(&self) -> impl Iterator<Item = &LoadedAdapter> {
        std::iter::once(self).filter(|_| self.parts.is_empty()).chain(self.parts.iter().map(Arc::as_ref))
    }
}
