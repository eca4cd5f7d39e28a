//! Causal attention over a paged KV cache.
//!
//! A query row meets the keys in ascending order in tiles that start at fixed positions, with an online softmax between
//! tiles. Rows never mix, so a row's bits depend on nothing but its own query and context.

use std::cell::RefCell;
use std::ops::Range;

use super::dispatch::dispatch;
use super::exp::exp;
use super::isa::Isa;
use super::kv::{CacheView, KvElement, Rows};
use super::lanes::Lanes;
use super::pool::for_each;
use super::shared::Shared;
use super::tile::Fetch;
use super::words::LANES;
use crate::kernels::AttentionShape;

/// Positions per online-softmax tile.
const TILE: usize = 64;
/// Elements between the copied queries where heads are no longer: known to the compiler, and no power of two.
const QUERY_STRIDE: usize = 272;
/// Query rows (tokens times heads of a group) per task.
const TASK_ROWS: usize = 64;

/// One context's queries: `len` tokens from token `start` on, the last at position `context_len - 1`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QuerySpan<'a> {
    /// First token.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
    /// Positions of the context, these tokens included.
    pub context_len: usize,
    /// The context's cache blocks.
    pub block_table: &'a [u32],
}

/// `y = softmax(scale * q Kᵀ + mask) V` per head; rows of q and y are (heads, head_dim), those of y adjoin.
///
/// # Panics
/// When lengths do not fit or a block table is too short.
pub(super) fn paged_attention<T: KvElement>(
    q: Rows<'_>,
    cache: CacheView<'_, T>,
    spans: &[QuerySpan<'_>],
    shape: AttentionShape,
    y: &mut [f32],
) {
    let row = shape.num_heads * shape.head_dim;
    assert_eq!(shape.num_heads % shape.num_kv_heads, 0, "query heads divide into groups");
    let queries_per_task = (TASK_ROWS / (shape.num_heads / shape.num_kv_heads)).max(1);
    let (mut tasks, mut tokens) = (Vec::new(), 0);
    for span in spans {
        assert!(span.block_table.len() * cache.block_tokens >= span.context_len, "the block table covers the context");
        assert_eq!(span.start, tokens, "the spans tile the tokens");
        tokens += span.len;
        for first in (0..span.len).step_by(queries_per_task) {
            let queries = queries_per_task.min(span.len - first);
            for kv_head in 0..shape.num_kv_heads {
                tasks.push(Task { q, cache, span, first, queries, kv_head, shape });
            }
        }
    }
    assert_eq!(y.len(), tokens * row, "the spans tile the tokens");
    let y = Shared::new(y);
    for_each(tasks.len(), |i| {
        SCRATCH.with_borrow_mut(|scratch| {
            attend(Isa::best(), &tasks[i], tasks.get(i + 1), scratch);
            let Task { span, first, queries, kv_head, .. } = tasks[i];
            let heads = row / shape.num_kv_heads;
            for query in 0..queries {
                let from = (span.start + first + query) * row + kv_head * heads;
                #[expect(unsafe_code, reason = "tasks write disjoint parts of the output")]
                // SAFETY: a task has queries and heads of its own.
                let y = unsafe { y.part(from..from + heads) };
                y.copy_from_slice(&scratch.acc[query * heads..][..heads]);
            }
        });
    });
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Some queries of one span, one group of heads.
#[derive(Clone, Copy)]
struct Task<'a, T> {
    q: Rows<'a>,
    cache: CacheView<'a, T>,
    span: &'a QuerySpan<'a>,
    /// First query of the task within the span.
    first: usize,
    queries: usize,
    kv_head: usize,
    shape: AttentionShape,
}

impl<T> Task<'_, T> {
    /// Of its first query.
    fn first_position(&self) -> usize {
        self.span.context_len - self.span.len + self.first
    }

    /// Where the first tile begins that any of its queries sees.
    fn first_tile(&self) -> usize {
        self.shape.window.map_or(0, |w| (self.first_position() + 1).saturating_sub(w)) / TILE * TILE
    }

    /// The keys of a block.
    fn keys(&self, block: usize) -> &[T] {
        let len = self.shape.head_dim * self.cache.block_tokens;
        &self.cache.keys[(block * self.shape.num_kv_heads + self.kv_head) * len..][..len]
    }

    /// The values of a block.
    fn values(&self, block: usize) -> &[T] {
        let len = self.shape.head_dim * self.cache.block_tokens;
        &self.cache.values[(block * self.shape.num_kv_heads + self.kv_head) * len..][..len]
    }
}

