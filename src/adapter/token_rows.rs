//! Replaced rows of embeddings and heads, for the kinds that train some tokens only. `field` is the config field that
//! lists the tokens.

use candle_core::{Device, Tensor};
use serde_json::Value;

use super::config::{field_error, wrong_type};
use super::lowering::Lowering;
use super::{AdapterError, SiteId, SiteKind, Weight};

/// A list of token ids.
pub(super) fn token_ids(field: &str, list: &Value) -> Result<Vec<u32>, AdapterError> {
    let items = list.as_array().ok_or_else(|| wrong_type(field, "a list of token ids", list))?;
    let id = |item: &Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
    items.iter().map(|item| id(item).ok_or_else(|| wrong_type(field, "a token id", item))).collect()
}

/// The rows that the file has for `tokens`, and the tokens, both in ascending order of the tokens.
pub(super) fn take_rows(
    lowering: &mut Lowering<'_>,
    id: SiteId,
    (field, suffix): (&str, &str),
    tokens: &[u32],
) -> Result<(Vec<u32>, Tensor), AdapterError> {
    let (vocab, dim) = match lowering.site(id).kind {
        SiteKind::Linear { in_features, out_features, .. } => (out_features, in_features),
        SiteKind::Embedding { vocab, dim } => (vocab, dim),
        SiteKind::Norm { dim, .. } => (dim, 1),
    };
    if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab) {
        return Err(field_error(field, format!("token id {token} is not below {vocab}, the rows of the base model")));
    }
    let mut order: Vec<u32> = (0..tokens.len() as u32).collect();
    order.sort_by_key(|idx| tokens[*idx as usize]);
    let sorted: Vec<u32> = order.iter().map(|idx| tokens[*idx as usize]).collect();
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(field_error(field, format!("token id {} occurs twice", pair[0])));
    }
    let rows = lowering.require(id, suffix, &[tokens.len(), dim])?;
    let count = order.len();
    let rows = rows.index_select(&Tensor::from_vec(order, count, &Device::Cpu)?, 0)?;
    Ok((sorted, rows))
}

/// Puts rows into an embedding, or into the weight of a head.
pub(super) fn put(
    lowering: &mut Lowering<'_>,
    field: &str,
    id: SiteId,
    rows: (Vec<u32>, Tensor),
) -> Result<(), AdapterError> {
    let replaced = match lowering.site(id).kind {
        SiteKind::Embedding { .. } => {
            let patch = lowering.out.embeddings.entry(id).or_default();
            patch.rows = Some(rows);
            patch.table.is_some()
        }
        SiteKind::Linear { .. } | SiteKind::Norm { .. } => {
            let slots = lowering.out.linears.entry(id).or_default();
            slots.rows = Some(rows);
            matches!(slots.weight, Weight::Own(_))
        }
    };
    if replaced {
        let path = &lowering.site(id).path;
        return Err(field_error(
            field,
            format!("`{path}` is replaced as a whole as well, which together is not served"),
        ));
    }
    Ok(())
}
