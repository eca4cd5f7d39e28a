use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::super::fake_base::{FakeBase, VOCAB, close, random};
use super::super::merge::{effective_weight, scaled};
use super::super::{
    BaseWeights, Basis, BlockMix, ButterflyFactor, Delta, EmbeddingPatch, Formats, GateNetwork, GateRule, KvPrefix,
    LinearSlots, LoweredAdapter, NormOverride, Pre, Scale, SharedMatrix, Weight,
};
use super::{Part, compose, own_bytes_of};

/// A linear of the fake base with as many inputs as outputs, and a bias.
const SITE: &str = "model.layers.0.self_attn.q_proj";
/// Rounding of f32 sums in another order.
const TOLERANCE: f32 = 1e-5;

fn one(base: &FakeBase, slots: LinearSlots) -> LoweredAdapter {
    LoweredAdapter { linears: [(base.id(SITE), slots)].into(), ..LoweredAdapter::default() }
}

fn composed(base: &FakeBase, parts: &[(&LoweredAdapter, f32)]) -> Result<LoweredAdapter, String> {
    let names: Vec<String> = (0..parts.len()).map(|i| format!("part{i}")).collect();
    let parts = parts.iter().zip(&names).map(|((adapter, scale), name)| Part { name, adapter, scale: *scale });
    compose(&parts.collect::<Vec<_>>(), base, Formats::uniform(DType::F32)).map_err(|error| error.to_string())
}

/// Matrix and vector of the site: of the slots as they stand.
fn affine(base: &FakeBase, slots: &LinearSlots) -> (Tensor, Tensor) {
    let id = base.id(SITE);
    let weight = match &slots.weight {
        Weight::Base => base.weight(id).unwrap(),
        Weight::Own(own) => own.clone(),
    };
    let c = slots.c.clone().or(base.bias(id).unwrap()).unwrap();
    (effective_weight(slots, weight).unwrap(), c)
}

/// The same after all parts, by the definition of a step and with dense matrices.
fn expected(base: &FakeBase, parts: &[(&LinearSlots, f32)]) -> (Tensor, Tensor) {
    let bias = base.bias(base.id(SITE)).unwrap().unwrap();
    let (mut weight, mut c) = affine(base, &LinearSlots::default());
    for (slots, strength) in parts {
        let start = match &slots.weight {
            Weight::Base => weight.clone(),
            Weight::Own(own) => own.clone(),
        };
        let next = effective_weight(slots, start).unwrap();
        let before = scaled(&slots.scale, &(&c - &bias).unwrap().unsqueeze(1).unwrap()).unwrap().squeeze(1).unwrap();
        let next_c = (before + slots.c.as_ref().unwrap_or(&bias)).unwrap();
        let toward =
            |from: &Tensor, to: Tensor| (from + ((to - from).unwrap() * f64::from(*strength)).unwrap()).unwrap();
        (weight, c) = (toward(&weight, next), toward(&c, next_c));
    }
    (weight, c)
}

fn sizes(base: &FakeBase) -> (usize, usize) {
    let (out_features, in_features) = base.weight(base.id(SITE)).unwrap().dims2().unwrap();
    (out_features, in_features)
}

#[track_caller]
fn check(parts: &[(&LinearSlots, f32)]) {
    let base = FakeBase::new(false);
    let adapters: Vec<_> = parts.iter().map(|(slots, strength)| (one(&base, (*slots).clone()), *strength)).collect();
    let parts_of: Vec<_> = adapters.iter().map(|(adapter, strength)| (adapter, *strength)).collect();
    let found = composed(&base, &parts_of).unwrap();
    let (weight, c) = affine(&base, &found.linears[&base.id(SITE)]);
    let (expected_weight, expected_c) = expected(&base, parts);
    assert!(close(&weight, &expected_weight, TOLERANCE), "weight");
    assert!(close(&c, &expected_c, TOLERANCE), "c");
}

