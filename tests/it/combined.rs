//! Adapters made of several, against PEFT's `add_weighted_adapter` (`tools/make_fixtures_compose.py`).

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use patchbay::adapter::{
    AdapterFiles, CombineInput, CombineMode, CombineOptions, Formats, LowerOptions, combine, lower,
};
use serde::Deserialize;

use crate::fixtures;
use crate::runner::{Runner, relative_difference};

/// Rounding of f32 sums in another order, relative to the largest value.
const TOLERANCE: f32 = 1e-4;

#[derive(Deserialize)]
struct Combined {
    name: String,
    mode: CombineMode,
    parts: Vec<FixturePart>,
    options: Parameters,
}

#[derive(Deserialize)]
struct FixturePart {
    dir: String,
    weight: f32,
}

#[derive(Deserialize)]
struct Parameters {
    rank: Option<usize>,
    density: Option<f64>,
    seed: Option<u64>,
}

fn cases() -> Vec<Combined> {
    serde_json::from_slice(&std::fs::read(fixtures::dir().join("combined.json")).unwrap()).unwrap()
}

fn expected(case: &Combined) -> HashMap<String, Tensor> {
    let path = fixtures::dir().join("combined").join(format!("{}.safetensors", case.name));
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn combined(case: &Combined) -> AdapterFiles {
    let read = |dir: &str, name: &str| std::fs::read(fixtures::dir().join(dir).join(name)).unwrap();
    let files = case.parts.iter().map(|part| {
        AdapterFiles::new(read(&part.dir, "adapter_config.json"), read(&part.dir, "adapter_model.safetensors"))
    });
    let files: Vec<AdapterFiles> = files.collect();
    let inputs = case.parts.iter().zip(&files);
    let inputs: Vec<_> =
        inputs.map(|(part, files)| CombineInput { name: &part.dir, files, weight: part.weight }).collect();
    let Parameters { rank, density, seed } = case.options;
    let options = CombineOptions { mode: case.mode, rank, density, seed, lambda: None };
    combine(&inputs, &options).unwrap_or_else(|error| panic!("{}: {error}", case.name))
}

#[test]
fn combined_factors_equal_peft() {
    for case in cases() {
        let files = combined(&case);
        let found = candle_core::safetensors::load_buffer(&files.weights, &Device::Cpu).unwrap();
        let expected = expected(&case);
        let paths: Vec<&str> = expected.keys().filter_map(|key| key.strip_suffix(".a")).collect();
        assert_eq!(paths.len(), 2, "{}", case.name);
        for path in paths {
            let ours =
                ["lora_A", "lora_B"].map(|part| found[&format!("base_model.model.{path}.{part}.weight")].clone());
            let theirs = ["a", "b"].map(|part| expected[&format!("{path}.{part}")].clone());
            assert_eq!(ours.each_ref().map(Tensor::dims), theirs.each_ref().map(Tensor::dims), "{} {path}", case.name);
            let product = |[a, b]: &[Tensor; 2]| b.matmul(a).unwrap();
            let difference = relative_difference(&product(&ours), &product(&theirs));
            assert!(difference < TOLERANCE, "{} {path}: product differs by {difference:e}", case.name);
            // Where both factors are defined beyond their product; PEFT puts the weights of a stack into A, and the signs
            // of singular vectors are free.
            if case.mode != CombineMode::Stack {
                for (ours, theirs) in ours.iter().zip(&theirs) {
                    let difference = relative_difference(ours, theirs);
                    assert!(difference < TOLERANCE, "{} {path}: a factor differs by {difference:e}", case.name);
                }
            }
        }
    }
}

#[test]
fn combined_adapters_give_the_logits_of_peft() {
    let mut runner = Runner::new(fixtures::load_model("llama"));
    let prompts = fixtures::prompts();
    for case in cases() {
        let options = LowerOptions { merge: false, formats: Formats::uniform(DType::F32), own_bytes_max: 1 << 30 };
        let (adapter, report) = lower(&combined(&case), &runner.model, &options).unwrap();
        assert!(report.warnings.is_empty(), "{}: {:?}", case.name, report.warnings);
        let logits = expected(&case)["logits_1"].clone();
        let found = runner.prompt_logits(&prompts[1], Some(&adapter), prompts[1].len());
        let difference = relative_difference(&found, &logits);
        assert!(difference < TOLERANCE, "{}: differs by {difference:e}", case.name);
    }
}
