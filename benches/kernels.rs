//! The CPU's kernels on the shapes of a model of 0.5 B parameters (hidden 896, intermediate 4864, 14 query and 2 key heads
//! of 64, vocabulary 32,768), each beside the limits of the machine; `docs/performance.md` says how to read it.
//!
//! Operands rotate over so many copies that no cache holds them, as the layers of a model do.

#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::cell::Cell;
use std::hint::black_box;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor};
use criterion::Criterion;
use half::bf16;
use patchbay::kernels::cpu::{
    BaseMatrix, IntegerMatrix, IntegerWidth, Isa, PackedDelta, PackedMatrix, PackedSlots, RowMatrix, SlotRun,
    SweepLinear, WeightFormat, dot_rate, integer_rate, join_op, read_bandwidth,
};
use patchbay::kernels::{AttentionPlan, AttentionShape, KvLayout, PagedKv, PagedSpan};

/// Name, outputs and inputs of the linears.
const LINEARS: [(&str, usize, usize); 4] =
    [("q_proj", 896, 896), ("gate_proj", 4864, 896), ("down_proj", 896, 4864), ("lm_head", 32_768, 896)];
const ROWS: [usize; 4] = [1, 8, 32, 512];
/// Linear and rows that adapters are measured on, and how many of them share the rows.
const ADAPTED: [(usize, usize); 4] = [(1, 16), (2, 16), (1, 512), (2, 512)];
const ADAPTERS: [usize; 3] = [0, 1, 16];
const RANK: usize = 16;
const HEADS: AttentionShape =
    AttentionShape { num_heads: 14, num_kv_heads: 2, head_dim: 64, scale: 0.125, window: None };
const BLOCK_TOKENS: usize = 16;
/// Tokens of one prompt.
const PREFILL: [usize; 3] = [128, 512, 1024];
/// Sequences and the tokens that each has already.
const DECODE: [(usize, usize); 4] = [(1, 192), (1, 1024), (16, 192), (16, 1024)];
/// Layers whose caches attention rotates over.
const LAYERS: usize = 24;
/// Bytes that operands rotate over, at least.
const ROTATION_BYTES: usize = 256 << 20;

/// Bytes per second from memory, and operations per second in cache of every [`Arithmetic`].
static LIMITS: LazyLock<(f64, [f64; 4])> = LazyLock::new(|| {
    let floats = [dot_rate(WeightFormat::Bf16), dot_rate(WeightFormat::F32)];
    let integers = [integer_rate(IntegerWidth::Sixteen), integer_rate(IntegerWidth::Eight)];
    (read_bandwidth(), [floats[0], floats[1], integers[0], integers[1]])
});

/// What a kernel multiplies.
#[derive(Clone, Copy, Debug)]
enum Arithmetic {
    Bf16,
    F32,
    Int16,
    Int8,
}

fn main() -> Result<()> {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let (memory, [bf16_rate, f32_rate, int16_rate, int8_rate]) = *LIMITS;
    println!(
        "limits: {:.1} GB/s, bf16 {:.0} GFLOP/s, f32 {:.0} GFLOP/s, int16 {:.0} GOP/s, int8 {:.0} GOP/s ({:?}, {} threads)\n",
        memory / 1e9,
        bf16_rate / 1e9,
        f32_rate / 1e9,
        int16_rate / 1e9,
        int8_rate / 1e9,
        Isa::best(),
        rayon::current_num_threads()
    );
    for (linear, n, k) in LINEARS {
        for (name, arithmetic) in
            [("linear", Arithmetic::Bf16), ("int16", Arithmetic::Int16), ("int8", Arithmetic::Int8)]
        {
            let layers = layers((n, k), 0, arithmetic);
            for rows in ROWS {
                bench_linear(&mut criterion, &format!("{name}/{linear}/{rows} rows"), &layers, rows, arithmetic)?;
            }
        }
    }
    for (linear, rows) in ADAPTED {
        let (name, n, k) = LINEARS[linear];
        for adapters in ADAPTERS {
            let layers = layers((n, k), adapters, Arithmetic::Bf16);
            let name = format!("adapters/{name}/{rows} rows/{adapters}");
            bench_linear(&mut criterion, &name, &layers, rows, Arithmetic::Bf16)?;
        }
    }
    for (dtype, format) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        for tokens in PREFILL {
            let name = format!("attention/{format}/prefill/{tokens} tokens");
            bench_attention(&mut criterion, &name, dtype, (1, tokens, tokens))?;
        }
        for (sequences, context) in DECODE {
            let name = format!("attention/{format}/decode/{sequences} of {context}");
            bench_attention(&mut criterion, &name, dtype, (sequences, 1, context))?;
        }
    }
    criterion.final_summary();
    Ok(())
}

