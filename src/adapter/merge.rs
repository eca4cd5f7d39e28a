//! Merging: the slots of a linear folded into one dense weight of the adapter's own. It works on the normal form, so
//! it serves every kind.

use candle_core::{DType, Result, Tensor};

use super::block_product;
use super::lowering::Lowering;
use super::{AdapterError, Delta, LinearSlots, Pre, Scale, SharedMatrix, SiteId, SiteKind, Weight};
use crate::kernels::{Spectral, at_places, circulant_matrix};

/// Folds input transforms, deltas and scales of every linear into own weights. Norms, embeddings and `c` stay as they
/// are; linears with none of the three keep what they have.
pub(super) fn merge(lowering: &mut Lowering<'_>) -> std::result::Result<(), AdapterError> {
    let sites: Vec<SiteId> =
        lowering.out.linears.iter().filter(|(_, slots)| is_mergeable(slots)).map(|(id, _)| *id).collect();
    lowering.release_terms();
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
    slots.deltas.iter().any(|delta| matches!(delta, Delta::Routed { .. } | Delta::Gated { .. }))
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
        Pre::Butterfly(factors) => {
            // The first factor meets the input first, so it is the last one beside the weight.
            factors.iter().rev().try_fold(weight, |weight, factor| {
                at_places(&weight, &factor.places, |weight| times_blocks(weight, &factor.blocks))
            })?
        }
    };
    for delta in &slots.deltas {
        weight = (weight + dense(delta, out_features, in_features)?)?;
    }
    scaled(&slots.scale, &weight)
}

