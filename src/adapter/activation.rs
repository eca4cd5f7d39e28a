//! Activation functions by the names that transformers gives them (`activations.ACT2FN`, transformers 5).

use candle_core::Tensor;

use super::config::{Config, field_error};
use super::{Activation, AdapterError};

/// Names and functions. Left out are those with parameters of their own, and what no published adapter uses.
const ACTIVATIONS: &[(&str, Activation)] = &[
    ("relu", Tensor::relu),
    ("relu2", |x| x.relu()?.sqr()),
    ("relu6", |x| x.clamp(0f32, 6f32)),
    ("leaky_relu", |x| x.relu()? + (x.minimum(0f32)? * 0.01)?),
    ("gelu", Tensor::gelu_erf),
    ("gelu_python", Tensor::gelu_erf),
    ("gelu_new", Tensor::gelu),
    ("gelu_fast", Tensor::gelu),
    ("gelu_accurate", Tensor::gelu),
    ("gelu_pytorch_tanh", Tensor::gelu),
    ("gelu_python_tanh", Tensor::gelu),
    ("quick_gelu", |x| x * candle_nn::ops::sigmoid(&(x * 1.702)?)?),
    ("silu", Tensor::silu),
    ("swish", Tensor::silu),
    ("mish", |x| x * ((x.exp()? + 1.0)?.log()?.tanh()?)),
    ("sigmoid", candle_nn::ops::sigmoid),
    ("tanh", Tensor::tanh),
    ("linear", |x| Ok(x.clone())),
];

/// The function that a field names.
pub(super) fn find(config: &Config, field: &str, default: &str) -> Result<Activation, AdapterError> {
    named(field, config.string(field)?.unwrap_or(default))
}

/// The function with this name, which stands in `field`.
pub(super) fn named(field: &str, name: &str) -> Result<Activation, AdapterError> {
    let found = ACTIVATIONS.iter().find(|(known, _)| *known == name);
    found.map(|(_, function)| *function).ok_or_else(|| {
        let known: Vec<&str> = ACTIVATIONS.iter().map(|(known, _)| *known).collect();
        field_error(field, format!("expected one of {}, found `{name}`", known.join(", ")))
    })
}