/// What one call of a kernel reads and computes.
struct Work {
    bytes: usize,
    operations: usize,
    arithmetic: Arithmetic,
}

/// Runs `call` with 0, 1, ... and prints the best time with what it means.
fn bench(criterion: &mut Criterion, name: &str, work: &Work, mut call: impl FnMut(usize)) {
    let best = Cell::new(f64::INFINITY);
    let mut calls = 0;
    criterion.bench_function(name, |bencher| {
        bencher.iter_custom(|iterations| {
            let start = Instant::now();
            for _ in 0..iterations {
                call(calls);
                calls += 1;
            }
            let elapsed = start.elapsed();
            best.set(best.get().min(elapsed.as_secs_f64() / iterations as f64));
            elapsed
        });
    });
    // Not run when a filter on the command line leaves it out.
    if best.get().is_infinite() {
        return;
    }
    let (memory, rates) = *LIMITS;
    let limit = rates[work.arithmetic as usize];
    let (read, done) = (work.bytes as f64 / best.get(), work.operations as f64 / best.get());
    println!(
        "{name:38} best {:10.1} us  {:7.1} GB/s ({:3.0} % of memory)  {:7.1} GFLOP/s ({:3.0} % of {:?})\n",
        best.get() * 1e6,
        read / 1e9,
        100.0 * read / memory,
        done / 1e9,
        100.0 * done / limit,
        work.arithmetic
    );
}

/// A linear of one layer with its adapters.
struct Layer {
    weight: Base,
    adapters: Vec<PackedSlots>,
}

enum Base {
    Float(PackedMatrix),
    Integers(IntegerMatrix),
}

impl Base {
    fn matrix(&self) -> BaseMatrix<'_> {
        match self {
            Self::Float(w) => w.into(),
            Self::Integers(w) => w.into(),
        }
    }
}

/// So many layers of a linear (n, k) with `adapters` adapters each that no cache holds them.
fn layers((n, k): (usize, usize), adapters: usize, arithmetic: Arithmetic) -> Vec<Layer> {
    let values = values(n.max(RANK) * k.max(RANK));
    let bits: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
    let packed = |n: usize, k: usize| PackedMatrix::from_bf16(n, k, |row| &bits[row * k..][..k]).expect("memory");
    let adapter = || {
        let a = RowMatrix::new(WeightFormat::Bf16, &values[..RANK * k], RANK, k);
        PackedSlots { deltas: vec![PackedDelta::LowRank { a, b: packed(n, RANK) }], ..PackedSlots::default() }
    };
    let base = || match arithmetic {
        Arithmetic::Bf16 | Arithmetic::F32 => Base::Float(packed(n, k)),
        Arithmetic::Int16 | Arithmetic::Int8 => {
            let width = if let Arithmetic::Int8 = arithmetic { IntegerWidth::Eight } else { IntegerWidth::Sixteen };
            let read = |row: usize, out: &mut [f32]| out.copy_from_slice(&values[row * k..][..k]);
            Base::Integers(IntegerMatrix::new(width, WeightFormat::Bf16, (n, k), read).expect("memory"))
        }
    };
    let layer = || Layer { weight: base(), adapters: (0..adapters).map(|_| adapter()).collect() };
    let first = layer();
    let count = ROTATION_BYTES.div_ceil(base_bytes(&first.weight));
    std::iter::once(first).chain((1..count).map(|_| layer())).collect()
}

fn base_bytes(base: &Base) -> usize {
    match base {
        Base::Float(w) => w.n() * w.k() * size_of::<bf16>(),
        Base::Integers(w) => w.bytes(),
    }
}

