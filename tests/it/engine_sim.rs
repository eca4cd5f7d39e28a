//! Seeded simulation of the engine over a fake model whose every mistake of accounting shows as a wrong token.
//!
//! The fake's logits are a hash of the whole context as read back through the block table: tokens (virtual ones and copied
//! entries too), adapter and RoPE regime as they were written to the KV slots. Whoever reads a slot of another context, adapter or regime, or one
//! overwritten too early, gets other tokens than alone. Engines are stepped directly: no threads, no time.

#![allow(clippy::unwrap_used, reason = "a test stops at any surprise")]

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use candle_core::{Device, Result, Tensor};
use patchbay::adapter::{GateNetwork, GateRule, KvPrefix, LoadedAdapter, LoweredAdapter, NormOverride, SiteId};
use patchbay::engine::{
    Engine, EngineConfig, EngineHandle, Finish, FinishReason, Forward, ForwardLimits, GenerationEvent,
    GenerationRequest, SamplingParams, SubmitError, TokenLogprob,
};
use patchbay::metrics::{Metrics, MetricsConfig};
use patchbay::model::{Batch, DeviceAdapter, RopeLengthRule};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tokio::sync::mpsc::Receiver;
use tokio::sync::mpsc::error::TryRecvError;

const VOCAB: usize = 32;

/// What the fake should do wrong in its next call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Fault {
    #[default]
    None,
    Error,
    Panic,
    Nan,
    Copy,
    CopyPanic,
}

/// What the fake tells the test, and the test the fake.
#[derive(Default)]
struct Probe {
    fault: Mutex<Fault>,
    copies: AtomicUsize,
    tokens: AtomicUsize,
    /// Entries of KV prefixes copied.
    entries: AtomicUsize,
}

impl Probe {
    fn set_fault(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    /// The fault, if it is one of `kinds`; it happens once.
    fn take_fault(&self, kinds: &[Fault]) -> Fault {
        let mut fault = self.fault.lock().unwrap();
        if kinds.contains(&fault) { std::mem::take(&mut *fault) } else { Fault::None }
    }
}

/// Content of one KV slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Written {
    /// A token, or `VOCAB` and the row of a virtual token, or twice that and a copied entry.
    token: u32,
    position: u32,
    adapter: Option<usize>,
    regime: u64,
    /// Hash of the bare base's context up to here, where the adapter takes its gates from it.
    gate: u64,
}

struct FakeModel {
    limits: ForwardLimits,
    block_tokens: usize,
    slots: Vec<Option<Written>>,
    probe: Arc<Probe>,
}

impl FakeModel {
    fn new(limits: ForwardLimits, block_tokens: usize, probe: Arc<Probe>) -> Self {
        Self { limits, block_tokens, slots: vec![None; limits.num_blocks * block_tokens], probe }
    }

    /// The adapter of each token. Checks that segments tile the tokens and that equal adapters adjoin, but for the tokens
    /// of adapters that can be asleep.
    fn adapters(batch: &Batch) -> Vec<Option<usize>> {
        let mut adapters = Vec::new();
        let mut seen = HashSet::new();
        for segment in &batch.segments {
            assert_eq!(segment.start, adapters.len());
            assert!(segment.len > 0);
            let adapter = segment.adapter.as_deref().map(adapter_id);
            let may_repeat = adapter.is_none_or(|id| !lead(id).invocation.is_empty());
            assert!(seen.insert(adapter) || may_repeat, "adapter {adapter:?} has two segments");
            adapters.extend(std::iter::repeat_n(adapter, segment.len));
        }
        assert_eq!(adapters.len(), batch.token_ids.len());
        adapters
    }

    /// Each token's gate, and zero for tokens without one. The base's pass must hold the tokens that need one, in order.
    fn gates(&mut self, batch: &Batch, adapters: &[Option<usize>]) -> Vec<u64> {
        let gated: Vec<usize> = (0..adapters.len()).filter(|idx| adapters[*idx] == Some(GATED)).collect();
        let mut gates = vec![0; adapters.len()];
        assert_eq!(batch.gate_pass.is_some(), !gated.is_empty(), "there is a pass where it is needed");
        let Some(pass) = &batch.gate_pass else { return gates };
        let pick = |values: &[u32]| gated.iter().map(|idx| values[*idx]).collect::<Vec<u32>>();
        assert_eq!(pass.token_ids, pick(&batch.token_ids));
        assert_eq!(pass.positions, pick(&batch.positions));
        assert_eq!(pass.rope_lens, pick(&batch.rope_lens));
        assert!(pass.slot_mapping.iter().all(|slot| !batch.slot_mapping.contains(slot)), "contexts share no slot");
        let bare = vec![None; gated.len()];
        assert_eq!(Self::adapters(pass), bare);
        self.write(pass, &bare, &vec![0; gated.len()]);
        let mut next = 0;
        for span in &pass.spans {
            for idx in span.start..span.start + span.len {
                gates[gated[idx]] = self.read(&span.block_table, pass.positions[idx] as usize, None);
            }
            next += span.len;
        }
        assert_eq!(next, gated.len());
        gates
    }

    fn write(&mut self, batch: &Batch, adapters: &[Option<usize>], gates: &[u64]) {
        let copied: Vec<u32> = batch.prefix_writes.iter().flat_map(|write| write.slots.clone()).collect();
        let distinct: HashSet<_> = batch.slot_mapping.iter().chain(&copied).collect();
        assert_eq!(distinct.len(), batch.slot_mapping.len() + copied.len(), "two tokens are written to one slot");
        self.probe.entries.fetch_add(copied.len(), Ordering::SeqCst);
        for write in &batch.prefix_writes {
            let id = adapter_id(&write.adapter);
            assert!(write.first_entry + write.slots.len() <= lead(id).entries);
            for (entry, &slot) in (write.first_entry as u32..).zip(&write.slots) {
                let token = 2 * VOCAB as u32 + entry;
                self.slots[slot as usize] =
                    Some(Written { token, position: entry, adapter: Some(id), regime: 0, gate: 0 });
            }
        }
        let mut virtual_rows = HashMap::new();
        for run in &batch.virtual_runs {
            for (idx, row) in (run.start..run.start + run.len).zip(run.first_row..) {
                assert!(row < lead(adapter_id(&run.adapter)).virtual_tokens);
                assert_eq!(adapters[idx], Some(adapter_id(&run.adapter)));
                assert!(virtual_rows.insert(idx, row).is_none());
            }
        }
        for (idx, &slot) in batch.slot_mapping.iter().enumerate() {
            self.slots[slot as usize] = Some(Written {
                token: virtual_rows.get(&idx).map_or(batch.token_ids[idx], |row| (VOCAB + row) as u32),
                position: batch.positions[idx],
                adapter: adapters[idx],
                regime: self.limits.rope_length_rule.regime(batch.rope_lens[idx] as usize),
                gate: gates[idx],
            });
        }
    }

