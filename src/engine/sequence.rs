//! One sequence: its tokens, its place in the KV cache, and its link to the request task.
//!
//! A sequence's context is what its adapter puts before the prompt (entries of a KV prefix, then virtual tokens) and then
//! its tokens. Positions, blocks and whatever counts as computed are those of the context; prompts, scores and answers
//! are of tokens only.
//!
//! An adapter that takes gates from the bare base gives its sequence a second context: the same tokens as the base sees them.
//! Both have blocks of their own, equally many, and are computed together.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tokio::sync::mpsc::{self, error::TrySendError};

use super::block_manager::{BlockManager, PrefixHits};
use super::prefix::{BlockHash, PrefixChain, PrefixKey};
use super::sampler::Sampler;
use super::status::InFlight;
use super::{Finish, FinishReason, GenerationEvent, GenerationRequest, TokenLogprob};
use crate::adapter::{LoadedAdapter, LoweredAdapter};
use crate::model::RopeLengthRule;

/// Events beside tokens that a sequence may send: the prompt's logprobs and the end, and one to spare.
pub(super) const EVENTS_BESIDE_TOKENS: usize = 3;

/// One sequence, from submission to its end.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Order of arrival.
    pub(super) id: u64,
    /// The adapter, leased.
    pub(super) adapter: Option<Arc<LoadedAdapter>>,
    /// Prompt and generated tokens.
    pub(super) tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub(super) prompt_len: usize,
    /// Entries of the adapter's KV prefix, the first positions of the context.
    pub(super) prefix_entries: usize,
    /// Positions of the context before the first token.
    pub(super) leading: usize,
    /// First position that uses the adapter, if there is one; `None` when the adapter stays asleep.
    pub(super) adapter_from: Option<usize>,
    /// Positions that count as the prompt for RoPE; more than the prompt takes after a switch of frequencies.
    pub(super) rope_prompt_len: usize,
    /// What is cached was rotated with other frequencies than the context now has: all of it must be recomputed.
    pub(super) must_restart: bool,
    /// Leading positions whose keys and values are in the cache, or are copied there by the next step.
    pub(super) computed: usize,
    /// Entries of the KV prefix that the next step copies to the sequence's own blocks.
    pub(super) to_copy: Range<usize>,
    /// Positions to compute in the current step; 0 when not scheduled.
    pub(super) chunk_len: usize,
    /// KV blocks, in order of the context.
    pub(super) block_table: Vec<u32>,
    /// Hashes of its full blocks.
    pub(super) prefix: PrefixChain,
    /// The same tokens' context in the bare base, where the adapter takes gates from it.
    pub(super) base: Option<BaseContext>,
    /// Leading blocks, of every context, that were offered to the prefix cache.
    pub(super) num_published: usize,
    /// Prompt tokens found in the prefix cache; `None` until first scheduled.
    pub(super) cached_tokens: Option<usize>,
    /// The adapter's device slot, pinned while running.
    pub(super) slot: Option<usize>,
    /// Waits only because no adapter slot is free.
    pub(super) deferred: bool,
    /// Later requests with an adapter that were admitted before this deferred one.
    pub(super) overtaken: usize,
    /// Draws tokens.
    pub(super) sampler: Sampler,
    /// Logprobs of the prompt's tokens so far; the first has none.
    pub(super) prompt_scores: Vec<Option<TokenLogprob>>,
    /// Tokens to generate at most; with the prompt they fit the context.
    pub(super) max_tokens: usize,
    /// Alternatives to report with each generated token.
    pub(super) logprobs: Option<usize>,
    /// Alternatives to report with each prompt token.
    pub(super) prompt_logprobs: Option<usize>,
    /// When it passed which point.
    pub(super) times: Times,
    /// Set once, when nothing more will be computed for it.
    pub(super) end: Option<End>,
    stop_token_ids: Vec<u32>,
    cache_salt: Option<String>,
    rope_length_rule: RopeLengthRule,
    prompt_reported: bool,
    satisfied: Arc<AtomicBool>,
    events: mpsc::Sender<GenerationEvent>,
    _in_flight: InFlight,
}

/// A context of the bare base beside a sequence's own; what is computed is the same of both.
#[derive(Debug)]
pub(super) struct BaseContext {
    /// KV blocks, in order of the context.
    pub(super) block_table: Vec<u32>,
    /// Hashes of its full blocks, which are those of requests for the base.
    pub(super) prefix: PrefixChain,
}