#[track_caller]
fn check_refused(parts: &[(&LoweredAdapter, f32)], reason: &str) {
    let base = FakeBase::new(false);
    let error = composed(&base, parts).unwrap_err();
    assert!(error.contains(reason) && error.contains("`part0`"), "{error}");
}

/// Slots of every sort, by what they are.
struct Sorts {
    low_rank: LinearSlots,
    shards: LinearSlots,
    tiles: LinearSlots,
    sparse: LinearSlots,
    scale: LinearSlots,
    scaled_delta: LinearSlots,
    rotation: LinearSlots,
    bias: LinearSlots,
    input: LinearSlots,
    blocks: LinearSlots,
    butterfly: LinearSlots,
    circulant: LinearSlots,
    kron: LinearSlots,
    exchange: LinearSlots,
    spectral: LinearSlots,
    shared: LinearSlots,
    outputs: LinearSlots,
    own: LinearSlots,
    rows: LinearSlots,
}

fn sorts() -> Sorts {
    let base = FakeBase::new(false);
    let (n, k) = sizes(&base);
    let deltas = |deltas: Vec<Delta>| LinearSlots { deltas, ..LinearSlots::default() };
    let low_rank = |seed| Delta::LowRank { a: random(seed, (3, k)), b: random(seed + 1, (n, 3)) };
    // Away from zero, so that its inverse is well behaved.
    let around_one = |seed, len: usize| (random(seed, len) * 0.4).unwrap().affine(1.0, 1.0).unwrap();
    let matrix = |seed, shape: (usize, usize)| Arc::new(SharedMatrix::new(&random(seed, shape)).unwrap());
    let index = |values: &[u32]| Tensor::new(values, &Device::Cpu).unwrap();
    let last = n as u32 - 1;
    Sorts {
        low_rank: LinearSlots { c: Some(random(1, n)), ..deltas(vec![low_rank(2), low_rank(4)]) },
        shards: deltas(vec![Delta::ShardSum { m: random(6, (5, n)) }]),
        tiles: deltas(vec![Delta::ShardSum { m: random(7, (2, n / 3)) }]),
        sparse: deltas(vec![Delta::Sparse {
            rows: index(&[0, 3, 3, last]),
            columns: index(&[1, 0, 2, 1]),
            values: random(8, 4),
        }]),
        scale: LinearSlots { scale: Scale::Diag(around_one(9, n)), c: Some(random(10, n)), ..LinearSlots::default() },
        scaled_delta: LinearSlots { scale: Scale::Diag(around_one(11, n)), ..deltas(vec![low_rank(12)]) },
        rotation: LinearSlots {
            scale: Scale::PairRot { p: around_one(14, n), q: random(15, n), half: 2 },
            c: Some(random(16, n)),
            ..LinearSlots::default()
        },
        bias: LinearSlots { c: Some(random(17, n)), ..LinearSlots::default() },
        input: LinearSlots { pre: Pre::Diag(around_one(18, k)), ..LinearSlots::default() },
        blocks: LinearSlots { pre: Pre::BlockDiag(random(19, (k / 2, 2, 2))), ..LinearSlots::default() },
        butterfly: LinearSlots {
            pre: Pre::Butterfly(vec![ButterflyFactor {
                places: Tensor::from_vec((0..k as u32).rev().collect(), k, &Device::Cpu).unwrap(),
                blocks: random(23, (k / 2, 2, 2)),
            }]),
            ..LinearSlots::default()
        },
        circulant: deltas(vec![Delta::Circulant { kernel: random(24, (n / 2, k / 2, 2)) }]),
        kron: deltas(vec![Delta::BlockProduct {
            a: random(27, (1, 3, k / 4)),
            mix: BlockMix::Matrix(random(28, (n / 2, 4))),
            b: Some(random(29, (1, 2, 3))),
        }]),
        exchange: deltas(vec![Delta::BlockProduct {
            a: random(30, (2, 4, k / 2)),
            mix: BlockMix::Exchange,
            b: Some(random(31, (2, n / 2, 4))),
        }]),
        spectral: deltas(vec![Delta::Spectral {
            basis: Basis::Fourier,
            shape: (n, k),
            rows: index(&[0, 3, last]),
            columns: index(&[1, 0, 2]),
            values: random(31, 3),
        }]),
        shared: deltas(vec![Delta::SharedLowRank {
            a: matrix(27, (3, k)),
            b: matrix(28, (n, 3)),
            d: random(29, 3),
            g: random(30, n),
        }]),
        outputs: LinearSlots {
            scale: Scale::BlockDiag(random(25, (n.div_ceil(5), 5, 5))),
            c: Some(random(26, n)),
            ..LinearSlots::default()
        },
        own: LinearSlots { weight: Weight::Own(random(20, (n, k))), c: Some(random(21, n)), ..LinearSlots::default() },
        rows: LinearSlots { rows: Some((vec![1, last], random(22, (2, k)))), ..LinearSlots::default() },
    }
}

