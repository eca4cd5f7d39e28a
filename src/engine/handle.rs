//! The rest of the server's view of the engine thread.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use tokio::sync::mpsc::Receiver;

use super::{EngineConfig, GenerationEvent, GenerationRequest, SubmitError};
use crate::adapter::LoweredAdapter;
use crate::metrics::{AdapterActivity, Metrics};
use crate::model::{Batch, RopeLengthRule};

/// What the engine needs of a model; the real one, or a fake in simulations.
pub trait Forward: Send {
    /// Sizes that bound scheduling.
    fn limits(&self) -> ForwardLimits;

    /// Logits (rows, vocab) in f32 of `batch.logit_rows`; writes the batch's keys and values.
    ///
    /// # Errors
    /// When the device fails.
    fn forward(&mut self, batch: &Batch) -> Result<Tensor>;

    /// An adapter's tensors on the model's device.
    ///
    /// # Errors
    /// When the device is out of memory.
    fn adapter_to_device(&self, adapter: &LoweredAdapter) -> Result<LoweredAdapter>;
}

/// Sizes of the model and its KV cache that bound scheduling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardLimits {
    /// Rows of the logits.
    pub vocab_size: usize,
    /// Longest context in tokens.
    pub context_tokens_max: usize,
    /// KV blocks there are.
    pub num_blocks: usize,
    /// How RoPE depends on the context length (for the prefix cache).
    pub rope_length_rule: RopeLengthRule,
}

/// A handle to the engine thread; clones share it.
#[derive(Clone)]
pub struct EngineHandle {}

impl EngineHandle {
    /// Starts the engine thread.
    pub fn start(_forward: Box<dyn Forward>, _config: EngineConfig, _metrics: Arc<Metrics>) -> Self {
        unimplemented!()
    }

    /// Queues a sequence. Dropping the receiver cancels it.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing is queued then.
    pub fn submit(&self, _request: GenerationRequest) -> std::result::Result<Receiver<GenerationEvent>, SubmitError> {
        unimplemented!()
    }

    /// Sizes of the model that the engine runs.
    pub fn limits(&self) -> ForwardLimits {
        unimplemented!()
    }

    /// Adapters on the device, and waited for.
    pub fn adapter_activity(&self) -> AdapterActivity {
        unimplemented!()
    }

    /// Sequences running and waiting.
    pub fn in_flight(&self) -> usize {
        unimplemented!()
    }

    /// Refuses new requests from now on; running ones go on.
    pub fn stop_accepting(&self) {
        unimplemented!()
    }

    /// Cancels what still runs and joins the thread (blocks until its current step ends).
    pub fn shut_down(&self) {
        unimplemented!()
    }
}
