//! The engine as a value: sequences go in, and each step schedules, executes and commits.
//!
//! One thread owns it ([`super::EngineHandle`]); simulations drive it directly. A step is a function of what was
//! accepted before it, so equal arrivals give equal steps.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::time::Instant;

use candle_core::Device;
use rayon::prelude::*;

use super::admission::{Admission, Submission};
use super::block_manager::BlockManager;
use super::logprobs::{InvalidLogits, token_logprob};
use super::observe::Observer;
use super::prepare::{Layout, Row, RowPurpose, prepare};
use super::scheduler::{Scheduler, SlotLoad};
use super::sequence::{End, Sequence};
use super::slot_manager::SlotManager;
use super::status::Status;
use super::{EngineConfig, FinishReason, Forward, GenerationEvent, TokenEvent, TokenLogprob};
use crate::adapter::LoadedAdapter;
use crate::metrics::Metrics;
use crate::model::{Batch, DeviceAdapter};

/// Clients see these; the log has the cause.
const STEP_FAILED: &str = "the model failed to compute this request";
const INVALID_LOGITS: &str = "the model computed invalid numbers for this request";
const COPY_FAILED: &str = "the adapter could not be copied to the device";

/// Rows with fewer logits in total are read on the engine's own thread.
const PARALLEL_LOGITS_MIN: usize = 1 << 16;

/// The engine's state. See the module.
pub struct Engine {
    forward: Box<dyn Forward>,
    config: EngineConfig,
    scheduler: Scheduler,
    blocks: BlockManager,
    slots: SlotManager,
    /// The adapter in each slot, and whose copy it is: the adapter that was last asked for with its content.
    residents: Vec<Option<Arc<DeviceAdapter>>>,
    resident_of: Vec<Weak<LoadedAdapter>>,
    observer: Observer,
    status: Arc<Status>,
    admission: Arc<Admission>,
    /// Sequences of `scheduler.waiting` that `status` knows of.
    waiting_published: usize,
    next_id: u64,
}

/// What became of one row of logits.
enum RowResult {
    Unused,
    Scored(TokenLogprob),
    Drawn(u32, Option<TokenLogprob>),
    Invalid,
}

impl Engine {
    /// An engine without sequences.
    ///
    /// # Panics
    /// When the config was not checked ([`EngineConfig::check`]) or there are no KV blocks.
    pub fn new(forward: Box<dyn Forward>, config: EngineConfig, metrics: Arc<Metrics>) -> Self {
        config.check().expect("the config is checked where it is read");
        let mut limits = forward.limits();
        assert!(limits.num_blocks > 0 && limits.vocab_size > 0, "the model has a vocabulary and a cache");
        // With this bound every sequence alone fits the cache, so the oldest can always go on.
        limits.context_tokens_max = limits.context_tokens_max.min(limits.num_blocks * config.block_tokens);
        let status = Arc::new(Status::default());
        let observer = Observer::new(Arc::clone(&metrics), &config, &limits, &status);
        let admission = Arc::new(Admission::new(limits, &config, Arc::clone(&status), metrics));
        Self {
            forward,
            scheduler: Scheduler::new(&config, config.step_tokens(limits.step_tokens)),
            blocks: BlockManager::new(limits.num_blocks),
            slots: SlotManager::new(config.adapter_slots),
            residents: vec![None; config.adapter_slots],
            resident_of: std::iter::repeat_with(Weak::new).take(config.adapter_slots).collect(),
            observer,
            status,
            admission,
            waiting_published: 0,
            next_id: 0,
            config,
        }
    }

    /// The door to this engine.
    pub fn admission(&self) -> Arc<Admission> {
        Arc::clone(&self.admission)
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.scheduler.len() == 0
    }

    /// Takes in an admitted request; it waits until a step schedules it.
    pub fn accept(&mut self, submission: Submission) {
        let mut sequence = *submission.0;
        sequence.id = self.next_id;
        self.next_id += 1;
        self.scheduler.push_waiting(sequence);
        // The door counted it already.
        self.waiting_published += 1;
    }

