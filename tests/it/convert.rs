//! Converted adapters and models give what PEFT gives: every fixture that can be converted, to every form.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use bytes::Bytes;
use candle_core::{DType, Device, Tensor};
use patchbay::adapter::{
    AdapterError, AdapterFiles, Converted, Form, Formats, LowerOptions, MergedModel, convert, lower,
};
use patchbay::model::{Model, write_merged};
use serde_json::{Value, json};

use crate::fixtures::{self, AdapterCase};
use crate::golden_adapters::{F32_TOLERANCE, asked, assert_none, difference_of, for_each_model, read};
use crate::runner::{Runner, relative_difference};

const OPTIONS: LowerOptions =
    LowerOptions { merge: false, formats: Formats::uniform(DType::F32), own_bytes_max: 1 << 30 };

fn to_adapter(runner: &Runner, files: &AdapterFiles, form: Form) -> Result<AdapterFiles, AdapterError> {
    match convert(files, &runner.model, form, DType::F32)? {
        Converted::Adapter(files, _) => Ok(files),
        Converted::Model(..) => panic!("{form:?} is a form of adapters"),
    }
}

fn to_model(runner: &Runner, files: &AdapterFiles) -> Result<MergedModel, AdapterError> {
    match convert(files, &runner.model, Form::Merged, DType::F32)? {
        Converted::Model(model, _) => Ok(model),
        Converted::Adapter(..) => panic!("a model was asked for"),
    }
}

/// What a refusal says, without the names of one case.
fn reason(error: &AdapterError) -> String {
    match error {
        AdapterError::NotConvertible { reason, .. } => reason.clone(),
        other => panic!("expected a refusal of the conversion, found: {other}"),
    }
}

/// Converts every case to `form`; what comes out must give PEFT's logits. Returns the cases by what became of them:
/// `converted`, or why not.
fn convert_all(form: Form) -> BTreeMap<String, Vec<AdapterCase>> {
    let (failures, outcomes) = (RefCell::new(Vec::new()), RefCell::new(BTreeMap::<String, Vec<AdapterCase>>::new()));
    for_each_model(|runner, cases| {
        for case in cases {
            let outcome = match to_adapter(runner, &read(case), form) {
                Ok(files) => {
                    let (adapter, _) = lower(&files, &runner.model, &OPTIONS).unwrap();
                    let difference = difference_of(runner, &asked(case), Some(&adapter));
                    if difference >= F32_TOLERANCE {
                        failures.borrow_mut().push(format!("{}: differs by {difference:e}", case.dir));
                    }
                    CONVERTED.to_owned()
                }
                Err(error) => reason(&error),
            };
            outcomes.borrow_mut().entry(outcome).or_default().push(case.clone());
        }
    });
    assert_none(&failures.into_inner());
    outcomes.into_inner()
}

const CONVERTED: &str = "converted";

#[track_caller]
fn check_converted(outcomes: &BTreeMap<String, Vec<AdapterCase>>, kinds: &[&str], names: &[&str]) {
    let converted = &outcomes[CONVERTED];
    let missing = kinds.iter().filter(|kind| !converted.iter().any(|case| case.peft_type == **kind));
    assert_eq!(missing.collect::<Vec<_>>(), Vec::<&&str>::new());
    let missing = names.iter().filter(|name| !converted.iter().any(|case| case.name == **name));
    assert_eq!(missing.collect::<Vec<_>>(), Vec::<&&str>::new());
}

/// The kinds of the refused cases, by reason.
#[track_caller]
fn check_refused(outcomes: &BTreeMap<String, Vec<AdapterCase>>, words: &str, kinds: &[&str]) {
    let refused = outcomes.iter().filter(|(reason, _)| reason.contains(words)).flat_map(|(_, cases)| cases);
    let found: BTreeSet<&str> = refused.map(|case| case.peft_type.as_str()).collect();
    for kind in kinds {
        assert!(found.contains(kind), "no case of {kind} is refused because {words}: {found:?}");
    }
}