#[test]
fn a_strength_is_a_step_from_the_base_towards_the_adapter() {
    let sorts = sorts();
    let Sorts { low_rank, shards, tiles, sparse, scale, scaled_delta, bias, input, circulant, own, rows, .. } = &sorts;
    let (kron, exchange) = (&sorts.kron, &sorts.exchange);
    for slots in
        [low_rank, shards, tiles, sparse, scale, scaled_delta, bias, input, circulant, kron, exchange, own, rows]
    {
        for strength in [0.3, 1.0, -0.5, 2.0] {
            check(&[(slots, strength)]);
        }
    }
    check(&[(&sorts.shared, 0.3)]);
    check(&[(&sorts.spectral, 0.3), (&sorts.scale, 1.0)]);
    check(&[(&sorts.rotation, 1.0)]);
    check(&[(&sorts.blocks, 1.0)]);
    check(&[(&sorts.butterfly, 1.0)]);
    check(&[(&sorts.outputs, 1.0)]);
}

#[test]
fn each_step_acts_on_what_those_before_it_made() {
    let sorts = sorts();
    let Sorts { low_rank, shards, tiles, sparse, scale, scaled_delta, rotation, bias, input, .. } = &sorts;
    let Sorts { blocks, butterfly, circulant, kron, exchange, shared, outputs, own, rows, .. } = &sorts;
    check(&[(scale, 0.5), (shared, 0.7), (low_rank, 1.0), (scale, 1.0)]);
    check(&[(rotation, 1.0), (shared, 0.5), (shared, 1.0)]);
    check(&[(low_rank, 0.7), (shards, 0.3), (sparse, -1.0)]);
    check(&[(low_rank, 0.7), (scaled_delta, 1.0)]);
    check(&[(scaled_delta, 1.0), (low_rank, 0.7), (scale, 0.5)]);
    check(&[(scale, 0.5), (tiles, 0.7), (shards, 1.0), (sparse, 0.4)]);
    check(&[(scale, 1.0), (scaled_delta, 0.5), (scale, 0.25), (low_rank, 1.0)]);
    check(&[(rotation, 1.0), (low_rank, 0.5), (tiles, 1.0)]);
    check(&[(rotation, 1.0), (scale, 0.5), (low_rank, 1.0)]);
    check(&[(scale, 0.5), (rotation, 1.0), (low_rank, 1.0), (bias, 0.5)]);
    check(&[(low_rank, 1.0), (rotation, 1.0)]);
    check(&[(bias, 1.0), (scale, 0.5), (bias, 0.5)]);
    check(&[(input, 0.5), (input, 1.0), (low_rank, 1.0), (scale, 1.0)]);
    check(&[(blocks, 1.0), (low_rank, 0.5), (scale, 0.5)]);
    check(&[(bias, 1.0), (own, 0.5), (low_rank, 1.0), (scale, 1.0)]);
    check(&[(rows, 1.0), (low_rank, 0.5)]);
    check(&[(circulant, 0.5), (scale, 1.0), (low_rank, 0.7)]);
    check(&[(butterfly, 1.0), (circulant, 0.3), (bias, 1.0)]);
    check(&[(low_rank, 0.5), (circulant, 1.0), (outputs, 1.0)]);
    check(&[(scale, 0.5), (kron, 0.7), (exchange, 0.4)]);
    check(&[(rotation, 1.0), (exchange, 1.0), (kron, 0.3)]);
    check(&[(exchange, 1.0), (kron, 0.5), (scale, 1.0)]);
}

