//! The decoder: embedding, layers, norm, head.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{DType, Result, Tensor};

use super::stream::{Sublayer, close};
use super::{Attention, Embedding, Heads, Linear, Mlp, RmsNorm, Rope};
use crate::kernels::PagedKv;
use crate::model::kv_cache::KvCache;
use crate::model::step::Step;
use crate::model::{AdapterSegment, Batch};

/// A decoder-only model with its output head; every supported family is one of these.
#[derive(Clone, Debug)]
pub(in crate::model) struct Decoder {
    /// The input embedding.
    pub(in crate::model) embed_tokens: Embedding,
    /// The layers in order, at least one.
    pub(in crate::model) layers: Vec<DecoderLayer>,
    /// The final norm.
    pub(in crate::model) norm: RmsNorm,
    /// The output head.
    pub(in crate::model) lm_head: Linear,
    /// The position encoding.
    pub(in crate::model) rope: Rope,
}

/// `x = x + attention(norm(x)); x = x + mlp(norm(x))`, or what an adapter has in place of the sums.
#[derive(Clone, Debug)]
pub(in crate::model) struct DecoderLayer {
    /// Before the attention.
    pub(in crate::model) input_layernorm: RmsNorm,
    /// The attention.
    pub(in crate::model) self_attn: Attention,
    /// Before the feed-forward block.
    pub(in crate::model) post_attention_layernorm: RmsNorm,
    /// The feed-forward block.
    pub(in crate::model) mlp: Mlp,
}

impl Decoder {
    /// Sizes of the heads, the same in all layers.
    pub(in crate::model) fn heads(&self) -> Heads {
        self.layers[0].self_attn.heads
    }

    /// Runs one step; see `Model::forward`.
    pub(in crate::model) fn forward(&self, batch: &Batch, cache: &KvCache) -> Result<Tensor> {
        let segments = self.with_gates(batch, cache)?;
        let (x, segments) = self.hidden(batch, &segments, cache, &batch.logit_rows)?;
        self.logits(&x, &segments)
    }

    /// The batch's segments, with the gates of tokens whose adapter has a gate network.
    fn with_gates<'a>(&self, batch: &'a Batch, cache: &KvCache) -> Result<Cow<'a, [AdapterSegment]>> {
        let Some(pass) = &batch.gate_pass else { return Ok(Cow::Borrowed(&batch.segments)) };
        let all: Vec<u32> = (0..pass.token_ids.len() as u32).collect();
        let (x, rows) = self.hidden(pass, &pass.segments, cache, &all)?;
        let x = self.norm.forward(&x, &rows)?; // [tokens of the pass, hidden]
        let mut segments = batch.segments.clone();
        let mut next = 0;
        for segment in &mut segments {
            if let Some(network) = segment.adapter.as_ref().and_then(|adapter| adapter.gates.as_ref()) {
                segment.gates = Some(Arc::new(network.of(&x.narrow(0, next, segment.len)?)?));
                next += segment.len;
            }
        }
        assert_eq!(next, pass.token_ids.len(), "the pass has the tokens that need gates");
        Ok(Cow::Owned(segments))
    }

    /// What leaves the last layer in `rows` (ascending), (rows, hidden), and the segments as they lie over those. Other
    /// tokens leave their keys and values in the last layer and go no further.
    fn hidden<'a>(
        &self,
        batch: &Batch,
        segments: &'a [AdapterSegment],
        cache: &KvCache,
        rows: &[u32],
    ) -> Result<(Tensor, Cow<'a, [AdapterSegment]>)> {
        assert_eq!(cache.layers.len(), self.layers.len(), "the cache was made for this model");
        let mut windows: Vec<Option<usize>> = self.layers.iter().map(|layer| layer.self_attn.window).collect();
        windows.sort_unstable();
        windows.dedup();
        let mut x = self.embed_tokens.forward(batch)?; // [tokens, hidden]
        let step = Step::new((batch, segments), (cache, x.dtype()), &self.rope, &windows)?;
        cache.write_prefixes(&batch.prefix_writes)?;
        let last = self.layers.len() - 1;
        for (number, (layer, cache)) in self.layers.iter().zip(&cache.layers).enumerate() {
            let attended = layer.attended(number, &x, &step, cache)?;
            if number == last && rows.len() < batch.token_ids.len() {
                return layer.finished_rows(number, (&x, &attended), segments, rows);
            }
            x = layer.finished(number, (&x, &attended), segments)?;
        }
        Ok((x, Cow::Borrowed(segments)))
    }

    /// Norm and head of `x` (rows, hidden) under `segments`: (rows, vocab) in f32.
    fn logits(&self, x: &Tensor, segments: &[AdapterSegment]) -> Result<Tensor> {
        if x.dim(0)? == 0 {
            let (vocab, _) = self.embed_tokens.table.dims()?;
            return Tensor::zeros((0, vocab), DType::F32, x.device());
        }
        let x = self.norm.forward(x, segments)?;
        self.lm_head.forward(&x, segments)?.to_dtype(DType::F32)
    }
}

impl DecoderLayer {
    /// What the attention's output projection reads, (tokens, heads * head_dim), of the stream `x` (tokens, hidden).
    fn attended(&self, number: usize, x: &Tensor, step: &Step<'_>, cache: &PagedKv) -> Result<Tensor> {
        let normed = self.input_layernorm.forward(x, step.segments)?;
        self.self_attn.attend(number, &normed, step, cache)
    }

    /// The stream behind the layer, of the stream before it and what is [attended](DecoderLayer::attended): row by row.
    fn finished(
        &self,
        number: usize,
        (x, attended): (&Tensor, &Tensor),
        segments: &[AdapterSegment],
    ) -> Result<Tensor> {
        let x = close(x, (&self.self_attn.o_proj, attended), (number, Sublayer::Attention), segments)?;
        let normed = self.post_attention_layernorm.forward(&x, segments)?;
        let gated = self.mlp.gated(&normed, segments)?;
        close(&x, (&self.mlp.down_proj, &gated), (number, Sublayer::Mlp), segments)
    }

    /// The same of some of the rows (ascending), and the segments as they lie over them.
    fn finished_rows<'a>(
        &self,
        number: usize,
        (x, attended): (&Tensor, &Tensor),
        segments: &[AdapterSegment],
        rows: &[u32],
    ) -> Result<(Tensor, Cow<'a, [AdapterSegment]>)> {
        if rows.is_empty() {
            return Ok((x.narrow(0, 0, 0)?, Cow::Owned(Vec::new())));
        }
        let segments = row_segments(segments, rows)?;
        let rows = Tensor::new(rows, x.device())?;
        let (x, attended) = (x.index_select(&rows, 0)?, attended.index_select(&rows, 0)?);
        Ok((self.finished(number, (&x, &attended), &segments)?, Cow::Owned(segments)))
    }
}

/// The segments as they lie over the selected rows (ascending).
fn row_segments(segments: &[AdapterSegment], rows: &[u32]) -> Result<Vec<AdapterSegment>> {
    let mut selected = Vec::with_capacity(segments.len());
    let mut start = 0;
    for segment in segments {
        let end = rows.partition_point(|row| (*row as usize) < segment.start + segment.len);
        if end > start {
            let mut of_rows = AdapterSegment::new(start, end - start, segment.adapter.clone());
            if let Some(gates) = &segment.gates {
                let tokens: Vec<u32> = rows[start..end].iter().map(|row| row - segment.start as u32).collect();
                of_rows.gates = Some(Arc::new(gates.select(&tokens)?));
            }
            selected.push(of_rows);
        }
        start = end;
    }
    Ok(selected)
}
