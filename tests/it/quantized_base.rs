//! Quantised base weights.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use patchbay::adapter::{BaseWeights, LinearSlots, LoweredAdapter, SiteKind, Weight};
use patchbay::model::{Model, ModelConfig, QuantChoice};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tempfile::TempDir;

use crate::fixtures;
use crate::runner::{Runner, relative_difference};

/// What rounding weights and activations may do to the logits of the tiny model, relative to the largest. Random
/// weights over 32 inputs average little out: 8 bits give some percent, 4 bits ten times that.
const FORMATS: &[(QuantChoice, f32)] = &[(QuantChoice::Q8_0, 0.06), (QuantChoice::Q4_0, 0.5)];

/// The same for a wider model, whose rows are filled by blocks of 256, coarsest first. A bit more halves the difference;
/// 0.52, 0.24, 0.13 and 0.06 were measured.
const WIDE_FORMATS: &[(QuantChoice, f32)] =
    &[(QuantChoice::Q3K, 0.7), (QuantChoice::Q4K, 0.32), (QuantChoice::Q5K, 0.18), (QuantChoice::Q6K, 0.08)];

/// The quantised product also rounds the activations, to 8 bits by blocks of 32; a dense copy does not.
const ACTIVATION_ROUNDING: f32 = 0.05;

/// A model of random weights that is wider than the fixtures.
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
            let values: Vec<f32> = (0..rows * columns).map(|_| random.random_range(-bound..bound)).collect();
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

    fn load(&self, quant: Option<QuantChoice>) -> Model {
        let path = self.dir.path().to_string_lossy().into_owned();
        fixtures::load_model_with(&ModelConfig { quant, path, ..fixtures::model_config("llama") })
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
