//! RMS normalisation with its overrides.

use candle_core::{Result, Tensor};

use crate::adapter::SiteId;
use crate::model::AdapterSegment;

/// `y = weight_t * x / sqrt(mean(x^2) + eps) + shift_t` over the last dimension, for each token's adapter t. Mean and
/// root are f32 whatever the format of `x` (Zhang and Sennrich 2019, section 4).
#[derive(Clone, Debug)]
pub(in crate::model) struct RmsNorm {
    /// Where it stands.
    pub(in crate::model) site: SiteId,
    /// The base's weight (dim), in the activations' format.
    pub(in crate::model) weight: Tensor,
    /// Added to the mean square.
    pub(in crate::model) eps: f32,
}

impl RmsNorm {
    /// Normalises `x` (tokens, ..., dim) under `segments`, which tile the tokens; the result has the shape of `x`.
    pub(in crate::model) fn forward(&self, x: &Tensor, segments: &[AdapterSegment]) -> Result<Tensor> {
        let x = x.contiguous()?;
        if segments.iter().all(|segment| self.overrides(segment).is_none()) {
            return candle_nn::ops::rms_norm(&x, &self.weight, self.eps);
        }
        let mut pieces = Vec::with_capacity(segments.len());
        for segment in segments {
            let x = x.narrow(0, segment.start, segment.len)?;
            let (weight, shift) = match self.overrides(segment) {
                Some(norm) => (norm.weight.as_ref().unwrap_or(&self.weight), norm.shift.as_ref()),
                None => (&self.weight, None),
            };
            let y = candle_nn::ops::rms_norm(&x, weight, self.eps)?;
            pieces.push(match shift {
                Some(shift) => y.broadcast_add(shift)?,
                None => y,
            });
        }
        Tensor::cat(&pieces, 0)
    }

    fn overrides<'a>(&self, segment: &'a AdapterSegment) -> Option<&'a crate::adapter::NormOverride> {
        segment.adapter.as_ref()?.tensors.norms.get(&self.site)
    }
}
