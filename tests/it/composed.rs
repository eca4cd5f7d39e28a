//! Several adapters together against PEFT in float32 (`tools/make_fixtures_compose.py`).

use candle_core::{DType, Tensor};
use patchbay::adapter::{AdapterFiles, Formats, LowerOptions, LoweredAdapter, Part, compose, lower};
use patchbay::model::{DtypeChoice, KernelChoice, Model};
use serde::Deserialize;

use crate::fixtures;
use crate::runner::{Runner, relative_difference};

/// Rounding of f32 sums in another order, relative to the largest logit.
const F32_TOLERANCE: f32 = 1e-4;
/// Half precision rounds weights and activations to 8 bits; as for the adapters alone.
const BF16_TOLERANCE: f32 = 0.08;

/// A composition with what PEFT computes for it.
#[derive(Deserialize)]
struct Composed {
    name: String,
    model: String,
    parts: Vec<FixturePart>,
}

#[derive(Deserialize)]
struct FixturePart {
    dir: String,
    scale: f32,
}

fn cases() -> Vec<Composed> {
    serde_json::from_slice(&std::fs::read(fixtures::dir().join("composed.json")).unwrap()).unwrap()
}

fn lowered(model: &Model, dir: &str, dtype: DType) -> LoweredAdapter {
    let read = |name: &str| std::fs::read(fixtures::dir().join(dir).join(name)).unwrap();
    let files = AdapterFiles::new(read("adapter_config.json"), read("adapter_model.safetensors"));
    lower(&files, model, &LowerOptions { merge: false, formats: Formats::uniform(dtype), own_bytes_max: 1 << 30 })
        .unwrap()
        .0
}

fn composition(model: &Model, case: &Composed, dtype: DType) -> LoweredAdapter {
    let adapters: Vec<_> = case.parts.iter().map(|part| lowered(model, &part.dir, dtype)).collect();
    let parts = case.parts.iter().zip(&adapters);
    let parts: Vec<_> = parts.map(|(part, adapter)| Part { name: &part.dir, adapter, scale: part.scale }).collect();
    compose(&parts, model, Formats::uniform(dtype)).unwrap_or_else(|error| panic!("{}: {error}", case.name))
}

/// The prompts that PEFT was asked, with its logits.
fn expected(case: &Composed) -> Vec<(Vec<u32>, Tensor)> {
    let path = fixtures::dir().join("composed").join(format!("{}.safetensors", case.name));
    let tensors = candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap();
    let prompts = fixtures::prompts().into_iter().enumerate();
    let asked = prompts.filter_map(|(p, prompt)| Some((prompt, tensors.get(&format!("logits_{p}"))?.clone())));
    let asked: Vec<_> = asked.collect();
    assert!(!asked.is_empty(), "{}", case.name);
    asked
}

#[track_caller]
fn check(dtype: DtypeChoice, kernels: KernelChoice, tolerance: f32) {
    let mut failures = Vec::new();
    // These files repeat the embedding in f32, which is not that of a base in bf16: there they replace it, both.
    let repeats = |case: &Composed| dtype == DtypeChoice::Bf16 && case.name == "lora_embeddings";
    for case in cases().into_iter().filter(|case| !repeats(case)) {
        let config = patchbay::model::ModelConfig { dtype, kernels, ..fixtures::model_config(&case.model) };
        let mut runner = Runner::new(fixtures::load_model_with(&config));
        let adapter = composition(&runner.model, &case, runner.model.info().dtype);
        for (prompt, logits) in expected(&case) {
            let found = runner.prompt_logits(&prompt, Some(&adapter), prompt.len());
            let difference = relative_difference(&found.to_dtype(DType::F32).unwrap(), &logits);
            if difference >= tolerance {
                failures.push(format!("{}: differs by {difference:e}", case.name));
            }
        }
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn compositions_equal_peft() {
    check(DtypeChoice::F32, KernelChoice::Auto, F32_TOLERANCE);
}

#[test]
fn compositions_equal_peft_with_plain_kernels() {
    check(DtypeChoice::F32, KernelChoice::Plain, F32_TOLERANCE);
}

#[test]
fn bf16_compositions_are_close_to_peft() {
    check(DtypeChoice::Bf16, KernelChoice::Auto, BF16_TOLERANCE);
}

/// Compositions, their parts and the base in one batch: each as if it were alone.
#[test]
fn compositions_in_a_mixed_batch_equal_each_alone() {
    let mut runner = Runner::new(fixtures::load_model("llama"));
    let prompts = fixtures::prompts();
    let cases: Vec<_> = cases().into_iter().filter(|case| case.model == "llama").collect();
    assert!(cases.len() > 7);
    for batch in cases.chunks(3) {
        let mut adapters: Vec<LoweredAdapter> = Vec::new();
        for case in batch {
            adapters.push(composition(&runner.model, case, DType::F32));
            adapters.push(lowered(&runner.model, &case.parts[0].dir, DType::F32));
        }
        let asks = adapters.iter().map(Some).chain([None]).zip(prompts.iter().cycle());
        let asks: Vec<(Option<&LoweredAdapter>, &Vec<u32>)> = asks.collect();
        let alone: Vec<Tensor> =
            asks.iter().map(|(adapter, prompt)| runner.prompt_logits(prompt, *adapter, prompt.len())).collect();
        let mut contexts: Vec<_> = asks.iter().map(|(adapter, prompt)| runner.context(prompt, *adapter)).collect();
        let mut work = Vec::new();
        for context in &mut contexts {
            let len = context.remaining();
            work.push((context, len));
        }
        let together = runner.step(&mut work);
        for (i, (alone, together)) in alone.iter().zip(&together).enumerate() {
            assert!(relative_difference(together, alone) < F32_TOLERANCE, "{i} of {:?}", batch[0].name);
        }
        contexts.into_iter().for_each(|context| runner.free(context));
    }
}
