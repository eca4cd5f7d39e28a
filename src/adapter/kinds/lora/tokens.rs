//! `trainable_token_indices`: complete new rows for some tokens, in the order of the config's list. Despite its name
//! `trainable_tokens_delta` holds the rows themselves (PEFT 0.21 `tuners/trainable_tokens`).

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::adapter::config::{field_error, wrong_type};
use crate::adapter::lowering::Lowering;
use crate::adapter::{AdapterError, SiteId, SiteKind, Weight};

/// Suffix of the tensor with the rows.
pub(super) const SUFFIX: &str = "token_adapter.trainable_tokens_delta";
const FIELD: &str = "trainable_token_indices";

/// Puts the rows into embeddings and heads. Rows of an embedding that shares its weight with the head replace the
/// head's rows too. Returns the sites.
pub(super) fn lower(lowering: &mut Lowering<'_>) -> Result<Vec<SiteId>, AdapterError> {
    let mut wanted = wanted(lowering)?;
    let head = lowering.tied_head();
    let source = lowering.embeddings().into_iter().find(|id| wanted.contains_key(id));
    let own_head = head.filter(|head| wanted.contains_key(head) && lowering.has(*head, SUFFIX));
    if let (Some(head), Some(_), None) = (head, source, own_head) {
        // PEFT saves no rows for a head that follows the embedding.
        wanted.remove(&head);
    }
    for id in lowering.unread_sites() {
        if lowering.has(id, SUFFIX) && !wanted.contains_key(&id) {
            return Err(lowering.refuse(id, SUFFIX, format!("`{FIELD}` does not name its module")));
        }
    }
    let mut sites: Vec<SiteId> = wanted.keys().copied().collect();
    for (id, tokens) in wanted {
        let (tokens, rows) = take_rows(lowering, id, &tokens)?;
        if Some(id) == source
            && own_head.is_none()
            && let Some(head) = head
        {
            put(lowering, head, (tokens.clone(), rows.clone()))?;
            sites.push(head);
        }
        put(lowering, id, (tokens, rows))?;
    }
    Ok(sites)
}

/// The config's lists by site. A plain list means the input embedding; names match any ending of a path.
fn wanted(lowering: &Lowering<'_>) -> Result<BTreeMap<SiteId, Vec<u32>>, AdapterError> {
    let mut wanted = BTreeMap::new();
    match lowering.config.get(FIELD) {
        None => {}
        Some(Value::Array(items)) if items.is_empty() => {}
        Some(list @ Value::Array(_)) => {
            let tokens = token_ids(list)?;
            wanted.extend(lowering.embeddings().into_iter().map(|id| (id, tokens.clone())));
        }
        Some(Value::Object(lists)) => {
            for (name, list) in lists {
                let tokens = token_ids(list)?;
                let before = wanted.len();
                let named = lowering.base.sites().iter().filter(|(_, site)| site.path.ends_with(name.as_str()));
                for (id, site) in named {
                    if matches!(site.kind, SiteKind::Norm { .. }) || wanted.insert(id, tokens.clone()).is_some() {
                        return Err(field_error(FIELD, format!("`{name}` means `{}`", site.path)));
                    }
                }
                if wanted.len() == before {
                    return Err(field_error(FIELD, format!("`{name}` matches no module of the base model")));
                }
            }
        }
        Some(value) => return Err(wrong_type(FIELD, "a list or an object of lists", value)),
    }
    Ok(wanted)
}

fn token_ids(list: &Value) -> Result<Vec<u32>, AdapterError> {
    let items = list.as_array().ok_or_else(|| wrong_type(FIELD, "a list of token ids", list))?;
    let id = |item: &Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
    items.iter().map(|item| id(item).ok_or_else(|| wrong_type(FIELD, "a token id", item))).collect()
}

/// The rows and their tokens in ascending order.
fn take_rows(lowering: &mut Lowering<'_>, id: SiteId, tokens: &[u32]) -> Result<(Vec<u32>, Tensor), AdapterError> {
    let (vocab, dim) = match lowering.site(id).kind {
        SiteKind::Linear { in_features, out_features, .. } => (out_features, in_features),
        SiteKind::Embedding { vocab, dim } => (vocab, dim),
        SiteKind::Norm { dim, .. } => (dim, 1),
    };
    if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab) {
        return Err(field_error(FIELD, format!("token id {token} is not below {vocab}, the rows of the base model")));
    }
    let mut order: Vec<u32> = (0..tokens.len() as u32).collect();
    order.sort_by_key(|idx| tokens[*idx as usize]);
    let sorted: Vec<u32> = order.iter().map(|idx| tokens[*idx as usize]).collect();
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(field_error(FIELD, format!("token id {} occurs twice", pair[0])));
    }
    let rows = lowering.require(id, SUFFIX, &[tokens.len(), dim])?;
    let count = order.len();
    let rows = rows.index_select(&Tensor::from_vec(order, count, &Device::Cpu)?, 0)?;
    Ok((sorted, rows))
}

fn put(lowering: &mut Lowering<'_>, id: SiteId, rows: (Vec<u32>, Tensor)) -> Result<(), AdapterError> {
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
            FIELD,
            format!("`{path}` is replaced as a whole as well, which together is not served"),
        ));
    }
    Ok(())
}
