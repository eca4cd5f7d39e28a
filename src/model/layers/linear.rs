//! A linear with its adapters.

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Result, Tensor};
use mistralrs_quant::{GgufMatMul, QuantMethod};

use crate::adapter::{Delta, LinearSlots, Pre, Scale, SiteId, Weight};
use crate::kernels::cpu::{
    BaseMatrix, IntegerMatrix, PackedMatrix, SlotRun, SweepLinear, add_op, gated_op, join_op, silu_mul_op,
};
use crate::kernels::{self, InputTerm, OutputTerm, SegmentTerms, Spectral, Term};
use crate::model::AdapterSegment;

/// A weight in the format it is kept in.
#[derive(Clone, Debug)]
pub(in crate::model) enum Matrix {
    /// Dense, (out, in).
    Dense(Tensor),
    /// Packed for the CPU's kernels.
    Packed(Arc<PackedMatrix>),
    /// In integers for the CPU's kernels.
    Integers(Arc<IntegerMatrix>),
    /// Quantised in GGUF blocks: the blocks, and what multiplies with them.
    Quantized {
        /// The blocks.
        blocks: Arc<QTensor>,
        /// The product with them.
        product: Arc<GgufMatMul>,
    },
}

/// `y = scale_t * (W_t pre_t(x) + sum_j delta_{t,j}(x)) + c_t` for each token's adapter t.
#[derive(Clone, Debug)]
pub(in crate::model) struct Linear {
    /// Where it stands.
    pub(in crate::model) site: SiteId,
    /// The shared weight.
    pub(in crate::model) weight: Matrix,
    /// The base's bias (out).
    pub(in crate::model) bias: Option<Tensor>,
    /// The bias on the host, where the weight is packed.
    bias_values: Option<Arc<[f32]>>,
}

impl Matrix {
    /// `x W^T`, (rows, out) in the format of `x`.
    fn product(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(w) => kernels::linear(x, w),
            Self::Packed(_) | Self::Integers(_) => {
                let weight = self.packed().expect("the kernels' own form");
                let runs = vec![SlotRun::bare(0..x.dim(0)?)];
                join_op(x, &[SweepLinear { weight, bias: None, runs }])
            }
            Self::Quantized { product, .. } => product.forward_autocast(x),
        }
    }

    /// The matrix as the CPU's kernels take it, where it is in one of their forms.
    pub(in crate::model) fn packed(&self) -> Option<BaseMatrix<'_>> {
        match self {
            Self::Packed(w) => Some(BaseMatrix::Float(w)),
            Self::Integers(w) => Some(BaseMatrix::Integers(w)),
            Self::Dense(_) | Self::Quantized { .. } => None,
        }
    }

    /// (out, in).
    pub(in crate::model) fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(w) => w.dims2(),
            Self::Packed(w) => Ok((w.n(), w.k())),
            Self::Integers(w) => Ok((w.n(), w.k())),
            Self::Quantized { blocks, .. } => blocks.shape().dims2(),
        }
    }

    /// Rows `ids` of the matrix, (ids, in): in the matrix's format when dense, in f32 when packed.
    pub(in crate::model) fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        match self {
            Self::Dense(w) => w.index_select(&Tensor::new(ids, w.device())?, 0),
            Self::Packed(w) => read_rows(ids, w.k(), |id, row| w.read_row(id, row)),
            Self::Integers(w) => read_rows(ids, w.k(), |id, row| w.read_row(id, row)),
            Self::Quantized { .. } => unreachable!("embeddings are not quantised in blocks"),
        }
    }

    /// The matrix that [`Matrix::product`] multiplies with, (out, in) in f32 on the CPU.
    pub(in crate::model) fn to_f32(&self) -> Result<Tensor> {
        match self {
            Self::Dense(w) => w.to_device(&Device::Cpu)?.to_dtype(DType::F32),
            Self::Packed(w) => Tensor::from_vec(w.unpack(), (w.n(), w.k()), &Device::Cpu),
            Self::Integers(w) => Tensor::from_vec(w.unpack(), (w.n(), w.k()), &Device::Cpu),
            Self::Quantized { blocks, .. } => blocks.dequantize(&Device::Cpu)?.to_dtype(DType::F32),
        }
    }
}

