//! Drives a model by hand: contexts, steps, greedy tokens. What the engine does, without the engine.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use patchbay::adapter::LoweredAdapter;
use patchbay::model::{
    AdapterSegment, AttentionSpan, Batch, DeviceAdapter, KvCache, Model, PrefixWrite, RopeLengthRule, VirtualRun,
};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Blocks of the test cache; enough for most tests.
const NUM_BLOCKS: usize = 128;
/// Odd, so that no length divides into blocks by accident.
const BLOCK_TOKENS: usize = 5;

/// A model and a cache whose blocks are handed out in random order.
pub(crate) struct Runner {
    pub(crate) model: Model,
    cache: KvCache,
    free: Vec<u32>,
}

/// One sequence of tokens and what of its context is cached. A context is the adapter's KV prefix, its virtual tokens,
/// then the tokens.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) tokens: Vec<u32>,
    prompt_len: usize,
    /// Entries of the KV prefix.
    prefix: usize,
    prefix_written: bool,
    /// Positions before the first token.
    leading: usize,
    /// First position that uses the adapter.
    active_from: usize,
    /// Positions that count as the prompt for RoPE scalings that depend on the length.
    rope_prompt_len: usize,
    /// Positions that are cached, the prefix included.
    cached: usize,
    blocks: Vec<u32>,
    /// Those of the bare base's context, where the adapter takes gates from it.
    base_blocks: Option<Vec<u32>>,
    /// The adapter on the model's device.
    adapter: Option<Arc<DeviceAdapter>>,
}

impl Runner {
    pub(crate) fn new(model: Model) -> Self {
        let dtype = model.info().dtype;
        Self::with_cache(model, NUM_BLOCKS, dtype)
    }

    /// With keys and values in `dtype`.
    pub(crate) fn with_kv(model: Model, dtype: DType) -> Self {
        Self::with_cache(model, NUM_BLOCKS, dtype)
    }

    /// With a cache of `num_blocks` blocks in `dtype`.
    pub(crate) fn with_cache(model: Model, num_blocks: usize, dtype: DType) -> Self {
        let cache = KvCache::new(model.info(), num_blocks, BLOCK_TOKENS, dtype).unwrap();
        let mut free: Vec<u32> = (0..num_blocks as u32).collect();
        free.shuffle(&mut ChaCha8Rng::seed_from_u64(7));
        Self { model, cache, free }
    }

    /// A context of which nothing is cached yet, with an adapter in host memory.
    pub(crate) fn context(&self, prompt: &[u32], adapter: Option<&LoweredAdapter>) -> Context {
        let prefix = adapter.map_or(0, LoweredAdapter::num_prefix_entries);
        let leading = adapter.map_or(0, LoweredAdapter::num_leading);
        let active_from = adapter.map_or(0, |adapter| active_from(prompt, &adapter.invocation_tokens));
        let base_blocks = adapter.and_then(|adapter| adapter.gates.as_ref()).map(|_| Vec::new());
        let adapter = adapter.map(|adapter| Arc::new(self.model.adapter_to_device(adapter).unwrap()));
        Context {
            tokens: prompt.to_vec(),
            prompt_len: prompt.len(),
            prefix,
            prefix_written: false,
            leading,
            active_from,
            rope_prompt_len: leading + prompt.len(),
            cached: prefix,
            blocks: Vec::new(),
            base_blocks,
            adapter,
        }
    }

    /// Runs the next `len` tokens of each context in one batch; returns the logits of all of them but the virtual ones,
    /// (tokens, vocab) each, on the CPU.
    pub(crate) fn step(&mut self, work: &mut [(&mut Context, usize)]) -> Vec<Tensor> {
        self.step_rows(work, || true).into_iter().map(|(logits, _)| logits).collect()
    }

    /// The same, but only the logits that `is_wanted` says in turn; and which those are, by token.
    pub(crate) fn step_rows(
        &mut self,
        work: &mut [(&mut Context, usize)],
        mut is_wanted: impl FnMut() -> bool,
    ) -> Vec<(Tensor, Vec<bool>)> {
        let mut batch = Batch::default();
        let mut rows = Vec::new();
        for (context, len) in work.iter_mut() {
            let first = batch.token_ids.len() + context.leading.saturating_sub(context.cached).min(*len);
            self.add(&mut batch, context, *len);
            let start = batch.logit_rows.len();
            let wanted: Vec<bool> = (first..batch.token_ids.len()).map(|_| is_wanted()).collect();
            batch.logit_rows.extend((first as u32..).zip(&wanted).filter(|(_, wanted)| **wanted).map(|(row, _)| row));
            rows.push((start, batch.logit_rows.len() - start, wanted));
        }
        if let Some(pass) = &mut batch.gate_pass {
            pass.segments.push(AdapterSegment::new(0, pass.token_ids.len(), None));
        }
        let logits = self.model.forward(&batch, &mut self.cache).unwrap().to_device(&candle_core::Device::Cpu).unwrap();
        rows.into_iter().map(|(start, len, wanted)| (logits.narrow(0, start, len).unwrap(), wanted)).collect()
    }

    /// Ends a context and takes its blocks back.
    pub(crate) fn free(&mut self, context: Context) {
        self.free.extend(context.blocks);
        self.free.extend(context.base_blocks.unwrap_or_default());
    }

