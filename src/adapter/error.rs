//! Why an adapter is refused.

use thiserror::Error;

/// Why an adapter is refused. Every message names the file, tensor, module or field.
#[derive(Debug, Error)]
pub enum AdapterError {
    /// A file is not what its name says.
    #[error("{file}: {reason}")]
    Malformed {
        /// File name.
        file: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A config field is missing, wrong, or asks for something this server does not implement.
    #[error("adapter_config.json: field `{field}`: {reason}")]
    Field {
        /// Field name.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor has no place, or the wrong shape, type or values.
    #[error("tensor `{tensor}`: {reason}")]
    Tensor {
        /// Key in the safetensors file.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The adapter changes nothing.
    #[error("the adapter applies to no module of the base model: {reason}")]
    Empty {
        /// Why.
        reason: String,
    },
    /// The adapter cannot be written in the form asked for.
    #[error("cannot be converted: {place}: {reason}")]
    NotConvertible {
        /// Module or field.
        place: String,
        /// What has no place in that form.
        reason: String,
    },
    /// Dense weight copies would not fit.
    #[error("dense weights of {needed} bytes exceed the {limit} bytes left (adapters.merged_bytes_max)")]
    OverBudget {
        /// Bytes the copies need.
        needed: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The factors of low-rank deltas would not fit.
    #[error("low-rank deltas of {needed} bytes exceed the memory for adapters (adapters.host_bytes_max)")]
    OverMemory {
        /// Bytes the factors need, as far as they were counted.
        needed: usize,
    },
    /// Adapters that are each sound have no exact common effect.
    #[error("adapters {adapters} cannot act together: {reason}")]
    Composition {
        /// Their names.
        adapters: String,
        /// Where and why.
        reason: String,
    },
    /// One of several adapters is at fault.
    #[error("adapter `{name}`: {fault}")]
    Part {
        /// Its name.
        name: String,
        /// What is wrong with it; part of the text, so no source of it.
        fault: Box<AdapterError>,
    },
    /// Adapters cannot be combined to one in this way.
    #[error("`{field}`: {reason}")]
    Combination {
        /// The option at fault, or `adapters` where they do not fit together.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor operation failed; not the user's mistake.
    #[error("computing the lowered form failed")]
    Compute(#[from] candle_core::Error),
}
