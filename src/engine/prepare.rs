//! From scheduled sequences to the model's flat batch.

use std::sync::Arc;

use super::block_manager::BlockManager;
use super::sequence::Sequence;
use crate::model::{AdapterSegment, AttentionSpan, Batch, DeviceAdapter, PrefixWrite, VirtualRun};

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
    pub(super) residents: &'a [Option<Arc<DeviceAdapter>>],
    /// For the check that only blocks of one's own are written.
    pub(super) blocks: &'a BlockManager,
}

impl Layout<'_> {
    fn resident(&self, slot: usize) -> Arc<DeviceAdapter> {
        Arc::clone(self.residents[slot].as_ref().expect("a scheduled sequence's adapter is on the device"))
    }

    /// The KV slot of a position of the context with this table, whose block must be the sequence's own.
    fn slot_to_write(&self, block_table: &[u32], position: usize) -> u32 {
        let block = block_table[position / self.block_tokens];
        assert!(self.blocks.is_writable(block), "block {block} is written while shared");
        block * self.block_tokens as u32 + (position % self.block_tokens) as u32
    }
}

/// Lays the chunks of the `scheduled` sequences end to end, and says what each row of logits will be for.
pub(super) fn prepare(running: &[Sequence], scheduled: &[usize], layout: &Layout<'_>) -> (Batch, Vec<Row>) {
    let mut batch = Batch::default();
    let mut rows = Vec::new();
    let mut previous_slot = None;
    for &running_idx in scheduled {
        let sequence = &running[running_idx];
        let start = batch.token_ids.len();
        push_tokens(&mut batch, sequence, &sequence.block_table, layout);
        if let Some(base) = &sequence.base {
            push_tokens(batch.gate_pass.get_or_insert_default(), sequence, &base.block_table, layout);
        }
        push_rows(&mut batch, &mut rows, sequence, running_idx, start);
        push_leading(&mut batch, sequence, start, layout);
        let len = sequence.chunk_len;
        let asleep = sequence.adapter_from.map_or(len, |from| from.saturating_sub(sequence.computed).min(len));
        for (start, len, slot) in [(start, asleep, None), (start + asleep, len - asleep, sequence.slot)] {
            if len == 0 {
                continue;
            }
            match batch.segments.last_mut() {
                Some(segment) if previous_slot == Some(slot) => segment.len += len,
                _ => {
                    let adapter = slot.map(|slot| layout.resident(slot));
                    batch.segments.push(AdapterSegment::new(start, len, adapter));
                }
            }
            previous_slot = Some(slot);
        }
    }
    if let Some(pass) = &mut batch.gate_pass {
        pass.segments.push(AdapterSegment::new(0, pass.token_ids.len(), None));
    }
    if let (true, Some(&running_idx)) = (rows.is_empty(), scheduled.last()) {
        rows.push(Row { running_idx, purpose: RowPurpose::Unused });
        batch.logit_rows.push(batch.token_ids.len() as u32 - 1);
    }
    (batch, rows)
}

/// Adds a sequence's chunk as a span, in the context with this table.
fn push_tokens(batch: &mut Batch, sequence: &Sequence, block_table: &[u32], layout: &Layout<'_>) {
    let context_len = sequence.computed + sequence.chunk_len;
    assert!(context_len <= sequence.context_len(), "a chunk ends with the known tokens");
    assert!(context_len <= block_table.len() * layout.block_tokens, "a chunk has blocks to be written to");
    let start = batch.token_ids.len();
    for position in sequence.computed..context_len {
        batch.token_ids.push(position.checked_sub(sequence.leading).map_or(0, |idx| sequence.tokens[idx]));
        batch.positions.push(position as u32);
        batch.rope_lens.push(sequence.rope_prompt_len.max(position + 1) as u32);
        batch.slot_mapping.push(layout.slot_to_write(block_table, position));
    }
    let num_blocks = context_len.div_ceil(layout.block_tokens);
    batch.spans.push(AttentionSpan {
        start,
        len: sequence.chunk_len,
        context_len,
        block_table: block_table[..num_blocks].to_vec(),
    });
}

