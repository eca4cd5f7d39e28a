//! HiRA: the weight is multiplied elementwise, `W' = W * (1 + B A)` (PEFT 0.21 `tuners/hira`). There is no alpha. The
//! product has full rank, so the linear gets a weight of its own; an embedding gets a table of its own.

use candle_core::Tensor;

use super::Kind;
use crate::adapter::adapted;
use crate::adapter::config::{Config, Rule, as_positive};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::{Matcher, Patterns};
use crate::adapter::{AdapterError, SiteId, SiteKind};

/// The row of the table of kinds.
pub(super) const HIRA: Kind = Kind {
    peft_type: "HIRA",
    title: "HiRA",
    served_as: "own dense weight; embeddings from an own table",
    merged_as: "W * (1 + B A), elementwise",
    suffixes: &["hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"],
    pairs: &[("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B")],
    fields: &[
        ("r", Rule::Read),
        ("rank_pattern", Rule::Read),
        ("hira_dropout", Rule::Ignored),
        ("init_weights", Rule::Ignored),
    ],
    rank: |suffix, shape| match (suffix, shape) {
        ("hira_A" | "hira_embedding_A", [r, _]) | ("hira_B" | "hira_embedding_B", [_, r]) => Some(*r),
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

/// PEFT's default of `r`.
const DEFAULT_R: usize = 32;
const REASON: &str = "the weight is multiplied elementwise, which has full rank";

fn check(config: &Config) -> Result<(), AdapterError> {
    config.positive("r")?;
    Patterns::parse(config, "rank_pattern")?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let default_r = lowering.config.positive("r")?.unwrap_or(DEFAULT_R);
    let ranks = Patterns::parse(&lowering.config, "rank_pattern")?;
    for id in adapted::sites(lowering, |kind| !matches!(kind, SiteKind::Norm { .. }))? {
        let path = &lowering.site(id).path;
        let r = ranks.get(path)?.map_or(Ok(default_r), |value| as_positive("rank_pattern", value))?;
        // PEFT 0.21 writes `rank_pattern`, but makes every module with rank `r`.
        let names = ["hira_A", "hira_embedding_A"];
        let found = names.iter().find_map(|name| lowering.shape(id, name)).and_then(|shape| shape.first().copied());
        let r = found.filter(|found| *found == default_r).unwrap_or(r);
        lowering.ranks.insert(r);
        match lowering.site(id).kind {
            SiteKind::Linear { in_features, out_features, .. } => {
                let product = product(lowering, id, ("hira_A", "hira_B"), (r, in_features, out_features))?;
                lowering.serve_own(id, REASON, |weight| Ok((&weight + (&weight * product)?)?))?;
            }
            SiteKind::Embedding { vocab, dim } => {
                let product = product(lowering, id, ("hira_embedding_A", "hira_embedding_B"), (r, vocab, dim))?;
                lowering.serve_own_table(id, REASON, |table| Ok((&table + (&table * product.t()?)?)?))?;
            }
            SiteKind::Norm { .. } => {}
        }
    }
    Ok(())
}

/// `B A`, a: (r, inputs), b: (outputs, r).
fn product(
    lowering: &mut Lowering<'_>,
    id: SiteId,
    (name_a, name_b): (&str, &str),
    (r, inputs, outputs): (usize, usize, usize),
) -> Result<Tensor, AdapterError> {
    let a = lowering.require(id, name_a, &[r, inputs])?;
    let b = lowering.require(id, name_b, &[outputs, r])?;
    Ok(b.matmul(&a)?)
}