/// Working memory of a task; rows are (query, head of the group).
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    scores: Vec<f32>,
    acc: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
}

dispatch! {
    /// Leaves the outputs in the scratch: rows (query, head of the group) of head_dim.
    fn attend<T: KvElement>(task: &Task<'_, T>, next: Option<&Task<'_, T>>, scratch: &mut Scratch) => lanes attend_body
}

#[inline(always)]
fn attend_body<L: Lanes, T: KvElement>(task: &Task<'_, T>, next: Option<&Task<'_, T>>, scratch: &mut Scratch) {
    if task.queries == 1 {
        attend_queries::<L, T, true>(task, next, scratch);
    } else {
        attend_queries::<L, T, false>(task, next, scratch);
    }
}

/// `ASK` asks for keys and values before they are read, which pays where a single query reads them once.
#[inline(always)]
fn attend_queries<L: Lanes, T: KvElement, const ASK: bool>(
    task: &Task<'_, T>,
    next: Option<&Task<'_, T>>,
    scratch: &mut Scratch,
) {
    let AttentionShape { num_heads, num_kv_heads, head_dim, .. } = task.shape;
    let group = num_heads / num_kv_heads;
    let queries = task.queries;
    let rows = queries * group;
    let first_position = task.first_position();
    load_queries(task, rows, group, scratch);
    let end = first_position + queries;
    for tile_start in (task.first_tile()..end).step_by(TILE) {
        let width = TILE.min(end - tile_start);
        score_tile::<L, T, ASK>(task, rows, tile_start, width, scratch);
        for row in 0..rows {
            let position = first_position + row / group;
            let low = task.shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
            let scores = &mut scratch.scores[row * TILE..][..TILE];
            mask(scores, low.saturating_sub(tile_start), (position + 1).saturating_sub(tile_start).min(width));
            let acc = &mut scratch.acc[row * head_dim..][..head_dim];
            online_softmax::<L>(scores, &mut scratch.max[row], &mut scratch.sum[row], acc);
        }
        let behind = tile_start + TILE;
        let ahead = if behind < end { Some((task, behind)) } else { next.map(|next| (next, next.first_tile())) };
        weigh_values::<L, T, ASK>(task, rows, tile_start, width, ahead, scratch);
    }
    for (acc, sum) in scratch.acc.chunks_exact_mut(head_dim).zip(&scratch.sum) {
        let inverse = 1.0 / sum;
        acc.iter_mut().for_each(|value| *value *= inverse);
    }
}

/// Elements between the copied queries.
fn query_stride(head_dim: usize) -> usize {
    QUERY_STRIDE.max(head_dim)
}

/// Copies the task's scaled queries together and resets the running softmax.
#[inline(always)]
fn load_queries<T: KvElement>(task: &Task<'_, T>, rows: usize, group: usize, scratch: &mut Scratch) {
    let AttentionShape { head_dim, scale, .. } = task.shape;
    let stride = query_stride(head_dim);
    scratch.q.resize(rows * stride, 0.0);
    for row in 0..rows {
        let token = task.span.start + task.first + row / group;
        let head = task.kv_head * group + row % group;
        let q = &task.q.values[token * task.q.stride + head * head_dim..][..head_dim];
        for (copy, value) in scratch.q[row * stride..].iter_mut().zip(q) {
            *copy = value * scale as f32;
        }
    }
    scratch.scores.resize(rows * TILE, 0.0);
    scratch.acc.clear();
    scratch.acc.resize(rows * head_dim, 0.0);
    scratch.max.clear();
    scratch.max.resize(rows, f32::NEG_INFINITY);
    scratch.sum.clear();
    scratch.sum.resize(rows, 0.0);
}

