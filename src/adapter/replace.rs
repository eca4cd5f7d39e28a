//! Tensors that replace a base tensor as a whole, for every kind: `modules_to_save`, `bias`, `base_layer`.

use candle_core::{DType, Tensor};

use super::config::field_error;
use super::lowering::Lowering;
use super::matching::{is_saved, modules_to_save};
use super::{AdapterError, SiteId, SiteKind, Weight};

/// Why such a module does not use the shared weight.
pub(super) const REPLACED: &str = "the file replaces the weight as a whole";

/// Applies `modules_to_save`: complete tensors of the modules it names. `also` is one more module, for weight tying.
pub(super) fn saved_modules(lowering: &mut Lowering<'_>, also: Option<SiteId>) -> Result<(), AdapterError> {
    let names = modules_to_save(&lowering.config)?;
    let sites = lowering.base.sites();
    let saved: Vec<SiteId> =
        sites.iter().filter(|(id, site)| Some(*id) == also || is_saved(&names, &site.path)).map(|(id, _)| id).collect();
    for name in names {
        if !saved.iter().any(|id| is_saved(std::slice::from_ref(&name), &lowering.site(*id).path)) {
            lowering.warnings.push(format!("`{name}` in `modules_to_save` matches no module"));
        }
    }
    for id in saved {
        save_module(lowering, id)?;
    }
    Ok(())
}

fn save_module(lowering: &mut Lowering<'_>, id: SiteId) -> Result<(), AdapterError> {
    match lowering.site(id).kind {
        SiteKind::Linear { in_features, out_features, bias, .. } => {
            let weight = saved_tensor(lowering, id, "weight", &[out_features, in_features])?;
            let c = if bias { Some(saved_tensor(lowering, id, "bias", &[out_features])?) } else { None };
            set_weight(lowering, id, &weight)?;
            lowering.out.linears.entry(id).or_default().c = c;
        }
        SiteKind::Norm { dim, bias } => {
            let weight = saved_tensor(lowering, id, "weight", &[dim])?;
            let shift = if bias { Some(saved_tensor(lowering, id, "bias", &[dim])?) } else { None };
            let norm = lowering.out.norms.entry(id).or_default();
            (norm.weight, norm.shift) = (Some(weight), shift);
        }
        SiteKind::Embedding { vocab, dim } => {
            let table = saved_tensor(lowering, id, "weight", &[vocab, dim])?;
            set_table(lowering, id, &table)?;
        }
    }
    Ok(())
}

/// The tensor under its plain name, or under the name that older releases gave it.
fn saved_tensor(lowering: &mut Lowering<'_>, id: SiteId, name: &str, shape: &[usize]) -> Result<Tensor, AdapterError> {
    let old = format!("modules_to_save.{name}");
    if lowering.has(id, &old) && !lowering.has(id, name) {
        return lowering.require(id, &old, shape);
    }
    let tensor = lowering.take(id, name, shape)?;
    tensor.ok_or_else(|| lowering.refuse(id, name, "is missing, but `modules_to_save` names its module"))
}

fn set_weight(lowering: &mut Lowering<'_>, id: SiteId, weight: &Tensor) -> Result<(), AdapterError> {
    lowering.reserve_own(weight.elem_count())?;
    let own = lowering.own(weight)?;
    lowering.out.linears.entry(id).or_default().weight = Weight::Own(own);
    lowering.explain_own(id, REPLACED);
    Ok(())
}

fn set_table(lowering: &mut Lowering<'_>, id: SiteId, table: &Tensor) -> Result<(), AdapterError> {
    lowering.reserve_own(table.elem_count())?;
    let own = lowering.own(table)?;
    lowering.out.embeddings.entry(id).or_default().table = Some(own);
    lowering.explain_own(id, REPLACED);
    Ok(())
}

