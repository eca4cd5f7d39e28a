//! The `[adapters]` section: where adapters lie and how much of them is held in memory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Where adapters lie and the bounds on what is loaded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// Store root: uploads are kept here, and `<root>/<name>/adapter_config.json` directories are served lazily.
    pub root: PathBuf,
    /// Further directories that a load request may name paths in.
    pub extra_roots: Vec<PathBuf>,
    /// Adapters loaded before the server reports ready.
    pub preload: Vec<String>,
    /// Lowered adapters kept in host memory, in bytes; least recently used ones leave first, leased ones stay.
    pub host_bytes_max: usize,
    /// Dense weight copies (merged adapters and kinds that need them), in bytes over all loaded adapters.
    pub merged_bytes_max: usize,
    /// Largest upload, and largest unpacked adapter, in bytes.
    pub upload_bytes_max: usize,
    /// Loads running at once; one more waits, and beyond `load_queue_max` waiting is answered 429.
    pub loads_max: usize,
    /// Loads waiting at most.
    pub load_queue_max: usize,
    /// Adapters one request may name to act together.
    pub composition_parts_max: usize,
    /// Compositions kept ready; the least recently used leave first, those in use stay.
    pub compositions_max: usize,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            root: PathBuf::from("adapters"),
            extra_roots: Vec::new(),
            preload: Vec::new(),
            host_bytes_max: 2 << 30,
            merged_bytes_max: 2 << 30,
            upload_bytes_max: 1 << 30,
            loads_max: 2,
            load_queue_max: 64,
            composition_parts_max: 8,
            compositions_max: 64,
        }
    }
}
