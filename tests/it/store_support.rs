//! A store over a small fake base, and adapters that carry one number each.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};

use candle_core::{DType, Device, Result, Tensor};
use patchbay::adapter::{
    AdapterFiles, BaseShape, BaseWeights, Delta, Formats, LoadedAdapter, Site, SiteId, SiteKind, SiteTable, Weight,
};
use patchbay::metrics::{Metrics, MetricsConfig};
use patchbay::store::{PublishOptions, Store, StoreConfig};
use serde_json::json;

/// In and out features of the one linear there is.
pub(crate) const FEATURES: usize = 4;
/// Bytes that an unmerged adapter of rank 1 takes in f32.
pub(crate) const LOW_RANK_BYTES: usize = 2 * FEATURES * 4;
/// Bytes that a merged adapter takes in f32.
pub(crate) const DENSE_BYTES: usize = FEATURES * FEATURES * 4;

/// A base with two linears of zeros; adapters change the first. Reading its weight, which only merging does, waits while the gate is closed.
pub(crate) struct Base {
    sites: SiteTable,
    gate: Mutex<Gate>,
    changed: Condvar,
}

#[derive(Default)]
struct Gate {
    closed: bool,
    waiting: usize,
}

impl Base {
    pub(crate) fn new() -> Arc<Self> {
        let mut sites = SiteTable::default();
        let kind = SiteKind::Linear { in_features: FEATURES, out_features: FEATURES, bias: false, output_head: false };
        sites.push(Site { path: "model.layers.0.self_attn.q_proj".to_owned(), kind });
        sites.push(Site { path: "model.layers.0.self_attn.o_proj".to_owned(), kind });
        Arc::new(Self { sites, gate: Mutex::default(), changed: Condvar::new() })
    }

    pub(crate) fn close(&self) {
        self.gate.lock().unwrap().closed = true;
    }

    pub(crate) fn open(&self) {
        self.gate.lock().unwrap().closed = false;
        self.changed.notify_all();
    }

    /// Returns once so many loads wait at the gate.
    pub(crate) async fn wait_for_loads(self: &Arc<Self>, count: usize) {
        let base = self.clone();
        let wait = move || {
            let gate = base.gate.lock().unwrap();
            drop(base.changed.wait_while(gate, |gate| gate.waiting < count).unwrap());
        };
        tokio::task::spawn_blocking(wait).await.unwrap();
    }
}

impl BaseWeights for Base {
    fn sites(&self) -> &SiteTable {
        &self.sites
    }

    fn shape(&self) -> BaseShape {
        BaseShape { hidden_size: FEATURES, num_layers: 1, kv_width: FEATURES }
    }

    fn tied_embeddings(&self) -> bool {
        false
    }

    fn weight(&self, _: SiteId) -> Result<Tensor> {
        let mut gate = self.gate.lock().unwrap();
        gate.waiting += 1;
        self.changed.notify_all();
        let mut gate = self.changed.wait_while(gate, |gate| gate.closed).unwrap();
        gate.waiting -= 1;
        Tensor::zeros((FEATURES, FEATURES), DType::F32, &Device::Cpu)
    }

