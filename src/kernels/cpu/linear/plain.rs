//! What adapters do to a row, in plain loops over f32 matrices and sums in f64: the tests' oracle.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, LazyLock, Mutex};

use super::super::base::OwnMatrix;
use super::super::block_product::{BlockProduct, PackedMix};
use super::super::blocks::Blocks;
use super::super::circulant::Circulant;
use super::super::integers::{IntegerMatrix, IntegerWidth};
use super::super::joint::JointLowRank;
use super::super::packed::{PackedMatrix, WeightFormat};
use super::super::pre::PackedPre;
use super::super::route::Router;
use super::super::rows::RowMatrix;
use super::super::scale::PackedScale;
use super::super::slots::{PackedDelta, PackedSlots, RowGates};
use super::super::sparse::SparseRows;
use super::super::vector::PackedVector;
use crate::kernels::cpu::testing::random;

/// An adapter's slots as plain f32 matrices.
#[derive(Default)]
pub(super) struct Plain {
    /// Factors: places, length of a block, blocks.
    pub(super) pre: Vec<(Vec<u32>, usize, Vec<f32>)>,
    pub(super) own: Option<Vec<f32>>,
    rows: Option<(Vec<u32>, Vec<f32>)>,
    low_rank: Option<(usize, Vec<f32>, Vec<f32>)>,
    shard_sum: Option<(usize, usize, Vec<f32>)>,
    sparse: Option<(Vec<u32>, Vec<u32>, Vec<f32>)>,
    circulant: Option<(usize, Vec<f32>)>,
    blocks: Option<PlainBlocks>,
    /// Which of two pairs of matrices, d and g; the first ones twice.
    joint: Option<(u64, Vec<f32>, Vec<f32>)>,
    pub(super) scale: Option<PackedScale>,
    /// Experts, how many are chosen, and prototypes.
    router: Option<(usize, usize, Vec<f32>)>,
    /// Rank of a term that the gates of [`row_gates`] weigh, in turn.
    gated: Option<usize>,
    c: Option<PackedVector>,
}

/// A product of blocks.
pub(super) struct PlainBlocks {
    /// Blocks of inputs and of outputs, and numbers of a block between.
    sizes: (usize, usize, usize),
    /// Matrices of inputs.
    a: Vec<f32>,
    /// The mix of blocks, or none where they exchange their parts.
    mix: Option<Vec<f32>>,
    /// Matrices of outputs.
    b: Option<Vec<f32>>,
}

impl PlainBlocks {
    pub(super) fn random((n, k): (usize, usize), seed: u64) -> Self {
        let has = |bit: u64| seed >> bit & 1 == 1;
        let divisor = |of: usize, most: usize| (1..=most).rev().find(|d| of.is_multiple_of(*d)).unwrap_or(1);
        let (blocks, p, r) = (divisor(k, 6), divisor(n, if has(25) { 3 } else { 9 }), 1 + (seed >> 26) as usize % 20);
        let (mix, p, r) = if has(27) {
            let both = (1..=4).rev().find(|d| k.is_multiple_of(*d) && n.is_multiple_of(*d)).unwrap_or(1);
            return Self {
                sizes: (both, both, r * both),
                a: random(both * r * k, seed ^ 31),
                mix: None,
                b: Some(random(n * r * both, seed ^ 32)),
            };
        } else {
            (Some(random(p * blocks, seed ^ 33)), p, if has(28) { n / p } else { r })
        };
        let (d, q) = (k / blocks, n / p);
        Self {
            sizes: (blocks, p, r),
            a: random(if has(29) { r * d } else { r * k }, seed ^ 31),
            mix,
            b: (!has(28)).then(|| random(if has(30) { q * r } else { n * r }, seed ^ 32)),
        }
    }

    pub(super) fn pack(&self, (n, k): (usize, usize)) -> BlockProduct {
        let (blocks, p, r) = self.sizes;
        let (d, q) = (k / blocks, n / p);
        let mix = self.mix.clone().map_or(PackedMix::Exchange, |w| PackedMix::Matrix { w, p });
        let b = self.b.as_ref().map(|b| (b.as_slice(), (b.len() / (q * r), q, r)));
        BlockProduct::new(WeightFormat::F32, (&self.a, (self.a.len() / (r * d), r, d)), mix, b).expect("memory")
    }

