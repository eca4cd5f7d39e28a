//! C3A: a block-circulant matrix is added (PEFT 0.21 `tuners/c3a`). With blocks of length b, for output block m and input
//! block n,
//!
//! ```text
//! W'[m b + t, n b + j] = W[m b + t, n b + j] + kernel[m, n, (j - t) mod b] / in
//! ```

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, as_positive};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::{Matcher, Patterns};
use crate::adapter::{AdapterError, Delta};

/// The row of the table of kinds.
pub(super) const C3A: Kind = Kind {
    peft_type: "C3A",
    title: "C3A",
    served_as: "block-circulant delta, or an own dense weight where the blocks are very short or long",
    merged_as: "W + a block-circulant matrix",
    suffixes: &[KERNEL],
    fields: &[
        ("block_size", Rule::Read),
        ("block_size_pattern", Rule::Read),
        ("bias", Rule::Read),
        ("init_weights", Rule::Ignored),
    ],
    check,
    lower,
    ..Kind::PLAIN
};

const KERNEL: &str = "c3a_kernel";
/// PEFT's default of `block_size`.
const DEFAULT_BLOCK: usize = 256;

/// Expressions here need a component before them.
fn patterns(config: &Config) -> Result<Patterns, AdapterError> {
    Patterns::parse_as(config, "block_size_pattern", |key| format!(r"\A(?:.*\.{key}\z)"))
}

fn check(config: &Config) -> Result<(), AdapterError> {
    config.positive("block_size")?;
    patterns(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let default = lowering.config.positive("block_size")?.unwrap_or(DEFAULT_BLOCK);
    let patterns = patterns(&lowering.config)?;
    for AdaptedLinear { id, in_features, out_features } in adapted::linears(lowering)? {
        let path = &lowering.site(id).path;
        let b = patterns.get(path)?.map_or(Ok(default), |value| as_positive("block_size_pattern", value))?;
        if in_features % b != 0 || out_features % b != 0 {
            let reason =
                format!("blocks of {b} (`block_size`) divide {in_features} inputs or {out_features} outputs not");
            return Err(lowering.refuse(id, KERNEL, reason));
        }
        let kernel = (lowering.require(id, KERNEL, &[out_features / b, in_features / b, b])? / in_features as f64)?;
        // Two multiplications for each number of the kernel, and a transform of every block of inputs and outputs.
        let cost = 2 * (in_features * out_features / b) + b * (in_features + out_features);
        lowering.add_delta(
            id,
            Delta::Circulant { kernel },
            (cost, "blocks of this length cost more than a dense weight"),
        )?;
    }
    Ok(())
}
