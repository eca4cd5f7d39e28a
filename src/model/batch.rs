//! The flat input of one step.

use std::sync::Arc;

use super::DeviceAdapter;
use super::gates::TokenGates;

/// One step's tokens, flat: all spans laid end to end. A prefill is a span of n tokens, a decode a span of one.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids, (tokens). Those of virtual tokens mean nothing.
    pub token_ids: Vec<u32>,
    /// Position of each token in its context, counted from 0, (tokens).
    pub positions: Vec<u32>,
    /// Context length that a length-dependent RoPE scaling sees for each token, (tokens):
    /// `max(prompt length, position + 1)`. Other scalings ignore it.
    pub rope_lens: Vec<u32>,
    /// KV slot each token's key and value are written to, (tokens): `block * block_size + offset`.
    pub slot_mapping: Vec<u32>,
    /// Runs of tokens that belong to one context; they tile the tokens in order.
    pub spans: Vec<AttentionSpan>,
    /// Runs of tokens that use one adapter; they tile the tokens in order.
    pub segments: Vec<AdapterSegment>,
    /// Runs of tokens that are virtual: ascending, without overlap.
    pub virtual_runs: Vec<VirtualRun>,
    /// Entries to write to the KV cache before anything is computed, to slots that this step computes no token for.
    pub prefix_writes: Vec<PrefixWrite>,
    /// Rows (token indexes, ascending) whose logits are wanted.
    pub logit_rows: Vec<u32>,
    /// What the bare base computes first, to give tokens their gates: the tokens of the segments whose adapters have a gate
    /// network, in this order, each with a context of the base's own. Missing where no adapter has one.
    pub gate_pass: Option<Box<Batch>>,
}

/// Consecutive tokens whose embeddings are rows of an adapter's virtual tokens.
#[derive(Clone, Debug)]
pub struct VirtualRun {
    /// First token.
    pub start: usize,
    /// Number of tokens, at least 1.
    pub len: usize,
    /// Row of the first token.
    pub first_row: usize,
    /// Whose rows.
    pub adapter: Arc<DeviceAdapter>,
}

/// Consecutive entries of an adapter's KV prefix, to be copied to the cache.
#[derive(Clone, Debug)]
pub struct PrefixWrite {
    /// First entry.
    pub first_entry: usize,
    /// KV slot of each entry: `block * block_size + offset`.
    pub slots: Vec<u32>,
    /// Whose entries.
    pub adapter: Arc<DeviceAdapter>,
}

/// Consecutive tokens of one context.
#[derive(Clone, Debug)]
pub struct AttentionSpan {
    /// First token.
    pub start: usize,
    /// Number of tokens, at least 1.
    pub len: usize,
    /// Tokens of the context after this step, these included; the span's last token is at `context_len - 1`.
    pub context_len: usize,
    /// KV blocks of the context in order; covers at least `context_len` slots.
    pub block_table: Vec<u32>,
}

/// Consecutive tokens that use one adapter.
#[derive(Clone, Debug)]
pub struct AdapterSegment {
    /// First token.
    pub start: usize,
    /// Number of tokens, at least 1.
    pub len: usize,
    /// The adapter on the model's device; `None` is the bare base.
    pub adapter: Option<Arc<DeviceAdapter>>,
    /// The tokens' gates, once the step has computed them.
    pub(super) gates: Option<Arc<TokenGates>>,
}

impl AdapterSegment {
    /// `len` tokens from `start` on with this adapter.
    pub fn new(start: usize, len: usize, adapter: Option<Arc<DeviceAdapter>>) -> Self {
        Self { start, len, adapter, gates: None }
    }
}
