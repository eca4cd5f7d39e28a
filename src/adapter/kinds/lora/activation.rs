//! Activated LoRA: the adapter sleeps until the last occurrence of its invocation tokens in the prompt, and acts on every
//! token from the first of them on, generated ones included (PEFT 0.21 `tuners/lora/variants.py`). Tokens before it are the
//! base's in every respect, so that their keys and values can be shared with the base.

use crate::adapter::config::{Config, field_error, wrong_type};
use crate::adapter::lowering::Lowering;
use crate::adapter::{AdapterError, SiteKind, Weight};

/// The field with the tokens.
pub(super) const FIELD: &str = "alora_invocation_tokens";

/// The tokens; none where the adapter always acts.
pub(super) fn parse(config: &Config) -> Result<Vec<u32>, AdapterError> {
    let Some(value) = config.get(FIELD) else { return Ok(Vec::new()) };
    let items = value.as_array().ok_or_else(|| wrong_type(FIELD, "a list of token ids", value))?;
    let id = |item: &serde_json::Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
    let tokens: Vec<u32> = items
        .iter()
        .map(|item| id(item).ok_or_else(|| wrong_type(FIELD, "a token id", item)))
        .collect::<Result<_, _>>()?;
    if !tokens.is_empty() && config.flag("use_dora")? {
        return Err(field_error(FIELD, "PEFT does not combine it with `use_dora`"));
    }
    Ok(tokens)
}

/// Puts the tokens into the result, and refuses what would act on the tokens before them as well.
pub(super) fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let tokens = parse(&lowering.config)?;
    if tokens.is_empty() {
        return Ok(());
    }
    let vocab = lowering.embeddings().first().map(|id| match lowering.site(*id).kind {
        SiteKind::Embedding { vocab, .. } => vocab,
        SiteKind::Linear { .. } | SiteKind::Norm { .. } => unreachable!("the site is an embedding"),
    });
    if let Some(token) = tokens.iter().find(|token| vocab.is_some_and(|vocab| **token as usize >= vocab)) {
        return Err(field_error(FIELD, format!("token id {token} is not in the base model's vocabulary")));
    }
    let out = &lowering.out;
    let replaced = out.linears.iter().find(|(_, slots)| {
        // A bias of the adapter's own comes with a delta, anything else from fields that replace as a whole.
        slots.rows.is_some() || matches!(slots.weight, Weight::Own(_)) || slots.deltas.is_empty()
    });
    let everywhere = replaced.map(|(id, _)| id).or_else(|| out.norms.keys().chain(out.embeddings.keys()).next());
    let bias = lowering.config.string("bias")?.is_some_and(|bias| bias != "none");
    match everywhere {
        Some(id) => {
            let path = &lowering.site(*id).path;
            Err(field_error(FIELD, format!("`{path}` would change before the invocation too, which is not served")))
        }
        None if bias => {
            Err(field_error(FIELD, "`bias` would change tokens before the invocation too, which is not served"))
        }
        None => {
            lowering.out.invocation_tokens = tokens;
            Ok(())
        }
    }
}