    /// Hash of the context up to `position`, read back through the block table.
    fn read(&self, block_table: &[u32], position: usize, adapter: Option<usize>) -> u64 {
        let mut hash = mix(adapter.map_or(0, |adapter| adapter as u64 + 1));
        let mut regimes = HashSet::new();
        for idx in 0..=position {
            let slot = block_table[idx / self.block_tokens] as usize * self.block_tokens + idx % self.block_tokens;
            let written = self.slots[slot].expect("a slot is read before it is written");
            assert_eq!(written.position as usize, idx, "a slot of another position is read");
            let was_asleep = written.adapter.is_none() && adapter.is_some_and(|id| !lead(id).invocation.is_empty());
            assert!(written.adapter == adapter || was_asleep, "a slot of another adapter is read");
            let id = written.adapter.map_or(0, |id| id as u64 + 1);
            hash = mix(hash ^ u64::from(written.token) ^ (written.regime << 32) ^ (id << 16) ^ written.gate);
            if (written.token as usize) < 2 * VOCAB {
                regimes.insert(written.regime);
            }
        }
        let is_switch = matches!(self.limits.rope_length_rule, RopeLengthRule::Switch { .. });
        assert!(!is_switch || regimes.len() == 1, "a context mixes two sets of frequencies");
        hash
    }
}

impl Forward for FakeModel {
    fn limits(&self) -> ForwardLimits {
        self.limits
    }

    fn forward(&mut self, batch: &Batch) -> Result<Tensor> {
        self.probe.tokens.fetch_add(batch.token_ids.len(), Ordering::SeqCst);
        let adapters = Self::adapters(batch);
        let gates = self.gates(batch, &adapters);
        self.write(batch, &adapters, &gates);
        let fault = self.probe.take_fault(&[Fault::Error, Fault::Panic, Fault::Nan]);
        match fault {
            Fault::Error => candle_core::bail!("injected"),
            Fault::Panic => panic!("injected"),
            _ => {}
        }
        assert!(batch.logit_rows.is_sorted() && !batch.logit_rows.is_empty());
        let mut logits = Vec::new();
        let mut next_token = 0;
        for span in &batch.spans {
            assert_eq!(span.start, next_token, "spans tile the tokens");
            next_token += span.len;
            assert_eq!(batch.positions[next_token - 1] as usize, span.context_len - 1);
            for row in
                batch.logit_rows.iter().map(|row| *row as usize).filter(|row| (span.start..next_token).contains(row))
            {
                let hash = self.read(&span.block_table, batch.positions[row] as usize, adapters[row]);
                logits.extend((0..VOCAB as u64).map(|token| unit(mix(hash ^ mix(token))) * 8.0));
            }
        }
        assert_eq!(next_token, batch.token_ids.len());
        assert_eq!(logits.len(), batch.logit_rows.len() * VOCAB);
        if fault == Fault::Nan {
            logits[0] = f32::NAN;
        }
        Tensor::from_vec(logits, (batch.logit_rows.len(), VOCAB), &Device::Cpu)
    }

    fn adapter_to_device(&self, adapter: &LoweredAdapter) -> Result<DeviceAdapter> {
        self.probe.copies.fetch_add(1, Ordering::SeqCst);
        match self.probe.take_fault(&[Fault::Copy, Fault::CopyPanic]) {
            Fault::Copy => candle_core::bail!("injected"),
            Fault::CopyPanic => panic!("injected"),
            _ => Ok(DeviceAdapter::from_tensors(adapter.clone())),
        }
    }
}

/// One round of splitmix64.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A number in [0, 1).
fn unit(hash: u64) -> f32 {
    (hash >> 40) as f32 / (1_u64 << 24) as f32
}

/// What a fake adapter puts before the prompt, and what wakes it.
#[derive(Default)]
struct Lead {
    entries: usize,
    virtual_tokens: usize,
    invocation: &'static [u32],
}

fn lead(id: usize) -> Lead {
    match id {
        VIRTUAL => Lead { virtual_tokens: 3, ..Lead::default() },
        PREFIX => Lead { entries: 9, ..Lead::default() },
        BOTH => Lead { entries: 4, virtual_tokens: 2, ..Lead::default() },
        ASLEEP => Lead { invocation: &[15, 22], ..Lead::default() },
        _ => Lead::default(),
    }
}

const VIRTUAL: usize = 3;
const PREFIX: usize = 4;
const BOTH: usize = 5;
const ASLEEP: usize = 6;
const GATED: usize = 7;

fn adapter_id(adapter: &DeviceAdapter) -> usize {
    adapter.tensors.norms.keys().next().unwrap().0
}

fn adapter(id: usize) -> Arc<LoadedAdapter> {
    let mut lowered = LoweredAdapter::default();
    lowered.norms.insert(SiteId(id), NormOverride::default());
    let rows = |count: usize| Tensor::zeros((count, 1), candle_core::DType::F32, &Device::Cpu).unwrap();
    let Lead { entries, virtual_tokens, invocation } = lead(id);
    lowered.virtual_tokens = (virtual_tokens > 0).then(|| rows(virtual_tokens));
    lowered.kv_prefix = (entries > 0).then(|| KvPrefix { layers: vec![(rows(entries), rows(entries))] });
    lowered.invocation_tokens = invocation.to_vec();
    lowered.gates = (id == GATED).then(|| GateNetwork { layers: Vec::new(), group: 1, rule: GateRule::default() });
    let digest = [id as u8; 32];
    Arc::new(LoadedAdapter {
        name: format!("adapter-{id}"),
        generation: 1,
        digest,
        lowered,
        bytes: 0,
        parts: Vec::new(),
    })
}

fn request(prompt: Vec<u32>, max_tokens: usize) -> GenerationRequest {
    GenerationRequest {
        prompt,
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

fn with_adapter(prompt: Vec<u32>, max_tokens: usize, id: usize) -> GenerationRequest {
    GenerationRequest { adapter: Some(adapter(id)), ..request(prompt, max_tokens) }
}

/// Everything a request received.
#[derive(Clone, Debug, Default, PartialEq)]
struct Outcome {
    prompt: Option<Vec<Option<TokenLogprob>>>,
    tokens: Vec<(u32, Option<TokenLogprob>)>,
    finish: Option<Finish>,
    failed: Option<String>,
}

impl Outcome {
    fn has_ended(&self) -> bool {
        self.finish.is_some() || self.failed.is_some()
    }

    fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|(id, _)| *id).collect()
    }

    /// Takes in an event; checks the order that the border promises.
    fn take(&mut self, event: GenerationEvent) {
        assert!(!self.has_ended(), "an event after the end: {event:?}");
        match event {
            GenerationEvent::Prompt(scores) => {
                assert!(self.prompt.is_none() && self.tokens.is_empty());
                self.prompt = Some(scores);
            }
            GenerationEvent::Token(token) => self.tokens.push((token.id, token.logprob)),
            GenerationEvent::Finished(finish) => {
                assert_eq!(finish.generated_tokens, self.tokens.len());
                self.finish = Some(finish);
            }
            GenerationEvent::Failed(message) => self.failed = Some(message),
        }
    }

    /// Without what a shared cache may change.
    fn apart_from_cache(mut self) -> Self {
        if let Some(finish) = &mut self.finish {
            finish.cached_tokens = 0;
        }
        self
    }
}

