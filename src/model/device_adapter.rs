//! An adapter on the model's device, in the form that the layers work with.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Result, Storage, Tensor, WithDType};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::gates::DeviceGates;
use super::shared_forms::{PackedForms, SharedForms};
use crate::adapter::{
    AttentionBranch, BlockMix, Delta, EmbeddingPatch, GateNetwork, KvPrefix, LinearSlots, LoweredAdapter, NormOverride,
    Pre, Scale, SiteId, StreamFunction, Weight,
};
use crate::kernels::ButterflyFactor;
use crate::kernels::cpu::{
    BlockProduct, Blocks, Circulant, IntegerMatrix, IntegerWidth, NormSlots, OwnMatrix, PackedDelta, PackedMatrix,
    PackedMix, PackedPre, PackedScale, PackedSlots, PackedVector, Router, RowForm, RowMatrix, SparseRows, SpectralRows,
    WeightFormat,
};
use crate::kernels::{KvLayout, PagedKv};

/// An adapter on the model's device.
///
/// A linear whose base weight is packed has its slots packed too; all others hold tensors. On the CPU, dense weights and
/// embedding tables of the adapter's own keep half-precision formats, as the base's do.
#[derive(Debug, Default)]
pub struct DeviceAdapter {
    /// What is kept as tensors.
    pub tensors: LoweredAdapter,
    /// Linears in the CPU kernels' form.
    pub(super) packed: HashMap<SiteId, PackedSlots>,
    /// Norms in the CPU kernels' form.
    pub(super) packed_norms: HashMap<SiteId, NormSlots>,
    /// What happens inside decoder layers, by number; the tensors have none of it.
    pub(super) layers: BTreeMap<usize, DeviceLayer>,
    /// What gives its tokens their gates; the tensors have none of it.
    pub(super) gates: Option<DeviceGates>,
}

/// What an adapter does inside one decoder layer.
#[derive(Debug, Default)]
pub(super) struct DeviceLayer {
    pub(super) after_attention: Option<DeviceFunction>,
    pub(super) after_mlp: Option<DeviceFunction>,
    /// Entries of an attention branch.
    pub(super) branch: Option<PagedKv>,
}

/// A function of the residual stream.
#[derive(Debug)]
pub(super) struct DeviceFunction {
    pub(super) function: StreamFunction,
    /// The weights of the ways down and up, where the CPU's kernels run the layers; they read these then.
    pub(super) packed: Option<(PackedMatrix, PackedMatrix)>,
}

impl DeviceAdapter {
    /// An adapter that keeps the tensors it has: for a model whose weights are not packed, and for fakes of one.
    pub fn from_tensors(tensors: LoweredAdapter) -> Self {
        Self { tensors, ..Self::default() }
    }

    /// Places `adapter`; `packed_base` tells of the base of a site whose weight is packed.
    pub(super) fn new<'a>(
        adapter: &LoweredAdapter,
        place: &Placement<'_>,
        packed_base: impl Fn(SiteId) -> Option<PackedBase<'a>>,
    ) -> Result<Self> {
        let pack_layers = place.layout == KvLayout::Heads;
        let mut placed = Self::default();
        // Packing is most of the work of placing an adapter, and a step waits for it.
        let mut to_pack = Vec::new();
        for (site, slots) in &adapter.linears {
            match packed_base(*site) {
                Some(base) => to_pack.push((*site, slots, base)),
                None => {
                    placed.tensors.linears.insert(*site, place.linear(slots)?);
                }
            }
        }
        let shared = place.shared.packed(to_pack.iter().map(|(_, slots, base)| (*slots, base.form.terms())))?;
        let packed = to_pack.into_par_iter().map(|(site, slots, base)| Ok((site, pack_slots(slots, &base, &shared)?)));
        placed.packed = packed.collect::<Result<_>>()?;
        for (site, norm) in &adapter.norms {
            if pack_layers {
                let host = |tensor: &Option<Tensor>| tensor.as_ref().map(host).transpose();
                let slots = NormSlots { weight: host(&norm.weight)?, shift: host(&norm.shift)? };
                placed.packed_norms.insert(*site, slots);
                continue;
            }
            let norm = NormOverride { weight: place.option(&norm.weight)?, shift: place.option(&norm.shift)? };
            placed.tensors.norms.insert(*site, norm);
        }
        for (site, patch) in &adapter.embeddings {
            placed.tensors.embeddings.insert(*site, place.embedding(patch)?);
        }
        for (number, slots) in &adapter.layers {
            let function = |f: &Option<StreamFunction>| f.as_ref().map(|f| place.function(f, pack_layers)).transpose();
            let layer = DeviceLayer {
                after_attention: function(&slots.after_attention)?,
                after_mlp: function(&slots.after_mlp)?,
                branch: slots.branch.as_ref().map(|branch| place.branch(branch)).transpose()?,
            };
            placed.layers.insert(*number, layer);
        }
        placed.gates = adapter.gates.as_ref().map(|network| place.gates(network, pack_layers)).transpose()?;
        placed.tensors.virtual_tokens = place.option(&adapter.virtual_tokens)?;
        if let Some(prefix) = &adapter.kv_prefix {
            let layers = prefix.layers.iter().map(|(keys, values)| Ok((place.tensor(keys)?, place.tensor(values)?)));
            placed.tensors.kv_prefix = Some(KvPrefix { layers: layers.collect::<Result<_>>()? });
        }
        placed.tensors.invocation_tokens.clone_from(&adapter.invocation_tokens);
        Ok(placed)
    }
}

