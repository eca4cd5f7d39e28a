//! The kernels as operations on candle's CPU tensors.

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, InplaceOp1, InplaceOp2, Layout, Result, Shape, Tensor, WithDType, bail,
};
use half::bf16;

use super::attention::{QuerySpan, paged_attention};
use super::kv::{CacheView, KvElement, Rows, write_keys, write_values};
use super::linear::{Finish, SweepLinear, sweep};
use super::norm::{Norm, rms_norm};
use super::rotate::{QkPrepare, prepare_qk};
use super::silu::silu_mul_rows;
use crate::kernels::AttentionShape;

/// Linears of `x` (rows, in) f32 with their adapters, side by side: (rows, sum of outs) f32;
/// `scale ⊙ (W pre(x) + sum_j delta_j(x)) + c` per run of rows with one adapter.
///
/// # Errors
/// When `x` is not an f32 matrix on the CPU.
pub fn join_op(x: &Tensor, linears: &[SweepLinear<'_>]) -> Result<Tensor> {
    x.contiguous()?.apply_op1_no_bwd(&SweepOp { linears, gated: false })
}

/// `silu(first(x)) * second(x)` of two linears with their adapters, x: (rows, in) f32: (rows, out) f32.
///
/// # Errors
/// When `x` is not an f32 matrix on the CPU.
pub(crate) fn gated_op(x: &Tensor, linears: &[SweepLinear<'_>; 2]) -> Result<Tensor> {
    x.contiguous()?.apply_op1_no_bwd(&SweepOp { linears, gated: true })
}

/// `residual + linear(x)`, x: (rows, in), residual: (rows, out), both f32: (rows, out) f32.
///
/// # Errors
/// When a tensor is not an f32 matrix on the CPU.
pub(crate) fn add_op(x: &Tensor, linear: SweepLinear<'_>, residual: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op2_no_bwd(&residual.contiguous()?, &AddOp(linear))
}

/// `silu(first half) * second half` of each row, (rows, 2 n) f32 to (rows, n) f32.
///
/// # Errors
/// When `x` is not an f32 matrix on the CPU.
pub(crate) fn silu_mul_op(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1_no_bwd(&SiluMulOp)
}

/// RMS norm over the last dimension of `x` f32, whose first dimension is what the norm's runs count.
///
/// # Errors
/// When `x` is not f32 on the CPU.
pub(crate) fn norm_op(x: &Tensor, norm: &Norm<'_>) -> Result<Tensor> {
    x.contiguous()?.apply_op1_no_bwd(&NormOp(norm))
}

/// Norms and rotates the queries and keys of joint rows (tokens, queries + keys + values) f32, in place.
///
/// # Errors
/// When `rows` is not a contiguous f32 matrix on the CPU.
pub(crate) fn prepare_qk_op(rows: &Tensor, prepare: &QkPrepare<'_>) -> Result<()> {
    rows.inplace_op1(&QkOp(prepare))
}

/// Attention of `q` (tokens, heads * head_dim) f32 over a layer's cache, keys and values both f32 or both bf16:
/// (tokens, heads * head_dim) f32. The rows of `q` need not adjoin.
///
/// # Errors
/// When a tensor is not in its format or not on the CPU.
pub(crate) fn attention_op(
    q: &Tensor,
    (keys, values): (&Tensor, &Tensor),
    block_tokens: usize,
    spans: &[QuerySpan<'_>],
    shape: AttentionShape,
) -> Result<Tensor> {
    q.apply_op3_no_bwd(keys, values, &AttentionOp { block_tokens, spans, shape })
}

/// Writes the keys `k` and values `v` (tokens, kv_heads * head_dim) f32 to their slots of a layer's cache in f32 or bf16
/// (rounded to nearest), in place. Their rows need not adjoin.
///
/// # Errors
/// When a tensor is not in its format or not on the CPU.
pub(crate) fn write_cache_op(
    (k, v): (&Tensor, &Tensor),
    (keys, values): (&Tensor, &Tensor),
    block_tokens: usize,
    slots: &[u32],
    shape: AttentionShape,
) -> Result<()> {
    keys.inplace_op2(k, &WriteOp { block_tokens, slots, shape, transposed: true })?;
    values.inplace_op2(v, &WriteOp { block_tokens, slots, shape, transposed: false })
}

/// The values of a contiguous tensor.
fn values<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((from, to)) = layout.contiguous_offsets() else { bail!("the tensor is not contiguous") };
    Ok(&storage.as_slice::<T>()?[from..to])
}

/// The rows of an f32 matrix whose elements adjoin within a row.
fn rows<'a>(storage: &'a CpuStorage, layout: &Layout, width: usize) -> Result<Rows<'a>> {
    let (count, columns) = layout.shape().dims2()?;
    let [stride, 1] = *layout.stride() else { bail!("the elements of a row do not adjoin") };
    if columns != width {
        bail!("rows of {columns} elements, expected {width}");
    }
    let from = layout.start_offset();
    let to = from + count.saturating_sub(1) * stride + columns;
    Ok(Rows { values: &storage.as_slice::<f32>()?[from..to], stride })
}

struct SweepOp<'a> {
    linears: &'a [SweepLinear<'a>],
    gated: bool,
}

