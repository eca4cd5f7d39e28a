//! Strings to token ids and back: tokenizer, chat template, incremental decoder, stop strings.
//!
//! This module knows Hugging Face's tokenizer files and nothing of HTTP or the engine. Text goes in at [`Text::encode`]
//! and [`Text::render_chat`]; generated ids come back out through a [`Detokenizer`] and a [`StopMatcher`], one of each
//! per sequence.

mod detokenizer;
mod python;
mod stop;
mod template;
mod tokenizer;

use thiserror::Error;

pub use detokenizer::Detokenizer;
pub use stop::{StopMatcher, StopStep};
pub use template::ChatPrompt;
pub use tokenizer::Text;

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

impl TextError {
    fn file(file: &str, reason: &dyn std::fmt::Display) -> Self {
        Self::File { file: file.to_owned(), reason: reason.to_string() }
    }
}
