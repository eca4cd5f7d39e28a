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
    let routed = lowering.out.linears.values().filter(|slots| is_routed(slots)).count();
    if routed > 0 {
        let warning = format!("{routed} linears are not merged: every token chooses among experts there");
        lowering.warnings.push(warning);
    }
    Ok(())
}

fn is_mergeable(slots: &LinearSlots) -> bool {
    if is_routed(slots) {
        return false;
    }
    let keeps_input = matches!(slots.pre, Pre::Identity);
    !keeps_input || !slots.deltas.is_empty() || !matches!(slots.scale, Scale::One)
}

/// Whether each token has a term of its own, so that no weight does for all.
fn is_routed(slots: &LinearSlots) -> bool {
    slots.deltas.iter().any(|delta| matches!(delta, Delta::Routed { .. }))
}

/// `scale (W_t pre + sum_j delta_j)` with scale and pre as matrices. weight: (out, in) f32, before replaced rows; result: (out, in) f32.
pub(super) fn effective_weight(slots: &LinearSlots, weight: Tensor) -> Result<Tensor> {
    let mut weight = match &slots.rows {
        Some((ids, rows)) => with_rows(&weight, ids, rows)?,
        None => weight,
    };
    let (out_features, in_features) = weight.dims2()?;
    weight = match &slots.pre {
        Pre::Identity => weight,
        Pre::Diag(scale) => weight.broadcast_mul(&scale.to_dtype(DType::F32)?)?,
        Pre::BlockDiag(blocks) => times_blocks(&weight, blocks)?,
    };
    for delta in &slots.deltas {
        weight = (weight + dense(delta, out_features, in_features)?)?;
    }
    match &slots.scale {
        Scale::One => Ok(weight),
        Scale::Diag(scale) => weight.broadcast_mul(&scale.unsqueeze(1)?),
        Scale::PairRot { p, q, half } => {
            let partner = partners(&weight, *half)?;
            weight.broadcast_mul(&p.unsqueeze(1)?)? + partner.broadcast_mul(&q.unsqueeze(1)?)?
        }
    }
}

/// `W blkdiag(m_k)^T`: what multiplying the input's blocks as rows with `blocks` (n or 1, s, s) is for the weight
/// (out, in).
pub(super) fn times_blocks(weight: &Tensor, blocks: &Tensor) -> Result<Tensor> {
    let (out_features, in_features) = weight.dims2()?;
    let s = blocks.dim(1)?;
    let n = in_features / s;
    let pieces = weight.reshape((out_features, n, s))?.transpose(0, 1)?.contiguous()?; // [n, out, s]
    let turned = blocks.to_dtype(DType::F32)?.transpose(1, 2)?.broadcast_as((n, s, s))?.contiguous()?;
    pieces.matmul(&turned)?.transpose(0, 1)?.reshape((out_features, in_features))
}

/// Each row's partner at distance `half` within its group, with a minus sign for the first ones. m: (out, any); the same
/// for a vector (out).
pub(super) fn partners(m: &Tensor, half: usize) -> Result<Tensor> {
    let rows = m.dim(0)?;
    let pairs = m.reshape((rows / (2 * half), 2, half, m.elem_count() / rows))?;
    let (first, second) = (pairs.narrow(1, 0, 1)?, pairs.narrow(1, 1, 1)?);
    Tensor::cat(&[second.neg()?, first], 1)?.reshape(m.shape())
}

/// The matrix (out, in) that a delta multiplies with, f32.
pub(super) fn dense(delta: &Delta, out_features: usize, in_features: usize) -> Result<Tensor> {
    match delta {
        Delta::LowRank { a, b } => b.to_dtype(DType::F32)?.matmul(&a.to_dtype(DType::F32)?),
        Delta::Routed { .. } => panic!("a routed term is no matrix, and its linear is not merged"),
        Delta::ShardSum { m } => {
            let (r, q) = m.dims2()?;
            let block = m.to_dtype(DType::F32)?.t()?.contiguous()?; // [q, r]
            let tiled = block.repeat((out_features / q, in_features.div_ceil(r)))?;
            tiled.narrow(1, 0, in_features)?.contiguous()
        }
        Delta::Sparse { rows, columns, values } => {
            let (rows, columns) = (rows.to_vec1::<u32>()?, columns.to_vec1::<u32>()?);
            let mut entries = vec![0.0; out_features * in_features];
            for ((row, column), value) in rows.iter().zip(&columns).zip(values.to_dtype(DType::F32)?.to_vec1::<f32>()?)
            {
                entries[*row as usize * in_features + *column as usize] += value;
            }
            Tensor::from_vec(entries, (out_features, in_features), values.device())
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
            Pre::BlockDiag(blocks) => {
                let (x, blocks) = (x.to_vec2::<f32>().unwrap(), blocks.to_vec3::<f32>().unwrap());
                let s = blocks[0].len();
                let at = |row: &Vec<f32>, at: usize| -> f32 {
                    let (k, j) = (at / s, at % s);
                    (0..s).map(|i| row[k * s + i] * blocks[k % blocks.len()][i][j]).sum()
                };
                let rows: Vec<Vec<f32>> = x.iter().map(|row| (0..row.len()).map(|c| at(row, c)).collect()).collect();
                Tensor::new(rows, &candle_core::Device::Cpu).unwrap()
            }
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
                Delta::Sparse { rows, columns, values } => {
                    let (rows, columns) = (rows.to_vec1::<u32>().unwrap(), columns.to_vec1::<u32>().unwrap());
                    let values = values.to_vec1::<f32>().unwrap();
                    for (y, x) in y.iter_mut().zip(x.to_vec2::<f32>().unwrap()) {
                        for ((row, column), value) in rows.iter().zip(&columns).zip(&values) {
                            y[*row as usize] += value * x[*column as usize];
                        }
                    }
                }
                Delta::Routed { .. } => panic!("not merged"),
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
        if let Scale::PairRot { p, q, half } = &slots.scale {
            let (p, q) = (p.to_vec1::<f32>().unwrap(), q.to_vec1::<f32>().unwrap());
            for y in &mut y {
                for first in (0..y.len()).filter(|at| at / half % 2 == 0) {
                    let (second, a, b) = (first + half, y[first], y[first + half]);
                    y[first] = p[first] * a - q[first] * b;
                    y[second] = p[second] * b + q[second] * a;
                }
            }
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
        let index = |values: &[u32]| Tensor::new(values, &candle_core::Device::Cpu).unwrap();
        let sparse =
            || Delta::Sparse { rows: index(&[0, 0, 5, 11]), columns: index(&[2, 9, 0, 4]), values: random(10, 4) };
        let rotation = || Scale::PairRot { p: random(11, 12), q: random(12, 12), half: 3 };
        check(&slots(vec![sparse()]));
        check(&LinearSlots { scale: rotation(), ..LinearSlots::default() });
        for blocks in [(2, 5, 5), (1, 5, 5), (5, 2, 2)] {
            let pre = Pre::BlockDiag(random(13, blocks));
            check(&LinearSlots { pre, scale: rotation(), ..slots(vec![sparse(), low_rank()]) });
        }
        let all = vec![low_rank(), balance(), ragged_mini(), low_rank()];
        check(&LinearSlots { pre: pre(), rows: rows(), scale: scale(), ..slots(all) });
    }
}
