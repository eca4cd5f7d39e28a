//! The engine: one ordinary thread that batches sequences continuously.

mod config;
mod handle;
mod request;

pub use config::EngineConfig;
pub use handle::{EngineHandle, Forward, ForwardLimits};
pub use request::{
    Finish, FinishReason, GenerationEvent, GenerationRequest, SamplingParams, SubmitError, TokenEvent, TokenLogprob,
};

use crate::model::Model;
use std::sync::Arc;

/// Runs the real model behind [`Forward`].
pub struct ModelRunner {}

impl ModelRunner {
    /// Takes the KV cache's memory.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(_model: Arc<Model>, _config: &EngineConfig) -> candle_core::Result<Self> {
        unimplemented!()
    }
}

impl Forward for ModelRunner {
    fn limits(&self) -> ForwardLimits {
        unimplemented!()
    }

    fn forward(&mut self, _batch: &crate::model::Batch) -> candle_core::Result<candle_core::Tensor> {
        unimplemented!()
    }

    fn adapter_to_device(
        &self,
        _adapter: &crate::adapter::LoweredAdapter,
    ) -> candle_core::Result<crate::adapter::LoweredAdapter> {
        unimplemented!()
    }
}
