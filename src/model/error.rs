//! Why a model cannot be loaded.

use thiserror::Error;

/// Why a model cannot be loaded. Every message names the file, tensor or field.
#[derive(Debug, Error)]
pub enum ModelError {
    /// The path is no model directory and no hub id either.
    #[error("model {path}: {reason}")]
    NotFound {
        /// What was asked for.
        path: String,
        /// What was looked for and not found.
        reason: String,
    },
    /// The hub did not deliver.
    #[error("downloading {id}: {reason}")]
    Download {
        /// Hub id.
        id: String,
        /// What went wrong.
        reason: String,
    },
    /// No family for the checkpoint's architecture.
    #[error("config.json: architecture {found} is not supported; supported are {supported}")]
    UnsupportedArchitecture {
        /// `architectures[0]` of config.json.
        found: String,
        /// The architectures that are.
        supported: String,
    },
    /// A file is missing or not what its name says.
    #[error("{file}: {reason}")]
    File {
        /// File name within the model directory.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A field is missing, wrong, or asks for something this server does not implement.
    #[error("{file}: field `{field}`: {reason}")]
    Field {
        /// File name within the model directory, or the section of the server's own config.
        file: &'static str,
        /// Field name.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor is missing, or has the wrong shape or format.
    #[error("tensor `{tensor}`: {reason}")]
    Tensor {
        /// Key in the safetensors file.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The device cannot be used.
    #[error("device {device}: {reason}")]
    Device {
        /// Device name.
        device: &'static str,
        /// Why not.
        reason: String,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Compute(#[from] candle_core::Error),
}

impl ModelError {
    /// A wrong field of config.json.
    pub(crate) fn config(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Field { file: "config.json", field: field.into(), reason: reason.into() }
    }

    /// A wrong file.
    pub(crate) fn file(file: impl Into<String>, reason: &dyn std::fmt::Display) -> Self {
        Self::File { file: file.into(), reason: reason.to_string() }
    }

    /// A wrong tensor.
    pub(crate) fn tensor(tensor: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Tensor { tensor: tensor.into(), reason: reason.into() }
    }
}
