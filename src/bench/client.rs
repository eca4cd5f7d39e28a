//! The HTTP client: completions with a clock, and the few other routes that a measurement needs.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use bytes::Bytes;
use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};

use super::event::{self, Event, Lines};

/// Longest time to wait for a server to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Characters of a server's message that are kept.
const MESSAGE_CHARS_MAX: usize = 300;

/// Keys to a server.
#[derive(Clone, Default)]
pub struct Keys {
    /// For everything under `/v1`.
    pub api: Option<String>,
    /// For whatever changes adapters.
    pub admin: Option<String>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(keys)")
    }
}

/// A client of one server.
pub(super) struct Client {
    http: reqwest::Client,
    url: String,
    keys: Keys,
}

/// When the tokens of one answer arrived.
#[derive(Debug)]
pub(super) struct Timeline {
    /// When the request was sent.
    pub(super) sent: Instant,
    /// Arrival and number of tokens, for every event that brought some.
    pub(super) arrivals: Vec<(Instant, usize)>,
    /// Tokens by the server's own count.
    pub(super) total: Option<usize>,
}

impl Timeline {
    /// Tokens of the answer.
    pub(super) fn tokens(&self) -> usize {
        self.total.unwrap_or_else(|| self.arrivals.iter().map(|(_, tokens)| tokens).sum())
    }

    /// Milliseconds to the first token.
    pub(super) fn ttft_ms(&self) -> Option<f64> {
        self.arrivals.first().map(|(at, _)| milliseconds(*at - self.sent))
    }

    /// Milliseconds to the last token.
    pub(super) fn last_ms(&self) -> Option<f64> {
        self.arrivals.last().map(|(at, _)| milliseconds(*at - self.sent))
    }

    /// Milliseconds per token behind the first.
    pub(super) fn per_token_ms(&self) -> Option<f64> {
        let tokens = self.tokens();
        (tokens > 1).then(|| Some((self.last_ms()? - self.ttft_ms()?) / (tokens - 1) as f64)).flatten()
    }

    /// Milliseconds between each two neighbouring tokens; those that arrive together have none between them.
    pub(super) fn gaps_ms(&self) -> impl Iterator<Item = f64> {
        let together = self.arrivals.iter().flat_map(|(_, tokens)| std::iter::repeat_n(0.0, tokens - 1));
        together.chain(self.arrivals.windows(2).map(|pair| milliseconds(pair[1].0 - pair[0].0)))
    }
}

pub(super) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The body of a completion of token ids, greedy, streamed, of exactly `output_tokens` tokens. `prompt` is a JSON list.
pub(super) fn completion(model: &str, prompt: &str, output_tokens: usize) -> String {
    // The tokens of each chunk are asked for, because a chunk's text may stand for several or wait for the next.
    format!(
        "{{\"model\":{},\"prompt\":{prompt},\"max_tokens\":{output_tokens},\"temperature\":0,\"ignore_eos\":true,\
         \"stream\":true,\"stream_options\":{{\"include_usage\":true}},\"return_token_ids\":true}}",
        Value::from(model)
    )
}