/// Adds what of the chunk that begins at token `start` stands before the prompt: virtual tokens, and the KV prefix.
fn push_leading(batch: &mut Batch, sequence: &Sequence, start: usize, layout: &Layout<'_>) {
    let Some(slot) = sequence.slot.filter(|_| sequence.leading > 0) else { return };
    let len = sequence.leading.saturating_sub(sequence.computed).min(sequence.chunk_len);
    if len > 0 {
        let first_row = sequence.computed - sequence.prefix_entries;
        batch.virtual_runs.push(VirtualRun { start, len, first_row, adapter: layout.resident(slot) });
    }
    if !sequence.to_copy.is_empty() {
        let slots = sequence.to_copy.clone().map(|entry| layout.slot_to_write(&sequence.block_table, entry)).collect();
        let first_entry = sequence.to_copy.start;
        batch.prefix_writes.push(PrefixWrite { first_entry, slots, adapter: layout.resident(slot) });
    }
}

/// Adds the rows a chunk that begins at token `start` of the batch needs: prompt tokens to score, then the next token.
fn push_rows(batch: &mut Batch, rows: &mut Vec<Row>, sequence: &Sequence, running_idx: usize, start: usize) {
    let context_len = sequence.computed + sequence.chunk_len;
    if let Some(first) = sequence.next_prompt_score() {
        assert!(sequence.leading + first >= sequence.computed, "no logits that are needed were skipped");
        for idx in first..context_len.saturating_sub(sequence.leading).min(sequence.prompt_len - 1) {
            batch.logit_rows.push((start + sequence.leading + idx - sequence.computed) as u32);
            rows.push(Row { running_idx, purpose: RowPurpose::ScorePrompt(sequence.tokens[idx + 1]) });
        }
    }
    if context_len == sequence.context_len() && sequence.max_tokens > 0 {
        batch.logit_rows.push((start + sequence.chunk_len - 1) as u32);
        rows.push(Row { running_idx, purpose: RowPurpose::Draw });
    }
}

#[cfg(test)]
mod tests {
    use super::super::GenerationRequest;
    use super::super::sequence::tests::{request, sequence};
    use super::*;
    use crate::adapter::{GateNetwork, GateRule, LoadedAdapter, LoweredAdapter};

    const BLOCK_TOKENS: usize = 4;

    /// A running sequence over `len` tokens of which `computed` are done and `chunk_len` come now.
    fn running(blocks: &mut BlockManager, request: GenerationRequest, computed: usize, chunk_len: usize) -> Sequence {
        let (mut sequence, _) = sequence(request);
        let num_blocks = (computed + chunk_len).div_ceil(BLOCK_TOKENS);
        for table in sequence.block_tables_mut() {
            *table = (0..num_blocks).map(|_| blocks.allocate().unwrap()).collect();
        }
        sequence.computed = computed;
        sequence.chunk_len = chunk_len;
        sequence
    }

    fn layout<'a>(blocks: &'a BlockManager, residents: &'a [Option<Arc<DeviceAdapter>>]) -> Layout<'a> {
        Layout { block_tokens: BLOCK_TOKENS, residents, blocks }
    }

    #[test]
    fn a_chunk_and_a_decode_lie_end_to_end() {
        let mut blocks = BlockManager::new(8);
        let prefill = running(&mut blocks, request(&[10, 11, 12, 13, 14, 15, 16], 1), 3, 3);
        let mut decode = running(&mut blocks, request(&[20, 21], 4), 2, 1);
        decode.push_token(22);
        let (batch, rows) = prepare(&[prefill, decode], &[0, 1], &layout(&blocks, &[]));
        assert_eq!(batch.token_ids, [13, 14, 15, 22]);
        assert_eq!(batch.positions, [3, 4, 5, 2]);
        assert_eq!(batch.rope_lens, [7, 7, 7, 3]);
        assert_eq!(batch.slot_mapping, [3, 4, 5, 10]);
        let spans: Vec<_> =
            batch.spans.iter().map(|s| (s.start, s.len, s.context_len, s.block_table.clone())).collect();
        assert_eq!(spans, [(0, 3, 6, vec![0, 1]), (3, 1, 3, vec![2])]);
        assert_eq!(batch.segments.len(), 1);
        assert_eq!((batch.segments[0].start, batch.segments[0].len), (0, 4));
        // The prefill is not at its end: only the decode draws.
        assert_eq!(batch.logit_rows, [3]);
        assert_eq!(rows, [Row { running_idx: 1, purpose: RowPurpose::Draw }]);
    }

