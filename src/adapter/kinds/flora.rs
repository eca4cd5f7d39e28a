//! FLoRA with a Tucker core: two factors and a small core between them (Si et al., arXiv 2405.14739). PEFT has no such
//! type; the names of the tensors are Patchbay's.
//!
//! ```text
//! W' = W + s A G B^T        A: (out, r1), G: (r1, r2), B: (in, r2)
//! ```
//!
//! The core is folded into the side that leaves the smaller rank.

use super::Kind;
use crate::adapter::AdapterError;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;

/// The row of the table of kinds.
pub(super) const FLORA: Kind = Kind {
    peft_type: "FLORA",
    title: "FLoRA (Tucker core)",
    served_as: "low-rank delta of rank min(r1, r2)",
    merged_as: "W + s A G B^T",
    suffixes: &[A, G, B],
    pairs: &[(A, G), (G, B)],
    fields: &[("r1", Rule::Read), ("r2", Rule::Read), ("scale", Rule::Read), ("init_weights", Rule::Ignored)],
    rank: |suffix, shape| match (suffix, shape) {
        (G, [r1, r2]) => Some(*r1.min(r2)),
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

const A: &str = "flora_A";
const G: &str = "flora_G";
const B: &str = "flora_B";

fn check(config: &Config) -> Result<(), AdapterError> {
    options(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

/// Both ranks, 8 unless the config says otherwise, and the scale, 1 likewise.
fn options(config: &Config) -> Result<(usize, usize, f64), AdapterError> {
    const DEFAULT_R: usize = 8;
    let r1 = config.positive("r1")?.unwrap_or(DEFAULT_R);
    let r2 = config.positive("r2")?.unwrap_or(DEFAULT_R);
    Ok((r1, r2, config.number("scale")?.unwrap_or(1.0)))
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let (r1, r2, scale) = options(&lowering.config)?;
    for AdaptedLinear { id, in_features, out_features } in adapted::linears(lowering)? {
        let a = (lowering.require(id, A, &[out_features, r1])? * scale)?;
        let core = lowering.require(id, G, &[r1, r2])?;
        let b = lowering.require(id, B, &[in_features, r2])?.t()?.contiguous()?; // [r2, in]
        lowering.ranks.insert(r1.min(r2));
        let (down, up) = if r1 <= r2 { (core.matmul(&b)?, a) } else { (b, a.matmul(&core)?) };
        lowering.add_low_rank(id, down, up)?;
    }
    Ok(())
}
