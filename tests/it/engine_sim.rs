//! Seeded simulation of the engine over a fake model whose every mistake of accounting shows as a wrong token.
//!
//! The fake's logits are a hash of the whole context as read back through the block table: tokens, adapter and RoPE
//! regime as they were written to the KV slots. Whoever reads a slot of another context, adapter or regime, or one
//! overwritten too early, gets other tokens than alone. Engines are stepped directly: no threads, no time.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{Device, Result, Tensor};
use patchbay::adapter::{LoadedAdapter, LoweredAdapter, NormOverride, SiteId};
use patchbay::engine::{
    Engine, EngineConfig, EngineHandle, Finish, FinishReason, Forward, ForwardLimits, GenerationEvent,
    GenerationRequest, SamplingParams, SubmitError, TokenLogprob,
};
use patchbay::metrics::{Metrics, MetricsConfig};
use patchbay::model::{Batch, RopeLengthRule};
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
    steps: AtomicUsize,
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
    token: u32,
    position: u32,
    adapter: Option<usize>,
    regime: u64,
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

    /// The adapter of each token. Checks that segments tile the tokens and that equal adapters adjoin.
    fn adapters(batch: &Batch) -> Vec<Option<usize>> {
        let mut adapters = Vec::new();
        let mut seen = HashSet::new();
        for segment in &batch.segments {
            assert_eq!(segment.start, adapters.len());
            assert!(segment.len > 0);
            let adapter = segment.adapter.as_ref().map(|lowered| lowered.norms.keys().next().unwrap().0);
            assert!(seen.insert(adapter), "adapter {adapter:?} has two segments");
            adapters.extend(std::iter::repeat_n(adapter, segment.len));
        }
        assert_eq!(adapters.len(), batch.token_ids.len());
        adapters
    }

    fn write(&mut self, batch: &Batch, adapters: &[Option<usize>]) {
        let distinct: HashSet<_> = batch.slot_mapping.iter().collect();
        assert_eq!(distinct.len(), batch.slot_mapping.len(), "two tokens are written to one slot");
        for (idx, &slot) in batch.slot_mapping.iter().enumerate() {
            self.slots[slot as usize] = Some(Written {
                token: batch.token_ids[idx],
                position: batch.positions[idx],
                adapter: adapters[idx],
                regime: self.limits.rope_length_rule.regime(batch.rope_lens[idx] as usize),
            });
        }
    }

    /// Hash of the context up to `position`, read back through the block table.
    fn read(&self, block_table: &[u32], position: usize, adapter: Option<usize>) -> u64 {
        let mut hash = mix(adapter.map_or(0, |adapter| adapter as u64 + 1));
        for idx in 0..=position {
            let slot = block_table[idx / self.block_tokens] as usize * self.block_tokens + idx % self.block_tokens;
            let written = self.slots[slot].expect("a slot is read before it is written");
            assert_eq!(written.position as usize, idx, "a slot of another position is read");
            assert_eq!(written.adapter, adapter, "a slot of another adapter is read");
            hash = mix(hash ^ u64::from(written.token) ^ (written.regime << 32));
        }
        hash
    }
}

impl Forward for FakeModel {
    fn limits(&self) -> ForwardLimits {
        self.limits
    }

    fn forward(&mut self, batch: &Batch) -> Result<Tensor> {
        self.probe.steps.fetch_add(1, Ordering::SeqCst);
        let adapters = Self::adapters(batch);
        self.write(batch, &adapters);
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

    fn adapter_to_device(&self, adapter: &LoweredAdapter) -> Result<LoweredAdapter> {
        self.probe.copies.fetch_add(1, Ordering::SeqCst);
        match self.probe.take_fault(&[Fault::Copy, Fault::CopyPanic]) {
            Fault::Copy => candle_core::bail!("injected"),
            Fault::CopyPanic => panic!("injected"),
            _ => Ok(adapter.clone()),
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

fn adapter(id: usize) -> Arc<LoadedAdapter> {
    let mut lowered = LoweredAdapter::default();
    lowered.norms.insert(SiteId(id), NormOverride::default());
    let digest = [id as u8; 32];
    Arc::new(LoadedAdapter { name: format!("adapter-{id}"), generation: 1, digest, lowered, bytes: 0 })
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

    /// The longest context that model and cache can hold.
    fn context(&self) -> usize {
        self.context_tokens_max.min(self.num_blocks * self.block_tokens)
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
    let roomy = World { context_tokens_max: world.context(), rope_length_rule: world.rope_length_rule, ..ROOMY };
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
    let id = rng.random_range(0..7_usize);
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
    assert!(met.preempted > 50 && met.cached > 500 && met.copies > 500, "{met:?}");
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
