//! The committed fixtures: what transformers and PEFT compute in float32 (`tools/make_fixtures.py`).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use patchbay::adapter::AdapterFiles;
use patchbay::model::{DeviceChoice, Model, ModelConfig, QuantChoice};
use patchbay::store::{AdapterDirectory, StoreError};
use serde::Deserialize;

/// `manifest.json`.
#[derive(Deserialize)]
pub(crate) struct Manifest {
    pub(crate) models: Vec<ModelFixture>,
    pub(crate) cases: Vec<AdapterCase>,
    pub(crate) refused: Vec<RefusedCase>,
    /// Every `peft_type` of the PEFT release that made the fixtures.
    pub(crate) peft_types: Vec<String>,
}

/// A tiny random base model.
#[derive(Clone, Deserialize)]
pub(crate) struct ModelFixture {
    pub(crate) name: String,
    pub(crate) architecture: String,
    /// Directory relative to the fixtures.
    pub(crate) dir: String,
}

/// An adapter of one of the models.
#[derive(Clone, Deserialize)]
pub(crate) struct AdapterCase {
    pub(crate) model: String,
    pub(crate) name: String,
    pub(crate) peft_type: String,
    /// Directory relative to the fixtures.
    pub(crate) dir: String,
    pub(crate) mergeable: bool,
    /// Whether the adapter changes nothing.
    pub(crate) identity: bool,
}

/// An adapter that must be refused.
#[derive(Clone, Deserialize)]
pub(crate) struct RefusedCase {
    pub(crate) model: String,
    /// Directory relative to the fixtures.
    pub(crate) dir: String,
    /// What the refusal's message must contain.
    pub(crate) names: String,
}

/// Where the fixtures lie. Tests run in the package root; the path is relative so that a test binary carried elsewhere
/// with the fixtures beside it finds them too.
pub(crate) fn dir() -> PathBuf {
    PathBuf::from("tests/fixtures")
}

/// Reads an adapter's two files.
pub(crate) fn adapter_files(fixture_dir: &str) -> Result<AdapterFiles, StoreError> {
    AdapterDirectory::open(&dir().join(fixture_dir))?.read(1 << 30)
}

/// Reads `manifest.json`.
pub(crate) fn manifest() -> Manifest {
    read_json(&dir().join("manifest.json"))
}

/// The prompts by number, in token ids.
pub(crate) fn prompts() -> Vec<Vec<u32>> {
    read_json(&dir().join("prompts.json"))
}

/// The expected tensors of a model or case: `logits_<p>` f32 (len, vocab) and `greedy_<p>` i64 (16). Some cases have only
/// some of the prompts.
pub(crate) fn expected(fixture_dir: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(dir().join(fixture_dir).join("expected.safetensors"), &Device::Cpu).unwrap()
}

/// A model's config for the device under test.
pub(crate) fn model_config(name: &str) -> ModelConfig {
    ModelConfig {
        path: dir().join("models").join(name).to_string_lossy().into_owned(),
        device: device_choice(),
        ..ModelConfig::default()
    }
}

/// Loads a model fixture onto the device under test.
pub(crate) fn load_model(name: &str) -> Model {
    load_model_with(&model_config(name))
}

/// Loads a model fixture with its base quantised.
pub(crate) fn load_quantized(name: &str, quant: QuantChoice) -> Model {
    load_model_with(&ModelConfig { quant: Some(quant), ..model_config(name) })
}

/// Loads what `config` says.
pub(crate) fn load_model_with(config: &ModelConfig) -> Model {
    Model::load(Path::new(&config.path), config).unwrap_or_else(|error| panic!("{}: {error}", config.path))
}

/// `PATCHBAY_TEST_DEVICE`: cpu (default) or cuda.
pub(crate) fn device_choice() -> DeviceChoice {
    #[expect(clippy::disallowed_methods, reason = "the variable is for tests; the server's config does not know it")]
    match std::env::var("PATCHBAY_TEST_DEVICE").as_deref() {
        Ok("cuda") => DeviceChoice::Cuda,
        Ok("cpu") | Err(_) => DeviceChoice::Cpu,
        Ok(other) => panic!("PATCHBAY_TEST_DEVICE={other}: expected cpu or cuda"),
    }
}

fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> T {
    let text = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn every_fixture_of_the_manifest_exists() {
    let manifest = manifest();
    for model in &manifest.models {
        assert!(dir().join(&model.dir).join("config.json").is_file(), "{} ({})", model.name, model.architecture);
    }
    for case in &manifest.cases {
        let at = format!(
            "{} {} ({}, mergeable: {}, identity: {})",
            case.model, case.name, case.peft_type, case.mergeable, case.identity
        );
        assert!(dir().join(&case.dir).join("expected.safetensors").is_file(), "{at}");
    }
    for case in &manifest.refused {
        assert!(dir().join(&case.dir).is_dir(), "{} ({}): {}", case.dir, case.model, case.names);
    }
}