/// Applies the field `bias`: `all` biases of the model, or those of adapted linears (`<kind>_only`), are in the file
/// with their complete values.
pub(super) fn biases(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let field = "bias";
    let mode = lowering.config.string(field)?.unwrap_or("none").to_owned();
    let is_only = mode.to_ascii_lowercase().ends_with("_only");
    if mode == "none" {
        return Ok(());
    }
    if mode != "all" && !is_only {
        return Err(field_error(field, format!("expected `none`, `all` or `<kind>_only`, found `{mode}`")));
    }
    let mut replaced = 0;
    for id in lowering.unread_sites() {
        let len = match lowering.site(id).kind {
            SiteKind::Linear { out_features, bias: true, .. } => out_features,
            SiteKind::Norm { dim, bias: true } if !is_only => dim,
            SiteKind::Linear { .. } | SiteKind::Norm { .. } | SiteKind::Embedding { .. } => continue,
        };
        let wrapped = lowering.take(id, "base_layer.bias", &[len])?;
        let Some(bias) = wrapped.map_or_else(|| lowering.take(id, "bias", &[len]), |bias| Ok(Some(bias)))? else {
            continue;
        };
        replaced += 1;
        match lowering.site(id).kind {
            SiteKind::Norm { .. } => lowering.out.norms.entry(id).or_default().shift = Some(bias),
            _ => lowering.out.linears.entry(id).or_default().c = Some(bias),
        }
    }
    let has_bias = |kind: &SiteKind| matches!(kind, SiteKind::Linear { bias: true, .. });
    if replaced == 0 && lowering.base.sites().iter().any(|(_, site)| has_bias(&site.kind)) {
        lowering.warnings.push(format!("`bias` is `{mode}`, but the file has no bias; the base model's are used"));
    }
    Ok(())
}

/// Applies `base_layer.weight`: PEFT saves the base weight of adapted embeddings and heads, and loads it again. Where
/// it equals the base model's it is dropped; otherwise the file's is used, as PEFT does.
pub(super) fn base_layers(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let suffix = "base_layer.weight";
    for id in lowering.unread_sites() {
        let (shape, is_table) = match lowering.site(id).kind {
            SiteKind::Linear { in_features, out_features, .. } => ([out_features, in_features], false),
            SiteKind::Embedding { vocab, dim } => ([vocab, dim], true),
            SiteKind::Norm { .. } => continue,
        };
        let Some(weight) = lowering.take(id, suffix, &shape)? else { continue };
        if is_same(&weight, &lowering.base.weight(id)?, lowering.options.formats.matrices)?
            || lowering.base.may_be_quantised_from(id, &weight)?
        {
            continue;
        }
        let path = &lowering.site(id).path;
        lowering.warnings.push(format!("`{path}.{suffix}` differs from the base model's weight and replaces it"));
        let head = lowering.tied_head().filter(|head| is_table || id == *head);
        if let Some(head) = head {
            replace_tied(lowering, head, &weight)?;
        } else if is_table {
            set_table(lowering, id, &weight)?;
        } else {
            set_weight(lowering, id, &weight)?;
        }
    }
    Ok(())
}

/// Replaces the one matrix that embedding and head share.
fn replace_tied(lowering: &mut Lowering<'_>, head: SiteId, weight: &Tensor) -> Result<(), AdapterError> {
    if let Some(Weight::Own(earlier)) = lowering.out.linears.get(&head).map(|slots| &slots.weight) {
        if is_same(weight, &earlier.to_dtype(DType::F32)?, lowering.options.formats.matrices)? {
            return Ok(());
        }
        let reason = "differs from the other copy of the weight that embedding and head share";
        return Err(lowering.refuse(head, "base_layer.weight", reason));
    }
    for id in lowering.embeddings() {
        set_table(lowering, id, weight)?;
    }
    set_weight(lowering, head, weight)
}

/// Whether two f32 tensors are equal, exactly or after rounding either of them to the serving format or to one of the
/// half formats that files use.
fn is_same(file: &Tensor, base: &Tensor, served: DType) -> Result<bool, AdapterError> {
    let rounded = |x: &Tensor, dtype: DType| x.to_dtype(dtype)?.to_dtype(DType::F32);
    let differs = |x: &Tensor, y: &Tensor| x.ne(y)?.to_dtype(DType::U32)?.max_all()?.to_scalar::<u32>();
    if differs(file, base)? == 0 || differs(&rounded(file, served)?, base)? == 0 {
        return Ok(true);
    }
    for dtype in [DType::BF16, DType::F16] {
        if differs(file, &rounded(base, dtype)?)? == 0 {
            return Ok(true);
        }
    }
    Ok(false)
}