#[test]
fn whatever_adds_low_rank_terms_equals_peft_as_plain_lora() {
    let outcomes = convert_all(Form::Lora);
    let kinds = "ADALORA BEFT BONE DEFT DELORA FLORA FOURIERFT GLORA GRALORA HRA LOHA LOKR LORA MISS OSF PEANUT POLY PVERA \
                 SARA SHIRA SUPERTUNING SVFIT TINYLORA UNILORA VBLORA VERA WAVEFT";
    let names = "lora_pissa lora_pissa_rslora lora_olora lora_kasa lora_kasa_patterns lora_qalora lora_bdlora alora_pair \
                 lora_lora_bias lora_bias_all lora_bias_only lora_save_head lora_save_norms lora_save_embed lora_tokens_dict \
                 lora_tokens_head lora_tied_embed lora_tied_save lora_tied_tokens lora_embed_head lora_layers miss_mini_ragged";
    check_converted(&outcomes, &words(kinds), &words(names));
    check_refused(&outcomes, "its output is scaled or rotated", &["LORA", "SSF", "ROAD", "IA3"]);
    check_refused(&outcomes, "its input is scaled or rotated", &["OFT", "BOFT", "IA3"]);
    check_refused(&outcomes, "it would take rank", &["RANDLORA", "LOHA", "SUPERTUNING"]);
    check_refused(&outcomes, "no low-rank term says the same", &["HIRA", "MISS", "FROD", "C3A"]);
    check_refused(&outcomes, "stands before the prompt", &["PROMPT_TUNING", "PREFIX_TUNING"]);
    check_refused(&outcomes, "nothing is added", &["LN_TUNING", "TRAINABLE_TOKENS"]);
    check_refused(&outcomes, "gains a shift", &["SSF"]);
    for case in outcomes[CONVERTED].iter().filter(|case| case.peft_type == "LORA") {
        assert!(!case.name.contains("dora"), "{}", case.dir);
    }
}

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

#[test]
fn bone_files_equal_peft_as_miss() {
    let outcomes = convert_all(Form::Miss);
    check_converted(&outcomes, &["BONE", "MISS"], &["bone_bat", "bone_ragged", "bone_native_oldest", "miss_mini"]);
    assert!(outcomes[CONVERTED].iter().all(|case| ["BONE", "MISS"].contains(&case.peft_type.as_str())));
    check_refused(&outcomes, "form row", &["BONE"]);
}

/// Files of PEFT 0.15 whose outputs are not scaled.
#[test]
fn older_oft_files_keep_their_effect_in_the_current_form() {
    let failures = RefCell::new(Vec::new());
    for_each_model(|runner, cases| {
        for case in cases.iter().filter(|case| case.name.starts_with("oft_0_15")) {
            let mut files = read(case);
            files.weights = with_tensors(&files.weights, |key, tensor| match key.ends_with("oft_s") {
                true => tensor.ones_like().unwrap(),
                false => tensor,
            });
            let converted = to_adapter(runner, &files, Form::Oft).unwrap();
            let config: Value = serde_json::from_slice(&converted.config).unwrap();
            assert_eq!((&config["r"], &config["oft_block_size"]), (&json!(0), &json!(8)), "{}", case.dir);
            let [before, after] = [&files, &converted].map(|files| lower(files, &runner.model, &OPTIONS).unwrap().0);
            for prompt in fixtures::prompts() {
                let [before, after] =
                    [&before, &after].map(|adapter| runner.prompt_logits(&prompt, Some(adapter), prompt.len()));
                let difference = relative_difference(&after, &before);
                if difference >= F32_TOLERANCE {
                    failures.borrow_mut().push(format!("{}: differs by {difference:e}", case.dir));
                }
            }
        }
    });
    assert_none(&failures.into_inner());
}

#[test]
fn oft_files_without_an_equal_are_refused() {
    let outcomes = convert_all(Form::Oft);
    assert!(!outcomes.contains_key(CONVERTED), "{:?}", outcomes.keys());
    for reason in
        ["its output is rotated", "its output is scaled (`oft_s`)", "has the current form already", "embeddings"]
    {
        check_refused(&outcomes, reason, &["OFT"]);
    }
}

/// The same file with other tensors.
fn with_tensors(bytes: &[u8], change: impl Fn(&str, Tensor) -> Tensor) -> Bytes {
    let tensors = candle_core::safetensors::load_buffer(bytes, &Device::Cpu).unwrap();
    let tensors: BTreeMap<String, Tensor> =
        tensors.into_iter().map(|(key, tensor)| (key.clone(), change(&key, tensor))).collect();
    safetensors::serialize(&tensors, None).unwrap().into()
}

fn model_dir(name: &str) -> std::path::PathBuf {
    fixtures::dir().join("models").join(name)
}

fn load(dir: &Path) -> Model {
    let config =
        patchbay::model::ModelConfig { path: dir.to_string_lossy().into_owned(), ..fixtures::model_config("") };
    fixtures::load_model_with(&config)
}

