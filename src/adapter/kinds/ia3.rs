//! IA3: one learned vector per linear multiplies its output, bias included, or, for feed-forward modules, its input
//! (PEFT 0.21 `tuners/ia3`).
//! - vector (out, 1): `y = l * (W x + b)`
//! - vector (1, in): `y = W (l * x) + b`

use super::Kind;
use crate::adapter::config::{Config, Rule};
use crate::adapter::linears::{LinearSite, adapted_linears};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::{Matcher, any_ending};
use crate::adapter::{AdapterError, Pre, Scale};

/// The row of the table of kinds.
pub(super) const IA3: Kind = Kind {
    peft_type: "IA3",
    title: "IA3",
    served_as: "diagonal output scale, or diagonal input transform (feed-forward modules)",
    merged_as: "diag(l) W, or W diag(l) (feed-forward modules)",
    suffixes: &[SUFFIX],
    fields: &[("feedforward_modules", Rule::Read), ("init_ia3_weights", Rule::Ignored)],
    check,
    lower,
    ..Kind::PLAIN
};

const SUFFIX: &str = "ia3_l";
const FEEDFORWARD: &str = "feedforward_modules";

fn check(config: &Config) -> Result<(), AdapterError> {
    any_ending(config, FEEDFORWARD)?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let feedforward = any_ending(&lowering.config, FEEDFORWARD)?;
    for LinearSite { id, inputs, outputs } in adapted_linears(lowering)? {
        let is_input = feedforward.matches(&lowering.site(id).path)?;
        let expected = if is_input { [1, inputs] } else { [outputs, 1] };
        let found = lowering.shape(id, SUFFIX).unwrap_or_default();
        if found != expected {
            let side = if is_input { "names its module" } else { "does not name its module" };
            let reason = format!("expected shape {expected:?}, because `{FEEDFORWARD}` {side}, found {found:?}");
            return Err(lowering.refuse(id, SUFFIX, reason));
        }
        let vector = lowering.require(id, SUFFIX, &expected)?.flatten_all()?;
        let bias = lowering.bias(id)?;
        let slots = lowering.out.linears.entry(id).or_default();
        if is_input {
            slots.pre = Pre::Diag(vector);
        } else {
            slots.c = bias.map(|bias| bias * &vector).transpose()?;
            slots.scale = Scale::Diag(vector);
        }
    }
    Ok(())
}
