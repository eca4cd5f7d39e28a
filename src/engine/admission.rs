//! The door: what may enter the engine. Runs in the request tasks, so that refusals cost the engine nothing.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc::{self, Receiver};

use super::sequence::{EVENTS_BESIDE_TOKENS, Sequence, SequenceSetup};
use super::status::{InFlight, Status};
use super::{EngineConfig, ForwardLimits, GenerationEvent, GenerationRequest, SubmitError};
use crate::metrics::Metrics;

/// Decides which requests may enter the engine.
pub struct Admission {
    limits: ForwardLimits,
    queue_max: usize,
    block_tokens: usize,
    accepting: AtomicBool,
    status: Arc<Status>,
    metrics: Arc<Metrics>,
}

/// An admitted request on its way to the engine.
pub struct Submission(pub(super) Box<Sequence>);

impl Admission {
    /// `limits.context_tokens_max` is what both the model and the KV cache can hold.
    pub(super) fn new(
        limits: ForwardLimits,
        config: &EngineConfig,
        status: Arc<Status>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let EngineConfig { queue_max, block_tokens, .. } = *config;
        Self { limits, queue_max, block_tokens, accepting: AtomicBool::new(true), status, metrics }
    }

    /// Checks a request and gives it a place in the waiting queue. A submission that is dropped keeps its place: hand
    /// it to the engine.
    ///
    /// # Errors
    /// See [`SubmitError`]; no place is taken then.
    ///
    /// # Panics
    /// When the prompt is empty or has a token beyond the vocabulary: that is checked where prompts are made.
    pub fn admit(&self, request: GenerationRequest) -> Result<(Submission, Receiver<GenerationEvent>), SubmitError> {
        assert!(!request.prompt.is_empty(), "a prompt has at least one token");
        let in_vocab = |token: &u32| (*token as usize) < self.limits.vocab_size;
        assert!(request.prompt.iter().all(in_vocab), "a prompt's tokens are in the vocabulary");
        self.check(&request).inspect_err(|error| {
            let reason = match error {
                SubmitError::QueueFull { .. } => "queue_full",
                SubmitError::PromptTooLong { .. } => "prompt_too_long",
                SubmitError::ShuttingDown => "shutting_down",
            };
            self.metrics.admission_rejections.with_label_values(&[reason]).inc();
        })?;
        let sources = request.adapter.iter().flat_map(|adapter| adapter.sources());
        self.metrics.for_adapter_labels(sources.map(|adapter| adapter.name.as_str()), |label| {
            self.metrics.adapter_requests.with_label_values(&[label]).inc();
        });

        let context = self.context_tokens_max(&request);
        let max_tokens = request.max_tokens.min(context - request.prompt.len());
        let (events, receiver) = mpsc::channel(max_tokens + EVENTS_BESIDE_TOKENS);
        let setup = SequenceSetup {
            max_tokens,
            rope_length_rule: self.limits.rope_length_rule,
            // The standard library's keys for hash maps are the system's random numbers.
            fresh_seed: RandomState::new().hash_one(request.prompt.len()),
            events,
            in_flight: InFlight::new(&self.status),
        };
        Ok((Submission(Box::new(Sequence::new(request, setup))), receiver))
    }

    fn check(&self, request: &GenerationRequest) -> Result<(), SubmitError> {
        if !self.is_accepting() {
            return Err(SubmitError::ShuttingDown);
        }
        // A request that generates needs room for one token more.
        let limit = self.context_tokens_max(request).saturating_sub(request.max_tokens.min(1));
        let found = request.prompt.len();
        if found > limit {
            return Err(SubmitError::PromptTooLong { found, limit });
        }
        if !self.status.try_wait(self.queue_max) {
            return Err(SubmitError::QueueFull { limit: self.queue_max });
        }
        Ok(())
    }

    /// Tokens that prompt and answer can have beside what the adapter puts before them. Every context that the adapter needs
    /// fits the cache beside the others.
    fn context_tokens_max(&self, request: &GenerationRequest) -> usize {
        let Some(adapter) = &request.adapter else { return self.limits.context_tokens_max };
        let cache_tokens = self.limits.num_blocks / adapter.lowered.num_contexts() * self.block_tokens;
        self.limits.context_tokens_max.min(cache_tokens).saturating_sub(adapter.lowered.num_leading())
    }

    /// Sizes of the model and cache.
    pub(super) fn limits(&self) -> ForwardLimits {
        self.limits
    }

    /// The counts behind the queue's bound.
    pub(super) fn status(&self) -> &Arc<Status> {
        &self.status
    }

    /// Whether new requests are taken.
    pub(super) fn is_accepting(&self) -> bool {
        self.accepting.load(Ordering::Acquire)
    }

    /// Refuses everything from now on.
    pub(super) fn stop(&self) {
        self.accepting.store(false, Ordering::Release);
    }
}