/// `rows` rows through a linear, divided evenly among its adapters.
fn bench_linear(
    criterion: &mut Criterion,
    name: &str,
    layers: &[Layer],
    rows: usize,
    arithmetic: Arithmetic,
) -> Result<()> {
    let (base, adapters) = (layers[0].weight.matrix(), layers[0].adapters.len());
    let (n, k) = (base.n(), base.k());
    let x = Tensor::from_vec(values(rows * k), (rows, k), &Device::Cpu)?;
    let low_rank = RANK * (n + k);
    let work = Work {
        bytes: base_bytes(&layers[0].weight) + adapters * low_rank * size_of::<bf16>(),
        operations: 2 * rows * (n * k + if adapters > 0 { low_rank } else { 0 }),
        arithmetic,
    };
    bench(criterion, name, &work, |call| {
        let layer = &layers[call % layers.len()];
        let slots: Vec<Option<&PackedSlots>> =
            if adapters == 0 { vec![None] } else { layer.adapters.iter().map(Some).collect() };
        let rows_each = rows / slots.len();
        let runs: Vec<SlotRun<'_>> = slots
            .into_iter()
            .enumerate()
            .map(|(idx, slots)| SlotRun { rows: idx * rows_each..(idx + 1) * rows_each, slots, gates: None })
            .collect();
        let linear = SweepLinear { weight: layer.weight.matrix(), bias: None, runs };
        black_box(join_op(&x, &[linear]).expect("the shapes fit"));
    });
    Ok(())
}

/// `sequences` sequences with `tokens` query tokens each at the end of a context of `context` tokens, keys and values in
/// `dtype`.
fn bench_attention(
    criterion: &mut Criterion,
    name: &str,
    dtype: DType,
    (sequences, tokens, context): (usize, usize, usize),
) -> Result<()> {
    let AttentionShape { num_heads, num_kv_heads, head_dim, .. } = HEADS;
    let blocks_each = context.div_ceil(BLOCK_TOKENS);
    let width = num_kv_heads * head_dim;
    let tables: Vec<Vec<u32>> =
        (0..sequences).map(|s| (s * blocks_each..(s + 1) * blocks_each).map(|block| block as u32).collect()).collect();
    let slots: Vec<u32> = (0..(sequences * blocks_each * BLOCK_TOKENS) as u32).collect();
    let fill = values(slots.len() * width);
    let fill = Tensor::from_vec(fill, (slots.len(), width), &Device::Cpu)?;
    let everything = AttentionPlan::new(KvLayout::Heads, &slots, &[], &[], (width, &Device::Cpu))?;
    let caches: Vec<PagedKv> = (0..LAYERS)
        .map(|_| {
            let (size, heads) = ((sequences * blocks_each, BLOCK_TOKENS), (num_kv_heads, head_dim));
            let cache = PagedKv::new(KvLayout::Heads, size, heads, dtype, &Device::Cpu)?;
            cache.write(&everything, &fill, &fill, &HEADS)?;
            Ok(cache)
        })
        .collect::<Result<_>>()?;
    let span = |(s, table)| PagedSpan { start: s * tokens, len: tokens, context_len: context, block_table: table };
    let spans: Vec<PagedSpan<'_>> = tables.iter().map(Vec::as_slice).enumerate().map(span).collect();
    let plan = AttentionPlan::new(KvLayout::Heads, &slots, &spans, &[None], (width, &Device::Cpu))?;
    let q = values(sequences * tokens * num_heads * head_dim);
    let q = Tensor::from_vec(q, (sequences * tokens, num_heads * head_dim), &Device::Cpu)?;
    let visible: usize = (context - tokens + 1..=context).sum();
    let work = Work {
        bytes: sequences * context * 2 * width * dtype.size_in_bytes(),
        operations: sequences * visible * 4 * num_heads * head_dim,
        arithmetic: Arithmetic::F32,
    };
    bench(criterion, name, &work, |call| {
        black_box(caches[call % LAYERS].attend(&q, &plan, &HEADS).expect("the shapes fit"));
    });
    Ok(())
}

/// `len` values in [-1, 1), always the same.
fn values(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}
