//! A loaded base model of any family.

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use serde_json::Value;

use super::checkpoint::Checkpoint;
use super::families::{self, Built};
use super::layers::{Decoder, Matrix};
use super::loader::{Loaded, Loader, Parameters};
use super::{Batch, DtypeChoice, KvCache, ModelConfig, ModelError, ModelInfo, generation, open_device};
use crate::adapter::{
    BaseWeights, Delta, EmbeddingPatch, LinearSlots, LoweredAdapter, NormOverride, Scale, SiteId, SiteTable, Weight,
};

const CONFIG_FILE: &str = "config.json";

/// A loaded base model.
pub struct Model {
    info: ModelInfo,
    decoder: Decoder,
    sites: SiteTable,
    /// The base's tensors by site, shared with the layers.
    parameters: Vec<Parameters>,
    tied_embeddings: bool,
}

impl Model {
    /// Loads the model in `dir` onto the configured device.
    ///
    /// Weights are read once, tensor by tensor, from the mapped files. With `quant`, the decoder layers' linears are
    /// quantised as they are read; embedding, norms, biases and the output head are not. A linear whose rows the
    /// format's blocks do not fill takes the next finer format with smaller blocks, or stays as it is.
    ///
    /// # Errors
    /// See [`ModelError`].
    pub fn load(dir: &Path, config: &ModelConfig) -> std::result::Result<Self, ModelError> {
        let json = read_json(dir, CONFIG_FILE)?;
        let architecture = json
            .pointer("/architectures/0")
            .and_then(Value::as_str)
            .ok_or_else(|| ModelError::config("architectures", "expected a list of names"))?;
        let family = families::find(architecture)?;
        let device = open_device(config.device)?;
        let checkpoint = Checkpoint::open(dir)?;
        let weight_dtype = weight_dtype(config.dtype, &json, &checkpoint)?;
        let mut loader = Loader::new(checkpoint, device, weight_dtype, config.quant);
        let built = (family.build)(&json, &mut loader)?;
        let loaded = loader.finish();
        let info = info(architecture, &built, &loaded, config, generation::read(dir, &json)?)?;
        Ok(Self {
            info,
            decoder: built.decoder,
            sites: loaded.sites,
            parameters: loaded.parameters,
            tied_embeddings: built.tied_embeddings,
        })
    }

    /// Facts about the model.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Runs one step: writes the batch's keys and values into `cache` and returns the logits of `batch.logit_rows`,
    /// (rows, vocab) in f32 on the model's device.
    ///
    /// The batch's adapters are on the model's device already ([`Model::adapter_to_device`]).
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn forward(&self, batch: &Batch, cache: &mut KvCache) -> Result<Tensor> {
        self.decoder.forward(batch, cache)
    }

    /// Copies an adapter to the model's device (shares the tensors where it is there already) in the activations'
    /// format. On the CPU, weights and embedding tables of its own keep their format: half-precision ones are
    /// converted as they are used, as the base's are.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn adapter_to_device(&self, adapter: &LoweredAdapter) -> Result<LoweredAdapter> {
        let place = Placement { device: &self.info.device, dtype: self.info.dtype };
        let mut placed = LoweredAdapter::default();
        for (site, slots) in &adapter.linears {
            placed.linears.insert(*site, place.linear(slots)?);
        }
        for (site, norm) in &adapter.norms {
            let norm = NormOverride { weight: place.option(&norm.weight)?, shift: place.option(&norm.shift)? };
            placed.norms.insert(*site, norm);
        }
        for (site, patch) in &adapter.embeddings {
            placed.embeddings.insert(*site, place.embedding(patch)?);
        }
        Ok(placed)
    }

    fn parameters(&self, site: SiteId) -> &Parameters {
        &self.parameters[site.0]
    }
}

impl BaseWeights for Model {
    fn sites(&self) -> &SiteTable {
        &self.sites
    }

    fn tied_embeddings(&self) -> bool {
        self.tied_embeddings
    }

    fn weight(&self, site: SiteId) -> Result<Tensor> {
        self.parameters(site).weight.to_f32()
    }

    fn bias(&self, site: SiteId) -> Result<Option<Tensor>> {
        self.parameters(site).bias.clone().map(|bias| Matrix::Dense(bias).to_f32()).transpose()
    }
}

/// Where an adapter's tensors go.
struct Placement<'a> {
    device: &'a Device,
    dtype: DType,
}

impl Placement<'_> {
    fn tensor(&self, tensor: &Tensor) -> Result<Tensor> {
        tensor.to_device(self.device)?.to_dtype(self.dtype)?.contiguous()
    }

    fn option(&self, tensor: &Option<Tensor>) -> Result<Option<Tensor>> {
        tensor.as_ref().map(|tensor| self.tensor(tensor)).transpose()
    }

    fn big(&self, tensor: &Tensor) -> Result<Tensor> {
        let kept = self.device.is_cpu() && matches!(tensor.dtype(), DType::BF16 | DType::F16);
        if kept { tensor.to_device(self.device)?.contiguous() } else { self.tensor(tensor) }
    }

    fn linear(&self, slots: &LinearSlots) -> Result<LinearSlots> {
        let mut deltas = Vec::with_capacity(slots.deltas.len());
        for delta in &slots.deltas {
            deltas.push(match delta {
                Delta::LowRank { a, b } => Delta::LowRank { a: self.tensor(a)?, b: self.tensor(b)? },
                Delta::ShardSum { m } => Delta::ShardSum { m: self.tensor(m)? },
            });
        }
        Ok(LinearSlots {
            weight: match &slots.weight {
                Weight::Base => Weight::Base,
                Weight::Own(w) => Weight::Own(self.big(w)?),
            },
            deltas,
            scale: match &slots.scale {
                Scale::One => Scale::One,
                Scale::Diag(scale) => Scale::Diag(self.tensor(scale)?),
            },
            c: self.option(&slots.c)?,
        })
    }

    fn embedding(&self, patch: &EmbeddingPatch) -> Result<EmbeddingPatch> {
        let rows = patch.rows.as_ref().map(|(ids, rows)| Result::Ok((ids.clone(), self.tensor(rows)?)));
        let low_rank = patch.low_rank.as_ref().map(|(a, b)| Result::Ok((self.tensor(a)?, self.tensor(b)?)));
        Ok(EmbeddingPatch {
            table: patch.table.as_ref().map(|table| self.big(table)).transpose()?,
            rows: rows.transpose()?,
            low_rank: low_rank.transpose()?,
            scale: self.option(&patch.scale)?,
            shift: self.option(&patch.shift)?,
        })
    }
}

fn read_json(dir: &Path, file: &str) -> std::result::Result<Value, ModelError> {
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
    let (vocab_size, hidden_size) = built.decoder.embed_tokens.table.dims2()?;
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
        device: loaded.device.clone(),
        weight_bytes: loaded.weight_bytes,
        rope_length_rule: built.decoder.rope.length_rule(),
        generation,
    })
}
