//! From files to the normal form.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Storage, Tensor};
use half::{bf16, f16};
use sha2::{Digest, Sha256};

use super::config::{CONFIG_FILE, Config};
use super::lowering::{Ask, Lowering};
use super::tensor_file::TensorFile;
use super::{
    AdapterError, AdapterFiles, BaseWeights, Delta, Formats, GateNetwork, LowerOptions, LowerReport, LoweredAdapter,
    Need, SharedMatrix, SiteId, effect, kinds, merge,
};

/// Checks an adapter's files against the base model and lowers them to the normal form.
///
/// The result lies in host memory. Lowering computes in f32; the tensors are stored in `options.formats`.
///
/// # Errors
/// Refuses whatever is not fully understood: see [`AdapterError`].
pub fn lower(
    files: &AdapterFiles,
    base: &dyn BaseWeights,
    options: &LowerOptions,
) -> Result<(LoweredAdapter, LowerReport), AdapterError> {
    lower_within(files, base, options, &|_, need| need == Need::Terms)
}

/// Like [`lower`]. Before dense copies of weights come to more than `options.own_bytes_max` bytes, or than was granted, and
/// before the factors of a low-rank delta are made, `ask` is asked for as many as they then come to.
///
/// # Errors
/// As [`lower`]; `OverBudget` and `OverMemory` where it was asked for what is needed, and refused.
pub fn lower_within(
    files: &AdapterFiles,
    base: &dyn BaseWeights,
    options: &LowerOptions,
    ask: &Ask<'_>,
) -> Result<(LoweredAdapter, LowerReport), AdapterError> {
    let mut lowering = open(files, base, options)?;
    lowering.ask = Some(ask);
    run(&mut lowering)?;
    finish(lowering)
}

/// Checks the files as far as that goes without the kind's own rules.
pub(super) fn open<'a>(
    files: &'a AdapterFiles,
    base: &'a dyn BaseWeights,
    options: &LowerOptions,
) -> Result<Lowering<'a>, AdapterError> {
    let config = Config::parse(&files.config)?;
    let kind = kinds::of(&config);
    let may_be_empty = kind.as_ref().is_ok_and(|kind| kind.may_be_empty);
    let file = TensorFile::parse(&files.weights, may_be_empty)?;
    let kind = kind?;
    if let Some(fault) = config.faults(kind.fields).into_iter().next() {
        return Err(fault);
    }
    (kind.check)(&config)?;
    if file.len() == 0 {
        return Err(AdapterError::Empty { reason: "the file holds no tensors".to_owned() });
    }
    let (named, found) = ((kind.parts)(&config)?, files.parts.len());
    if found < named {
        let reason = format!("names {named} adapters in sub-directories, and there are {found}; `{found}` is missing");
        return Err(AdapterError::Malformed { file: CONFIG_FILE, reason });
    }
    Lowering::new((config, kind, file, &files.parts[..named]), base, *options)
}

/// Lowers by the kind's rules, and accounts for every tensor.
pub(super) fn run(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    (lowering.kind.lower)(lowering)?;
    lowering.check_complete()?;
    if lowering.num_modules() == 0 && lowering.out.num_leading() == 0 {
        return Err(AdapterError::Empty { reason: "the config names none".to_owned() });
    }
    Ok(())
}

/// SHA-256 over the digest of an adapter's files and the options that change its effect.
pub fn digest(content: &[u8; 32], options: &LowerOptions) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(content);
    hasher.update([u8::from(options.merge)]);
    for format in [options.formats.matrices, options.formats.values] {
        hasher.update(format.as_str());
    }
    hasher.finalize().into()
}

fn finish(mut lowering: Lowering<'_>) -> Result<(LoweredAdapter, LowerReport), AdapterError> {
    let (modules, leading_tokens) = (lowering.num_modules(), lowering.out.num_leading());
    if effect::is_neutral(&lowering.out, lowering.base, lowering.options.formats.matrices)? {
        lowering.warnings.push("the adapter has no effect: it equals the base model".to_owned());
    }
    if lowering.options.merge {
        merge::merge(&mut lowering)?;
        if modules == 0 {
            lowering.warnings.push("there is nothing to merge: the adapter stands before the prompt".to_owned());
        } else if lowering.out.linears.is_empty() && !lowering.out.layers.is_empty() {
            lowering
                .warnings
                .push("there is nothing to merge: what the adapter adds is no part of a weight".to_owned());
        }
    }
    if !lowering.options.merge {
        lowering.warn_of_room();
    }
    store(&mut lowering)?;
    let report = LowerReport {
        kind: lowering.kind.peft_type.to_owned(),
        merged: lowering.options.merge,
        modules,
        leading_tokens,
        ranks: lowering.ranks.iter().copied().collect(),
        bytes: lowering.out.bytes(),
        own_weight_bytes: lowering.out.own_bytes(),
        own_weights: lowering.own_weights(),
        warnings: lowering.warnings,
    };
    Ok((lowering.out, report))
}