fn read_rows(ids: &[u32], k: usize, read: impl Fn(usize, &mut [f32])) -> Result<Tensor> {
    let mut values = vec![0.0; ids.len() * k];
    values.chunks_exact_mut(k).zip(ids).for_each(|(row, id)| read(*id as usize, row));
    Tensor::from_vec(values, (ids.len(), k), &Device::Cpu)
}

impl Linear {
    /// The linear at `site`.
    pub(in crate::model) fn new(site: SiteId, weight: Matrix, bias: Option<Tensor>) -> Result<Self> {
        let bias_values = match (weight.packed(), &bias) {
            (Some(_), Some(bias)) => Some(bias.to_dtype(DType::F32)?.to_vec1::<f32>()?.into()),
            _ => None,
        };
        Ok(Self { site, weight, bias, bias_values })
    }

    /// Applies the linear to `x` (tokens, in) under `segments`, which tile the tokens: (tokens, out).
    pub(in crate::model) fn forward(&self, x: &Tensor, segments: &[AdapterSegment]) -> Result<Tensor> {
        if let Some(linear) = self.packed(segments) {
            return join_op(x, &[linear]);
        }
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
        let pre_x = kernels::transform_inputs(x, &terms)?;
        let shared = terms.iter().any(|terms| terms.own_weight.is_none());
        let product = if shared { Some(self.weight.product(&pre_x)?) } else { None };
        kernels::apply_segments((x, &pre_x), product.as_ref(), &terms)
    }

    /// `residual + self(x)`.
    pub(in crate::model) fn forward_add(
        &self,
        x: &Tensor,
        segments: &[AdapterSegment],
        residual: &Tensor,
    ) -> Result<Tensor> {
        match self.packed(segments) {
            Some(linear) => add_op(x, linear, residual),
            None => residual + self.forward(x, segments)?,
        }
    }

