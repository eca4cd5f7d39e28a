//! Causal attention over a paged cache.

use candle_core::{D, DType, Device, Result, Tensor};

/// Elements of the score matrix computed at a time; bounds the memory that a long prefill takes (64 MiB in f32).
const SCORE_ELEMENTS_MAX: usize = 1 << 24;

/// One context's share of a step: which rows ask, and where the keys lie.
#[derive(Clone, Debug)]
pub(super) struct KvSpan {
    /// First query row.
    pub start: usize,
    /// Number of query rows, at least 1; they are the last `len` tokens of the context.
    pub len: usize,
    /// Tokens of the context.
    pub context_len: usize,
    /// The context's blocks in order, u32 on the cache's device.
    pub blocks: Tensor,
    /// Additive mask (len, visible keys) from [`causal_mask`] per sliding window in use; none where `len` is 1.
    pub masks: Vec<(Option<usize>, Tensor)>,
}

/// Sizes of the heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`, query head h reads head `h / (num_heads / num_kv_heads)`.
    pub num_kv_heads: usize,
    /// Length of one head's vectors.
    pub head_dim: usize,
    /// Factor on the scores before the softmax.
    pub scale: f64,
    /// A token sees itself and the `window - 1` tokens before it; `None` is all of them.
    pub window: Option<usize>,
}

/// First key position that any of the last `len` tokens of a context sees.
fn first_visible(context_len: usize, len: usize, window: Option<usize>) -> usize {
    match window {
        Some(window) => (context_len - len + 1).saturating_sub(window),
        None => 0,
    }
}

/// 0 where query row i (position `context_len - len + i`) sees a key and -inf elsewhere: (len, visible) in f32 on
/// `device`, the columns being the positions from the first key that any row sees to the end of the context.
///
/// # Errors
/// When the device fails.
pub(super) fn causal_mask(context_len: usize, len: usize, window: Option<usize>, device: &Device) -> Result<Tensor> {
    let first_key = first_visible(context_len, len, window);
    let first_query = context_len - len;
    let visible = context_len - first_key;
    let mut mask = vec![f32::NEG_INFINITY; len * visible];
    for row in 0..len {
        let query = first_query + row;
        let from = first_visible(query + 1, 1, window).max(first_key);
        mask[row * visible + (from - first_key)..=row * visible + (query - first_key)].fill(0.);
    }
    Tensor::from_vec(mask, (len, visible), device)
}

/// `softmax(scale * q k^T + mask) v` for every span over its own context.
///
/// `q` is (tokens, heads, head_dim); `k_cache` and `v_cache` are (blocks, block tokens, kv heads * head_dim), are read in
/// the format of `q` and already hold the step's own keys and values; the spans tile the tokens in order. Scores and
/// softmax are f32. The result is (tokens, heads * head_dim) in the format of `q`.
///
/// # Errors
/// When the shapes do not fit or the device fails.
pub(super) fn paged_attention(
    q: &Tensor,
    k_cache: &Tensor,
    v_cache: &Tensor,
    spans: &[KvSpan],
    shape: &AttentionShape,
) -> Result<Tensor> {
    let mut pieces = Vec::with_capacity(spans.len());
    for span in spans {
        let first_key = first_visible(span.context_len, span.len, shape.window);
        let k = gather(k_cache, span, first_key, shape)?.to_dtype(q.dtype())?; // [kv_heads, visible, head_dim]
        let v = gather(v_cache, span, first_key, shape)?.to_dtype(q.dtype())?;
        let mask =
            match span.len {
                1 => None,
                _ => Some(span.masks.iter().find(|(window, _)| *window == shape.window).map(|(_, mask)| mask).expect(
                    "a span of several tokens carries a mask for every window of the model, built with the span",
                )),
            };
        let rows_max = (SCORE_ELEMENTS_MAX / (shape.num_heads * k.dim(1)?)).max(1);
        for first_row in (0..span.len).step_by(rows_max) {
            let rows = rows_max.min(span.len - first_row);
            let q = q.narrow(0, span.start + first_row, rows)?;
            let mask = mask.map(|mask| mask.narrow(0, first_row, rows)).transpose()?;
            pieces.push(attend(&q, &k, &v, mask.as_ref(), shape)?);
        }
    }
    Tensor::cat(&pieces, 0)
}

/// The keys (or values) of a span from position `first_key` on, (kv heads, visible, head_dim).
fn gather(cache: &Tensor, span: &KvSpan, first_key: usize, shape: &AttentionShape) -> Result<Tensor> {
    let block_tokens = cache.dim(1)?;
    let first_block = first_key / block_tokens;
    let last_block = span.context_len.div_ceil(block_tokens);
    let blocks = span.blocks.narrow(0, first_block, last_block - first_block)?;
    cache
        .index_select(&blocks, 0)?
        .reshape(((last_block - first_block) * block_tokens, shape.num_kv_heads, shape.head_dim))?
        .narrow(0, first_key - first_block * block_tokens, span.context_len - first_key)?
        .transpose(0, 1)? // [kv_heads, visible, head_dim]
        .contiguous()
}

/// `softmax(scale * q k^T) v` where every row sees all keys: q (rows, heads, head_dim), k and v (kv heads, entries,
/// head_dim). The result is (rows, heads * head_dim) in the format of `q`.
///
/// # Errors
/// When the shapes do not fit or the device fails.
pub(super) fn attend_all(q: &Tensor, k: &Tensor, v: &Tensor, shape: &AttentionShape) -> Result<Tensor> {
    attend(q, k, v, None, shape)
}

fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, shape: &AttentionShape) -> Result<Tensor> {
    let rows = q.dim(0)?;
    let visible = k.dim(1)?;
    let group = shape.num_heads / shape.num_kv_heads;
    let q = q
        .transpose(0, 1)? // [heads, rows, head_dim]
        .contiguous()?
        .reshape((shape.num_kv_heads, group * rows, shape.head_dim))?;
    let scores = (q.matmul(&k.t()?)?.to_dtype(DType::F32)? * shape.scale)?; // [kv_heads, group * rows, visible]
    let mut scores = scores.reshape((shape.num_heads, rows, visible))?;
    if let Some(mask) = mask {
        scores = scores.broadcast_add(mask)?;
    }
    let weights = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(v.dtype())?.reshape((
        shape.num_kv_heads,
        group * rows,
        visible,
    ))?;
    weights
        .matmul(v)? // [kv_heads, group * rows, head_dim]
        .reshape((shape.num_heads, rows, shape.head_dim))?
        .transpose(0, 1)? // [rows, heads, head_dim]
        .contiguous()?
        .flatten_from(D::Minus2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mask_shows_the_past_within_the_window() {
        let x = f32::NEG_INFINITY;
        let check = |context_len, len, window, expected: Vec<Vec<f32>>| {
            let mask = causal_mask(context_len, len, window, &Device::Cpu).unwrap();
            assert_eq!(mask.to_vec2::<f32>().unwrap(), expected, "{context_len} {len} {window:?}");
        };
        check(3, 3, None, vec![vec![0., x, x], vec![0., 0., x], vec![0., 0., 0.]]);
        check(4, 2, None, vec![vec![0., 0., 0., x], vec![0., 0., 0., 0.]]);
        // Position 3 sees 2 and 3; position 4 sees 3 and 4; the columns begin at position 2.
        check(5, 2, Some(2), vec![vec![0., 0., x], vec![x, 0., 0.]]);
    }
}
