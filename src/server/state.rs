//! What every handler can reach.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::ServerConfig;
use crate::engine::EngineHandle;
use crate::metrics::Metrics;
use crate::model::GenerationDefaults;
use crate::store::{Admission, Store};
use crate::text::Text;

/// The parts of the running server; clones share them.
#[derive(Clone)]
pub struct AppState {
    /// The engine.
    pub engine: EngineHandle,
    /// Adapters.
    pub store: Arc<Store>,
    /// Tokenizer and chat template.
    pub text: Arc<Text>,
    /// How many requests may turn text into tokens or back at once, and how many more may wait for that.
    pub encodings: Arc<Admission>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// The `[server]` section.
    pub config: Arc<ServerConfig>,
    /// The base model as clients see it.
    pub model: Arc<ServedModel>,
    /// Set once the preload list is resident; `/ready` answers 200 from then on, until draining.
    pub ready: Arc<AtomicBool>,
    /// Set while draining: new requests are answered 503.
    pub draining: Arc<AtomicBool>,
}

/// The base model as clients see it.
#[derive(Clone, Debug)]
pub struct ServedModel {
    /// Name.
    pub name: String,
    /// Unix time of the start, seconds.
    pub created: u64,
    /// Longest context in tokens.
    pub context_tokens_max: usize,
    /// Sampling defaults and end tokens.
    pub generation: GenerationDefaults,
}
