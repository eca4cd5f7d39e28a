//! From a checkpoint's tensors to layers; every layer made is entered into the site table.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use half::bf16;
use mistralrs_quant::{GgufMatMul, QuantMethod, QuantMethodConfig};

use super::checkpoint::Checkpoint;
use super::device::activation_dtype;
use super::device_adapter::{integer_matrix, pack_matrix};
use super::layers::{Embedding, Linear, Matrix, RmsNorm};
use super::{KernelChoice, ModelConfig, ModelError, QuantChoice};
use crate::adapter::{Formats, Site, SiteId, SiteKind, SiteTable};
use crate::kernels::cpu::{IntegerMatrix, IntegerWidth, PackedMatrix, WeightFormat};

/// Makes layers by module path. A family calls it in forward order, so the site table is in that order too.
pub(super) struct Loader {
    checkpoint: Checkpoint,
    device: Device,
    /// Format of dense weights.
    weight_dtype: DType,
    /// Format of activations, norms and biases.
    dtype: DType,
    /// The blocks that linears are quantised in.
    blocks: Option<GgmlDType>,
    /// Whether dense weights are packed for the CPU's kernels.
    pack: bool,
    /// Whether packed weights are quantised to 8-bit integers.
    int8: bool,
    sites: SiteTable,
    parameters: Vec<Parameters>,
    weight_bytes: usize,
}

/// The base's tensors at one site.
pub(super) struct Parameters {
    pub(super) weight: Matrix,
    pub(super) bias: Option<Tensor>,
}

/// What remains of a loader when all layers are made.
pub(super) struct Loaded {
    pub(super) sites: SiteTable,
    /// By site id.
    pub(super) parameters: Vec<Parameters>,
    pub(super) weight_bytes: usize,
    pub(super) dtype: DType,
    pub(super) kv_dtype: DType,
    pub(super) adapter_formats: Formats,
    pub(super) device: Device,
    /// Whether the CPU's kernels run the layers.
    pub(super) packed: bool,
}

impl Loader {
    /// Reads `checkpoint` as `config` says.
    ///
    /// # Errors
    /// When the quantisation is one that the device's kernels lack.
    pub(super) fn new(
        checkpoint: Checkpoint,
        device: Device,
        weight_dtype: DType,
        config: &ModelConfig,
    ) -> Result<Self, ModelError> {
        let dtype = activation_dtype(&device, weight_dtype);
        let pack = device.is_cpu() && config.kernels == KernelChoice::Auto;
        if config.quant == Some(QuantChoice::Int8) && !pack {
            return Err(ModelError::Field {
                file: "[model]",
                field: "quant".to_owned(),
                reason: "int8 needs device = \"cpu\" and kernels = \"auto\"".to_owned(),
            });
        }
        Ok(Self {
            checkpoint,
            device,
            weight_dtype,
            dtype,
            blocks: config.quant.and_then(blocks),
            pack,
            int8: config.quant == Some(QuantChoice::Int8),
            sites: SiteTable::default(),
            parameters: Vec::new(),
            weight_bytes: 0,
        })
    }

    /// The linear at `path` with weight `path.weight` (out, in) and, if `bias`, `path.bias` (out). Its weight is
    /// quantised where that is asked for.
    pub(super) fn linear(
        &mut self,
        path: &str,
        in_features: usize,
        out_features: usize,
        bias: bool,
    ) -> Result<Linear, ModelError> {
        let shape = [out_features, in_features];
        let name = format!("{path}.weight");
        let weight = match self.blocks.and_then(|blocks| quant_for_rows(blocks, in_features)) {
            Some(quant) => self.quantized(&name, &shape, quant)?,
            None => self.weight(&name, &shape)?,
        };
        let bias = if bias { Some(self.tensor(&format!("{path}.bias"), &[out_features], self.dtype)?) } else { None };
        let kind = SiteKind::Linear { in_features, out_features, bias: bias.is_some(), output_head: false };
        let site = self.push(path, kind, weight.clone(), bias.clone());
        Ok(Linear::new(site, weight, bias)?)
    }

