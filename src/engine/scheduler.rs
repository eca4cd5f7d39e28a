//! Which sequences run, and how many tokens each computes in a step. Integers only.
//!
//! Every step has a budget of tokens. Running sequences that decode come first with one token each, then running
//! sequences that still prefill, then waiting ones; a prefill is a chunk of n tokens and a decode a chunk of one.
//! Within each group the earlier arrival goes first.
//!
//! Blocks: a sequence is admitted when all its tokens fit, and one further block per context of those that run stays free, so
//! that an admission is not undone at once. When a running sequence needs a block and none is left, the newest running
//! sequence is preempted: it loses its blocks and waits again, before all that arrived after it, with its generated
//! tokens kept. Because every sequence alone fits the cache (checked at admission), the oldest always goes on.
//!
//! An adapter's KV prefix takes no computing: its entries are copied to blocks. Full blocks of them are shared by all
//! sequences of the adapter, through the same hashes as the prefix cache and evicted like its blocks once nobody refers to
//! them; what is left of the prefix shares a block with the sequence's own tokens and is copied for each.
//!
//! A sequence whose adapter takes gates from the bare base has a context of the base's beside its own. Both are computed in
//! the same steps and hold equally many blocks, so what is said of a sequence's blocks holds for both together. A step's
//! tokens count once: the base's pass over them comes before, and is no larger.
//!
//! Fairness: requests enter in order of arrival, and lack of capacity (seats, tokens, blocks) holds everybody behind.
//! A request is *deferred* when it lacks only a device slot for its adapter; later requests whose adapters are on the
//! device, and requests for the base, may then pass. But once `sequences_max` requests with adapters have passed a
//! deferred one, no further request with an adapter does until it is in: slots then become free within the lifetime of
//! what runs, and the deferred one is the first to be offered one. So it neither blocks others for ever nor starves.

use std::collections::VecDeque;
use std::sync::Arc;

use super::EngineConfig;
use super::block_manager::BlockManager;
use super::sequence::Sequence;
use super::slot_manager::SlotManager;
use crate::adapter::LoadedAdapter;

/// Owns all sequences.
#[derive(Debug)]
pub(super) struct Scheduler {
    sequences_max: usize,
    step_tokens_max: usize,
    block_tokens: usize,
    prefix_cache: bool,
    /// In order of arrival.
    pub(super) running: Vec<Sequence>,
    /// In order of arrival.
    pub(super) waiting: VecDeque<Sequence>,
}

/// What a schedule asks the engine to do beside computing the chunks.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    /// Copy an adapter to a slot first.
    pub(super) load: Option<SlotLoad>,
    /// Sequences preempted.
    pub(super) num_preempted: usize,
    /// A sequence copies blocks of its KV prefix that others will share. One a step: that bounds the step, and who needs
    /// the same blocks finds them in the next.
    pub(super) copies_prefix: bool,
}

/// Copy an adapter to a slot.
#[derive(Clone, Debug)]
pub(super) struct SlotLoad {
    /// Where to.
    pub(super) slot: usize,
    /// What.
    pub(super) adapter: Arc<LoadedAdapter>,
}

/// Whether a waiting request's adapter has a place.
enum Place {
    /// The base needs none.
    Base,
    /// On the device.
    Resident(usize),
    /// Could be copied to this slot.
    Loadable(usize),
    /// Must wait for a slot.
    None,
}

impl Scheduler {
    /// No sequences, of which a step computes up to `step_tokens_max` tokens.
    pub(super) fn new(config: &EngineConfig, step_tokens_max: usize) -> Self {
        Self {
            sequences_max: config.sequences_max,
            step_tokens_max,
            block_tokens: config.block_tokens,
            prefix_cache: config.prefix_cache,
            running: Vec::with_capacity(config.sequences_max),
            waiting: VecDeque::new(),
        }
    }

    /// Number of sequences.
    pub(super) fn len(&self) -> usize {
        self.running.len() + self.waiting.len()
    }

    /// Adds a sequence to those that wait.
    pub(super) fn push_waiting(&mut self, sequence: Sequence) {
        let position = self.waiting.partition_point(|other| other.id < sequence.id);
        self.waiting.insert(position, sequence);
    }

