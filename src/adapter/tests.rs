//! Lowering as a whole, against dense algebra on a small fake base; and against arbitrary bytes.

use std::cell::RefCell;
use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::fake_base::{FakeBase, HIDDEN, INNER, VOCAB, close, random};
use super::*;

const Q: &str = "model.layers.0.self_attn.q_proj";
const UP: &str = "model.layers.1.mlp.up_proj";
const EMBED: &str = "model.embed_tokens";
const OPTIONS: LowerOptions =
    LowerOptions { merge: false, formats: Formats::uniform(DType::F32), own_bytes_max: 1 << 20 };
const MERGE: LowerOptions = LowerOptions { merge: true, ..OPTIONS };

type Tensors = Vec<(String, Tensor)>;

fn key(path: &str, suffix: &str) -> String {
    format!("base_model.model.{path}.{suffix}")
}

fn files(config: &Value, tensors: &Tensors) -> AdapterFiles {
    let tensors: BTreeMap<&str, &Tensor> = tensors.iter().map(|(key, tensor)| (key.as_str(), tensor)).collect();
    AdapterFiles::new(serde_json::to_vec(config).unwrap(), safetensors::serialize(tensors, None).unwrap())
}

/// Two factors of rank 3 for a linear of the fake base.
fn factors(path: &str) -> Tensors {
    let (inputs, outputs) = match path {
        Q => (HIDDEN, HIDDEN),
        UP => (HIDDEN, INNER),
        "lm_head" => (HIDDEN, VOCAB),
        _ => panic!("{path}"),
    };
    vec![(key(path, "lora_A.weight"), random(1, (3, inputs))), (key(path, "lora_B.weight"), random(2, (outputs, 3)))]
}