#[test]
fn what_does_not_change_is_shared() {
    let base = FakeBase::new(false);
    let sorts = sorts();
    let (low_rank, own) = (one(&base, sorts.low_rank), one(&base, sorts.own));
    let plain = composed(&base, &[(&own, 1.0), (&low_rank, 1.0)]).unwrap();
    let (n, _) = sizes(&base);
    assert_eq!(plain.bytes_beside([&own, &low_rank].into_iter()), 4 * n, "only `c` is new");
    let weaker = composed(&base, &[(&own, 1.0), (&low_rank, 0.5)]).unwrap();
    assert_eq!(weaker.bytes_beside([&own, &low_rank].into_iter()), 4 * n + 2 * 4 * 3 * n, "and `b` of two deltas");
    let part = |adapter, scale| Part { name: "x", adapter, scale };
    assert_eq!(own_bytes_of(&[part(&own, 1.0), part(&low_rank, 0.5)]), 0);
    assert_eq!(own_bytes_of(&[part(&own, 0.5)]), own.own_bytes());
}

#[test]
fn what_the_slots_cannot_hold_is_refused_by_module() {
    let base = FakeBase::new(false);
    let sorts = sorts();
    let [low_rank, sparse, rotation, input, blocks, own, rows] =
        [sorts.low_rank, sorts.sparse, sorts.rotation, sorts.input, sorts.blocks, sorts.own, sorts.rows]
            .map(|slots| one(&base, slots));
    check_refused(&[(&low_rank, 1.0), (&own, 1.0)], "`part1` replaces the weight");
    check_refused(&[(&own, 1.0), (&own, 1.0)], SITE);
    check_refused(&[(&rows, 1.0), (&rows, 1.0)], "`part1` replaces the weight");
    check_refused(&[(&low_rank, 1.0), (&input, 1.0)], "`part1` transforms the input");
    check_refused(&[(&blocks, 1.0), (&blocks, 1.0)], "both transform the input");
    check_refused(&[(&blocks, 0.5)], "no strength but 1");
    check_refused(&[(&rotation, 1.0), (&rotation, 1.0)], "rotates the outputs");
    check_refused(&[(&rotation, 0.5)], "no strength but 1");
    let [butterfly, circulant, spectral, outputs] =
        [sorts.butterfly, sorts.circulant, sorts.spectral, sorts.outputs].map(|slots| one(&base, slots));
    check_refused(&[(&butterfly, 0.5)], "no strength but 1");
    check_refused(&[(&outputs, 0.5)], "no strength but 1");
    check_refused(&[(&outputs, 1.0), (&rotation, 1.0)], "multiplies blocks of outputs");
    check_refused(&[(&outputs, 1.0), (&low_rank, 1.0)], "name the later one first");
    check_refused(&[(&rotation, 1.0), (&circulant, 1.0)], "circulant blocks cannot be scaled by output");
    check_refused(&[(&rotation, 1.0), (&spectral, 1.0)], "coefficients cannot be scaled by output");
    check_refused(&[(&rotation, 1.0), (&sparse, 1.0)], "name it first");
    let (n, _) = sizes(&base);
    let zeros = Scale::Diag(Tensor::zeros(n, DType::F32, &Device::Cpu).unwrap());
    let silent = one(&base, LinearSlots { scale: zeros, ..LinearSlots::default() });
    check_refused(&[(&silent, 1.0), (&low_rank, 1.0)], "by zero");
    assert!(composed(&base, &[(&low_rank, 1.0), (&silent, 1.0)]).is_ok());
    let LinearSlots { pre, .. } = input.linears[&base.id(SITE)].clone();
    let both = LinearSlots { pre, ..rotation.linears[&base.id(SITE)].clone() };
    check_refused(&[(&one(&base, both), 0.5)], "in several ways");
}

