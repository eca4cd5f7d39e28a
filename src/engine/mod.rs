//! The engine: one ordinary thread that batches sequences continuously.

mod config;
mod handle;
mod request;

pub use config::EngineConfig;
pub use handle::{EngineHandle, Forward, ForwardLimits};
pub use request::{
    Finish, FinishReason, GenerationEvent, GenerationRequest, SamplingParams, SubmitError, TokenEvent, TokenLogprob,
};