/// Sizes of a simulated world.
#[derive(Clone, Copy, Debug)]
struct World {
    num_blocks: usize,
    context_tokens_max: usize,
    rope_length_rule: RopeLengthRule,
    block_tokens: usize,
    sequences_max: usize,
    step_tokens_max: usize,
    queue_max: usize,
    adapter_slots: usize,
    prefix_cache: bool,
}

const ROOMY: World = World {
    num_blocks: 256,
    context_tokens_max: 128,
    rope_length_rule: RopeLengthRule::Fixed,
    block_tokens: 4,
    sequences_max: 8,
    step_tokens_max: 64,
    queue_max: 64,
    adapter_slots: 4,
    prefix_cache: false,
};

impl World {
    fn limits(&self) -> ForwardLimits {
        ForwardLimits {
            vocab_size: VOCAB,
            context_tokens_max: self.context_tokens_max,
            num_blocks: self.num_blocks,
            rope_length_rule: self.rope_length_rule,
        }
    }

    fn config(&self) -> EngineConfig {
        EngineConfig {
            sequences_max: self.sequences_max,
            step_tokens_max: self.step_tokens_max,
            block_tokens: self.block_tokens,
            kv_cache_bytes: 0,
            queue_max: self.queue_max,
            adapter_slots: self.adapter_slots,
            prefix_cache: self.prefix_cache,
        }
    }

    fn model(&self, probe: &Arc<Probe>) -> Box<dyn Forward> {
        Box::new(FakeModel::new(self.limits(), self.block_tokens, Arc::clone(probe)))
    }

    /// The longest context that model and cache can hold of a request.
    fn context(&self, request: &GenerationRequest) -> usize {
        let contexts = request.adapter.as_ref().map_or(1, |adapter| adapter.lowered.num_contexts());
        self.context_tokens_max.min(self.num_blocks / contexts * self.block_tokens)
    }
}

fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new("fake", &MetricsConfig::default()))
}

/// A stepped engine and what its requests received.
struct Sim {
    engine: Engine,
    probe: Arc<Probe>,
    metrics: Arc<Metrics>,
    receivers: Vec<Option<Receiver<GenerationEvent>>>,
    outcomes: Vec<Outcome>,
}

impl Sim {
    fn new(world: &World) -> Self {
        let probe = Arc::new(Probe::default());
        let metrics = metrics();
        let engine = Engine::new(world.model(&probe), world.config(), Arc::clone(&metrics));
        Self { engine, probe, metrics, receivers: Vec::new(), outcomes: Vec::new() }
    }

    fn submit(&mut self, request: GenerationRequest) -> std::result::Result<usize, SubmitError> {
        let (submission, receiver) = self.engine.admission().admit(request)?;
        self.engine.accept(submission);
        self.receivers.push(Some(receiver));
        self.outcomes.push(Outcome::default());
        Ok(self.outcomes.len() - 1)
    }

    fn cancel(&mut self, idx: usize) {
        self.receivers[idx] = None;
    }

    fn is_live(&self, idx: usize) -> bool {
        self.receivers[idx].is_some() && !self.outcomes[idx].has_ended()
    }

    /// One step, with every check that holds after any step.
    fn step(&mut self) {
        self.probe.copies.store(0, Ordering::SeqCst);
        self.engine.step();
        assert!(self.probe.copies.load(Ordering::SeqCst) <= 1, "one step copies one adapter at most");
        self.engine.audit();
        for (receiver, outcome) in self.receivers.iter_mut().zip(&mut self.outcomes) {
            let Some(events) = receiver else { continue };
            loop {
                match events.try_recv() {
                    Ok(event) => outcome.take(event),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        assert!(outcome.has_ended(), "a channel closed without an end");
                        break;
                    }
                }
            }
        }
    }

    fn run(&mut self) {
        let mut steps_left = 100_000;
        while !self.engine.is_idle() {
            self.step();
            steps_left -= 1;
            assert!(steps_left > 0, "the engine does not come to an end");
        }
        assert_eq!(self.engine.blocks_in_use(), 0, "blocks leak");
        for idx in 0..self.outcomes.len() {
            assert!(!self.is_live(idx), "request {idx} did not end");
        }
    }
}

/// What a request gets with the machine to itself.
fn alone(world: &World, request: &GenerationRequest) -> Outcome {
    let roomy = World { context_tokens_max: world.context(request), rope_length_rule: world.rope_length_rule, ..ROOMY };
    let mut sim = Sim::new(&roomy);
    sim.submit(request.clone()).unwrap();
    sim.run();
    sim.outcomes.remove(0)
}

fn random_world(rng: &mut StdRng) -> World {
    let block_tokens = *[1, 2, 4, 8].choose(rng).unwrap();
    let sequences_max = rng.random_range(1..6);
    World {
        // From less than one full context to several.
        num_blocks: rng.random_range(16..96) / block_tokens,
        context_tokens_max: 48,
        rope_length_rule: *[
            RopeLengthRule::Fixed,
            RopeLengthRule::Switch { threshold: 14 },
            RopeLengthRule::Dynamic { threshold: 14 },
        ]
        .choose(rng)
        .unwrap(),
        block_tokens,
        sequences_max,
        step_tokens_max: sequences_max + rng.random_range(0..12),
        queue_max: rng.random_range(1..12),
        adapter_slots: rng.random_range(1..4),
        prefix_cache: rng.random_bool(0.8),
    }
}

fn random_request(rng: &mut StdRng) -> GenerationRequest {
    // Few distinct openings, so that prefixes are shared.
    let opening = rng.random_range(0..3);
    let mut prompt: Vec<u32> = (0..rng.random_range(0..16)).map(|idx| (idx * 7 + opening) % VOCAB as u32).collect();
    prompt.extend((0..rng.random_range(1..6)).map(|_| rng.random_range(0..VOCAB as u32)));
    let sampling = SamplingParams {
        temperature: *[0.0, 0.7, 1.5].choose(rng).unwrap(),
        top_k: *[None, Some(5)].choose(rng).unwrap(),
        top_p: *[1.0, 0.8].choose(rng).unwrap(),
        repetition_penalty: *[1.0, 1.3].choose(rng).unwrap(),
        frequency_penalty: *[0.0, 0.5].choose(rng).unwrap(),
        seed: Some(rng.random()),
        ..SamplingParams::default()
    };
    let id = rng.random_range(0..8_usize);
    GenerationRequest {
        adapter: (id > 0).then(|| adapter(id)),
        sampling,
        stop_token_ids: vec![3],
        ignore_eos: rng.random_bool(0.3),
        logprobs: *[None, Some(2)].choose(rng).unwrap(),
        prompt_logprobs: *[None, None, None, Some(1)].choose(rng).unwrap(),
        cache_salt: [None, None, Some("tenant".to_owned())].choose(rng).unwrap().clone(),
        ..request(prompt, rng.random_range(0..20))
    }
}

/// Counts over simulations: what a run must have met to prove anything.
#[derive(Debug, Default)]
struct Met {
    finished: usize,
    cancelled: usize,
    failed: usize,
    refused: usize,
    preempted: u64,
    cached: u64,
    copies: u64,
    entries: usize,
}

