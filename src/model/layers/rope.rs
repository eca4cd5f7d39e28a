//! Rotary position encoding.

use candle_core::{D, DType, Device, Result, Tensor};

use super::rope_config::{ByLength, Defaults, Frequencies, RopeConfig, inverse_frequencies};
use crate::model::{ModelError, RopeLengthRule};

/// The position encoding of a model (Su et al. 2021), the halves of the rotated part being paired.
#[derive(Clone, Debug)]
pub(in crate::model) struct Rope {
    frequencies: Frequencies,
}

/// The rotation of one step's tokens: cosines and sines, (tokens, rotary_dim / 2).
#[derive(Clone, Debug)]
pub(in crate::model) struct Rotation {
    cos: Tensor,
    sin: Tensor,
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
    /// frequencies; then moved to `device` in `dtype`.
    pub(in crate::model) fn rotation(
        &self,
        positions: &[u32],
        rope_lens: &[u32],
        device: &Device,
        dtype: DType,
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
        Ok(Rotation {
            cos: Tensor::from_vec(cos, shape, device)?.to_dtype(dtype)?,
            sin: Tensor::from_vec(sin, shape, device)?.to_dtype(dtype)?,
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
    pub(in crate::model) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let head_dim = x.dim(D::Minus1)?;
        let rotary_dim = 2 * self.cos.dim(1)?;
        let rotated = x.narrow(D::Minus1, 0, rotary_dim)?.contiguous()?.unsqueeze(0)?;
        let rotated = candle_nn::rotary_emb::rope_thd(&rotated, &self.cos, &self.sin)?.squeeze(0)?;
        if rotary_dim == head_dim {
            return Ok(rotated);
        }
        let rest = x.narrow(D::Minus1, rotary_dim, head_dim - rotary_dim)?;
        Tensor::cat(&[rotated, rest], D::Minus1)
    }
}
