//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde_json::{Value as Json, json};

use super::body::{Body, Fields};
use super::generate::{self, Job, Step};
use super::layers::RequestId;
use super::logprobs::TokenNames;
use super::sampling::Sampling;
use super::selector::Selector;
use super::sse::{Envelope, Shape, Streaming, blocking, name_ignored, respond};
use super::{ApiError, AppState};
use crate::adapter::LoadedAdapter;

/// Tokens per answer where the request does not say; OpenAI's default.
const MAX_TOKENS_DEFAULT: usize = 16;

/// Answers a completion request.
pub(super) async fn completions(
    State(state): State<AppState>,
    Extension(RequestId(id)): Extension<RequestId>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    generate::check_open(&state)?;
    let mut fields = Fields::parse(&body)?;
    let selector = Selector::parse(&mut fields, &state.model.name)?;
    let mut request = Request::parse(&mut fields, &state)?;
    generate::check_sequences(&state, request.prompts.len(), request.sampling.n)?;
    let adapter = selector.load(&state).await?;

    let (prompts, add_special_tokens) = (std::mem::take(&mut request.prompts), request.add_special_tokens);
    let echo = request.echo;
    let encoded = blocking(&state, move |state| encode(state, prompts, add_special_tokens, echo)).await??;
    let (prompts, texts) = encoded.into_iter().unzip();
    let job = request.job(prompts, adapter, &state);
    generate::check(&state, &job, ("prompt", "max_tokens"))?;

    let envelope = Envelope::new(format!("cmpl-{id}"), selector.shown);
    let counts = (job.sampling.n, job.prompts.iter().map(Vec::len).sum());
    let answers = generate::submit(&state, &job, "prompt")?;
    let shape = CompletionShape::new(&state, &request, job, texts, answers.len());
    let response = respond(answers, counts, envelope, shape, request.streaming).await?;
    Ok(name_ignored(response, &fields))
}

struct Request {
    prompts: Vec<Prompt>,
    sampling: Sampling,
    max_tokens: Option<usize>,
    logprobs: Option<usize>,
    echo: bool,
    add_special_tokens: bool,
    streaming: Streaming,
}

impl Request {
    fn parse(fields: &mut Fields<'_>, state: &AppState) -> Result<Self, ApiError> {
        fields.refuse("suffix", &[json!("")])?;
        fields.refuse("prompt_embeds", &[])?;
        let Some(Prompts(prompts)) = fields.take("prompt")? else {
            return Err(ApiError::bad_request("prompt", "`prompt` is missing"));
        };
        let echo = fields.flag("echo", false)?;
        let max_tokens: Option<usize> = fields.take("max_tokens")?;
        let max_tokens = max_tokens.or(fields.take("max_completion_tokens")?);
        if max_tokens == Some(0) && !echo {
            return Err(ApiError::bad_request("max_tokens", "`max_tokens` must be at least 1 unless `echo` is set"));
        }
        let logprobs: Option<usize> = fields.take("logprobs")?;
        check_logprobs("logprobs", logprobs, state)?;
        Ok(Self {
            prompts,
            sampling: Sampling::parse(fields, &state.model, state.engine.limits().vocab_size)?,
            max_tokens,
            logprobs,
            echo,
            add_special_tokens: fields.flag("add_special_tokens", true)?,
            streaming: Streaming::parse(fields)?,
        })
    }

    fn job(&self, prompts: Vec<Vec<u32>>, adapter: Option<Arc<LoadedAdapter>>, state: &AppState) -> Job {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        // The default gives way to the context; a number that was asked for does not.
        let context = generate::context_left(state, adapter.as_deref());
        let default = MAX_TOKENS_DEFAULT.min(context.saturating_sub(longest)).max(1);
        Job {
            prompts,
            adapter,
            sampling: self.sampling.clone(),
            max_tokens: Some(self.max_tokens.unwrap_or(default)),
            logprobs: self.logprobs,
            prompt_logprobs: self.logprobs.filter(|_| self.echo),
        }
    }
}

