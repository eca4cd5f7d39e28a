//! A linear with its adapters.

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Result, Tensor};
use mistralrs_quant::{GgufMatMul, QuantMethod};

use crate::adapter::{Delta, LinearSlots, Scale, SiteId, Weight};
use crate::kernels::{self, SegmentTerms, Term};
use crate::model::AdapterSegment;

/// A weight in the format it is kept in.
#[derive(Clone, Debug)]
pub(in crate::model) enum Matrix {
    /// Dense, (out, in).
    Dense(Tensor),
    /// Quantised in GGUF blocks: the blocks, and what multiplies with them.
    Quantized {
        /// The blocks.
        blocks: Arc<QTensor>,
        /// The product with them.
        product: Arc<GgufMatMul>,
    },
}

/// `y = scale_t * (W_t x + sum_j delta_{t,j}(x)) + c_t` for each token's adapter t.
#[derive(Clone, Debug)]
pub(in crate::model) struct Linear {
    /// Where it stands.
    pub(in crate::model) site: SiteId,
    /// The shared weight.
    pub(in crate::model) weight: Matrix,
    /// The base's bias (out).
    pub(in crate::model) bias: Option<Tensor>,
}

impl Matrix {
    /// `x W^T`, (rows, out) in the format of `x`.
    fn product(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(w) => kernels::linear(x, w),
            Self::Quantized { product, .. } => product.forward_autocast(x),
        }
    }

    /// The matrix that [`Matrix::product`] multiplies with, (out, in) in f32 on the CPU.
    pub(in crate::model) fn to_f32(&self) -> Result<Tensor> {
        match self {
            Self::Dense(w) => w.to_device(&Device::Cpu)?.to_dtype(DType::F32),
            Self::Quantized { blocks, .. } => blocks.dequantize(&Device::Cpu)?.to_dtype(DType::F32),
        }
    }
}

impl Linear {
    /// Applies the linear to `x` (tokens, in) under `segments`, which tile the tokens: (tokens, out).
    pub(in crate::model) fn forward(&self, x: &Tensor, segments: &[AdapterSegment]) -> Result<Tensor> {
        let terms = self.terms(segments);
        if let [only] = terms.as_slice()
            && only.is_neutral()
        {
            let product = self.weight.product(x)?;
            return match only.c {
                Some(c) => product.broadcast_add(c),
                None => Ok(product),
            };
        }
        let shared = terms.iter().any(|terms| terms.own_weight.is_none());
        let product = if shared { Some(self.weight.product(x)?) } else { None };
        kernels::apply_segments(x, product.as_ref(), &terms)
    }

    /// What each segment does here; neighbours that leave the base as it is are one.
    fn terms<'a>(&'a self, segments: &'a [AdapterSegment]) -> Vec<SegmentTerms<'a>> {
        let mut all: Vec<SegmentTerms<'a>> = Vec::with_capacity(segments.len());
        let mut last_is_base = false;
        for segment in segments {
            let slots = segment.adapter.as_ref().and_then(|adapter| adapter.linears.get(&self.site));
            match (slots, all.last_mut()) {
                (None, Some(last)) if last_is_base => last.len += segment.len,
                (None, _) => all.push(SegmentTerms {
                    start: segment.start,
                    len: segment.len,
                    c: self.bias.as_ref(),
                    ..SegmentTerms::default()
                }),
                (Some(slots), _) => all.push(self.slot_terms(segment, slots)),
            }
            last_is_base = slots.is_none();
        }
        all
    }

    fn slot_terms<'a>(&'a self, segment: &AdapterSegment, slots: &'a LinearSlots) -> SegmentTerms<'a> {
        let terms = slots.deltas.iter().map(|delta| match delta {
            Delta::LowRank { a, b } => Term::LowRank { a, b },
            Delta::ShardSum { m } => Term::ShardSum { m },
        });
        SegmentTerms {
            start: segment.start,
            len: segment.len,
            own_weight: match &slots.weight {
                Weight::Base => None,
                Weight::Own(w) => Some(w),
            },
            terms: terms.collect(),
            scale: match &slots.scale {
                Scale::One => None,
                Scale::Diag(scale) => Some(scale),
            },
            c: slots.c.as_ref().or(self.bias.as_ref()),
        }
    }
}