/// The outcome of merging a case: PEFT's logits from the model that was written, or why none is.
fn merge_case(runner: &Runner, case: &AdapterCase, failures: &RefCell<Vec<String>>) -> String {
    let model = match to_model(runner, &read(case)) {
        Ok(model) => model,
        Err(error) => return reason(&error),
    };
    let temp = tempfile::tempdir().unwrap();
    if let Err(error) = write_merged(&model_dir(&case.model), &model, temp.path()) {
        assert!(!model.new_biases.is_empty(), "{}: {error}", case.dir);
        return error.to_string().split(": ").nth(1).unwrap().to_owned();
    }
    let difference = difference_of(&mut Runner::new(load(temp.path())), &asked(case), None);
    if difference >= F32_TOLERANCE {
        failures.borrow_mut().push(format!("{}: differs by {difference:e}", case.dir));
    }
    "written".to_owned()
}

/// Why a case has no merged model, as its name shows.
fn may_be_refused(case: &AdapterCase, reason: &str) -> bool {
    let begins = |names: &[&str]| names.iter().any(|name| case.name.starts_with(name));
    match reason {
        "a merged model cannot sleep until its tokens occur" => begins(&["alora"]),
        _ if reason.starts_with("it gains a shift, which the architecture's norms do not have") => begins(&["ssf"]),
        "functions inside a layer are no part of a model" => begins(&["adaption", "bottleneck"]),
        "every token chooses among experts, so no weight does for all" => begins(&["arrow", "xlora"]),
        "what stands before the prompt is no part of a model" => {
            begins(&["cartridge", "cpt", "multitask", "p_tuning", "prefix", "prompt"])
        }
        _ => reason.contains("has no bias there") && !case.model.starts_with("llama"),
    }
}

#[test]
fn merged_models_equal_peft() {
    let failures = RefCell::new(Vec::new());
    let written = std::cell::Cell::new(0);
    for_each_model(|runner, cases| {
        for case in cases {
            match merge_case(runner, case, &failures).as_str() {
                "written" => written.set(written.get() + 1),
                reason if may_be_refused(case, reason) => {}
                reason => failures.borrow_mut().push(format!("{}: {reason}", case.dir)),
            }
        }
    });
    assert_none(&failures.into_inner());
    assert!(written.get() > 300, "{} models were written", written.get());
}

#[test]
fn a_refused_shift_names_what_would_have_to_hold_it() {
    let runner = Runner::new(fixtures::load_model("llama"));
    let refused = |case: &str| {
        let files = fixtures::adapter_files(&format!("adapters/llama/{case}")).unwrap();
        to_model(&runner, &files).unwrap_err().to_string()
    };
    let last = refused("ssf_head");
    assert!(last.contains("model.norm") && last.contains("a bias of the output head, which has none"), "{last}");
    let first = refused("ssf_norms");
    assert!(
        first.contains("layers.0.input_layernorm") && first.contains("no biases behind all of its norms"),
        "{first}"
    );
}

/// Copies a model directory with its weights in two files and an index.
fn shard(from: &Path, to: &Path) {
    let tensors = candle_core::safetensors::load(from.join("model.safetensors"), &Device::Cpu).unwrap();
    let files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let file_of = |name: &str| files[usize::from(name.contains(".1.") || name.starts_with("lm_head"))];
    for file in files {
        let part: BTreeMap<&String, &Tensor> = tensors.iter().filter(|(name, _)| file_of(name) == file).collect();
        std::fs::write(to.join(file), safetensors::serialize(part, None).unwrap()).unwrap();
    }
    let map: BTreeMap<&String, &str> = tensors.keys().map(|name| (name, file_of(name))).collect();
    let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
    std::fs::write(to.join("model.safetensors.index.json"), index.to_string()).unwrap();
    std::fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    std::fs::write(to.join("tokenizer.json"), "{}").unwrap();
    std::fs::write(to.join("pytorch_model.bin"), "pickle").unwrap();
}

/// New biases of some linears switch on those of all that the config's field means.
#[test]
fn shards_stay_shards_and_new_biases_are_switched_on() {
    let temp = tempfile::tempdir().unwrap();
    let [base, out] = ["base", "out"].map(|name| temp.path().join(name));
    [&base, &out].iter().for_each(|dir| std::fs::create_dir(dir).unwrap());
    shard(&model_dir("llama"), &base);
    let runner = Runner::new(load(&base));
    let case = fixtures::manifest().cases.into_iter().find(|case| case.model == "llama" && case.name == "beft");
    let case = case.expect("a case that adds biases");
    write_merged(&base, &to_model(&runner, &read(&case)).unwrap(), &out).unwrap();
    let difference = difference_of(&mut Runner::new(load(&out)), &asked(&case), None);
    assert!(difference < F32_TOLERANCE, "{difference}");

    let json = |file: &str| -> Value { serde_json::from_slice(&std::fs::read(out.join(file)).unwrap()).unwrap() };
    let index = json("model.safetensors.index.json");
    let (mut total, mut names) = (0, BTreeSet::new());
    for file in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        for (name, tensor) in candle_core::safetensors::load(out.join(file), &Device::Cpu).unwrap() {
            assert_eq!(index["weight_map"][&name], file, "{name}");
            total += tensor.elem_count() * tensor.dtype().size_in_bytes();
            names.insert(name);
        }
    }
    assert_eq!(index["weight_map"].as_object().unwrap().len(), names.len());
    assert_eq!(index["metadata"]["total_size"], total);
    assert!(names.contains("model.layers.1.self_attn.o_proj.bias"), "{names:?}");
    assert_eq!(json("config.json")["attention_bias"], true);
    assert!(out.join("tokenizer.json").is_file() && !out.join("pytorch_model.bin").exists());
}

