//! From a checked request to text: submits its sequences to the engine and turns their events into steps of text.
//!
//! Streaming and not streaming read the same steps; the whole answer is the sum of its steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::http::StatusCode;
use futures::future::try_join_all;
use futures::stream::{self, BoxStream, StreamExt};
use serde_json::{Value as Json, json};
use tokio::sync::mpsc::Receiver;
use tokio::time::Instant;
use tracing::error;

use super::sampling::Sampling;
use super::{ApiError, AppState};
use crate::adapter::LoadedAdapter;
use crate::engine::{Finish, FinishReason, GenerationEvent, GenerationRequest, SubmitError, TokenEvent, TokenLogprob};
use crate::text::{Detokenizer, StopMatcher};

/// Seconds after which a client may try again while the server drains: another replica should have taken over.
const DRAINING_RETRY_S: u64 = 5;

/// A checked request: prompts, and what to do with them.
pub(super) struct Job {
    /// Token ids of each prompt.
    pub prompts: Vec<Vec<u32>>,
    /// The leased adapter; `None` is the bare base.
    pub adapter: Option<Arc<LoadedAdapter>>,
    /// How to sample.
    pub sampling: Sampling,
    /// Tokens per answer at most; `None` is whatever is left of the context.
    pub max_tokens: Option<usize>,
    /// Alternatives to report per generated token.
    pub logprobs: Option<usize>,
    /// Alternatives to report per prompt token.
    pub prompt_logprobs: Option<usize>,
}

/// What an answer's next event added to it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Step {
    /// Index of the answer, counted over all prompts.
    pub index: usize,
    /// New text.
    pub text: String,
    /// New tokens; their text may come later or, for a token that stopped the answer, never.
    pub tokens: Vec<Token>,
    /// Logprobs of the prompt, where they were asked for.
    pub prompt: Option<Vec<Option<TokenLogprob>>>,
    /// Present on the answer's last step.
    pub end: Option<End>,
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Token {
    /// Its id.
    pub id: u32,
    /// Where it was asked for.
    pub logprob: Option<TokenLogprob>,
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct End {
    /// `stop` or `length`.
    pub reason: &'static str,
    /// The stop string or stop token id; null for the model's own end and for `length`.
    pub stop_reason: Json,
    /// Prompt tokens whose KV came from the prefix cache.
    pub cached_tokens: usize,
}

/// Token counts of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// Over all prompts.
    pub prompt_tokens: usize,
    /// Over all answers.
    pub completion_tokens: usize,
    /// Over all prompts, by their first answer.
    pub cached_tokens: usize,
}

impl Usage {
    /// The object `usage`.
    pub(super) fn json(&self) -> Json {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        })
    }

    /// Counts a step of a request with `n` answers per prompt.
    pub(super) fn add(&mut self, step: &Step, n: usize) {
        self.completion_tokens += step.tokens.len();
        if let (Some(end), true) = (&step.end, step.index.is_multiple_of(n)) {
            self.cached_tokens += end.cached_tokens;
        }
    }
}

/// An answer under way. Dropping it cancels the sequence.
pub(super) struct Answer {
    index: usize,
    events: Receiver<GenerationEvent>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    stop_token_ids: Arc<[u32]>,
    own_stop_token_ids: Arc<[u32]>,
    include_stop: bool,
    last_token: Option<u32>,
    cached_tokens: usize,
    /// Tells the engine that the answer is complete although the sequence could go on.
    satisfied: Arc<AtomicBool>,
    deadline: Instant,
    over: bool,
}

/// Longest context in tokens that is left to prompt and answer beside what the adapter puts before the prompt.
pub(super) fn context_left(state: &AppState, adapter: Option<&LoadedAdapter>) -> usize {
    context(state).saturating_sub(adapter.map_or(0, |adapter| adapter.lowered.num_leading()))
}

/// Longest context in tokens: what the model can read and the KV cache can hold.
pub(super) fn context(state: &AppState) -> usize {
    state.model.context_tokens_max.min(state.engine.limits().context_tokens_max)
}

/// Refuses new generation while the server drains.
pub(super) fn check_open(state: &AppState) -> Result<(), ApiError> {
    if state.draining.load(Ordering::Acquire) { Err(shutting_down()) } else { Ok(()) }
}

fn shutting_down() -> ApiError {
    let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down");
    ApiError { retry_after_s: Some(DRAINING_RETRY_S), ..error }
}

