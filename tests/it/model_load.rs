//! Loading: formats, facts, and what is refused.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use patchbay::adapter::{BaseWeights, SiteKind};
use patchbay::model::{DtypeChoice, Model, ModelConfig, RopeLengthRule};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fixtures;
use crate::runner::{Runner, relative_difference};

/// bf16 keeps 8 bits of a weight; two layers of random weights add the roundings up.
const BF16_TOLERANCE: f32 = 5e-2;
/// f16 keeps 11 bits.
const F16_TOLERANCE: f32 = 1e-2;

/// A copy of a model fixture to change.
struct Copy {
    dir: TempDir,
}

impl Copy {
    fn of(name: &str) -> Self {
        let dir = TempDir::new().unwrap();
        for file in std::fs::read_dir(fixtures::dir().join("models").join(name)).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
        }
        Self { dir }
    }

    fn path(&self, file: &str) -> std::path::PathBuf {
        self.dir.path().join(file)
    }

    fn edit_json(&self, file: &str, edit: impl FnOnce(&mut Value)) {
        let mut value: Value = serde_json::from_slice(&std::fs::read(self.path(file)).unwrap()).unwrap();
        edit(&mut value);
        std::fs::write(self.path(file), value.to_string()).unwrap();
    }

    fn edit_tensors(&self, edit: impl FnOnce(&mut HashMap<String, Tensor>)) {
        let file = self.path("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
        edit(&mut tensors);
        candle_core::safetensors::save(&tensors, &file).unwrap();
    }

    fn load_with(&self, config: ModelConfig) -> Result<Model, String> {
        let config = ModelConfig { device: fixtures::device_choice(), ..config };
        Model::load(self.dir.path(), &config).map_err(|error| error.to_string())
    }

    fn load(&self) -> Result<Model, String> {
        self.load_with(ModelConfig::default())
    }

    #[track_caller]
    fn assert_refused(&self, expected: &str) {
        let message = self.load().err().expect("the model is refused");
        assert!(message.contains(expected), "expected {expected:?} in {message:?}");
    }
}

#[test]
fn half_precision_stays_near_f32() {
    let prompts = fixtures::prompts();
    for model in fixtures::manifest().models {
        let expected = fixtures::expected(&model.dir);
        for (dtype, tolerance) in [(DtypeChoice::Bf16, BF16_TOLERANCE), (DtypeChoice::F16, F16_TOLERANCE)] {
            let config = ModelConfig { dtype, ..fixtures::model_config(&model.name) };
            let mut runner = Runner::new(fixtures::load_model_with(&config));
            for (p, prompt) in prompts.iter().enumerate() {
                let logits = runner.prompt_logits(prompt, None, prompt.len());
                let difference = relative_difference(&logits, &expected[&format!("logits_{p}")]);
                assert!(difference < tolerance, "{} prompt {p} {dtype:?}: differs by {difference}", model.name);
            }
        }
    }
}

#[test]
fn auto_dtype_keeps_the_checkpoints_format_in_memory() {
    let copy = Copy::of("llama");
    let exact = copy.load().unwrap().info().weight_bytes;
    copy.edit_json("config.json", |config| config["dtype"] = json!("bfloat16"));
    copy.edit_tensors(|tensors| {
        for tensor in tensors.values_mut() {
            *tensor = tensor.to_dtype(DType::BF16).unwrap();
        }
    });
    let model = copy.load().unwrap();
    assert!(model.info().weight_bytes < exact * 6 / 10, "{} of {exact} bytes", model.info().weight_bytes);
    let on_cpu = model.info().device.is_cpu();
    assert_eq!(model.info().dtype, if on_cpu { DType::F32 } else { DType::BF16 });
}

#[test]
fn facts_come_from_the_config() {
    let info = |name: &str| fixtures::load_model(name).info().clone();
    let llama = info("llama");
    assert_eq!((llama.vocab_size, llama.hidden_size, llama.num_layers), (128, 32, 2));
    assert_eq!((llama.num_kv_heads, llama.head_dim, llama.context_tokens_max), (2, 8, 128));
    assert_eq!(llama.generation.eos_token_ids, [2]);
    assert_eq!(info("qwen3").head_dim, 16);
    assert_eq!(info("llama_rope_dynamic").rope_length_rule, RopeLengthRule::Dynamic { threshold: 16 });
    assert_eq!(info("llama_rope_dynamic").context_tokens_max, 32);
    assert_eq!(info("phi3_longrope").rope_length_rule, RopeLengthRule::Switch { threshold: 16 });
    assert_eq!(info("phi3_longrope").context_tokens_max, 64);
}

#[test]
fn sites_carry_the_checkpoints_module_paths() {
    let paths = |name: &str| -> Vec<String> {
        let model = fixtures::load_model(name);
        model.sites().iter().map(|(_, site)| site.path.clone()).filter(|path| !path.contains("layers.1.")).collect()
    };
    insta::assert_snapshot!(paths("qwen3").join(" "), @"model.embed_tokens model.layers.0.input_layernorm model.layers.0.self_attn.q_proj model.layers.0.self_attn.k_proj model.layers.0.self_attn.v_proj model.layers.0.self_attn.q_norm model.layers.0.self_attn.k_norm model.layers.0.self_attn.o_proj model.layers.0.post_attention_layernorm model.layers.0.mlp.gate_proj model.layers.0.mlp.up_proj model.layers.0.mlp.down_proj model.norm lm_head");
    insta::assert_snapshot!(paths("phi3").join(" "), @"model.embed_tokens model.layers.0.input_layernorm model.layers.0.self_attn.o_proj model.layers.0.self_attn.qkv_proj model.layers.0.post_attention_layernorm model.layers.0.mlp.gate_up_proj model.layers.0.mlp.down_proj model.norm lm_head");
}

