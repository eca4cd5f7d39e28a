//! A whole linear with its adapters: one sweep over the base weight, everything else while the output is in cache.
//!
//! ```text
//! y = scale ⊙ ( W pre(x) + sum_j delta_j(x) ) + c     per run of rows with one adapter
//! ```
//!
//! First every run shrinks its rows (`h = a x`, or the sums of shards), then each panel of output columns is multiplied,
//! expanded into, scaled and shifted by the thread that owns it. A row's bits depend on its own input and adapter only.

use std::ops::Range;

use rayon::prelude::*;

use super::dispatch::{dispatch, fma};
use super::gemm::{Output, multiply_panel, to_words};
use super::isa::Isa;
use super::packed::{PANEL, PackedMatrix, WeightFormat};
use super::pre::{PackedPre, transform_rows};
use super::rows::{RowMatrix, append_row, dot_rows, row_words};
use super::scale::{PackedScale, scale_whole_rows};
use super::sparse::SparseRows;

/// What an adapter does to one linear, in the CPU's form.
#[derive(Debug, Default)]
pub struct PackedSlots {
    /// Transform of the rows of `x` before they meet the weight.
    pub pre: Option<PackedPre>,
    /// Weight of the adapter's own (n, k).
    pub own: Option<PackedMatrix>,
    /// Rows (r, k) that take the place of the weight's, and their indexes in ascending order.
    pub rows: Option<(Vec<u32>, RowMatrix)>,
    /// Additive terms.
    pub deltas: Vec<PackedDelta>,
    /// Output scale.
    pub scale: Option<PackedScale>,
    /// Vector added last (n); `None` is the base bias.
    pub c: Option<Vec<f32>>,
}

/// An additive term in the CPU's form.
#[derive(Debug)]
pub enum PackedDelta {
    /// `b (a x)`, a: (r, k), b: (n, r).
    LowRank {
        /// Down projection.
        a: RowMatrix,
        /// Up projection.
        b: PackedMatrix,
    },
    /// `y[i * q + j] += sum_s m[s, j] * sum_c x[c * r + s]`; `m` is packed as a (q, r) matrix.
    ShardSum {
        /// Block matrix, transposed.
        m: PackedMatrix,
    },
    /// `m x`, m: (n, k) sparse.
    Sparse(SparseRows),
}

/// Consecutive rows of `x` with one adapter.
#[derive(Clone, Debug)]
pub struct SlotRun<'a> {
    /// The rows.
    pub rows: Range<usize>,
    /// The adapter's slots; `None` is the bare base.
    pub slots: Option<&'a PackedSlots>,
}

/// The base's part of a linear.
#[derive(Clone, Copy, Debug)]
pub struct BaseLinear<'a> {
    /// Weight (n, k); `None` when `y` holds the product already.
    pub weight: Option<&'a PackedMatrix>,
    /// Bias (n).
    pub bias: Option<&'a [f32]>,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
}

/// Computes a linear with its adapters, see the module's formula; x: (m, k), y: (m, n), f32 row-major. The runs tile the
/// rows in order.
///
/// # Panics
/// When lengths do not fit, or a run of its own weight meets a `y` that holds the base product already.
pub(crate) fn linear_packed(x: &[f32], base: BaseLinear<'_>, runs: &[SlotRun<'_>], y: &mut [f32]) {
    let m = x.len() / base.k;
    assert_eq!((x.len(), y.len()), (m * base.k, m * base.n), "x is (m, k) and y is (m, n)");
    let isa = Isa::best();
    let pre_x = transform_rows(x, base.k, runs);
    let shrunk: Vec<Shrunk> = runs.par_iter().map(|run| shrink_run((x, &pre_x), base, run, isa)).collect();
    let products = products(base, runs);
    let words = Words::new(&pre_x, base.k, &products);
    let panels = base.n.div_ceil(PANEL);
    let threads = rayon::current_num_threads();
    let output = Output::new(y);
    (0..threads).into_par_iter().for_each(|thread| {
        for panel_idx in thread * panels / threads..(thread + 1) * panels / threads {
            for (rows, w) in &products {
                let x_stride = w.format().steps(base.k);
                let x = &words.of(w.format())[rows.start * x_stride..rows.end * x_stride];
                multiply_panel(x, rows.len(), w, panel_idx, &output.at_row(rows.start, base.n), isa);
            }
            for (run, shrunk) in runs.iter().zip(&shrunk) {
                finish_run(base, (run, shrunk), panel_idx, &output, isa);
            }
        }
    });
    scale_whole_rows(base, runs, y);
}