/// Refuses more answers than a request may ask for, `n` per prompt, before anything is done for them.
pub(super) fn check_sequences(state: &AppState, num_prompts: usize, n: usize) -> Result<(), ApiError> {
    let (sequences, most) = (num_prompts.saturating_mul(n), state.config.sequences_per_request_max);
    if sequences > most {
        let message =
            format!("the request asks for {sequences} answers, the limit is {most} (server.sequences_per_request_max)");
        return Err(ApiError::bad_request("n", message));
    }
    Ok(())
}

/// Token ids of the text that the field `field` gives. Text that cannot fit the context is refused before it is read.
pub(super) fn encode(
    state: &AppState,
    field: &str,
    text: &str,
    add_special_tokens: bool,
) -> Result<Vec<u32>, ApiError> {
    let limit = context(state);
    if text.len() > state.text.bytes_max(limit) {
        let message = format!("the prompt has {} bytes, more than the limit of {limit} tokens can hold", text.len());
        return Err(ApiError::bad_request(field, message));
    }
    state.text.encode(text, add_special_tokens).map_err(|e| ApiError::bad_request(field, e.to_string()))
}

/// Checks a job against the model's and the server's bounds. `fields` are the names of the fields that hold the prompt
/// and the token limit.
pub(super) fn check(state: &AppState, job: &Job, fields: (&str, &str)) -> Result<(), ApiError> {
    let (prompt_field, max_field) = fields;
    let limits = state.engine.limits();
    for prompt in &job.prompts {
        if prompt.is_empty() {
            return Err(ApiError::bad_request(prompt_field, "the prompt must have at least one token"));
        }
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= limits.vocab_size) {
            let message = format!("token id {id} is not in the vocabulary of {} tokens", limits.vocab_size);
            return Err(ApiError::bad_request(prompt_field, message));
        }
        let context = context_left(state, job.adapter.as_deref());
        // A prompt that is only scored may fill the context; any other needs room for a token.
        let room = usize::from(job.max_tokens != Some(0));
        if prompt.len() + room > context {
            return Err(prompt_too_long(prompt_field, prompt.len(), context.saturating_sub(room)));
        }
        if let Some(max_tokens) = job.max_tokens.filter(|&max_tokens| max_tokens > context - prompt.len()) {
            let message = format!(
                "the model's context has {context} tokens, but the prompt has {} and `{max_field}` asks for {max_tokens} more",
                prompt.len()
            );
            return Err(ApiError::bad_request(max_field, message));
        }
    }
    Ok(())
}

fn prompt_too_long(field: &str, found: usize, limit: usize) -> ApiError {
    ApiError::bad_request(field, format!("the prompt has {found} tokens, the limit is {limit}"))
}

/// Submits every sequence of a job, or none.
pub(super) fn submit(state: &AppState, job: &Job, prompt_field: &str) -> Result<Vec<Answer>, ApiError> {
    check_open(state)?;
    let sampling = &job.sampling;
    let mut stop_token_ids = sampling.stop_token_ids.clone();
    if !sampling.ignore_eos {
        stop_token_ids.extend(&state.model.generation.eos_token_ids);
        stop_token_ids.extend(state.text.eos_token_id());
    }
    let own: Arc<[u32]> = sampling.stop_token_ids.clone().into();
    let all: Arc<[u32]> = stop_token_ids.clone().into();
    let deadline = Instant::now() + Duration::from_secs(state.config.request_timeout_s);
    let mut answers = Vec::new();
    for prompt in &job.prompts {
        let context = context_left(state, job.adapter.as_deref());
        let max_tokens = job.max_tokens.unwrap_or_else(|| context - prompt.len());
        state.metrics.request_params_max_tokens.observe(max_tokens as f64);
        for i in 0..sampling.n {
            let mut params = sampling.params.clone();
            params.seed = params.seed.map(|seed| seed.wrapping_add(i as u64));
            let satisfied = Arc::<AtomicBool>::default();
            let request = GenerationRequest {
                prompt: prompt.clone(),
                adapter: job.adapter.clone(),
                sampling: params,
                max_tokens,
                stop_token_ids: stop_token_ids.clone(),
                ignore_eos: stop_token_ids.is_empty(),
                logprobs: job.logprobs,
                prompt_logprobs: job.prompt_logprobs,
                cache_salt: sampling.cache_salt.clone(),
                satisfied: Arc::clone(&satisfied),
            };
            let events = state.engine.submit(request).map_err(|e| submit_error(&e, prompt_field))?;
            let stops = StopMatcher::new(sampling.stop.clone());
            answers.push(Answer {
                index: answers.len(),
                events,
                detokenizer: Detokenizer::new(Arc::clone(&state.text), prompt, sampling.skip_special_tokens),
                stops: if sampling.include_stop_str_in_output { stops.keeping_match() } else { stops },
                stop_token_ids: Arc::clone(&all),
                own_stop_token_ids: Arc::clone(&own),
                include_stop: sampling.include_stop_str_in_output,
                last_token: None,
                cached_tokens: 0,
                satisfied,
                deadline,
                over: false,
            });
        }
    }
    state.metrics.request_params_n.observe(sampling.n as f64);
    Ok(answers)
}

