//! Quantised base weights.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use patchbay::adapter::{BaseWeights, LinearSlots, LoweredAdapter, SiteKind, Weight};
use patchbay::kernels::cpu::Isa;
use patchbay::model::{DtypeChoice, KernelChoice, Model, ModelConfig, QuantChoice};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tempfile::TempDir;

use crate::fixtures;
use crate::runner::{Runner, relative_difference};

/// What rounding weights and activations may do to the logits of the tiny model, relative to the largest. Random
/// weights over 32 inputs average little out: 8 bits give some percent, 4 bits ten times that.
const FORMATS: &[(QuantChoice, f32)] =
    &[(QuantChoice::Int8, 0.06), (QuantChoice::Q8_0, 0.06), (QuantChoice::Q4_0, 0.5)];

/// The same for a wider model, whose rows are filled by blocks of 256, coarsest first. A bit more halves the difference;
/// 0.52, 0.24, 0.13 and 0.06 were measured.
const WIDE_FORMATS: &[(QuantChoice, f32)] =
    &[(QuantChoice::Q3K, 0.7), (QuantChoice::Q4K, 0.32), (QuantChoice::Q5K, 0.18), (QuantChoice::Q6K, 0.08)];

/// The quantised product also rounds the activations, to 8 bits by blocks of 32; a dense copy does not.
const ACTIVATION_ROUNDING: f32 = 0.05;

/// A model of random weights that is wider than the fixtures. bf16 holds them.
struct Wide {
    dir: TempDir,
}

impl Wide {
    const HIDDEN: usize = 256;
    const INTERMEDIATE: usize = 512;
    const VOCAB: usize = 128;
    const LAYERS: usize = 2;
    /// Elements of the linears of all layers: q and o, k and v of half the width, gate, up and down.
    const LINEAR_ELEMENTS: usize = Self::LAYERS * Self::HIDDEN * (3 * Self::HIDDEN + 3 * Self::INTERMEDIATE);

    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": Self::HIDDEN,
            "intermediate_size": Self::INTERMEDIATE, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_hidden_layers": Self::LAYERS, "vocab_size": Self::VOCAB, "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "dtype": "float32", "eos_token_id": 2,
        });
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(11);
        let mut tensors = HashMap::new();
        let mut matrix = |name: String, rows: usize, columns: usize| {
            // Uniform with variance 1 / columns, so that activations keep their size from layer to layer.
            let bound = (3. / columns as f32).sqrt();
            let values = (0..rows * columns).map(|_| bf16::from_f32(random.random_range(-bound..bound)).to_f32());
            let values: Vec<f32> = values.collect();
            tensors.insert(name, Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap());
        };
        let (hidden, intermediate) = (Self::HIDDEN, Self::INTERMEDIATE);
        matrix("model.embed_tokens.weight".to_owned(), Self::VOCAB, hidden);
        matrix("lm_head.weight".to_owned(), Self::VOCAB, hidden);
        for layer in 0..Self::LAYERS {
            for (module, rows, columns) in [
                ("self_attn.q_proj", hidden, hidden),
                ("self_attn.k_proj", hidden / 2, hidden),
                ("self_attn.v_proj", hidden / 2, hidden),
                ("self_attn.o_proj", hidden, hidden),
                ("mlp.gate_proj", intermediate, hidden),
                ("mlp.up_proj", intermediate, hidden),
                ("mlp.down_proj", hidden, intermediate),
            ] {
                matrix(format!("model.layers.{layer}.{module}.weight"), rows, columns);
            }
        }
        let ones = Tensor::ones(hidden, candle_core::DType::F32, &Device::Cpu).unwrap();
        for layer in 0..Self::LAYERS {
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                tensors.insert(format!("model.layers.{layer}.{norm}.weight"), ones.clone());
            }
        }
        tensors.insert("model.norm.weight".to_owned(), ones);
        candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
        Self { dir }
    }

    fn config(&self, quant: Option<QuantChoice>) -> ModelConfig {
        let path = self.dir.path().to_string_lossy().into_owned();
        ModelConfig { quant, path, ..fixtures::model_config("llama") }
    }

    fn load(&self, quant: Option<QuantChoice>) -> Model {
        fixtures::load_model_with(&self.config(quant))
    }
}

