//! Answers on the wire: the objects that OpenAI's clients read, whole or as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json as JsonBody;
use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, BoxStream, Stream, StreamExt};
use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use super::body::Fields;
use super::generate::{Answer, Step, Usage, collect, merge};
use super::{ApiError, AppState};

/// Names the request's fields that nothing here knows.
const IGNORED_FIELDS: HeaderName = HeaderName::from_static("x-patchbay-ignored-fields");
/// Ignored fields named at most.
const IGNORED_MAX: usize = 20;
/// Comments are sent this often while nothing else is, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Fields without influence on the answer; nothing is said about them.
const HARMLESS: &[&str] = &[
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
    "spaces_between_special_tokens",
    "request_id",
];

/// How a kind of request writes its answers.
pub(super) trait Shape: Send + 'static {
    /// `object` of a whole answer, and of a chunk.
    const OBJECTS: (&'static str, &'static str);

    /// A whole answer, as an entry of `choices`.
    fn whole(&mut self, step: &Step) -> Json;

    /// What a step adds, as entries of `choices` of one chunk each; none where it shows nothing.
    fn chunks(&mut self, step: &Step) -> Vec<Json>;

    /// Fields beside `choices`, for the whole answer or the next chunk.
    fn beside_choices(&mut self) -> Option<(&'static str, Json)> {
        None
    }
}

/// What is the same in all parts of an answer.
pub(super) struct Envelope {
    /// Prefixed request id.
    pub id: String,
    /// The model as the request named it.
    pub model: String,
    created: u64,
}

/// Whether and how to stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Streaming {
    on: bool,
    include_usage: bool,
    continuous_usage: bool,
}

impl Streaming {
    /// Reads `stream` and `stream_options`.
    pub(super) fn parse(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        #[derive(Default, Deserialize)]
        struct Options {
            include_usage: Option<bool>,
            continuous_usage_stats: Option<bool>,
        }
        let on = fields.flag("stream", false)?;
        let options: Option<Options> = fields.take("stream_options")?;
        if options.is_some() && !on {
            return Err(ApiError::bad_request("stream_options", "`stream_options` goes with `stream: true` only"));
        }
        let options = options.unwrap_or_default();
        let include_usage = options.include_usage.unwrap_or(false);
        Ok(Self {
            on,
            include_usage,
            continuous_usage: include_usage && options.continuous_usage_stats.unwrap_or(false),
        })
    }
}

impl Envelope {
    /// An envelope made now.
    pub(super) fn new(id: String, model: String) -> Self {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self { id, model, created }
    }

    fn object(&self, object: &str, choices: Vec<Json>) -> Map<String, Json> {
        let fields = [
            ("id", json!(self.id)),
            ("object", json!(object)),
            ("created", json!(self.created)),
            ("model", json!(self.model)),
            ("choices", Json::Array(choices)),
        ];
        fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// A response to `answers` of a request with `n` answers per prompt and `prompt_tokens` over all prompts.
pub(super) async fn respond<S: Shape>(
    answers: Vec<Answer>,
    (n, prompt_tokens): (usize, usize),
    envelope: Envelope,
    mut shape: S,
    streaming: Streaming,
) -> Result<Response, ApiError> {
    let mut usage = Usage { prompt_tokens, ..Usage::default() };
    if streaming.on {
        let live =
            Live { steps: merge(answers), n, usage, envelope, shape, streaming, ready: VecDeque::new(), over: false };
        return Ok(live.into_response());
    }
    let steps = collect(answers).await?;
    let choices = steps.iter().map(|step| shape.whole(step)).collect();
    for step in &steps {
        usage.add(step, n);
    }
    let mut body = envelope.object(S::OBJECTS.0, choices);
    body.extend(shape.beside_choices().map(|(name, value)| (name.to_owned(), value)));
    body.insert("usage".to_owned(), usage.json());
    Ok(JsonBody(Json::Object(body)).into_response())
}

/// An answer that is being streamed. Dropping it cancels its sequences.
struct Live<S> {
    steps: BoxStream<'static, Result<Step, ApiError>>,
    n: usize,
    usage: Usage,
    envelope: Envelope,
    shape: S,
    streaming: Streaming,
    ready: VecDeque<String>,
    over: bool,
}

impl<S: Shape> Live<S> {
    fn into_response(self) -> Response {
        let keep_alive = KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive");
        let mut response = Sse::new(self.events()).keep_alive(keep_alive).into_response();
        // Asks reverse proxies not to hold chunks back.
        response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
        response
    }

    fn events(self) -> impl Stream<Item = Result<Event, Infallible>> {
        stream::unfold(self, |mut live| async {
            let data = live.next().await?;
            Some((Ok(Event::default().data(data)), live))
        })
    }

    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Some(data);
            }
            if self.over {
                return None;
            }
            match self.steps.next().await {
                Some(Ok(step)) => self.step(&step),
                Some(Err(error)) => {
                    self.ready.push_back(error.body().to_string());
                    self.end();
                }
                None => {
                    if self.streaming.include_usage {
                        let mut chunk = self.envelope.object(S::OBJECTS.1, Vec::new());
                        chunk.insert("usage".to_owned(), self.usage.json());
                        self.ready.push_back(Json::Object(chunk).to_string());
                    }
                    self.end();
                }
            }
        }
    }

    fn step(&mut self, step: &Step) {
        self.usage.add(step, self.n);
        for choice in self.shape.chunks(step) {
            let mut chunk = self.envelope.object(S::OBJECTS.1, vec![choice]);
            chunk.extend(self.shape.beside_choices().map(|(name, value)| (name.to_owned(), value)));
            if self.streaming.continuous_usage {
                chunk.insert("usage".to_owned(), self.usage.json());
            }
            self.ready.push_back(Json::Object(chunk).to_string());
        }
    }

    fn end(&mut self) {
        self.ready.push_back("[DONE]".to_owned());
        self.over = true;
        // Ends whatever other answers of the request still run.
        self.steps = stream::empty().boxed();
    }
}

/// Says in a header which fields had no effect.
pub(super) fn name_ignored(mut response: Response, fields: &Fields<'_>) -> Response {
    let ignored = fields.ignored();
    let plain =
        |name: &&String| name.len() <= 64 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    let names: Vec<&str> = ignored
        .iter()
        .filter(|name| !HARMLESS.contains(&name.as_str()))
        .filter(plain)
        .take(IGNORED_MAX)
        .map(String::as_str)
        .collect();
    if let (false, Ok(value)) = (names.is_empty(), HeaderValue::from_str(&names.join(","))) {
        response.headers_mut().insert(IGNORED_FIELDS, value);
    }
    response
}

/// Runs work on text, which may take long, on the blocking pool. What a client left behind while it waited never runs.
///
/// # Errors
/// 429 when too many wait already.
pub(super) async fn blocking<T: Send + 'static>(
    state: &AppState,
    work: impl FnOnce(&AppState) -> T + Send + 'static,
) -> Result<T, ApiError> {
    let permit = state.encodings.admit().await;
    let permit = permit.map_err(|_| ApiError::too_many("too many prompts wait to be tokenized; try again"))?;
    let state = state.clone();
    let work = move || {
        // Kept until the work ends, though the client may be gone by then.
        let _permit = permit;
        work(&state)
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result),
        // Not cancelled, so it panicked: let the request's own panic handling see it.
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}