/// Positions of a tile that lie in one cache block: (offset in the tile, offset in the block, count, block).
#[inline(always)]
fn pieces<T: KvElement>(
    task: &Task<'_, T>,
    tile_start: usize,
    width: usize,
) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    let block_tokens = task.cache.block_tokens;
    let mut offset = 0;
    std::iter::from_fn(move || {
        if offset == width {
            return None;
        }
        let position = tile_start + offset;
        let in_block = position % block_tokens;
        let count = (block_tokens - in_block).min(width - offset);
        let block = task.span.block_table[position / block_tokens] as usize;
        offset += count;
        Some((offset - count, in_block, count, block))
    })
}

/// `scores[row, j] = q[row] . k[tile_start + j]`.
#[inline(always)]
fn score_tile<L: Lanes, T: KvElement, const ASK: bool>(
    task: &Task<'_, T>,
    rows: usize,
    tile_start: usize,
    width: usize,
    scratch: &mut Scratch,
) {
    let head_dim = task.shape.head_dim;
    let block_tokens = task.cache.block_tokens;
    for (offset, in_block, count, block) in pieces(task, tile_start, width) {
        let ahead = Fetch::of(&task.values(block)[in_block * head_dim..][..count * head_dim]);
        let keys = &task.keys(block)[in_block..];
        let a_stride = query_stride(head_dim);
        let product = Product { a: &scratch.q, a_stride, b: keys, b_stride: block_tokens, depth: head_dim, ahead };
        // Whole vectors: what lies behind the context is masked afterwards.
        let count = count.next_multiple_of(LANES).min(block_tokens - in_block).min(TILE - offset);
        for row in 0..rows {
            scratch.scores[row * TILE + offset..][..count].fill(0.0);
        }
        if a_stride == QUERY_STRIDE {
            accumulate::<QUERY_STRIDE, L, T, ASK>(&product, rows, count, &mut scratch.scores[offset..], TILE);
        } else {
            accumulate::<0, L, T, ASK>(&product, rows, count, &mut scratch.scores[offset..], TILE);
        }
    }
}

/// `acc[row] += sum_j p[row, j] * v[tile_start + j]`.
#[inline(always)]
fn weigh_values<L: Lanes, T: KvElement, const ASK: bool>(
    task: &Task<'_, T>,
    rows: usize,
    tile_start: usize,
    width: usize,
    ahead: Option<(&Task<'_, T>, usize)>,
    scratch: &mut Scratch,
) {
    let head_dim = task.shape.head_dim;
    let mut ahead = ahead.map(|(task, from)| (task, pieces(task, from, TILE.min(task.span.context_len - from))));
    for (offset, in_block, count, block) in pieces(task, tile_start, width) {
        let ahead =
            ahead.as_mut().and_then(|(task, pieces)| pieces.next().map(|(.., block)| Fetch::of(task.keys(block))));
        let values = &task.values(block)[in_block * head_dim..][..count * head_dim];
        let product = Product {
            a: &scratch.scores[offset..],
            a_stride: TILE,
            b: values,
            b_stride: head_dim,
            depth: count,
            ahead: ahead.unwrap_or(Fetch::NONE),
        };
        accumulate::<TILE, L, T, ASK>(&product, rows, head_dim, &mut scratch.acc, head_dim);
    }
}

/// Sets the scores of positions outside `low..high` (offsets in the tile) to minus infinity.
#[inline(always)]
fn mask(scores: &mut [f32], low: usize, high: usize) {
    let low = low.min(scores.len());
    scores[..low].fill(f32::NEG_INFINITY);
    let high = high.max(low);
    scores[high..].fill(f32::NEG_INFINITY);
}

/// Turns scores into weights relative to the running maximum and rescales what was summed before. A tile that is
/// masked throughout changes nothing.
#[inline(always)]
fn online_softmax<L: Lanes>(scores: &mut [f32], max: &mut f32, sum: &mut f32, acc: &mut [f32]) {
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in scores.chunks_exact(16) {
        for (lane, score) in lanes.iter_mut().zip(chunk) {
            *lane = lane.max(*score);
        }
    }
    let tile_max = lanes.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    if tile_max == f32::NEG_INFINITY {
        scores.fill(0.0);
        return;
    }
    let new_max = max.max(tile_max);
    let mut sums = [0.0_f32; 16];
    for chunk in scores.chunks_exact_mut(16) {
        for (sum, score) in sums.iter_mut().zip(chunk) {
            *score = weight::<L>(*score - new_max);
            *sum += *score;
        }
    }
    let rescale = weight::<L>(*max - new_max);
    *sum = *sum * rescale + sums.iter().sum::<f32>();
    *max = new_max;
    for value in acc {
        *value *= rescale;
    }
}

/// `e^x` in the arithmetic of the lanes.
#[inline(always)]
fn weight<L: Lanes>(x: f32) -> f32 {
    if L::FMA { exp::<true>(x) } else { exp::<false>(x) }
}

/// Operands of `out += a b`: a (rows, depth), b (depth, columns).
struct Product<'a, T> {
    a: &'a [f32],
    a_stride: usize,
    b: &'a [T],
    b_stride: usize,
    depth: usize,
    /// What is read next, asked for meanwhile, a line with each vector of `b`.
    ahead: Fetch,
}