/// Converts every tensor to its serving format; refuses what does not fit into it.
fn store(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let formats = lowering.options.formats;
    for (tensor, is_matrix) in lowering.out.tensors_mut() {
        let format = if is_matrix { formats.matrices } else { formats.values };
        *tensor = tensor.to_dtype(format)?.contiguous()?;
    }
    if let Some(site) = store_shared(&mut lowering.out, formats.matrices)? {
        return Err(infinite(&lowering.site(site).path, formats));
    }
    let refuse = |tensor: &str| Err(infinite(tensor, formats));
    if let Some(site) = first_infinite(&lowering.out)? {
        return refuse(&lowering.site(site).path);
    }
    for (layer, slots) in &lowering.out.layers {
        for tensor in slots.tensors() {
            if !is_finite(tensor)? {
                return refuse(&format!("layer {layer}"));
            }
        }
    }
    for tensor in lowering.out.gates.iter().flat_map(GateNetwork::tensors) {
        if !is_finite(tensor)? {
            return refuse("the network that gives gates");
        }
    }
    for tensor in lowering.out.leading_tensors() {
        if !is_finite(tensor)? {
            return refuse("prompt_embeddings");
        }
    }
    Ok(())
}

fn infinite(tensor: &str, formats: Formats) -> AdapterError {
    let reason = format!("the lowered values are not finite in {formats}");
    AdapterError::Tensor { tensor: tensor.to_owned(), reason }
}

/// Converts each matrix that others read too, once, to the one that the process keeps; answers with a site whose matrix
/// does not fit into the format.
fn store_shared(adapter: &mut LoweredAdapter, dtype: DType) -> Result<Option<SiteId>, AdapterError> {
    let mut stored: HashMap<[u8; 32], Arc<SharedMatrix>> = HashMap::new();
    for (site, slots) in &mut adapter.linears {
        for matrix in slots.deltas.iter_mut().flat_map(Delta::shared_mut) {
            if let Some(kept) = stored.get(&matrix.digest()) {
                *matrix = kept.clone();
                continue;
            }
            let tensor = matrix.tensor().to_dtype(dtype)?;
            if !is_finite(&tensor)? {
                return Ok(Some(*site));
            }
            let kept = SharedMatrix::new(&tensor)?.kept_once();
            stored.insert(matrix.digest(), kept.clone());
            *matrix = kept;
        }
    }
    Ok(None)
}

/// A site with a value that is infinite or NaN.
fn first_infinite(adapter: &LoweredAdapter) -> Result<Option<SiteId>, AdapterError> {
    for (id, slots) in &adapter.linears {
        for tensor in slots.tensors() {
            if !is_finite(tensor)? {
                return Ok(Some(*id));
            }
        }
    }
    for (id, norm) in &adapter.norms {
        for tensor in norm.weight.iter().chain(&norm.shift) {
            if !is_finite(tensor)? {
                return Ok(Some(*id));
            }
        }
    }
    for (id, patch) in &adapter.embeddings {
        for tensor in patch.tensors() {
            if !is_finite(tensor)? {
                return Ok(Some(*id));
            }
        }
    }
    Ok(None)
}

pub(super) fn is_finite(tensor: &Tensor) -> candle_core::Result<bool> {
    // No early end: the loops are over sooner without.
    fn all<T: Copy>(values: &[T], is_finite: impl Fn(T) -> bool) -> bool {
        values.iter().fold(true, |all, value| all & is_finite(*value))
    }
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let range = layout.start_offset()..layout.start_offset() + tensor.elem_count();
    Ok(match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => all(&values[range], f32::is_finite),
        Storage::Cpu(CpuStorage::F16(values)) => all(&values[range], f16::is_finite),
        Storage::Cpu(CpuStorage::BF16(values)) => all(&values[range], bf16::is_finite),
        _ => tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?.into_iter().all(f32::is_finite),
    })
}
