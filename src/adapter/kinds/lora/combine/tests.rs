use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::*;
use crate::adapter::fake_base::{FakeBase, close, random};
use crate::adapter::{Formats, LowerOptions, LoweredAdapter, Part, compose, lower};

const Q: &str = "model.layers.0.self_attn.q_proj";
const UP: &str = "model.layers.1.mlp.up_proj";
/// Rounding of f32 sums in another order.
const TOLERANCE: f32 = 1e-5;

/// A LoRA of the fake base: modules with rank and seed, and further config fields.
fn files(modules: &[(&str, usize, u64)], alpha: f64, more: &Value) -> AdapterFiles {
    let mut tensors = BTreeMap::new();
    for (path, r, seed) in modules {
        let outputs = if path.ends_with("up_proj") { 18 } else { 12 };
        tensors.insert(format!("base_model.model.{path}.lora_A.weight"), random(*seed, (*r, 12)));
        tensors.insert(format!("base_model.model.{path}.lora_B.weight"), random(seed + 1, (outputs, *r)));
    }
    let paths: Vec<&str> = modules.iter().map(|(path, ..)| *path).collect();
    let ranks: Map<String, Value> = modules.iter().map(|(path, r, _)| ((*path).to_owned(), json!(r))).collect();
    let mut config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "x/y", "r": 4,
        "lora_alpha": alpha, "rank_pattern": ranks, "target_modules": paths});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    AdapterFiles::new(config.to_string().into_bytes(), safetensors::serialize(&tensors, None).unwrap())
}

fn plain(modules: &[(&str, usize, u64)]) -> AdapterFiles {
    files(modules, 6.0, &json!({}))
}

const fn with(mode: CombineMode) -> CombineOptions {
    CombineOptions { mode, rank: None, density: None, seed: None, lambda: None }
}

fn combined(parts: &[(&AdapterFiles, f32)], options: CombineOptions) -> Result<AdapterFiles, String> {
    let names: Vec<String> = (0..parts.len()).map(|i| format!("part{i}")).collect();
    let inputs = parts.iter().zip(&names).map(|((files, weight), name)| CombineInput { name, files, weight: *weight });
    combine(&inputs.collect::<Vec<_>>(), &options).map_err(|error| error.to_string())
}

fn lowered(files: &AdapterFiles) -> LoweredAdapter {
    let options = LowerOptions { merge: false, formats: Formats::uniform(DType::F32), own_bytes_max: 1 << 20 };
    lower(files, &FakeBase::new(false), &options).unwrap().0
}

/// What the adapter adds to a module's weight.
fn delta(adapter: &LoweredAdapter, path: &str) -> Tensor {
    let base = FakeBase::new(false);
    let sum = adapter.linears[&base.id(path)].deltas.iter().map(|delta| match delta {
        crate::adapter::Delta::LowRank { a, b } => b.matmul(a).unwrap(),
        other => panic!("{other:?}"),
    });
    sum.reduce(|x, y| (x + y).unwrap()).unwrap()
}

fn square(m: &Tensor) -> f64 {
    m.to_dtype(DType::F64).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar().unwrap()
}

#[test]
fn a_stack_acts_as_the_composition_does() {
    let (x, y) = (plain(&[(Q, 4, 1), (UP, 2, 3)]), files(&[(Q, 3, 5)], 2.0, &json!({"use_rslora": true})));
    let stack = lowered(&combined(&[(&x, 0.7), (&y, -0.3)], with(CombineMode::Stack)).unwrap());
    let (x, y) = (lowered(&x), lowered(&y));
    let parts = [Part { name: "x", adapter: &x, scale: 0.7 }, Part { name: "y", adapter: &y, scale: -0.3 }];
    let composition = compose(&parts, &FakeBase::new(false), Formats::uniform(DType::F32)).unwrap();
    for path in [Q, UP] {
        assert!(close(&delta(&stack, path), &delta(&composition, path), TOLERANCE), "{path}");
    }
}