#[test]
fn base_weights_are_the_checkpoints() {
    for name in ["llama_bias", "llama_tied", "phi3"] {
        let model = fixtures::load_model(name);
        let file = fixtures::dir().join("models").join(name).join("model.safetensors");
        let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        for (id, site) in model.sites().iter() {
            let stored = match site.path.as_str() {
                "lm_head" if model.tied_embeddings() => "model.embed_tokens",
                path => path,
            };
            let weight = model.weight(id).unwrap();
            assert_eq!(relative_difference(&weight, &tensors[&format!("{stored}.weight")]), 0., "{name} {}", site.path);
            let bias = model.bias(id).unwrap();
            assert_eq!(bias.is_some(), tensors.contains_key(&format!("{}.bias", site.path)), "{name} {}", site.path);
            if let SiteKind::Linear { out_features, in_features, .. } = site.kind {
                assert_eq!(weight.dims(), [out_features, in_features]);
            }
        }
    }
}

#[test]
fn configs_that_are_not_understood_are_refused_by_field() {
    let check = |edit: fn(&mut Value), expected: &str| {
        let copy = Copy::of("llama");
        copy.edit_json("config.json", edit);
        copy.assert_refused(expected);
    };
    check(|c| c["architectures"] = json!(["GPT2LMHeadModel"]), "GPT2LMHeadModel is not supported; supported are Llama");
    check(|c| c["architectures"] = json!([]), "`architectures`");
    check(|c| c["dtype"] = json!("float8"), "`dtype`");
    check(|c| c["num_key_value_heads"] = json!(3), "`num_key_value_heads`");
    check(|c| c["num_hidden_layers"] = json!(0), "`num_hidden_layers`");
    check(|c| drop(c.as_object_mut().unwrap().remove("hidden_size")), "missing field `hidden_size`");
    check(|c| c["hidden_act"] = json!("quick"), "quick");
    check(|c| c["rope_parameters"] = json!({"rope_type": "spiral"}), "spiral is not supported");
    check(|c| c["rope_parameters"] = json!({"rope_type": "linear"}), "`factor`");
    check(|c| c["rope_parameters"] = json!({"rope_type": "linear", "factor": 0}), "`factor`");
    check(|c| c["rope_parameters"] = json!({"rope_type": "longrope", "short_factor": [1]}), "`long_factor`");
    check(|c| c["rope_parameters"] = json!({"full_attention": {"rope_type": "default"}}), "`rope_parameters`");
    check(|c| c["partial_rotary_factor"] = json!(0.1), "`partial_rotary_factor`");
    check(|c| c["eos_token_id"] = json!("end"), "`eos_token_id`");
}

#[test]
fn tensors_are_checked_by_name() {
    let check = |edit: fn(&mut HashMap<String, Tensor>), expected: &str| {
        let copy = Copy::of("llama");
        copy.edit_tensors(edit);
        copy.assert_refused(expected);
    };
    check(
        |t| drop(t.remove("model.layers.1.mlp.up_proj.weight")),
        "`model.layers.1.mlp.up_proj.weight`: the checkpoint",
    );
    check(
        |t| drop(t.insert("model.norm.weight".into(), Tensor::zeros(31, DType::F32, &Device::Cpu).unwrap())),
        "`model.norm.weight`: expected shape [32], found [31]",
    );
    check(
        |t| drop(t.insert("lm_head.weight".into(), Tensor::zeros((128, 32), DType::I64, &Device::Cpu).unwrap())),
        "`lm_head.weight`: expected F32, F16 or BF16, found I64",
    );
}

#[test]
fn tensors_that_nothing_uses_do_not_hinder() {
    let copy = Copy::of("llama");
    copy.edit_tensors(|tensors| {
        let table = tensors["model.norm.weight"].clone();
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), table);
    });
    assert!(copy.load().is_ok());
}

#[test]
fn broken_files_are_refused_by_name() {
    let copy = Copy::of("llama");
    let file = copy.path("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    for len in [0, 4, 100, bytes.len() - 1] {
        std::fs::write(&file, &bytes[..len]).unwrap();
        copy.assert_refused("model.safetensors");
    }
    std::fs::remove_file(&file).unwrap();
    copy.assert_refused("neither it nor model.safetensors.index.json exists");
    std::fs::write(copy.path("config.json"), "{").unwrap();
    copy.assert_refused("config.json");
}

#[test]
fn an_index_cannot_point_outside_the_directory() {
    for outside in ["../model.safetensors", "/model.safetensors", "sub/model.safetensors", ".."] {
        let copy = Copy::of("mistral");
        copy.edit_json("model.safetensors.index.json", |index| {
            index["weight_map"]["model.norm.weight"] = json!(outside);
        });
        copy.assert_refused("is not a file name in the model directory");
    }
    let copy = Copy::of("mistral");
    copy.edit_json("model.safetensors.index.json", |index| {
        index["weight_map"]["model.ghost"] = index["weight_map"]["model.norm.weight"].clone();
    });
    copy.assert_refused("`model.ghost`");
}

#[test]
fn a_context_longer_than_the_model_supports_is_refused() {
    let copy = Copy::of("llama");
    let with = |max| ModelConfig { context_tokens_max: Some(max), ..ModelConfig::default() };
    assert_eq!(copy.load_with(with(100)).unwrap().info().context_tokens_max, 100);
    let message = copy.load_with(with(129)).err().unwrap();
    assert!(message.contains("`context_tokens_max`: expected 1 to 128"), "{message}");
}

#[test]
fn a_directory_is_located_as_it_is() {
    let config = fixtures::model_config("llama");
    assert_eq!(patchbay::model::locate(&config).unwrap(), Path::new(&config.path));
}
