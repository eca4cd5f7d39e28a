//! The engine over real models: adapters that stand before the prompt, sleep until they are invoked, take gates from a
//! context of the bare base, or act inside a layer beside its linears, against PEFT, while blocks, slots and tokens of a
//! step are short.

use std::sync::Arc;

use candle_core::DType;
use patchbay::adapter::{Formats, LoadedAdapter, LowerOptions, digest, lower};
use patchbay::engine::{Engine, EngineConfig, GenerationEvent, GenerationRequest, ModelRunner, SamplingParams};
use patchbay::metrics::{Metrics, MetricsConfig};
use patchbay::model::Model;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc::Receiver;

use crate::fixtures::{self, AdapterCase};

const GREEDY_TOKENS: usize = 16;

/// Less than the running sequences come to need.
const CACHE_TOKENS: usize = 96;

fn load(case: &AdapterCase, model: &Model) -> Arc<LoadedAdapter> {
    let files = fixtures::adapter_files(&case.dir).expect("the files of the fixture");
    let options = LowerOptions { merge: false, formats: Formats::uniform(DType::F32), own_bytes_max: 1 << 20 };
    let (lowered, report) = lower(&files, model, &options).unwrap_or_else(|error| panic!("{}: {error}", case.dir));
    let digest = digest(&Sha256::digest(&files.weights).into(), &options);
    Arc::new(LoadedAdapter {
        name: case.name.clone(),
        generation: 1,
        digest,
        lowered,
        bytes: report.bytes,
        parts: Vec::new(),
    })
}

fn request(prompt: &[u32], adapter: Option<Arc<LoadedAdapter>>) -> GenerationRequest {
    GenerationRequest {
        prompt: prompt.to_vec(),
        adapter,
        sampling: SamplingParams { temperature: 0., ..SamplingParams::default() },
        max_tokens: GREEDY_TOKENS,
        stop_token_ids: Vec::new(),
        ignore_eos: true,
        logprobs: None,
        prompt_logprobs: None,
        cache_salt: None,
        satisfied: Arc::default(),
    }
}

fn tokens(mut events: Receiver<GenerationEvent>) -> Vec<u32> {
    let mut tokens = Vec::new();
    while let Ok(event) = events.try_recv() {
        match event {
            GenerationEvent::Token(token) => tokens.push(token.id),
            GenerationEvent::Finished(_) => return tokens,
            GenerationEvent::Prompt(_) | GenerationEvent::Failed(_) | GenerationEvent::ShutDown => {
                panic!("unexpected: {event:?}")
            }
        }
    }
    panic!("no end after {tokens:?}")
}

/// Runs every prompt with every adapter of a model that has to do with the context or acts inside a layer, with a LoRA and
/// with the base, twice over.
fn check(model_name: &str, (block_tokens, prefix_cache): (usize, bool)) {
    let model = Arc::new(fixtures::load_model(model_name));
    let config = EngineConfig {
        sequences_max: 6,
        step_tokens_max: Some(13),
        block_tokens,
        kv_cache_bytes: CACHE_TOKENS * model.info().kv_bytes_per_token(model.info().dtype),
        adapter_slots: 3,
        prefix_cache,
        ..EngineConfig::default()
    };
    let metrics = Arc::new(Metrics::new(model_name, &MetricsConfig::default()));
    let runner = ModelRunner::new(Arc::clone(&model), &config).expect("the cache is small");
    let mut engine = Engine::new(Box::new(runner), config, Arc::clone(&metrics));
    let manifest = fixtures::manifest();
    let mut inside = 0;
    let mut chosen =
        vec![(manifest.models.iter().find(|model| model.name == model_name).expect("listed").dir.clone(), None)];
    for case in manifest.cases.iter().filter(|case| case.model == model_name) {
        let adapter = load(case, &model);
        let lowered = &adapter.lowered;
        let shapes_context =
            lowered.num_leading() > 0 || !lowered.invocation_tokens.is_empty() || lowered.gates.is_some();
        let is_inside = !lowered.layers.is_empty();
        inside += usize::from(is_inside);
        if shapes_context || is_inside || case.name == "lora_qv" {
            chosen.push((case.dir.clone(), Some(adapter)));
        }
    }
    assert!(chosen.len() > 1, "{model_name} has no case");
    assert_eq!(
        inside > 0,
        ["llama", "mistral"].contains(&model_name),
        "{model_name}: {inside} cases act inside a layer"
    );
    for round in 0..2 {
        let mut running = Vec::new();
        for (p, prompt) in fixtures::prompts().iter().enumerate() {
            // Each twice in a row, so that there is something to share.
            for (dir, adapter) in chosen.iter().flat_map(|choice| [choice, choice]) {
                // Some cases keep what some of the prompts give.
                let Some(greedy) = fixtures::expected(dir).remove(&format!("greedy_{p}")) else { continue };
                let (submission, events) = engine.admission().admit(request(prompt, adapter.clone())).expect("fits");
                engine.accept(submission);
                let greedy = greedy.to_vec1::<i64>().expect("token ids");
                running.push((format!("{dir} prompt {p} round {round}"), events, greedy));
            }
        }
        while !engine.is_idle() {
            engine.step();
            engine.audit();
        }
        for (at, events, expected) in running {
            let found: Vec<i64> = tokens(events).into_iter().map(i64::from).collect();
            assert_eq!(found, expected, "{at}");
        }
    }
    assert_eq!(engine.blocks_in_use(), 0, "blocks leak");
    assert!(metrics.preemptions.get() > 0, "nothing was short");
    assert_eq!(metrics.prefix_cache_hits.get() > 0, prefix_cache, "{model_name}: the cache is used");
}

#[test]
fn greedy_tokens_equal_peft_however_short_of_everything_the_engine_is() {
    check("llama", (4, true));
    check("llama", (7, false));
    check("qwen2", (5, true));
    check("mistral", (3, false));
    check("phi3", (3, true));
    // RoPE that counts what stands before the prompt.
    check("phi3_longrope", (5, true));
}