#[test]
fn empty_fields_ask_for_nothing_beside_the_factors() {
    let empty = json!({"modules_to_save": [], "trainable_token_indices": [], "bias": "none"});
    let (plain, empty) = (plain(&[(Q, 4, 1)]), files(&[(Q, 4, 1)], 6.0, &empty));
    let stack = |files| combined(&[(files, 0.5)], with(CombineMode::Stack)).unwrap();
    let (plain, empty) = (stack(&plain), stack(&empty));
    assert_eq!((empty.config, empty.weights), (plain.config, plain.weights));
}

#[test]
fn a_stack_cut_to_a_rank_is_the_nearest_of_that_rank() {
    let (x, y) = (plain(&[(Q, 4, 1)]), plain(&[(Q, 5, 3)]));
    let whole = delta(&lowered(&combined(&[(&x, 1.0), (&y, 0.5)], with(CombineMode::Stack)).unwrap()), Q);
    let cut = |rank| {
        let options = CombineOptions { rank: Some(rank), ..with(CombineMode::Stack) };
        delta(&lowered(&combined(&[(&x, 1.0), (&y, 0.5)], options).unwrap()), Q)
    };
    assert!(close(&cut(9), &whole, TOLERANCE) && close(&cut(40), &whole, TOLERANCE));
    // The square of what is lost is the sum of the smallest squared singular values.
    let wide = whole.to_dtype(DType::F64).unwrap();
    let (squares, _) = crate::adapter::linalg::gram_eigen(&wide, 0..0).unwrap();
    for rank in [1, 3, 8] {
        let lost = square(&(cut(rank) - &whole).unwrap());
        let least: f64 = squares[..12 - rank].iter().sum();
        assert!((lost - least).abs() < 1e-4 * square(&whole), "{rank}: {lost} and {least}");
    }
}

#[test]
fn the_mean_has_the_mean_factors() {
    let (x, y) = (plain(&[(Q, 4, 1), (UP, 4, 7)]), plain(&[(Q, 4, 3)]));
    let mean = lowered(&combined(&[(&x, 3.0), (&y, 1.0)], with(CombineMode::Mean)).unwrap());
    let of = |weight_x: f64, weight_y: f64, seed, shape: (usize, usize)| {
        ((random(seed, shape) * weight_x).unwrap() + (random(seed + 2, shape) * weight_y).unwrap()).unwrap()
    };
    let (a, b) = (of(0.75, 0.25, 1, (4, 12)), of(0.75, 0.25, 2, (12, 4)));
    let expected = (b.matmul(&a).unwrap() * (6.0 / 4.0)).unwrap();
    assert!(close(&delta(&mean, Q), &expected, TOLERANCE));
    // The other adapter has nothing here: its factors count as zero.
    let alone = (delta(&lowered(&x), UP) * (0.75 * 0.75)).unwrap();
    assert!(close(&delta(&mean, UP), &alone, TOLERANCE));
}

#[test]
fn fair_minimises_its_objective() {
    let (x, y) = (plain(&[(Q, 4, 1)]), files(&[(Q, 4, 3)], 2.0, &json!({})));
    let parts = [(&x, 1.0), (&y, 2.0)];
    let lambda = 0.3;
    let options = CombineOptions { lambda: Some(lambda), ..with(CombineMode::Fair) };
    let factors = |files: &AdapterFiles| {
        let tensors = candle_core::safetensors::load_buffer(&files.weights, &Device::Cpu).unwrap();
        let tensor = |part: &str| tensors[&format!("base_model.model.{Q}.{part}.weight")].clone();
        (tensor("lora_A"), tensor("lora_B"))
    };
    let (a, b) = factors(&combined(&parts, options).unwrap());
    let (mean_a, mean_b) = factors(&combined(&parts, with(CombineMode::Mean)).unwrap());
    assert!(close(&a, &mean_a, 1e-6));
    let [x, y] = [&x, &y].map(|files| delta(&lowered(files), Q));
    let target = ((x * (1.0 / 3.0)).unwrap() + (y * (2.0 / 3.0)).unwrap()).unwrap();
    let objective = |b: &Tensor| {
        let miss = (&target - b.matmul(&a).unwrap()).unwrap();
        square(&miss) + lambda * square(&(b - &mean_b).unwrap())
    };
    let least = objective(&b);
    assert!(least < objective(&mean_b), "better than the mean");
    for seed in 0..20 {
        for step in [0.1, 0.01] {
            let near = (&b + (random(100 + seed, (12, 4)) * step).unwrap()).unwrap();
            assert!(least < objective(&near), "{seed} {step}");
        }
    }
}

