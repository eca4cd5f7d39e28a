//! The RoPE fields of config.json, in their older and newer spelling, and the frequencies they mean.
//!
//! Source of the formulas: transformers 5.23 `modeling_rope_utils.py`; yarn also Peng et al. 2023 sections 3.2 to 3.4,
//! longrope Ding et al. 2024.

use serde::Deserialize;

use crate::model::{ModelError, RopeLengthRule};

/// RoPE fields as they stand in config.json; flatten it into a family's `Config`.
///
/// `rope_scaling` (older) goes before `rope_parameters` (transformers 5), and a field inside either before the same
/// field beside it, as transformers reads them.
#[derive(Clone, Debug, Default, Deserialize)]
pub(in crate::model) struct RopeConfig {
    rope_theta: Option<f64>,
    rope_scaling: Option<Parameters>,
    rope_parameters: Option<Parameters>,
    partial_rotary_factor: Option<f64>,
    pub(in crate::model) max_position_embeddings: Option<usize>,
    original_max_position_embeddings: Option<usize>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Parameters {
    rope_type: Option<String>,
    r#type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    short_factor: Option<Vec<f64>>,
    long_factor: Option<Vec<f64>>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    /// Tables per layer type, which no supported family has.
    full_attention: Option<serde_json::Value>,
    sliding_attention: Option<serde_json::Value>,
}

/// Frequencies and how they depend on the context length.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Frequencies {
    /// Radians per position of each rotated pair, (rotary_dim / 2).
    pub(super) inv_freq: Vec<f32>,
    /// Factor on cosine and sine.
    pub(super) attention_factor: f32,
    /// What changes with length.
    pub(super) by_length: ByLength,
}

/// How frequencies depend on the context length.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum ByLength {
    /// Not at all.
    Fixed,
    /// Other frequencies beyond `threshold` tokens.
    Switch { threshold: usize, long: Vec<f32> },
    /// Dynamic NTK beyond `threshold` tokens.
    Dynamic { threshold: usize, theta: f64, factor: f64, dim: usize },
}

impl RopeConfig {
    fn parameters(&self) -> Parameters {
        let is_set = |parameters: &&Parameters| parameters.kind().is_some() || parameters.rope_theta.is_some();
        self.rope_scaling.as_ref().filter(is_set).or(self.rope_parameters.as_ref()).cloned().unwrap_or_default()
    }

    /// Tokens the model supports: `max_position_embeddings`, stretched by those scalings whose checkpoints keep the
    /// unstretched number there.
    pub(in crate::model) fn context_tokens_max(&self, default_max: usize) -> usize {
        let max = self.max_position_embeddings.unwrap_or(default_max);
        let parameters = self.parameters();
        let factor = parameters.factor.unwrap_or(1.).max(1.);
        match parameters.kind() {
            Some("linear" | "dynamic") => (max as f64 * factor) as usize,
            Some("yarn") => {
                let original = self.original_max(&parameters, max);
                max.max((original as f64 * factor) as usize)
            }
            _ => max,
        }
    }

    fn original_max(&self, parameters: &Parameters, max: usize) -> usize {
        self.original_max_position_embeddings.or(parameters.original_max_position_embeddings).unwrap_or(max)
    }