    #[test]
    fn equal_adapters_make_one_segment_over_several_spans() {
        let mut blocks = BlockManager::new(8);
        let residents = [Some(Arc::new(DeviceAdapter::default())), Some(Arc::new(DeviceAdapter::default()))];
        let mut sequences: Vec<Sequence> = (0..4).map(|_| running(&mut blocks, request(&[1, 2], 1), 0, 2)).collect();
        for (sequence, slot) in sequences.iter_mut().zip([None, Some(0), Some(0), Some(1)]) {
            sequence.slot = slot;
        }
        let (batch, _) = prepare(&sequences, &[0, 1, 2, 3], &layout(&blocks, &residents));
        let segments: Vec<_> = batch.segments.iter().map(|s| (s.start, s.len, s.adapter.is_some())).collect();
        assert_eq!(segments, [(0, 2, false), (2, 4, true), (6, 2, true)]);
        assert!(Arc::ptr_eq(batch.segments[2].adapter.as_ref().unwrap(), residents[1].as_ref().unwrap()));
    }

    #[test]
    fn what_needs_gates_is_laid_out_in_the_base_too() {
        let mut blocks = BlockManager::new(8);
        let lowered = LoweredAdapter {
            gates: Some(GateNetwork { layers: Vec::new(), group: 1, rule: GateRule::default() }),
            ..LoweredAdapter::default()
        };
        let adapter = LoadedAdapter {
            name: "gated".to_owned(),
            generation: 1,
            digest: [1; 32],
            lowered,
            bytes: 0,
            parts: Vec::new(),
        };
        let adapter = Some(Arc::new(adapter));
        let gated = |prompt: &[u32]| GenerationRequest { adapter: adapter.clone(), ..request(prompt, 1) };
        let residents = [Some(Arc::new(DeviceAdapter::default()))];
        let bare = running(&mut blocks, request(&[9, 9], 1), 0, 2);
        let mut first = running(&mut blocks, gated(&[10, 11, 12, 13, 14, 15]), 4, 2);
        let mut second = running(&mut blocks, gated(&[20, 21]), 0, 2);
        (first.slot, second.slot) = (Some(0), Some(0));
        let (batch, rows) = prepare(&[bare, first, second], &[0, 1, 2], &layout(&blocks, &residents));
        assert_eq!((batch.token_ids.as_slice(), rows.len()), (&[9, 9, 14, 15, 20, 21][..], 3));
        assert_eq!(batch.slot_mapping, [0, 1, 8, 9, 20, 21]);
        let pass = batch.gate_pass.unwrap();
        assert_eq!((pass.token_ids.as_slice(), pass.positions.as_slice()), (&[14, 15, 20, 21][..], &[4, 5, 0, 1][..]));
        assert_eq!(pass.slot_mapping, [16, 17, 24, 25]);
        let spans: Vec<_> = pass.spans.iter().map(|s| (s.start, s.context_len, s.block_table.clone())).collect();
        assert_eq!(spans, [(0, 6, vec![3, 4]), (2, 2, vec![6])]);
        assert_eq!((pass.segments.len(), pass.segments[0].len, pass.logit_rows.len()), (1, 4, 0));
        assert!(pass.segments[0].adapter.is_none() && pass.gate_pass.is_none());
    }

    #[test]
    fn prompt_scores_ask_for_each_row_but_the_last_and_then_draw() {
        let mut blocks = BlockManager::new(8);
        let settings = GenerationRequest { prompt_logprobs: Some(0), ..request(&[5, 6, 7], 1) };
        let (batch, rows) = prepare(&[running(&mut blocks, settings, 0, 3)], &[0], &layout(&blocks, &[]));
        assert_eq!(batch.logit_rows, [0, 1, 2]);
        let purposes: Vec<_> = rows.into_iter().map(|row| row.purpose).collect();
        assert_eq!(purposes, [RowPurpose::ScorePrompt(6), RowPurpose::ScorePrompt(7), RowPurpose::Draw]);
    }

    #[test]
    fn a_step_without_need_of_logits_still_asks_for_one_row() {
        let mut blocks = BlockManager::new(8);
        let (batch, rows) = prepare(&[running(&mut blocks, request(&[5, 6, 7], 1), 0, 2)], &[0], &layout(&blocks, &[]));
        assert_eq!(batch.logit_rows, [1]);
        assert_eq!(rows, [Row { running_idx: 0, purpose: RowPurpose::Unused }]);
    }

    #[test]
    #[should_panic(expected = "is written while shared")]
    fn writing_a_shared_block_is_caught() {
        let mut blocks = BlockManager::new(8);
        let sequence = running(&mut blocks, request(&[5, 6, 7], 1), 0, 2);
        blocks.publish(sequence.block_table[0], super::super::prefix::BlockHash([0; 32]));
        prepare(&[sequence], &[0], &layout(&blocks, &[]));
    }
}