#[test]
fn a_head_that_no_longer_is_the_embedding_is_written_beside_it() {
    let runner = Runner::new(fixtures::load_model("llama_tied"));
    let find = |name: &str| fixtures::manifest().cases.into_iter().find(|c| c.model == "llama_tied" && c.name == name);
    for (name, untied) in [("lora_head", true), ("lora_embed", true), ("lora_tokens_list", false), ("lora_qv", false)] {
        let Some(case) = find(name) else { continue };
        let temp = tempfile::tempdir().unwrap();
        let merged = to_model(&runner, &read(&case)).unwrap();
        assert_eq!(merged.untied, untied, "{name}");
        write_merged(&model_dir("llama_tied"), &merged, temp.path()).unwrap();
        let tensors = candle_core::safetensors::load(temp.path().join("model.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(tensors.contains_key("lm_head.weight"), untied, "{name}");
    }
}

/// Values of a half format are rounded once, from the merged weight.
#[test]
fn merged_weights_are_stored_in_the_formats_of_the_checkpoint() {
    let temp = tempfile::tempdir().unwrap();
    let [base, out] = ["base", "out"].map(|name| temp.path().join(name));
    [&base, &out].iter().for_each(|dir| std::fs::create_dir(dir).unwrap());
    let source = model_dir("llama");
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let halved = with_tensors(&bytes, |_, tensor| tensor.to_dtype(DType::BF16).unwrap());
    std::fs::write(base.join("model.safetensors"), halved).unwrap();
    let config = std::fs::read_to_string(source.join("config.json")).unwrap().replace("float32", "bfloat16");
    std::fs::write(base.join("config.json"), config).unwrap();
    let runner = Runner::new(load(&base));
    assert_eq!(patchbay::model::stored_dtype(&base).unwrap(), DType::BF16);
    let case = fixtures::manifest().cases.into_iter().find(|case| case.model == "llama" && case.name == "lora_dora");
    let files = read(&case.unwrap());
    for dtype in [DType::BF16, DType::F32] {
        let Converted::Model(merged, _) = convert(&files, &runner.model, Form::Merged, dtype).unwrap() else {
            panic!("a model was asked for")
        };
        write_merged(&base, &merged, &out).unwrap();
        let tensors = candle_core::safetensors::load(out.join("model.safetensors"), &Device::Cpu).unwrap();
        for (name, tensor) in &tensors {
            assert_eq!(tensor.dtype(), DType::BF16, "{name}");
        }
        let exact = to_model(&runner, &files).unwrap();
        for (name, tensor) in &exact.tensors {
            let rounded = tensor.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
            let written = tensors[name].to_dtype(DType::F32).unwrap();
            assert_eq!(relative_difference(&written, &rounded), 0.0, "{name}");
        }
    }
}

#[test]
fn what_the_checkpoint_has_no_place_for_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let write = |name: &str, tensor: Tensor, biases: &[&str]| {
        let merged = MergedModel {
            tensors: BTreeMap::from([(name.to_owned(), tensor)]),
            new_biases: biases.iter().map(|path| (*path).to_owned()).collect(),
            untied: false,
        };
        write_merged(&model_dir("mistral"), &merged, temp.path()).unwrap_err().to_string()
    };
    assert!(
        write("model.nowhere.weight", zeros(&[3]), &[]).contains("`model.nowhere.weight`: the checkpoint does not")
    );
    assert!(
        write("model.norm.weight", zeros(&[3]), &[]).contains("`model.norm.weight`: expected shape [32], found [3]")
    );
    let infinite = (zeros(&[32]) + f64::INFINITY).unwrap();
    assert!(write("model.norm.weight", infinite, &[]).contains("not finite in f32"));
    let path = "model.layers.0.self_attn.q_proj";
    let error = write(&format!("{path}.bias"), zeros(&[32]), &[path]);
    assert!(error.contains("MistralForCausalLM has no bias there"), "{error}");
}
