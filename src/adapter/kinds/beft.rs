//! BEFT: one learned vector per linear is added to its output, `y = W x + b + v` (PEFT 0.21 `tuners/beft`).

use super::Kind;
use crate::adapter::AdapterError;
use crate::adapter::config::Rule;
use crate::adapter::linears::{LinearSite, adapted_linears};
use crate::adapter::lowering::Lowering;

/// The row of the table of kinds.
pub(super) const BEFT: Kind = Kind {
    peft_type: "BEFT",
    title: "BEFT",
    served_as: "replaced bias",
    merged_as: "W; the bias stays apart",
    suffixes: &[SUFFIX],
    fields: &[("init_weights", Rule::Ignored)],
    lower,
    ..Kind::PLAIN
};

const SUFFIX: &str = "beft_bias";

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    for LinearSite { id, outputs, .. } in adapted_linears(lowering)? {
        let shift = lowering.require(id, SUFFIX, &[1, outputs])?.flatten_all()?;
        let c = match lowering.bias(id)? {
            Some(bias) => (bias + shift)?,
            None => shift,
        };
        lowering.out.linears.entry(id).or_default().c = Some(c);
    }
    Ok(())
}