/// `out[r, c] += sum_d a[r, d] * b[d, c]`, one chain over ascending `d` per output; as many rows together as the registers
/// hold. `A` is the stride of `a` where that is known, else 0.
#[inline(always)]
fn accumulate<const A: usize, L: Lanes, T: KvElement, const ASK: bool>(
    p: &Product<'_, T>,
    rows: usize,
    columns: usize,
    out: &mut [f32],
    stride: usize,
) {
    let mut column = 0;
    let mut ahead = p.ahead;
    // A single row would wait for its own sums where those are few, and 32 registers hold many.
    while (rows == 1 || L::WIDE) && columns - column >= 4 * LANES {
        blocks::<4, A, L, T, ASK>(p, (rows, 6), column, &mut ahead, (out, stride));
        column += 4 * LANES;
    }
    while columns - column >= LANES {
        // With more rows the compiler runs out of the 16 registers.
        let most = if L::WIDE { 8 } else { 4 };
        blocks::<1, A, L, T, ASK>(p, (rows, most), column, &mut ahead, (out, stride));
        column += LANES;
    }
    for row in 0..rows {
        for column in column..columns {
            let value = &mut out[row * stride + column];
            for d in 0..p.depth {
                let (a, b) = (p.a[row * p.a_stride + d], p.b[d * p.b_stride + column].widen());
                *value = if L::FMA { a.mul_add(b, *value) } else { a * b + *value };
            }
        }
    }
}

/// All `rows` of `V` vectors from `column` on, no more than `most` (up to 8) at a time, in even parts.
#[inline(always)]
fn blocks<const V: usize, const A: usize, L: Lanes, T: KvElement, const ASK: bool>(
    p: &Product<'_, T>,
    (rows, most): (usize, usize),
    column: usize,
    ahead: &mut Fetch,
    (out, stride): (&mut [f32], usize),
) {
    let together = rows.div_ceil(rows.div_ceil(most).max(1));
    let mut row = 0;
    while row < rows {
        match together.min(rows - row) {
            1 => block::<1, V, A, L, T, ASK>(p, (row, column), ahead, (out, stride)),
            2 => block::<2, V, A, L, T, ASK>(p, (row, column), ahead, (out, stride)),
            3 => block::<3, V, A, L, T, ASK>(p, (row, column), ahead, (out, stride)),
            4 => block::<4, V, A, L, T, ASK>(p, (row, column), ahead, (out, stride)),
            5 => block::<5, V, A, L, T, ASK>(p, (row, column), ahead, (out, stride)),
            6 => block::<6, V, A, L, T, ASK>(p, (row, column), ahead, (out, stride)),
            7 => block::<7, V, A, L, T, ASK>(p, (row, column), ahead, (out, stride)),
            _ => block::<8, V, A, L, T, ASK>(p, (row, column), ahead, (out, stride)),
        }
        row += together.min(rows - row);
    }
}

