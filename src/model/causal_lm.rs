//! A loaded base model of any family.

use std::path::{Path, PathBuf};

use candle_core::{Result, Tensor};
use thiserror::Error;

use super::{Batch, KvCache, ModelConfig, ModelInfo};
use crate::adapter::{BaseWeights, LoweredAdapter, SiteId, SiteTable};

/// Why a model cannot be loaded.
#[derive(Debug, Error)]
pub enum ModelError {
    /// A tensor operation failed.
    #[error(transparent)]
    Compute(#[from] candle_core::Error),
}

/// A loaded base model.
pub struct Model {}

/// Finds the model directory: a local one as it is, a hub id by downloading it (with a progress bar).
///
/// # Errors
/// When neither exists.
pub fn locate(_config: &ModelConfig) -> std::result::Result<PathBuf, ModelError> {
    unimplemented!()
}

impl Model {
    /// Loads the model in `dir` onto the configured device.
    ///
    /// # Errors
    /// See [`ModelError`].
    pub fn load(_dir: &Path, _config: &ModelConfig) -> std::result::Result<Self, ModelError> {
        unimplemented!()
    }

    /// Facts about the model.
    pub fn info(&self) -> &ModelInfo {
        unimplemented!()
    }

    /// Runs one step: writes the batch's keys and values into `cache` and returns the logits of `batch.logit_rows`,
    /// (rows, vocab) in f32 on the model's device.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn forward(&self, _batch: &Batch, _cache: &mut KvCache) -> Result<Tensor> {
        unimplemented!()
    }

    /// Copies an adapter to the model's device (shares the tensors where it is there already).
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn adapter_to_device(&self, _adapter: &LoweredAdapter) -> Result<LoweredAdapter> {
        unimplemented!()
    }
}

impl BaseWeights for Model {
    fn sites(&self) -> &SiteTable {
        unimplemented!()
    }

    fn tied_embeddings(&self) -> bool {
        unimplemented!()
    }

    fn weight(&self, _site: SiteId) -> Result<Tensor> {
        unimplemented!()
    }

    fn bias(&self, _site: SiteId) -> Result<Option<Tensor>> {
        unimplemented!()
    }
}