    fn bias(&self, _: SiteId) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

/// A store and what it reports to.
pub(crate) struct Opened {
    pub(crate) store: Arc<Store>,
    pub(crate) base: Arc<Base>,
    pub(crate) metrics: Arc<Metrics>,
}

/// Opens a store on `root`, as a process of its own would.
pub(crate) async fn open(root: &Path) -> Opened {
    open_with(StoreConfig { root: root.to_owned(), ..StoreConfig::default() }).await
}

pub(crate) async fn open_with(config: StoreConfig) -> Opened {
    let (base, metrics) = (Base::new(), Arc::new(Metrics::new("base", &MetricsConfig::default())));
    let store = Store::open(config, base.clone(), Formats::uniform(DType::F32), metrics.clone()).await.expect("opens");
    Opened { store, base, metrics }
}

/// An adapter that carries `value`: a rank-1 product whose up projection is filled with it.
pub(crate) fn adapter(value: f32) -> AdapterFiles {
    let config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": false, "target_modules": ["q_proj"]});
    let filled = |value: f32, shape| Tensor::full(value, shape, &Device::Cpu).unwrap();
    let key = |part: &str| format!("base_model.model.model.layers.0.self_attn.q_proj.{part}.weight");
    let tensors =
        HashMap::from([(key("lora_A"), filled(1.0, (1, FEATURES))), (key("lora_B"), filled(value, (FEATURES, 1)))]);
    let weights = safetensors::serialize(&tensors, None).unwrap();
    AdapterFiles::new(config.to_string().into_bytes(), weights)
}

/// An adapter whose factors are more than a dense weight: the square of a rank-2 product, each entry `2 value` to the power
/// of two.
pub(crate) fn squares(value: f32) -> AdapterFiles {
    let config = json!({"peft_type": "LOHA", "r": 2, "alpha": 2, "target_modules": ["q_proj"]});
    let filled = |value: f32, shape| Tensor::full(value, shape, &Device::Cpu).unwrap();
    let key = |part: &str| format!("base_model.model.model.layers.0.self_attn.q_proj.hada_{part}");
    let (down, up) = (filled(1.0, (2, FEATURES)), filled(value, (FEATURES, 2)));
    let tensors =
        HashMap::from([(key("w1_a"), up.clone()), (key("w1_b"), down.clone()), (key("w2_a"), up), (key("w2_b"), down)]);
    AdapterFiles::new(config.to_string().into_bytes(), safetensors::serialize(&tensors, None).unwrap())
}

/// As [`squares`], and a second linear replaced, which needs a dense weight.
pub(crate) fn squares_and_a_linear(value: f32) -> AdapterFiles {
    let files = squares(value);
    let mut config: serde_json::Value = serde_json::from_slice(&files.config).unwrap();
    config["modules_to_save"] = json!(["o_proj"]);
    let mut tensors = candle_core::safetensors::load_buffer(&files.weights, &Device::Cpu).unwrap();
    let replaced = Tensor::full(value, (FEATURES, FEATURES), &Device::Cpu).unwrap();
    tensors.insert("base_model.model.model.layers.0.self_attn.o_proj.weight".to_owned(), replaced);
    AdapterFiles::new(config.to_string(), safetensors::serialize(&tensors, None).unwrap())
}

/// Squares of products of this rank in both linears: factors of the rank's square.
pub(crate) fn squares_of_rank(rank: usize) -> AdapterFiles {
    let config = json!({"peft_type": "LOHA", "r": rank, "alpha": rank, "target_modules": ["q_proj", "o_proj"]});
    let mut tensors = HashMap::new();
    for linear in ["q_proj", "o_proj"] {
        for (part, shape) in [("a", (FEATURES, rank)), ("b", (rank, FEATURES))] {
            for factor in ["w1", "w2"] {
                let key = format!("base_model.model.model.layers.0.self_attn.{linear}.hada_{factor}_{part}");
                tensors.insert(key, Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap());
            }
        }
    }
    AdapterFiles::new(config.to_string().into_bytes(), safetensors::serialize(&tensors, None).unwrap())
}

/// Factors of this rank in both linears, put together from one vector: the file has one number for each row.
pub(crate) fn repeated_vector(rank: usize) -> AdapterFiles {
    let config = json!({"peft_type": "VBLORA", "r": rank, "num_vectors": 1, "vector_length": FEATURES, "topk": 1,
        "target_modules": ["q_proj", "o_proj"]});
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    let mut tensors = HashMap::from([("base_model.vblora_vector_bank".to_owned(), ones(&[1, FEATURES]))]);
    for linear in ["q_proj", "o_proj"] {
        for (part, shape) in [("A", [rank, 1, 1]), ("B", [1, rank, 1])] {
            let key = format!("base_model.model.model.layers.0.self_attn.{linear}.vblora_logits_{part}");
            tensors.insert(key, ones(&shape));
        }
    }
    AdapterFiles::new(config.to_string().into_bytes(), safetensors::serialize(&tensors, None).unwrap())
}

/// An adapter that puts `number` virtual tokens before every prompt.
pub(crate) fn virtual_tokens(number: usize) -> AdapterFiles {
    let config = json!({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": number});
    let rows = Tensor::zeros((number, FEATURES), DType::F32, &Device::Cpu).unwrap();
    let weights = safetensors::serialize([("prompt_embeddings", &rows)], None).unwrap();
    AdapterFiles::new(config.to_string().into_bytes(), weights)
}

/// Two adapters in sub-directories, of which the second carries `value`, mixed by gates that are all one.
pub(crate) fn mixture(value: f32) -> AdapterFiles {
    let config = json!({"peft_type": "XLORA", "task_type": "CAUSAL_LM", "hidden_size": FEATURES,
        "enable_softmax": false, "adapters": {"0": "elsewhere/first", "1": "elsewhere/second"}});
    let key = |part: &str| format!("base_model.internal_xlora_classifier.layers.0.{part}");
    let tensors = HashMap::from([
        (key("weight"), Tensor::zeros((2, FEATURES), DType::F32, &Device::Cpu).unwrap()),
        (key("bias"), Tensor::ones(2, DType::F32, &Device::Cpu).unwrap()),
    ]);
    AdapterFiles {
        config: config.to_string().into(),
        weights: safetensors::serialize(&tensors, None).unwrap().into(),
        parts: vec![adapter(1.0), adapter(value)],
    }
}

/// What the second adapter of a [`mixture`] carries.
pub(crate) fn mixed_value(adapter: &LoadedAdapter) -> f32 {
    let slots = adapter.lowered.linears.values().next().expect("one linear");
    let [Delta::Gated { b, .. }] = slots.deltas.as_slice() else { panic!("unexpected form {:?}", slots.deltas) };
    let b = b.to_vec2::<f32>().unwrap(); // [out, experts]
    assert!(b.iter().all(|row| *row == [1.0, b[0][1]]), "a torn adapter: {b:?}");
    b[0][1]
}

/// Writes an adapter directory as PEFT does.
pub(crate) fn write_directory(dir: &Path, files: &AdapterFiles) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("adapter_config.json"), &files.config).unwrap();
    std::fs::write(dir.join("adapter_model.safetensors"), &files.weights).unwrap();
    for (number, part) in files.parts.iter().enumerate() {
        write_directory(&dir.join(number.to_string()), part);
    }
}

/// The number that a loaded adapter carries, in whatever form it was lowered to.
pub(crate) fn value(adapter: &LoadedAdapter) -> f32 {
    let slots = adapter.lowered.linears.values().next().expect("one linear");
    let tensor = match (&slots.weight, slots.deltas.as_slice()) {
        (Weight::Own(weight), []) => weight,
        (Weight::Base, [Delta::LowRank { b, .. }]) => b,
        other => panic!("unexpected form {other:?}"),
    };
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(values.iter().all(|value| *value == values[0]), "a torn adapter: {values:?}");
    values[0]
}

/// No conditions, unmerged.
pub(crate) fn plain() -> PublishOptions {
    PublishOptions::default()
}

pub(crate) fn merged() -> PublishOptions {
    PublishOptions { merge: true, ..PublishOptions::default() }
}

/// Every file below `dir`, relative to it, sorted.
pub(crate) fn files_below(dir: &Path) -> Vec<String> {
    let mut files = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in std::fs::read_dir(next).unwrap().map(|entry| entry.unwrap().path()) {
            match entry.is_dir() {
                true => dirs.push(entry),
                false => files.push(entry.strip_prefix(dir).unwrap().to_string_lossy().into_owned()),
            }
        }
    }
    files.sort();
    files
}
