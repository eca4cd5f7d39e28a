//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde_json::value::RawValue;
use serde_json::{Map, Value as Json, json};

use super::body::{Body, Fields, parse_value};
use super::completions::check_logprobs;
use super::generate::{self, Job, Step};
use super::layers::RequestId;
use super::logprobs::TokenNames;
use super::sampling::Sampling;
use super::selector::Selector;
use super::sse::{Envelope, Shape, Streaming, blocking, name_ignored, respond};
use super::{ApiError, AppState};
use crate::text::{ChatPrompt, TextError};

/// Answers a chat request.
pub(super) async fn chat_completions(
    State(state): State<AppState>,
    Extension(RequestId(id)): Extension<RequestId>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    generate::check_open(&state)?;
    let mut fields = Fields::parse(&body)?;
    let selector = Selector::parse(&mut fields, &state.model.name)?;
    let conversation = Conversation::parse(&mut fields)?;
    let Request { sampling, max_tokens, max_field, logprobs, streaming } = Request::parse(&mut fields, &state)?;
    generate::check_sequences(&state, 1, sampling.n)?;
    let adapter = selector.load(&state).await?;

    let prompts = vec![blocking(&state, move |state| conversation.encode(state)).await??];
    let job = Job { prompts, adapter, sampling, max_tokens, logprobs, prompt_logprobs: None };
    generate::check(&state, &job, ("messages", max_field))?;

    let envelope = Envelope::new(format!("chatcmpl-{id}"), selector.shown);
    let counts = (job.sampling.n, job.prompts.iter().map(Vec::len).sum());
    let answers = generate::submit(&state, &job, "messages")?;
    let shape = ChatShape {
        names: TokenNames { text: Arc::clone(&state.text), as_ids: job.sampling.return_tokens_as_token_ids },
        num_top: job.logprobs,
        with_ids: job.sampling.return_token_ids,
        prompt: job.prompts.into_iter().next().filter(|_| job.sampling.return_token_ids),
        begun: vec![false; answers.len()],
    };
    let response = respond(answers, counts, envelope, shape, streaming).await?;
    Ok(name_ignored(response, &fields))
}

/// The fields that make the prompt; `/tokenize` reads them too.
pub(super) struct Conversation {
    prompt: ChatPrompt,
    add_special_tokens: bool,
}

impl Conversation {
    /// Reads and checks the fields.
    pub(super) fn parse(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        let Some(raws) = fields.take::<Vec<&RawValue>>("messages")? else {
            return Err(ApiError::bad_request("messages", "`messages` is missing"));
        };
        if raws.is_empty() {
            return Err(ApiError::bad_request("messages", "`messages` must not be empty"));
        }
        let messages = raws.iter().enumerate().map(|(i, raw)| message(&format!("messages[{i}]"), raw));
        let messages = messages.collect::<Result<Vec<Json>, ApiError>>()?;
        fields.refuse("chat_template", &[])?;
        fields.refuse("echo", &[json!(false)])?;
        let continue_final_message = fields.flag("continue_final_message", false)?;
        let add_generation_prompt = fields.flag("add_generation_prompt", !continue_final_message)?;
        if continue_final_message && add_generation_prompt {
            let message = "`continue_final_message` and `add_generation_prompt` exclude each other";
            return Err(ApiError::bad_request("continue_final_message", message));
        }
        let variables: Option<Map<String, Json>> = fields.take("chat_template_kwargs")?;
        let mut variables: Vec<(String, Json)> = variables.unwrap_or_default().into_iter().collect();
        if let Some(effort) = fields.take::<String>("reasoning_effort")? {
            variables.push(("reasoning_effort".to_owned(), Json::from(effort)));
        }
        let prompt = ChatPrompt {
            messages,
            tools: tools(fields)?,
            documents: fields.take::<Vec<Json>>("documents")?.map(Json::Array),
            add_generation_prompt,
            continue_final_message,
            variables,
        };
        Ok(Self { prompt, add_special_tokens: fields.flag("add_special_tokens", false)? })
    }