    /// The frequencies for heads of `head_dim`. `defaults` stand in for absent fields.
    pub(super) fn frequencies(&self, head_dim: usize, defaults: Defaults) -> Result<Frequencies, ModelError> {
        let parameters = self.parameters();
        if parameters.full_attention.is_some() || parameters.sliding_attention.is_some() {
            return Err(ModelError::config("rope_parameters", "a table per layer type is not supported"));
        }
        let theta = parameters.rope_theta.or(self.rope_theta).unwrap_or(defaults.theta);
        let partial = parameters.partial_rotary_factor.or(self.partial_rotary_factor).unwrap_or(1.);
        let dim = (head_dim as f64 * partial) as usize;
        if dim == 0 || dim > head_dim || !dim.is_multiple_of(2) {
            let reason = format!("{partial} of a head of {head_dim} must be an even number of elements, at least 2");
            return Err(ModelError::config("partial_rotary_factor", reason));
        }
        let max = self.max_position_embeddings.unwrap_or(defaults.max_position_embeddings);
        let scaling = Scaling { theta, dim, max, original: self.original_max(&parameters, max), p: &parameters };
        match parameters.kind().unwrap_or("default") {
            "default" => Ok(scaling.fixed(scaling.plain())),
            "linear" => scaling.linear(),
            "dynamic" => scaling.dynamic(),
            "llama3" => scaling.llama3(),
            "yarn" => scaling.yarn(),
            "longrope" | "su" => scaling.longrope(),
            other => Err(ModelError::config(
                "rope_type",
                format!("{other} is not supported; supported are default, linear, dynamic, llama3, yarn, longrope"),
            )),
        }
    }

    /// The rule that [`ModelInfo`](crate::model::ModelInfo) reports for these frequencies.
    pub(super) fn length_rule(by_length: &ByLength) -> RopeLengthRule {
        match by_length {
            ByLength::Fixed => RopeLengthRule::Fixed,
            ByLength::Switch { threshold, .. } => RopeLengthRule::Switch { threshold: *threshold },
            ByLength::Dynamic { threshold, .. } => RopeLengthRule::Dynamic { threshold: *threshold },
        }
    }

    /// Phi-3 wrote `su` and `yarn` for what is longrope today.
    pub(in crate::model) fn rename_type(&mut self, from: &str, to: &str) {
        for parameters in [&mut self.rope_scaling, &mut self.rope_parameters].into_iter().flatten() {
            if parameters.kind() == Some(from) {
                parameters.rope_type = Some(to.to_owned());
            }
        }
    }
}

/// A family's values for absent fields.
#[derive(Clone, Copy, Debug)]
pub(in crate::model) struct Defaults {
    /// `rope_theta`.
    pub(in crate::model) theta: f64,
    /// `max_position_embeddings`.
    pub(in crate::model) max_position_embeddings: usize,
}

impl Parameters {
    fn kind(&self) -> Option<&str> {
        self.rope_type.as_deref().or(self.r#type.as_deref())
    }

    fn required(value: Option<f64>, field: &str) -> Result<f64, ModelError> {
        match value {
            Some(value) if value.is_finite() && value > 0. => Ok(value),
            Some(value) => Err(ModelError::config(field, format!("expected a positive number, found {value}"))),
            None => Err(ModelError::config(field, "the rope type needs it")),
        }
    }
}

struct Scaling<'a> {
    theta: f64,
    dim: usize,
    max: usize,
    original: usize,
    p: &'a Parameters,
}

/// `1 / theta^(2i / dim)` in f32, as torch computes it.
pub(super) fn inverse_frequencies(theta: f64, dim: usize) -> Vec<f32> {
    (0..dim / 2).map(|i| 1. / (theta as f32).powf(2. * i as f32 / dim as f32)).collect()
}