/// The scale times a matrix (out, any) in f32.
pub(super) fn scaled(scale: &Scale, matrix: &Tensor) -> Result<Tensor> {
    match scale {
        Scale::One => Ok(matrix.clone()),
        Scale::Diag(scale) => matrix.broadcast_mul(&scale.to_dtype(DType::F32)?.unsqueeze(1)?),
        Scale::PairRot { p, q, half } => {
            let (p, q) = (p.to_dtype(DType::F32)?.unsqueeze(1)?, q.to_dtype(DType::F32)?.unsqueeze(1)?);
            matrix.broadcast_mul(&p)? + partners(matrix, *half)?.broadcast_mul(&q)?
        }
        Scale::BlockDiag(blocks) => {
            let rows = matrix.dim(0)?;
            let columns = matrix.t()?.pad_with_zeros(1, 0, blocks.dim(0)? * blocks.dim(1)? - rows)?;
            let turned = times_blocks(&columns.contiguous()?, &blocks.transpose(1, 2)?.contiguous()?)?;
            turned.narrow(1, 0, rows)?.t()?.contiguous()
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
        Delta::Routed { .. } | Delta::Gated { .. } => {
            panic!("a routed term is no matrix, and its linear is not merged")
        }
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
        Delta::Circulant { kernel } => circulant_matrix(&kernel.to_dtype(DType::F32)?),
        Delta::BlockProduct { a, mix, b } => block_product::dense((a, mix, b.as_ref())),
        Delta::Spectral { basis, shape, rows, columns, values } => {
            Spectral { basis, shape: *shape, rows, columns, values }.matrix()
        }
        Delta::SharedLowRank { a, b, d, g } => {
            let (a, b) = shared_factors((a, b), (d, g))?;
            b.matmul(&a)
        }
    }
}

/// The factors a: (r, in), b: (out, r) in f32 of a delta whose matrices are shared, with its vectors in them.
pub(super) fn shared_factors(
    (a, b): (&SharedMatrix, &SharedMatrix),
    (d, g): (&Tensor, &Tensor),
) -> Result<(Tensor, Tensor)> {
    let scaled = |matrix: &SharedMatrix, scale: &Tensor| {
        matrix.tensor().to_dtype(DType::F32)?.broadcast_mul(&scale.to_dtype(DType::F32)?.unsqueeze(1)?)
    };
    Ok((scaled(a, d)?, scaled(b, g)?))
}

/// The matrix with rows `ids` replaced by `rows` (ids, in). weight: (out, in) f32; result: the same.
pub(super) fn with_rows(weight: &Tensor, ids: &[u32], rows: &Tensor) -> Result<Tensor> {
    let rows = rows.to_dtype(DType::F32)?;
    let index = Tensor::new(ids, weight.device())?.unsqueeze(1)?.broadcast_as(rows.shape())?.contiguous()?;
    weight.scatter(&index, &rows, 0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::adapter::fake_base::{close, random};
    use crate::kernels::{Basis, BlockMix, ButterflyFactor};

    /// The linear without its bias, by the definition of each slot; x: (tokens, in).
    fn apply(slots: &LinearSlots, weight: &Tensor, x: &Tensor) -> Vec<Vec<f32>> {
        let weight = match &slots.rows {
            Some((ids, rows)) => with_rows(weight, ids, rows).unwrap(),
            None => weight.clone(),
        };
        let x = x.to_vec2::<f32>().unwrap();
        let pre_x: Vec<Vec<f32>> = x.iter().map(|row| transformed(&slots.pre, row)).collect();
        let pre_x = Tensor::new(pre_x, &candle_core::Device::Cpu).unwrap();
        let mut y = pre_x.matmul(&weight.t().unwrap()).unwrap().to_vec2::<f32>().unwrap();
        for (y, x) in y.iter_mut().zip(&x) {
            slots.deltas.iter().for_each(|delta| add(delta, x, y));
            scale(&slots.scale, y);
        }
        y
    }

    fn times(blocks: &Tensor, row: &[f32]) -> Vec<f32> {
        let blocks = blocks.to_vec3::<f32>().unwrap();
        let s = blocks[0].len();
        let at = |j: usize| {
            let of_block = j / s * s..row.len().min(j / s * s + s);
            of_block.map(|i| row[i] * blocks[j / s % blocks.len()][i % s][j % s]).sum()
        };
        (0..row.len()).map(at).collect()
    }

    fn transformed(pre: &Pre, row: &[f32]) -> Vec<f32> {
        match pre {
            Pre::Identity => row.to_vec(),
            Pre::Diag(scale) => row.iter().zip(scale.to_vec1::<f32>().unwrap()).map(|(x, scale)| x * scale).collect(),
            Pre::BlockDiag(blocks) => times(blocks, row),
            Pre::Butterfly(factors) => factors.iter().fold(row.to_vec(), |mut row, factor| {
                let places = factor.places.to_vec1::<u32>().unwrap();
                let moved: Vec<f32> = places.iter().map(|from| row[*from as usize]).collect();
                for (to, value) in places.iter().zip(times(&factor.blocks, &moved)) {
                    row[*to as usize] = value;
                }
                row
            }),
        }
    }

    fn add(delta: &Delta, x: &[f32], y: &mut [f32]) {
        match delta {
            Delta::LowRank { a, b } => {
                let (a, b) = (a.to_vec2::<f32>().unwrap(), b.to_vec2::<f32>().unwrap());
                let dot = |u: &[f32], v: &[f32]| u.iter().zip(v).map(|(u, v)| u * v).sum::<f32>();
                let low: Vec<f32> = a.iter().map(|row| dot(row, x)).collect();
                y.iter_mut().zip(&b).for_each(|(y, row)| *y += dot(row, &low));
            }
            Delta::Sparse { rows, columns, values } => {
                let (rows, columns) = (rows.to_vec1::<u32>().unwrap(), columns.to_vec1::<u32>().unwrap());
                for ((row, column), value) in rows.iter().zip(&columns).zip(values.to_vec1::<f32>().unwrap()) {
                    y[*row as usize] += value * x[*column as usize];
                }
            }
            Delta::Routed { .. } | Delta::Gated { .. } => panic!("not merged"),
            Delta::Circulant { kernel } => {
                let kernel = kernel.to_vec3::<f32>().unwrap();
                let b = kernel[0][0].len();
                for (o, y) in y.iter_mut().enumerate() {
                    *y += (0..x.len()).map(|i| kernel[o / b][i / b][(i % b + b - o % b) % b] * x[i]).sum::<f32>();
                }
            }
            Delta::BlockProduct { a, mix, b } => add_blocks((a, mix, b.as_ref()), x, y),
            Delta::Spectral { shape: (n, k), rows, columns, values, .. } => {
                // The Fourier basis.
                let (rows, columns) = (rows.to_vec1::<u32>().unwrap(), columns.to_vec1::<u32>().unwrap());
                for ((u, v), value) in rows.iter().zip(&columns).zip(values.to_vec1::<f32>().unwrap()) {
                    for (t, y) in y.iter_mut().enumerate() {
                        for (q, x) in x.iter().enumerate() {
                            let turn = (t as u32 * u) as f32 / *n as f32 + (q as u32 * v) as f32 / *k as f32;
                            *y += value * x * (std::f32::consts::TAU * turn).cos() / ((n * k) as f32).sqrt();
                        }
                    }
                }
            }
            Delta::SharedLowRank { a, b, d, g } => {
                let [a, b] = [a, b].map(|matrix| matrix.tensor().to_vec2::<f32>().unwrap());
                let (d, g) = (d.to_vec1::<f32>().unwrap(), g.to_vec1::<f32>().unwrap());
                let dot = |u: &[f32], v: &[f32]| u.iter().zip(v).map(|(u, v)| u * v).sum::<f32>();
                let low: Vec<f32> = a.iter().zip(d).map(|(row, d)| d * dot(row, x)).collect();
                y.iter_mut().zip(&b).zip(g).for_each(|((y, row), g)| *y += g * dot(row, &low));
            }
            Delta::ShardSum { m } => {
                let m = m.to_vec2::<f32>().unwrap();
                let mut sums = vec![0.0; m.len()];
                x.iter().enumerate().for_each(|(idx, x)| sums[idx % m.len()] += x);
                for (idx, y) in y.iter_mut().enumerate() {
                    *y += sums.iter().zip(&m).map(|(sum, m)| sum * m[idx % m.len()]).sum::<f32>();
                }
            }
        }
    }

    fn add_blocks((a, mix, b): (&Tensor, &BlockMix, Option<&Tensor>), x: &[f32], y: &mut [f32]) {
        let a = a.to_vec3::<f32>().unwrap();
        let (r, d) = (a[0].len(), a[0][0].len());
        let n = x.len() / d;
        let g = |j: usize, s: usize| -> f32 { (0..d).map(|c| a[j % a.len()][s][c] * x[j * d + c]).sum() };
        let h = |i: usize, s: usize| match mix {
            BlockMix::Matrix(w) => {
                let w = w.to_vec2::<f32>().unwrap();
                (0..n).map(|j| w[i][j] * g(j, s)).sum()
            }
            BlockMix::Exchange => g(s / (r / n), i * (r / n) + s % (r / n)),
        };
        let b = b.map(|b| b.to_vec3::<f32>().unwrap());
        let q = b.as_ref().map_or(r, |b| b[0].len());
        for (o, y) in y.iter_mut().enumerate() {
            let (i, t) = (o / q, o % q);
            *y += b.as_ref().map_or_else(|| h(i, t), |b| (0..r).map(|s| b[i % b.len()][t][s] * h(i, s)).sum());
        }
    }

    fn scale(scale: &Scale, y: &mut Vec<f32>) {
        match scale {
            Scale::One => {}
            Scale::Diag(g) => y.iter_mut().zip(g.to_vec1::<f32>().unwrap()).for_each(|(y, g)| *y *= g),
            Scale::BlockDiag(blocks) => *y = times(blocks, y),
            Scale::PairRot { p, q, half } => {
                let (p, q) = (p.to_vec1::<f32>().unwrap(), q.to_vec1::<f32>().unwrap());
                for first in (0..y.len()).filter(|at| at / half % 2 == 0) {
                    let (second, a, b) = (first + half, y[first], y[first + half]);
                    y[first] = p[first] * a - q[first] * b;
                    y[second] = p[second] * b + q[second] * a;
                }
            }
        }
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
        check(&slots(vec![Delta::Circulant { kernel: random(14, (6, 5, 2)) }, low_rank()]));
        for (product, _) in block_product::tests::every_form() {
            check(&slots(vec![product]));
        }
        check(&slots(vec![
            Delta::Spectral {
                basis: Basis::Fourier,
                shape: (12, 10),
                rows: index(&[0, 4, 11]),
                columns: index(&[3, 0, 9]),
                values: random(23, 3),
            },
            low_rank(),
        ]));
        let matrix = |seed, shape: (usize, usize)| Arc::new(SharedMatrix::new(&random(seed, shape)).unwrap());
        let (a, b) = (matrix(19, (4, 10)), matrix(20, (12, 4)));
        check(&slots(vec![Delta::SharedLowRank { a, b, d: random(21, 4), g: random(22, 12) }, low_rank()]));
        let factor = |seed: u64, shape, places: [u32; 10]| ButterflyFactor {
            places: index(&places),
            blocks: random(seed, shape),
        };
        let factors = vec![
            factor(15, (2, 5, 5), [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]),
            factor(16, (5, 2, 2), [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
            factor(17, (2, 5, 5), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ];
        check(&LinearSlots { pre: Pre::Butterfly(factors), ..slots(vec![sparse()]) });
        // Blocks that tile the outputs, and one that reaches beyond them.
        for blocks in [(4, 3, 3), (3, 5, 5)] {
            check(&LinearSlots { scale: Scale::BlockDiag(random(18, blocks)), ..slots(vec![low_rank()]) });
        }
        let all = vec![low_rank(), balance(), ragged_mini(), low_rank()];
        check(&LinearSlots { pre: pre(), rows: rows(), scale: scale(), ..slots(all) });
    }
}