    /// Token ids of the prompt.
    pub(super) fn encode(&self, state: &AppState) -> Result<Vec<u32>, ApiError> {
        let text = state.text.render_chat(&self.prompt).map_err(|e| match e {
            TextError::Template(message) => {
                ApiError::bad_request("messages", format!("the chat template refused the messages: {message}"))
            }
            TextError::Input(_) | TextError::File { .. } => ApiError::bad_request("messages", e.to_string()),
        })?;
        generate::encode(state, "messages", &text, self.add_special_tokens)
    }
}

/// Tool descriptions for the template. Calls in the answer are not recognised, so the client must not expect any.
fn tools(fields: &mut Fields<'_>) -> Result<Option<Json>, ApiError> {
    fields.refuse("functions", &[json!([])])?;
    fields.refuse("function_call", &[json!("none")])?;
    let tools: Option<Vec<Json>> = fields.take("tools")?;
    let tools = tools.filter(|tools| !tools.is_empty());
    let choice: Option<Json> = fields.take("tool_choice")?;
    let none = json!("none");
    match (&tools, &choice) {
        (None, Some(choice)) if *choice != none && *choice != json!("auto") => {
            Err(ApiError::bad_request("tool_choice", "`tool_choice` needs `tools`, and calls cannot be forced here"))
        }
        (Some(_), choice) if choice.as_ref() != Some(&none) => {
            let field = if choice.is_some() { "tool_choice" } else { "tools" };
            let message = "tool calls are not recognised in answers; with `tool_choice: \"none\"` the tools are shown \
                           to the model and its answer is returned as text";
            Err(ApiError::bad_request(field, message))
        }
        _ => Ok(tools.map(Json::Array)),
    }
}

/// One message as templates expect it: a role, text as `content`, and whatever else it has.
fn message(path: &str, raw: &RawValue) -> Result<Json, ApiError> {
    let mut message: Map<String, Json> = parse_value(path, raw)?;
    let wrong = |field: &str, text: &str| {
        let path = format!("{path}.{field}");
        ApiError::bad_request(&path, format!("`{path}` {text}"))
    };
    match message.get("role") {
        Some(Json::String(role)) if !role.is_empty() => {}
        None | Some(Json::Null) => return Err(wrong("role", "is missing")),
        Some(_) => return Err(wrong("role", "must be a non-empty string")),
    }
    message.retain(|name, value| name == "content" || !value.is_null());
    let calls_tools = message.contains_key("tool_calls") || message.contains_key("function_call");
    let content = match message.remove("content") {
        Some(Json::String(text)) => text,
        None | Some(Json::Null) if calls_tools => String::new(),
        None | Some(Json::Null) => return Err(wrong("content", "is missing")),
        Some(Json::Array(parts)) => {
            let texts = parts.iter().enumerate().map(|(i, part)| part_text(&format!("{path}.content[{i}]"), part));
            texts.collect::<Result<Vec<&str>, ApiError>>()?.join("\n")
        }
        Some(_) => return Err(wrong("content", "must be a string or a list of parts")),
    };
    message.insert("content".to_owned(), Json::String(content));
    if let Some(Json::Array(calls)) = message.get_mut("tool_calls") {
        calls.iter_mut().for_each(parse_arguments);
    }
    Ok(Json::Object(message))
}

fn part_text<'a>(path: &str, part: &'a Json) -> Result<&'a str, ApiError> {
    if let Json::String(text) = part {
        return Ok(text);
    }
    let kind = part.get("type").and_then(Json::as_str);
    match (kind, part.get("text").and_then(Json::as_str)) {
        (Some("text" | "input_text" | "output_text"), Some(text)) => Ok(text),
        (Some("text" | "input_text" | "output_text"), None) => {
            Err(ApiError::bad_request(&format!("{path}.text"), format!("`{path}.text` must be a string")))
        }
        (Some(kind), _) => {
            let message = format!("`{path}`: parts of type `{kind}` are not supported, only `text`");
            Err(ApiError::bad_request(path, message))
        }
        (None, _) => Err(ApiError::bad_request(path, format!("`{path}` must be an object with `type` and `text`"))),
    }
}

/// Templates iterate over the arguments of earlier calls, which arrive as a string of JSON.
fn parse_arguments(call: &mut Json) {
    let Some(arguments) = call.pointer_mut("/function/arguments") else { return };
    if let Some(Ok(parsed @ Json::Object(_))) = arguments.as_str().map(serde_json::from_str) {
        *arguments = parsed;
    }
}

