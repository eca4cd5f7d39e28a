//! A loaded base model of any family.

use std::path::Path;

use candle_core::{DType, Result, Tensor};
use serde_json::Value;

use super::checkpoint::Checkpoint;
use super::device_adapter::{PackedBase, Placement};
use super::families::{self, Built};
use super::layers::{Decoder, Matrix};
use super::loader::{Loaded, Loader, Parameters};
use super::shared_forms::SharedForms;
use super::{Batch, DeviceAdapter, DtypeChoice, KvCache, ModelConfig, ModelError, ModelInfo, generation, open_device};
use crate::adapter::{BaseShape, BaseWeights, LoweredAdapter, SiteId, SiteTable};
use crate::kernels::KvLayout;

pub(super) const CONFIG_FILE: &str = "config.json";

/// A loaded base model.
pub struct Model {
    info: ModelInfo,
    decoder: Decoder,
    sites: SiteTable,
    /// The base's tensors by site, shared with the layers.
    parameters: Vec<Parameters>,
    tied_embeddings: bool,
    /// Of the adapters on the device.
    shared: SharedForms,
}

impl Model {
    /// Loads the model in `dir` onto the configured device.
    ///
    /// Weights are read once, tensor by tensor, from the mapped files. With `quant`, the decoder layers' linears are
    /// quantised as they are read; embedding, norms, biases and the output head are not. A linear whose rows the
    /// format's blocks do not fill takes the next finer format with smaller blocks, or stays as it is. `int8` quantises
    /// every linear, the output head included, and the embedding where it is the head's weight.
    ///
    /// # Errors
    /// See [`ModelError`].
    pub fn load(dir: &Path, config: &ModelConfig) -> std::result::Result<Self, ModelError> {
        let json = read_json(dir, CONFIG_FILE)?;
        let architecture = architecture(&json)?;
        let family = families::find(architecture)?;
        let device = open_device(config.device)?;
        let checkpoint = Checkpoint::open(dir)?;
        let weight_dtype = weight_dtype(config.dtype, &json, &checkpoint)?;
        let mut loader = Loader::new(checkpoint, device, weight_dtype, config)?;
        let built = (family.build)(&json, &mut loader)?;
        let loaded = loader.finish();
        let info = info(architecture, &built, &loaded, config, generation::read(dir, &json)?)?;
        Ok(Self {
            info,
            decoder: built.decoder,
            sites: loaded.sites,
            parameters: loaded.parameters,
            tied_embeddings: built.tied_embeddings,
            shared: SharedForms::default(),
        })
    }

    /// Facts about the model.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Runs one step: writes the batch's prefix entries, keys and values into `cache` and returns the logits of `batch.logit_rows`,
    /// (rows, vocab) in f32 on the model's device.
    ///
    /// The batch's adapters are on the model's device already ([`Model::adapter_to_device`]).
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn forward(&self, batch: &Batch, cache: &mut KvCache) -> Result<Tensor> {
        self.decoder.forward(batch, cache)
    }

    /// Copies an adapter to the model's device, in the form that its layers work with.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn adapter_to_device(&self, adapter: &LoweredAdapter) -> Result<DeviceAdapter> {
        let packed_base = |site| {
            let Parameters { weight, bias } = self.parameters(site);
            weight.packed().map(|w| PackedBase { form: w.form(), k: w.k(), bias: bias.as_ref() })
        };
        let place = Placement {
            device: &self.info.device,
            dtype: self.info.dtype,
            layout: self.info.kv_layout,
            heads: (self.info.num_kv_heads, self.info.head_dim),
            shared: &self.shared,
        };
        DeviceAdapter::new(adapter, &place, packed_base)
    }

    fn parameters(&self, site: SiteId) -> &Parameters {
        &self.parameters[site.0]
    }
}

impl BaseWeights for Model {
    fn sites(&self) -> &SiteTable {
        &self.sites
    }

    fn shape(&self) -> BaseShape {
        BaseShape {
            hidden_size: self.info.hidden_size,
            num_layers: self.info.num_layers,
            kv_width: self.info.num_kv_heads * self.info.head_dim,
        }
    }

