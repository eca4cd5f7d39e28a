//! Incremental decoding: each token's share of the text, as soon as later tokens can no longer change it.

use std::sync::Arc;

use super::Text;
use super::tokenizer::{Scheme, fallback_byte, level_bytes};

/// Turns one sequence's tokens into pieces of text. The pieces together are what the tokens add to the prompt's text:
/// `decode(prompt + generated)` without its beginning `decode(prompt)`.
pub struct Detokenizer {
    text: Arc<Text>,
    skip_special_tokens: bool,
    state: State,
}

/// Prompt tokens looked at for context. One is enough nearly always; runs of tokens without text need more.
const CONTEXT_TOKENS_MAX: usize = 64;

enum State {
    /// Byte-level vocabularies: bytes that are not a whole character yet.
    Bytes(Vec<u8>),
    /// Any other: a window of tokens is decoded, and what was decoded before taken off its front.
    Window(Window),
}

/// The last tokens: some whose text is out already, for the decoder's context, then those whose text is not.
struct Window {
    ids: Vec<u32>,
    /// Tokens at the front whose text is out.
    num_done: usize,
    /// Their text, decoded by themselves.
    done: String,
}

impl Detokenizer {
    /// A decoder for what follows `prompt`.
    pub fn new(text: Arc<Text>, prompt: &[u32], skip_special_tokens: bool) -> Self {
        let state = match text.scheme() {
            Scheme::ByteLevel(_) => State::Bytes(Vec::new()),
            Scheme::ByteFallback | Scheme::Other => State::Window(context(&text, prompt, skip_special_tokens)),
        };
        Self { text, skip_special_tokens, state }
    }

    /// Takes the next token and returns the text that is certain now.
    pub fn push(&mut self, id: u32) -> String {
        let Some(token) = self.text.token(id) else { return String::new() };
        if self.skip_special_tokens && self.text.is_special(&token) {
            return String::new();
        }
        match (&mut self.state, self.text.scheme()) {
            (State::Bytes(bytes), Scheme::ByteLevel(alphabet)) => {
                bytes.extend(level_bytes(alphabet, &token));
                take_characters(bytes)
            }
            (State::Bytes(_), Scheme::ByteFallback | Scheme::Other) => unreachable!("the scheme chose the state"),
            (State::Window(window), scheme) => {
                window.ids.push(id);
                let run_goes_on = matches!(scheme, Scheme::ByteFallback) && fallback_byte(&token).is_some();
                if run_goes_on { String::new() } else { window.advance(&self.text) }
            }
        }
    }

    /// The rest of the text, once no token will follow.
    pub fn finish(&mut self) -> String {
        match &mut self.state {
            State::Bytes(bytes) => String::from_utf8_lossy(&std::mem::take(bytes)).into_owned(),
            State::Window(window) => window.rest(&self.text),
        }
    }
}

impl Window {
    /// The text of the tokens that are not out yet.
    fn advance(&mut self, text: &Text) -> String {
        // Special tokens that are to be skipped never get in here.
        let whole = text.decode(&self.ids, false);
        let Some(piece) = whole.strip_prefix(self.done.as_str()) else { return String::new() };
        let piece = piece.to_owned();
        // The shortest context that still takes a leading space off itself and not off the next token.
        let tail = text.decode(&self.ids[self.num_done..], false);
        if tail.is_empty() {
            self.done = whole;
        } else {
            self.ids.drain(..self.num_done);
            self.done = tail;
        }
        self.num_done = self.ids.len();
        piece
    }

    fn rest(&mut self, text: &Text) -> String {
        let whole = text.decode(&self.ids, false);
        let same = whole.char_indices().zip(self.done.chars()).find(|((_, a), b)| a != b);
        let start = same.map_or(self.done.len().min(whole.len()), |((at, _), _)| at);
        self.num_done = self.ids.len();
        let rest = whole[start..].to_owned();
        self.done = whole;
        rest
    }
}