impl BaseContext {
    fn new(salt: Option<&str>, rope_length_rule: RopeLengthRule, prompt_len: usize) -> Self {
        let prefix = PrefixChain::new(PrefixKey {
            adapter: None,
            adapter_from: Some(0),
            prefix_entries: 0,
            leading: 0,
            salt,
            rope_length_rule,
            prompt_len,
        });
        Self { block_table: Vec::new(), prefix }
    }
}

/// When a sequence passed which point; for metrics only.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// Submitted.
    pub(super) arrived: Instant,
    /// First scheduled.
    pub(super) scheduled: Option<Instant>,
    /// First token.
    pub(super) first_token: Option<Instant>,
    /// Latest token.
    pub(super) last_token: Option<Instant>,
}

/// How a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// As it should.
    Finished(FinishReason),
    /// The engine could not go on; the text is safe to show.
    Failed(&'static str),
    /// The receiver was dropped.
    Cancelled,
    /// The server stops.
    ShutDown,
}

/// What a new sequence needs beside its request.
pub(super) struct SequenceSetup {
    /// `max_tokens`, clipped to the context.
    pub(super) max_tokens: usize,
    /// Of the model.
    pub(super) rope_length_rule: RopeLengthRule,
    /// Seed where the request has none.
    pub(super) fresh_seed: u64,
    /// To the request task.
    pub(super) events: mpsc::Sender<GenerationEvent>,
    /// Counts the sequence while it lives.
    pub(super) in_flight: InFlight,
}

impl Sequence {
    /// A sequence with nothing computed.
    pub(super) fn new(request: GenerationRequest, setup: SequenceSetup) -> Self {
        let lowered = request.adapter.as_ref().map(|adapter| &adapter.lowered);
        let leading = lowered.map_or(0, LoweredAdapter::num_leading);
        let prefix_entries = lowered.map_or(0, LoweredAdapter::num_prefix_entries);
        let adapter_from = lowered.map_or(Some(0), |lowered| lowered.active_from(&request.prompt));
        assert!(leading == 0 || adapter_from == Some(0), "what stands before the prompt acts from there on");
        let prefix = PrefixChain::new(PrefixKey {
            adapter: request.adapter.as_ref().map(|adapter| &adapter.digest),
            adapter_from,
            prefix_entries,
            leading,
            salt: request.cache_salt.as_deref(),
            rope_length_rule: setup.rope_length_rule,
            prompt_len: leading + request.prompt.len(),
        });
        let needs_base = lowered.is_some_and(|lowered| lowered.gates.is_some());
        assert!(!needs_base || (leading == 0 && adapter_from == Some(0)), "both contexts have the same positions");
        let new_base = || BaseContext::new(request.cache_salt.as_deref(), setup.rope_length_rule, request.prompt.len());
        Self {
            id: 0,
            base: needs_base.then(new_base),
            adapter: request.adapter,
            prompt_len: request.prompt.len(),
            prefix_entries,
            leading,
            adapter_from,
            rope_prompt_len: leading + request.prompt.len(),
            to_copy: 0..0,
            must_restart: false,
            computed: 0,
            chunk_len: 0,
            block_table: Vec::new(),
            prefix,
            num_published: 0,
            cached_tokens: None,
            slot: None,
            deferred: false,
            overtaken: 0,
            sampler: Sampler::new(request.sampling, &request.prompt, setup.fresh_seed),
            prompt_scores: Vec::new(),
            max_tokens: setup.max_tokens,
            logprobs: request.logprobs,
            prompt_logprobs: request.prompt_logprobs,
            times: Times { arrived: Instant::now(), scheduled: None, first_token: None, last_token: None },
            end: None,
            stop_token_ids: if request.ignore_eos { Vec::new() } else { request.stop_token_ids },
            cache_salt: request.cache_salt,
            rope_length_rule: setup.rope_length_rule,
            prompt_reported: false,
            satisfied: request.satisfied,
            events: setup.events,
            _in_flight: setup.in_flight,
            tokens: request.prompt,
        }
    }

    /// Tokens generated so far.
    pub(super) fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Positions of the context so far.
    pub(super) fn context_len(&self) -> usize {
        self.leading + self.tokens.len()
    }

    /// Positions whose keys and values are still missing.
    pub(super) fn left_to_compute(&self) -> usize {
        self.context_len() - self.computed
    }