    /// One step: drop what was cancelled, schedule, execute, commit. Does nothing when idle.
    pub fn step(&mut self) {
        if self.is_idle() {
            return;
        }
        let started = Instant::now();
        let num_sequences = self.scheduler.len();
        self.end_left();
        self.release_departed();
        let scheduled = self.schedule();
        let some_ended = self.scheduler.len() < num_sequences;
        assert!(some_ended || !scheduled.is_empty(), "a step brings some sequence further");
        self.publish();
        if !scheduled.is_empty() {
            let layout =
                Layout { block_tokens: self.config.block_tokens, residents: &self.residents, blocks: &self.blocks };
            let (batch, rows) = prepare(&self.scheduler.running, &scheduled, &layout);
            match self.execute(&batch, &rows) {
                Some(results) => self.commit(&scheduled, &rows, results),
                None => self.end_all(&scheduled, End::Failed(STEP_FAILED)),
            }
            self.sweep();
            self.observer.stepped(batch.token_ids.len(), started.elapsed());
            self.publish();
        }
    }

    /// Empties the slots of adapters that nobody holds any more: what left the host's memory leaves the device's. Between steps
    /// too, when idle; answers whether slots are still held.
    pub fn tidy(&mut self) -> bool {
        if self.release_departed() {
            self.publish();
        }
        self.residents.iter().any(Option::is_some)
    }

    /// Ends every sequence and tells its client why.
    pub fn shut_down(&mut self) {
        for sequence in self.scheduler.running.iter_mut().chain(&mut self.scheduler.waiting) {
            sequence.end = Some(End::ShutDown);
        }
        self.sweep();
        self.publish();
    }

    /// KV blocks that sequences refer to; cached ones that nobody refers to are not counted.
    pub fn blocks_in_use(&self) -> usize {
        self.blocks.in_use()
    }

    /// Checks every invariant of the accounting, in time linear in its size. For tests.
    pub fn audit(&self) {
        self.scheduler.audit(&self.blocks, &self.slots);
        assert_eq!(self.waiting_published, self.scheduler.waiting.len());
    }

    /// Ends the sequences whose receivers were dropped, waiting ones included.
    fn end_left(&mut self) {
        let mut any = false;
        for sequence in self.scheduler.running.iter_mut().chain(&mut self.scheduler.waiting) {
            if let Some(end) = sequence.client_end() {
                sequence.end = Some(end);
                any = true;
            }
        }
        if any {
            self.sweep();
        }
    }

    /// Empties the slots whose adapters are gone; answers whether there were any.
    fn release_departed(&mut self) -> bool {
        let mut any = false;
        for slot in 0..self.residents.len() {
            // Sequences hold their adapter, so a slot in use stays.
            let departed = self.residents[slot].is_some() && self.resident_of[slot].strong_count() == 0;
            if departed && self.slots.is_unpinned(slot) {
                self.slots.vacate(slot);
                self.residents[slot] = None;
                any = true;
            }
        }
        any
    }

    /// Decides the step and brings the adapter it wants to the device; returns running indexes in batch order.
    fn schedule(&mut self) -> Vec<usize> {
        let schedule = self.scheduler.schedule(&mut self.blocks, &mut self.slots);
        self.observer.preempted(schedule.num_preempted);
        let now = Instant::now();
        for sequence in self.scheduler.running.iter_mut().filter(|sequence| sequence.times.scheduled.is_none()) {
            sequence.times.scheduled = Some(now);
            sequence.cached_tokens = Some(sequence.computed.saturating_sub(sequence.leading));
            if let (Some(slot), Some(adapter)) = (sequence.slot, &sequence.adapter) {
                self.resident_of[slot] = Arc::downgrade(adapter);
            }
            let queried = self.config.prefix_cache && sequence.prompt_logprobs.is_none();
            self.observer.scheduled(sequence, if queried { sequence.prompt_len } else { 0 });
        }
        if let Some(load) = schedule.load {
            self.load(&load);
        }
        self.scheduler.scheduled()
    }

