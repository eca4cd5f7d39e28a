//! The `[model]` section: which base model, where, and in what numbers.

use serde::{Deserialize, Serialize};

/// Which base model to load, onto which device, in which numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// A Hugging Face model directory, or a hub id such as `org/name`.
    pub path: String,
    /// Hub revision (branch, tag or commit).
    pub revision: Option<String>,
    /// Token for private and gated repositories of the hub; by default what the hub's own client saved.
    pub hub_token: Option<String>,
    /// Name the base model is served under; by default the last component of `path`.
    pub served_name: Option<String>,
    /// Where the weights live and the arithmetic runs.
    pub device: DeviceChoice,
    /// Number format of weights and activations.
    pub dtype: DtypeChoice,
    /// Quantise the base weights on load (adapters stay unquantised).
    pub quant: Option<QuantChoice>,
    /// Which implementation of the arithmetic runs.
    pub kernels: KernelChoice,
    /// Longest context in tokens; by default what the model supports.
    pub context_tokens_max: Option<usize>,
}

/// Where the weights live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// Host memory and all cores.
    Cpu,
    /// The first NVIDIA GPU; needs a build with the feature `cuda`.
    Cuda,
}

/// Which implementation of the arithmetic runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KernelChoice {
    /// The fastest there is for the device.
    Auto,
    /// Plain tensor operations: slow, the reference that the fast kernels are tested against.
    Plain,
}

/// Number format of weights and activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DtypeChoice {
    /// The checkpoint's own format.
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16 weights and activations.
    Bf16,
    /// Half-precision weights and activations.
    F16,
}

/// Quantised formats for the base weights: 8-bit integers for the CPU's own kernels, or blocks named as in GGUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[clap(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names are the formats' own")]
pub enum QuantChoice {
    Int8,
    #[serde(rename = "q4_0")]
    #[clap(name = "q4_0")]
    Q4_0,
    #[serde(rename = "q5_0")]
    #[clap(name = "q5_0")]
    Q5_0,
    #[serde(rename = "q8_0")]
    #[clap(name = "q8_0")]
    Q8_0,
    #[serde(rename = "q3k")]
    #[clap(name = "q3k")]
    Q3K,
    #[serde(rename = "q4k")]
    #[clap(name = "q4k")]
    Q4K,
    #[serde(rename = "q5k")]
    #[clap(name = "q5k")]
    Q5K,
    #[serde(rename = "q6k")]
    #[clap(name = "q6k")]
    Q6K,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            path: "sample-model".to_owned(),
            revision: None,
            hub_token: None,
            served_name: None,
            device: DeviceChoice::Cpu,
            dtype: DtypeChoice::Auto,
            quant: None,
            kernels: KernelChoice::Auto,
            context_tokens_max: None,
        }
    }
}