    /// Logits of all of the prompt's tokens, fed in chunks of `chunk`.
    pub(crate) fn prompt_logits(&mut self, prompt: &[u32], adapter: Option<&LoweredAdapter>, chunk: usize) -> Tensor {
        let mut context = self.context(prompt, adapter);
        let mut pieces = Vec::new();
        while context.remaining() > 0 {
            let len = chunk.min(context.remaining());
            pieces.extend(self.step(&mut [(&mut context, len)]));
        }
        self.free(context);
        concatenated(pieces)
    }

    /// The `n` most likely next tokens of every prompt, all prompts in one batch.
    pub(crate) fn greedy(&mut self, prompts: &[(&[u32], Option<&LoweredAdapter>)], n: usize) -> Vec<Vec<u32>> {
        let mut contexts: Vec<Context> =
            prompts.iter().map(|(prompt, adapter)| self.context(prompt, *adapter)).collect();
        for _ in 0..n {
            let mut work: Vec<(&mut Context, usize)> = Vec::new();
            for context in &mut contexts {
                self.restart_if_frequencies_switch(context);
                let len = context.remaining();
                work.push((context, len));
            }
            let logits = self.step(&mut work);
            for (context, logits) in contexts.iter_mut().zip(logits) {
                let last = logits.get(logits.dim(0).unwrap() - 1).unwrap();
                context.tokens.push(last.argmax(0).unwrap().to_scalar().unwrap());
            }
        }
        let mut generated = Vec::new();
        for context in contexts {
            generated.push(context.tokens[context.prompt_len..].to_vec());
            self.free(context);
        }
        generated
    }

    /// Longrope has one set of frequencies for the whole context: when it grows past the threshold, what is cached was
    /// rotated with the other set. transformers recomputes the context then, and so must whoever drives the model.
    fn restart_if_frequencies_switch(&self, context: &mut Context) {
        let rule = self.model.info().rope_length_rule;
        let is_switch = matches!(rule, RopeLengthRule::Switch { .. });
        let len = context.leading + context.tokens.len();
        if is_switch && rule.regime(context.rope_prompt_len) != rule.regime(len) {
            context.rope_prompt_len = len;
            context.cached = context.prefix;
        }
    }

    fn add(&mut self, batch: &mut Batch, context: &mut Context, len: usize) {
        let start = batch.token_ids.len();
        let end = context.cached + len;
        let tables = std::iter::once(&mut context.blocks).chain(&mut context.base_blocks);
        for table in tables {
            while table.len() * BLOCK_TOKENS < end {
                table.push(self.free.pop().expect("the test cache is large enough"));
            }
        }
        context.add_span(batch, &context.blocks, len);
        if let Some(blocks) = &context.base_blocks {
            context.add_span(batch.gate_pass.get_or_insert_default(), blocks, len);
        }
        if let Some(adapter) = &context.adapter {
            if !std::mem::replace(&mut context.prefix_written, true) {
                let slots = (0..context.prefix).map(|position| slot(&context.blocks, position)).collect();
                batch.prefix_writes.push(PrefixWrite { first_entry: 0, slots, adapter: Arc::clone(adapter) });
            }
            let virtual_len = context.leading.saturating_sub(context.cached).min(len);
            if virtual_len > 0 {
                let (first_row, adapter) = (context.cached - context.prefix, Arc::clone(adapter));
                batch.virtual_runs.push(VirtualRun { start, len: virtual_len, first_row, adapter });
            }
        }
        let asleep = context.active_from.saturating_sub(context.cached).min(len);
        for (start, len, adapter) in [(start, asleep, None), (start + asleep, len - asleep, context.adapter.clone())] {
            if len > 0 {
                batch.segments.push(AdapterSegment::new(start, len, adapter));
            }
        }
        context.cached = end;
    }
}

impl Context {
    /// Tokens not run yet, virtual ones included.
    pub(crate) fn remaining(&self) -> usize {
        self.leading + self.tokens.len() - self.cached
    }

    /// The next `len` positions, in the context with these blocks.
    fn add_span(&self, batch: &mut Batch, blocks: &[u32], len: usize) {
        let (start, end) = (batch.token_ids.len(), self.cached + len);
        for position in self.cached..end {
            let token = position.checked_sub(self.leading).map_or(0, |idx| self.tokens[idx]);
            batch.token_ids.push(token);
            batch.positions.push(position as u32);
            batch.rope_lens.push(self.rope_prompt_len.max(position + 1) as u32);
            batch.slot_mapping.push(slot(blocks, position));
        }
        batch.spans.push(AttentionSpan { start, len, context_len: end, block_table: blocks.to_vec() });
    }
}

fn slot(blocks: &[u32], position: usize) -> u32 {
    blocks[position / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (position % BLOCK_TOKENS) as u32
}

/// Where the last occurrence of `invocation` in a prompt begins; 0 when there is nothing to wait for.
fn active_from(prompt: &[u32], invocation: &[u32]) -> usize {
    if invocation.is_empty() {
        return 0;
    }
    prompt.windows(invocation.len()).rposition(|window| window == invocation).unwrap_or(usize::MAX)
}

/// Rows one after the other; pieces may be empty, but not all of them.
pub(crate) fn concatenated(mut pieces: Vec<Tensor>) -> Tensor {
    pieces.retain(|piece| piece.elem_count() > 0);
    Tensor::cat(&pieces, 0).unwrap()
}

/// Largest absolute difference over the largest absolute value of `expected`.
pub(crate) fn relative_difference(found: &Tensor, expected: &Tensor) -> f32 {
    let scalar = |tensor: Tensor| tensor.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert_eq!(found.dims(), expected.dims());
    scalar((found - expected).unwrap()) / scalar(expected.clone())
}
