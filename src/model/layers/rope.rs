//! Rotary position encoding.

use candle_core::{D, DType, Device, Result, Tensor};

use super::rope_config::{ByLength, Defaults, Frequencies, RopeConfig, inverse_frequencies};
use crate::kernels::KvLayout;
use crate::model::{ModelError, RopeLengthRule};

/// The position encoding of a model (Su et al. 2021), the halves of the rotated part being paired.
#[derive(Clone, Debug)]
pub(in crate::model) struct Rope {
    frequencies: Frequencies,
}

/// The rotation of one step's tokens: cosines and sines, (tokens, rotary_dim / 2).
#[derive(Clone, Debug)]
pub(in crate::model) enum Rotation {
    /// For the CPU's kernels.
    Host {
        /// Cosines.
        cos: Vec<f32>,
        /// Sines.
        sin: Vec<f32>,
    },
    /// For candle's operations on any device.
    Device {
        /// Cosines.
        cos: Tensor,
        /// Sines.
        sin: Tensor,
    },
}

impl Rope {
    /// Reads the fields of config.json for heads of `head_dim`.
    pub(in crate::model) fn new(
        config: &RopeConfig,
        head_dim: usize,
        defaults: Defaults,
    ) -> std::result::Result<Self, ModelError> {
        Ok(Self { frequencies: config.frequencies(head_dim, defaults)? })
    }

    /// How the rotation depends on the context length.
    pub(in crate::model) fn length_rule(&self) -> RopeLengthRule {
        RopeConfig::length_rule(&self.frequencies.by_length)
    }

    /// Cosine and sine of `position * inv_freq` in f32 on the host, where `rope_len` of each token may choose other
    /// frequencies; for a cache in [`KvLayout::Rows`] moved to `device` in `dtype`.
    pub(in crate::model) fn rotation(
        &self,
        positions: &[u32],
        rope_lens: &[u32],
        layout: KvLayout,
        (device, dtype): (&Device, DType),
    ) -> Result<Rotation> {
        let half = self.frequencies.inv_freq.len();
        let factor = self.frequencies.attention_factor;
        let (mut cos, mut sin) =
            (Vec::with_capacity(positions.len() * half), Vec::with_capacity(positions.len() * half));
        let mut stretched: Option<(u32, Vec<f32>)> = None;
        for (position, rope_len) in positions.iter().zip(rope_lens) {
            for f in self.inv_freq(*rope_len, &mut stretched) {
                let angle = *position as f32 * f;
                cos.push(angle.cos() * factor);
                sin.push(angle.sin() * factor);
            }
        }
        let shape = (positions.len(), half);
        Ok(match layout {
            KvLayout::Heads => Rotation::Host { cos, sin },
            KvLayout::Rows => Rotation::Device {
                cos: Tensor::from_vec(cos, shape, device)?.to_dtype(dtype)?,
                sin: Tensor::from_vec(sin, shape, device)?.to_dtype(dtype)?,
            },
        })
    }

    /// The frequencies at `rope_len`; `last` keeps the last ones computed, since neighbours mostly share them.
    fn inv_freq<'a>(&'a self, rope_len: u32, last: &'a mut Option<(u32, Vec<f32>)>) -> &'a [f32] {
        match &self.frequencies.by_length {
            ByLength::Switch { threshold, long } if rope_len as usize > *threshold => long,
            ByLength::Dynamic { threshold, theta, factor, dim } if rope_len as usize > *threshold => {
                if last.as_ref().is_none_or(|(len, _)| *len != rope_len) {
                    let stretch = factor * f64::from(rope_len) / *threshold as f64 - (factor - 1.);
                    let theta = theta * stretch.powf(*dim as f64 / (*dim as f64 - 2.));
                    *last = Some((rope_len, inverse_frequencies(theta, *dim)));
                }
                &last.as_ref().expect("set just above").1
            }
            ByLength::Fixed | ByLength::Switch { .. } | ByLength::Dynamic { .. } => &self.frequencies.inv_freq,
        }
    }
}