    /// The output head: its own weight (vocab, hidden), or the embedding's where they are tied. Not quantised in blocks:
    /// its rows decide between tokens, and it is often the embedding.
    pub(super) fn lm_head(&mut self, embedding: &mut Embedding, tied: bool) -> Result<Linear, ModelError> {
        let (vocab, hidden) = embedding.table.dims()?;
        let weight = if tied {
            // The embedding then reads its rows from the packed form, so that there is one copy.
            if let (true, Matrix::Dense(table)) = (self.pack, &embedding.table) {
                self.weight_bytes -= table.elem_count() * table.dtype().size_in_bytes();
                embedding.table = self.packed(table)?;
                self.parameters[embedding.site.0].weight = embedding.table.clone();
            }
            embedding.table.clone()
        } else {
            self.weight("lm_head.weight", &[vocab, hidden])?
        };
        let kind = SiteKind::Linear { in_features: hidden, out_features: vocab, bias: false, output_head: true };
        let site = self.push("lm_head", kind, weight.clone(), None);
        Ok(Linear::new(site, weight, None)?)
    }

    /// The norm at `path` with weight `path.weight` (dim).
    pub(super) fn rms_norm(&mut self, path: &str, dim: usize, eps: f64) -> Result<RmsNorm, ModelError> {
        let weight = self.tensor(&format!("{path}.weight"), &[dim], self.dtype)?;
        let site = self.push(path, SiteKind::Norm { dim, bias: false }, Matrix::Dense(weight.clone()), None);
        Ok(RmsNorm::new(site, weight, eps as f32, self.pack)?)
    }

    /// The embedding at `path` with table `path.weight` (vocab, dim).
    pub(super) fn embedding(&mut self, path: &str, vocab: usize, dim: usize) -> Result<Embedding, ModelError> {
        let table = Matrix::Dense(self.tensor(&format!("{path}.weight"), &[vocab, dim], self.weight_dtype)?);
        let site = self.push(path, SiteKind::Embedding { vocab, dim }, table.clone(), None);
        Ok(Embedding { site, table, dtype: self.dtype })
    }

    /// Ends loading: reports tensors that nothing asked for.
    pub(super) fn finish(self) -> Loaded {
        let unused = self.checkpoint.unused();
        if !unused.is_empty() {
            tracing::warn!(tensors = unused.join(", "), "the checkpoint has tensors that the model does not use");
        }
        // The kernels multiply with adapters' matrices in the format of the weights that these lie beside.
        let matrices = if self.pack && self.blocks.is_none() && self.weight_dtype == DType::BF16 {
            DType::BF16
        } else {
            self.dtype
        };
        let adapter_formats = Formats { matrices, values: self.dtype };
        let kv_dtype = if self.weight_dtype == DType::BF16 { DType::BF16 } else { self.dtype };
        Loaded {
            sites: self.sites,
            parameters: self.parameters,
            weight_bytes: self.weight_bytes,
            dtype: self.dtype,
            kv_dtype,
            adapter_formats,
            device: self.device,
            packed: self.pack,
        }
    }

    /// A weight in the form that its layer multiplies with, but for blocks.
    fn weight(&mut self, name: &str, shape: &[usize]) -> Result<Matrix, ModelError> {
        if self.pack {
            let integers = self.integers(shape[1]);
            // The most usual cases are packed from the file as it is, without a copy in between.
            if self.weight_dtype == DType::BF16
                && !self.int8
                && let (DType::BF16, bytes) = self.checkpoint.stored_bytes(name, shape)?
            {
                let (packed, bytes) = pack_bytes(integers, (shape[0], shape[1]), bytes)?;
                self.weight_bytes += bytes;
                return Ok(packed);
            }
            let dense = self.checkpoint.load(name, shape, self.weight_dtype, &self.device)?;
            return self.packed(&dense);
        }
        Ok(Matrix::Dense(self.tensor(name, shape, self.weight_dtype)?))
    }

    /// The integers that packed weights with rows of `k` elements are made.
    fn integers(&self, k: usize) -> Option<IntegerWidth> {
        match self.weight_dtype {
            _ if self.int8 => Some(IntegerWidth::Eight),
            DType::BF16 if self.blocks.is_none() => IntegerWidth::for_bf16(k),
            _ => None,
        }
    }

    /// A dense weight in the form of the CPU's kernels.
    fn packed(&mut self, dense: &Tensor) -> Result<Matrix, ModelError> {
        if let Some(width) = self.integers(dense.dim(1)?) {
            let packed = integer_matrix(width, dense)?;
            self.weight_bytes += packed.bytes();
            return Ok(Matrix::Integers(Arc::new(packed)));
        }
        self.weight_bytes += dense.elem_count() * dense.dtype().size_in_bytes();
        Ok(Matrix::Packed(Arc::new(pack_matrix(dense)?)))
    }