impl Client {
    /// A client that gives up on a request after `silence_max` without a byte.
    pub(super) fn new(url: &str, keys: &Keys, silence_max: Duration) -> Result<Self> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .http1_only()
            .tcp_nodelay(true)
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(silence_max)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .context("making the client")?;
        Ok(Self { http, url: url.to_owned(), keys: keys.clone() })
    }

    /// Sends a completion and reads it to its end.
    ///
    /// # Errors
    /// The message of the server, or why there is none.
    pub(super) async fn complete(&self, body: String) -> Result<Timeline> {
        let request = self.request(Method::POST, "/v1/completions", self.keys.api.as_deref());
        let request = request.header("content-type", "application/json").body(body);
        let mut timeline = Timeline { sent: Instant::now(), arrivals: Vec::new(), total: None };
        let mut response = self.send(request).await?;
        let mut lines = Lines::default();
        let (mut failed, mut is_done) = (None, false);
        while let Some(bytes) = response.chunk().await.map_err(|e| self.unanswered(&e))? {
            let now = Instant::now();
            lines.push(&bytes, |data| match event::read(data) {
                Event::Tokens { new, total } => {
                    if new > 0 {
                        timeline.arrivals.push((now, new));
                    }
                    timeline.total = total.or(timeline.total);
                }
                Event::Failed(message) => failed = Some(message),
                Event::Done => is_done = true,
            });
        }
        match failed {
            Some(message) => Err(anyhow!(cut(&message))),
            None if !is_done => Err(anyhow!("the stream ended before it was complete")),
            None if timeline.arrivals.is_empty() => Err(anyhow!("the answer has no tokens")),
            None => Ok(timeline),
        }
    }

    /// Ids of the base model and of its adapters.
    pub(super) async fn models(&self) -> Result<(String, Vec<String>)> {
        let list = self.get("/v1/models").await?;
        let entries = list["data"].as_array().map(Vec::as_slice).unwrap_or_default();
        let id = |entry: &Value| entry["id"].as_str().map(str::to_owned);
        let base = entries.iter().find(|entry| entry["parent"].is_null()).and_then(id);
        let base = base.ok_or_else(|| anyhow!("{} lists no base model at /v1/models", self.url))?;
        let adapters = entries.iter().filter(|entry| !entry["parent"].is_null()).filter_map(id);
        Ok((base, adapters.collect()))
    }

    /// What `GET /v1/adapters` lists, which only Patchbay has.
    pub(super) async fn adapters(&self) -> Result<Vec<Value>> {
        let mut list = self.get("/v1/adapters").await?;
        match list["data"].take() {
            Value::Array(adapters) => Ok(adapters),
            _ => Err(anyhow!("{} has no list at /v1/adapters", self.url)),
        }
    }

    /// The server's version, where it tells.
    pub(super) async fn version(&self) -> Option<String> {
        self.get("/version").await.ok()?["version"].as_str().map(str::to_owned)
    }

    /// Uploads an archive under a name.
    pub(super) async fn upload(&self, name: &str, archive: Bytes) -> Result<()> {
        let request = self.admin(Method::PUT, name).header("content-type", "application/x-tar").body(archive);
        self.drained(request).await
    }

    /// Loads a directory on the server's disk under a name.
    pub(super) async fn load(&self, name: &str, path: &std::path::Path) -> Result<()> {
        let body = json!({ "path": path }).to_string();
        self.drained(self.admin(Method::POST, name).header("content-type", "application/json").body(body)).await
    }

    /// Removes a name.
    pub(super) async fn remove(&self, name: &str) -> Result<()> {
        self.drained(self.admin(Method::DELETE, name)).await
    }

    fn admin(&self, method: Method, name: &str) -> RequestBuilder {
        let key = self.keys.admin.as_deref().or(self.keys.api.as_deref());
        self.request(method, &format!("/v1/adapters/{name}"), key)
    }

    async fn drained(&self, request: RequestBuilder) -> Result<()> {
        self.send(request).await?.bytes().await.map(drop).map_err(|e| self.unanswered(&e))
    }

    async fn get(&self, path: &str) -> Result<Value> {
        let response = self.send(self.request(Method::GET, path, self.keys.api.as_deref())).await?;
        let body = response.bytes().await.map_err(|e| self.unanswered(&e))?;
        serde_json::from_slice(&body).with_context(|| format!("reading {path} of {}", self.url))
    }

    fn request(&self, method: Method, path: &str, key: Option<&str>) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.url));
        match key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// The answer, when its status says that it is one.
    async fn send(&self, request: RequestBuilder) -> Result<Response> {
        let response = request.send().await.map_err(|e| self.unanswered(&e))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.bytes().await.unwrap_or_default();
        let message = serde_json::from_slice(&body).ok().as_ref().and_then(event::error_message);
        let message = message.unwrap_or_else(|| String::from_utf8_lossy(&body).into_owned());
        Err(anyhow!("{}: {}", status.as_u16(), cut(&message)))
    }

    fn unanswered(&self, error: &reqwest::Error) -> anyhow::Error {
        // The innermost cause says what happened; the layers around it only that something did.
        let mut cause: &dyn std::error::Error = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        anyhow!("asking {}: {cause}", self.url)
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(MESSAGE_CHARS_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_two_neighbouring_tokens_have_a_gap() {
        let sent = Instant::now();
        let at = |ms| sent + Duration::from_millis(ms);
        let timeline = Timeline { sent, arrivals: vec![(at(10), 1), (at(14), 2), (at(20), 1)], total: None };
        let mut gaps: Vec<f64> = timeline.gaps_ms().map(f64::round).collect();
        gaps.sort_by(f64::total_cmp);
        assert_eq!((timeline.tokens(), gaps), (4, vec![0.0, 4.0, 6.0]));
        let whole = |ms: Option<f64>| (ms.unwrap() * 1e3).round() / 1e3;
        assert_eq!(whole(timeline.ttft_ms()), 10.0);
        assert_eq!(whole(timeline.last_ms()), 20.0);
        assert_eq!(whole(timeline.per_token_ms()), 3.333);
    }

    #[test]
    fn one_token_has_no_gap() {
        let sent = Instant::now();
        let timeline = Timeline { sent, arrivals: vec![(sent, 1)], total: Some(1) };
        assert_eq!((timeline.gaps_ms().count(), timeline.per_token_ms()), (0, None));
    }

    #[test]
    fn names_are_quoted() {
        let body: Value = serde_json::from_str(&completion("a\"b", "[1,2]", 3)).unwrap();
        assert_eq!((&body["model"], &body["prompt"], &body["max_tokens"]), (&json!("a\"b"), &json!([1, 2]), &json!(3)));
    }
}
