//! Adapters that must be refused, each with a message that names the fault.

use candle_core::DType;
use patchbay::adapter::{AdapterFiles, Formats, KINDS, LowerOptions, REFUSED, inspect, lower};

use crate::fixtures;

fn read(dir: &str) -> AdapterFiles {
    // A missing file is what an upload without it looks like: no bytes.
    let read = |name: &str| std::fs::read(fixtures::dir().join(dir).join(name)).unwrap_or_default();
    let parts = (0..).map(|number| format!("{dir}/{number}"));
    let parts = parts.take_while(|part| fixtures::dir().join(part).is_dir()).map(|part| self::read(&part)).collect();
    AdapterFiles { parts, ..AdapterFiles::new(read("adapter_config.json"), read("adapter_model.safetensors")) }
}

#[test]
fn faulty_adapters_are_refused_by_name() {
    let mut failures = Vec::new();
    for case in fixtures::manifest().refused {
        let model = fixtures::load_model(&case.model);
        for merge in [false, true] {
            let options = LowerOptions { merge, formats: Formats::uniform(DType::F32), own_bytes_max: 1 << 30 };
            match lower(&read(&case.dir), &model, &options) {
                Ok(_) => failures.push(format!("{}: accepted", case.dir)),
                Err(error) if error.to_string().contains(&case.names) => {}
                Err(error) => failures.push(format!("{}: expected `{}` in: {error}", case.dir, case.names)),
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn sound_adapters_pass_the_check_without_a_model() {
    for case in fixtures::manifest().cases {
        let files = fixtures::adapter_files(&case.dir).unwrap_or_else(|error| panic!("{}: {error}", case.dir));
        let inspection = inspect(&files).unwrap_or_else(|error| panic!("{}: {error}", case.dir));
        assert!(inspection.problems.is_empty(), "{}: {:?}", case.dir, inspection.problems);
        assert_eq!(inspection.kind, case.peft_type);
        assert!(inspection.tensors > 0 && inspection.bytes > 0, "{}", case.dir);
        // What stands before the prompt belongs to no place in the model.
        let is_before = ["P_TUNING", "CPT", "PREFIX_TUNING", "CARTRIDGE", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"]
            .contains(&case.peft_type.as_str());
        assert_eq!(inspection.modules.is_empty(), is_before, "{}", case.dir);
    }
}

/// Faulty adapters whose fault shows without the base model.
const VISIBLE: &[&str] = &[
    "unknown_suffix",
    "nan",
    "inf",
    "integer_dtype",
    "missing_b",
    "missing_a",
    "rank_mismatch",
    "empty",
    "alora_string",
    "alora_dora",
    "pissa_niter",
    "kasa_dora",
    "kasa_alora",
    "fan_in_fan_out",
    "type_mismatch",
    "type_unknown",
    "type_absent",
    "ssf_site_number",
    "prompt_key",
    "prompt_nan",
    "prompt_number",
    "prompt_submodules",
    "prompt_saved",
    "prompt_surplus",
    "prompt_lora_type",
    "p_tuning_encoder",
    "multitask_task",
    "multitask_range",
    "cpt_ids",
    "cartridge_inf",
    "arrow_suffix",
    "arrow_nan",
    "arrow_missing",
    "arrow_router",
    "arrow_top_k",
    "arrow_dora",
    "arrow_start",
    "xlora_field",
    "xlora_adapters",
    "xlora_names",
    "xlora_part",
    "xlora_pass",
    "xlora_temperature",
    "xlora_top_k",
    "xlora_target",
    "xlora_nan",
    "xlora_factor",
    "xlora_expert_field",
    "adaption_nan",
    "adaption_length",
    "adaption_target",
    "adaption_field",
    "bottleneck_key",
    "bottleneck_nan",
    "bottleneck_field",
    "bottleneck_gating",
    "bottleneck_architecture",
    "bottleneck_activation",
    "truncated",
    "config_not_json",
    "no_weights",
    "no_config",
];

#[test]
fn places_inside_layers_are_named() {
    let modules = |case: &str| inspect(&fixtures::adapter_files(case).unwrap()).unwrap().modules;
    assert_eq!(
        modules("adapters/llama/bottleneck_houlsby"),
        [
            "model.layers.0.attention_adapters",
            "model.layers.0.output_adapters",
            "model.layers.1.attention_adapters",
            "model.layers.1.output_adapters",
        ]
    );
    assert_eq!(modules("adapters/llama/adaption_prompt"), ["model.layers.0.self_attn", "model.layers.1.self_attn"]);
}

#[test]
fn faults_that_show_without_a_model_are_found_without_one() {
    for case in fixtures::manifest().refused {
        let name = case.dir.rsplit('/').next().unwrap_or_default();
        if !VISIBLE.contains(&name) {
            continue;
        }
        let problems = match inspect(&read(&case.dir)) {
            Ok(inspection) => inspection.problems,
            Err(error) => vec![error.to_string()],
        };
        assert!(!problems.is_empty(), "{name}");
    }
}

/// Types of PEFT that are neither served nor refused with what to do instead.
const UNKNOWN: [&str; 0] = [];

#[test]
fn every_type_of_peft_is_served_or_refused_with_a_reason() {
    let served = KINDS.iter().map(|kind| kind.peft_type);
    let known: Vec<&str> = served.chain(REFUSED.iter().map(|refused| refused.peft_type)).collect();
    let types = fixtures::manifest().peft_types;
    let unknown: Vec<&str> = types.iter().map(String::as_str).filter(|name| !known.contains(name)).collect();
    assert_eq!(unknown, UNKNOWN);
    for refused in REFUSED {
        assert!(types.iter().any(|name| name == refused.peft_type), "{} is no type of PEFT", refused.peft_type);
        assert!(!KINDS.iter().any(|kind| kind.peft_type == refused.peft_type), "{}", refused.peft_type);
    }
}