/// Packs a dense weight (n, k) for the CPU: bf16 stays bf16, every other format becomes f32.
pub(super) fn pack_matrix(w: &Tensor) -> Result<PackedMatrix> {
    let format = if w.dtype() == DType::BF16 { WeightFormat::Bf16 } else { WeightFormat::F32 };
    pack_as(w, format)
}

/// Makes a dense weight (n, k) integers for the CPU; what adapters add to it is in the format that [`pack_matrix`] would give
/// it.
pub(super) fn integer_matrix(width: IntegerWidth, w: &Tensor) -> Result<IntegerMatrix> {
    let dims @ (_, k) = w.dims2()?;
    let packed = if w.dtype() == DType::BF16 {
        with_values::<bf16, _>(w, |values| {
            let read = |row: usize, out: &mut [f32]| values[row * k..][..k].convert_to_f32_slice(out);
            IntegerMatrix::new(width, WeightFormat::Bf16, dims, read)
        })?
    } else {
        with_values::<f32, _>(&w.to_dtype(DType::F32)?, |values| {
            let read = |row: usize, out: &mut [f32]| out.copy_from_slice(&values[row * k..][..k]);
            IntegerMatrix::new(width, WeightFormat::F32, dims, read)
        })?
    };
    Ok(packed?)
}

/// `w` (n, k) for panels, in `format`.
pub(super) fn pack_as(w: &Tensor, format: WeightFormat) -> Result<PackedMatrix> {
    let (n, k) = w.dims2()?;
    let packed = match (format, w.dtype()) {
        (WeightFormat::Bf16, DType::BF16) => {
            with_values::<bf16, _>(w, |values| PackedMatrix::from_bf16(n, k, |row| &values[row * k..][..k]))?
        }
        (WeightFormat::Bf16, _) => {
            let w = w.to_dtype(DType::F32)?;
            with_values::<f32, _>(&w, |values| PackedMatrix::rounded(n, k, |row| &values[row * k..][..k]))?
        }
        (WeightFormat::F32, _) => {
            let w = w.to_dtype(DType::F32)?;
            with_values::<f32, _>(&w, |values| PackedMatrix::from_f32(n, k, |row| &values[row * k..][..k]))?
        }
    };
    Ok(packed?)
}

/// `a` (r, k) as rows, in `format`.
fn pack_rows(a: &Tensor, format: WeightFormat) -> Result<RowMatrix> {
    let (r, k) = a.dims2()?;
    match (format, a.dtype()) {
        (WeightFormat::Bf16, DType::BF16) => with_values::<bf16, _>(a, |values| RowMatrix::from_bf16(values, r, k)),
        _ => with_values::<f32, _>(&a.to_dtype(DType::F32)?, |values| RowMatrix::new(format, values, r, k)),
    }
}

