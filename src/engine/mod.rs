//! The engine: one ordinary thread that batches sequences continuously.
//!
//! A request's life: [`Admission`] checks it in the request task and it crosses to the engine thread ([`EngineHandle`]);
//! `scheduler` picks sequences and token counts, with `block_manager` and `slot_manager` keeping the accounts in
//! integers; `prepare` lays the tokens out; [`Forward`] computes; `sampler` draws; [`Engine::step`] commits and sends
//! the events back. The engine knows no text, no files and no adapter kind.

mod admission;
mod block_manager;
mod config;
mod forward;
mod handle;
mod logprobs;
mod observe;
mod prefix;
mod prepare;
mod request;
mod runner;
mod sampler;
mod scheduler;
mod sequence;
mod slot_manager;
mod status;
mod step;

pub use admission::{Admission, Submission};
pub use config::{EngineConfig, EngineConfigError, KvDtypeChoice};
pub use forward::{Forward, ForwardLimits};
pub use handle::EngineHandle;
pub use request::{
    Finish, FinishReason, GenerationEvent, GenerationRequest, SamplingParams, SubmitError, TokenEvent, TokenLogprob,
};
pub use runner::{ModelRunner, RunnerError};
pub use step::Engine;
