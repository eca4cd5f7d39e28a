//! `POST /tokenize` and `POST /detokenize`, with vLLM's bodies.

use axum::Json as JsonBody;
use axum::extract::State;
use serde_json::{Value as Json, json};

use super::body::{Body, Fields};
use super::chat::Conversation;
use super::generate::{context, encode};
use super::selector::Selector;
use super::sse::blocking;
use super::{ApiError, AppState};

/// Token ids of a prompt or of a chat.
pub(super) async fn tokenize(State(state): State<AppState>, Body(body): Body) -> Result<JsonBody<Json>, ApiError> {
    let mut fields = Fields::parse(&body)?;
    Selector::parse(&mut fields, &state.model.name)?.status(&state).await?;
    let with_strings = fields.flag("return_token_strs", false)?;
    let prompt: Option<String> = fields.take("prompt")?;
    let ids = match prompt {
        Some(prompt) => {
            let add_special_tokens = fields.flag("add_special_tokens", true)?;
            blocking(&state, move |state| encode(state, "prompt", &prompt, add_special_tokens)).await??
        }
        None => {
            let conversation = Conversation::parse(&mut fields)
                .map_err(|e| if e.message == "`messages` is missing" { missing() } else { e })?;
            blocking(&state, move |state| conversation.encode(state)).await??
        }
    };
    let strings = with_strings.then(|| ids.iter().map(|&id| state.text.token(id)).collect::<Vec<_>>());
    let max_model_len = context(&state);
    Ok(JsonBody(json!({"count": ids.len(), "max_model_len": max_model_len, "tokens": ids, "token_strs": strings})))
}

fn missing() -> ApiError {
    ApiError::bad_request("prompt", "`prompt` or `messages` must be given")
}

/// The text of token ids.
pub(super) async fn detokenize(State(state): State<AppState>, Body(body): Body) -> Result<JsonBody<Json>, ApiError> {
    let mut fields = Fields::parse(&body)?;
    Selector::parse(&mut fields, &state.model.name)?.status(&state).await?;
    let Some(ids) = fields.take::<Vec<u32>>("tokens")? else {
        return Err(ApiError::bad_request("tokens", "`tokens` is missing"));
    };
    let vocab_size = state.engine.limits().vocab_size.max(state.text.vocab_size());
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
        let message = format!("token id {id} is not in the vocabulary of {vocab_size} tokens");
        return Err(ApiError::bad_request("tokens", message));
    }
    let skip_special_tokens = fields.flag("skip_special_tokens", false)?;
    let text = blocking(&state, move |state| state.text.decode(&ids, skip_special_tokens)).await?;
    Ok(JsonBody(json!({"prompt": text})))
}
