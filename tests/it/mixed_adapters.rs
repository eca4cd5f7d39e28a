//! Random adapters in normal form: a mixed batch equals each segment alone, merged equals unmerged.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use patchbay::adapter::{
    AttentionBranch, Band, BaseShape, BaseWeights, Basis, BlockMix, ButterflyFactor, Delta, EmbeddingPatch,
    GateNetwork, GateRule, KvPrefix, LayerSlots, LinearSlots, LoweredAdapter, Mix, NormOverride, Pre, Scale,
    SharedMatrix, SiteKind, StreamFunction, Weight,
};
use patchbay::model::{DeviceChoice, Model};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::fixtures;
use crate::runner::{Context, Runner, concatenated, relative_difference};

/// Biases, tied head, q/k norms and wide heads, fused linears.
const MODELS: &[&str] = &["llama_bias", "llama_tied", "qwen3", "phi3"];

/// Rounding of f32 sums in another order, through two layers of random adapters.
const TOLERANCE: f32 = 1e-4;

const SEEDS: u64 = 6;

/// Standard deviation of adapter entries: large enough to show, small enough not to saturate.
const SPREAD: f32 = 0.1;

fn random(rng: &mut ChaCha8Rng, shape: &[usize], mean: f32) -> Tensor {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| mean + SPREAD * rng.random_range(-1.7f32..1.7)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn random_linear(rng: &mut ChaCha8Rng, in_features: usize, out_features: usize) -> LinearSlots {
    let mut slots = LinearSlots::default();
    if rng.random_bool(0.2) {
        slots.weight = Weight::Own(random(rng, &[out_features, in_features], 0.));
    }
    for _ in 0..rng.random_range(0..3) {
        let r = rng.random_range(1..7);
        slots.deltas.push(if rng.random_bool(0.5) {
            Delta::LowRank { a: random(rng, &[r, in_features], 0.), b: random(rng, &[out_features, r], 0.) }
        } else {
            // Ragged shards unless r divides the inputs; tiled outputs unless q is all of them.
            let q = *divisors(out_features).choose(rng).unwrap();
            Delta::ShardSum { m: random(rng, &[r, q], 0.) }
        });
    }
    if rng.random_bool(0.2) {
        let (experts, r) = (rng.random_range(1..4), rng.random_range(1..4));
        slots.deltas.push(Delta::Routed {
            a: random(rng, &[experts * r, in_features], 0.),
            b: random(rng, &[out_features, experts * r], 0.),
            prototypes: random(rng, &[experts, in_features], 0.),
            top_k: rng.random_range(1..=experts),
            temperature: rng.random_range(0.5..2.),
        });
    }
    slots.pre = random_pre(rng, in_features);
    if rng.random_bool(0.2) {
        let common: Vec<usize> =
            divisors(in_features).into_iter().filter(|b| out_features.is_multiple_of(*b)).collect();
        let b = *common.choose(rng).unwrap();
        slots.deltas.push(Delta::Circulant { kernel: random(rng, &[out_features / b, in_features / b, b], 0.) });
    }
    if rng.random_bool(0.3) {
        slots.deltas.push(random_blocks(rng, in_features, out_features));
    }
    if rng.random_bool(0.3) {
        slots.deltas.push(random_spectral(rng, in_features, out_features));
    }
    if rng.random_bool(0.3) {
        slots.deltas.push(random_shared(rng, in_features, out_features));
    }
    if rng.random_bool(0.3) {
        slots.deltas.push(random_sparse(rng, in_features, out_features));
    }
    slots.scale = random_scale(rng, out_features);
    if rng.random_bool(0.4) {
        slots.c = Some(random(rng, &[out_features], 0.));
    }
    slots
}

fn random_spectral(rng: &mut ChaCha8Rng, in_features: usize, out_features: usize) -> Delta {
    let (count, shape) = (rng.random_range(1..40), (out_features, in_features));
    let basis = if rng.random_bool(0.5) {
        Basis::Fourier
    } else {
        let (taps, cut) = (rng.random_range(1..4), rng.random_range(0..3));
        let band = |size: usize| Band { half: (size + cut).div_ceil(2), cut };
        let low = random(rng, &[2 * taps], 0.3).to_vec1::<f32>().unwrap();
        Basis::Wavelet { low: low.into(), inputs: band(in_features), outputs: band(out_features) }
    };
    let (rows, columns) = basis.num_coefficients(shape);
    let mut index = |of: usize| -> Vec<u32> { (0..count).map(|_| rng.random_range(0..of as u32)).collect() };
    let (mut rows, columns) = (index(rows), index(columns));
    rows.sort_unstable();
    let tensor = |indexes: Vec<u32>| Tensor::from_vec(indexes, count, &Device::Cpu).unwrap();
    Delta::Spectral { basis, shape, rows: tensor(rows), columns: tensor(columns), values: random(rng, &[count], 0.) }
}

/// One of two pairs of matrices, so that adapters have the same ones.
fn random_shared(rng: &mut ChaCha8Rng, in_features: usize, out_features: usize) -> Delta {
    let which = rng.random_range(0..2);
    let (mut same, r) = (ChaCha8Rng::seed_from_u64(which), [3, 18][which as usize]);
    let mut matrix = |shape: [usize; 2]| SharedMatrix::new(&random(&mut same, &shape, 0.)).unwrap().kept_once();
    Delta::SharedLowRank {
        a: matrix([r, in_features]),
        b: matrix([out_features, r]),
        d: random(rng, &[r], 1.),
        g: random(rng, &[out_features], 0.),
    }
}

fn random_pre(rng: &mut ChaCha8Rng, in_features: usize) -> Pre {
    let block = |rng: &mut ChaCha8Rng, s_max| {
        let small: Vec<usize> = divisors(in_features).into_iter().filter(|s| *s <= s_max).collect();
        *small.choose(rng).unwrap()
    };
    match rng.random_range(0..10) {
        0 | 1 => Pre::Diag(random(rng, &[in_features], 1.)),
        2 | 3 => {
            let s = block(rng, 12);
            let blocks = if rng.random_bool(0.3) { 1 } else { in_features / s };
            Pre::BlockDiag(random(rng, &[blocks, s, s], 0.3))
        }
        4 | 5 => {
            // Strides that share no factor with the length make permutations.
            let strides: Vec<u32> = (1..in_features as u32).filter(|n| n % 2 == 1 && n % 3 != 0).collect();
            let factors = (0..rng.random_range(1..4)).map(|_| {
                let (s, stride) = (block(rng, in_features), *strides.choose(rng).unwrap());
                let places = (0..in_features as u32).map(|i| i * stride % in_features as u32).collect();
                let places = Tensor::from_vec(places, in_features, &Device::Cpu).unwrap();
                ButterflyFactor { places, blocks: random(rng, &[in_features / s, s, s], 1. / s as f32) }
            });
            Pre::Butterfly(factors.collect())
        }
        _ => Pre::Identity,
    }
}

fn random_scale(rng: &mut ChaCha8Rng, out_features: usize) -> Scale {
    match rng.random_range(0..6) {
        0 | 1 => Scale::Diag(random(rng, &[out_features], 1.)),
        2 if out_features.is_multiple_of(2) => {
            let half = *divisors(out_features / 2).choose(rng).unwrap();
            Scale::PairRot { p: random(rng, &[out_features], 1.), q: random(rng, &[out_features], 0.5), half }
        }
        3 => {
            let s = rng.random_range(1..=out_features);
            Scale::BlockDiag(random(rng, &[out_features.div_ceil(s), s, s], 1. / s as f32))
        }
        _ => Scale::One,
    }
}

fn divisors(n: usize) -> Vec<usize> {
    (1..=n).filter(|q| n.is_multiple_of(*q)).collect()
}

fn random_blocks(rng: &mut ChaCha8Rng, in_features: usize, out_features: usize) -> Delta {
    let (n, p) = (*divisors(in_features).choose(rng).unwrap(), *divisors(out_features).choose(rng).unwrap());
    if rng.random_bool(0.5) {
        let common: Vec<usize> =
            divisors(in_features).into_iter().filter(|n| out_features.is_multiple_of(*n) && *n < 9).collect();
        let n = *common.choose(rng).unwrap();
        let r = n * rng.random_range(1..4);
        let (a, b) = (random(rng, &[n, r, in_features / n], 0.), random(rng, &[n, out_features / n, r], 0.));
        return Delta::BlockProduct { a, mix: BlockMix::Exchange, b: Some(b) };
    }
    let r = if rng.random_bool(0.3) { out_features / p } else { rng.random_range(1..9) };
    let (for_inputs, for_outputs) =
        (if rng.random_bool(0.7) { 1 } else { n }, if rng.random_bool(0.7) { 1 } else { p });
    Delta::BlockProduct {
        a: random(rng, &[for_inputs, r, in_features / n], 0.),
        mix: BlockMix::Matrix(random(rng, &[p, n], 0.)),
        b: (p * r != out_features).then(|| random(rng, &[for_outputs, out_features / p, r], 0.)),
    }
}

fn random_sparse(rng: &mut ChaCha8Rng, in_features: usize, out_features: usize) -> Delta {
    let places: Vec<usize> = (0..in_features * out_features).filter(|_| rng.random_bool(0.1)).collect();
    let index = |of: fn(usize, usize) -> usize| {
        let indexes = places.iter().map(|at| of(*at, in_features) as u32).collect();
        Tensor::from_vec(indexes, places.len(), &Device::Cpu).unwrap()
    };
    let (rows, columns) = (index(|at, width| at / width), index(|at, width| at % width));
    Delta::Sparse { rows, columns, values: random(rng, &[places.len()], 0.) }
}

fn random_embedding(rng: &mut ChaCha8Rng, vocab: usize, dim: usize) -> EmbeddingPatch {
    let mut patch = EmbeddingPatch::default();
    if rng.random_bool(0.3) {
        patch.table = Some(random(rng, &[vocab, dim], 0.));
    } else if rng.random_bool(0.5) {
        let ids: Vec<u32> = (0..vocab as u32).filter(|_| rng.random_bool(0.5)).collect();
        let rows = random(rng, &[ids.len(), dim], 0.);
        patch.rows = Some((ids, rows));
    }
    if rng.random_bool(0.5) {
        patch.low_rank = Some((random(rng, &[3, vocab], 0.), random(rng, &[dim, 3], 0.)));
    }
    if rng.random_bool(0.5) {
        patch.scale = Some(random(rng, &[dim], 1.));
    }
    if rng.random_bool(0.5) {
        patch.shift = Some(random(rng, &[dim], 0.));
    }
    patch
}

fn random_function(rng: &mut ChaCha8Rng, hidden: usize) -> StreamFunction {
    let width = rng.random_range(1..9);
    let activations = [Tensor::relu, Tensor::silu, Tensor::tanh, Tensor::gelu_erf];
    let mut mix = || Mix { stream: rng.random_range(0..2) as f32, output: rng.random_range(0..2) as f32 };
    let (input, inner) = (mix(), mix());
    let norm =
        |rng: &mut ChaCha8Rng| rng.random_bool(0.4).then(|| (random(rng, &[hidden], 1.), random(rng, &[hidden], 0.)));
    StreamFunction {
        input,
        norm_before: norm(rng),
        down: (random(rng, &[width, hidden], 0.), random(rng, &[width], 0.)),
        activation: *activations.choose(rng).unwrap(),
        up: (random(rng, &[hidden, width], 0.), random(rng, &[hidden], 0.)),
        inner,
        norm_after: norm(rng),
        outer: Mix { stream: 1., output: 1. },
    }
}

/// Gates from a network of one to three layers, and terms that they weigh at some of the linears.
fn add_gates(rng: &mut ChaCha8Rng, adapter: &mut LoweredAdapter, base: &Model) {
    let (group, mut inputs, mut layers) = (rng.random_range(1..4), base.shape().hidden_size, Vec::new());
    let gates = group * rng.random_range(1..5);
    for last in [vec![true], vec![false, true], vec![false, false, true]].choose(rng).unwrap() {
        let outputs = if *last { gates } else { rng.random_range(1..9) };
        layers.push((random(rng, &[outputs, inputs], 0.), random(rng, &[outputs], 0.)));
        inputs = outputs;
    }
    let rule = GateRule {
        temperature: rng.random_bool(0.5).then(|| rng.random_range(0.3..2.)),
        top_k: rng.random_bool(0.5).then(|| rng.random_range(1..=group)),
        softmax_of_kept: rng.random_bool(0.3),
    };
    adapter.gates = Some(GateNetwork { layers, group, rule });
    for (id, slots) in &mut adapter.linears {
        let SiteKind::Linear { in_features, out_features, .. } = base.sites().get(*id).kind else { unreachable!() };
        if rng.random_bool(0.6) {
            let r = rng.random_range(1..7);
            let places: Vec<u32> = (0..r).map(|_| rng.random_range(0..gates as u32)).collect();
            slots.deltas.push(Delta::Gated {
                a: random(rng, &[r, in_features], 0.),
                b: random(rng, &[out_features, r], 0.),
                places: Tensor::new(places, &Device::Cpu).unwrap(),
            });
        }
    }
}

fn random_adapter(rng: &mut ChaCha8Rng, base: &Model) -> LoweredAdapter {
    let mut adapter = LoweredAdapter::default();
    for (id, site) in base.sites().iter() {
        if rng.random_bool(0.4) {
            continue;
        }
        match site.kind {
            SiteKind::Linear { in_features, out_features, .. } => {
                adapter.linears.insert(id, random_linear(rng, in_features, out_features));
            }
            SiteKind::Norm { dim, .. } => {
                let weight = rng.random_bool(0.6).then(|| random(rng, &[dim], 1.));
                let shift = rng.random_bool(0.6).then(|| random(rng, &[dim], 0.));
                adapter.norms.insert(id, NormOverride { weight, shift });
            }
            SiteKind::Embedding { vocab, dim } => {
                adapter.embeddings.insert(id, random_embedding(rng, vocab, dim));
            }
        }
    }
    let BaseShape { hidden_size, num_layers, kv_width } = base.shape();
    if rng.random_bool(0.3) {
        let number = rng.random_range(1..8);
        adapter.virtual_tokens = Some(random(rng, &[number, hidden_size], 0.));
    }
    if rng.random_bool(0.3) {
        let shape = [rng.random_range(1..14), kv_width];
        let layers = (0..num_layers).map(|_| (random(rng, &shape, 0.), random(rng, &shape, 0.))).collect();
        adapter.kv_prefix = Some(KvPrefix { layers });
    }
    for layer in 0..num_layers {
        let mut function = || rng.random_bool(0.3).then(|| random_function(rng, hidden_size));
        let (after_attention, after_mlp) = (function(), function());
        let branch = rng.random_bool(0.3).then(|| {
            let shape = [rng.random_range(1..20), kv_width];
            AttentionBranch { keys: random(rng, &shape, 0.), values: random(rng, &shape, 0.) }
        });
        let slots = LayerSlots { after_attention, after_mlp, branch };
        adapter.layers.insert(layer, slots);
    }
    if adapter.num_leading() == 0 && rng.random_bool(0.5) {
        // Each occurs in some prompts, at the start, in the middle or at the end.
        adapter.invocation_tokens = vec![*[5, 17, 42, 74, 52].choose(rng).unwrap()];
    } else if adapter.num_leading() == 0 && rng.random_bool(0.6) {
        add_gates(rng, &mut adapter, base);
    }
    adapter
}

/// The same adapter with every linear and embedding as one dense copy, by the formulas of the normal form. A linear with
/// a routed or gated term, which is no matrix, stays as it is.
fn merged(adapter: &LoweredAdapter, base: &Model) -> LoweredAdapter {
    let mut merged = LoweredAdapter { linears: BTreeMap::new(), embeddings: BTreeMap::new(), ..adapter.clone() };
    for (id, slots) in &adapter.linears {
        if slots.deltas.iter().any(|delta| matches!(delta, Delta::Routed { .. } | Delta::Gated { .. })) {
            merged.linears.insert(*id, slots.clone());
            continue;
        }
        let mut w = match &slots.weight {
            Weight::Base => base.weight(*id).unwrap(),
            Weight::Own(w) => w.clone(),
        };
        w = w.matmul(&input_matrix(&slots.pre, w.dim(1).unwrap())).unwrap();
        for delta in &slots.deltas {
            w = (&w + dense(delta, w.dims2().unwrap())).unwrap();
        }
        w = output_matrix(&slots.scale, w.dim(0).unwrap()).matmul(&w).unwrap();
        merged
            .linears
            .insert(*id, LinearSlots { weight: Weight::Own(w), c: slots.c.clone(), ..LinearSlots::default() });
    }
    for (id, patch) in &adapter.embeddings {
        let mut table = patch.table.clone().unwrap_or_else(|| base.weight(*id).unwrap());
        if let Some((ids, rows)) = &patch.rows {
            let mut all = table.to_vec2::<f32>().unwrap();
            for (token_id, row) in ids.iter().zip(rows.to_vec2::<f32>().unwrap()) {
                all[*token_id as usize] = row;
            }
            table = Tensor::new(all, &Device::Cpu).unwrap();
        }
        if let Some((a, b)) = &patch.low_rank {
            table = (table + b.matmul(a).unwrap().t().unwrap()).unwrap();
        }
        if let Some(scale) = &patch.scale {
            table = table.broadcast_mul(scale).unwrap();
        }
        if let Some(shift) = &patch.shift {
            table = table.broadcast_add(shift).unwrap();
        }
        merged.embeddings.insert(*id, EmbeddingPatch { table: Some(table), ..EmbeddingPatch::default() });
    }
    merged
}

/// A square matrix from its entries.
fn square(n: usize, entry: impl Fn(usize, usize) -> f32) -> Tensor {
    let values: Vec<f32> = (0..n * n).map(|at| entry(at / n, at % n)).collect();
    Tensor::from_vec(values, (n, n), &Device::Cpu).unwrap()
}

/// The matrix (in, in) that the input is multiplied with.
fn input_matrix(pre: &Pre, n: usize) -> Tensor {
    match pre {
        Pre::Identity => square(n, |i, j| f32::from(u8::from(i == j))),
        Pre::Diag(scale) => {
            let scale = scale.to_vec1::<f32>().unwrap();
            square(n, |i, j| if i == j { scale[i] } else { 0. })
        }
        Pre::BlockDiag(blocks) => {
            let blocks = blocks.to_vec3::<f32>().unwrap();
            let s = blocks[0].len();
            square(n, |i, j| if i / s == j / s { blocks[i / s % blocks.len()][j % s][i % s] } else { 0. })
        }
        Pre::Butterfly(factors) => {
            let identity = square(n, |i, j| f32::from(u8::from(i == j)));
            factors.iter().fold(identity, |before, factor| {
                let places = factor.places.to_vec1::<u32>().unwrap();
                let order = square(n, |i, j| f32::from(u8::from(places[i] as usize == j)));
                let blocks = input_matrix(&Pre::BlockDiag(factor.blocks.clone()), n);
                let moved = blocks.matmul(&order).unwrap().matmul(&before).unwrap();
                order.t().unwrap().matmul(&moved).unwrap()
            })
        }
    }
}

/// The matrix (out, out) that the output is multiplied with.
fn output_matrix(scale: &Scale, n: usize) -> Tensor {
    match scale {
        Scale::One => square(n, |i, j| f32::from(u8::from(i == j))),
        Scale::Diag(scale) => {
            let scale = scale.to_vec1::<f32>().unwrap();
            square(n, |i, j| if i == j { scale[i] } else { 0. })
        }
        Scale::PairRot { p, q, half } => {
            let (p, q) = (p.to_vec1::<f32>().unwrap(), q.to_vec1::<f32>().unwrap());
            square(n, |i, j| match (i / half % 2 == 0, i == j) {
                (_, true) => p[i],
                (true, false) if j == i + half => -q[i],
                (false, false) if j + half == i => q[i],
                _ => 0.,
            })
        }
        Scale::BlockDiag(blocks) => {
            let blocks = blocks.to_vec3::<f32>().unwrap();
            let s = blocks[0].len();
            square(n, |i, j| if i / s == j / s { blocks[i / s][j % s][i % s] } else { 0. })
        }
    }
}

/// What a coefficient at row u, column v of a basis adds at output t, input q.
fn wave(basis: &Basis, (m, n): (usize, usize), (t, q): (usize, usize), (u, v): (u32, u32)) -> f32 {
    match basis {
        Basis::Fourier => {
            let turn = t as f32 * u as f32 / m as f32 + q as f32 * v as f32 / n as f32;
            (std::f32::consts::TAU * turn.fract()).cos() / ((m * n) as f32).sqrt()
        }
        Basis::Wavelet { low, inputs, outputs } => {
            let along = |at: usize, coefficient: usize, band: &Band| {
                let tap = (at + band.cut).checked_sub(2 * (coefficient % band.half)).filter(|tap| *tap < low.len());
                let sign = |tap: usize| if tap.is_multiple_of(2) { 1. } else { -1. };
                let value = |tap: usize| {
                    if coefficient < band.half { low[tap] } else { sign(tap) * low[low.len() - 1 - tap] }
                };
                tap.map_or(0., value)
            };
            along(t, u as usize, outputs) * along(q, v as usize, inputs)
        }
    }
}

/// The matrix (out, in) that a delta adds.
fn dense(delta: &Delta, (out_features, in_features): (usize, usize)) -> Tensor {
    match delta {
        Delta::LowRank { a, b } => b.matmul(a).unwrap(),
        Delta::Spectral { basis, rows, columns, values, .. } => {
            let (rows, columns) = (rows.to_vec1::<u32>().unwrap(), columns.to_vec1::<u32>().unwrap());
            let values = values.to_vec1::<f32>().unwrap();
            let entry = |at: usize| {
                let places = rows.iter().zip(&columns).zip(&values);
                let (t, q) = (at / in_features, at % in_features);
                places.map(|((u, v), value)| value * wave(basis, (out_features, in_features), (t, q), (*u, *v))).sum()
            };
            let values: Vec<f32> = (0..out_features * in_features).map(entry).collect();
            Tensor::from_vec(values, (out_features, in_features), &Device::Cpu).unwrap()
        }
        Delta::SharedLowRank { a, b, d, g } => {
            let a = a.tensor().broadcast_mul(&d.unsqueeze(1).unwrap()).unwrap();
            b.tensor().broadcast_mul(&g.unsqueeze(1).unwrap()).unwrap().matmul(&a).unwrap()
        }
        Delta::Routed { .. } | Delta::Gated { .. } => panic!("a routed term is no matrix"),
        Delta::ShardSum { m } => {
            let (r, q) = m.dims2().unwrap();
            let m = m.to_vec2::<f32>().unwrap();
            let entry = |at: usize| m[(at % in_features) % r][(at / in_features) % q];
            let values: Vec<f32> = (0..out_features * in_features).map(entry).collect();
            Tensor::from_vec(values, (out_features, in_features), &Device::Cpu).unwrap()
        }
        Delta::Sparse { rows, columns, values } => {
            let mut all = vec![0.; out_features * in_features];
            let places = rows.to_vec1::<u32>().unwrap().into_iter().zip(columns.to_vec1::<u32>().unwrap());
            for ((row, column), value) in places.zip(values.to_vec1::<f32>().unwrap()) {
                all[row as usize * in_features + column as usize] += value;
            }
            Tensor::from_vec(all, (out_features, in_features), &Device::Cpu).unwrap()
        }
        Delta::BlockProduct { a, mix, b } => {
            let (a, b) = (a.to_vec3::<f32>().unwrap(), b.as_ref().map(|b| b.to_vec3::<f32>().unwrap()));
            let (r, n) = (a[0].len(), in_features / a[0][0].len());
            let w = mix.matrix().map(|w| w.to_vec2::<f32>().unwrap());
            let q = b.as_ref().map_or(r, |b| b[0].len());
            let entry = |at: usize| {
                let (i, t) = (at / in_features / q, at / in_features % q);
                let (j, c) = (at % in_features * n / in_features, at % in_features % (in_features / n));
                // How much of the s-th number of block j gets to the u-th of block i.
                let mixed = |u: usize, s: usize| match &w {
                    Some(w) => w[i][j] * f32::from(u8::from(u == s)),
                    None => f32::from(u8::from(u == j * (r / n) + s % (r / n) && s / (r / n) == i)),
                };
                let h = |u: usize| (0..r).map(|s| mixed(u, s) * a[j % a.len()][s][c]).sum::<f32>();
                b.as_ref().map_or_else(|| h(t), |b| (0..r).map(|u| b[i % b.len()][t][u] * h(u)).sum())
            };
            let values: Vec<f32> = (0..out_features * in_features).map(entry).collect();
            Tensor::from_vec(values, (out_features, in_features), &Device::Cpu).unwrap()
        }
        Delta::Circulant { kernel } => {
            let kernel = kernel.to_vec3::<f32>().unwrap();
            let b = kernel[0][0].len();
            let entry = |at: usize| {
                let (t, j) = (at / in_features, at % in_features);
                kernel[t / b][j / b][(j % b + b - t % b) % b]
            };
            let values: Vec<f32> = (0..out_features * in_features).map(entry).collect();
            Tensor::from_vec(values, (out_features, in_features), &Device::Cpu).unwrap()
        }
    }
}

#[track_caller]
fn assert_close(found: &Tensor, expected: &Tensor, what: &str) {
    let difference = relative_difference(found, expected);
    assert!(difference < TOLERANCE, "{what}: differs by {difference:e}");
}

#[test]
fn mixed_batch_of_random_adapters_equals_each_alone() {
    let prompts = fixtures::prompts();
    let on_cpu = fixtures::device_choice() == DeviceChoice::Cpu;
    let kv_dtypes: &[Option<DType>] = if on_cpu { &[None, Some(DType::BF16)] } else { &[None] };
    for (name, kv_dtype) in MODELS.iter().flat_map(|name| kv_dtypes.iter().map(move |dtype| (name, dtype))) {
        let model = fixtures::load_model(name);
        let kv_dtype = kv_dtype.unwrap_or(model.info().dtype);
        let mut runner = Runner::with_kv(model, kv_dtype);
        for seed in 0..SEEDS {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut adapters: Vec<_> = (0..5).map(|_| Some(random_adapter(&mut rng, &runner.model))).collect();
            adapters.extend([None, None]);
            let chosen: Vec<_> =
                (0..8).map(|_| (prompts.choose(&mut rng).unwrap(), adapters.choose(&mut rng).unwrap())).collect();
            let alone: Vec<Tensor> = chosen
                .iter()
                .map(|(prompt, adapter)| runner.prompt_logits(prompt, adapter.as_ref(), prompt.len()))
                .collect();
            let mut contexts: Vec<Context> =
                chosen.iter().map(|(prompt, adapter)| runner.context(prompt, adapter.as_ref())).collect();
            let mut found = vec![(Vec::new(), Vec::new()); contexts.len()];
            while contexts.iter().any(|context| context.remaining() > 0) {
                let mut work = Vec::new();
                let mut whose = Vec::new();
                for (idx, context) in contexts.iter_mut().enumerate().filter(|(_, context)| context.remaining() > 0) {
                    let len = rng.random_range(1..=context.remaining());
                    work.push((context, len));
                    whose.push(idx);
                }
                let share = *[0., 0.3, 1.].choose(&mut rng).unwrap();
                let logits = runner.step_rows(&mut work, || rng.random_bool(share));
                for (idx, (logits, wanted)) in whose.into_iter().zip(logits) {
                    found[idx].0.push(logits);
                    found[idx].1.extend(wanted);
                }
            }
            for (idx, context) in contexts.into_iter().enumerate() {
                runner.free(context);
                let (found, wanted) = std::mem::take(&mut found[idx]);
                let rows: Vec<u32> = (0..).zip(wanted).filter(|(_, wanted)| *wanted).map(|(row, _)| row).collect();
                if rows.is_empty() {
                    continue;
                }
                let found = concatenated(found);
                let alone = alone[idx].index_select(&Tensor::new(rows, &Device::Cpu).unwrap(), 0).unwrap();
                let what = format!("{name} keys in {kv_dtype:?} seed {seed} context {idx}");
                if on_cpu {
                    // The CPU's kernels reduce in an order that does not depend on what shares the step.
                    assert_eq!(found.to_vec2::<f32>().unwrap(), alone.to_vec2::<f32>().unwrap(), "{what}");
                }
                assert_close(&found, &alone, &what);
            }
        }
    }
}

#[test]
fn merged_equals_unmerged() {
    let prompts = fixtures::prompts();
    for name in MODELS {
        let mut runner = Runner::new(fixtures::load_model(name));
        for seed in 0..SEEDS {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let adapter = random_adapter(&mut rng, &runner.model);
            let merged = merged(&adapter, &runner.model);
            let prompt = prompts.choose(&mut rng).unwrap();
            let unmerged = runner.prompt_logits(prompt, Some(&adapter), prompt.len());
            let merged = runner.prompt_logits(prompt, Some(&merged), prompt.len());
            assert_close(&merged, &unmerged, &format!("{name} seed {seed}"));
        }
    }
}

#[test]
fn own_weights_may_stay_in_half_precision() {
    let prompt = &fixtures::prompts()[2];
    let mut runner = Runner::new(fixtures::load_model("llama_bias"));
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut adapter = merged(&random_adapter(&mut rng, &runner.model), &runner.model);
    for slots in adapter.linears.values_mut() {
        if let Weight::Own(w) = &mut slots.weight {
            *w = w.to_dtype(DType::BF16).unwrap();
        }
    }
    let mut exact = adapter.clone();
    for slots in exact.linears.values_mut() {
        if let Weight::Own(w) = &mut slots.weight {
            *w = w.to_dtype(DType::F32).unwrap();
        }
    }
    let half = runner.prompt_logits(prompt, Some(&adapter), prompt.len());
    let full = runner.prompt_logits(prompt, Some(&exact), prompt.len());
    assert_close(&half, &full, "bf16 weights of its own");
}