    /// The outputs of several linears of `x` side by side, (tokens, sum of outs).
    pub(in crate::model) fn forward_joined(
        linears: &[&Self],
        x: &Tensor,
        segments: &[AdapterSegment],
    ) -> Result<Tensor> {
        if let Some(packed) = Self::all_packed(linears, segments) {
            return join_op(x, &packed);
        }
        let outputs = linears.iter().map(|linear| linear.forward(x, segments));
        Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 1)
    }

    /// `silu(gate(x)) * up(x)`, in one sweep unless an adapter's outputs depend on one another; `None` where the weights are not packed alike.
    pub(in crate::model) fn forward_gated(
        gate: &Self,
        up: &Self,
        x: &Tensor,
        segments: &[AdapterSegment],
    ) -> Result<Option<Tensor>> {
        let Some(packed) = Self::all_packed(&[gate, up], segments) else { return Ok(None) };
        if packed.iter().any(SweepLinear::needs_whole_rows) {
            return silu_mul_op(&join_op(x, &packed)?).map(Some);
        }
        <[_; 2]>::try_from(packed).ok().map(|packed| gated_op(x, &packed)).transpose()
    }

    /// Whether the weight is packed for the CPU's kernels.
    pub(in crate::model) fn is_packed(&self) -> bool {
        self.weight.packed().is_some()
    }

    /// Linears that can share a sweep: all packed, in one form.
    fn all_packed<'a>(linears: &[&'a Self], segments: &'a [AdapterSegment]) -> Option<Vec<SweepLinear<'a>>> {
        let packed: Vec<SweepLinear<'a>> =
            linears.iter().map(|linear| linear.packed(segments)).collect::<Option<_>>()?;
        let form = packed.first()?.weight.form();
        packed.iter().all(|linear| linear.weight.form() == form).then_some(packed)
    }

    /// The linear as the CPU's kernels take it, where its weight is packed.
    fn packed<'a>(&'a self, segments: &'a [AdapterSegment]) -> Option<SweepLinear<'a>> {
        let weight = self.weight.packed()?;
        let mut runs: Vec<SlotRun<'a>> = Vec::with_capacity(segments.len());
        for segment in segments {
            let slots = segment.adapter.as_ref().and_then(|adapter| adapter.packed.get(&self.site));
            match runs.last_mut() {
                Some(last) if last.slots.is_none() && slots.is_none() => last.rows.end += segment.len,
                _ => {
                    let gates = segment.gates.as_ref().and_then(|gates| gates.for_kernels());
                    runs.push(SlotRun { rows: segment.start..segment.start + segment.len, slots, gates });
                }
            }
        }
        Some(SweepLinear { weight, bias: self.bias_values.as_deref(), runs })
    }

    /// What each segment does here; neighbours that leave the base as it is are one.
    fn terms<'a>(&'a self, segments: &'a [AdapterSegment]) -> Vec<SegmentTerms<'a>> {
        let mut all: Vec<SegmentTerms<'a>> = Vec::with_capacity(segments.len());
        let mut last_is_base = false;
        for segment in segments {
            let slots = segment.adapter.as_ref().and_then(|adapter| adapter.tensors.linears.get(&self.site));
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

    fn slot_terms<'a>(&'a self, segment: &'a AdapterSegment, slots: &'a LinearSlots) -> SegmentTerms<'a> {
        let terms = slots.deltas.iter().map(|delta| match delta {
            Delta::LowRank { a, b } => Term::LowRank { a, b },
            Delta::Routed { a, b, prototypes, top_k, temperature } => {
                Term::Routed { a, b, prototypes, top_k: *top_k, temperature: f64::from(*temperature) }
            }
            Delta::Gated { a, b, places } => Term::Gated { a, b, places },
            Delta::ShardSum { m } => Term::ShardSum { m },
            Delta::Sparse { rows, columns, values } => Term::Sparse { rows, columns, values },
            Delta::Circulant { kernel } => Term::Circulant { kernel },
            Delta::BlockProduct { a, mix, b } => Term::BlockProduct { a, mix, b: b.as_ref() },
            Delta::Spectral { basis, shape, rows, columns, values } => {
                Term::Spectral(Spectral { basis, shape: *shape, rows, columns, values })
            }
            Delta::SharedLowRank { a, b, d, g } => Term::ScaledLowRank { a: a.tensor(), b: b.tensor(), d, g },
        });
        SegmentTerms {
            start: segment.start,
            len: segment.len,
            pre: match &slots.pre {
                Pre::Identity => None,
                Pre::Diag(scale) => Some(InputTerm::Diag { scale }),
                Pre::BlockDiag(blocks) => Some(InputTerm::BlockDiag { blocks }),
                Pre::Butterfly(factors) => Some(InputTerm::Butterfly { factors }),
            },
            own_weight: match &slots.weight {
                Weight::Base => None,
                Weight::Own(w) => Some(w),
            },
            rows: slots.rows.as_ref().map(|(indexes, rows)| (indexes.as_slice(), rows)),
            terms: terms.collect(),
            scale: match &slots.scale {
                Scale::One => None,
                Scale::Diag(scale) => Some(OutputTerm::Diag { scale }),
                Scale::PairRot { p, q, half } => Some(OutputTerm::PairRot { p, q, half: *half }),
                Scale::BlockDiag(blocks) => Some(OutputTerm::BlockDiag { blocks }),
            },
            c: slots.c.as_ref().or(self.bias.as_ref()),
            gates: segment.gates.as_ref().map(|gates| &gates.rows),
        }
    }
}