fn prompt_logits(model: Model) -> Tensor {
    let prompt = &fixtures::prompts()[3];
    Runner::new(model).prompt_logits(prompt, None, prompt.len())
}

#[test]
fn logits_stay_near_the_unquantized_ones() {
    let exact = prompt_logits(fixtures::load_model("llama"));
    for (quant, bound) in FORMATS {
        let difference = relative_difference(&prompt_logits(fixtures::load_quantized("llama", *quant)), &exact);
        assert!(difference > 0. && difference < *bound, "{quant:?} differs by {difference}");
    }
}

#[test]
fn finer_formats_of_wide_blocks_stay_nearer() {
    let wide = Wide::new();
    let exact = prompt_logits(wide.load(None));
    let mut coarser = f32::INFINITY;
    for (quant, bound) in WIDE_FORMATS {
        let difference = relative_difference(&prompt_logits(wide.load(Some(*quant))), &exact);
        assert!(difference > 0. && difference < *bound, "{quant:?} differs by {difference}");
        assert!(difference < coarser, "{quant:?} differs by {difference}, the format before it by {coarser}");
        coarser = difference;
    }
}

#[test]
fn rows_of_256_take_blocks_of_256() {
    let wide = Wide::new();
    let dense = wide.load(None).info().weight_bytes;
    // Bytes per block of 256: the levels, and the scales of its 16 or 8 parts.
    for (quant, block_bytes) in [
        (QuantChoice::Q3K, 32 + 64 + 12 + 2),
        (QuantChoice::Q4K, 128 + 12 + 4),
        (QuantChoice::Q5K, 32 + 128 + 12 + 4),
        (QuantChoice::Q6K, 128 + 64 + 16 + 2),
    ] {
        let expected = dense - Wide::LINEAR_ELEMENTS * 4 + Wide::LINEAR_ELEMENTS / 256 * block_bytes;
        assert_eq!(wide.load(Some(quant)).info().weight_bytes, expected, "{quant:?}");
    }
}

#[test]
fn reported_weights_are_those_multiplied_with() {
    let prompt = &fixtures::prompts()[3];
    let wide = Wide::new();
    let narrow_models = FORMATS.iter().map(|(quant, _)| (quant, fixtures::load_quantized("llama_bias", *quant)));
    let wide_models = WIDE_FORMATS.iter().map(|(quant, _)| (quant, wide.load(Some(*quant))));
    for (quant, model) in narrow_models.chain(wide_models) {
        let mut quantized = Runner::new(model);
        let mut dense_copy = LoweredAdapter::default();
        for (id, site) in quantized.model.sites().iter() {
            if matches!(site.kind, SiteKind::Linear { .. }) {
                let weight = Weight::Own(quantized.model.weight(id).unwrap());
                dense_copy.linears.insert(id, LinearSlots { weight, ..LinearSlots::default() });
            }
        }
        let base = quantized.prompt_logits(prompt, None, prompt.len());
        let copy = quantized.prompt_logits(prompt, Some(&dense_copy), prompt.len());
        let difference = relative_difference(&base, &copy);
        assert!(difference < ACTIVATION_ROUNDING, "{quant:?} differs by {difference}");
    }
}

/// What `int8` may do to logits, relative to the largest: on the fixtures' random weights, where 0.097 is the worst that was
/// measured, and on the sample model, which is trained, where it is 0.031.
const INT8_TOLERANCES: (f32, f32) = (0.12, 0.05);

/// Of 16 greedy tokens after each prompt, the share up to the first one that `int8` changes: at least this over all prompts
/// of the fixtures, whose random logits lie close together (0.82 measured), and of the sample model (0.98).
const INT8_AGREEMENT: (f64, f64) = (0.75, 0.9);

/// Largest difference of the logits over all prompts, and the share of greedy tokens before the first that differs.
fn accuracy(mut exact: Runner, mut quantised: Runner, prompts: &[Vec<u32>]) -> (f32, f64) {
    const TOKENS: usize = 16;
    let (mut worst, mut agreed) = (0.0_f32, 0);
    for prompt in prompts {
        let [expected, found] =
            [&mut exact, &mut quantised].map(|runner| runner.prompt_logits(prompt, None, prompt.len()));
        worst = worst.max(relative_difference(&found, &expected));
        let [expected, found] = [&mut exact, &mut quantised].map(|runner| runner.greedy(&[(prompt, None)], TOKENS));
        agreed += expected[0].iter().zip(&found[0]).take_while(|(a, b)| a == b).count();
    }
    (worst, agreed as f64 / (TOKENS * prompts.len()) as f64)
}

