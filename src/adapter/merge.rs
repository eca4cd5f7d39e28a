//! Merging: the slots of a linear folded into one dense weight of the adapter's own. It works on the normal form, so
//! it serves every kind.

use candle_core::{DType, Result, Tensor};

use super::lowering::Lowering;
use super::{AdapterError, Delta, LinearSlots, Pre, Scale, SiteId, SiteKind, Weight};

/// Folds input transforms, deltas and scales of every linear into own weights. Norms, embeddings and `c` stay as they
/// are; linears with none of the three keep what they have.
pub(super) fn merge(lowering: &mut Lowering<'_>) -> std::result::Result<(), AdapterError> {
    let sites: Vec<SiteId> =
        lowering.out.linears.iter().filter(|(_, slots)| is_mergeable(slots)).map(|(id, _)| *id).collect();
    for id in &sites {
        if let SiteKind::Linear { in_features, out_features, .. } = lowering.site(*id).kind
            && matches!(lowering.out.linears[id].weight, Weight::Base)
        {
            lowering.reserve_own(in_features.saturating_mul(out_features))?;
        }
    }
    for id in sites {
        let slots = &lowering.out.linears[&id];
        let merged = effective_weight(slots, lowering.weight(id)?)?;
        let own = lowering.own(&merged)?;
        lowering.explain_own(id, "it was asked to be merged");
        let slots = lowering.out.linears.entry(id).or_default();
        *slots = LinearSlots { weight: Weight::Own(own), c: slots.c.take(), ..LinearSlots::default() };
    }
    Ok(())
}

fn is_mergeable(slots: &LinearSlots) -> bool {
    let keeps_input = matches!(slots.pre, Pre::Identity);
    !keeps_input || !slots.deltas.is_empty() || matches!(slots.scale, Scale::Diag(_))
}

/// `diag(scale) (W_t pre + sum_j delta_j)`. weight: (out, in) f32, before replaced rows; result: (out, in) f32.
pub(super) fn effective_weight(slots: &LinearSlots, weight: Tensor) -> Result<Tensor> {
    let mut weight = match &slots.rows {
        Some((ids, rows)) => with_rows(&weight, ids, rows)?,
        None => weight,
    };
    let (out_features, in_features) = weight.dims2()?;
    weight = match &slots.pre {
        Pre::Identity => weight,
        Pre::Diag(scale) => weight.broadcast_mul(&scale.to_dtype(DType::F32)?)?,
    };
    for delta in &slots.deltas {
        weight = (weight + dense(delta, out_features, in_features)?)?;
    }
    match &slots.scale {
        Scale::One => Ok(weight),
        Scale::Diag(scale) => weight.broadcast_mul(&scale.unsqueeze(1)?),
    }
}

/// The matrix (out, in) that a delta multiplies with, f32.
fn dense(delta: &Delta, out_features: usize, in_features: usize) -> Result<Tensor> {
    match delta {
        Delta::LowRank { a, b } => b.to_dtype(DType::F32)?.matmul(&a.to_dtype(DType::F32)?),
        Delta::ShardSum { m } => {
            let (r, q) = m.dims2()?;
            let block = m.to_dtype(DType::F32)?.t()?.contiguous()?; // [q, r]
            let tiled = block.repeat((out_features / q, in_features.div_ceil(r)))?;
            tiled.narrow(1, 0, in_features)?.contiguous()
        }
    }
}

fn with_rows(weight: &Tensor, ids: &[u32], rows: &Tensor) -> Result<Tensor> {
    let rows = rows.to_dtype(DType::F32)?;
    let index = Tensor::new(ids, weight.device())?.unsqueeze(1)?.broadcast_as(rows.shape())?.contiguous()?;
    weight.scatter(&index, &rows, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::fake_base::{close, random};

    /// The linear without its bias, by the definition of each slot; x: (tokens, in).
    fn apply(slots: &LinearSlots, weight: &Tensor, x: &Tensor) -> Vec<Vec<f32>> {
        let weight = match &slots.rows {
            Some((ids, rows)) => with_rows(weight, ids, rows).unwrap(),
            None => weight.clone(),
        };
        let pre_x = match &slots.pre {
            Pre::Identity => x.clone(),
            Pre::Diag(scale) => x.broadcast_mul(scale).unwrap(),
        };
        let mut y = pre_x.matmul(&weight.t().unwrap()).unwrap().to_vec2::<f32>().unwrap();
        for delta in &slots.deltas {
            match delta {
                Delta::LowRank { a, b } => {
                    let low = x.matmul(&a.t().unwrap()).unwrap().matmul(&b.t().unwrap()).unwrap();
                    for (y, low) in y.iter_mut().flatten().zip(low.flatten_all().unwrap().to_vec1::<f32>().unwrap()) {
                        *y += low;
                    }
                }
                Delta::ShardSum { m } => {
                    let m = m.to_vec2::<f32>().unwrap();
                    for (y, x) in y.iter_mut().zip(x.to_vec2::<f32>().unwrap()) {
                        let mut sums = vec![0.0; m.len()];
                        x.iter().enumerate().for_each(|(idx, x)| sums[idx % m.len()] += x);
                        for (idx, y) in y.iter_mut().enumerate() {
                            *y += sums.iter().zip(&m).map(|(sum, m)| sum * m[idx % m.len()]).sum::<f32>();
                        }
                    }
                }
            }
        }
        if let Scale::Diag(scale) = &slots.scale {
            let scale = scale.to_vec1::<f32>().unwrap();
            y.iter_mut().for_each(|y| y.iter_mut().zip(&scale).for_each(|(y, scale)| *y *= scale));
        }
        y
    }

    #[track_caller]
    fn check(slots: &LinearSlots) {
        let (weight, x) = (random(1, (12, 10)), random(2, (3, 10)));
        let merged = effective_weight(slots, weight.clone()).unwrap();
        let found = x.matmul(&merged.t().unwrap()).unwrap();
        let expected = Tensor::new(apply(slots, &weight, &x), x.device()).unwrap();
        assert!(close(&found, &expected, 1e-6));
    }

    #[test]
    fn every_slot_merges_exactly() {
        let low_rank = || Delta::LowRank { a: random(3, (4, 10)), b: random(4, (12, 4)) };
        let balance = || Delta::ShardSum { m: random(5, (2, 12)) };
        let ragged_mini = || Delta::ShardSum { m: random(6, (3, 4)) };
        let rows = || Some((vec![1, 7, 11], random(7, (3, 10))));
        let scale = || Scale::Diag(random(8, 12));
        let pre = || Pre::Diag(random(9, 10));
        let slots = |deltas: Vec<Delta>| LinearSlots { deltas, ..LinearSlots::default() };
        check(&slots(vec![low_rank()]));
        check(&slots(vec![balance()]));
        check(&slots(vec![ragged_mini()]));
        check(&LinearSlots { scale: scale(), ..LinearSlots::default() });
        check(&LinearSlots { rows: rows(), ..LinearSlots::default() });
        check(&LinearSlots { pre: pre(), ..LinearSlots::default() });
        let all = vec![low_rank(), balance(), ragged_mini(), low_rank()];
        check(&LinearSlots { pre: pre(), rows: rows(), scale: scale(), ..slots(all) });
    }
}
