//! `trainable_token_indices`: complete new rows for some tokens, in the order of the config's list. Despite its name
//! `trainable_tokens_delta` holds the rows themselves (PEFT 0.21 `tuners/trainable_tokens`).

use std::collections::BTreeMap;

use serde_json::Value;

use crate::adapter::config::{field_error, wrong_type};
use crate::adapter::lowering::Lowering;
use crate::adapter::token_rows::{put, take_rows, token_ids};
use crate::adapter::{AdapterError, SiteId, SiteKind};

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
        let (tokens, rows) = take_rows(lowering, id, (FIELD, SUFFIX), &tokens)?;
        if Some(id) == source
            && own_head.is_none()
            && let Some(head) = head
        {
            put(lowering, FIELD, head, (tokens.clone(), rows.clone()))?;
            sites.push(head);
        }
        put(lowering, FIELD, id, (tokens, rows))?;
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
            let tokens = token_ids(FIELD, list)?;
            wanted.extend(lowering.embeddings().into_iter().map(|id| (id, tokens.clone())));
        }
        Some(Value::Object(lists)) => {
            for (name, list) in lists {
                let tokens = token_ids(FIELD, list)?;
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