struct Request {
    sampling: Sampling,
    max_tokens: Option<usize>,
    max_field: &'static str,
    logprobs: Option<usize>,
    streaming: Streaming,
}

impl Request {
    fn parse(fields: &mut Fields<'_>, state: &AppState) -> Result<Self, ApiError> {
        fields.refuse("modalities", &[json!(["text"])])?;
        fields.refuse("audio", &[])?;
        fields.refuse("web_search_options", &[])?;
        let newer: Option<usize> = fields.take("max_completion_tokens")?;
        let older: Option<usize> = fields.take("max_tokens")?;
        let max_field = if newer.is_some() { "max_completion_tokens" } else { "max_tokens" };
        let max_tokens = newer.or(older);
        if max_tokens == Some(0) {
            return Err(ApiError::bad_request(max_field, format!("`{max_field}` must be at least 1, found 0")));
        }
        let wanted = fields.flag("logprobs", false)?;
        let top: Option<usize> = fields.take("top_logprobs")?;
        check_logprobs("top_logprobs", top, state)?;
        if !wanted && top.is_some_and(|top| top > 0) {
            return Err(ApiError::bad_request("top_logprobs", "`top_logprobs` goes with `logprobs: true` only"));
        }
        Ok(Self {
            sampling: Sampling::parse(fields, &state.model, state.engine.limits().vocab_size)?,
            max_tokens,
            max_field,
            logprobs: wanted.then(|| top.unwrap_or(0)),
            streaming: Streaming::parse(fields)?,
        })
    }
}

/// Writes chat answers.
struct ChatShape {
    names: TokenNames,
    /// Alternatives per token; `None` reports no logprobs.
    num_top: Option<usize>,
    with_ids: bool,
    /// Token ids of the prompt, until they were shown.
    prompt: Option<Vec<u32>>,
    /// Per answer: whether its role was sent.
    begun: Vec<bool>,
}

impl ChatShape {
    fn choice(&self, step: &Step, key: &str, content: &Json) -> Json {
        let logprobs = match self.num_top.filter(|_| !step.tokens.is_empty()) {
            None => Json::Null,
            Some(num_top) => {
                let scored = step.tokens.iter().filter_map(|token| Some((token.id, token.logprob.as_ref()?)));
                let entries = scored.map(|(id, logprob)| self.names.chat_entry(id, logprob, num_top));
                json!({"content": entries.collect::<Vec<Json>>()})
            }
        };
        let mut choice = json!({
            "index": step.index, key: content, "logprobs": logprobs,
            "finish_reason": step.end.as_ref().map(|end| end.reason),
            "stop_reason": step.end.as_ref().map_or(Json::Null, |end| end.stop_reason.clone()),
        });
        if self.with_ids {
            choice["token_ids"] = step.tokens.iter().map(|token| Json::from(token.id)).collect();
        }
        choice
    }
}

impl Shape for ChatShape {
    const OBJECTS: (&'static str, &'static str) = ("chat.completion", "chat.completion.chunk");

    fn whole(&mut self, step: &Step) -> Json {
        self.choice(step, "message", &json!({"role": "assistant", "content": step.text, "refusal": null}))
    }

    fn chunks(&mut self, step: &Step) -> Vec<Json> {
        let mut chunks = Vec::new();
        if !std::mem::replace(&mut self.begun[step.index], true) {
            let opening = Step { index: step.index, ..Step::default() };
            chunks.push(self.choice(&opening, "delta", &json!({"role": "assistant", "content": ""})));
        }
        let tokens_shown = (self.num_top.is_some() || self.with_ids) && !step.tokens.is_empty();
        if !step.text.is_empty() || step.end.is_some() || tokens_shown {
            let delta = if step.text.is_empty() { json!({}) } else { json!({"content": step.text}) };
            chunks.push(self.choice(step, "delta", &delta));
        }
        chunks
    }

    fn beside_choices(&mut self) -> Option<(&'static str, Json)> {
        self.prompt.take().map(|ids| ("prompt_token_ids", json!(ids)))
    }
}
