//! A layer's paged keys and values in the layout of their device, and attention over them.

use candle_core::{DType, Device, Result, Tensor};

use super::attention::{AttentionShape, KvSpan, attend_all, causal_mask, paged_attention};
use super::cpu::{QuerySpan, attention_op, write_cache_op};
use super::kv::{slot_index, write_kv};

/// How keys and values lie in their blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvLayout {
    /// Keys and values (blocks, block tokens, kv heads * head_dim), for any device.
    Rows,
    /// Keys (blocks, kv heads, head_dim, block tokens) and values (blocks, kv heads, block tokens, head_dim) in f32 or
    /// bf16, for the CPU's kernels.
    Heads,
}

/// Keys and values of one layer.
#[derive(Clone, Debug)]
pub struct PagedKv {
    keys: Tensor,
    values: Tensor,
    layout: KvLayout,
    block_tokens: usize,
}

/// One context's share of a step.
#[derive(Clone, Copy, Debug)]
pub struct PagedSpan<'a> {
    /// First query row.
    pub start: usize,
    /// Number of query rows, at least 1; they are the last `len` tokens of the context.
    pub len: usize,
    /// Tokens of the context.
    pub context_len: usize,
    /// The context's blocks in order.
    pub block_table: &'a [u32],
}

/// Where a step's keys and values go and which contexts attend: made once per step, used by every layer.
#[derive(Debug)]
pub struct AttentionPlan<'a>(Plan<'a>);

#[derive(Debug)]
enum Plan<'a> {
    Rows { slots: Tensor, spans: Vec<KvSpan> },
    Heads { slots: &'a [u32], spans: Vec<QuerySpan<'a>> },
}

impl<'a> AttentionPlan<'a> {
    /// Plans a step of `slots.len()` tokens over caches of `layout` with rows of `width` (kv heads * head_dim) elements,
    /// for layers whose sliding windows are `windows`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(
        layout: KvLayout,
        slots: &'a [u32],
        spans: &[PagedSpan<'a>],
        windows: &[Option<usize>],
        (width, device): (usize, &Device),
    ) -> Result<Self> {
        Ok(Self(match layout {
            KvLayout::Heads => Plan::Heads { slots, spans: spans.iter().map(query_span).collect() },
            KvLayout::Rows => Plan::Rows {
                slots: slot_index(slots, width, device)?,
                spans: spans.iter().map(|span| kv_span(span, windows, device)).collect::<Result<_>>()?,
            },
        }))
    }
}

fn query_span<'a>(span: &PagedSpan<'a>) -> QuerySpan<'a> {
    let PagedSpan { start, len, context_len, block_table } = *span;
    QuerySpan { start, len, context_len, block_table }
}

fn kv_span(span: &PagedSpan<'_>, windows: &[Option<usize>], device: &Device) -> Result<KvSpan> {
    let mut masks = Vec::new();
    if span.len > 1 {
        for window in windows {
            masks.push((*window, causal_mask(span.context_len, span.len, *window, device)?));
        }
    }
    Ok(KvSpan {
        start: span.start,
        len: span.len,
        context_len: span.context_len,
        blocks: Tensor::new(span.block_table, device)?,
        masks,
    })
}