    pub(super) fn output(&self, x: &[f32], n: usize, o: usize) -> f64 {
        let (blocks, p, r) = self.sizes;
        let (d, q) = (x.len() / blocks, n / p);
        let (i, t) = (o / q, o % q);
        let g = |j: usize, s: usize| -> f64 {
            let row = &self.a[(j * r + s) * d % self.a.len()..][..d];
            row.iter().zip(&x[j * d..]).map(|(a, x)| f64::from(*a) * f64::from(*x)).sum()
        };
        let h = |s: usize| match &self.mix {
            Some(w) => (0..blocks).map(|j| f64::from(w[i * blocks + j]) * g(j, s)).sum(),
            None => g(s / (r / blocks), i * (r / blocks) + s % (r / blocks)),
        };
        let Some(b) = &self.b else { return h(t) };
        (0..r).map(|s| f64::from(b[(o * r + s) % b.len()]) * h(s)).sum()
    }
}

/// Ranks of the two pairs of matrices that adapters share.
pub(super) fn joint_rank(which: u64) -> usize {
    [21, 5][which as usize]
}

/// Down and up projection of a pair.
pub(super) fn joint_matrices(which: u64, (n, k): (usize, usize)) -> (Vec<f32>, Vec<f32>) {
    let r = joint_rank(which);
    (random(r * k, 90 + which), random(n * r, 92 + which))
}

/// The same packed: one pair for all adapters.
pub(super) fn kept_matrices(which: u64, (n, k): (usize, usize)) -> (Arc<PackedMatrix>, Arc<PackedMatrix>) {
    type Pairs = HashMap<(u64, usize, usize), (Arc<PackedMatrix>, Arc<PackedMatrix>)>;
    static PAIRS: LazyLock<Mutex<Pairs>> = LazyLock::new(Mutex::default);
    let mut pairs = PAIRS.lock().expect("no test panics with it");
    let pair = pairs.entry((which, n, k)).or_insert_with(|| {
        let ((a, b), r) = (joint_matrices(which, (n, k)), joint_rank(which));
        let b = PackedMatrix::from_f32(n, r, |i| &b[i * r..][..r]).expect("b");
        let a = PackedMatrix::from_f32(r, k, |i| &a[i * k..][..k]).expect("a");
        (Arc::new(a), Arc::new(b))
    });
    pair.clone()
}

/// Two gates for each row of `x`: two of its own values.
pub(super) fn row_gates(x: &[f32], k: usize) -> Vec<f32> {
    x.chunks_exact(k).flat_map(|row| [row[0], row[k / 2]]).collect()
}

/// The gates of a run's rows.
pub(super) fn gates_of(gates: &[f32], rows: Range<usize>) -> Option<RowGates<'_>> {
    Some(RowGates { values: &gates[2 * rows.start..2 * rows.end], width: 2 })
}

