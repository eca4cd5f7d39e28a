//! Strings to token ids and back: tokenizer, chat template, incremental decoder, stop strings.

use std::path::Path;

use thiserror::Error;

/// Why text could not be turned into tokens or back.
#[derive(Debug, Error)]
pub enum TextError {
    /// The model directory lacks a file or holds a broken one.
    #[error("{file}: {reason}")]
    File {
        /// File name.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The client's messages do not fit the chat template.
    #[error("{0}")]
    Template(String),
    /// A client's token id or text cannot be used.
    #[error("{0}")]
    Input(String),
}

/// The model's tokenizer and chat template.
pub struct Text {}

impl Text {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a model directory.
    ///
    /// # Errors
    /// When the tokenizer is missing, or a file is malformed. A missing chat template is an error only when used.
    pub fn load(_dir: &Path) -> Result<Self, TextError> {
        unimplemented!()
    }
}
