//! The tokenizer and the chat template of a model directory.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde_json::Value as Json;
use tokenizers::{DecoderWrapper, Tokenizer};
use tracing::warn;

use super::TextError;
use super::template::{ChatPrompt, ChatTemplate};

/// The model's tokenizer and chat template.
pub struct Text {
    tokenizer: Tokenizer,
    scheme: Scheme,
    template: Result<ChatTemplate, String>,
    tool_template: Option<ChatTemplate>,
    vocab_size: usize,
    /// Bytes of text that the longest token stands for.
    token_bytes_max: usize,
    eos_token_id: Option<u32>,
}

/// Times the bytes of its tokens that a text may have: composing characters in a normalizer makes it at most three times
/// shorter. What tokenizers drop beside that is whitespace and unknown characters.
const DROPPED_MAX: usize = 4;

/// What the tokenizer's decoder does with the tokens' strings.
#[derive(Clone, Debug)]
pub(super) enum Scheme {
    /// Every token stands for bytes, spelt in GPT-2's printable alphabet; the text is their concatenation.
    ByteLevel(HashMap<char, u8>),
    /// Tokens spelt `<0xNN>` are single bytes; they become text once their run has ended.
    ByteFallback,
    /// Anything else.
    Other,
}

impl Text {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a model directory.
    ///
    /// # Errors
    /// When the tokenizer is missing, or a file is malformed. A missing chat template is an error only when used.
    pub fn load(dir: &Path) -> Result<Self, TextError> {
        let file = "tokenizer.json";
        let bytes = fs::read(dir.join(file)).map_err(|e| TextError::file(file, &e))?;
        let tokenizer = Tokenizer::from_bytes(bytes).map_err(|e| TextError::file(file, &e))?;
        let config = match read_optional(dir, "tokenizer_config.json")? {
            Some(text) => serde_json::from_str(&text).map_err(|e| TextError::file("tokenizer_config.json", &e))?,
            None => Json::Null,
        };
        let mut sources = named_templates(&config);
        if let Some(text) = read_optional(dir, "chat_template.jinja")? {
            sources.insert("default".to_owned(), text);
        }
        Ok(Self::new(tokenizer, &sources, &special_tokens(&config)))
    }

    /// The parts put together: a tokenizer, chat templates by name, and what `bos_token` and so on stand for.
    pub(super) fn new(
        mut tokenizer: Tokenizer,
        sources: &HashMap<String, String>,
        special_tokens: &[(String, String)],
    ) -> Self {
        // Truncation or padding left over from training would silently change prompts.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).expect("removing truncation cannot fail");
        let template = match sources.get("default") {
            None => Err("the model has no chat template; use /v1/completions".to_owned()),
            Some(source) => ChatTemplate::compile(source, special_tokens).map_err(|reason| {
                warn!(%reason, "the model's chat template cannot be used");
                format!("the model's chat template cannot be used: {reason}")
            }),
        };
        let tool_template =
            sources.get("tool_use").and_then(|source| ChatTemplate::compile(source, special_tokens).ok());
        let eos_token = special_tokens.iter().find(|(name, _)| name == "eos_token");
        let eos_token_id = eos_token.and_then(|(_, token)| tokenizer.token_to_id(token));
        let (scheme, vocab) = (scheme_of(&tokenizer), tokenizer.get_vocab(true));
        let vocab_size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        let num_bytes = |token: &String| match &scheme {
            Scheme::ByteLevel(alphabet) => level_bytes(alphabet, token).len(),
            Scheme::ByteFallback | Scheme::Other => token.len(),
        };
        let token_bytes_max = vocab.keys().map(num_bytes).max().unwrap_or(0);
        Self { scheme, tokenizer, template, tool_template, vocab_size, token_bytes_max, eos_token_id }
    }

    /// One more than the largest token id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Bytes that a text of `num_tokens` tokens has at most, generously: longer ones need not be encoded to be refused.
    pub fn bytes_max(&self, num_tokens: usize) -> usize {
        num_tokens.saturating_mul(self.token_bytes_max).saturating_mul(DROPPED_MAX)
    }