/// The dense products to make: rows that adjoin and share a weight are one, so the base weight is read once for all of
/// them.
fn products<'a>(base: BaseLinear<'a>, runs: &[SlotRun<'a>]) -> Vec<(Range<usize>, &'a PackedMatrix)> {
    let mut products: Vec<(Range<usize>, &PackedMatrix)> = Vec::new();
    for run in runs {
        let own = run.slots.and_then(|slots| slots.own.as_ref());
        assert!(own.is_none() || base.weight.is_some(), "an own weight replaces a product made here");
        let Some(w) = own.or(base.weight) else { continue };
        assert_eq!((w.n(), w.k()), (base.n, base.k), "the weight fits the linear");
        match products.last_mut() {
            Some((rows, last)) if std::ptr::eq(*last, w) && rows.end == run.rows.start => rows.end = run.rows.end,
            _ => products.push((run.rows.clone(), w)),
        }
    }
    products
}

/// The rows of `x` as words, in the formats that some weight asks for.
struct Words {
    bf16: Vec<u32>,
    f32: Vec<u32>,
}

impl Words {
    fn new(x: &[f32], k: usize, products: &[(Range<usize>, &PackedMatrix)]) -> Self {
        let words = |format| {
            if products.iter().any(|(_, w)| w.format() == format) { to_words(x, k, format) } else { Vec::new() }
        };
        Self { bf16: words(WeightFormat::Bf16), f32: words(WeightFormat::F32) }
    }

    fn of(&self, format: WeightFormat) -> &[u32] {
        match format {
            WeightFormat::Bf16 => &self.bf16,
            WeightFormat::F32 => &self.f32,
        }
    }
}

/// What a run's rows have in few numbers, computed before the sweep.
#[derive(Default)]
struct Shrunk {
    /// Per additive term the short vectors (rows, r); of a sparse one the whole outputs (rows, n).
    terms: Vec<Vec<f32>>,
    /// Outputs of the replaced weight rows (rows, r).
    replaced: Vec<f32>,
}

fn shrink_run((x, pre_x): (&[f32], &[f32]), base: BaseLinear<'_>, run: &SlotRun<'_>, isa: Isa) -> Shrunk {
    let Some(slots) = run.slots else { return Shrunk::default() };
    let k = base.k;
    let [x, pre_x] = [x, pre_x].map(|x| &x[run.rows.start * k..run.rows.end * k]);
    let mut words: Option<(WeightFormat, *const f32, Vec<u32>)> = None;
    let mut dot = |a: &RowMatrix, x: &[f32]| {
        assert_eq!(a.k(), k, "the rows are of the length of x");
        if words.as_ref().is_none_or(|(format, of, _)| *format != a.format() || *of != x.as_ptr()) {
            let mut rows = Vec::with_capacity(run.rows.len() * row_words(a.format(), k));
            x.chunks_exact(k).for_each(|row| append_row(a.format(), row, &mut rows));
            words = Some((a.format(), x.as_ptr(), rows));
        }
        let mut h = vec![0.0; run.rows.len() * a.r()];
        dot_rows(isa, words.as_ref().map_or(&[], |(_, _, rows)| rows), a, &mut h);
        h
    };
    let terms = slots.deltas.iter().map(|delta| match delta {
        PackedDelta::LowRank { a, .. } => dot(a, x),
        PackedDelta::ShardSum { m } => x.chunks_exact(k).flat_map(|row| shard_sum(row, m.k())).collect(),
        PackedDelta::Sparse(m) => m.multiply(x, k, base.n),
    });
    let terms = terms.collect();
    Shrunk { terms, replaced: slots.rows.as_ref().map_or_else(Vec::new, |(_, rows)| dot(rows, pre_x)) }
}

