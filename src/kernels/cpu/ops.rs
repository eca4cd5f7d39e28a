//! The kernels as operations on candle's CPU tensors.

use candle_core::{CpuStorage, CustomOp1, CustomOp3, InplaceOp2, Layout, Result, Shape, Tensor, bail};

use super::attention::{CacheView, QuerySpan, paged_attention, write_keys, write_values};
use super::linear::{BaseLinear, SlotRun, linear_packed};
use crate::kernels::AttentionShape;

/// A linear with its adapters on `x` (rows, in) f32: (rows, out) f32; `scale ⊙ (W x + sum_j delta_j(x)) + c` per
/// run of rows with one adapter.
///
/// # Errors
/// When `x` is not an f32 matrix on the CPU.
pub fn linear_op(x: &Tensor, base: BaseLinear<'_>, runs: &[SlotRun<'_>]) -> Result<Tensor> {
    x.contiguous()?.apply_op1_no_bwd(&LinearOp { base, runs })
}

/// Attention of `q` (tokens, heads, head_dim) over a layer's cache, all f32: (tokens, heads * head_dim).
///
/// # Errors
/// When a tensor is not f32 on the CPU.
pub(crate) fn attention_op(
    q: &Tensor,
    (keys, values): (&Tensor, &Tensor),
    block_tokens: usize,
    spans: &[QuerySpan<'_>],
    shape: AttentionShape,
) -> Result<Tensor> {
    q.contiguous()?.apply_op3_no_bwd(keys, values, &AttentionOp { block_tokens, spans, shape })
}

/// Writes the keys `k` and values `v` (tokens, kv_heads * head_dim) to their slots of a layer's cache, in place.
///
/// # Errors
/// When a tensor is not f32 on the CPU.
pub(crate) fn write_cache_op(
    (k, v): (&Tensor, &Tensor),
    (keys, values): (&Tensor, &Tensor),
    block_tokens: usize,
    slots: &[u32],
    shape: AttentionShape,
) -> Result<()> {
    keys.inplace_op2(&k.contiguous()?, &WriteOp { block_tokens, slots, shape, transposed: true })?;
    values.inplace_op2(&v.contiguous()?, &WriteOp { block_tokens, slots, shape, transposed: false })
}

/// The values of a contiguous f32 tensor.
fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((from, to)) = layout.contiguous_offsets() else { bail!("the tensor is not contiguous") };
    Ok(&storage.as_slice::<f32>()?[from..to])
}

struct LinearOp<'a> {
    base: BaseLinear<'a>,
    runs: &'a [SlotRun<'a>],
}

impl CustomOp1 for LinearOp<'_> {
    fn name(&self) -> &'static str {
        "linear_packed"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, k) = layout.shape().dims2()?;
        if k != self.base.k {
            bail!("rows of length {k} meet a linear with {} inputs", self.base.k);
        }
        let mut y = vec![0.0; rows * self.base.n];
        linear_packed(values(storage, layout)?, self.base, self.runs, &mut y);
        Ok((CpuStorage::F32(y), (rows, self.base.n).into()))
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
        let (tokens, num_heads, head_dim) = q_layout.shape().dims3()?;
        let cache = CacheView {
            keys: values(keys, keys_layout)?,
            values: values(cached, cached_layout)?,
            block_tokens: self.block_tokens,
        };
        let mut y = vec![0.0; tokens * num_heads * head_dim];
        paged_attention(values(q, q_layout)?, cache, self.spans, self.shape, &mut y);
        Ok((CpuStorage::F32(y), (tokens, num_heads * head_dim).into()))
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
        rows: &CpuStorage,
        rows_layout: &Layout,
    ) -> Result<()> {
        let rows = values(rows, rows_layout)?;
        let Some((from, to)) = cache_layout.contiguous_offsets() else { bail!("the cache is not contiguous") };
        let CpuStorage::F32(cache) = cache else { bail!("the cache is not f32") };
        let write = if self.transposed { write_keys } else { write_values };
        write(rows, self.slots, self.shape, self.block_tokens, &mut cache[from..to]);
        Ok(())
    }
}