#[test]
fn ties_trims_elects_signs_and_averages_what_agrees() {
    // Of four values two are kept. Sums: 3 - 5 < 0, 0, 0 - 1 < 0, 2 + 0 > 0.
    let values = [vec![3.0, 0.5, 0.1, 2.0], vec![-5.0, 0.0, -1.0, 0.5]];
    assert_eq!(factors::ties(&values, &[1.0, 2.0], 0.5), [-10.0, 0.0, -2.0, 2.0]);
    // Nothing is trimmed: both agree in the last place, and their mean is taken.
    assert_eq!(factors::ties(&values, &[1.0, 2.0], 1.0), [-10.0, 0.5, -2.0, 1.5]);
}

#[test]
fn dare_keeps_a_share_scaled_up_and_its_seed_decides() {
    let (x, y) = (plain(&[(Q, 4, 1)]), plain(&[(Q, 4, 3)]));
    let dare = |seed, density, weights: [f32; 2]| {
        let options = CombineOptions { seed: Some(seed), density: Some(density), ..with(CombineMode::Dare) };
        combined(&[(&x, weights[0]), (&y, weights[1])], options).unwrap()
    };
    assert_eq!(dare(1, 0.5, [1.0, 1.0]).weights, dare(1, 0.5, [1.0, 1.0]).weights);
    assert_ne!(dare(1, 0.5, [1.0, 1.0]).weights, dare(2, 0.5, [1.0, 1.0]).weights);
    let a = |files: &AdapterFiles| {
        let tensors = candle_core::safetensors::load_buffer(&files.weights, &Device::Cpu).unwrap();
        tensors[&format!("base_model.model.{Q}.lora_A.weight")].flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let whole = a(&dare(1, 1.0, [1.0, 0.0]));
    let mut kept = 0;
    for seed in 0..20 {
        for (found, whole) in a(&dare(seed, 0.25, [1.0, 0.0])).iter().zip(&whole) {
            assert!(*found == 0.0 || (found - 4.0 * whole).abs() < 1e-5, "{found} {whole}");
            kept += usize::from(*found != 0.0);
        }
    }
    let share = kept as f64 / (20 * whole.len()) as f64;
    assert!((0.2..0.3).contains(&share), "{share}");
}

#[test]
fn the_result_is_an_adapter_with_scale_one() {
    let (x, y) = (plain(&[(Q, 4, 1), (UP, 2, 3)]), plain(&[(Q, 3, 5)]));
    let files = combined(&[(&x, 1.0), (&y, 1.0)], with(CombineMode::Stack)).unwrap();
    let config: Value = serde_json::from_slice(&files.config).unwrap();
    assert_eq!(
        config,
        json!({"base_model_name_or_path": "x/y", "bias": "none", "fan_in_fan_out": false, "inference_mode": true,
            "init_lora_weights": true, "lora_alpha": 7, "alpha_pattern": {UP: 2}, "lora_dropout": 0.0,
            "peft_type": "LORA", "r": 7, "rank_pattern": {UP: 2}, "target_modules": [Q, UP],
            "task_type": "CAUSAL_LM", "use_rslora": false})
    );
    let again = combined(&[(&files, 1.0)], with(CombineMode::Stack)).unwrap();
    assert!(close(&delta(&lowered(&again), Q), &delta(&lowered(&files), Q), TOLERANCE));
}

#[test]
fn what_is_no_pair_of_factors_is_refused_by_name() {
    let sound = plain(&[(Q, 4, 1)]);
    let check = |files: &AdapterFiles, words: &str| {
        let error = combined(&[(&sound, 1.0), (files, 1.0)], with(CombineMode::Stack)).unwrap_err();
        assert!(error.starts_with("adapter `part1`: ") && error.contains(words), "{error}");
    };
    for (field, value) in [
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("init_lora_weights", json!("pissa")),
        ("use_qalora", json!(true)),
        ("alora_invocation_tokens", json!([1])),
        ("bias", json!("all")),
        ("modules_to_save", json!(["lm_head"])),
        ("trainable_token_indices", json!([1])),
        ("layer_replication", json!([[0, 1]])),
    ] {
        check(&files(&[(Q, 4, 1)], 1.0, &json!({field: value})), field);
    }
    check(&files(&[(Q, 4, 1)], 1.0, &json!({"peft_type": "IA3"})), "only `LORA` adapters can be combined, found `IA3`");
    check(&files(&[(Q, 4, 1)], 1.0, &json!({"rank_pattern": {"q_proj": 5}})), "expected two dimensions and rank 5");
    let key = format!("base_model.model.{Q}.lora_A.weight");
    let half = [(key.clone(), random(1, (4, 12)))];
    let config = sound.config.clone();
    check(&AdapterFiles::new(config.clone(), safetensors::serialize(half, None).unwrap()), "lora_B");
    let saved = [("base_model.model.lm_head.weight", random(1, (4, 12)))];
    check(&AdapterFiles::new(config, safetensors::serialize(saved, None).unwrap()), "lm_head.weight");
    check(&AdapterFiles::default(), "adapter_config.json");
}

#[test]
fn what_does_not_fit_together_is_refused_by_module() {
    let (x, other) = (plain(&[(Q, 4, 1)]), plain(&[(Q, 2, 3)]));
    for mode in [CombineMode::Mean, CombineMode::Fair] {
        let error = combined(&[(&x, 1.0), (&other, 1.0)], with(mode)).unwrap_err();
        assert!(error.contains(Q) && error.contains("only `stack`"), "{error}");
    }
    let tensors = [("lora_A", random(1, (4, 8))), ("lora_B", random(2, (12, 4)))];
    let tensors = tensors.map(|(part, tensor)| (format!("base_model.model.{Q}.{part}.weight"), tensor));
    let narrow = AdapterFiles { weights: safetensors::serialize(tensors, None).unwrap().into(), ..x.clone() };
    let error = combined(&[(&x, 1.0), (&narrow, 1.0)], with(CombineMode::Stack)).unwrap_err();
    assert!(error.contains("12 inputs") && error.contains("but 8") && error.contains("base models"), "{error}");
}

#[test]
fn options_out_of_place_or_range_are_refused_by_name() {
    let x = plain(&[(Q, 4, 1)]);
    let check = |weight: f32, options: CombineOptions, words: &str| {
        let error = combined(&[(&x, weight), (&x, 0.0)], options).unwrap_err();
        assert!(error.contains(words), "{error}");
    };
    use CombineMode::{Dare, Fair, Mean, Stack, Ties};
    check(1.0, CombineOptions { rank: Some(2), ..with(Mean) }, "`rank`: belongs to the mode `stack`");
    check(1.0, CombineOptions { rank: Some(0), ..with(Stack) }, "`rank`");
    check(1.0, CombineOptions { density: Some(0.5), ..with(Stack) }, "`density`: belongs to");
    check(1.0, with(Ties), "`density`: is missing");
    check(1.0, CombineOptions { density: Some(0.0), ..with(Ties) }, "`density`: expected");
    check(1.0, CombineOptions { density: Some(f64::NAN), ..with(Dare) }, "`density`: expected");
    check(1.0, CombineOptions { seed: Some(1), density: Some(0.5), ..with(Ties) }, "`seed`");
    check(1.0, CombineOptions { lambda: Some(-1.0), ..with(Fair) }, "`lambda`");
    check(-1.0, with(Mean), "`weight`: `part0`");
    check(0.0, with(Fair), "`weight`: all are 0");
    check(f32::NAN, with(Stack), "`weight`: `part0`");
    check(1e9, with(Stack), "`weight`: `part0`");
    assert!(combined(&[], with(Stack)).unwrap_err().contains("`adapters`"));
}