impl PagedKv {
    /// Takes the memory for `num_blocks` blocks of `block_tokens` tokens, all zeros.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(
        layout: KvLayout,
        (num_blocks, block_tokens): (usize, usize),
        (num_kv_heads, head_dim): (usize, usize),
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let (keys, values) = match layout {
            KvLayout::Rows => {
                let shape = vec![num_blocks, block_tokens, num_kv_heads * head_dim];
                (shape.clone(), shape)
            }
            KvLayout::Heads => (
                vec![num_blocks, num_kv_heads, head_dim, block_tokens],
                vec![num_blocks, num_kv_heads, block_tokens, head_dim],
            ),
        };
        Ok(Self {
            keys: Tensor::zeros(keys, dtype, device)?,
            values: Tensor::zeros(values, dtype, device)?,
            layout,
            block_tokens,
        })
    }

    /// How this cache is laid out.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        self.keys.device()
    }

    /// Format of keys and values.
    pub fn dtype(&self) -> DType {
        self.keys.dtype()
    }

    /// Writes the step's keys and values (tokens, kv heads * head_dim) in place at the plan's slots, rounded to the cache's
    /// format.
    ///
    /// # Errors
    /// When shapes do not fit or the device fails.
    pub fn write(&self, plan: &AttentionPlan<'_>, k: &Tensor, v: &Tensor, shape: &AttentionShape) -> Result<()> {
        match &plan.0 {
            Plan::Rows { slots, .. } => {
                write_kv(&self.keys.flatten_to(1)?, slots, &k.to_dtype(self.dtype())?)?;
                write_kv(&self.values.flatten_to(1)?, slots, &v.to_dtype(self.dtype())?)
            }
            Plan::Heads { slots, .. } => {
                write_cache_op((k, v), (&self.keys, &self.values), self.block_tokens, slots, *shape)
            }
        }
    }

    /// Writes rows of keys and values (rows, kv heads * head_dim) in place at `slots`, one each.
    ///
    /// # Errors
    /// When shapes do not fit or the device fails.
    pub fn write_slots(
        &self,
        slots: &[u32],
        (k, v): (&Tensor, &Tensor),
        (num_kv_heads, head_dim): (usize, usize),
    ) -> Result<()> {
        // Only the kv heads matter where nobody asks.
        let shape = AttentionShape { num_heads: num_kv_heads, num_kv_heads, head_dim, scale: 1., window: None };
        let plan = AttentionPlan::new(self.layout, slots, &[], &[], (num_kv_heads * head_dim, self.device()))?;
        self.write(&plan, k, v, &shape)
    }

    /// A cache that holds only these keys and values (entries, kv heads * head_dim), all in one block.
    ///
    /// # Errors
    /// When shapes do not fit or the device fails.
    pub fn of_entries(
        layout: KvLayout,
        (k, v): (&Tensor, &Tensor),
        (num_kv_heads, head_dim): (usize, usize),
    ) -> Result<Self> {
        let entries = k.dim(0)?;
        let cache = Self::new(layout, (1, entries), (num_kv_heads, head_dim), k.dtype(), k.device())?;
        let slots: Vec<u32> = (0..entries as u32).collect();
        cache.write_slots(&slots, (k, v), (num_kv_heads, head_dim))?;
        Ok(cache)
    }

    /// `softmax(scale * q k^T) v` over all entries of [`PagedKv::of_entries`], which every row sees; q: (rows, heads *
    /// head_dim), the result (rows, heads * head_dim) in the format of `q`. No window applies.
    ///
    /// # Errors
    /// When shapes do not fit or the device fails.
    pub fn attend_entries(&self, q: &Tensor, shape: &AttentionShape) -> Result<Tensor> {
        let AttentionShape { num_heads, num_kv_heads, head_dim, .. } = *shape;
        let shape = AttentionShape { window: None, ..*shape };
        let rows = q.dim(0)?;
        match self.layout {
            KvLayout::Rows => {
                let heads = |cache: &Tensor| {
                    let entries = cache.reshape((self.block_tokens, num_kv_heads, head_dim))?;
                    entries.transpose(0, 1)?.contiguous()
                };
                let q = q.contiguous()?.reshape((rows, num_heads, head_dim))?;
                attend_all(&q, &heads(&self.keys)?, &heads(&self.values)?, &shape)
            }
            KvLayout::Heads => {
                // Each row is the last of a context of its own, which is the block.
                let span = |start| QuerySpan { start, len: 1, context_len: self.block_tokens, block_table: &[0] };
                let spans: Vec<QuerySpan<'_>> = (0..rows).map(span).collect();
                attention_op(q, (&self.keys, &self.values), self.block_tokens, &spans, shape)
            }
        }
    }

    /// `softmax(scale * q k^T + mask) v` of every span of the plan over its own context, which already holds the step's
    /// own keys and values; q: (tokens, heads * head_dim), the result (tokens, heads * head_dim) in the format of `q`.
    ///
    /// # Errors
    /// When shapes do not fit or the device fails.
    pub fn attend(&self, q: &Tensor, plan: &AttentionPlan<'_>, shape: &AttentionShape) -> Result<Tensor> {
        match &plan.0 {
            Plan::Rows { spans, .. } => {
                let q = q.contiguous()?.reshape((q.dim(0)?, shape.num_heads, shape.head_dim))?;
                paged_attention(&q, &self.keys, &self.values, spans, shape)
            }
            Plan::Heads { spans, .. } => attention_op(q, (&self.keys, &self.values), self.block_tokens, spans, *shape),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::cpu::testing::random;
    use super::*;

    /// The formula, number by number: (rows, heads * head_dim).
    fn by_hand(q: &[f32], k: &[f32], v: &[f32], shape: &AttentionShape) -> Vec<f32> {
        let AttentionShape { num_heads, num_kv_heads, head_dim, scale, .. } = *shape;
        let mut y = Vec::with_capacity(q.len());
        for (at, q) in q.chunks_exact(head_dim).enumerate() {
            let kv_head = at % num_heads / (num_heads / num_kv_heads);
            let head = |m: &[f32], entry: usize| m[(entry * num_kv_heads + kv_head) * head_dim..][..head_dim].to_vec();
            let entries = k.len() / (num_kv_heads * head_dim);
            let dot = |entry| head(k, entry).iter().zip(q).map(|(k, q)| k * q).sum::<f32>() * scale as f32;
            let weights: Vec<f32> = (0..entries).map(|entry| dot(entry).exp()).collect();
            let sum: f32 = weights.iter().sum();
            let at = |column: usize| (0..entries).map(|e| weights[e] / sum * head(v, e)[column]).sum::<f32>();
            y.extend((0..head_dim).map(at));
        }
        y
    }

    #[test]
    fn entries_beside_a_context_are_seen_by_every_row_in_both_layouts() {
        let shape = AttentionShape { num_heads: 6, num_kv_heads: 2, head_dim: 8, scale: 0.3, window: Some(1) };
        let tensor = |seed, rows: usize, heads: usize| {
            Tensor::from_vec(random(rows * heads * 8, seed), (rows, heads * 8), &Device::Cpu).unwrap()
        };
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (rows, entries) in [(1, 1), (5, 3), (9, 70)] {
            let (q, k, v) = (tensor(1, rows, 6), tensor(2, entries, 2), tensor(3, entries, 2));
            let expected = by_hand(&values(&q), &values(&k), &values(&v), &shape);
            let attend = |layout, q: &Tensor| {
                let cache = PagedKv::of_entries(layout, (&k, &v), (2, 8)).unwrap();
                values(&cache.attend_entries(q, &shape).unwrap())
            };
            for layout in [KvLayout::Rows, KvLayout::Heads] {
                for (found, expected) in attend(layout, &q).iter().zip(&expected) {
                    assert!((found - expected).abs() < 1e-5, "{layout:?} {rows} {entries}: {found} {expected}");
                }
            }
            let together = attend(KvLayout::Heads, &q);
            let alone: Vec<f32> =
                (0..rows).flat_map(|row| attend(KvLayout::Heads, &q.narrow(0, row, 1).unwrap())).collect();
            assert_eq!(together, alone);
        }
    }
}
