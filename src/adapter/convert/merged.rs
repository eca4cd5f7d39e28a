//! A merged adapter as changes to the base model's checkpoint.

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor};

use crate::adapter::{
    AdapterError, BaseWeights, EmbeddingPatch, LinearSlots, LoweredAdapter, NormOverride, SiteId, SiteKind, Weight,
    merge,
};

/// What a merged adapter changes in the base model's checkpoint.
#[derive(Clone, Debug, Default)]
pub struct MergedModel {
    /// New values by tensor name (`<module path>.weight` or `.bias`), with the shapes of the module.
    pub tensors: BTreeMap<String, Tensor>,
    /// Paths of linears whose bias is new: the base model has none there.
    pub new_biases: Vec<String>,
    /// The output head no longer shares the input embedding's weight; both are in `tensors`.
    pub untied: bool,
}

/// The changes that `adapter`, lowered with `merge`, makes to `base`. The tensors are f32 or in the format of the adapter.
pub(super) fn merged_model(
    adapter: &LoweredAdapter,
    base: &dyn BaseWeights,
) -> std::result::Result<MergedModel, AdapterError> {
    // Taken apart in full, so that a further slot cannot be forgotten here.
    let LoweredAdapter { linears, norms, embeddings, layers, virtual_tokens, kv_prefix, invocation_tokens, gates: _ } =
        adapter;
    if !layers.is_empty() {
        return refuse("layers", "functions inside a layer are no part of a model");
    }
    if let Some((id, _)) = linears.iter().find(|(_, slots)| !slots.deltas.is_empty()) {
        return refuse(&base.sites().get(*id).path, "every token chooses among experts, so no weight does for all");
    }
    if virtual_tokens.is_some() || kv_prefix.is_some() {
        return refuse("num_virtual_tokens", "what stands before the prompt is no part of a model");
    }
    if !invocation_tokens.is_empty() {
        return refuse("alora_invocation_tokens", "a merged model cannot sleep until its tokens occur");
    }
    let mut model = MergedModel::default();
    for (id, slots) in linears {
        linear(&mut model, base, *id, slots)?;
    }
    for (id, norm) in norms {
        self::norm(&mut model, base, *id, norm)?;
    }
    for (id, patch) in embeddings {
        let path = &base.sites().get(*id).path;
        model.tensors.insert(format!("{path}.weight"), table(patch, base, *id)?);
    }
    if base.tied_embeddings() {
        tie(&mut model, base)?;
    }
    Ok(model)
}

fn refuse<T>(place: &str, reason: &str) -> std::result::Result<T, AdapterError> {
    Err(AdapterError::NotConvertible { place: place.to_owned(), reason: reason.to_owned() })
}

fn linear(model: &mut MergedModel, base: &dyn BaseWeights, id: SiteId, slots: &LinearSlots) -> Result<()> {
    let path = &base.sites().get(id).path;
    // Merging has folded the other slots into the weight.
    let LinearSlots { pre: _, weight, rows, deltas: _, scale: _, c } = slots;
    let weight = match (weight, rows) {
        (Weight::Own(weight), None) => Some(weight.clone()),
        (Weight::Base, None) => None,
        (Weight::Own(weight), Some((ids, rows))) => Some(merge::with_rows(&weight.to_dtype(DType::F32)?, ids, rows)?),
        (Weight::Base, Some((ids, rows))) => Some(merge::with_rows(&base.weight(id)?, ids, rows)?),
    };
    if let Some(weight) = weight {
        model.tensors.insert(format!("{path}.weight"), weight);
    }
    let Some(c) = c else { return Ok(()) };
    let is_new = base.bias(id)?.is_none();
    if is_new && is_zero(c)? {
        return Ok(());
    }
    if is_new {
        model.new_biases.push(path.clone());
    }
    model.tensors.insert(format!("{path}.bias"), c.clone());
    Ok(())
}