#[test]
fn values_that_the_format_cannot_hold_are_refused() {
    let base = FakeBase::new(false);
    let low_rank = one(&base, sorts().low_rank);
    let parts = [Part { name: "huge", adapter: &low_rank, scale: 1e6 }];
    let error = compose(&parts, &base, Formats::uniform(DType::F16)).unwrap_err().to_string();
    assert!(error.contains("not finite in f16") && error.contains("`huge`") && error.contains(SITE), "{error}");
}

#[test]
fn norms_are_replaced_by_one_at_a_strength() {
    let base = FakeBase::new(false);
    let id = base.id("model.norm");
    let weight = base.weight(id).unwrap();
    let norm = NormOverride { weight: Some(random(1, weight.dims()[0])), shift: Some(random(2, weight.dims()[0])) };
    let adapter = LoweredAdapter { norms: [(id, norm.clone())].into(), ..LoweredAdapter::default() };
    let half = composed(&base, &[(&adapter, 0.5)]).unwrap().norms[&id].clone();
    let middle = ((norm.weight.unwrap() + weight).unwrap() * 0.5).unwrap();
    assert!(close(&half.weight.unwrap(), &middle, TOLERANCE));
    let middle = ((norm.shift.unwrap() + base.bias(id).unwrap().unwrap()).unwrap() * 0.5).unwrap();
    assert!(close(&half.shift.unwrap(), &middle, TOLERANCE));
    check_refused(&[(&adapter, 1.0), (&adapter, 1.0)], "more than one of them replaces this norm");
}

#[test]
fn embeddings_add_scale_and_shift_in_order() {
    let base = FakeBase::new(false);
    let id = base.id("model.embed_tokens");
    let table = base.weight(id).unwrap();
    let dim = table.dim(1).unwrap();
    let patch =
        |patch: EmbeddingPatch| LoweredAdapter { embeddings: [(id, patch)].into(), ..LoweredAdapter::default() };
    let low_rank = |seed| {
        let low_rank = Some((random(seed, (2, VOCAB)), random(seed + 1, (dim, 2))));
        patch(EmbeddingPatch { low_rank, ..EmbeddingPatch::default() })
    };
    let affine = |seed| {
        let (scale, shift) = (Some(random(seed, dim)), Some(random(seed + 1, dim)));
        patch(EmbeddingPatch { scale, shift, ..EmbeddingPatch::default() })
    };
    let rows = patch(EmbeddingPatch { rows: Some((vec![3, 5], random(9, (2, dim)))), ..EmbeddingPatch::default() });
    let own = patch(EmbeddingPatch { table: Some(random(10, (VOCAB, dim))), ..EmbeddingPatch::default() });
    let all = |start: &Tensor, patch: &EmbeddingPatch| {
        let mut e = patch.table.clone().unwrap_or_else(|| start.clone());
        if let Some((ids, rows)) = &patch.rows {
            for (i, id) in ids.iter().enumerate() {
                e = e.slice_assign(&[*id as usize..*id as usize + 1, 0..dim], &rows.narrow(0, i, 1).unwrap()).unwrap();
            }
        }
        if let Some((a, b)) = &patch.low_rank {
            e = (e + b.matmul(a).unwrap().t().unwrap()).unwrap();
        }
        let e = patch.scale.iter().fold(e, |e, scale| e.broadcast_mul(scale).unwrap());
        patch.shift.iter().fold(e, |e, shift| e.broadcast_add(shift).unwrap())
    };
    let check = |parts: &[(&LoweredAdapter, f32)]| {
        let found = composed(&base, parts).unwrap();
        let expected = parts.iter().fold(table.clone(), |e, (adapter, strength)| {
            let next = all(&e, &adapter.embeddings[&id]);
            (&e + ((next - &e).unwrap() * f64::from(*strength)).unwrap()).unwrap()
        });
        assert!(close(&all(&table, &found.embeddings[&id]), &expected, TOLERANCE));
    };
    check(&[(&low_rank(1), 0.5), (&low_rank(3), 1.0), (&affine(5), 0.5), (&affine(7), 1.0)]);
    check(&[(&rows, 0.5), (&low_rank(1), 1.0)]);
    check(&[(&own, 0.5), (&affine(5), 0.5)]);
    check_refused(&[(&affine(5), 1.0), (&low_rank(1), 1.0)], "name it first");
    check_refused(&[(&low_rank(1), 1.0), (&rows, 1.0)], "model.embed_tokens");
}