/// Refuses more alternatives than the server reports.
pub(super) fn check_logprobs(field: &str, found: Option<usize>, state: &AppState) -> Result<(), ApiError> {
    let limit = state.config.logprobs_max;
    match found {
        Some(found) if found > limit => {
            let message = format!("`{field}` must be at most {limit} (server.logprobs_max), found {found}");
            Err(ApiError::bad_request(field, message))
        }
        _ => Ok(()),
    }
}

/// Token ids of each prompt, with its text where that is to be repeated.
fn encode(
    state: &AppState,
    prompts: Vec<Prompt>,
    add_special_tokens: bool,
    echo: bool,
) -> Result<Vec<(Vec<u32>, String)>, ApiError> {
    let encode = |prompt| match prompt {
        Prompt::Text(text) => Ok((generate::encode(state, "prompt", &text, add_special_tokens)?, text)),
        Prompt::Ids(ids) => {
            // Too many ids are refused later, without their text.
            let shown = echo && ids.len() <= generate::context(state);
            let text = if shown { state.text.decode(&ids, true) } else { String::new() };
            Ok((ids, text))
        }
    };
    prompts.into_iter().map(encode).collect()
}

/// Writes completions.
struct CompletionShape {
    names: TokenNames,
    with_logprobs: bool,
    with_ids: bool,
    echo: bool,
    n: usize,
    /// Token ids and text of each prompt.
    prompts: Vec<(Vec<u32>, String)>,
    /// Per answer: where its next token's text begins; `None` until it was begun.
    offsets: Vec<Option<usize>>,
}

impl CompletionShape {
    fn new(state: &AppState, request: &Request, job: Job, texts: Vec<String>, num_answers: usize) -> Self {
        let sampling = &request.sampling;
        let text = Arc::clone(&state.text);
        Self {
            names: TokenNames { text, as_ids: sampling.return_tokens_as_token_ids },
            with_logprobs: request.logprobs.is_some(),
            with_ids: sampling.return_token_ids,
            echo: request.echo,
            n: sampling.n,
            prompts: job.prompts.into_iter().zip(texts).collect(),
            offsets: vec![None; num_answers],
        }
    }

    fn choice(&mut self, step: &Step) -> Json {
        let (prompt, prompt_text) = &self.prompts[step.index / self.n];
        let first = self.offsets[step.index].is_none();
        let echo = first && self.echo;
        let mut offset = self.offsets[step.index].unwrap_or(0);
        let logprobs = if self.with_logprobs {
            let scores = step.prompt.iter().filter(|_| echo).flatten();
            let prompt_tokens = prompt.iter().zip(scores).map(|(&id, score)| (id, score.as_ref()));
            let tokens = step.tokens.iter().map(|token| (token.id, token.logprob.as_ref()));
            self.names.completion(prompt_tokens.chain(tokens), &mut offset)
        } else {
            Json::Null
        };
        self.offsets[step.index] = Some(offset);
        let text = if echo { format!("{prompt_text}{}", step.text) } else { step.text.clone() };
        let mut choice = json!({
            "index": step.index, "text": text, "logprobs": logprobs,
            "finish_reason": step.end.as_ref().map(|end| end.reason),
            "stop_reason": step.end.as_ref().map_or(Json::Null, |end| end.stop_reason.clone()),
        });
        if self.with_ids {
            choice["token_ids"] = step.tokens.iter().map(|token| Json::from(token.id)).collect();
            choice["prompt_token_ids"] = if first { json!(prompt) } else { Json::Null };
        }
        choice
    }
}

impl Shape for CompletionShape {
    const OBJECTS: (&'static str, &'static str) = ("text_completion", "text_completion");

    fn whole(&mut self, step: &Step) -> Json {
        self.choice(step)
    }

    fn chunks(&mut self, step: &Step) -> Vec<Json> {
        let first = self.offsets[step.index].is_none();
        let tokens_shown = (self.with_logprobs || self.with_ids) && !step.tokens.is_empty();
        let shown = !step.text.is_empty() || step.end.is_some() || tokens_shown || (first && self.echo);
        if shown { vec![self.choice(step)] } else { Vec::new() }
    }
}