fn norm(
    model: &mut MergedModel,
    base: &dyn BaseWeights,
    id: SiteId,
    norm: &NormOverride,
) -> std::result::Result<(), AdapterError> {
    let path = &base.sites().get(id).path;
    if let Some(weight) = &norm.weight {
        model.tensors.insert(format!("{path}.weight"), weight.clone());
    }
    if let Some(shift) = &norm.shift {
        if base.bias(id)?.is_some() {
            model.tensors.insert(format!("{path}.bias"), shift.clone());
        } else if !is_zero(shift)? {
            return refuse(path, why_no_shift(base, id));
        }
    }
    Ok(())
}

/// Why the shift s of a norm cannot be stored. Behind the norm it is a bias `W s` of every linear that reads it, but no
/// family has biases in all of these places: the head has none in any, and between the norms of queries and keys and their
/// use there is no linear.
fn why_no_shift(base: &dyn BaseWeights, id: SiteId) -> &'static str {
    let behind = base.sites().iter().find(|(other, site)| *other > id && matches!(site.kind, SiteKind::Linear { .. }));
    match behind.map(|(_, site)| site.kind) {
        Some(SiteKind::Linear { output_head: true, .. }) => {
            "it gains a shift, which the architecture's norms do not have; it would be a bias of the output head, which has \
             none either"
        }
        _ => {
            "it gains a shift, which the architecture's norms do not have, and there are no biases behind all of its norms \
             that could stand for shifts"
        }
    }
}

/// `scale * (table + (b a)^T) + shift`, row by row; (vocab, dim) f32.
fn table(patch: &EmbeddingPatch, base: &dyn BaseWeights, id: SiteId) -> Result<Tensor> {
    let to_f32 = |tensor: &Tensor| tensor.to_dtype(DType::F32);
    let mut table = patch.table.as_ref().map_or_else(|| base.weight(id), to_f32)?;
    if let Some((ids, rows)) = &patch.rows {
        table = merge::with_rows(&table, ids, rows)?;
    }
    if let Some((a, b)) = &patch.low_rank {
        table = (table + to_f32(a)?.t()?.contiguous()?.matmul(&to_f32(b)?.t()?.contiguous()?)?)?;
    }
    if let Some(scale) = &patch.scale {
        table = table.broadcast_mul(&to_f32(scale)?)?;
    }
    if let Some(shift) = &patch.shift {
        table = table.broadcast_add(&to_f32(shift)?)?;
    }
    Ok(table)
}

/// Leaves one matrix for embedding and head where both stay equal; otherwise both are given.
fn tie(model: &mut MergedModel, base: &dyn BaseWeights) -> Result<()> {
    let find = |is_one: fn(&SiteKind) -> bool| base.sites().iter().find(|(_, site)| is_one(&site.kind));
    let embedding = find(|kind| matches!(kind, SiteKind::Embedding { .. }));
    let head = find(|kind| matches!(kind, SiteKind::Linear { output_head: true, .. }));
    let (Some((embedding, embedding_site)), Some((head, head_site))) = (embedding, head) else { return Ok(()) };
    let names = [format!("{}.weight", embedding_site.path), format!("{}.weight", head_site.path)];
    if !names.iter().any(|name| model.tensors.contains_key(name)) {
        return Ok(());
    }
    for (name, id) in names.iter().zip([embedding, head]) {
        if !model.tensors.contains_key(name) {
            model.tensors.insert(name.clone(), base.weight(id)?);
        }
    }
    let values = |name: &String| model.tensors[name].to_dtype(DType::F32);
    let differ = values(&names[0])?.ne(&values(&names[1])?)?.to_dtype(DType::U32)?.max_all()?.to_scalar::<u32>()?;
    if differ == 0 {
        model.tensors.remove(&names[1]);
    } else {
        model.untied = true;
    }
    Ok(())
}

fn is_zero(tensor: &Tensor) -> Result<bool> {
    Ok(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?.iter().all(|value| *value == 0.0))
}