fn submit_error(error: &SubmitError, prompt_field: &str) -> ApiError {
    match error {
        SubmitError::QueueFull { .. } => ApiError::too_many(error.to_string()),
        SubmitError::PromptTooLong { found, limit } => prompt_too_long(prompt_field, *found, *limit),
        SubmitError::ShuttingDown => shutting_down(),
    }
}

/// Waits for all answers; each is the sum of its steps.
pub(super) async fn collect(answers: Vec<Answer>) -> Result<Vec<Step>, ApiError> {
    try_join_all(answers.into_iter().map(Answer::whole)).await
}

/// The steps of all answers, as they come.
pub(super) fn merge(answers: Vec<Answer>) -> BoxStream<'static, Result<Step, ApiError>> {
    let steps = answers.into_iter().map(|answer| {
        stream::unfold(answer, |mut answer| async {
            let step = answer.next().await.transpose()?;
            Some((step, answer))
        })
        .boxed()
    });
    stream::select_all(steps).boxed()
}

impl Answer {
    async fn whole(mut self) -> Result<Step, ApiError> {
        let mut whole = Step { index: self.index, ..Step::default() };
        while let Some(step) = self.next().await? {
            whole.text += &step.text;
            whole.tokens.extend(step.tokens);
            whole.prompt = step.prompt.or(whole.prompt);
            whole.end = step.end;
        }
        Ok(whole)
    }

    /// The next step; `None` after the last one.
    async fn next(&mut self) -> Result<Option<Step>, ApiError> {
        if self.over {
            return Ok(None);
        }
        let event = tokio::time::timeout_at(self.deadline, self.events.recv()).await;
        let step = match event {
            Err(_) => {
                Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "the request took too long (server.request_timeout_s)"))
            }
            Ok(None) => {
                error!("the engine dropped a sequence without an end");
                Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "the engine stopped"))
            }
            Ok(Some(GenerationEvent::Failed(message))) => {
                error!(%message, "generation failed");
                Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message))
            }
            Ok(Some(GenerationEvent::ShutDown)) => Err(shutting_down()),
            Ok(Some(GenerationEvent::Prompt(logprobs))) => Ok(Step { prompt: Some(logprobs), ..self.step() }),
            Ok(Some(GenerationEvent::Token(token))) => Ok(self.token(token)),
            Ok(Some(GenerationEvent::Finished(finish))) => Ok(self.finished(finish)),
        };
        self.over = step.as_ref().map_or(true, |step| step.end.is_some());
        if self.over {
            self.events.close();
        }
        step.map(Some)
    }

    fn step(&self) -> Step {
        Step { index: self.index, ..Step::default() }
    }

    fn token(&mut self, event: TokenEvent) -> Step {
        self.last_token = Some(event.id);
        self.cached_tokens = event.cached_tokens;
        let mut step = self.step();
        let ends = self.stop_token_ids.contains(&event.id);
        if !ends || self.include_stop {
            let piece = self.detokenizer.push(event.id);
            self.text(&mut step, &piece);
        }
        step.tokens.push(Token { id: event.id, logprob: event.logprob });
        step
    }

    fn finished(&mut self, finish: Finish) -> Step {
        let mut step = self.step();
        self.cached_tokens = finish.cached_tokens;
        let rest = self.detokenizer.finish();
        self.text(&mut step, &rest);
        if step.end.is_none() {
            step.text += &self.stops.finish();
            let own = self.last_token.filter(|id| self.own_stop_token_ids.contains(id));
            let (reason, stop_reason) = match finish.reason {
                FinishReason::Stop => ("stop", own.map_or(Json::Null, Json::from)),
                FinishReason::Length => ("length", Json::Null),
            };
            step.end = Some(End { reason, stop_reason, cached_tokens: self.cached_tokens });
        }
        step
    }

    /// Adds text to a step, up to a stop string.
    fn text(&mut self, step: &mut Step, piece: &str) {
        let found = self.stops.push(piece);
        step.text += &found.text;
        if let Some(index) = found.hit {
            let stop_reason = Json::from(self.stops.stop(index));
            step.end = Some(End { reason: "stop", stop_reason, cached_tokens: self.cached_tokens });
            self.satisfied.store(true, Ordering::Release);
        }
    }
}