    /// Copies an adapter to its slot. When that fails, the sequences that came in on it fail.
    fn load(&mut self, load: &SlotLoad) {
        // The old copy leaves first: there is memory for as many copies as slots.
        self.residents[load.slot] = None;
        // Nothing that a panic could leave half-changed is used again: the copy is dropped.
        let copy = catch_unwind(AssertUnwindSafe(|| self.forward.adapter_to_device(&load.adapter.lowered)));
        match copy {
            Ok(Ok(lowered)) => {
                self.residents[load.slot] = Some(Arc::new(lowered));
                self.resident_of[load.slot] = Arc::downgrade(&load.adapter);
                self.observer.adapter_copied();
                return;
            }
            Ok(Err(error)) => {
                tracing::error!(adapter = load.adapter.name, %error, "copying an adapter to the device failed");
            }
            Err(_) => tracing::error!(adapter = load.adapter.name, "copying an adapter to the device panicked"),
        }
        for sequence in self.scheduler.running.iter_mut().filter(|sequence| sequence.slot == Some(load.slot)) {
            sequence.end = Some(End::Failed(COPY_FAILED));
        }
        self.sweep();
        self.slots.vacate(load.slot);
    }

    /// Runs the model and reads its logits; `None` when it failed.
    fn execute(&mut self, batch: &Batch, rows: &[Row]) -> Option<Vec<RowResult>> {
        let shape = (rows.len(), self.admission.limits().vocab_size);
        // Safe to go on after a panic: a step writes KV slots of its own sequences only, and those end.
        let logits = catch_unwind(AssertUnwindSafe(|| {
            let logits = self.forward.forward(batch)?;
            if logits.dims2()? != shape {
                candle_core::bail!("logits of shape {:?}, expected {shape:?}", logits.shape());
            }
            logits.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()
        }));
        match logits {
            Ok(Ok(mut logits)) => Some(read_rows(&self.scheduler.running, rows, &mut logits, shape.1)),
            Ok(Err(error)) => {
                tracing::error!(%error, sequences = batch.spans.len(), "a step failed");
                None
            }
            Err(_) => {
                tracing::error!(sequences = batch.spans.len(), "a step panicked");
                None
            }
        }
    }

    /// Books what the step computed: KV blocks, scores, tokens, ends.
    fn commit(&mut self, scheduled: &[usize], rows: &[Row], results: Vec<RowResult>) {
        for &running_idx in scheduled {
            let sequence = &mut self.scheduler.running[running_idx];
            sequence.computed += sequence.chunk_len;
            sequence.to_copy = 0..0;
            publish_blocks(sequence, &mut self.blocks, &self.config);
        }
        let mut drawn = Vec::new();
        for (row, result) in rows.iter().zip(results) {
            let sequence = &mut self.scheduler.running[row.running_idx];
            match result {
                RowResult::Unused => {}
                RowResult::Scored(score) => sequence.push_prompt_score(score),
                RowResult::Drawn(token, logprob) => drawn.push((row.running_idx, token, logprob)),
                RowResult::Invalid => sequence.end = Some(End::Failed(INVALID_LOGITS)),
            }
        }
        for &running_idx in scheduled {
            self.commit_prompt(running_idx);
        }
        let now = Instant::now();
        for (running_idx, token, logprob) in drawn {
            let sequence = &mut self.scheduler.running[running_idx];
            if sequence.end.is_none() {
                sequence.end = sequence.push_token(token).map(End::Finished);
                self.observer.token(sequence, now);
                let cached_tokens = sequence.cached_tokens.unwrap_or(0);
                sequence.send(GenerationEvent::Token(TokenEvent { id: token, logprob, cached_tokens }));
            }
        }
    }