/// The end of the prompt, long enough to have a text of its own.
fn context(text: &Text, prompt: &[u32], skip_special_tokens: bool) -> Window {
    let shown = |id: &u32| match text.token(*id) {
        Some(token) => !(skip_special_tokens && text.is_special(&token)),
        None => false,
    };
    let mut ids: Vec<u32> = Vec::new();
    let mut done = String::new();
    for &id in prompt.iter().rev().filter(|id| shown(id)).take(CONTEXT_TOKENS_MAX) {
        ids.insert(0, id);
        done = text.decode(&ids, false);
        // A byte can be part of a character that began before it.
        let inside_run = matches!(text.scheme(), Scheme::ByteFallback)
            && text.token(id).is_some_and(|token| fallback_byte(&token).is_some());
        if !done.is_empty() && !inside_run {
            break;
        }
    }
    Window { num_done: ids.len(), ids, done }
}

/// Takes whole characters off the front; what can never become one is replaced as `from_utf8_lossy` does.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut out = String::new();
    loop {
        match std::str::from_utf8(bytes) {
            Ok(valid) => {
                out.push_str(valid);
                bytes.clear();
                return out;
            }
            Err(e) => {
                let valid_len = e.valid_up_to();
                out.push_str(&String::from_utf8_lossy(&bytes[..valid_len]));
                let Some(invalid_len) = e.error_len() else {
                    bytes.drain(..valid_len);
                    return out;
                };
                out.push(char::REPLACEMENT_CHARACTER);
                bytes.drain(..valid_len + invalid_len);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tokenizer::fixtures;
    use super::*;

    /// What the tokens add to the prompt's text, decoded all at once.
    fn at_once(text: &Text, prompt: &[u32], ids: &[u32], skip: bool) -> String {
        let before = text.decode(prompt, skip);
        let whole = text.decode(&[prompt, ids].concat(), skip);
        whole.strip_prefix(&before).expect("the prompt ends at a character").to_owned()
    }

    fn in_pieces(text: &Arc<Text>, prompt: &[u32], ids: &[u32], skip: bool) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(Arc::clone(text), prompt, skip);
        let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
        pieces.push(detokenizer.finish());
        pieces
    }

    fn check(text: &Arc<Text>, prompt: &str, ids: &[u32]) -> Result<(), TestCaseError> {
        let prompt = text.encode(prompt, true).expect("encodes");
        for skip in [true, false] {
            let pieces = in_pieces(text, &prompt, ids, skip);
            prop_assert_eq!(pieces.concat(), at_once(text, &prompt, ids, skip), "{:?}", pieces);
        }
        Ok(())
    }

    #[test]
    fn characters_come_out_when_they_are_whole() {
        let text = Arc::new(fixtures::byte_level());
        let ids = text.encode("é漢x", false).expect("encodes");
        assert_eq!(in_pieces(&text, &[], &ids, true), ["", "é", "", "", "漢", "x", ""]);
    }

    #[test]
    fn the_first_token_keeps_its_space_behind_a_prompt_and_loses_it_without() {
        let text = Arc::new(fixtures::byte_fallback());
        let prompt = text.encode("a", true).expect("encodes");
        let ids = text.encode("b", false).expect("encodes");
        assert_eq!(in_pieces(&text, &prompt, &ids, true).concat(), " b");
        assert_eq!(in_pieces(&text, &[], &ids, true).concat(), "b");
    }

    #[test]
    fn bytes_come_out_when_their_run_has_ended() {
        let text = Arc::new(fixtures::byte_fallback());
        let ids = text.encode("a漢b", false).expect("encodes");
        let pieces = in_pieces(&text, &[], &ids, true);
        assert_eq!(pieces.concat(), "a漢b");
        assert_eq!(pieces.iter().filter(|piece| piece.is_empty()).count(), ids.len() + 1 - 2, "{pieces:?}");
    }

    proptest! {
        #[test]
        fn pieces_make_the_whole(ids in prop::collection::vec(0u32..300, 0..24), prompt in "[ab é漢]{0,5}") {
            check(&Arc::new(fixtures::byte_level()), &prompt, &ids)?;
            check(&Arc::new(fixtures::word_piece()), "a", &ids)?;
            // A prompt that ends inside a run of bytes would change with what follows; it ends in a letter here.
            check(&Arc::new(fixtures::byte_fallback()), &format!("{prompt}a"), &ids)?;
            check(&Arc::new(fixtures::byte_fallback()), "", &ids)?;
        }

        #[test]
        fn text_survives_the_round_trip(s in "\\PC{0,20}") {
            let text = fixtures::byte_level();
            prop_assert_eq!(text.decode(&text.encode(&s, false).expect("encodes"), true), s);
        }
    }
}