/// What `f` makes of the values of a tensor of `T`, in order; they are copied only where they do not lie so.
fn with_values<T: WithDType, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> R) -> Result<R> {
    {
        let (storage, layout) = tensor.storage_and_layout();
        if let (Storage::Cpu(storage), Some((from, to))) = (&*storage, layout.contiguous_offsets()) {
            return Ok(f(&storage.as_slice::<T>()?[from..to]));
        }
    }
    Ok(f(&tensor.flatten_all()?.to_vec1::<T>()?))
}

pub(super) fn host(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

fn pack_blocks(blocks: &Tensor) -> Result<Blocks> {
    Ok(Blocks::new(blocks.dim(1)?, &host(blocks)?))
}

fn pack_product(a: &Tensor, mix: &BlockMix, b: Option<&Tensor>, format: WeightFormat) -> Result<BlockProduct> {
    let mix = match mix {
        BlockMix::Matrix(w) => PackedMix::Matrix { w: host(w)?, p: w.dim(0)? },
        BlockMix::Exchange => PackedMix::Exchange,
    };
    let b = b.map(|b| Result::Ok((host(b)?, b.dims3()?))).transpose()?;
    let b = b.as_ref().map(|(values, shape)| (values.as_slice(), *shape));
    Ok(BlockProduct::new(format, (&host(a)?, a.dims3()?), mix, b)?)
}

/// What the base has at a linear whose weight is packed.
pub(super) struct PackedBase<'a> {
    /// What rows of activations are made into.
    pub(super) form: RowForm,
    /// Inputs.
    pub(super) k: usize,
    /// Bias (n).
    pub(super) bias: Option<&'a Tensor>,
}

fn pack_slots(slots: &LinearSlots, base: &PackedBase<'_>, shared: &PackedForms) -> Result<PackedSlots> {
    let PackedBase { form, k, bias } = *base;
    let format = form.terms();
    let mut deltas = Vec::with_capacity(slots.deltas.len());
    for delta in &slots.deltas {
        deltas.push(match delta {
            Delta::LowRank { a, b } => PackedDelta::LowRank { a: pack_rows(a, format)?, b: pack_as(b, format)? },
            Delta::Routed { a, b, prototypes, top_k, temperature } => PackedDelta::Routed {
                a: pack_rows(a, format)?,
                b: pack_as(b, format)?,
                router: Router::new(host(prototypes)?, a.dim(1)?, *top_k, *temperature),
            },
            Delta::Gated { a, b, places } => {
                PackedDelta::Gated { a: pack_rows(a, format)?, b: pack_as(b, format)?, places: places.to_vec1()? }
            }
            Delta::ShardSum { m } => PackedDelta::ShardSum { m: pack_as(&m.t()?, format)? },
            Delta::Sparse { rows, columns, values } => {
                let (rows, columns) = (rows.to_vec1::<u32>()?, columns.to_vec1::<u32>()?);
                PackedDelta::Sparse(SparseRows::new(format, k, &rows, (&columns, &host(values)?)))
            }
            Delta::Circulant { kernel } => PackedDelta::Circulant(Circulant::new(&host(kernel)?, kernel.dims3()?)),
            Delta::BlockProduct { a, mix, b } => PackedDelta::BlockProduct(pack_product(a, mix, b.as_ref(), format)?),
            Delta::Spectral { basis, shape, rows, columns, values } => {
                let places = rows.to_vec1::<u32>()?.into_iter().zip(columns.to_vec1::<u32>()?);
                let entries = places.zip(host(values)?).map(|((row, column), value)| (row, column, value));
                PackedDelta::Spectral(SpectralRows::new(basis, *shape, entries.collect()))
            }
            Delta::SharedLowRank { a, b, d, g } => PackedDelta::Joint(shared.term((a, b), (d, g), format)?),
        });
    }
    let rows = match &slots.rows {
        Some((indexes, rows)) => Some((indexes.clone(), pack_rows(rows, format)?)),
        None => None,
    };
    Ok(PackedSlots {
        pre: match &slots.pre {
            Pre::Identity => None,
            Pre::Diag(scale) => Some(PackedPre::Diag(host(scale)?)),
            Pre::BlockDiag(blocks) => Some(PackedPre::BlockDiag(pack_blocks(blocks)?)),
            Pre::Butterfly(factors) => {
                let factors = factors.iter().map(|factor| Ok((factor.places.to_vec1()?, pack_blocks(&factor.blocks)?)));
                Some(PackedPre::Butterfly(factors.collect::<Result<_>>()?))
            }
        },
        rows,
        own: match &slots.weight {
            Weight::Base => None,
            // What is not quantised over 8 bits is what the base itself would be in these integers.
            Weight::Own(w) => Some(match form.integers() {
                Some(IntegerWidth::Sixteen) => OwnMatrix::Integers(integer_matrix(IntegerWidth::Sixteen, w)?),
                Some(IntegerWidth::Eight) | None => OwnMatrix::Float(pack_as(w, format)?),
            }),
        },
        deltas,
        scale: match &slots.scale {
            Scale::One => None,
            Scale::Diag(scale) => Some(PackedScale::Diag(PackedVector::factors(format, &host(scale)?))),
            Scale::PairRot { p, q, half } => Some(PackedScale::PairRot { p: host(p)?, q: host(q)?, half: *half }),
            Scale::BlockDiag(blocks) => Some(PackedScale::BlockDiag(pack_blocks(blocks)?)),
        },
        c: match &slots.c {
            None => None,
            Some(c) => Some(PackedVector::added(format, &host(c)?, &bias.map_or(Ok(Vec::new()), host)?)),
        },
    })
}