impl Plain {
    pub(super) fn random((n, k): (usize, usize), seed: u64) -> Self {
        let has = |bit: u64| seed >> bit & 1 == 1;
        let r = 1 + (seed >> 8) as usize % 20;
        let q = if has(5) { n } else { (1..=n).rev().find(|q| n.is_multiple_of(*q) && *q < n).unwrap_or(n) };
        let some = |bit: u64, len: usize| has(bit).then(|| random(len, seed ^ bit));
        let format = if has(33) { WeightFormat::Bf16 } else { WeightFormat::F32 };
        Self {
            // Blocks of one number are a diagonal. Only the last of several factors has its inputs in order.
            pre: (0..if has(12) { 3 } else { u64::from(has(7)) })
                .map(|factor| {
                    let s = (1..=8).rev().find(|s| has(10) && k.is_multiple_of(*s)).unwrap_or(1);
                    let mut places: Vec<u32> = (0..k as u32).collect();
                    places.rotate_left(factor as usize * 7 % k);
                    places.reverse();
                    if factor == 0 {
                        places.sort_unstable();
                    }
                    (places, s, random(k * s, seed ^ 7 ^ factor << 20))
                })
                .rev()
                .collect(),
            // Multiples of a 2048th are 16-bit integers.
            own: some(0, n * k).map(|w| w.iter().map(|v| (v * 2048.0).round() / 2048.0).collect()),
            rows: has(6).then(|| {
                let indexes: Vec<u32> = (0..n as u32).filter(|i| seed >> (i % 60) & 1 == 1).collect();
                let rows = random(indexes.len() * k, seed ^ 6);
                (indexes, rows)
            }),
            low_rank: some(1, r * k).map(|a| (r, a, random(n * r, seed ^ 99))),
            shard_sum: some(2, r * q).map(|m| (r, q, m)),
            sparse: has(8).then(|| {
                let places: Vec<usize> = (0..n * k).filter(|at| (seed >> (at % 61)) & 3 == 1).collect();
                let (rows, columns) = places.iter().map(|at| ((at / k) as u32, (at % k) as u32)).unzip();
                (rows, columns, random(places.len(), seed ^ 8))
            }),
            circulant: has(13).then(|| {
                let b = (1..=k).rev().find(|b| k.is_multiple_of(*b) && n.is_multiple_of(*b)).unwrap_or(1);
                (b, random(n * k / b, seed ^ 13))
            }),
            blocks: has(24).then(|| PlainBlocks::random((n, k), seed)),
            joint: has(31).then(|| {
                let which = u64::from(has(32));
                (which, random(joint_rank(which), seed ^ 31), random(n, seed ^ 32))
            }),
            router: has(21).then(|| {
                let experts = 1 + (seed >> 16) as usize % 4;
                (experts, 1 + (seed >> 20) as usize % experts, random(experts * k, seed ^ 12))
            }),
            gated: has(22).then(|| 1 + (seed >> 23) as usize % 9),
            // Pairs and blocks within a panel, and across.
            scale: some(3, n).map(|p| {
                if has(14) {
                    let s = [3, 16, 70][(seed >> 15) as usize % 3];
                    let values = random(n.div_ceil(s) * s * s, seed ^ 14);
                    return PackedScale::BlockDiag(Blocks::new(s, &values));
                }
                match (1..=n / 2).rfind(|half| n.is_multiple_of(2 * half) && !(has(11) && *half > 4)) {
                    Some(half) if has(9) => PackedScale::PairRot { p, q: random(n, seed ^ 9), half },
                    _ => {
                        let near: Vec<f32> = p.iter().map(|p| 1.0 + p / 3.0).collect();
                        PackedScale::Diag(PackedVector::factors(format, if has(34) { &near } else { &p }))
                    }
                }
            }),
            c: some(4, n).map(|c| PackedVector::added(format, &c, &[])),
        }
    }