    /// Whether all but the newest token are computed, so that a chunk of one yields the next token.
    pub(super) fn is_decoding(&self) -> bool {
        self.generated() > 0 && self.left_to_compute() == 1
    }

    /// How the request task ended the sequence by dropping its receiver, if it did.
    pub(super) fn client_end(&self) -> Option<End> {
        if !self.events.is_closed() {
            None
        } else if self.satisfied.load(Ordering::Acquire) {
            Some(End::Finished(FinishReason::Stop))
        } else {
            Some(End::Cancelled)
        }
    }

    /// Content digest of the adapter.
    pub(super) fn digest(&self) -> Option<&[u8; 32]> {
        self.adapter.as_ref().map(|adapter| &adapter.digest)
    }

    /// Names of the adapters that it counts for; none for the bare base.
    pub(super) fn adapter_names(&self) -> impl Iterator<Item = &str> {
        self.adapter.iter().flat_map(|adapter| adapter.sources()).map(|adapter| adapter.name.as_str())
    }

    /// Name of the adapter, unless it is a composition: that has none that anyone could ask for.
    pub(super) fn own_adapter_name(&self) -> Option<&str> {
        self.adapter.as_ref().filter(|adapter| adapter.parts.is_empty()).map(|adapter| adapter.name.as_str())
    }

    /// First token whose logits the prompt's logprobs still need; `None` when none are asked or all are there.
    pub(super) fn next_prompt_score(&self) -> Option<usize> {
        let next_token = self.prompt_scores.len().max(1);
        (self.prompt_logprobs.is_some() && next_token < self.prompt_len).then(|| next_token - 1)
    }

    /// Leading blocks that hold nothing but entries of the KV prefix: every sequence of the adapter shares them.
    pub(super) fn prefix_blocks(&self, block_tokens: usize) -> usize {
        self.prefix_entries / block_tokens
    }

    /// Hashes of the leading blocks it may take from the cache: all but the last token's block, whose logits are needed.
    /// Those of its KV prefix only while the logits of prompt tokens are needed, and where nothing else is cached.
    pub(super) fn reusable_hashes(&mut self, block_tokens: usize, prefix_cache: bool) -> &[BlockHash] {
        self.prefix.extend(&self.tokens, block_tokens);
        let computed_too = prefix_cache && self.next_prompt_score().is_none();
        let bound =
            if computed_too { (self.context_len() - 1) / block_tokens } else { self.prefix_blocks(block_tokens) };
        let hashes = self.prefix.hashes();
        &hashes[..hashes.len().min(bound)]
    }

    /// Contexts it has.
    pub(super) fn num_contexts(&self) -> usize {
        1 + usize::from(self.base.is_some())
    }

    /// Block tables of its contexts.
    pub(super) fn block_tables(&self) -> impl Iterator<Item = &[u32]> {
        let base = self.base.iter().map(|base| base.block_table.as_slice());
        std::iter::once(self.block_table.as_slice()).chain(base)
    }

    /// The same, to be grown.
    pub(super) fn block_tables_mut(&mut self) -> impl Iterator<Item = &mut Vec<u32>> {
        std::iter::once(&mut self.block_table).chain(self.base.iter_mut().map(|base| &mut base.block_table))
    }

    /// The leading blocks that all its contexts find in the cache, and how many of them in total are unreferenced.
    pub(super) fn find_prefix(&mut self, blocks: &BlockManager, block_tokens: usize, prefix_cache: bool) -> PrefixHits {
        let mut hits = blocks.find_prefix(self.reusable_hashes(block_tokens, prefix_cache));
        if let Some(base) = &mut self.base {
            base.prefix.extend(&self.tokens, block_tokens);
            let of_base = blocks.find_prefix(&base.prefix.hashes()[..hits.blocks]);
            // The gates of what is computed come from the base, so neither can be ahead of the other.
            hits = blocks.find_prefix(&self.prefix.hashes()[..of_base.blocks]);
            hits.unreferenced += blocks.find_prefix(&base.prefix.hashes()[..hits.blocks]).unreferenced;
        }
        hits
    }