#[test]
fn int8_is_close_on_every_fixture() {
    let prompts = fixtures::prompts();
    let (mut worst, mut agreement) = (0.0_f32, Vec::new());
    for model in fixtures::manifest().models {
        let quantised = fixtures::load_quantized(&model.name, QuantChoice::Int8);
        let (difference, agreed) =
            accuracy(Runner::new(fixtures::load_model(&model.name)), Runner::new(quantised), &prompts);
        assert!(difference > 0.0, "{} is quantised", model.name);
        worst = worst.max(difference);
        agreement.push(agreed);
    }
    let agreement = agreement.iter().sum::<f64>() / agreement.len() as f64;
    assert!(worst < INT8_TOLERANCES.0, "logits differ by {worst}");
    assert!(agreement >= INT8_AGREEMENT.0, "{agreement} of the tokens agree");
}

/// Prompts that the sample model was trained for.
fn sample_prompts() -> Vec<Vec<u32>> {
    let golden: serde_json::Value =
        serde_json::from_slice(&std::fs::read(fixtures::dir().join("sample.json")).unwrap()).unwrap();
    let ids = |entry: &serde_json::Value| serde_json::from_value(entry["token_ids"].clone()).unwrap();
    let prompts: Vec<Vec<u32>> = golden["prompts"].as_array().unwrap().iter().map(ids).collect();
    assert!(prompts.len() >= 12, "the golden file has something to say");
    prompts
}

/// What keys and values in bf16 may do to logits, and the share of greedy tokens that they must leave, as for `int8`: on each
/// fixture (0.007 and 0.84 measured) and on the sample model (0.009 and 1).
const BF16_KV_BOUNDS: ((f32, f64), (f32, f64)) = ((0.01, 0.8), (0.015, 0.95));

#[test]
fn a_bf16_cache_is_close_on_every_fixture_and_answers_as_the_sample_model_does() {
    let check = |config: &ModelConfig, prompts: &[Vec<u32>], (tolerance, agreement): (f32, f64)| {
        let exact = Runner::new(fixtures::load_model_with(config));
        let (difference, agreed) =
            accuracy(exact, Runner::with_kv(fixtures::load_model_with(config), DType::BF16), prompts);
        assert!(difference > 0.0, "{}: keys and values are rounded", config.path);
        assert!(difference < tolerance, "{}: logits differ by {difference}", config.path);
        assert!(agreed >= agreement, "{}: {agreed} of the tokens agree", config.path);
    };
    for kernels in [KernelChoice::Auto, KernelChoice::Plain] {
        for model in fixtures::manifest().models {
            let config = ModelConfig { kernels, ..fixtures::model_config(&model.name) };
            check(&config, &fixtures::prompts(), BF16_KV_BOUNDS.0);
        }
        let sample = ModelConfig { device: fixtures::device_choice(), kernels, ..ModelConfig::default() };
        check(&sample, &sample_prompts(), BF16_KV_BOUNDS.1);
    }
}

#[test]
fn int8_answers_as_the_sample_model_does() {
    let prompts = sample_prompts();
    let config = ModelConfig { device: fixtures::device_choice(), ..ModelConfig::default() };
    let int8 = ModelConfig { quant: Some(QuantChoice::Int8), ..config.clone() };
    for dtype in [DtypeChoice::Auto, DtypeChoice::F32] {
        let exact = fixtures::load_model_with(&ModelConfig { dtype, ..config.clone() });
        let bytes = exact.info().weight_bytes;
        let quantised = fixtures::load_model_with(&ModelConfig { dtype, ..int8.clone() });
        let smaller = bytes as f64 / quantised.info().weight_bytes as f64;
        let (difference, agreement) = accuracy(Runner::new(exact), Runner::new(quantised), &prompts);
        assert!(smaller > 1.8, "{dtype:?}: {smaller} times smaller");
        assert!(difference < INT8_TOLERANCES.1, "{dtype:?}: logits differ by {difference}");
        assert!(agreement >= INT8_AGREEMENT.1, "{dtype:?}: {agreement} of the tokens agree");
    }
}

