//! What all layers need to know of one step, prepared once.

use candle_core::{DType, Result};

use super::layers::{Rope, Rotation};

use super::{AdapterSegment, AttentionSpan, Batch, KvCache};
use crate::kernels::{AttentionPlan, PagedSpan};

/// One step on the device.
pub(super) struct Step<'a> {
    /// Runs of tokens that use one adapter.
    pub(super) segments: &'a [AdapterSegment],
    /// The tokens' rotation.
    pub(super) rope: Rotation,
    /// Where keys and values go, and which contexts attend.
    pub(super) attention: AttentionPlan<'a>,
}

impl<'a> Step<'a> {
    /// Prepares `batch`, with the gates in its `segments`, for a model with activations in `dtype`
    /// whose layers use `windows` (distinct sliding windows).
    pub(super) fn new(
        (batch, segments): (&'a Batch, &'a [AdapterSegment]),
        (cache, dtype): (&KvCache, DType),
        rope: &Rope,
        windows: &[Option<usize>],
    ) -> Result<Self> {
        check(batch, cache);
        let device = cache.device();
        let span = |span: &'a AttentionSpan| PagedSpan {
            start: span.start,
            len: span.len,
            context_len: span.context_len,
            block_table: &span.block_table,
        };
        let spans: Vec<PagedSpan<'_>> = batch.spans.iter().map(span).collect();
        let rows = (cache.width, device);
        Ok(Self {
            segments,
            rope: rope.rotation(&batch.positions, &batch.rope_lens, cache.layout(), (device, dtype))?,
            attention: AttentionPlan::new(cache.layout(), &batch.slot_mapping, &spans, windows, rows)?,
        })
    }
}

/// The batch is made by the engine: what does not hold here is a mistake of ours.
fn check(batch: &Batch, cache: &KvCache) {
    let tokens = batch.token_ids.len();
    assert!(tokens > 0, "a step has tokens");
    assert_eq!(batch.positions.len(), tokens, "one position per token");
    assert_eq!(batch.rope_lens.len(), tokens, "one rope length per token");
    assert_eq!(batch.slot_mapping.len(), tokens, "one slot per token");
    let mut next = 0;
    for span in &batch.spans {
        assert_eq!(span.start, next, "spans tile the tokens in order");
        assert!(span.len > 0 && span.len <= span.context_len, "a span is the end of its context");
        assert!(span.block_table.len() * cache.block_tokens >= span.context_len, "the block table covers the context");
        assert!(span.block_table.iter().all(|block| (*block as usize) < cache.num_blocks), "blocks lie in the cache");
        next += span.len;
    }
    assert_eq!(next, tokens, "spans cover the tokens");
    next = 0;
    for segment in &batch.segments {
        assert_eq!(segment.start, next, "segments tile the tokens in order");
        assert!(segment.len > 0, "a segment has tokens");
        next += segment.len;
    }
    assert_eq!(next, tokens, "segments cover the tokens");
    next = 0;
    for run in &batch.virtual_runs {
        assert!(run.start >= next && run.len > 0, "virtual runs ascend without overlap");
        let rows = run.adapter.tensors.num_virtual_tokens();
        assert!(run.first_row + run.len <= rows, "virtual tokens are the adapter's");
        next = run.start + run.len;
    }
    assert!(next <= tokens, "virtual runs lie among the tokens");
    let slots = cache.num_blocks * cache.block_tokens;
    for write in &batch.prefix_writes {
        let entries = write.adapter.tensors.num_prefix_entries();
        assert!(write.first_entry + write.slots.len() <= entries, "prefix entries are the adapter's");
        assert!(write.slots.iter().all(|slot| (*slot as usize) < slots), "slots lie in the cache");
    }
    assert!(batch.slot_mapping.iter().all(|slot| (*slot as usize) < slots), "slots lie in the cache");
    let needs_gates = |segment: &&AdapterSegment| segment.adapter.as_ref().is_some_and(|one| one.gates.is_some());
    let gated: usize = batch.segments.iter().filter(needs_gates).map(|segment| segment.len).sum();
    let passed = batch.gate_pass.as_ref().map_or(0, |pass| pass.token_ids.len());
    assert_eq!(passed, gated, "the gate pass has the tokens that need gates");
    assert!(batch.logit_rows.is_sorted(), "logit rows ascend");
    assert!(batch.logit_rows.last().is_none_or(|row| (*row as usize) < tokens), "logit rows are tokens");
}