    /// Sets every sequence's `chunk_len`, with blocks and slots in place for it.
    pub(super) fn schedule(&mut self, blocks: &mut BlockManager, slots: &mut SlotManager) -> Schedule {
        let mut schedule = Schedule::default();
        self.restart_switched(blocks, slots);
        let budget = self.divide_budget();
        schedule.num_preempted = self.grow_tables(blocks, slots);
        for sequence in &mut self.waiting {
            sequence.deferred = false;
        }
        // After a preemption the cache is full: whoever came in now would be thrown out next.
        if schedule.num_preempted == 0 {
            self.admit(budget, blocks, slots, &mut schedule);
        }
        let num_tokens: usize = self.running.iter().map(|sequence| sequence.chunk_len).sum();
        assert!(num_tokens <= self.step_tokens_max, "a step computes at most its budget");
        schedule
    }

    /// Running indexes of the scheduled sequences, ordered so that equal adapters adjoin.
    pub(super) fn scheduled(&self) -> Vec<usize> {
        let mut scheduled: Vec<usize> =
            (0..self.running.len()).filter(|idx| self.running[*idx].chunk_len > 0).collect();
        scheduled.sort_by_key(|idx| self.running[*idx].slot);
        scheduled
    }

    /// Takes out the sequences that ended, with their blocks and slots given back.
    pub(super) fn take_ended(&mut self, blocks: &mut BlockManager, slots: &mut SlotManager) -> Vec<Sequence> {
        let mut ended: Vec<Sequence> = self.running.extract_if(.., |sequence| sequence.end.is_some()).collect();
        for sequence in &mut ended {
            leave(sequence, blocks, slots);
        }
        if self.waiting.iter().any(|sequence| sequence.end.is_some()) {
            let (gone, waiting) = self.waiting.drain(..).partition::<VecDeque<_>, _>(|sequence| sequence.end.is_some());
            self.waiting = waiting;
            ended.extend(gone);
        }
        ended
    }

    /// Sends the sequences that must be recomputed back to those that wait, in their old order.
    fn restart_switched(&mut self, blocks: &mut BlockManager, slots: &mut SlotManager) {
        let restarted: Vec<Sequence> = self.running.extract_if(.., |sequence| sequence.must_restart).collect();
        for mut sequence in restarted {
            leave(&mut sequence, blocks, slots);
            self.push_waiting(sequence);
        }
    }

    /// Sets the running sequences' chunks, decodes before prefills; returns what is left of the budget.
    fn divide_budget(&mut self) -> usize {
        let mut budget = self.step_tokens_max;
        for sequence in &mut self.running {
            sequence.chunk_len = usize::from(sequence.is_decoding());
            budget -= sequence.chunk_len;
        }
        for sequence in &mut self.running {
            if sequence.chunk_len == 0 {
                sequence.chunk_len = sequence.left_to_compute().min(budget);
                budget -= sequence.chunk_len;
            }
        }
        budget
    }

    /// Gives every running sequence the blocks its chunk needs, the oldest first; preempts the newest where none is
    /// left. Returns how many were preempted.
    fn grow_tables(&mut self, blocks: &mut BlockManager, slots: &mut SlotManager) -> usize {
        let mut num_preempted = 0;
        let mut idx = 0;
        while let Some(sequence) = self.running.get_mut(idx) {
            let needed = (sequence.computed + sequence.chunk_len).div_ceil(self.block_tokens);
            let Some(table) = sequence.block_tables_mut().find(|table| table.len() < needed) else {
                idx += 1;
                continue;
            };
            if let Some(block) = blocks.allocate() {
                table.push(block);
            } else {
                assert!(self.running.len() > 1, "a sequence alone fits the cache");
                let mut newest = self.running.pop().expect("there are at least two");
                leave(&mut newest, blocks, slots);
                self.push_waiting(newest);
                num_preempted += 1;
            }
        }
        num_preempted
    }

    /// Moves waiting sequences to the running ones while there is room.
    fn admit(
        &mut self,
        mut budget: usize,
        blocks: &mut BlockManager,
        slots: &mut SlotManager,
        schedule: &mut Schedule,
    ) {
        let mut adapters_barred = false;
        let mut idx = 0;
        while idx < self.waiting.len() && self.running.len() < self.sequences_max && budget > 0 {
            let may_load = schedule.load.is_none();
            let place = if adapters_barred && self.waiting[idx].adapter.is_some() {
                Place::None
            } else {
                place(&self.waiting[idx], slots, may_load)
            };
            if let Place::None = place {
                let sequence = &mut self.waiting[idx];
                sequence.deferred = true;
                adapters_barred |= sequence.overtaken >= self.sequences_max;
                idx += 1;
                continue;
            }
            if !self.take_blocks(idx, blocks, schedule) {
                return;
            }
            let mut sequence = self.waiting.remove(idx).expect("the index is in range");
            sequence.slot = match place {
                Place::Base | Place::None => None,
                Place::Resident(slot) => Some(slot),
                Place::Loadable(slot) => {
                    let adapter = Arc::clone(sequence.adapter.as_ref().expect("only adapters need slots"));
                    slots.replace(slot, adapter.digest);
                    schedule.load = Some(SlotLoad { slot, adapter });
                    Some(slot)
                }
            };
            if let Some(slot) = sequence.slot {
                slots.pin(slot);
                // Whoever stands before it is deferred, or it would not have been reached.
                for passed in self.waiting.range_mut(..idx) {
                    passed.overtaken += 1;
                    adapters_barred |= passed.overtaken >= self.sequences_max;
                }
            }
            sequence.chunk_len = sequence.left_to_compute().min(budget);
            budget -= sequence.chunk_len;
            let position = self.running.partition_point(|other| other.id < sequence.id);
            self.running.insert(position, sequence);
        }
    }

