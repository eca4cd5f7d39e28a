//! A simulated world: the engine over the fake, stepped directly, and what its requests receive.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use patchbay::engine::{
    Engine, EngineConfig, Finish, FinishReason, Forward, ForwardLimits, GenerationEvent, GenerationRequest,
    SamplingParams, SubmitError, TokenLogprob,
};
use patchbay::metrics::{Metrics, MetricsConfig};
use patchbay::model::RopeLengthRule;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use tokio::sync::mpsc::Receiver;
use tokio::sync::mpsc::error::TryRecvError;

use super::fake::{FakeModel, Probe, VOCAB, adapter, request};

/// Everything a request received.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Outcome {
    pub(super) prompt: Option<Vec<Option<TokenLogprob>>>,
    pub(super) tokens: Vec<(u32, Option<TokenLogprob>)>,
    pub(super) finish: Option<Finish>,
    pub(super) failed: Option<String>,
}

impl Outcome {
    pub(super) fn has_ended(&self) -> bool {
        self.finish.is_some() || self.failed.is_some()
    }

    pub(super) fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|(id, _)| *id).collect()
    }

    /// Takes in an event; checks the order that the border promises.
    pub(super) fn take(&mut self, event: GenerationEvent) {
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
            GenerationEvent::ShutDown => self.failed = Some("shut down".to_owned()),
        }
    }

    /// Without what a shared cache may change.
    pub(super) fn apart_from_cache(mut self) -> Self {
        if let Some(finish) = &mut self.finish {
            finish.cached_tokens = 0;
        }
        self
    }
}

/// Sizes of a simulated world.
#[derive(Clone, Copy, Debug)]
pub(super) struct World {
    pub(super) num_blocks: usize,
    pub(super) context_tokens_max: usize,
    pub(super) rope_length_rule: RopeLengthRule,
    pub(super) block_tokens: usize,
    pub(super) sequences_max: usize,
    pub(super) step_tokens_max: usize,
    pub(super) queue_max: usize,
    pub(super) adapter_slots: usize,
    pub(super) prefix_cache: bool,
}

pub(super) const ROOMY: World = World {
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
    pub(super) fn limits(&self) -> ForwardLimits {
        ForwardLimits {
            vocab_size: VOCAB,
            context_tokens_max: self.context_tokens_max,
            num_blocks: self.num_blocks,
            step_tokens: self.step_tokens_max,
            rope_length_rule: self.rope_length_rule,
        }
    }

    pub(super) fn config(&self) -> EngineConfig {
        EngineConfig {
            sequences_max: self.sequences_max,
            step_tokens_max: Some(self.step_tokens_max),
            block_tokens: self.block_tokens,
            kv_cache_bytes: 0,
            kv_cache_dtype: EngineConfig::default().kv_cache_dtype,
            queue_max: self.queue_max,
            adapter_slots: self.adapter_slots,
            prefix_cache: self.prefix_cache,
        }
    }

    pub(super) fn model(&self, probe: &Arc<Probe>) -> Box<dyn Forward> {
        Box::new(FakeModel::new(self.limits(), self.block_tokens, Arc::clone(probe)))
    }

    /// The longest context that model and cache can hold of a request.
    pub(super) fn context(&self, request: &GenerationRequest) -> usize {
        let contexts = request.adapter.as_ref().map_or(1, |adapter| adapter.lowered.num_contexts());
        self.context_tokens_max.min(self.num_blocks / contexts * self.block_tokens)
    }
}

pub(super) fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new("fake", &MetricsConfig::default()))
}

/// A stepped engine and what its requests received.
pub(super) struct Sim {
    pub(super) engine: Engine,
    pub(super) probe: Arc<Probe>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) receivers: Vec<Option<Receiver<GenerationEvent>>>,
    pub(super) outcomes: Vec<Outcome>,
}

impl Sim {
    pub(super) fn new(world: &World) -> Self {
        let probe = Arc::new(Probe::default());
        let metrics = metrics();
        let engine = Engine::new(world.model(&probe), world.config(), Arc::clone(&metrics));
        Self { engine, probe, metrics, receivers: Vec::new(), outcomes: Vec::new() }
    }

    pub(super) fn submit(&mut self, request: GenerationRequest) -> std::result::Result<usize, SubmitError> {
        let (submission, receiver) = self.engine.admission().admit(request)?;
        self.engine.accept(submission);
        self.receivers.push(Some(receiver));
        self.outcomes.push(Outcome::default());
        Ok(self.outcomes.len() - 1)
    }

    pub(super) fn cancel(&mut self, idx: usize) {
        self.receivers[idx] = None;
    }

    pub(super) fn is_live(&self, idx: usize) -> bool {
        self.receivers[idx].is_some() && !self.outcomes[idx].has_ended()
    }

    /// One step, with every check that holds after any step.
    pub(super) fn step(&mut self) {
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

    pub(super) fn run(&mut self) {
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
pub(super) fn alone(world: &World, request: &GenerationRequest) -> Outcome {
    let roomy = World { context_tokens_max: world.context(request), rope_length_rule: world.rope_length_rule, ..ROOMY };
    let mut sim = Sim::new(&roomy);
    sim.submit(request.clone()).unwrap();
    sim.run();
    sim.outcomes.remove(0)
}

pub(super) fn random_world(rng: &mut StdRng) -> World {
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

pub(super) fn random_request(rng: &mut StdRng) -> GenerationRequest {
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

/// Runs one request in a roomy world.
pub(super) fn run_alone(request: &GenerationRequest) -> Outcome {
    alone(&ROOMY, request)
}

pub(super) fn prompt(len: u32) -> Vec<u32> {
    (0..len).map(|idx| (idx * 5 + 1) % VOCAB as u32).collect()
}

pub(super) fn finish(outcome: &Outcome) -> (FinishReason, usize) {
    let finish = outcome.finish.unwrap_or_else(|| panic!("not finished: {outcome:?}"));
    (finish.reason, finish.generated_tokens)
}