impl CustomOp1 for SweepOp<'_> {
    fn name(&self) -> &'static str {
        "sweep"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, k) = layout.shape().dims2()?;
        check_width(k, self.linears)?;
        let widths = self.linears.iter().map(|linear| linear.weight.n());
        let (n, finish) =
            if self.gated { (widths.max().unwrap_or(0), Finish::SiluMul) } else { (widths.sum(), Finish::Join) };
        let y = sweep(values(storage, layout)?, self.linears, finish);
        Ok((CpuStorage::F32(y), (rows, n).into()))
    }
}

fn check_width(k: usize, linears: &[SweepLinear<'_>]) -> Result<()> {
    for linear in linears {
        if k != linear.weight.k() {
            bail!("rows of length {k} meet a linear with {} inputs", linear.weight.k());
        }
    }
    Ok(())
}

struct AddOp<'a>(SweepLinear<'a>);

impl CustomOp2 for AddOp<'_> {
    fn name(&self) -> &'static str {
        "sweep_add"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, k) = x_layout.shape().dims2()?;
        check_width(k, std::slice::from_ref(&self.0))?;
        let shape = (rows, self.0.weight.n());
        if residual_layout.shape().dims2()? != shape {
            bail!("a residual of shape {:?}, expected {shape:?}", residual_layout.shape());
        }
        let finish = Finish::Add(values(residual, residual_layout)?);
        let y = sweep(values(x, x_layout)?, std::slice::from_ref(&self.0), finish);
        Ok((CpuStorage::F32(y), shape.into()))
    }
}

struct SiluMulOp;

impl CustomOp1 for SiluMulOp {
    fn name(&self) -> &'static str {
        "silu_mul"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        let mut y = vec![0.0; rows * (width / 2)];
        silu_mul_rows(values(storage, layout)?, width / 2, &mut y);
        Ok((CpuStorage::F32(y), (rows, width / 2).into()))
    }
}

struct NormOp<'a>(&'a Norm<'a>);

impl CustomOp1 for NormOp<'_> {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let mut y = vec![0.0; x.len()];
        rms_norm(x, self.0, &mut y);
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }
}

struct QkOp<'a>(&'a QkPrepare<'a>);

impl InplaceOp1 for QkOp<'_> {
    fn name(&self) -> &'static str {
        "prepare_qk"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (_, stride) = layout.shape().dims2()?;
        let Some((from, to)) = layout.contiguous_offsets() else { bail!("the rows do not adjoin") };
        let CpuStorage::F32(rows) = storage else { bail!("the rows are not f32") };
        prepare_qk(&mut rows[from..to], stride, self.0);
        Ok(())
    }
}

struct AttentionOp<'a> {
    block_tokens: usize,
    spans: &'a [QuerySpan<'a>],
    shape: AttentionShape,
}

impl CustomOp3 for AttentionOp<'_> {
    fn name(&self) -> &'static str {
        "paged_attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        keys: &CpuStorage,
        keys_layout: &Layout,
        cached: &CpuStorage,
        cached_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let cached = ((keys, keys_layout), (cached, cached_layout));
        match keys {
            CpuStorage::BF16(_) => self.attend::<bf16>((q, q_layout), cached),
            _ => self.attend::<f32>((q, q_layout), cached),
        }
    }
}

impl AttentionOp<'_> {
    fn attend<T: KvElement + WithDType>(
        &self,
        (q, q_layout): (&CpuStorage, &Layout),
        (keys, cached): ((&CpuStorage, &Layout), (&CpuStorage, &Layout)),
    ) -> Result<(CpuStorage, Shape)> {
        let width = self.shape.num_heads * self.shape.head_dim;
        let cache = CacheView {
            keys: values::<T>(keys.0, keys.1)?,
            values: values::<T>(cached.0, cached.1)?,
            block_tokens: self.block_tokens,
        };
        let (tokens, _) = q_layout.shape().dims2()?;
        let mut y = vec![0.0; tokens * width];
        paged_attention(rows(q, q_layout, width)?, cache, self.spans, self.shape, &mut y);
        Ok((CpuStorage::F32(y), (tokens, width).into()))
    }
}

struct WriteOp<'a> {
    block_tokens: usize,
    slots: &'a [u32],
    shape: AttentionShape,
    /// Keys are stored transposed within their block.
    transposed: bool,
}

impl InplaceOp2 for WriteOp<'_> {
    fn name(&self) -> &'static str {
        "write_cache"
    }

    fn cpu_fwd(
        &self,
        cache: &mut CpuStorage,
        cache_layout: &Layout,
        new: &CpuStorage,
        new_layout: &Layout,
    ) -> Result<()> {
        let new = rows(new, new_layout, self.shape.num_kv_heads * self.shape.head_dim)?;
        if new_layout.dims()[0] != self.slots.len() {
            bail!("{} rows for {} slots", new_layout.dims()[0], self.slots.len());
        }
        let Some((from, to)) = cache_layout.contiguous_offsets() else { bail!("the cache is not contiguous") };
        match cache {
            CpuStorage::F32(cache) => self.write(new, &mut cache[from..to]),
            CpuStorage::BF16(cache) => self.write(new, &mut cache[from..to]),
            _ => bail!("the cache is neither f32 nor bf16"),
        }
        Ok(())
    }
}

impl WriteOp<'_> {
    fn write<T: KvElement>(&self, new: Rows<'_>, cache: &mut [T]) {
        let write = if self.transposed { write_keys } else { write_values };
        write(new, self.slots, self.shape, self.block_tokens, cache);
    }
}