/// `R` rows of `V` vectors.
#[inline(always)]
fn block<const R: usize, const V: usize, const A: usize, L: Lanes, T: KvElement, const ASK: bool>(
    p: &Product<'_, T>,
    (row, column): (usize, usize),
    ahead: &mut Fetch,
    (out, stride): (&mut [f32], usize),
) {
    let a_stride = if A == 0 { p.a_stride } else { A };
    assert!(p.a.len() >= (row + R - 1) * a_stride + p.depth, "a has the rows");
    assert!(p.b.len() + p.b_stride >= p.depth * p.b_stride + column + V * LANES, "b has the columns");
    assert!(out.len() >= (row + R - 1) * stride + column + V * LANES, "the output has rows and columns");
    let (from, out) = ((&p.a[row * a_stride..], &p.b[column..]), out[row * stride + column..].as_mut_ptr());
    #[expect(unsafe_code, reason = "the innermost loop checks nothing")]
    // SAFETY: in bounds by the assertions above; the lanes are those of the instruction set that this is compiled for.
    unsafe {
        let mut sums: [[L; V]; R] =
            std::array::from_fn(|r| std::array::from_fn(|v| L::load(out.add(r * stride + v * LANES))));
        if ASK {
            // As many lines per vector of `b` as that has in f32.
            let asked = p.depth.min(ahead.lines.div_ceil(V));
            steps::<R, V, A, L, T>(p, from, 0..asked, ahead.take(asked * V), &mut sums);
            steps::<R, V, A, L, T>(p, from, asked..p.depth, Fetch::NONE, &mut sums);
        } else {
            steps::<R, V, A, L, T>(p, from, 0..p.depth, Fetch::NONE, &mut sums);
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                sum.store(out.add(r * stride + v * LANES));
            }
        }
    }
}