    /// Takes `num_blocks` blocks for each context, the first `cached` of them from the cache. The caller has checked that
    /// they are there.
    pub(super) fn fill_tables(&mut self, blocks: &mut BlockManager, cached: usize, num_blocks: usize) {
        let base = self.base.iter_mut().map(|base| (&base.prefix, &mut base.block_table));
        for (prefix, table) in std::iter::once((&self.prefix, &mut self.block_table)).chain(base) {
            *table = prefix.hashes()[..cached].iter().map(|hash| blocks.take_cached(hash)).collect();
        }
        // Only now that none of these can be evicted any more.
        for table in self.block_tables_mut() {
            table.extend((cached..num_blocks).map(|_| blocks.allocate().expect("the room was checked")));
        }
    }

    /// Offers the first `num_full` blocks of each context to the cache.
    pub(super) fn publish(&mut self, blocks: &mut BlockManager, num_full: usize, block_tokens: usize) {
        let computed = &self.tokens[..self.computed.saturating_sub(self.leading)];
        let base = self.base.iter_mut().map(|base| (&mut base.prefix, &base.block_table));
        for (prefix, table) in std::iter::once((&mut self.prefix, &self.block_table)).chain(base) {
            prefix.extend(computed, block_tokens);
            for (block, hash) in table[..num_full].iter().zip(prefix.hashes()).skip(self.num_published) {
                blocks.publish(*block, *hash);
            }
        }
        self.num_published = num_full;
    }

    /// Forgets what is in the KV cache; the blocks are returned for release. Tokens and scores stay.
    pub(super) fn take_blocks(&mut self) -> Vec<u32> {
        self.computed = 0;
        self.to_copy = 0..0;
        self.chunk_len = 0;
        self.must_restart = false;
        self.block_tables_mut().flat_map(std::mem::take).collect()
    }

    /// Adds the logprob of the next prompt token.
    pub(super) fn push_prompt_score(&mut self, score: TokenLogprob) {
        if self.prompt_scores.is_empty() {
            self.prompt_scores.push(None);
        }
        self.prompt_scores.push(Some(score));
        assert!(self.prompt_scores.len() <= self.prompt_len, "more prompt logprobs than prompt tokens");
    }

    /// Sends the prompt's logprobs when they were asked for; once.
    pub(super) fn report_prompt(&mut self) {
        if self.prompt_logprobs.is_none() || self.prompt_reported {
            return;
        }
        self.prompt_reported = true;
        let mut scores = std::mem::take(&mut self.prompt_scores);
        scores.resize(self.prompt_len.max(1), None);
        // Kept at full length, so that a recomputation after preemption asks for none again.
        self.prompt_scores = vec![None; scores.len()];
        self.send(GenerationEvent::Prompt(scores));
    }