    /// Reports a prompt that this step completed for the first time; ends a sequence that wanted no more.
    fn commit_prompt(&mut self, running_idx: usize) {
        let sequence = &mut self.scheduler.running[running_idx];
        let is_complete = sequence.computed == sequence.context_len() && sequence.generated() == 0;
        if is_complete && sequence.end.is_none() {
            self.observer.prompt_computed(sequence);
            sequence.report_prompt();
            if sequence.max_tokens == 0 {
                sequence.end = Some(End::Finished(FinishReason::Length));
            }
        }
    }

    fn end_all(&mut self, scheduled: &[usize], end: End) {
        for &running_idx in scheduled {
            self.scheduler.running[running_idx].end = Some(end);
        }
    }

    /// Lets go of the sequences that ended, then tells their clients.
    fn sweep(&mut self) {
        for sequence in self.scheduler.take_ended(&mut self.blocks, &mut self.slots) {
            let end = sequence.end.expect("only ended sequences are taken");
            self.observer.ended(&sequence, end);
            sequence.send_end(end);
        }
    }

    fn publish(&mut self) {
        let waiting = self.scheduler.waiting.len();
        self.status.waiting_changed(self.waiting_published, waiting);
        self.waiting_published = waiting;
        let held = self.residents.iter().zip(&self.resident_of).filter(|(resident, _)| resident.is_some());
        let resident: Vec<_> = held.filter_map(|(_, adapter)| adapter.upgrade()).collect();
        // A composition has no name that anyone could ask for.
        let names = resident.iter().filter(|adapter| adapter.parts.is_empty()).map(|adapter| adapter.name.as_str());
        self.observer.publish(&self.scheduler, &self.blocks, names, &self.status);
    }
}

/// Offers the sequence's newly filled blocks to the prefix cache; where that is off, those of its KV prefix only.
fn publish_blocks(sequence: &mut Sequence, blocks: &mut BlockManager, config: &EngineConfig) {
    let block_tokens = config.block_tokens;
    let num_full =
        if config.prefix_cache { sequence.computed / block_tokens } else { sequence.prefix_blocks(block_tokens) };
    if num_full <= sequence.num_published {
        return;
    }
    sequence.publish(blocks, num_full, block_tokens);
}

/// Reads every row of `logits`; in parallel when there is enough to do.
fn read_rows(running: &[Sequence], rows: &[Row], logits: &mut [f32], vocab_size: usize) -> Vec<RowResult> {
    let read = |(row, logits): (&Row, &mut [f32])| read_row(&running[row.running_idx], row.purpose, logits);
    if logits.len() < PARALLEL_LOGITS_MIN {
        rows.iter().zip(logits.chunks_exact_mut(vocab_size)).map(read).collect()
    } else {
        rows.par_iter().zip(logits.par_chunks_exact_mut(vocab_size)).map(read).collect()
    }
}

fn read_row(sequence: &Sequence, purpose: RowPurpose, logits: &mut [f32]) -> RowResult {
    let result = match purpose {
        RowPurpose::Unused => Ok(RowResult::Unused),
        RowPurpose::ScorePrompt(token) => {
            token_logprob(logits, token, sequence.prompt_logprobs.unwrap_or(0)).map(RowResult::Scored)
        }
        RowPurpose::Draw => draw(sequence, logits),
    };
    result.unwrap_or(RowResult::Invalid)
}

fn draw(sequence: &Sequence, logits: &mut [f32]) -> Result<RowResult, InvalidLogits> {
    let Some(num_top) = sequence.logprobs else {
        return Ok(RowResult::Drawn(sequence.sampler.sample(logits, sequence.generated())?, None));
    };
    let unmodified = logits.to_vec();
    let token = sequence.sampler.sample(logits, sequence.generated())?;
    Ok(RowResult::Drawn(token, Some(token_logprob(&unmodified, token, num_top)?)))
}