    pub(super) fn pack(&self, (n, k): (usize, usize), integers: Option<IntegerWidth>) -> PackedSlots {
        let mut deltas = Vec::new();
        if let Some((r, a, b)) = &self.low_rank {
            let b = PackedMatrix::from_f32(n, *r, |i| &b[i * r..][..*r]).expect("b");
            deltas.push(PackedDelta::LowRank { a: RowMatrix::new(WeightFormat::F32, a, *r, k), b });
        }
        if let Some((r, q, m)) = &self.shard_sum {
            let transposed: Vec<f32> = (0..q * r).map(|i| m[i % r * q + i / r]).collect();
            let m = PackedMatrix::from_f32(*q, *r, |i| &transposed[i * r..][..*r]).expect("m");
            deltas.push(PackedDelta::ShardSum { m });
        }
        if let Some((experts, top_k, prototypes)) = &self.router {
            let (a, b) = self.routed_factors(*experts, (n, k));
            let b = PackedMatrix::from_f32(n, 2 * experts, |i| &b[i * 2 * experts..][..2 * experts]).expect("b");
            let a = RowMatrix::new(WeightFormat::F32, &a, 2 * experts, k);
            deltas.push(PackedDelta::Routed { a, b, router: Router::new(prototypes.clone(), k, *top_k, 0.7) });
        }
        if let Some(r) = self.gated {
            let (a, b) = (random(r * k, 79), random(n * r, 80));
            let b = PackedMatrix::from_f32(n, r, |i| &b[i * r..][..r]).expect("b");
            let places = (0..r as u32).map(|j| j % 2).collect();
            deltas.push(PackedDelta::Gated { a: RowMatrix::new(WeightFormat::F32, &a, r, k), b, places });
        }
        if let Some((rows, columns, values)) = &self.sparse {
            deltas.push(PackedDelta::Sparse(SparseRows::new(WeightFormat::F32, k, rows, (columns, values))));
        }
        if let Some((b, kernel)) = &self.circulant {
            deltas.push(PackedDelta::Circulant(Circulant::new(kernel, (n / b, k / b, *b))));
        }
        deltas.extend(self.blocks.iter().map(|blocks| PackedDelta::BlockProduct(blocks.pack((n, k)))));
        if let Some((which, d, g)) = &self.joint {
            for _ in 0..2 - which {
                let (a, b) = kept_matrices(*which, (n, k));
                deltas.insert(0, PackedDelta::Joint(JointLowRank { a, b, d: d.clone(), g: g.clone() }));
            }
        }
        let own = self.own.as_ref().map(|w| match integers {
            Some(IntegerWidth::Sixteen) => {
                let read = |i: usize, row: &mut [f32]| row.copy_from_slice(&w[i * k..][..k]);
                let own = IntegerMatrix::new(IntegerWidth::Sixteen, WeightFormat::F32, (n, k), read);
                OwnMatrix::Integers(own.expect("own"))
            }
            _ => OwnMatrix::Float(PackedMatrix::from_f32(n, k, |i| &w[i * k..][..k]).expect("own")),
        });
        let rows = self
            .rows
            .as_ref()
            .map(|(indexes, rows)| (indexes.clone(), RowMatrix::new(WeightFormat::F32, rows, indexes.len(), k)));
        let blocks = |s: &usize, values: &Vec<f32>| Blocks::new(*s, values);
        let pre = match self.pre.as_slice() {
            [] => None,
            [(_, 1, values)] => Some(PackedPre::Diag(values.clone())),
            [(_, s, values)] => Some(PackedPre::BlockDiag(blocks(s, values))),
            several => {
                let factors = several.iter().map(|(places, s, values)| (places.clone(), blocks(s, values)));
                Some(PackedPre::Butterfly(factors.collect()))
            }
        };
        PackedSlots { pre, own, rows, deltas, scale: self.scale.clone(), c: self.c.clone() }
    }

    /// Down and up projections of experts with rank 2.
    fn routed_factors(&self, experts: usize, (n, k): (usize, usize)) -> (Vec<f32>, Vec<f32>) {
        (random(2 * experts * k, 77), random(n * 2 * experts, 78))
    }

    /// The gates of a row, in f64.
    fn gates(x: &[f32], top_k: usize, prototypes: &[f32]) -> Vec<f64> {
        let dot = |p: &[f32]| p.iter().zip(x).map(|(p, x)| f64::from(*p) * f64::from(*x)).sum::<f64>().abs();
        let magnitudes: Vec<f64> = prototypes.chunks_exact(x.len()).map(dot).collect();
        let rank = |m: f64| magnitudes.iter().filter(|other| **other > m).count();
        let weights: Vec<f64> =
            magnitudes.iter().map(|m| if rank(*m) < top_k { (m / 0.7).exp() } else { 0.0 }).collect();
        weights.iter().map(|w| w / weights.iter().sum::<f64>()).collect()
    }