    fn tensor(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor, ModelError> {
        let tensor = self.checkpoint.load(name, shape, dtype, &self.device)?;
        self.weight_bytes += tensor.elem_count() * dtype.size_in_bytes();
        Ok(tensor)
    }

    fn quantized(&mut self, name: &str, shape: &[usize], quant: GgmlDType) -> Result<Matrix, ModelError> {
        let dense = self.checkpoint.load(name, shape, DType::F32, &Device::Cpu)?;
        let blocks = Arc::new(QTensor::quantize_onto(&dense, quant, &self.device)?);
        self.weight_bytes += blocks.storage_size_in_bytes();
        let product = GgufMatMul::new(QuantMethodConfig::Gguf { q_weight: Arc::clone(&blocks), b: None })?;
        Ok(Matrix::Quantized { blocks, product: Arc::new(product) })
    }

    fn push(&mut self, path: &str, kind: SiteKind, weight: Matrix, bias: Option<Tensor>) -> SiteId {
        self.parameters.push(Parameters { weight, bias });
        self.sites.push(Site { path: path.to_owned(), kind })
    }
}

/// A bf16 weight (n, k), given as bytes, in the form of the CPU's kernels; and the bytes that it takes there.
fn pack_bytes(
    integers: Option<IntegerWidth>,
    (n, k): (usize, usize),
    bytes: &[u8],
) -> candle_core::Result<(Matrix, usize)> {
    let Some(width) = integers else {
        return Ok((Matrix::Packed(Arc::new(PackedMatrix::from_bf16_bytes(n, k, bytes)?)), bytes.len()));
    };
    let packed = IntegerMatrix::new(width, WeightFormat::Bf16, (n, k), |row, out| {
        let (values, _) = bytes[2 * row * k..][..2 * k].as_chunks();
        out.iter_mut().zip(values).for_each(|(out, bytes)| *out = bf16::from_le_bytes(*bytes).to_f32());
    })?;
    let bytes = packed.bytes();
    Ok((Matrix::Integers(Arc::new(packed)), bytes))
}

/// The blocks of a quantised format, where it has blocks.
fn blocks(choice: QuantChoice) -> Option<GgmlDType> {
    Some(match choice {
        QuantChoice::Int8 => return None,
        QuantChoice::Q4_0 => GgmlDType::Q4_0,
        QuantChoice::Q5_0 => GgmlDType::Q5_0,
        QuantChoice::Q8_0 => GgmlDType::Q8_0,
        QuantChoice::Q3K => GgmlDType::Q3K,
        QuantChoice::Q4K => GgmlDType::Q4K,
        QuantChoice::Q5K => GgmlDType::Q5K,
        QuantChoice::Q6K => GgmlDType::Q6K,
    })
}

/// The format for rows of `in_features` elements: the one asked for where its blocks fill the row, else the next finer
/// one with smaller blocks, else none (the weight stays dense).
fn quant_for_rows(quant: GgmlDType, in_features: usize) -> Option<GgmlDType> {
    let choices: &[GgmlDType] = match quant {
        GgmlDType::Q3K => &[GgmlDType::Q3K, GgmlDType::Q4_0],
        GgmlDType::Q4K => &[GgmlDType::Q4K, GgmlDType::Q5_0, GgmlDType::Q8_0],
        GgmlDType::Q5K => &[GgmlDType::Q5K, GgmlDType::Q8_0],
        GgmlDType::Q6K => &[GgmlDType::Q6K, GgmlDType::Q8_0],
        GgmlDType::Q5_0 => &[GgmlDType::Q5_0, GgmlDType::Q8_0],
        GgmlDType::Q4_0 => &[GgmlDType::Q4_0],
        _ => &[GgmlDType::Q8_0],
    };
    // candle's q5_0 product asserts pairs of blocks.
    let row_multiple = |quant: GgmlDType| match quant {
        GgmlDType::Q5_0 => 2 * quant.block_size(),
        quant => quant.block_size(),
    };
    choices.iter().copied().find(|quant| in_features.is_multiple_of(row_multiple(*quant)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_take_the_first_format_whose_blocks_fill_them() {
        let check = |quant, in_features, expected| assert_eq!(quant_for_rows(quant, in_features), expected);
        check(GgmlDType::Q4K, 512, Some(GgmlDType::Q4K));
        check(GgmlDType::Q4K, 192, Some(GgmlDType::Q5_0));
        check(GgmlDType::Q4K, 96, Some(GgmlDType::Q8_0));
        check(GgmlDType::Q3K, 96, Some(GgmlDType::Q4_0));
        check(GgmlDType::Q8_0, 48, None);
    }
}