fn lora(more: &Value, targets: &[&str]) -> Value {
    let mut config = json!({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": targets});
    for (name, value) in more.as_object().unwrap() {
        config[name] = value.clone();
    }
    config
}

fn lower_ok(
    base: &FakeBase,
    config: &Value,
    tensors: &Tensors,
    options: LowerOptions,
) -> (LoweredAdapter, LowerReport) {
    lower(&files(config, tensors), base, &options).unwrap()
}

#[track_caller]
fn check_refused(base: &FakeBase, config: &Value, tensors: &Tensors, names: &str) {
    for options in [OPTIONS, MERGE] {
        let error = lower(&files(config, tensors), base, &options).unwrap_err().to_string();
        assert!(error.contains(names), "expected `{names}` in: {error}");
    }
}

/// The weight a linear multiplies with in effect.
fn effective(base: &FakeBase, adapter: &LoweredAdapter, path: &str) -> Tensor {
    let slots = &adapter.linears[&base.id(path)];
    let weight = match &slots.weight {
        Weight::Own(own) => own.clone(),
        Weight::Base => base.weight(base.id(path)).unwrap(),
    };
    merge::effective_weight(slots, weight).unwrap()
}

#[track_caller]
fn check_effective(config: &Value, tensors: &Tensors, path: &str, expected: &Tensor) {
    let base = FakeBase::new(false);
    for options in [OPTIONS, MERGE] {
        let (adapter, report) = lower_ok(&base, config, tensors, options);
        assert!(close(&effective(&base, &adapter, path), expected, 1e-5), "{options:?}");
        assert_eq!(matches!(adapter.linears[&base.id(path)].weight, Weight::Own(_)), report.own_weight_bytes > 0);
    }
}

#[test]
fn lora_adds_the_scaled_product() {
    let base = FakeBase::new(false);
    let tensors = factors(UP);
    let product = tensors[1].1.matmul(&tensors[0].1).unwrap();
    let weight = base.weight(base.id(UP)).unwrap();
    for (more, scale) in [
        (json!({}), 2.0),
        (json!({"use_rslora": true}), 6.0 / 3f64.sqrt()),
        (json!({"alpha_pattern": {"down_proj": 1, r"layers\.1\..*up_proj": 4.5}}), 1.5),
        (json!({"r": 5, "rank_pattern": {"up_proj": 3}}), 2.0),
    ] {
        let expected = (&weight + (&product * scale).unwrap()).unwrap();
        let config = lora(&more, &["layers.1.mlp.up_proj"]);
        check_effective(&config, &tensors, UP, &expected);
    }
}

#[test]
fn dora_normalises_the_rows_of_the_sum() {
    let base = FakeBase::new(false);
    let mut tensors = factors(UP);
    let sum =
        (base.weight(base.id(UP)).unwrap() + (tensors[1].1.matmul(&tensors[0].1).unwrap() * 2.0).unwrap()).unwrap();
    let magnitude = random(3, INNER);
    let norm = sum.sqr().unwrap().sum(1).unwrap().sqrt().unwrap();
    let expected = sum.broadcast_mul(&(&magnitude / norm).unwrap().unsqueeze(1).unwrap()).unwrap();
    tensors.push((key(UP, "lora_magnitude_vector.default.weight"), magnitude));
    check_effective(&lora(&json!({"use_dora": true}), &["1.mlp.up_proj"]), &tensors, UP, &expected);
}

#[test]
fn biases_are_replaced_and_then_added_to() {
    let base = FakeBase::new(false);
    let mut tensors = factors(Q);
    let (replaced, added, shift) = (random(4, HIDDEN), random(5, HIDDEN), random(6, HIDDEN));
    tensors.push((key(Q, "base_layer.bias"), replaced.clone()));
    tensors.push((key(Q, "lora_B.bias"), added.clone()));
    tensors.push((key("model.norm", "bias"), shift.clone()));
    let config = lora(&json!({"bias": "all", "lora_bias": true}), &["0.self_attn.q_proj"]);
    let (adapter, report) = lower_ok(&base, &config, &tensors, OPTIONS);
    let c = adapter.linears[&base.id(Q)].c.clone().unwrap();
    assert!(close(&c, &(replaced + (added * 2.0).unwrap()).unwrap(), 1e-6));
    assert!(close(adapter.norms[&base.id("model.norm")].shift.as_ref().unwrap(), &shift, 0.0));
    assert_eq!((report.modules, report.ranks), (2, vec![3]));
    // The norm's bias is not one of an adapted linear.
    let config = lora(&json!({"bias": "lora_only", "lora_bias": true}), &["0.self_attn.q_proj"]);
    check_refused(&base, &config, &tensors, "model.norm.bias");
}

#[test]
fn token_rows_are_sorted_and_follow_to_a_tied_head() {
    let mut tensors = factors(Q);
    let rows = random(7, (2, HIDDEN));
    tensors.push((key(EMBED, "token_adapter.trainable_tokens_delta"), rows.clone()));
    let config = lora(&json!({"trainable_token_indices": [9, 4]}), &["0.self_attn.q_proj"]);
    let sorted = rows.index_select(&Tensor::new(&[1u32, 0], &Device::Cpu).unwrap(), 0).unwrap();
    for tied in [false, true] {
        let base = FakeBase::new(tied);
        let (adapter, _) = lower_ok(&base, &config, &tensors, MERGE);
        let (ids, rows) = adapter.embeddings[&base.id(EMBED)].rows.as_ref().unwrap();
        assert_eq!(ids, &[4, 9]);
        assert!(close(rows, &sorted, 0.0));
        let head = adapter.linears.get(&base.id("lm_head")).and_then(|slots| slots.rows.as_ref());
        assert_eq!(head.map(|(ids, _)| ids.clone()), tied.then(|| vec![4, 9]));
    }
    let twice = lora(&json!({"trainable_token_indices": {"embed_tokens": [4, 4]}}), &["0.self_attn.q_proj"]);
    check_refused(&FakeBase::new(true), &twice, &tensors, "token id 4 occurs twice");
    let unknown = lora(&json!({"trainable_token_indices": {"wte": [4, 5]}}), &["0.self_attn.q_proj"]);
    check_refused(&FakeBase::new(true), &unknown, &tensors, "`wte` matches no module");
}

#[test]
fn rows_and_a_whole_table_do_not_combine() {
    let mut tensors = factors(Q);
    tensors.push((key(EMBED, "token_adapter.trainable_tokens_delta"), random(7, (1, HIDDEN))));
    tensors.push((key(EMBED, "weight"), random(8, (VOCAB, HIDDEN))));
    let config = lora(&json!({"trainable_token_indices": [1], "modules_to_save": [EMBED]}), &["0.self_attn.q_proj"]);
    check_refused(&FakeBase::new(false), &config, &tensors, "trainable_token_indices");
}

#[test]
fn base_layer_copies_are_dropped_or_used() {
    let embedding_factors = |table: Tensor| {
        vec![
            (key(EMBED, "lora_embedding_A"), random(1, (3, VOCAB))),
            (key(EMBED, "lora_embedding_B"), random(2, (HIDDEN, 3))),
            (key(EMBED, "base_layer.weight"), table),
        ]
    };
    let config = lora(&json!({}), &["embed_tokens"]);
    for tied in [false, true] {
        let base = FakeBase::new(tied);
        let own = base.weight(base.id(EMBED)).unwrap();
        for same in [own.clone(), own.to_dtype(DType::BF16).unwrap(), own.to_dtype(DType::F16).unwrap()] {
            let (adapter, report) = lower_ok(&base, &config, &embedding_factors(same), OPTIONS);
            assert!(adapter.embeddings[&base.id(EMBED)].table.is_none());
            assert_eq!((adapter.linears.len(), report.warnings.len()), (0, 0));
        }
        let (adapter, report) = lower_ok(&base, &config, &embedding_factors(random(9, (VOCAB, HIDDEN))), OPTIONS);
        assert!(adapter.embeddings[&base.id(EMBED)].table.is_some());
        assert_eq!(adapter.linears.len(), usize::from(tied));
        assert!(report.warnings[0].contains("base_layer.weight"));
    }
}

#[test]
fn ssf_scales_the_bias_and_shifts() {
    let base = FakeBase::new(false);
    let mut tensors = Tensors::new();
    for (path, features) in [(Q, HIDDEN), ("model.norm", HIDDEN), (EMBED, HIDDEN)] {
        tensors.push((key(path, "ssf_scale"), random(1, features)));
        tensors.push((key(path, "ssf_shift"), random(2, features)));
    }
    let config = json!({
        "peft_type": "SSF", "ssf_version": 1, "target_modules": ["0.self_attn.q_proj"],
        "norm_modules": ["model.norm"], "embedding_modules": "model.embed.*",
    });
    let (scale, shift) = (&tensors[0].1, &tensors[1].1);
    let affine = |x: Option<Tensor>| ((x.unwrap() * scale).unwrap() + shift).unwrap();
    for options in [OPTIONS, MERGE] {
        let (adapter, report) = lower_ok(&base, &config, &tensors, options);
        let (q, norm) = (base.id(Q), base.id("model.norm"));
        let expected = base.weight(q).unwrap().broadcast_mul(&scale.unsqueeze(1).unwrap()).unwrap();
        assert!(close(&effective(&base, &adapter, Q), &expected, 1e-6));
        assert!(close(adapter.linears[&q].c.as_ref().unwrap(), &affine(base.bias(q).unwrap()), 1e-6));
        assert!(close(adapter.norms[&norm].shift.as_ref().unwrap(), &affine(base.bias(norm).unwrap()), 1e-6));
        let weight = (base.weight(norm).unwrap() * scale).unwrap();
        assert!(close(adapter.norms[&norm].weight.as_ref().unwrap(), &weight, 1e-6));
        let patch = &adapter.embeddings[&base.id(EMBED)];
        assert!(close(patch.scale.as_ref().unwrap(), scale, 0.0) && close(patch.shift.as_ref().unwrap(), shift, 0.0));
        assert_eq!((report.modules, report.kind.as_str()), (3, "SSF"));
    }
}

#[test]
fn ssf_warns_of_odd_scales() {
    let base = FakeBase::new(false);
    let config = json!({"peft_type": "SSF", "target_modules": ["0.self_attn.q_proj"], "use_shift": false});
    let warnings = |scale: f32| {
        let scale = Tensor::full(scale, HIDDEN, &Device::Cpu).unwrap();
        lower_ok(&base, &config, &vec![(key(Q, "ssf_scale"), scale)], OPTIONS).1.warnings
    };
    assert!(warnings(11.0).iter().any(|warning| warning.contains("scales below 0.001 or above 10")));
    assert!(warnings(2.0).iter().any(|warning| warning.contains("q_norm` removes it")));
    assert!(warnings(1.0).iter().any(|warning| warning.contains("no effect")));
}

#[test]
fn blocks_mean_what_their_shape_shows() {
    let base = FakeBase::new(false);
    let (w, m, mini) = (base.weight(base.id(UP)).unwrap(), random(1, (5, INNER)), random(2, (5, 6)));
    let w = w.to_vec2::<f32>().unwrap();
    let dense = |m: &Tensor, q: usize| {
        let m = m.to_vec2::<f32>().unwrap();
        let row = |(o, row): (usize, &Vec<f32>)| -> Vec<f32> {
            row.iter().enumerate().map(|(i, w)| w + m[i % 5][o % q]).collect()
        };
        Tensor::new(w.iter().enumerate().map(row).collect::<Vec<_>>(), &Device::Cpu).unwrap()
    };
    for (peft_type, suffix) in [("MISS", "miss_block"), ("BONE", "bone_block"), ("MISS", "bone_block")] {
        let config = json!({"peft_type": peft_type, "r": 5, "target_modules": ["1.mlp.up_proj"], "init_weights": true});
        check_effective(&config, &vec![(key(UP, suffix), m.clone())], UP, &dense(&m, INNER));
    }
    let mut config =
        json!({"peft_type": "MISS", "r": 5, "target_modules": ["1.mlp.up_proj"], "init_weights": "mini", "mini_r": 6});
    let tensors = vec![(key(UP, "miss_block"), mini.clone())];
    check_effective(&config, &tensors, UP, &dense(&mini, 6));
    config["peft_type"] = json!("BONE");
    check_refused(&base, &config, &tensors, "mini_r");
    config["peft_type"] = json!("MISS");
    config["mini_r"] = json!(9);
    check_refused(&base, &config, &tensors, "mini_r");
}

#[test]
fn early_bat_files_are_read_with_a_warning() {
    let base = FakeBase::new(false);
    let config = json!({"peft_type": "BONE", "r": 6, "target_modules": ["1.mlp.up_proj"], "init_weights": true});
    let tensors = vec![(key(UP, "bone_block"), random(3, (3, 6, 6)))];
    let (adapter, report) = lower_ok(&base, &config, &tensors, OPTIONS);
    assert!(matches!(adapter.linears[&base.id(UP)].weight, Weight::Own(_)));
    assert!(report.warnings[0].contains("form bat"));
    let options = LowerOptions { own_bytes_max: report.own_weight_bytes - 1, ..OPTIONS };
    let error = lower(&files(&config, &tensors), &base, &options).unwrap_err();
    assert!(matches!(error, AdapterError::OverBudget { needed, .. } if needed == report.own_weight_bytes));
}

#[test]
fn dense_copies_are_asked_for_and_told_apart_by_need() {
    let base = FakeBase::new(false);
    let targets = ["0.self_attn.q_proj"];
    let config =
        json!({"peft_type": "LOHA", "r": 4, "alpha": 4, "target_modules": targets, "modules_to_save": ["lm_head"]});
    let factor = |(part, shape)| (key(Q, &format!("hada_{part}")), random(1, shape));
    let (up, down) = ((HIDDEN, 4), (4, HIDDEN));
    let mut tensors: Tensors = [("w1_a", up), ("w1_b", down), ("w2_a", up), ("w2_b", down)].map(factor).into();
    tensors.push((key("lm_head", "weight"), random(3, (VOCAB, HIDDEN))));
    let files = files(&config, &tensors);
    let options = LowerOptions { own_bytes_max: 0, ..OPTIONS };
    let lower_asking = |grants: &[Need]| {
        let asked = RefCell::new(Vec::new());
        let ask = |demand: Demand, need: Need| {
            asked.borrow_mut().push((demand.own_bytes, need));
            grants.contains(&need)
        };
        let lowered = lower_within(&files, &base, &options, &ask).map(|(_, report)| report);
        (lowered, asked.into_inner())
    };
    let (report, mut asked) = lower_asking(&[Need::Only, Need::Cheaper]);
    let (square_bytes, table_bytes) = (4 * HIDDEN * HIDDEN, 4 * VOCAB * HIDDEN);
    assert_eq!(report.unwrap().own_weight_bytes, square_bytes + table_bytes);
    assert_eq!(asked.iter().map(|(bytes, _)| *bytes).max(), Some(square_bytes + table_bytes));
    asked.sort_by_key(|(_, need)| *need == Need::Only);
    assert_eq!(asked.iter().map(|(_, need)| *need).collect::<Vec<_>>(), [Need::Cheaper, Need::Only]);
    let (report, _) = lower_asking(&[Need::Only, Need::Terms]);
    let report = report.unwrap();
    assert_eq!(report.own_weight_bytes, table_bytes);
    assert!(report.warnings[0].contains("merged_bytes_max"));
    let (refused, _) = lower_asking(&[Need::Cheaper]);
    assert!(matches!(refused, Err(AdapterError::OverBudget { .. })));
}

#[test]
fn config_and_keys_must_agree() {
    let base = FakeBase::new(false);
    let check = |config: Value, tensors: &Tensors, names: &str| check_refused(&base, &config, tensors, names);
    let q = factors(Q);
    check(lora(&json!({}), &["q_proj"]), &q, "model.layers.1.self_attn.q_proj");
    check(lora(&json!({}), &["0.mlp.up_proj"]), &q, "does not name its module");
    check(lora(&json!({}), &["w1"]), &q, "does not name its module");
    check(lora(&json!({"modules_to_save": ["self_attn"]}), &["q_proj"]), &q, "`modules_to_save` names its module");
    check(lora(&json!({"layers_to_transform": [0]}), &["nothing"]), &Tensors::new(), "no tensors");
    check(lora(&json!({"layers_to_transform": 0, "target_modules": ".*q_proj"}), &[]), &q, "layers_to_transform");
    check(lora(&json!({"mystery": 1}), &["0.self_attn.q_proj"]), &q, "mystery");
    check(lora(&json!({"bias": "some"}), &["0.self_attn.q_proj"]), &q, "`bias`");
    let mut doubled = factors(Q);
    doubled.push((key(Q, "lora_A.default.weight"), random(1, (3, HIDDEN))));
    check(lora(&json!({}), &["0.self_attn.q_proj"]), &doubled, "means the same as");
    let stray = vec![(key("model.norm", "weight"), random(1, HIDDEN))];
    check(json!({"peft_type": "LORA"}), &stray, "nothing in the config accounts for it");
}

#[test]
fn an_idle_name_is_a_warning() {
    let config = lora(&json!({}), &["0.self_attn.q_proj", "c_attn"]);
    let (_, report) = lower_ok(&FakeBase::new(false), &config, &factors(Q), OPTIONS);
    assert_eq!(report.warnings, ["`c_attn` in `target_modules` matches no module that is adapted"]);
}

#[test]
fn values_that_overflow_the_serving_format_are_refused() {
    let mut tensors = factors(Q);
    tensors[1].1 = Tensor::full(1e5f32, (HIDDEN, 3), &Device::Cpu).unwrap();
    let config = lora(&json!({}), &["0.self_attn.q_proj"]);
    let options = LowerOptions { formats: Formats::uniform(DType::F16), ..OPTIONS };
    let error = lower(&files(&config, &tensors), &FakeBase::new(false), &options).unwrap_err().to_string();
    assert!(error.contains(Q) && error.contains("not finite in f16"), "{error}");
    let (adapter, report) = lower_ok(
        &FakeBase::new(false),
        &config,
        &tensors,
        LowerOptions { formats: Formats::uniform(DType::BF16), ..OPTIONS },
    );
    assert!(adapter.tensors().iter().all(|tensor| tensor.dtype() == DType::BF16));
    assert_eq!(report.bytes, 2 * (3 * HIDDEN + HIDDEN * 3));
}

#[test]
fn the_digest_tells_content_and_options_apart() {
    let (content, other) = ([1; 32], [2; 32]);
    let half = LowerOptions { formats: Formats::uniform(DType::BF16), ..OPTIONS };
    let digests = [(&content, &OPTIONS), (&content, &MERGE), (&content, &half), (&other, &OPTIONS)];
    let digests = digests.map(|(content, options)| digest(content, options));
    for (idx, one) in digests.iter().enumerate() {
        assert_eq!(digests.iter().position(|other| other == one), Some(idx));
    }
    assert_eq!(digest(&content, &LowerOptions { own_bytes_max: 0, ..OPTIONS }), digests[0]);
}

#[test]
fn inspection_needs_no_base() {
    let inspection = inspect(&files(&lora(&json!({"lora_bias": true}), &["q_proj"]), &factors(Q))).unwrap();
    assert_eq!((inspection.kind.as_str(), inspection.tensors, inspection.ranks), ("LORA", 2, vec![3]));
    assert_eq!((inspection.modules, inspection.bytes), (vec![Q.to_owned()], 4 * 2 * 3 * HIDDEN));
    assert!(inspection.problems.is_empty());
    let lone = factors(Q).split_off(1);
    let inspection = inspect(&files(&lora(&json!({"layer_replication": [[0, 1]]}), &["q_proj"]), &lone)).unwrap();
    assert_eq!(inspection.problems.len(), 2);
}

/// Neither must panic; what they say does not matter.
fn digest_bytes(config: &[u8], weights: &[u8]) {
    let files = AdapterFiles::new(config.to_vec(), weights.to_vec());
    let _ = inspect(&files);
    for tied in [false, true] {
        for options in [OPTIONS, LowerOptions { formats: Formats::uniform(DType::BF16), own_bytes_max: 2000, ..MERGE }]
        {
            let _ = lower(&files, &FakeBase::new(tied), &options);
        }
    }
}

/// Sound files of every kind, to be damaged.
fn sound() -> Vec<AdapterFiles> {
    let mut tensors = factors(Q);
    tensors.extend(factors("lm_head"));
    tensors.push((key(EMBED, "lora_embedding_A"), random(1, (3, VOCAB))));
    tensors.push((key(EMBED, "lora_embedding_B"), random(2, (HIDDEN, 3))));
    tensors.push((key("model.norm", "weight"), random(3, HIDDEN)));
    tensors.push((key("model.norm", "bias"), random(3, HIDDEN)));
    let more = json!({"modules_to_save": ["model.norm"], "rank_pattern": {"x|q_proj": 3}, "lora_bias": false});
    let bat = json!({"peft_type": "MISS", "r": 6, "target_modules": ["1.mlp.up_proj"], "init_weights": "bat"});
    let ssf = json!({"peft_type": "SSF", "target_modules": ["0.self_attn.q_proj"], "use_shift": false});
    vec![
        files(&lora(&more, &["0.self_attn.q_proj", "lm_head", "embed_tokens"]), &tensors),
        files(&bat, &vec![(key(UP, "miss_block"), random(3, (3, 6, 6)))]),
        files(&ssf, &vec![(key(Q, "ssf_scale"), random(1, HIDDEN))]),
    ]
}

#[test]
fn the_sound_files_are_sound() {
    for files in sound() {
        lower(&files, &FakeBase::new(false), &OPTIONS).unwrap();
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0..40i64).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop_oneof![".{0,12}", "[a-z_.*+?()|0-9\\\\]{0,12}", "all-linear|bat|mini|all|none|x_only|LORA|SSF|MISS|BONE"]
            .prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec((prop_oneof!["q_proj|embed_tokens|lm_head|.*", ".{0,6}"], inner), 0..3)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

/// Keys and shapes that come close to sound ones.
fn any_tensors() -> impl Strategy<Value = Tensors> {
    let paths = [EMBED, Q, UP, "model.norm", "lm_head", "model.layers.0.input_layernorm"];
    let suffixes: Vec<&str> =
        KINDS.iter().flat_map(|kind| kind.suffixes).chain(keys::COMMON_SUFFIXES).copied().collect();
    let size = prop_oneof![Just(HIDDEN), Just(INNER), Just(VOCAB), Just(3), Just(1), 0..8usize];
    let shape = proptest::collection::vec(size, 0..5);
    let one = (proptest::sample::select(paths.to_vec()), proptest::sample::select(suffixes), shape);
    proptest::collection::vec(one, 0..8).prop_map(|all| {
        let all = all.into_iter().filter(|(_, _, shape)| shape.iter().product::<usize>() < 10_000);
        all.map(|(path, suffix, shape)| (key(path, suffix), random(1, shape))).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_never_panic(
        config in proptest::collection::vec(any::<u8>(), 0..200),
        weights in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        digest_bytes(&config, &weights);
        let sound = &sound()[0];
        digest_bytes(&config, &sound.weights);
        digest_bytes(&sound.config, &weights);
    }

    #[test]
    fn damaged_files_never_panic(
        which in 0..3usize,
        changes in proptest::collection::vec((any::<bool>(), any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut files = sound().swap_remove(which);
        for (in_config, at, byte) in changes {
            let file = if in_config { &mut files.config } else { &mut files.weights };
            let mut bytes = file.to_vec();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            *file = bytes.into();
        }
        if let Some(cut) = cut {
            files.weights.truncate(cut.index(files.weights.len()));
        }
        digest_bytes(&files.config, &files.weights);
    }

    #[test]
    fn strange_configs_and_tensors_never_panic(
        kind in 0..KINDS.len(),
        fields in proptest::collection::vec((0..60usize, any_value()), 0..6),
        tensors in any_tensors(),
    ) {
        let kind = &KINDS[kind];
        let mut config = lora(&json!({}), &["q_proj", "embed_tokens", "lm_head", "up_proj"]);
        config["peft_type"] = json!(kind.peft_type);
        let common = ["target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"];
        for (at, value) in fields {
            let known = kind.fields.iter().map(|(name, _)| *name).chain(common);
            let names: Vec<&str> = known.collect();
            config[names[at % names.len()]] = value;
        }
        let files = files(&config, &tensors);
        digest_bytes(&files.config, &files.weights);
    }
}
