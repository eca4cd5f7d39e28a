//! RMS normalisation with its overrides.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::adapter::{NormOverride, SiteId};
use crate::kernels::cpu::{Norm, NormRun, norm_op};
use crate::model::AdapterSegment;

/// `y = weight_t * x / sqrt(mean(x^2) + eps) + shift_t` over the last dimension, for each token's adapter t. Mean and
/// root are f32 whatever the format of `x` (Zhang and Sennrich 2019, section 4).
#[derive(Clone, Debug)]
pub(in crate::model) struct RmsNorm {
    /// Where it stands.
    site: SiteId,
    /// The base's weight (dim), in the activations' format.
    weight: Tensor,
    /// The weight on the host, where the CPU's kernels run the layers.
    values: Option<Arc<[f32]>>,
    /// Added to the mean square.
    eps: f32,
}

impl RmsNorm {
    /// The norm at `site`; `packed` says whether the CPU's kernels run the layers.
    pub(in crate::model) fn new(site: SiteId, weight: Tensor, eps: f32, packed: bool) -> Result<Self> {
        let values = if packed { Some(weight.to_vec1::<f32>()?.into()) } else { None };
        Ok(Self { site, weight, values, eps })
    }

    /// Normalises `x` (tokens, ..., dim) under `segments`, which tile the tokens; the result has the shape of `x`.
    pub(in crate::model) fn forward(&self, x: &Tensor, segments: &[AdapterSegment]) -> Result<Tensor> {
        if let Some(norm) = self.packed(segments) {
            return norm_op(x, &norm);
        }
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

    /// The norm as the CPU's kernels take it, where they run the layers; its runs count tokens.
    pub(in crate::model) fn packed<'a>(&'a self, segments: &'a [AdapterSegment]) -> Option<Norm<'a>> {
        let weight = self.values.as_deref()?;
        let mut runs: Vec<NormRun<'a>> = Vec::with_capacity(segments.len());
        for segment in segments {
            let slots = segment.adapter.as_ref().and_then(|adapter| adapter.packed_norms.get(&self.site));
            match runs.last_mut() {
                Some(last) if last.slots.is_none() && slots.is_none() => last.rows.end += segment.len,
                _ => runs.push(NormRun { rows: segment.start..segment.start + segment.len, slots }),
            }
        }
        Some(Norm { weight, eps: self.eps, runs })
    }

    fn overrides<'a>(&self, segment: &'a AdapterSegment) -> Option<&'a NormOverride> {
        segment.adapter.as_ref()?.tensors.norms.get(&self.site)
    }
}