    /// One output before scale and bias, in f64.
    fn unscaled(&self, x: &[f32], w: &[f32], o: usize) -> f64 {
        let k = x.len();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let weight = &self.own.as_deref().unwrap_or(w)[o * k..][..k];
        let replaced = self
            .rows
            .as_ref()
            .and_then(|(indexes, rows)| indexes.binary_search(&(o as u32)).ok().map(|found| &rows[found * k..][..k]));
        let mut pre_x = x.to_vec();
        for (places, s, blocks) in &self.pre {
            let v: Vec<f32> = places.iter().map(|from| pre_x[*from as usize]).collect();
            for (j, to) in places.iter().enumerate() {
                let products = (0..*s).map(|i| v[j / s * s + i] * blocks[(j / s * s + i) * s + j % s]);
                pre_x[*to as usize] = products.sum();
            }
        }
        let mut y = dot(&pre_x, replaced.unwrap_or(weight));
        if let Some((r, a, b)) = &self.low_rank {
            y += (0..*r).map(|j| f64::from(b[o * r + j]) * dot(x, &a[j * k..][..k])).sum::<f64>();
        }
        if let Some((experts, top_k, prototypes)) = &self.router {
            let (a, b) = self.routed_factors(*experts, (w.len() / k, k));
            for (expert, gate) in Self::gates(x, *top_k, prototypes).into_iter().enumerate() {
                let part = |j: usize| f64::from(b[o * 2 * experts + j]) * dot(x, &a[j * k..][..k]);
                y += gate * (part(2 * expert) + part(2 * expert + 1));
            }
        }
        if let Some(r) = self.gated {
            let (a, b) = (random(r * k, 79), random(w.len() / k * r, 80));
            let gate = |j: usize| f64::from(if j.is_multiple_of(2) { x[0] } else { x[k / 2] });
            y += (0..r).map(|j| gate(j) * f64::from(b[o * r + j]) * dot(x, &a[j * k..][..k])).sum::<f64>();
        }
        if let Some((r, q, m)) = &self.shard_sum {
            y += x.iter().enumerate().map(|(i, x)| f64::from(*x) * f64::from(m[i % r * q + o % q])).sum::<f64>();
        }
        if let Some((rows, columns, values)) = &self.sparse {
            let entries = rows.iter().zip(columns).zip(values).filter(|((row, _), _)| **row as usize == o);
            y += entries.map(|((_, column), value)| f64::from(x[*column as usize]) * f64::from(*value)).sum::<f64>();
        }
        if let Some((which, d, g)) = &self.joint {
            let (a, b) = joint_matrices(*which, (w.len() / k, k));
            let part = |j: usize| f64::from(b[o * d.len() + j]) * f64::from(d[j]) * dot(x, &a[j * k..][..k]);
            y += (2 - which) as f64 * f64::from(g[o]) * (0..d.len()).map(part).sum::<f64>();
        }
        if let Some((b, kernel)) = &self.circulant {
            let value = |i: usize| kernel[(o / b * (k / b) + i / b) * b + (i % b + b - o % b) % b];
            y += (0..k).map(|i| f64::from(value(i)) * f64::from(x[i])).sum::<f64>();
        }
        y + self.blocks.as_ref().map_or(0.0, |blocks| blocks.output(x, w.len() / k, o))
    }

    /// One output in f64.
    pub(super) fn output(&self, x: &[f32], w: &[f32], bias: &[f32], o: usize) -> f64 {
        let y = self.unscaled(x, w, o);
        let scaled = match &self.scale {
            None => y,
            Some(PackedScale::Diag(scale)) => y * f64::from(scale.value(o, 1.0)),
            Some(PackedScale::PairRot { p, q, half }) => {
                let is_first = (o / half).is_multiple_of(2);
                let partner = self.unscaled(x, w, if is_first { o + half } else { o - half });
                y * f64::from(p[o]) + partner * f64::from(if is_first { -q[o] } else { q[o] })
            }
            Some(PackedScale::BlockDiag(Blocks { s, values })) => {
                let (first, n) = (o / s * s, w.len() / x.len());
                let of_block = first..n.min(first + s);
                of_block.map(|i| self.unscaled(x, w, i) * f64::from(values[i * s + o % s])).sum()
            }
        };
        scaled + f64::from(self.c.as_ref().map_or(bias[o], |c| c.value(o, bias[o])))
    }
}
