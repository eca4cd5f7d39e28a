//! What crosses the border between request tasks and the engine thread.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use thiserror::Error;

use crate::adapter::LoadedAdapter;

/// One sequence to generate. A request for `n` answers submits `n` of these.
#[derive(Clone, Debug)]
pub struct GenerationRequest {
    /// Prompt token ids, at least one.
    pub prompt: Vec<u32>,
    /// The adapter, leased for as long as the sequence lives; `None` is the bare base.
    pub adapter: Option<Arc<LoadedAdapter>>,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Tokens to generate at most; 0 only scores the prompt.
    pub max_tokens: usize,
    /// Token ids that end the sequence (the ending token is reported but carries no text).
    pub stop_token_ids: Vec<u32>,
    /// Never end on a stop token id.
    pub ignore_eos: bool,
    /// Report this many most likely alternatives with each generated token; `None` reports no logprobs at all.
    pub logprobs: Option<usize>,
    /// Report this many alternatives for each prompt token; `None` reports none. Skips reading the prefix cache.
    pub prompt_logprobs: Option<usize>,
    /// Separates prefix-cache entries of tenants that must not share them.
    pub cache_salt: Option<String>,
    /// Set by the request task before it drops its receiver when it has all it wants (a stop string): the sequence then
    /// counts as finished, not as cancelled.
    pub satisfied: Arc<AtomicBool>,
}

/// How tokens are drawn from the logits. The values are checked at the door (`server`).
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass, in (0, 1].
    pub top_p: f32,
    /// Keep the k most likely tokens; `None` keeps all.
    pub top_k: Option<usize>,
    /// Drop tokens below this fraction of the most likely one's probability, in [0, 1].
    pub min_p: f32,
    /// Subtracted once from the logit of every token already generated, in [-2, 2].
    pub presence_penalty: f32,
    /// Subtracted from a token's logit once per time it was generated, in [-2, 2].
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in the prompt or the output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of this sequence's own random numbers; `None` takes a fresh one.
    pub seed: Option<u64>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: None,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

/// What a request task receives, in order: at most one `Prompt`, then `Token`s, then one of the others.
#[derive(Clone, Debug)]
pub enum GenerationEvent {
    /// Logprobs of the prompt's tokens; the first has none.
    Prompt(Vec<Option<TokenLogprob>>),
    /// One generated token.
    Token(TokenEvent),
    /// The sequence ended.
    Finished(Finish),
    /// The engine could not go on with this sequence; the text is safe to show.
    Failed(String),
    /// The engine was shut down before the sequence ended.
    ShutDown,
}

/// One generated token.
#[derive(Clone, Debug)]
pub struct TokenEvent {
    /// Its id.
    pub id: u32,
    /// Present when the request asked for logprobs.
    pub logprob: Option<TokenLogprob>,
    /// Prompt tokens whose KV came from the prefix cache.
    pub cached_tokens: usize,
}

/// Natural-log probability of a token under the unmodified logits, and the most likely alternatives in falling order.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Of the token itself.
    pub logprob: f32,
    /// Rank of the token among all, counted from 1.
    pub rank: usize,
    /// (token id, logprob), most likely first.
    pub top: Vec<(u32, f32)>,
}

/// How and with what a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// Prompt tokens, without what the adapter puts before them.
    pub prompt_tokens: usize,
    /// Prompt tokens whose KV came from the prefix cache.
    pub cached_tokens: usize,
    /// Generated tokens, an ending stop token included.
    pub generated_tokens: usize,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token id.
    Stop,
    /// `max_tokens` or the context length.
    Length,
}

/// Why a request was not accepted.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SubmitError {
    /// The waiting queue is full; try again later.
    #[error("the waiting queue is full ({limit} requests)")]
    QueueFull {
        /// The bound.
        limit: usize,
    },
    /// The prompt alone does not fit.
    #[error("the prompt has {found} tokens, the limit is {limit}")]
    PromptTooLong {
        /// Tokens in the prompt.
        found: usize,
        /// Most tokens a prompt may have, beside what its adapter puts before it.
        limit: usize,
    },
    /// The server is shutting down.
    #[error("the server is shutting down")]
    ShuttingDown,
}
