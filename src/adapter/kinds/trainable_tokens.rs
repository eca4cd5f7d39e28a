//! Trainable tokens: complete new rows for some tokens of an embedding or a head. Despite its name
//! `trainable_tokens_delta` holds the rows themselves, in the order of `token_indices` (PEFT 0.21
//! `tuners/trainable_tokens`).

use candle_core::{DType, Tensor};

use super::Kind;
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::token_rows::{put, take_rows, token_ids};
use crate::adapter::{AdapterError, SiteId, SiteKind, replace};

/// The row of the table of kinds.
pub(super) const TRAINABLE_TOKENS: Kind = Kind {
    peft_type: "TRAINABLE_TOKENS",
    title: "trainable tokens",
    served_as: "replaced rows of embeddings and heads",
    merged_as: "W; the rows stay apart",
    suffixes: &[SUFFIX],
    fields: &[(FIELD, Rule::Read), ("init_weights", Rule::Ignored)],
    check,
    lower,
    ..Kind::PLAIN
};

const SUFFIX: &str = "trainable_tokens_delta";
const FIELD: &str = "token_indices";

fn check(config: &Config) -> Result<(), AdapterError> {
    tokens(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let tokens = tokens(&lowering.config)?;
    replace::saved_modules(lowering, None)?;
    replace::base_layers(lowering)?;
    let matcher = Matcher::parse(&lowering.config, "target_modules")?;
    let mut targets = lowering.targets(&matcher, |kind| !matches!(kind, SiteKind::Norm { .. }))?;
    if matcher.is_unset() {
        targets = lowering.embeddings();
    }
    // PEFT saves the rows of a head that shares the embedding's weight a second time.
    let head = lowering.tied_head();
    let source = lowering.embeddings().into_iter().find(|id| targets.contains(id));
    let followed = if source.is_some() { head } else { None };
    for id in lowering.unread_sites() {
        if lowering.has(id, SUFFIX) && !targets.contains(&id) && followed != Some(id) {
            return Err(lowering.refuse(id, SUFFIX, "`target_modules` does not name its module"));
        }
    }
    for id in targets.into_iter().filter(|id| followed != Some(*id)) {
        let rows = take_rows(lowering, id, (FIELD, SUFFIX), &tokens)?;
        if let Some(head) = followed.filter(|_| Some(id) == source) {
            follow(lowering, head, &tokens, &rows.1)?;
            put(lowering, FIELD, head, rows.clone())?;
        }
        put(lowering, FIELD, id, rows)?;
    }
    Ok(())
}

fn tokens(config: &Config) -> Result<Vec<u32>, AdapterError> {
    let list = config.get(FIELD).ok_or_else(|| field_error(FIELD, "is missing"))?;
    let tokens = token_ids(FIELD, list)?;
    if tokens.is_empty() { Err(field_error(FIELD, "names no token")) } else { Ok(tokens) }
}

/// Takes the head's copy of the embedding's rows, if there is one; it must be equal.
fn follow(lowering: &mut Lowering<'_>, head: SiteId, tokens: &[u32], rows: &Tensor) -> Result<(), AdapterError> {
    if !lowering.has(head, SUFFIX) {
        return Ok(());
    }
    let (_, copy) = take_rows(lowering, head, (FIELD, SUFFIX), tokens)?;
    if copy.ne(rows)?.to_dtype(DType::U32)?.max_all()?.to_scalar::<u32>()? == 0 {
        return Ok(());
    }
    let reason = "differs from the rows of the embedding, which shares its weight";
    Err(lowering.refuse(head, SUFFIX, reason))
}