/// One world with random arrivals, cancels and (maybe) faults; every request must end as it would alone.
fn simulate(seed: u64, faults: &[Fault], met: &mut Met) {
    let mut rng = StdRng::seed_from_u64(seed);
    let world = random_world(&mut rng);
    let mut sim = Sim::new(&world);
    let mut requests = Vec::new();
    let mut num_faults = 0;
    let arrival = rng.random_range(0.1..0.9);
    while requests.len() < 40 {
        while rng.random_bool(arrival) {
            let request = random_request(&mut rng);
            match sim.submit(request.clone()) {
                Ok(_) => requests.push(request),
                Err(error) => {
                    assert!(matches!(error, SubmitError::QueueFull { .. } | SubmitError::PromptTooLong { .. }));
                    met.refused += 1;
                    break;
                }
            }
        }
        if !requests.is_empty() && rng.random_bool(0.1) {
            sim.cancel(rng.random_range(0..requests.len()));
        }
        if !faults.is_empty() && rng.random_bool(0.05) {
            sim.probe.set_fault(*faults.choose(&mut rng).unwrap());
            num_faults += 1;
        }
        sim.step();
    }
    sim.run();
    for (idx, request) in requests.iter().enumerate() {
        let expected = alone(&world, request).apart_from_cache();
        let outcome = sim.outcomes[idx].clone().apart_from_cache();
        if outcome.finish.is_some() {
            assert_eq!(outcome, expected, "seed {seed}, request {idx}: {request:?}\nin {world:?}");
            met.finished += 1;
        } else {
            assert!(expected.tokens.starts_with(&outcome.tokens), "seed {seed}, request {idx}: {request:?}");
            assert!(outcome.failed.is_none() || num_faults > 0);
            assert!(outcome.failed.is_some() || sim.receivers[idx].is_none());
            met.failed += usize::from(outcome.failed.is_some());
            met.cancelled += usize::from(outcome.failed.is_none());
        }
    }
    met.preempted += sim.metrics.preemptions.get();
    met.cached += sim.metrics.prefix_cache_hits.get();
    met.copies += sim.metrics.adapter_slot_copies.get();
    met.entries += sim.probe.entries.load(Ordering::SeqCst);
    assert_eq!(sim.metrics.requests_running.get(), 0);
    assert_eq!(sim.metrics.requests_waiting.get(), 0);
}

#[test]
fn every_request_ends_as_it_would_alone() {
    let mut met = Met::default();
    for seed in 0..150 {
        simulate(seed, &[], &mut met);
    }
    assert_eq!(met.failed, 0);
    assert!(met.finished > 1000 && met.cancelled > 50 && met.refused > 50, "{met:?}");
    assert!(met.preempted > 50 && met.cached > 500 && met.copies > 500 && met.entries > 2000, "{met:?}");
}

#[test]
fn faults_end_only_the_requests_they_hit() {
    let faults = [Fault::Error, Fault::Panic, Fault::Nan, Fault::Copy, Fault::CopyPanic];
    let mut met = Met::default();
    for seed in 1000..1060 {
        simulate(seed, &faults, &mut met);
    }
    assert!(met.finished > 500 && met.failed > 50, "{met:?}");
}

/// Runs one request in a roomy world.
fn run_alone(request: &GenerationRequest) -> Outcome {
    alone(&ROOMY, request)
}

fn prompt(len: u32) -> Vec<u32> {
    (0..len).map(|idx| (idx * 5 + 1) % VOCAB as u32).collect()
}

fn finish(outcome: &Outcome) -> (FinishReason, usize) {
    let finish = outcome.finish.unwrap_or_else(|| panic!("not finished: {outcome:?}"));
    (finish.reason, finish.generated_tokens)
}

#[test]
fn prompt_logprobs_are_equal_however_the_prompt_is_cut() {
    let request = GenerationRequest { prompt_logprobs: Some(2), ..request(prompt(23), 2) };
    let whole = run_alone(&request);
    let scores = whole.prompt.clone().unwrap();
    assert_eq!(scores.len(), 23);
    assert!(scores[0].is_none() && scores[1..].iter().all(|score| score.as_ref().unwrap().top.len() == 2));
    for step_tokens_max in [1, 2, 5, 22] {
        let world = World { sequences_max: 1, step_tokens_max, ..ROOMY };
        let mut sim = Sim::new(&world);
        sim.submit(request.clone()).unwrap();
        sim.run();
        assert_eq!(sim.outcomes[0], whole, "{step_tokens_max} tokens per step");
    }
}

#[test]
fn zero_max_tokens_only_scores_the_prompt() {
    let silent = run_alone(&request(prompt(9), 0));
    assert_eq!(finish(&silent), (FinishReason::Length, 0));
    assert!(silent.prompt.is_none());
    let scored = run_alone(&GenerationRequest { prompt_logprobs: Some(0), ..request(prompt(9), 0) });
    assert_eq!(finish(&scored), (FinishReason::Length, 0));
    assert_eq!(scored.prompt.unwrap().len(), 9);
}

#[test]
fn a_prompt_of_one_token_has_one_empty_score() {
    let scored = run_alone(&GenerationRequest { prompt_logprobs: Some(3), ..request(vec![4], 1) });
    assert_eq!(scored.prompt, Some(vec![None]));
}

#[test]
fn generated_logprobs_name_the_drawn_token() {
    let outcome = run_alone(&GenerationRequest { logprobs: Some(3), ..request(prompt(5), 8) });
    for (id, logprob) in outcome.tokens {
        let logprob = logprob.unwrap();
        assert_eq!((logprob.rank, logprob.top[0]), (1, (id, logprob.logprob)), "greedy takes the most likely");
        assert!(logprob.top.is_sorted_by(|a, b| a.1 >= b.1));
    }
}