    fn tied_embeddings(&self) -> bool {
        self.tied_embeddings
    }

    fn weight(&self, site: SiteId) -> Result<Tensor> {
        self.parameters(site).weight.to_f32()
    }

    fn may_be_quantised_from(&self, site: SiteId, weight: &Tensor) -> Result<bool> {
        match &self.parameters(site).weight {
            Matrix::Integers(w) => Ok(w.may_be_of(&weight.flatten_all()?.to_vec1::<f32>()?)),
            Matrix::Dense(_) | Matrix::Packed(_) | Matrix::Quantized { .. } => Ok(false),
        }
    }

    fn bias(&self, site: SiteId) -> Result<Option<Tensor>> {
        self.parameters(site).bias.clone().map(|bias| Matrix::Dense(bias).to_f32()).transpose()
    }
}

/// The name of a checkpoint's architecture.
pub(super) fn architecture(config: &Value) -> std::result::Result<&str, ModelError> {
    let name = config.pointer("/architectures/0").and_then(Value::as_str);
    name.ok_or_else(|| ModelError::config("architectures", "expected a list of names"))
}

pub(super) fn read_json(dir: &Path, file: &str) -> std::result::Result<Value, ModelError> {
    let text = std::fs::read(dir.join(file)).map_err(|error| ModelError::file(file, &error))?;
    serde_json::from_slice(&text).map_err(|error| ModelError::file(file, &error))
}

/// The format weights are kept in: the one asked for, or the checkpoint's (`dtype`, older `torch_dtype`).
fn weight_dtype(
    choice: DtypeChoice,
    config: &Value,
    checkpoint: &Checkpoint,
) -> std::result::Result<DType, ModelError> {
    match choice {
        DtypeChoice::F32 => return Ok(DType::F32),
        DtypeChoice::Bf16 => return Ok(DType::BF16),
        DtypeChoice::F16 => return Ok(DType::F16),
        DtypeChoice::Auto => {}
    }
    let named = ["dtype", "torch_dtype"].into_iter().find_map(|field| Some((field, config.get(field)?.as_str()?)));
    match named {
        Some((_, "float32")) => Ok(DType::F32),
        Some((_, "bfloat16")) => Ok(DType::BF16),
        Some((_, "float16")) => Ok(DType::F16),
        Some((field, other)) => {
            Err(ModelError::config(field, format!("expected float32, bfloat16 or float16, found {other}")))
        }
        None => Ok(checkpoint.first_dtype().unwrap_or(DType::F32)),
    }
}

fn info(
    architecture: &str,
    built: &Built,
    loaded: &Loaded,
    config: &ModelConfig,
    generation: super::GenerationDefaults,
) -> std::result::Result<ModelInfo, ModelError> {
    let (vocab_size, hidden_size) = built.decoder.embed_tokens.table.dims()?;
    let heads = built.decoder.heads();
    let supported = built.context_tokens_max;
    let context_tokens_max = config.context_tokens_max.unwrap_or(supported);
    if context_tokens_max == 0 || context_tokens_max > supported {
        return Err(ModelError::Field {
            file: "[model]",
            field: "context_tokens_max".to_owned(),
            reason: format!("expected 1 to {supported}, which is what the model supports; found {context_tokens_max}"),
        });
    }
    Ok(ModelInfo {
        architecture: architecture.to_owned(),
        vocab_size,
        hidden_size,
        num_layers: built.decoder.layers.len(),
        num_kv_heads: heads.num_kv_heads,
        head_dim: heads.head_dim,
        context_tokens_max,
        dtype: loaded.dtype,
        kv_dtype: loaded.kv_dtype,
        adapter_formats: loaded.adapter_formats,
        device: loaded.device.clone(),
        kv_layout: if loaded.packed { KvLayout::Heads } else { KvLayout::Rows },
        weight_bytes: loaded.weight_bytes,
        rope_length_rule: built.decoder.rope.length_rule(),
        generation,
    })
}
