//! Whether an adapter changes anything at all.

use candle_core::{DType, Result, Tensor};

use super::{
    BaseWeights, Delta, EmbeddingPatch, LayerSlots, LinearSlots, LoweredAdapter, Mix, NormOverride, Pre, Scale, SiteId,
    StreamFunction, Weight,
};

/// Whether the adapter equals the base exactly. `dtype` is the format of own weights and tables; the rest is f32.
pub(super) fn is_neutral(adapter: &LoweredAdapter, base: &dyn BaseWeights, dtype: DType) -> Result<bool> {
    // Whatever stands before the prompt is attended to, even zeros.
    if adapter.num_leading() > 0 {
        return Ok(false);
    }
    for (id, slots) in &adapter.linears {
        if !linear_is_neutral(slots, *id, base, dtype)? {
            return Ok(false);
        }
    }
    for (id, norm) in &adapter.norms {
        if !norm_is_neutral(norm, *id, base)? {
            return Ok(false);
        }
    }
    for (id, patch) in &adapter.embeddings {
        if !embedding_is_neutral(patch, *id, base, dtype)? {
            return Ok(false);
        }
    }
    for slots in adapter.layers.values() {
        if !layer_is_neutral(slots)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn layer_is_neutral(slots: &LayerSlots) -> Result<bool> {
    if let Some(branch) = &slots.branch
        && !all_equal(&branch.values, 0.0)?
    {
        return Ok(false);
    }
    slots.functions().try_fold(true, |so_far, function| Ok(so_far && stream_is_kept(function)?))
}

/// Whether a function of the stream is the base's sum.
fn stream_is_kept(f: &StreamFunction) -> Result<bool> {
    let is_sum = f.outer == (Mix { stream: 1.0, output: 1.0 }) && f.norm_after.is_none();
    Ok(is_sum && all_equal(&f.up.0, 0.0)? && all_equal(&f.up.1, 0.0)?)
}

fn linear_is_neutral(slots: &LinearSlots, id: SiteId, base: &dyn BaseWeights, dtype: DType) -> Result<bool> {
    for delta in &slots.deltas {
        let vanishes = match delta {
            Delta::LowRank { a, b } | Delta::Routed { a, b, .. } | Delta::Gated { a, b, .. } => {
                all_equal(b, 0.0)? || all_equal(a, 0.0)?
            }
            Delta::ShardSum { m } => all_equal(m, 0.0)?,
            Delta::Sparse { values, .. } | Delta::Spectral { values, .. } => all_equal(values, 0.0)?,
            Delta::Circulant { kernel } => all_equal(kernel, 0.0)?,
            Delta::BlockProduct { a, mix, b } => {
                let mut factors = mix.matrix().into_iter().chain([a]).chain(b);
                factors.try_fold(false, |so_far, factor| Result::Ok(so_far || all_equal(factor, 0.0)?))?
            }
            Delta::SharedLowRank { d, g, .. } => all_equal(g, 0.0)? || all_equal(d, 0.0)?,
        };
        if !vanishes {
            return Ok(false);
        }
    }
    match &slots.pre {
        Pre::Identity => {}
        Pre::Diag(scale) if all_equal(scale, 1.0)? => {}
        Pre::BlockDiag(blocks) if equal(blocks, &identity_blocks(blocks)?)? => {}
        Pre::Butterfly(factors) => {
            for blocks in factors.iter().map(|factor| &factor.blocks) {
                if !equal(blocks, &identity_blocks(blocks)?)? {
                    return Ok(false);
                }
            }
        }
        Pre::Diag(_) | Pre::BlockDiag(_) => return Ok(false),
    }
    match &slots.scale {
        Scale::One => {}
        Scale::Diag(scale) if all_equal(scale, 1.0)? => {}
        Scale::PairRot { p, q, .. } if all_equal(p, 1.0)? && all_equal(q, 0.0)? => {}
        Scale::BlockDiag(blocks) if equal(blocks, &identity_blocks(blocks)?)? => {}
        Scale::Diag(_) | Scale::PairRot { .. } | Scale::BlockDiag(_) => return Ok(false),
    }
    if let Some(c) = &slots.c
        && !equals_bias(c, base.bias(id)?)?
    {
        return Ok(false);
    }
    if let Weight::Own(own) = &slots.weight
        && !equal(own, &base.weight(id)?.to_dtype(dtype)?)?
    {
        return Ok(false);
    }
    rows_are_neutral(slots.rows.as_ref(), id, base)
}

fn norm_is_neutral(norm: &NormOverride, id: SiteId, base: &dyn BaseWeights) -> Result<bool> {
    if let Some(weight) = &norm.weight
        && !equal(weight, &base.weight(id)?)?
    {
        return Ok(false);
    }
    norm.shift.as_ref().map_or(Ok(true), |shift| equals_bias(shift, base.bias(id)?))
}

fn embedding_is_neutral(patch: &EmbeddingPatch, id: SiteId, base: &dyn BaseWeights, dtype: DType) -> Result<bool> {
    if let Some((a, b)) = &patch.low_rank
        && !all_equal(b, 0.0)?
        && !all_equal(a, 0.0)?
    {
        return Ok(false);
    }
    for (vector, neutral) in patch.scale.iter().map(|scale| (scale, 1.0)).chain(patch.shift.iter().map(|s| (s, 0.0))) {
        if !all_equal(vector, neutral)? {
            return Ok(false);
        }
    }
    if let Some(table) = &patch.table
        && !equal(table, &base.weight(id)?.to_dtype(dtype)?)?
    {
        return Ok(false);
    }
    rows_are_neutral(patch.rows.as_ref(), id, base)
}

fn rows_are_neutral(rows: Option<&(Vec<u32>, Tensor)>, id: SiteId, base: &dyn BaseWeights) -> Result<bool> {
    let Some((ids, rows)) = rows else { return Ok(true) };
    let ids = Tensor::new(ids.as_slice(), rows.device())?;
    equal(rows, &base.weight(id)?.index_select(&ids, 0)?)
}

fn equals_bias(vector: &Tensor, bias: Option<Tensor>) -> Result<bool> {
    bias.map_or_else(|| all_equal(vector, 0.0), |bias| equal(vector, &bias))
}

/// Identity matrices, as many and as large as `blocks` (n, s, s).
fn identity_blocks(blocks: &Tensor) -> Result<Tensor> {
    let eye = Tensor::eye(blocks.dim(1)?, blocks.dtype(), blocks.device())?;
    eye.broadcast_as(blocks.shape())?.contiguous()
}

fn all_equal(tensor: &Tensor, value: f64) -> Result<bool> {
    equal(tensor, &Tensor::full(value as f32, tensor.shape(), tensor.device())?)
}

fn equal(x: &Tensor, y: &Tensor) -> Result<bool> {
    Ok(x.ne(y)?.to_dtype(DType::U32)?.max_all()?.to_scalar::<u32>()? == 0)
}