#[test]
fn generation_ends_at_the_context_limit() {
    let world = World { context_tokens_max: 16, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.submit(request(prompt(10), 1000)).unwrap();
    sim.submit(request(prompt(16), 0)).unwrap();
    sim.submit(request(prompt(15), 5)).unwrap();
    assert_eq!(sim.submit(request(prompt(16), 1)), Err(SubmitError::PromptTooLong { found: 16, limit: 15 }));
    assert_eq!(sim.submit(request(prompt(17), 0)), Err(SubmitError::PromptTooLong { found: 17, limit: 16 }));
    sim.run();
    let finishes: Vec<_> = sim.outcomes.iter().map(finish).collect();
    assert_eq!(finishes, [(FinishReason::Length, 6), (FinishReason::Length, 0), (FinishReason::Length, 1)]);
}

#[test]
fn a_small_cache_bounds_the_context() {
    let world = World { num_blocks: 3, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.submit(request(prompt(5), 1000)).unwrap();
    assert_eq!(sim.submit(request(prompt(12), 1)), Err(SubmitError::PromptTooLong { found: 12, limit: 11 }));
    sim.run();
    assert_eq!(finish(&sim.outcomes[0]), (FinishReason::Length, 7));
}

#[test]
fn equal_prompts_reuse_all_full_blocks_but_the_last_tokens() {
    let world = World { prefix_cache: true, ..ROOMY };
    let mut sim = Sim::new(&world);
    let mut cached = |request| {
        let idx = sim.submit(request).unwrap();
        sim.run();
        sim.outcomes[idx].finish.unwrap().cached_tokens
    };
    assert_eq!(cached(request(prompt(12), 1)), 0);
    assert_eq!(cached(request(prompt(12), 1)), 8);
    assert_eq!(cached(request(prompt(13), 1)), 12);
    assert_eq!(cached(with_adapter(prompt(13), 1, 1)), 0);
    assert_eq!(cached(with_adapter(prompt(13), 1, 1)), 12);
    assert_eq!(cached(with_adapter(prompt(13), 1, 2)), 0);
    assert_eq!(cached(GenerationRequest { cache_salt: Some(String::new()), ..request(prompt(13), 1) }), 0);
    assert_eq!(cached(GenerationRequest { prompt_logprobs: Some(0), ..request(prompt(13), 1) }), 0);
}

#[test]
fn a_context_of_the_base_is_shared_with_the_base() {
    let world = World { prefix_cache: true, ..ROOMY };
    let mut sim = Sim::new(&world);
    let mut cached = |request: GenerationRequest| {
        let idx = sim.submit(request).unwrap();
        sim.run();
        sim.outcomes[idx].finish.unwrap().cached_tokens
    };
    let other = || prompt(13).into_iter().rev().collect::<Vec<u32>>();
    assert_eq!(cached(with_adapter(prompt(13), 1, GATED)), 0);
    assert_eq!(cached(request(prompt(13), 1)), 12, "the base finds what the gates needed");
    assert_eq!(cached(with_adapter(prompt(13), 1, GATED)), 12);
    assert_eq!(cached(request(other(), 1)), 0);
    assert_eq!(cached(with_adapter(other(), 1, GATED)), 0, "without its own context that of the base gives no gates");
    assert_eq!(cached(with_adapter(other(), 1, GATED)), 12);
}

#[test]
fn two_contexts_fit_the_cache_together() {
    let world = World { num_blocks: 9, sequences_max: 2, prefix_cache: true, ..ROOMY };
    let mut sim = Sim::new(&world);
    assert_eq!(
        sim.submit(with_adapter(prompt(16), 1, GATED)).unwrap_err(),
        SubmitError::PromptTooLong { found: 16, limit: 15 }
    );
    sim.submit(request(prompt(16), 1)).unwrap();
    for _ in 0..2 {
        sim.submit(with_adapter(prompt(9), 20, GATED)).unwrap();
    }
    sim.run();
    assert_eq!(finish(&sim.outcomes[1]), (FinishReason::Length, 7));
    assert_eq!(sim.outcomes[1].ids(), sim.outcomes[2].ids());
    let tiny = World { num_blocks: 1, ..ROOMY };
    assert!(Sim::new(&tiny).submit(with_adapter(prompt(1), 0, GATED)).is_err());
}

#[test]
fn a_conversation_reuses_its_generated_tokens() {
    let world = World { prefix_cache: true, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.submit(request(prompt(6), 6)).unwrap();
    sim.run();
    let next_turn = [prompt(6), sim.outcomes[0].ids(), prompt(3)].concat();
    sim.submit(request(next_turn, 1)).unwrap();
    sim.run();
    // The last generated token was never computed, so 11 of the 12 are known and two blocks are full.
    assert_eq!(sim.outcomes[1].finish.unwrap().cached_tokens, 8);
}

#[test]
fn a_new_generation_of_a_name_shares_nothing_with_the_old() {
    let world = World { prefix_cache: true, ..ROOMY };
    let mut sim = Sim::new(&world);
    let generation = |id: usize| {
        let LoadedAdapter { digest, lowered, .. } = Arc::into_inner(adapter(id)).unwrap();
        let name = "one-name".to_owned();
        let loaded = LoadedAdapter { name, generation: id as u64, digest, lowered, bytes: 0, parts: Vec::new() };
        GenerationRequest { adapter: Some(Arc::new(loaded)), ..request(prompt(13), 4) }
    };
    // Both at once, and the old one again after the new one.
    for id in [1, 1, 2, 1, 2] {
        sim.submit(generation(id)).unwrap();
    }
    sim.run();
    for (outcome, id) in sim.outcomes.iter().zip([1, 1, 2, 1, 2]) {
        assert_eq!(outcome.ids(), run_alone(&with_adapter(prompt(13), 4, id)).ids());
    }
}

#[test]
fn what_stands_before_a_prompt_changes_its_answer_and_nothing_else() {
    for id in [VIRTUAL, PREFIX, BOTH] {
        let outcome = run_alone(&with_adapter(prompt(9), 5, id));
        let finish = outcome.finish.unwrap();
        assert_eq!((finish.prompt_tokens, finish.cached_tokens, finish.generated_tokens), (9, 0, 5));
        assert!(outcome.tokens.iter().all(|(token, _)| (*token as usize) < VOCAB));
    }
}

#[test]
fn prompt_scores_skip_what_stands_before_the_prompt() {
    for id in [VIRTUAL, PREFIX, BOTH, ASLEEP] {
        let request = GenerationRequest { prompt_logprobs: Some(2), ..with_adapter(prompt(13), 2, id) };
        let whole = run_alone(&request);
        let scores = whole.prompt.clone().unwrap();
        assert_eq!(scores.len(), 13);
        assert!(scores[0].is_none() && scores[1..].iter().all(Option::is_some));
        for (step_tokens_max, prefix_cache) in [(1, false), (2, true), (4, true), (5, false)] {
            let world = World { sequences_max: 1, step_tokens_max, prefix_cache, ..ROOMY };
            let mut sim = Sim::new(&world);
            sim.submit(request.clone()).unwrap();
            sim.submit(request.clone()).unwrap();
            sim.run();
            assert_eq!(sim.outcomes, [whole.clone(), whole.clone()], "adapter {id}, {step_tokens_max} tokens per step");
        }
    }
}

#[test]
fn what_stands_before_the_prompt_counts_against_the_context() {
    let world = World { context_tokens_max: 16, ..ROOMY };
    let mut sim = Sim::new(&world);
    for (id, taken) in [(VIRTUAL, 3), (PREFIX, 9), (BOTH, 6), (ASLEEP, 0)] {
        let limit = 15 - taken;
        let found = limit + 1;
        let too_long = Err(SubmitError::PromptTooLong { found, limit });
        assert_eq!(sim.submit(with_adapter(prompt(found as u32), 1, id)), too_long);
        let idx = sim.submit(with_adapter(prompt(limit as u32 - 1), 100, id)).unwrap();
        sim.run();
        assert_eq!(finish(&sim.outcomes[idx]), (FinishReason::Length, 2));
    }
    let mut tiny = Sim::new(&World { context_tokens_max: 8, ..ROOMY });
    assert_eq!(
        tiny.submit(with_adapter(prompt(1), 1, PREFIX)),
        Err(SubmitError::PromptTooLong { found: 1, limit: 0 }),
        "not even the prefix fits"
    );
}

#[test]
fn a_kv_prefix_is_copied_once_and_counted_once() {
    for prefix_cache in [false, true] {
        let world = World { prefix_cache, ..ROOMY };
        let mut sim = Sim::new(&world);
        let salted = |salt: usize| {
            let cache_salt = (salt > 0).then(|| salt.to_string());
            GenerationRequest { cache_salt, ..with_adapter(prompt(2), 3, PREFIX) }
        };
        // Nine entries are two blocks of four and one more, which shares a block with the prompt.
        for salt in 0..4 {
            sim.submit(salted(salt)).unwrap();
        }
        sim.step();
        assert_eq!(sim.engine.blocks_in_use(), 3, "one copies, the others wait for it");
        sim.step();
        assert_eq!(sim.engine.blocks_in_use(), 2 + 4);
        assert_eq!(sim.probe.entries.load(Ordering::SeqCst), 8 + 4);
        sim.run();
        // Nobody refers to the blocks now, and nobody has needed them otherwise.
        let idx = sim.submit(salted(9)).unwrap();
        sim.run();
        assert_eq!(sim.probe.entries.load(Ordering::SeqCst), 8 + 5);
        assert_eq!(sim.outcomes[idx].ids(), run_alone(&salted(9)).ids());
        assert_eq!(sim.outcomes[idx].finish.unwrap().cached_tokens, 0, "the prefix is no part of the prompt");
    }
}

#[test]
fn an_idle_kv_prefix_makes_room_and_comes_back() {
    let world = World { num_blocks: 8, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.submit(with_adapter(prompt(4), 3, PREFIX)).unwrap();
    sim.run();
    assert_eq!(sim.probe.entries.load(Ordering::SeqCst), 9);
    sim.submit(request(prompt(20), 12)).unwrap();
    sim.run();
    assert_eq!(finish(&sim.outcomes[1]), (FinishReason::Length, 12), "the base may use the whole cache");
    let again = sim.submit(with_adapter(prompt(4), 3, PREFIX)).unwrap();
    sim.run();
    assert_eq!(sim.probe.entries.load(Ordering::SeqCst), 18);
    assert_eq!(sim.outcomes[again], sim.outcomes[0]);
}

#[test]
fn a_kv_prefix_whose_step_failed_is_copied_again() {
    for fault in [Fault::Error, Fault::Panic, Fault::Copy] {
        let mut sim = Sim::new(&World { prefix_cache: true, ..ROOMY });
        sim.probe.set_fault(fault);
        sim.submit(with_adapter(prompt(4), 3, PREFIX)).unwrap();
        sim.run();
        assert!(sim.outcomes[0].failed.is_some());
        let copied = sim.probe.entries.load(Ordering::SeqCst);
        let idx = sim.submit(with_adapter(prompt(4), 3, PREFIX)).unwrap();
        sim.run();
        assert_eq!(sim.probe.entries.load(Ordering::SeqCst), copied + 9);
        assert_eq!(sim.outcomes[idx].ids(), run_alone(&with_adapter(prompt(4), 3, PREFIX)).ids());
    }
}

#[test]
fn preempted_and_cancelled_sequences_give_their_leading_blocks_back() {
    let world = World { num_blocks: 14, sequences_max: 4, prefix_cache: true, ..ROOMY };
    let requests: Vec<_> = [PREFIX, VIRTUAL, BOTH, PREFIX].map(|id| with_adapter(prompt(4), 20, id)).into();
    let mut sim = Sim::new(&world);
    for request in &requests {
        sim.submit(request.clone()).unwrap();
    }
    let cancelled = sim.submit(with_adapter(prompt(4), 20, PREFIX)).unwrap();
    for _ in 0..6 {
        sim.step();
    }
    sim.cancel(cancelled);
    sim.run();
    assert!(sim.metrics.preemptions.get() >= 2, "{}", sim.metrics.preemptions.get());
    for (request, outcome) in requests.iter().zip(&sim.outcomes) {
        assert_eq!(outcome.clone().apart_from_cache(), run_alone(request));
    }
}

#[test]
fn virtual_tokens_are_shared_under_their_adapter() {
    let mut sim = Sim::new(&World { prefix_cache: true, ..ROOMY });
    let mut tokens_of = |request| {
        let before = sim.probe.tokens.load(Ordering::SeqCst);
        let idx = sim.submit(request).unwrap();
        sim.run();
        (sim.probe.tokens.load(Ordering::SeqCst) - before, sim.outcomes[idx].finish.unwrap().cached_tokens)
    };
    assert_eq!(tokens_of(with_adapter(prompt(9), 1, VIRTUAL)), (12, 0));
    // Three virtual tokens and five of the prompt are two blocks; the last block is never reused.
    assert_eq!(tokens_of(with_adapter(prompt(9), 1, VIRTUAL)), (4, 5));
    assert_eq!(tokens_of(with_adapter(prompt(9), 1, 1)), (9, 0));
}

#[test]
fn tokens_before_the_invocation_are_the_bases() {
    let mut sim = Sim::new(&World { prefix_cache: true, ..ROOMY });
    let [first, second] = lead(ASLEEP).invocation else { panic!("two tokens") };
    let invoked = [prompt(9), vec![*first, *second], prompt(3)].concat();
    let mut cached = |request: &GenerationRequest| {
        let idx = sim.submit(request.clone()).unwrap();
        sim.run();
        assert_eq!(sim.outcomes[idx].ids(), run_alone(request).ids());
        sim.outcomes[idx].finish.unwrap().cached_tokens
    };
    let asleep = with_adapter(prompt(13), 4, ASLEEP);
    assert_eq!(cached(&request(prompt(13), 4)), 0);
    assert_eq!(cached(&asleep), 12, "never invoked: the base");
    assert_eq!(run_alone(&asleep).ids(), run_alone(&request(prompt(13), 4)).ids());
    let awake = with_adapter(invoked.clone(), 4, ASLEEP);
    assert_eq!(cached(&awake), 8, "invoked at 9");
    assert_ne!(run_alone(&awake).ids(), run_alone(&request(invoked.clone(), 4)).ids());
    assert_eq!(cached(&awake), 12);
    assert_eq!(cached(&request(invoked.clone(), 4)), 8, "what the adapter wrote is not the base's");
    // The last occurrence decides.
    let twice = with_adapter([invoked.clone(), invoked].concat(), 1, ASLEEP);
    assert_eq!(cached(&twice), 12, "the base computed them");
}

#[test]
fn preempted_sequences_go_on_with_the_same_random_numbers() {
    let world = World { num_blocks: 10, sequences_max: 4, ..ROOMY };
    let requests: Vec<_> = (0..4)
        .map(|seed| {
            let sampling = SamplingParams { temperature: 1.0, seed: Some(seed), ..SamplingParams::default() };
            GenerationRequest { sampling, ..request(prompt(4), 30) }
        })
        .collect();
    let mut sim = Sim::new(&world);
    for request in &requests {
        sim.submit(request.clone()).unwrap();
    }
    sim.run();
    assert!(sim.metrics.preemptions.get() >= 3, "{}", sim.metrics.preemptions.get());
    for (request, outcome) in requests.iter().zip(&sim.outcomes) {
        assert_eq!(*outcome, run_alone(request));
    }
}

#[test]
fn a_context_that_outgrows_its_frequencies_is_recomputed_once() {
    let world = World { rope_length_rule: RopeLengthRule::Switch { threshold: 8 }, prefix_cache: true, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.submit(request(prompt(4), 9)).unwrap();
    sim.run();
    assert_eq!(finish(&sim.outcomes[0]), (FinishReason::Length, 9));
    assert_eq!(sim.probe.tokens.load(Ordering::SeqCst), 4 + 4 + 9 + 3, "prompt, decodes, recomputation, decodes");
    assert_eq!(sim.metrics.preemptions.get(), 0);
    assert_eq!(sim.metrics.prompt_tokens.get(), 4);
}

#[test]
fn cancelling_frees_the_place_within_a_step() {
    let world = World { sequences_max: 1, step_tokens_max: 4, queue_max: 1, ..ROOMY };
    let mut sim = Sim::new(&world);
    let running = sim.submit(request(prompt(4), 50)).unwrap();
    sim.step();
    let waiting = sim.submit(request(prompt(4), 50)).unwrap();
    assert_eq!(sim.submit(request(prompt(4), 1)), Err(SubmitError::QueueFull { limit: 1 }));
    sim.cancel(waiting);
    sim.step();
    sim.submit(request(prompt(4), 1)).unwrap();
    sim.cancel(running);
    sim.step();
    assert_eq!(sim.outcomes[2].ids(), run_alone(&request(prompt(4), 1)).ids(), "the seat is free at once");
}

#[test]
fn a_satisfied_client_that_leaves_has_a_finished_request() {
    let mut sim = Sim::new(&ROOMY);
    let request = request(prompt(4), 50);
    let satisfied = Arc::clone(&request.satisfied);
    let left_early = sim.submit(request).unwrap();
    sim.step();
    satisfied.store(true, Ordering::SeqCst);
    sim.cancel(left_early);
    sim.step();
    let ended = |reason| sim.metrics.request_success.with_label_values(&[reason]).get();
    assert_eq!((ended("stop"), ended("abort")), (1, 0));
    assert_eq!(sim.metrics.request_generation_tokens.get_sample_count(), 1);
}

#[test]
fn a_deferred_request_holds_up_nobody_else() {
    let world = World { adapter_slots: 1, ..ROOMY };
    let mut sim = Sim::new(&world);
    let long = sim.submit(with_adapter(prompt(4), 100, 1)).unwrap();
    sim.step();
    let deferred = sim.submit(with_adapter(prompt(4), 2, 2)).unwrap();
    let resident = sim.submit(with_adapter(prompt(4), 2, 1)).unwrap();
    let base = sim.submit(request(prompt(4), 2)).unwrap();
    sim.step();
    assert_eq!(sim.metrics.requests_waiting_by_reason.with_label_values(&["deferred"]).get(), 1);
    assert_eq!(sim.metrics.requests_waiting_by_reason.with_label_values(&["capacity"]).get(), 0);
    assert_eq!(sim.metrics.requests_running.get(), 3);
    sim.step();
    assert!(!sim.is_live(resident) && !sim.is_live(base) && sim.is_live(deferred) && sim.is_live(long));
    sim.run();
}

#[test]
fn a_deferred_request_is_overtaken_a_bounded_number_of_times() {
    let world = World { adapter_slots: 1, sequences_max: 3, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.submit(with_adapter(prompt(4), 5, 1)).unwrap();
    sim.step();
    let deferred = sim.submit(with_adapter(prompt(4), 2, 2)).unwrap();
    // The resident adapter's requests never stop coming.
    let mut submitted = Vec::new();
    for _ in 0..40 {
        submitted.push(sim.submit(with_adapter(prompt(4), 5, 1)).unwrap());
        sim.step();
        if !sim.is_live(deferred) {
            break;
        }
    }
    assert!(!sim.is_live(deferred), "starved");
    let overtook = submitted.iter().filter(|idx| !sim.outcomes[**idx].tokens.is_empty()).count();
    assert!(overtook <= world.sequences_max, "{overtook} passed");
    sim.run();
}

#[test]
fn base_requests_pass_even_when_adapters_are_barred() {
    let world = World { adapter_slots: 1, sequences_max: 2, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.submit(with_adapter(prompt(4), 60, 1)).unwrap();
    sim.step();
    sim.submit(with_adapter(prompt(4), 2, 2)).unwrap();
    for _ in 0..3 {
        sim.submit(with_adapter(prompt(4), 1, 1)).unwrap();
        sim.step();
    }
    assert_eq!(sim.metrics.requests_waiting_by_reason.with_label_values(&["deferred"]).get(), 2);
    let base = sim.submit(request(prompt(4), 1)).unwrap();
    sim.step();
    assert!(!sim.is_live(base));
    sim.run();
}

#[test]
fn a_failed_step_ends_its_sequences_and_no_others() {
    for fault in [Fault::Error, Fault::Panic] {
        let world = World { sequences_max: 2, step_tokens_max: 8, prefix_cache: true, ..ROOMY };
        let mut sim = Sim::new(&world);
        for _ in 0..3 {
            sim.submit(request(prompt(4), 3)).unwrap();
        }
        sim.probe.set_fault(fault);
        sim.step();
        assert_eq!(sim.engine.blocks_in_use(), 0);
        sim.run();
        let message = Some("the model failed to compute this request".to_owned());
        assert_eq!([&sim.outcomes[0].failed, &sim.outcomes[1].failed], [&message; 2]);
        assert_eq!(sim.outcomes[2].ids(), run_alone(&request(prompt(4), 3)).ids());
    }
}

#[test]
fn invalid_logits_end_only_their_sequence() {
    let mut sim = Sim::new(&ROOMY);
    sim.submit(request(prompt(4), 3)).unwrap();
    sim.submit(request(prompt(5), 3)).unwrap();
    sim.probe.set_fault(Fault::Nan);
    sim.run();
    assert_eq!(sim.outcomes[0].failed.as_deref(), Some("the model computed invalid numbers for this request"));
    assert_eq!(sim.outcomes[1].ids(), run_alone(&request(prompt(5), 3)).ids());
}

#[test]
fn a_failed_adapter_copy_ends_who_needed_it_and_the_next_try_works() {
    for fault in [Fault::Copy, Fault::CopyPanic] {
        let mut sim = Sim::new(&ROOMY);
        sim.probe.set_fault(fault);
        sim.submit(with_adapter(prompt(4), 2, 1)).unwrap();
        sim.submit(request(prompt(4), 2)).unwrap();
        sim.run();
        assert_eq!(sim.outcomes[0].failed.as_deref(), Some("the adapter could not be copied to the device"));
        assert_eq!(finish(&sim.outcomes[1]), (FinishReason::Length, 2));
        assert_eq!(sim.metrics.adapter_errors.with_label_values(&["adapter-1"]).get(), 1);
        sim.submit(with_adapter(prompt(4), 2, 1)).unwrap();
        sim.run();
        assert_eq!(finish(&sim.outcomes[2]), (FinishReason::Length, 2));
    }
}

#[test]
fn metrics_tell_what_happened() {
    let world = World { prefix_cache: true, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.submit(with_adapter(prompt(9), 3, 1)).unwrap();
    sim.run();
    sim.submit(with_adapter(prompt(9), 1, 1)).unwrap();
    sim.run();
    let cancelled = sim.submit(request(prompt(4), 50)).unwrap();
    sim.step();
    sim.cancel(cancelled);
    sim.run();
    assert!(sim.submit(request(prompt(128), 1)).is_err());
    let text = sim.metrics.render();
    for line in [
        "vllm:prompt_tokens_total{engine=\"0\",model_name=\"fake\"} 22",
        "vllm:generation_tokens_total{engine=\"0\",model_name=\"fake\"} 5",
        "vllm:prefix_cache_queries_total{engine=\"0\",model_name=\"fake\"} 22",
        "vllm:prefix_cache_hits_total{engine=\"0\",model_name=\"fake\"} 8",
        "vllm:request_success_total{engine=\"0\",finished_reason=\"length\",model_name=\"fake\"} 2",
        "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"fake\"} 1",
        "vllm:admission_rejections_total{engine=\"0\",model_name=\"fake\",reason=\"prompt_too_long\"} 1",
        "vllm:time_to_first_token_seconds_count{engine=\"0\",model_name=\"fake\"} 3",
        "vllm:inter_token_latency_seconds_count{engine=\"0\",model_name=\"fake\"} 2",
        "vllm:request_time_per_output_token_seconds_count{engine=\"0\",model_name=\"fake\"} 1",
        "vllm:e2e_request_latency_seconds_count{engine=\"0\",model_name=\"fake\"} 2",
        "vllm:request_queue_time_seconds_count{engine=\"0\",model_name=\"fake\"} 3",
        "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"fake\"} 0",
        "vllm:num_requests_running{engine=\"0\",model_name=\"fake\"} 0",
        "vllm:cache_config_info{block_size=\"4\",enable_prefix_caching=\"true\",engine=\"0\",model_name=\"fake\",num_gpu_blocks=\"256\"} 1",
        "patchbay_adapter_requests_total{adapter=\"adapter-1\"} 2",
        "patchbay_adapter_requests_total{adapter=\"base\"} 1",
        "patchbay_adapter_prompt_tokens_total{adapter=\"adapter-1\"} 18",
        "patchbay_adapter_generation_tokens_total{adapter=\"adapter-1\"} 4",
        "patchbay_adapter_time_to_first_token_seconds_count{adapter=\"adapter-1\"} 2",
        "patchbay_adapter_resident{adapter=\"adapter-1\"} 1",
        "patchbay_adapter_slot_copies_total 1",
    ] {
        assert!(text.lines().any(|other| other == line), "missing {line}\n{text}");
    }
    assert!(text.contains("running_lora_adapters=\"adapter-1\",waiting_lora_adapters=\"\""));
}

/// A fake that reports when a step begins and waits to be let through.
struct Gated {
    model: Box<dyn Forward>,
    entered: SyncSender<()>,
    gate: std::sync::mpsc::Receiver<()>,
}

impl Forward for Gated {
    fn limits(&self) -> ForwardLimits {
        self.model.limits()
    }

    fn forward(&mut self, batch: &Batch) -> Result<Tensor> {
        // Both fail when the test is over; then every step passes.
        let _ = self.entered.send(());
        let _ = self.gate.recv();
        self.model.forward(batch)
    }

    fn adapter_to_device(&self, adapter: &LoweredAdapter) -> Result<DeviceAdapter> {
        self.model.adapter_to_device(adapter)
    }
}

fn start(world: &World) -> EngineHandle {
    EngineHandle::start(world.model(&Arc::new(Probe::default())), world.config(), metrics())
}

/// A handle whose every step waits for the gate, the gate, and the signal that a step began.
fn start_gated(world: &World) -> (EngineHandle, SyncSender<()>, std::sync::mpsc::Receiver<()>) {
    let (entered, has_entered) = sync_channel(1);
    let (open, gate) = sync_channel(1);
    let model = Gated { model: world.model(&Arc::new(Probe::default())), entered, gate };
    (EngineHandle::start(Box::new(model), world.config(), metrics()), open, has_entered)
}

fn collect(mut events: Receiver<GenerationEvent>) -> Outcome {
    let mut outcome = Outcome::default();
    while let Some(event) = events.blocking_recv() {
        outcome.take(event);
    }
    outcome
}

#[test]
fn threads_share_one_engine() {
    let handle = start(&World { sequences_max: 3, step_tokens_max: 8, prefix_cache: true, ..ROOMY });
    let clients: Vec<_> = (0..6)
        .map(|id| {
            let handle = handle.clone();
            std::thread::spawn(move || {
                let request = with_adapter(prompt(6 + id as u32), 10, id);
                (request.clone(), collect(handle.submit(request).unwrap()))
            })
        })
        .collect();
    for client in clients {
        let (request, outcome) = client.join().unwrap();
        assert_eq!(outcome.apart_from_cache(), run_alone(&request));
    }
    handle.shut_down();
    assert_eq!(handle.in_flight(), 0);
    assert!(!handle.adapter_activity().resident.is_empty());
}

#[test]
fn the_queue_counts_waiting_requests_only() {
    let world = World { sequences_max: 1, step_tokens_max: 8, queue_max: 2, ..ROOMY };
    let (handle, open, entered) = start_gated(&world);
    let running = handle.submit(request(prompt(4), 2)).unwrap();
    entered.recv().unwrap();
    let waiting = [handle.submit(request(prompt(4), 2)).unwrap(), handle.submit(request(prompt(4), 2)).unwrap()];
    assert_eq!(handle.submit(request(prompt(4), 2)).unwrap_err(), SubmitError::QueueFull { limit: 2 });
    assert_eq!(handle.in_flight(), 3);
    drop((open, entered));
    for events in std::iter::once(running).chain(waiting) {
        assert_eq!(finish(&collect(events)), (FinishReason::Length, 2));
    }
}

#[test]
fn stopped_engine_finishes_what_it_has() {
    let (handle, open, entered) = start_gated(&ROOMY);
    let running = handle.submit(request(prompt(4), 3)).unwrap();
    entered.recv().unwrap();
    handle.stop_accepting();
    assert_eq!(handle.submit(request(prompt(4), 3)).unwrap_err(), SubmitError::ShuttingDown);
    drop((open, entered));
    assert_eq!(finish(&collect(running)), (FinishReason::Length, 3));
    assert!(handle.is_alive());
}

#[test]
fn shutdown_ends_what_runs_and_joins() {
    let (handle, open, entered) = start_gated(&ROOMY);
    let running = handle.submit(request(prompt(4), 100)).unwrap();
    entered.recv().unwrap();
    let closer = {
        let handle = handle.clone();
        std::thread::spawn(move || handle.shut_down())
    };
    drop((open, entered));
    closer.join().unwrap();
    handle.shut_down();
    assert!(!handle.is_alive());
    assert_eq!(handle.in_flight(), 0);
    let outcome = collect(running);
    let expected = Some("the server is shutting down");
    assert!(outcome.failed.as_deref() == expected || outcome.finish.is_some(), "{outcome:?}");
    assert_eq!(handle.submit(request(prompt(4), 1)).unwrap_err(), SubmitError::ShuttingDown);
}

#[test]
fn without_handles_the_engine_finishes_what_it_has() {
    let handle = start(&ROOMY);
    let events = handle.submit(request(prompt(4), 20)).unwrap();
    drop(handle);
    assert_eq!(finish(&collect(events)), (FinishReason::Length, 20));
}
