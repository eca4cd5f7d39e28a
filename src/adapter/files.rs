//! What goes into lowering and what comes out beside the normal form.

use std::fmt;

use bytes::Bytes;
use candle_core::DType;
use serde::Serialize;

/// An adapter's files as bytes; nothing is checked yet.
#[derive(Clone, Debug, Default)]
pub struct AdapterFiles {
    /// `adapter_config.json`.
    pub config: Bytes,
    /// `adapter_model.safetensors`, or what stands in its place in other libraries' directories.
    pub weights: Bytes,
    /// The adapters in sub-directories `0`, `1` and so on, where the config names such ([`num_parts`](super::num_parts)).
    pub parts: Vec<AdapterFiles>,
}

impl AdapterFiles {
    /// An adapter of two files.
    pub fn new(config: impl Into<Bytes>, weights: impl Into<Bytes>) -> Self {
        Self { config: config.into(), weights: weights.into(), parts: Vec::new() }
    }

    /// Bytes of all files.
    pub fn num_bytes(&self) -> usize {
        let parts: usize = self.parts.iter().map(Self::num_bytes).sum();
        self.config.len() + self.weights.len() + parts
    }
}

/// Number formats of a lowered adapter's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Formats {
    /// Of matrices that activations meet beside a linear's weight or instead of it, and of tables of embeddings: the format
    /// in which a step reads them, so that keeping them in it loses nothing.
    pub matrices: DType,
    /// Of everything else.
    pub values: DType,
}

impl Formats {
    /// One format for all.
    pub const fn uniform(dtype: DType) -> Self {
        Self { matrices: dtype, values: dtype }
    }
}

impl fmt::Display for Formats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (matrices, values) = (self.matrices.as_str(), self.values.as_str());
        if matrices == values { f.write_str(values) } else { write!(f, "{matrices} (matrices) and {values}") }
    }
}

/// How to lower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LowerOptions {
    /// Merge into dense weights instead of keeping low-rank and diagonal terms apart.
    pub merge: bool,
    /// Formats the lowered tensors are stored in. Lowering itself computes in f32.
    pub formats: Formats,
    /// Dense weight copies may take this many bytes without being asked for.
    pub own_bytes_max: usize,
}

/// What memory is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A dense copy of a weight; nothing else serves the adapter.
    Only,
    /// A dense copy of a weight; another form would serve, at a higher cost.
    Cheaper,
    /// The factors of a low-rank delta, which may be far larger than the file.
    Terms,
}

/// Bytes that lowering comes to with what it makes next, in the serving formats. What files hold as it is served does
/// not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Dense copies of weights.
    pub own_bytes: usize,
    /// Factors of low-rank deltas.
    pub term_bytes: usize,
}

/// Modules that are served from dense weights or tables of the adapter's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OwnWeights {
    /// How many.
    pub modules: usize,
    /// Why they are not served from the shared weight.
    pub reason: String,
}

/// What was found and done; shown to whoever loads the adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LowerReport {
    /// `peft_type` of the config.
    pub kind: String,
    /// Whether it was merged into dense weights.
    pub merged: bool,
    /// Modules of the base model that it changes.
    pub modules: usize,
    /// Positions of the context that it takes before every prompt, beside the prompt's own.
    pub leading_tokens: usize,
    /// Distinct ranks, ascending; empty for kinds without one.
    pub ranks: Vec<usize>,
    /// Bytes of all lowered tensors.
    pub bytes: usize,
    /// Bytes of dense weight copies among them.
    pub own_weight_bytes: usize,
    /// Why modules have dense copies; the others use the shared weight.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub own_weights: Vec<OwnWeights>,
    /// What is odd but not wrong, for example an adapter without effect.
    pub warnings: Vec<String>,
}