impl Scaling<'_> {
    fn plain(&self) -> Vec<f32> {
        inverse_frequencies(self.theta, self.dim)
    }

    fn fixed(&self, inv_freq: Vec<f32>) -> Frequencies {
        Frequencies { inv_freq, attention_factor: 1., by_length: ByLength::Fixed }
    }

    fn linear(&self) -> Result<Frequencies, ModelError> {
        let factor = Parameters::required(self.p.factor, "factor")? as f32;
        Ok(self.fixed(self.plain().into_iter().map(|f| f / factor).collect()))
    }

    fn dynamic(&self) -> Result<Frequencies, ModelError> {
        let factor = Parameters::required(self.p.factor, "factor")?;
        if self.dim < 4 {
            return Err(ModelError::config("rope_type", "dynamic needs at least 4 rotated elements per head"));
        }
        let by_length = ByLength::Dynamic { threshold: self.max, theta: self.theta, factor, dim: self.dim };
        Ok(Frequencies { inv_freq: self.plain(), attention_factor: 1., by_length })
    }

    fn llama3(&self) -> Result<Frequencies, ModelError> {
        let factor = Parameters::required(self.p.factor, "factor")? as f32;
        let low = Parameters::required(self.p.low_freq_factor, "low_freq_factor")? as f32;
        let high = Parameters::required(self.p.high_freq_factor, "high_freq_factor")? as f32;
        let original = self.original as f32;
        let scaled = self.plain().into_iter().map(|f| {
            let wavelength = 2. * std::f32::consts::PI / f;
            if wavelength < original / high {
                f
            } else if wavelength > original / low {
                f / factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                (1. - smooth) * f / factor + smooth * f
            }
        });
        Ok(self.fixed(scaled.collect()))
    }

    fn yarn(&self) -> Result<Frequencies, ModelError> {
        let original = self.original as f64;
        let factor = match self.p.factor {
            Some(_) => Parameters::required(self.p.factor, "factor")?,
            None => self.max as f64 / original,
        };
        let mscale = |scale: f64| if factor <= 1. { 1. } else { 0.1 * scale * factor.ln() + 1. };
        let non_zero = |value: Option<f64>| value.filter(|value| *value != 0.);
        let attention_factor = match (self.p.attention_factor, non_zero(self.p.mscale), non_zero(self.p.mscale_all_dim))
        {
            (Some(attention_factor), _, _) => attention_factor,
            (None, Some(scale), Some(scale_all_dim)) => mscale(scale) / mscale(scale_all_dim),
            (None, _, _) => mscale(1.),
        };
        let dim = self.dim as f64;
        let correction =
            |rotations: f64| dim * (original / (rotations * 2. * std::f64::consts::PI)).ln() / (2. * self.theta.ln());
        let mut low = correction(non_zero(self.p.beta_fast).unwrap_or(32.));
        let mut high = correction(non_zero(self.p.beta_slow).unwrap_or(1.));
        if self.p.truncate.unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.), high.min(dim - 1.));
        if low == high {
            high += 0.001;
        }
        let scaled = self.plain().into_iter().enumerate().map(|(i, extrapolated)| {
            let keep = 1. - ((i as f32 - low as f32) / (high - low) as f32).clamp(0., 1.);
            let interpolated = extrapolated / factor as f32;
            interpolated * (1. - keep) + extrapolated * keep
        });
        let inv_freq = scaled.collect();
        Ok(Frequencies { inv_freq, attention_factor: attention_factor as f32, by_length: ByLength::Fixed })
    }

    fn longrope(&self) -> Result<Frequencies, ModelError> {
        let original = self.original as f64;
        let factor = self.p.factor.unwrap_or(self.max as f64 / original);
        let attention_factor = match self.p.attention_factor {
            Some(attention_factor) => attention_factor,
            None if factor <= 1. => 1.,
            None => (1. + factor.ln() / original.ln()).sqrt(),
        };
        let by_factors = |factors: &Option<Vec<f64>>, field: &str| match factors {
            Some(factors) if factors.len() == self.dim / 2 => {
                let plain = self.plain().into_iter().zip(factors);
                Ok(plain.map(|(f, factor)| f / *factor as f32).collect::<Vec<f32>>())
            }
            Some(factors) => {
                let reason = format!("expected {} numbers, found {}", self.dim / 2, factors.len());
                Err(ModelError::config(field, reason))
            }
            None => Err(ModelError::config(field, "longrope needs it")),
        };
        let long = by_factors(&self.p.long_factor, "long_factor")?;
        Ok(Frequencies {
            inv_freq: by_factors(&self.p.short_factor, "short_factor")?,
            attention_factor: attention_factor as f32,
            by_length: ByLength::Switch { threshold: self.original, long },
        })
    }
}