/// Where an adapter's tensors go.
pub(super) struct Placement<'a> {
    pub(super) device: &'a Device,
    /// Format of activations.
    pub(super) dtype: DType,
    /// How keys and values lie; in [`KvLayout::Heads`] the CPU's kernels run norms and residual streams too.
    pub(super) layout: KvLayout,
    /// Key and value heads, and the length of their vectors.
    pub(super) heads: (usize, usize),
    /// Matrices that adapters share.
    pub(super) shared: &'a SharedForms,
}

impl Placement<'_> {
    fn tensor(&self, tensor: &Tensor) -> Result<Tensor> {
        tensor.to_device(self.device)?.to_dtype(self.dtype)?.contiguous()
    }

    fn option(&self, tensor: &Option<Tensor>) -> Result<Option<Tensor>> {
        tensor.as_ref().map(|tensor| self.tensor(tensor)).transpose()
    }

    fn big(&self, tensor: &Tensor) -> Result<Tensor> {
        let kept = self.device.is_cpu() && matches!(tensor.dtype(), DType::BF16 | DType::F16);
        if kept { tensor.to_device(self.device)?.contiguous() } else { self.tensor(tensor) }
    }

    fn linear(&self, slots: &LinearSlots) -> Result<LinearSlots> {
        let mut deltas = Vec::with_capacity(slots.deltas.len());
        for delta in &slots.deltas {
            deltas.push(match delta {
                Delta::LowRank { a, b } => Delta::LowRank { a: self.tensor(a)?, b: self.tensor(b)? },
                Delta::Routed { a, b, prototypes, top_k, temperature } => Delta::Routed {
                    a: self.tensor(a)?,
                    b: self.tensor(b)?,
                    prototypes: prototypes.to_device(self.device)?,
                    top_k: *top_k,
                    temperature: *temperature,
                },
                Delta::Gated { a, b, places } => {
                    Delta::Gated { a: self.tensor(a)?, b: self.tensor(b)?, places: places.to_device(self.device)? }
                }
                Delta::ShardSum { m } => Delta::ShardSum { m: self.tensor(m)? },
                Delta::Sparse { rows, columns, values } => Delta::Sparse {
                    rows: rows.to_device(self.device)?,
                    columns: columns.to_device(self.device)?,
                    values: self.tensor(values)?,
                },
                Delta::Circulant { kernel } => Delta::Circulant { kernel: self.tensor(kernel)? },
                Delta::BlockProduct { a, mix, b } => Delta::BlockProduct {
                    a: self.tensor(a)?,
                    mix: match mix {
                        BlockMix::Matrix(w) => BlockMix::Matrix(self.tensor(w)?),
                        BlockMix::Exchange => BlockMix::Exchange,
                    },
                    b: self.option(b)?,
                },
                Delta::Spectral { basis, shape, rows, columns, values } => Delta::Spectral {
                    basis: basis.clone(),
                    shape: *shape,
                    rows: rows.to_device(self.device)?,
                    columns: columns.to_device(self.device)?,
                    values: self.tensor(values)?,
                },
                Delta::SharedLowRank { a, b, d, g } => {
                    let matrix = |matrix| self.shared.tensor(matrix, |tensor| self.tensor(tensor));
                    Delta::SharedLowRank { a: matrix(a)?, b: matrix(b)?, d: self.tensor(d)?, g: self.tensor(g)? }
                }
            });
        }
        let rows = slots.rows.as_ref().map(|(indexes, rows)| Result::Ok((indexes.clone(), self.tensor(rows)?)));
        Ok(LinearSlots {
            pre: match &slots.pre {
                Pre::Identity => Pre::Identity,
                Pre::Diag(scale) => Pre::Diag(self.tensor(scale)?),
                Pre::BlockDiag(blocks) => Pre::BlockDiag(self.tensor(blocks)?),
                Pre::Butterfly(factors) => {
                    let place = |factor: &ButterflyFactor| -> Result<ButterflyFactor> {
                        let places = factor.places.to_device(self.device)?;
                        Ok(ButterflyFactor { places, blocks: self.tensor(&factor.blocks)? })
                    };
                    Pre::Butterfly(factors.iter().map(place).collect::<Result<_>>()?)
                }
            },
            rows: rows.transpose()?,
            weight: match &slots.weight {
                Weight::Base => Weight::Base,
                Weight::Own(w) => Weight::Own(self.big(w)?),
            },
            deltas,
            scale: match &slots.scale {
                Scale::One => Scale::One,
                Scale::Diag(scale) => Scale::Diag(self.tensor(scale)?),
                Scale::PairRot { p, q, half } => Scale::PairRot { p: self.tensor(p)?, q: self.tensor(q)?, half: *half },
                Scale::BlockDiag(blocks) => Scale::BlockDiag(self.tensor(blocks)?),
            },
            c: self.option(&slots.c)?,
        })
    }

    fn function(&self, function: &StreamFunction, pack: bool) -> Result<DeviceFunction> {
        let mut placed = function.clone();
        for tensor in placed.tensors_mut() {
            *tensor = self.tensor(tensor)?;
        }
        let packed = if pack { Some((pack_matrix(&function.down.0)?, pack_matrix(&function.up.0)?)) } else { None };
        Ok(DeviceFunction { function: placed, packed })
    }

    fn gates(&self, network: &GateNetwork, pack: bool) -> Result<DeviceGates> {
        let packed = network.layers.iter().map(|(weight, _)| pack_matrix(weight));
        let packed = if pack { Some(packed.collect::<Result<_>>()?) } else { None };
        let mut network = network.clone();
        for tensor in network.tensors_mut() {
            *tensor = self.tensor(tensor)?;
        }
        Ok(DeviceGates { network, packed })
    }

    fn branch(&self, branch: &AttentionBranch) -> Result<PagedKv> {
        let (keys, values) = (self.tensor(&branch.keys)?, self.tensor(&branch.values)?);
        PagedKv::of_entries(self.layout, (&keys, &values), self.heads)
    }

    fn embedding(&self, patch: &EmbeddingPatch) -> Result<EmbeddingPatch> {
        let rows = patch.rows.as_ref().map(|(ids, rows)| Result::Ok((ids.clone(), self.tensor(rows)?)));
        let low_rank = patch.low_rank.as_ref().map(|(a, b)| Result::Ok((self.tensor(a)?, self.tensor(b)?)));
        Ok(EmbeddingPatch {
            table: patch.table.as_ref().map(|table| self.big(table)).transpose()?,
            rows: rows.transpose()?,
            low_rank: low_rank.transpose()?,
            scale: self.option(&patch.scale)?,
            shift: self.option(&patch.shift)?,
        })
    }
}