#[test]
fn int8_quantises_every_linear_and_the_head_and_no_row_knows_the_others() {
    let prompts = fixtures::prompts();
    let exact = fixtures::load_model("llama_tied");
    let mut runner = Runner::new(fixtures::load_quantized("llama_tied", QuantChoice::Int8));
    for (id, site) in exact.sites().iter() {
        let changed = relative_difference(&runner.model.weight(id).unwrap(), &exact.weight(id).unwrap());
        assert_eq!(changed > 0.0, !matches!(site.kind, SiteKind::Norm { .. }), "{} changed by {changed}", site.path);
    }
    let alone: Vec<_> = prompts.iter().map(|prompt| runner.prompt_logits(prompt, None, 1)).collect();
    let mut contexts: Vec<_> = prompts.iter().map(|prompt| runner.context(prompt, None)).collect();
    let mut work: Vec<_> = contexts.iter_mut().zip(&prompts).map(|(context, prompt)| (context, prompt.len())).collect();
    for (together, alone) in runner.step(&mut work).iter().zip(&alone) {
        let bits = |logits: &Tensor| logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(bits(together), bits(alone));
    }
}

#[test]
fn bf16_takes_integers_where_those_are_faster_and_comes_nearer() {
    let wide = Wide::new();
    let bf16 = ModelConfig { dtype: DtypeChoice::Bf16, ..wide.config(None) };
    let (exact, rounded) = (wide.load(None), fixtures::load_model_with(&bf16));
    let integers = Isa::best().prefers_integers();
    let norms = Wide::HIDDEN * (2 * Wide::LAYERS + 1) * 4;
    let embedding = Wide::VOCAB * Wide::HIDDEN * 2;
    let multiplied = Wide::LINEAR_ELEMENTS + Wide::VOCAB * Wide::HIDDEN;
    // Integers have a byte of scale for 64.
    let scales = if integers { multiplied / 64 } else { 0 };
    assert_eq!(rounded.info().weight_bytes, norms + embedding + 2 * multiplied + scales);
    for (id, site) in exact.sites().iter() {
        let changed = relative_difference(&rounded.weight(id).unwrap(), &exact.weight(id).unwrap());
        // Half of a unit, of which a group's largest has 2,048 or more.
        assert!(changed <= if integers { 1. / 4096. } else { 0. }, "{} changed by {changed}", site.path);
    }
    let difference = relative_difference(&prompt_logits(rounded), &prompt_logits(exact));
    // bf16 keeps 8 bits of every activation, integers 13 of a group's largest.
    let bound = if integers { 1e-3 } else { 1.5e-2 };
    assert!(difference > 0. && difference < bound, "{difference}");
}

#[test]
fn int8_needs_the_kernels_that_have_it() {
    let config =
        ModelConfig { quant: Some(QuantChoice::Int8), kernels: KernelChoice::Plain, ..fixtures::model_config("llama") };
    let error = Model::load(Path::new(&config.path), &config).err().expect("plain kernels have no int8").to_string();
    assert!(error.contains("quant") && error.contains("kernels"), "{error}");
}

#[test]
fn rows_that_blocks_do_not_fill_take_smaller_blocks_or_none() {
    // Rows of 32 and 48 elements: no block of 256 fits, 32 fits the former only.
    let exact = fixtures::load_model("llama");
    let quantized = fixtures::load_quantized("llama", QuantChoice::Q4K);
    let changed = |path: &str| {
        let id = exact.sites().find(path).unwrap();
        relative_difference(&quantized.weight(id).unwrap(), &exact.weight(id).unwrap()) > 0.
    };
    assert!(changed("model.layers.0.self_attn.q_proj"));
    for path in ["model.layers.0.mlp.down_proj", "lm_head", "model.embed_tokens", "model.norm"] {
        assert!(!changed(path), "{path}");
    }
    assert!(quantized.info().weight_bytes < exact.info().weight_bytes);
}