    /// The `eos_token` of tokenizer_config.json. Chat fine-tunes often name their end of turn only there.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos_token_id
    }

    /// Token ids of `text`, with the special tokens (such as the beginning of the sequence) that the model was trained
    /// with in front if `add_special_tokens`.
    ///
    /// # Errors
    /// When the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self.tokenizer.encode_fast(text, add_special_tokens);
        Ok(encoding.map_err(|e| TextError::Input(format!("the text cannot be tokenized: {e}")))?.get_ids().to_vec())
    }

    /// The text of `ids`; ids without a token stand for nothing.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        // The decoders that occur in tokenizer files report no errors.
        self.tokenizer.decode(ids, skip_special_tokens).unwrap_or_default()
    }

    /// The bytes that one token stands for inside a text. Special tokens stand for their own name.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.token(id) else { return Vec::new() };
        match &self.scheme {
            Scheme::ByteLevel(alphabet) => level_bytes(alphabet, &token),
            Scheme::ByteFallback => match fallback_byte(&token) {
                Some(byte) => vec![byte],
                None => token.replace('▁', " ").into_bytes(),
            },
            Scheme::Other => token.replace('▁', " ").into_bytes(),
        }
    }

    /// [`Text::token_bytes`] as text, with the replacement character for what is not UTF-8 by itself.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.token_bytes(id)).into_owned()
    }

    /// The token's own spelling, as vocabulary files have it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// The prompt that the model's chat template makes of `prompt`.
    ///
    /// # Errors
    /// When the model has no usable chat template, or the template refuses the messages.
    pub fn render_chat(&self, prompt: &ChatPrompt) -> Result<String, TextError> {
        if let (Some(template), Some(_)) = (&self.tool_template, &prompt.tools) {
            return template.render(prompt);
        }
        match &self.template {
            Ok(template) => template.render(prompt),
            Err(reason) => Err(TextError::Template(reason.clone())),
        }
    }

    pub(super) fn scheme(&self) -> &Scheme {
        &self.scheme
    }

    pub(super) fn is_special(&self, token: &str) -> bool {
        self.tokenizer.get_added_vocabulary().is_special_token(token)
    }
}

/// Bytes of a token spelt in the byte-level alphabet; a token with other characters stands for itself.
pub(super) fn level_bytes(alphabet: &HashMap<char, u8>, token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(|c| alphabet.get(&c).copied()).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte that a token spelt `<0xNN>` stands for.
pub(super) fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

fn scheme_of(tokenizer: &Tokenizer) -> Scheme {
    match tokenizer.get_decoder() {
        Some(DecoderWrapper::ByteLevel(_)) => Scheme::ByteLevel(byte_level_alphabet()),
        Some(DecoderWrapper::ByteFallback(_)) => Scheme::ByteFallback,
        Some(DecoderWrapper::Sequence(sequence)) => match sequence.get_decoders() {
            [DecoderWrapper::ByteLevel(_)] => Scheme::ByteLevel(byte_level_alphabet()),
            decoders if decoders.iter().any(|d| matches!(d, DecoderWrapper::ByteFallback(_))) => Scheme::ByteFallback,
            _ => Scheme::Other,
        },
        _ => Scheme::Other,
    }
}

/// GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest counts up from U+0100.
fn byte_level_alphabet() -> HashMap<char, u8> {
    let mut next = 0x100;
    let stand_in = |byte: u8| {
        let c = match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
            }
        };
        (c, byte)
    };
    (0..=u8::MAX).map(stand_in).collect()
}

fn read_optional(dir: &Path, file: &str) -> Result<Option<String>, TextError> {
    match fs::read_to_string(dir.join(file)) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(TextError::file(file, &e)),
    }
}

/// `chat_template` of tokenizer_config.json: one template, or a list of named ones.
fn named_templates(config: &Json) -> HashMap<String, String> {
    match config.get("chat_template") {
        Some(Json::String(source)) => HashMap::from([("default".to_owned(), source.clone())]),
        Some(Json::Array(list)) => {
            let pair = |entry: &Json| {
                let field = |name| entry.get(name).and_then(Json::as_str).map(str::to_owned);
                Some((field("name")?, field("template")?))
            };
            list.iter().filter_map(pair).collect()
        }
        _ => HashMap::new(),
    }
}

/// `bos_token` and its like in tokenizer_config.json, as strings or as objects with `content`.
fn special_tokens(config: &Json) -> Vec<(String, String)> {
    let names = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
    let token = |name: &str| {
        let entry = config.get(name)?;
        entry.as_str().or_else(|| entry.get("content")?.as_str()).map(str::to_owned)
    };
    names.iter().filter_map(|&name| Some((name.to_owned(), token(name)?))).collect()
}

#[cfg(test)]
pub(super) mod fixtures {
    //! Small tokenizers of the kinds that models have.

    use std::str::FromStr;

    use serde_json::json;

    use super::*;

    fn text(tokenizer: &Json) -> Text {
        let tokenizer = Tokenizer::from_str(&tokenizer.to_string()).expect("the tokenizer is well formed");
        Text::new(tokenizer, &HashMap::new(), &[])
    }