    /// Appends a generated token; returns how the sequence ends by it.
    pub(super) fn push_token(&mut self, token: u32) -> Option<FinishReason> {
        self.tokens.push(token);
        self.sampler.record(token);
        self.follow_rope_switch();
        if self.stop_token_ids.contains(&token) {
            Some(FinishReason::Stop)
        } else if self.generated() >= self.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    /// Where the model has two sets of frequencies, a whole context uses one of them: when it grows past the threshold,
    /// transformers forgets the cache and computes everything with the other set, and so do we. (Where frequencies
    /// change with every token, transformers leaves the cached keys as they are.)
    fn follow_rope_switch(&mut self) {
        let rule = self.rope_length_rule;
        let is_switch = matches!(rule, RopeLengthRule::Switch { .. });
        if is_switch && rule.regime(self.rope_prompt_len) != rule.regime(self.context_len()) {
            self.rope_prompt_len = self.context_len();
            self.prefix = PrefixChain::new(PrefixKey {
                adapter: self.digest(),
                adapter_from: self.adapter_from,
                prefix_entries: self.prefix_entries,
                leading: self.leading,
                salt: self.cache_salt.as_deref(),
                rope_length_rule: rule,
                prompt_len: self.rope_prompt_len,
            });
            let salt = self.cache_salt.as_deref();
            self.base = self.base.take().map(|base| BaseContext {
                block_table: base.block_table,
                ..BaseContext::new(salt, rule, self.rope_prompt_len)
            });
            self.must_restart = true;
        }
    }

    /// Sends an event; that the receiver is gone is noticed by [`Self::client_end`].
    pub(super) fn send(&self, event: GenerationEvent) {
        if let Err(TrySendError::Full(_)) = self.events.try_send(event) {
            unreachable!("the channel has room for every event of its sequence");
        }
    }

    /// Sends the last event.
    pub(super) fn send_end(&self, end: End) {
        match end {
            End::Finished(reason) => self.send(GenerationEvent::Finished(Finish {
                reason,
                prompt_tokens: self.prompt_len,
                cached_tokens: self.cached_tokens.unwrap_or(0),
                generated_tokens: self.generated(),
            })),
            End::Failed(message) => self.send(GenerationEvent::Failed(message.to_owned())),
            End::ShutDown => self.send(GenerationEvent::ShutDown),
            End::Cancelled => {}
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use tokio::sync::mpsc::Receiver;

    use super::super::SamplingParams;
    use super::super::status::Status;
    use super::*;

    /// A request with neutral settings.
    pub(in super::super) fn request(prompt: &[u32], max_tokens: usize) -> GenerationRequest {
        GenerationRequest {
            prompt: prompt.to_vec(),
            adapter: None,
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            max_tokens,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
            cache_salt: None,
            satisfied: Arc::default(),
        }
    }

    /// The sequence of a request, and what it sends.
    pub(in super::super) fn sequence(request: GenerationRequest) -> (Sequence, Receiver<GenerationEvent>) {
        let (events, receiver) = mpsc::channel(request.max_tokens + EVENTS_BESIDE_TOKENS);
        let setup = SequenceSetup {
            max_tokens: request.max_tokens,
            rope_length_rule: RopeLengthRule::Fixed,
            fresh_seed: 0,
            events,
            in_flight: InFlight::new(&Arc::new(Status::default())),
        };
        (Sequence::new(request, setup), receiver)
    }

    fn score(rank: usize) -> TokenLogprob {
        TokenLogprob { logprob: 0.0, rank, top: Vec::new() }
    }

    #[test]
    fn stop_token_ends_unless_ignored_and_length_always_does() {
        let check = |ignore_eos, tokens: &[u32], expected| {
            let settings = GenerationRequest { stop_token_ids: vec![9], ignore_eos, ..request(&[1], 3) };
            let (mut sequence, _receiver) = sequence(settings);
            let mut ends: Vec<_> = tokens.iter().map(|token| sequence.push_token(*token)).collect();
            let end = ends.pop().unwrap();
            assert!(ends.iter().all(Option::is_none), "{tokens:?}");
            assert_eq!(end, expected, "{tokens:?}");
        };
        check(false, &[4, 9], Some(FinishReason::Stop));
        check(true, &[4, 9], None);
        check(true, &[4, 9, 4], Some(FinishReason::Length));
        check(false, &[4, 4, 9], Some(FinishReason::Stop));
    }

    #[test]
    fn prompt_scores_are_asked_for_once_and_in_order() {
        let settings = GenerationRequest { prompt_logprobs: Some(0), ..request(&[1, 2, 3], 1) };
        let (mut sequence, mut receiver) = sequence(settings);
        assert_eq!(sequence.next_prompt_score(), Some(0));
        sequence.push_prompt_score(score(1));
        assert_eq!(sequence.next_prompt_score(), Some(1));
        sequence.take_blocks();
        assert_eq!(sequence.next_prompt_score(), Some(1), "scores outlive a preemption");
        sequence.push_prompt_score(score(2));
        assert_eq!(sequence.next_prompt_score(), None);
        sequence.report_prompt();
        sequence.report_prompt();
        assert_eq!(sequence.next_prompt_score(), None);
        let Ok(GenerationEvent::Prompt(scores)) = receiver.try_recv() else { panic!("no prompt event") };
        assert_eq!(scores, [None, Some(score(1)), Some(score(2))]);
        assert!(receiver.try_recv().is_err());
    }

    #[test]
    fn the_last_tokens_block_is_never_reused() {
        let reusable = |len: u32| {
            let (mut sequence, _receiver) = sequence(request(&(0..len).collect::<Vec<_>>(), 1));
            sequence.reusable_hashes(4, true).len()
        };
        assert_eq!([reusable(3), reusable(4), reusable(5), reusable(8), reusable(9)], [0, 0, 1, 1, 2]);
    }

    #[test]
    fn scoring_the_prompt_reads_nothing_from_the_cache() {
        let settings = GenerationRequest { prompt_logprobs: Some(1), ..request(&[1, 2, 3, 4, 5], 1) };
        let (mut sequence, _receiver) = sequence(settings);
        assert!(sequence.reusable_hashes(2, true).is_empty());
    }
}