/// One prompt.
#[derive(Debug, PartialEq)]
enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

/// `prompt` in its four forms: text, list of texts, token ids, list of lists of token ids.
#[derive(Debug, PartialEq)]
struct Prompts(Vec<Prompt>);

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Prompts;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string, a list of strings, a list of token ids or a list of such lists")
            }

            fn visit_str<E>(self, s: &str) -> Result<Prompts, E> {
                Ok(Prompts(vec![Prompt::Text(s.to_owned())]))
            }

            /// The first entry says what the others must be.
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompts, A::Error> {
                let mut prompts = Vec::new();
                match seq.next_element::<Entry>()? {
                    None => return Err(A::Error::custom("must not be empty")),
                    Some(Entry::Id(first)) => {
                        let mut ids = vec![first];
                        while let Some(id) = seq.next_element()? {
                            ids.push(id);
                        }
                        prompts.push(Prompt::Ids(ids));
                    }
                    Some(Entry::Text(first)) => {
                        prompts.push(Prompt::Text(first));
                        while let Some(text) = seq.next_element()? {
                            prompts.push(Prompt::Text(text));
                        }
                    }
                    Some(Entry::Ids(first)) => {
                        prompts.push(Prompt::Ids(first));
                        while let Some(ids) = seq.next_element()? {
                            prompts.push(Prompt::Ids(ids));
                        }
                    }
                }
                Ok(Prompts(prompts))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// The first entry of a list of prompts or token ids.
enum Entry {
    Id(u32),
    Text(String),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Entry;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }

            fn visit_u64<E: serde::de::Error>(self, id: u64) -> Result<Entry, E> {
                u32::try_from(id).map(Entry::Id).map_err(|_| E::custom(format!("{id} is not a token id")))
            }

            fn visit_i64<E: serde::de::Error>(self, id: i64) -> Result<Entry, E> {
                Err(E::custom(format!("{id} is not a token id")))
            }

            fn visit_str<E>(self, s: &str) -> Result<Entry, E> {
                Ok(Entry::Text(s.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Entry, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = seq.next_element()? {
                    ids.push(id);
                }
                Ok(Entry::Ids(ids))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_come_in_four_forms() {
        let check = |body: &str, expected: Vec<Prompt>| {
            let body = format!("{{\"prompt\": {body}}}");
            let Prompts(prompts) = Fields::parse(body.as_bytes()).unwrap().take("prompt").unwrap().unwrap();
            assert_eq!(prompts, expected, "{body}");
        };
        let text = |s: &str| Prompt::Text(s.to_owned());
        check(r#""a""#, vec![text("a")]);
        check(r#"["a", "b"]"#, vec![text("a"), text("b")]);
        check("[1, 2]", vec![Prompt::Ids(vec![1, 2])]);
        check("[[1], [], [2, 3]]", vec![Prompt::Ids(vec![1]), Prompt::Ids(vec![]), Prompt::Ids(vec![2, 3])]);
    }

    #[test]
    fn malformed_prompts_name_the_entry() {
        let check = |body: &str, param: &str| {
            let body = format!("{{\"prompt\": {body}}}");
            let error = Fields::parse(body.as_bytes()).unwrap().take::<Prompts>("prompt").unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {}", error.message);
        };
        check("[]", "prompt");
        check("5", "prompt");
        check("{}", "prompt");
        check("[-1]", "prompt[0]");
        check("[1, -1]", "prompt[1]");
        check("[1.5]", "prompt[0]");
        check("[4294967296]", "prompt[0]");
        check(r#"["a", 1]"#, "prompt[1]");
        check(r#"[[1], "a"]"#, "prompt[1]");
        check(r#"[[1], [1, "a"]]"#, "prompt[1][1]");
        check("[[[1]]]", "prompt[0][0]");
    }
}