    /// Gives a waiting sequence blocks for its whole context, cached ones first; `false` when it must wait for room or for
    /// another's copy of a KV prefix.
    fn take_blocks(&mut self, waiting_idx: usize, blocks: &mut BlockManager, schedule: &mut Schedule) -> bool {
        let sequence = &mut self.waiting[waiting_idx];
        let num_blocks = sequence.context_len().div_ceil(self.block_tokens);
        let prefix_blocks = sequence.prefix_blocks(self.block_tokens);
        let hits = sequence.find_prefix(blocks, self.block_tokens, self.prefix_cache);
        let headroom: usize = self.running.iter().map(Sequence::num_contexts).sum();
        let copies_prefix = hits.blocks < prefix_blocks;
        let new_blocks = sequence.num_contexts() * (num_blocks - hits.blocks);
        let has_room = blocks.available() >= hits.unreferenced + new_blocks + headroom;
        if !has_room || (copies_prefix && schedule.copies_prefix) {
            return false;
        }
        schedule.copies_prefix |= copies_prefix;
        sequence.fill_tables(blocks, hits.blocks, num_blocks);
        let cached = hits.blocks * self.block_tokens;
        sequence.to_copy = cached.min(sequence.prefix_entries)..sequence.prefix_entries;
        sequence.computed = cached.max(sequence.prefix_entries);
        sequence.num_published = hits.blocks;
        true
    }

    /// Checks every invariant, in time linear in blocks and sequences. For tests.
    pub(super) fn audit(&self, blocks: &BlockManager, slots: &SlotManager) {
        blocks.audit(self.running.iter().flat_map(Sequence::block_tables));
        slots.audit(self.running.iter().filter_map(|sequence| sequence.slot));
        assert!(self.running.len() <= self.sequences_max);
        assert!(self.running.is_sorted_by_key(|sequence| sequence.id));
        assert!(self.waiting.iter().is_sorted_by_key(|sequence| sequence.id));
        for sequence in &self.running {
            assert_eq!(sequence.slot.is_some(), sequence.adapter.is_some());
            assert_eq!(sequence.digest().and_then(|digest| slots.find(digest)), sequence.slot);
            assert!(sequence.computed <= sequence.block_table.len() * self.block_tokens);
            let needs_base = sequence.adapter.as_ref().is_some_and(|adapter| adapter.lowered.gates.is_some());
            assert_eq!(sequence.base.is_some(), needs_base);
            assert!(sequence.block_tables().all(|table| table.len() == sequence.block_table.len()));
            assert!(sequence.computed < sequence.context_len() && sequence.prefix_entries <= sequence.computed);
            assert!(sequence.to_copy.is_empty(), "a step copies what it must");
        }
        for sequence in &self.waiting {
            assert!(
                sequence.block_tables().all(<[u32]>::is_empty) && sequence.slot.is_none() && sequence.computed == 0
            );
            assert!(sequence.overtaken <= self.sequences_max, "a deferred sequence is overtaken without end");
        }
    }
}

/// Where a waiting sequence's adapter can run.
fn place(sequence: &Sequence, slots: &SlotManager, may_load: bool) -> Place {
    let Some(digest) = sequence.digest() else { return Place::Base };
    if let Some(slot) = slots.find(digest) {
        return Place::Resident(slot);
    }
    if may_load { slots.next_victim().map_or(Place::None, Place::Loadable) } else { Place::None }
}

/// Gives back what a running sequence holds.
fn leave(sequence: &mut Sequence, blocks: &mut BlockManager, slots: &mut SlotManager) {
    blocks.release(&sequence.take_blocks());
    if let Some(slot) = sequence.slot.take() {
        slots.unpin(slot);
    }
}
