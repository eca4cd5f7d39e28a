//! From scheduled sequences to the model's flat batch.

use std::sync::Arc;

use super::block_manager::BlockManager;
use super::sequence::Sequence;
use crate::adapter::LoweredAdapter;
use crate::model::{AdapterSegment, AttentionSpan, Batch};

/// What the logits of one row are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// Whose they are.
    pub(super) running_idx: usize,
    /// What to do with them.
    pub(super) purpose: RowPurpose,
}

/// What a row of logits is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowPurpose {
    /// Score this prompt token.
    ScorePrompt(u32),
    /// Draw the next token.
    Draw,
    /// Nothing: the model is never asked for an empty matrix of logits, so a step that needs none asks for one row.
    Unused,
}

/// What the layout needs beside the sequences.
pub(super) struct Layout<'a> {
    /// Tokens per KV block.
    pub(super) block_tokens: usize,
    /// The adapter in each slot.
    pub(super) residents: &'a [Option<Arc<LoweredAdapter>>],
    /// For the check that only blocks of one's own are written.
    pub(super) blocks: &'a BlockManager,
}

/// Lays the chunks of the `scheduled` sequences end to end, and says what each row of logits will be for.
pub(super) fn prepare(running: &[Box<Sequence>], scheduled: &[usize], layout: &Layout<'_>) -> (Batch, Vec<Row>) {
    let mut batch = Batch::default();
    let mut rows = Vec::new();
    let mut previous_slot = None;
    for &running_idx in scheduled {
        let sequence = &running[running_idx];
        let start = batch.token_ids.len();
        push_tokens(&mut batch, sequence, layout);
        push_rows(&mut batch, &mut rows, sequence, running_idx, start);
        let len = sequence.chunk_len;
        match batch.segments.last_mut() {
            Some(segment) if previous_slot == Some(sequence.slot) => segment.len += len,
            _ => {
                let adapter = sequence.slot.map(|slot| {
                    Arc::clone(
                        layout.residents[slot].as_ref().expect("a scheduled sequence's adapter is on the device"),
                    )
                });
                batch.segments.push(AdapterSegment { start, len, adapter });
            }
        }
        previous_slot = Some(sequence.slot);
    }
    if let (true, Some(&running_idx)) = (rows.is_empty(), scheduled.last()) {
        rows.push(Row { running_idx, purpose: RowPurpose::Unused });
        batch.logit_rows.push(batch.token_ids.len() as u32 - 1);
    }
    (batch, rows)
}

/// Adds a sequence's chunk as a span.
fn push_tokens(batch: &mut Batch, sequence: &Sequence, layout: &Layout<'_>) {
    let context_len = sequence.computed + sequence.chunk_len;
    assert!(context_len <= sequence.tokens.len(), "a chunk ends with the known tokens");
    assert!(context_len <= sequence.block_table.len() * layout.block_tokens, "a chunk has blocks to be written to");
    let start = batch.token_ids.len();
    for position in sequence.computed..context_len {
        let block = sequence.block_table[position / layout.block_tokens];
        let offset = position % layout.block_tokens;
        if offset == 0 || position == sequence.computed {
            assert!(layout.blocks.is_writable(block), "block {block} is written while shared");
        }
        batch.token_ids.push(sequence.tokens[position]);
        batch.positions.push(position as u32);
        batch.rope_lens.push(sequence.prompt_len.max(position + 1) as u32);
        batch.slot_mapping.push(block * layout.block_tokens as u32 + offset as u32);
    }
    let num_blocks = context_len.div_ceil(layout.block_tokens);
    batch.spans.push(AttentionSpan {
        start,
        len: sequence.chunk_len,
        context_len,
        block_table: sequence.block_table[..num_blocks].to_vec(),
    });
}

/// Adds the rows a chunk that begins at token `start` of the batch needs: prompt tokens to score, then the next token.
fn push_rows(batch: &mut Batch, rows: &mut Vec<Row>, sequence: &Sequence, running_idx: usize, start: usize) {
    let context_len = sequence.computed + sequence.chunk_len;
    if let Some(first) = sequence.next_prompt_score() {
        assert!(first >= sequence.computed, "no logits that are needed were skipped");
        for position in first..context_len.min(sequence.prompt_len - 1) {
            batch.logit_rows.push((start + position - sequence.computed) as u32);
            rows.push(Row { running_idx, purpose: RowPurpose::ScorePrompt(sequence.tokens[position + 1]) });
        }
    }
    if context_len == sequence.tokens.len() && sequence.max_tokens > 0 {
        batch.logit_rows.push((start + sequence.chunk_len - 1) as u32);
        rows.push(Row { running_idx, purpose: RowPurpose::Draw });
    }
}