#[test]
fn one_may_stand_before_the_prompt_and_all_must_wake_together() {
    let base = FakeBase::new(false);
    let low_rank = one(&base, sorts().low_rank);
    let virtual_tokens = LoweredAdapter { virtual_tokens: Some(random(1, (2, 12))), ..LoweredAdapter::default() };
    let layers = vec![(random(2, (3, 8)), random(3, (3, 8))); 2];
    let prefix = LoweredAdapter { kv_prefix: Some(KvPrefix { layers }), ..LoweredAdapter::default() };
    let both = composed(&base, &[(&low_rank, 0.5), (&prefix, 1.0)]).unwrap();
    assert_eq!((both.num_prefix_entries(), both.linears.len()), (3, 1));
    assert_eq!(composed(&base, &[(&virtual_tokens, 1.0), (&low_rank, 0.5)]).unwrap().num_virtual_tokens(), 2);
    check_refused(&[(&virtual_tokens, 1.0), (&prefix, 1.0)], "`part0` and `part1` both stand before the prompt");
    check_refused(&[(&virtual_tokens, 0.5)], "no strength but 1");
    let waiting = LoweredAdapter { invocation_tokens: vec![1, 2], ..low_rank.clone() };
    check_refused(&[(&waiting, 1.0), (&low_rank, 1.0)], "alora_invocation_tokens");
    assert_eq!(composed(&base, &[(&waiting, 1.0), (&waiting, 0.5)]).unwrap().invocation_tokens, [1, 2]);
}

#[test]
fn one_may_bring_gates_and_its_terms_have_a_strength() {
    let base = FakeBase::new(false);
    let low_rank = one(&base, sorts().low_rank);
    let places = Tensor::new(&[0u32, 1], &Device::Cpu).unwrap();
    let (out_features, in_features) = sizes(&base);
    let delta = Delta::Gated { a: random(1, (2, in_features)), b: random(2, (out_features, 2)), places };
    let network = GateNetwork { layers: vec![(random(3, (2, 12)), random(4, 2))], group: 2, rule: GateRule::default() };
    let gated = LoweredAdapter {
        gates: Some(network),
        ..one(&base, LinearSlots { deltas: vec![delta.clone()], ..LinearSlots::default() })
    };
    let both = composed(&base, &[(&low_rank, 1.0), (&gated, 0.5)]).unwrap();
    assert_eq!((both.num_contexts(), both.gates.unwrap().layers.len()), (2, 1));
    let (Delta::Gated { b, .. }, Some(Delta::Gated { b: half, .. })) =
        (&delta, both.linears[&base.id(SITE)].deltas.last())
    else {
        panic!("the gated term is the last")
    };
    assert!(close(&(b * 0.5).unwrap(), half, TOLERANCE));
    check_refused(&[(&gated, 1.0), (&gated, 1.0)], "both bring a network that gives gates");
    let virtual_tokens = LoweredAdapter { virtual_tokens: Some(random(1, (2, 12))), ..LoweredAdapter::default() };
    check_refused(&[(&gated, 1.0), (&virtual_tokens, 1.0)], "knows nothing of what `part1` puts before the prompt");
}