/// The steps `range` of a block's sums; asks for what is `ahead` meanwhile.
///
/// # Safety
/// `range` lies within the depth, for which `a` has `R` rows and `b` has `V` vectors; the processor has the instructions.
#[expect(unsafe_code, reason = "the innermost loop checks nothing")]
#[inline(always)]
unsafe fn steps<const R: usize, const V: usize, const A: usize, L: Lanes, T: KvElement>(
    p: &Product<'_, T>,
    (a, b): (&[f32], &[T]),
    range: Range<usize>,
    mut ahead: Fetch,
    sums: &mut [[L; V]; R],
) {
    let a_stride = if A == 0 { p.a_stride } else { A };
    let (a, b) = (a.as_ptr(), b.as_ptr());
    for d in range {
        ahead.next(V);
        // SAFETY: in bounds by the function's contract.
        unsafe {
            let b: [L; V] = std::array::from_fn(|v| T::lanes(b.add(d * p.b_stride + v * LANES)));
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = L::splat(*a.add(r * a_stride + d));
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = sum.add_product(a, b);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::super::kv::{write_keys, write_values};
    use super::*;
    use crate::kernels::cpu::testing::random;

    /// Softmax attention of one row in f64, from unpaged keys and values.
    fn reference(q: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>], scale: f32) -> Vec<f64> {
        let scores: Vec<f64> = keys
            .iter()
            .map(|k| f64::from(scale) * q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>())
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        (0..q.len()).map(|d| weights.iter().zip(values).map(|(w, v)| w * f64::from(v[d])).sum::<f64>() / sum).collect()
    }

    /// Keys and values in the cache, the block table, and the plain keys and values.
    type Cached<T> = (Vec<T>, Vec<T>, Vec<u32>, Vec<f32>, Vec<f32>);

    /// A context of `len` positions in shuffled blocks, and its cache.
    fn cache<T: KvElement>(shape: AttentionShape, block_tokens: usize, len: usize, seed: u64) -> Cached<T> {
        let blocks = len.div_ceil(block_tokens);
        let table: Vec<u32> = (0..blocks as u32).map(|b| (b * 7 + 3) % (blocks as u32 * 2)).collect();
        let table = if table.iter().collect::<std::collections::HashSet<_>>().len() == blocks {
            table
        } else {
            (0..blocks as u32).rev().collect()
        };
        let width = shape.num_kv_heads * shape.head_dim;
        let rounded = |seed| random(len * width, seed).into_iter().map(|value| T::narrow(value).widen()).collect();
        let (k, v): (Vec<f32>, Vec<f32>) = (rounded(seed), rounded(seed ^ 77));
        let size = 2 * blocks * block_tokens * width;
        let (mut keys, mut values) = (vec![T::narrow(f32::NAN); size], vec![T::narrow(f32::NAN); size]);
        let slots: Vec<u32> =
            (0..len).map(|p| table[p / block_tokens] * block_tokens as u32 + (p % block_tokens) as u32).collect();
        write_keys(Rows { values: &k, stride: width }, &slots, shape, block_tokens, &mut keys);
        write_values(Rows { values: &v, stride: width }, &slots, shape, block_tokens, &mut values);
        (keys, values, table, k, v)
    }

    fn run<T: KvElement>(
        q: &[f32],
        cache: CacheView<'_, T>,
        spans: &[QuerySpan<'_>],
        shape: AttentionShape,
    ) -> Vec<f32> {
        let mut y = vec![f32::NAN; q.len()];
        let q = Rows { values: q, stride: shape.num_heads * shape.head_dim };
        paged_attention(q, cache, spans, shape, &mut y);
        y
    }

    /// Panics where attention of the last `len` positions of a context differs from the reference over what the cache
    /// keeps.
    fn check_reference<T: KvElement>(
        shape: AttentionShape,
        block_tokens: usize,
        (context, len): (usize, usize),
        seed: u64,
    ) {
        let AttentionShape { num_heads, num_kv_heads, head_dim, window, .. } = shape;
        let (keys, values, table, k, v) = cache::<T>(shape, block_tokens, context, seed);
        let q = random(len * num_heads * head_dim, seed ^ 1);
        let view = CacheView { keys: &keys, values: &values, block_tokens };
        let span = QuerySpan { start: 0, len, context_len: context, block_table: &table };
        let y = run(&q, view, &[span], shape);
        for (row, (q, y)) in q.chunks(head_dim).zip(y.chunks(head_dim)).enumerate() {
            let (position, head) = (context - len + row / num_heads, row % num_heads);
            let low = window.map_or(0, |w| (position + 1).saturating_sub(w));
            let of = |all: &[f32], p: usize| {
                let from = (p * num_kv_heads + head / (num_heads / num_kv_heads)) * head_dim;
                all[from..from + head_dim].to_vec()
            };
            let (ks, vs): (Vec<_>, Vec<_>) = (low..=position).map(|p| (of(&k, p), of(&v, p))).unzip();
            let expected = reference(q, &ks, &vs, shape.scale as f32);
            for (found, expected) in y.iter().zip(expected) {
                assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} {expected}");
            }
        }
    }

    /// Panics where a position's query alone has other bits than in one span with all others.
    fn check_bits<T: KvElement>(shape: AttentionShape, context: usize, seed: u64) {
        let (keys, values, table, ..) = cache::<T>(shape, 16, context, seed);
        let row = shape.num_heads * shape.head_dim;
        let q = random(context * row, seed ^ 1);
        let view = CacheView { keys: &keys, values: &values, block_tokens: 16 };
        let span = QuerySpan { start: 0, len: context, context_len: context, block_table: &table };
        let together = run(&q, view, &[span], shape);
        for position in 0..context {
            let span = QuerySpan { start: 0, len: 1, context_len: position + 1, block_table: &table };
            let alone = run(&q[position * row..][..row], view, &[span], shape);
            assert_eq!(&alone[..], &together[position * row..][..row]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn attention_equals_the_plain_reference(
            kv_heads in 1_usize..3, group in 1_usize..8, head_dim in 1_usize..40, block_tokens in 1_usize..100,
            context in 1_usize..200, len in 1_usize..40, window in proptest::option::of(1_usize..90), seed: u64,
        ) {
            let shape =
                AttentionShape { num_heads: kv_heads * group, num_kv_heads: kv_heads, head_dim, scale: 0.7, window };
            check_reference::<f32>(shape, block_tokens, (context, len.min(context)), seed);
            check_reference::<bf16>(shape, block_tokens, (context, len.min(context)), seed);
        }

        #[test]
        fn a_query_has_the_same_bits_alone_and_in_any_chunk(
            group in 1_usize..8, head_dim in 1_usize..40, context in 2_usize..200,
            window in proptest::option::of(1_usize..90), seed: u64,
        ) {
            let shape = AttentionShape { num_heads: 2 * group, num_kv_heads: 2, head_dim, scale: 0.5, window };
            check_bits::<f32>(shape, context, seed);
            check_bits::<bf16>(shape, context, seed);
        }
    }
}
