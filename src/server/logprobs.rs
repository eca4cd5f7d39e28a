//! Tokens and their logprobs in the shapes of the two endpoints.

use std::sync::Arc;

use serde_json::{Map, Value as Json, json};

use crate::engine::TokenLogprob;
use crate::text::Text;

/// Stands for minus infinity, which JSON cannot write.
const LOGPROB_MIN: f32 = -9999.0;

/// Writes tokens as strings.
#[derive(Clone)]
pub(super) struct TokenNames {
    /// The tokenizer.
    pub text: Arc<Text>,
    /// Write `token_id:<id>` instead of the token's text.
    pub as_ids: bool,
}

impl TokenNames {
    fn name(&self, id: u32) -> String {
        if self.as_ids { format!("token_id:{id}") } else { self.text.token_text(id) }
    }

    /// One token with its logprob, as in a chat's `logprobs.content`; `num_top` alternatives.
    pub(super) fn chat_entry(&self, id: u32, logprob: &TokenLogprob, num_top: usize) -> Json {
        let entry = |id: u32, logprob: f32| json!({"token": self.name(id), "logprob": finite(logprob), "bytes": self.text.token_bytes(id)});
        let mut json = entry(id, logprob.logprob);
        let top: Vec<Json> = logprob.top.iter().take(num_top).map(|&(id, logprob)| entry(id, logprob)).collect();
        json["top_logprobs"] = Json::Array(top);
        json
    }

    /// A completion's `logprobs` for `tokens`. `offset` is where the first one's text begins, in characters; it is
    /// moved behind the last one's.
    pub(super) fn completion<'a>(
        &self,
        tokens: impl IntoIterator<Item = (u32, Option<&'a TokenLogprob>)>,
        offset: &mut usize,
    ) -> Json {
        let (mut names, mut logprobs, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (id, logprob) in tokens {
            let name = self.name(id);
            logprobs.push(logprob.map_or(Json::Null, |logprob| json!(finite(logprob.logprob))));
            tops.push(logprob.map_or(Json::Null, |logprob| self.tops(&name, logprob)));
            offsets.push(*offset);
            *offset += name.chars().count();
            names.push(name);
        }
        json!({"text_offset": offsets, "token_logprobs": logprobs, "tokens": names, "top_logprobs": tops})
    }

    /// Alternatives by their text, the token itself always among them.
    fn tops(&self, name: &str, logprob: &TokenLogprob) -> Json {
        let mut map = Map::new();
        map.insert(name.to_owned(), json!(finite(logprob.logprob)));
        for &(id, logprob) in &logprob.top {
            // Of tokens with equal text the most likely one comes first and stays.
            map.entry(self.name(id)).or_insert_with(|| json!(finite(logprob)));
        }
        Json::Object(map)
    }
}

fn finite(logprob: f32) -> f32 {
    logprob.max(LOGPROB_MIN)
}