impl Rotation {
    /// Rotates the first `rotary_dim` elements of every head of `x` (tokens, heads, head_dim).
    ///
    /// # Panics
    /// On a rotation for the CPU's kernels.
    pub(in crate::model) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let Self::Device { cos, sin } = self else { panic!("the CPU's kernels rotate by themselves") };
        let head_dim = x.dim(D::Minus1)?;
        let rotary_dim = 2 * cos.dim(1)?;
        let rotated = x.narrow(D::Minus1, 0, rotary_dim)?.contiguous()?.unsqueeze(0)?;
        let rotated = candle_nn::rotary_emb::rope_thd(&rotated, cos, sin)?.squeeze(0)?;
        if rotary_dim == head_dim {
            return Ok(rotated);
        }
        let rest = x.narrow(D::Minus1, rotary_dim, head_dim - rotary_dim)?;
        Tensor::cat(&[rotated, rest], D::Minus1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const DEFAULTS: Defaults = Defaults { theta: 10_000., max_position_embeddings: 256 };

    fn rope(config: Value) -> Rope {
        Rope::new(&serde_json::from_value(config).unwrap(), 16, DEFAULTS).unwrap()
    }

    /// Compares with what transformers 5.23 computes for heads of 16 elements.
    #[track_caller]
    fn check(config: Value, rope_len: u32, expected: &[f32], attention_factor: f32) {
        let rope = rope(config);
        let mut last = None;
        let inv_freq = rope.inv_freq(rope_len, &mut last);
        assert_eq!(inv_freq.len(), expected.len());
        for (found, expected) in inv_freq.iter().zip(expected) {
            assert!((found / expected - 1.).abs() < 1e-5, "found {inv_freq:?}");
        }
        assert!((rope.frequencies.attention_factor - attention_factor).abs() < 1e-6);
    }

    #[test]
    fn yarn_equals_transformers() {
        let tail = [0.00125, 0.000_395_284_7, 0.000_125, 3.952_847e-5];
        let expected = [&[1., 0.039_528_47, 0.0125, 0.003_952_847], &tail[..]].concat();
        let scaling = json!({"rope_type": "yarn", "factor": 8., "original_max_position_embeddings": 32,
            "beta_fast": 16., "beta_slow": 2., "truncate": false});
        check(json!({"rope_scaling": scaling}), 1, &expected, 1.207_944_2);
        let tail = [0.0025, 0.000_790_569_5, 0.00025, 7.905_695e-5];
        let expected = [&[1., 0.237_170_8, 0.05, 0.007_905_695], &tail[..]].concat();
        let scaling = json!({"rope_type": "yarn", "factor": 4., "original_max_position_embeddings": 64,
            "mscale": 0.707, "mscale_all_dim": 1.});
        check(json!({"rope_parameters": scaling}), 1, &expected, 0.964_326_9);
        let scaling = json!({"type": "yarn", "factor": 4., "attention_factor": 1.25});
        let config = json!({"rope_scaling": scaling, "original_max_position_embeddings": 64, "rope_theta": 10000});
        check(config, 1, &expected, 1.25);
    }

    #[test]
    fn dynamic_equals_transformers_beyond_and_within_the_threshold() {
        let config = json!({"max_position_embeddings": 128, "rope_scaling": {"type": "dynamic", "factor": 4.}});
        let tail = [0.003_469_741, 0.000_842_114_8, 0.000_204_383_4, 4.960_436e-5];
        let expected = [&[1., 0.242_702_5, 0.058_904_51, 0.014_296_27], &tail[..]].concat();
        check(config.clone(), 300, &expected, 1.);
        check(config, 128, &inverse_frequencies(10_000., 16), 1.);
    }

    #[test]
    fn llama3_equals_transformers() {
        let scaling = json!({"rope_type": "llama3", "factor": 8., "low_freq_factor": 1., "high_freq_factor": 4.,
            "original_max_position_embeddings": 64});
        let tail = [0.00125, 0.000_395_284_7, 0.000_125, 3.952_847e-5];
        let expected = [&[1., 0.244_384_6, 0.013_042_26, 0.003_952_847], &tail[..]].concat();
        check(json!({"rope_parameters": scaling}), 1, &expected, 1.);
    }

    #[test]
    fn longrope_equals_transformers_on_both_sides_of_the_threshold() {
        let scaling = json!({"type": "su", "factor": 4., "original_max_position_embeddings": 64,
            "short_factor": [1, 1, 1, 1, 1, 1, 1, 1], "long_factor": [1., 1.5, 2., 2.5, 3., 3.5, 4., 4.5]});
        let config = json!({"rope_scaling": scaling});
        let tail = [0.003_333_333, 0.000_903_507_9, 0.00025, 7.027_284e-5];
        let expected = [&[1., 0.210_818_5, 0.05, 0.012_649_11], &tail[..]].concat();
        check(config.clone(), 65, &expected, 1.154_700_5);
        check(config, 64, &inverse_frequencies(10_000., 16), 1.154_700_5);
    }

    #[test]
    fn linear_and_partial_equal_transformers() {
        let config = json!({"partial_rotary_factor": 0.5, "rope_parameters": {"rope_type": "linear", "factor": 2.5}});
        check(config, 1, &[0.4, 0.04, 0.004, 0.0004], 1.);
    }
}