/// Sums the shards of width `r`, in ascending order.
fn shard_sum(row: &[f32], r: usize) -> Vec<f32> {
    let mut sums = vec![0.0; r];
    for shard in row.chunks(r) {
        for (sum, value) in sums.iter_mut().zip(shard) {
            *sum += value;
        }
    }
    sums
}

/// Everything one run needs in one panel of columns, once the dense product is there.
fn finish_run(
    base: BaseLinear<'_>,
    (run, shrunk): (&SlotRun<'_>, &Shrunk),
    panel_idx: usize,
    output: &Output,
    isa: Isa,
) {
    let from = panel_idx * PANEL;
    let columns = PANEL.min(base.n - from);
    let bias = base.bias.map(|b| &b[from..from + columns]);
    for (idx, row) in run.rows.clone().enumerate() {
        let y = output.columns(row * base.n + from, columns);
        if let Some(slots) = run.slots {
            if let Some((indexes, _)) = &slots.rows {
                let replaced = &shrunk.replaced[idx * indexes.len()..][..indexes.len()];
                let first = indexes.partition_point(|index| (*index as usize) < from);
                for (index, value) in indexes.iter().zip(replaced).skip(first) {
                    let Some(y) = y.get_mut(*index as usize - from) else { break };
                    *y = *value;
                }
            }
            for (delta, h) in slots.deltas.iter().zip(&shrunk.terms) {
                let b = match delta {
                    PackedDelta::LowRank { b, .. } => b,
                    PackedDelta::ShardSum { m } => m,
                    PackedDelta::Sparse(_) => {
                        let h = &h[idx * base.n + from..][..columns];
                        y.iter_mut().zip(h).for_each(|(y, h)| *y += h);
                        continue;
                    }
                };
                expand(isa, &h[idx * b.k()..][..b.k()], b, from, y);
            }
            match &slots.scale {
                Some(PackedScale::Diag(scale)) => y.iter_mut().zip(&scale[from..]).for_each(|(y, g)| *y *= g),
                Some(scale) if scale.needs_whole_rows() => continue,
                Some(_) | None => {}
            }
        }
        let c = run.slots.and_then(|slots| slots.c.as_ref()).map(|c| &c[from..from + columns]).or(bias);
        if let Some(c) = c {
            y.iter_mut().zip(c).for_each(|(y, c)| *y += c);
        }
    }
}

dispatch! {
    /// `y[j] += sum_s b[(from + j) mod q, s] * h[s]`, b: (q, r) packed, h: (r) f32.
    fn expand(h: &[f32], b: &PackedMatrix, from: usize, y: &mut [f32]) => expand_body
}

#[inline(always)]
fn expand_body<const FMA: bool>(h: &[f32], b: &PackedMatrix, from: usize, y: &mut [f32]) {
    let mut done = 0;
    while done < y.len() {
        let column = (from + done) % b.n();
        let lane = column % PANEL;
        let count = (PANEL - lane).min(b.n() - column).min(y.len() - done);
        let mut sums = [0.0_f32; PANEL];
        let panel = b.panel(column / PANEL);
        for (step, words) in panel.chunks_exact(PANEL).enumerate() {
            let words: &[u32; PANEL] = words.try_into().expect("a panel's step has 64 words");
            match b.format() {
                WeightFormat::F32 => {
                    for (sum, word) in sums.iter_mut().zip(words) {
                        *sum = fma::<FMA>(h[step], f32::from_bits(*word), *sum);
                    }
                }
                WeightFormat::Bf16 => {
                    let (low, high) = (h[2 * step], h.get(2 * step + 1).copied().unwrap_or(0.0));
                    for (sum, word) in sums.iter_mut().zip(words) {
                        let first = fma::<FMA>(low, f32::from_bits(*word << 16), *sum);
                        *sum = fma::<FMA>(high, f32::from_bits(*word & 0xffff_0000), first);
                    }
                }
            }
        }
        y[done..done + count].iter_mut().zip(&sums[lane..]).for_each(|(y, sum)| *y += sum);
        done += count;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::cpu::testing::random;

    /// An adapter's slots as plain f32 matrices.
    struct Plain {
        pre: Option<(usize, Vec<f32>)>,
        own: Option<Vec<f32>>,
        rows: Option<(Vec<u32>, Vec<f32>)>,
        low_rank: Option<(usize, Vec<f32>, Vec<f32>)>,
        shard_sum: Option<(usize, usize, Vec<f32>)>,
        sparse: Option<(Vec<u32>, Vec<u32>, Vec<f32>)>,
        scale: Option<PackedScale>,
        c: Option<Vec<f32>>,
    }

    impl Plain {
        fn random((n, k): (usize, usize), seed: u64) -> Self {
            let has = |bit: u64| seed >> bit & 1 == 1;
            let r = 1 + (seed >> 8) as usize % 20;
            let q = if has(5) { n } else { (1..=n).rev().find(|q| n.is_multiple_of(*q) && *q < n).unwrap_or(n) };
            let some = |bit: u64, len: usize| has(bit).then(|| random(len, seed ^ bit));
            Self {
                // Blocks of one number are a diagonal.
                pre: has(7).then(|| {
                    let s = (1..=8).rev().find(|s| has(10) && k.is_multiple_of(*s)).unwrap_or(1);
                    (s, random(k * s, seed ^ 7))
                }),
                own: some(0, n * k),
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
                scale: some(3, n).map(|p| match (1..=n / 2).rev().find(|half| n.is_multiple_of(2 * half)) {
                    Some(half) if has(9) => PackedScale::PairRot { p, q: random(n, seed ^ 9), half },
                    _ => PackedScale::Diag(p),
                }),
                c: some(4, n),
            }
        }

        fn pack(&self, (n, k): (usize, usize)) -> PackedSlots {
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
            if let Some((rows, columns, values)) = &self.sparse {
                deltas.push(PackedDelta::Sparse(SparseRows::new(rows, columns.clone(), values.clone())));
            }
            let own = self.own.as_ref().map(|w| PackedMatrix::from_f32(n, k, |i| &w[i * k..][..k]).expect("own"));
            let rows = self
                .rows
                .as_ref()
                .map(|(indexes, rows)| (indexes.clone(), RowMatrix::new(WeightFormat::F32, rows, indexes.len(), k)));
            let pre = self.pre.clone().map(|(s, blocks)| match s {
                1 => PackedPre::Diag(blocks),
                _ => PackedPre::BlockDiag { s, blocks },
            });
            PackedSlots { pre, own, rows, deltas, scale: self.scale.clone(), c: self.c.clone() }
        }

        /// One output before scale and bias, in f64.
        fn unscaled(&self, x: &[f32], w: &[f32], o: usize) -> f64 {
            let k = x.len();
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            let weight = &self.own.as_deref().unwrap_or(w)[o * k..][..k];
            let replaced = self.rows.as_ref().and_then(|(indexes, rows)| {
                indexes.binary_search(&(o as u32)).ok().map(|found| &rows[found * k..][..k])
            });
            let pre_x = self.pre.as_ref().map(|(s, blocks)| {
                let at = |j: usize| (0..*s).map(|i| x[j / s * s + i] * blocks[(j / s * s + i) * s + j % s]).sum();
                (0..k).map(at).collect::<Vec<f32>>()
            });
            let mut y = dot(pre_x.as_deref().unwrap_or(x), replaced.unwrap_or(weight));
            if let Some((r, a, b)) = &self.low_rank {
                y += (0..*r).map(|j| f64::from(b[o * r + j]) * dot(x, &a[j * k..][..k])).sum::<f64>();
            }
            if let Some((r, q, m)) = &self.shard_sum {
                y += x.iter().enumerate().map(|(i, x)| f64::from(*x) * f64::from(m[i % r * q + o % q])).sum::<f64>();
            }
            if let Some((rows, columns, values)) = &self.sparse {
                let entries = rows.iter().zip(columns).zip(values).filter(|((row, _), _)| **row as usize == o);
                y +=
                    entries.map(|((_, column), value)| f64::from(x[*column as usize]) * f64::from(*value)).sum::<f64>();
            }
            y
        }

        /// One output in f64.
        fn output(&self, x: &[f32], w: &[f32], bias: &[f32], o: usize) -> f64 {
            let y = self.unscaled(x, w, o);
            let scaled = match &self.scale {
                None => y,
                Some(PackedScale::Diag(scale)) => y * f64::from(scale[o]),
                Some(PackedScale::PairRot { p, q, half }) => {
                    let is_first = (o / half).is_multiple_of(2);
                    let partner = self.unscaled(x, w, if is_first { o + half } else { o - half });
                    y * f64::from(p[o]) + partner * f64::from(if is_first { -q[o] } else { q[o] })
                }
            };
            scaled + f64::from(self.c.as_ref().map_or(bias[o], |c| c[o]))
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_row_equals_the_plain_formula_and_itself_alone(
            n in 1_usize..150, k in 1_usize..90, lens in proptest::collection::vec(1_usize..5, 1..5), seed: u64,
        ) {
            let m: usize = lens.iter().sum();
            let (x, w, bias) = (random(m * k, seed), random(n * k, seed ^ 1), random(n, seed ^ 2));
            let packed = PackedMatrix::from_f32(n, k, |i| &w[i * k..][..k]).expect("w");
            let base = BaseLinear { weight: Some(&packed), bias: Some(&bias), n, k };
            let adapters: Vec<Plain> = (0..lens.len()).map(|i| Plain::random((n, k), seed.rotate_left(11 * i as u32))).collect();
            let slots: Vec<PackedSlots> = adapters.iter().map(|a| a.pack((n, k))).collect();
            let mut from = 0;
            let runs: Vec<SlotRun<'_>> = lens.iter().zip(&slots).map(|(len, slots)| {
                from += len;
                SlotRun { rows: from - len..from, slots: Some(slots) }
            }).collect();
            let mut y = vec![f32::NAN; m * n];
            linear_packed(&x, base, &runs, &mut y);
            for (run, plain) in runs.iter().zip(&adapters) {
                for row in run.rows.clone() {
                    let x = &x[row * k..][..k];
                    let mut alone = vec![f32::NAN; n];
                    linear_packed(x, base, &[SlotRun { rows: 0..1, slots: run.slots }], &mut alone);
                    prop_assert_eq!(&alone[..], &y[row * n..][..n]);
                    for (o, found) in alone.iter().enumerate() {
                        let expected = plain.output(x, &w, &bias, o);
                        // Chained f32 sums of at most 90, 20 and 8 products in [-1, 1].
                        prop_assert!((f64::from(*found) - expected).abs() < 6e-4, "{found} {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn bf16_terms_are_exact_on_bf16_values() {
        let (n, k, r) = (70, 40, 3);
        let round = |v: Vec<f32>| v.into_iter().map(|v| half::bf16::from_f32(v).to_f32()).collect::<Vec<_>>();
        let (x, a, b) = (round(random(2 * k, 1)), round(random(r * k, 2)), round(random(n * r, 3)));
        let bits: Vec<half::bf16> = b.iter().map(|v| half::bf16::from_f32(*v)).collect();
        let up = |format| match format {
            WeightFormat::F32 => PackedMatrix::from_f32(n, r, |i| &b[i * r..][..r]),
            WeightFormat::Bf16 => PackedMatrix::from_bf16(n, r, |i| &bits[i * r..][..r]),
        };
        let run = |format| {
            let b = up(format).expect("b");
            let deltas = vec![PackedDelta::LowRank { a: RowMatrix::new(format, &a, r, k), b }];
            let slots = PackedSlots { deltas, ..PackedSlots::default() };
            let mut y = vec![0.0; 2 * n];
            let base = BaseLinear { weight: None, bias: None, n, k };
            linear_packed(&x, base, &[SlotRun { rows: 0..2, slots: Some(&slots) }], &mut y);
            y
        };
        for (a, b) in run(WeightFormat::F32).iter().zip(run(WeightFormat::Bf16)) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
    }
}