    fn added(first: usize, names: &[&str]) -> Vec<Json> {
        let token = |(i, name): (usize, &&str)| {
            json!({"id": first + i, "content": name, "special": !name.contains("plain"), "single_word": false,
                   "lstrip": false, "rstrip": false, "normalized": false})
        };
        names.iter().enumerate().map(token).collect()
    }

    /// GPT-2's kind: 256 bytes, two merges, a special token and an added one that is not special.
    pub(in crate::text) fn byte_level() -> Text {
        let mut alphabet: Vec<(char, u8)> = byte_level_alphabet().into_iter().collect();
        alphabet.sort_by_key(|&(_, byte)| byte);
        let mut vocab: serde_json::Map<String, Json> =
            alphabet.iter().map(|(c, byte)| (c.to_string(), json!(byte))).collect();
        vocab.insert("Ġa".to_owned(), json!(256));
        vocab.insert("ab".to_owned(), json!(257));
        text(&json!({
            "version": "1.0", "added_tokens": added(258, &["<|end|>", "<|plain é|>"]), "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": [["Ġ", "a"], ["a", "b"]], "byte_fallback": false},
        }))
    }

    /// Llama 2's kind: `▁` for spaces, byte tokens, `<s>` in front.
    pub(in crate::text) fn byte_fallback() -> Text {
        let mut names = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
        names.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
        names.extend(["▁", "a", "b", "▁a", "▁b", "▁▁", "é", "ab"].map(str::to_owned));
        let vocab: serde_json::Map<String, Json> =
            names.iter().enumerate().map(|(id, name)| (name.clone(), json!(id))).collect();
        text(&json!({
            "version": "1.0", "added_tokens": added(0, &["<unk>", "<s>", "</s>"]),
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null,
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [["▁", "a"], ["▁", "b"], ["▁", "▁"], ["a", "b"]],
                "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true},
        }))
    }

    /// BERT's kind: words, with `##` before parts that continue one.
    pub(in crate::text) fn word_piece() -> Text {
        text(&json!({
            "version": "1.0", "added_tokens": added(0, &["[UNK]"]), "normalizer": null,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
            "model": {"type": "WordPiece", "vocab": {"[UNK]": 0, "a": 1, "##b": 2, ".": 3, "n't": 4},
                "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_tokens_are_added_when_asked_for() {
        let text = fixtures::byte_fallback();
        assert_eq!(text.encode("a", true).unwrap(), [1, 262]);
        assert_eq!(text.encode("a", false).unwrap(), [262]);
        assert_eq!(text.decode(&[1, 262, 2], true), "a");
        assert_eq!(text.decode(&[1, 262, 2], false), "<s> a</s>");
        assert_eq!(text.vocab_size(), 267);
    }

    #[test]
    fn the_longest_token_bounds_a_text() {
        let text = fixtures::byte_level();
        assert_eq!(text.bytes_max(2), 2 * "<|plain é|>".len() * 4);
        let long = "<|plain é|>".repeat(10);
        assert_eq!(text.encode(&long, false).unwrap().len(), 10);
        assert!(long.len() <= text.bytes_max(10));
        assert_eq!(fixtures::byte_fallback().bytes_max(1), "<0xFF>".len() * 4);
        assert_eq!(text.bytes_max(usize::MAX), usize::MAX);
    }

    #[test]
    fn one_token_as_bytes() {
        let text = fixtures::byte_level();
        assert_eq!(text.token_bytes(0xC3), [0xC3]);
        assert_eq!(text.token_text(256), " a");
        assert_eq!(text.token_text(258), "<|end|>");
        assert!(text.token_bytes(9999).is_empty());
        let text = fixtures::byte_fallback();
        assert_eq!(text.token_bytes(3 + 0xE6), [0xE6]);
        assert_eq!(text.token_text(262), " a");
    }

    #[test]
    fn templates_and_special_tokens_in_all_their_spellings() {
        let config = serde_json::json!({
            "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": null,
            "chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}],
        });
        let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(n, t)| (n.to_owned(), t.to_owned()));
        assert_eq!(special_tokens(&config), tokens);
        assert_eq!(named_templates(&config)["tool_use"], "t");
        assert_eq!(named_templates(&serde_json::json!({"chat_template": "x"}))["default"], "x");
    }

    #[test]
    fn a_missing_tokenizer_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let error = Text::load(dir.path()).err().expect("refused").to_string();
        assert!(error.starts_with("tokenizer.json: "), "{error}");
    }
}
