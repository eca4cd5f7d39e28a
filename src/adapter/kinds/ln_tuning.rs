//! LN tuning: norms with parameters of the adapter's own, which replace the base's (PEFT 0.21 `tuners/ln_tuning`).

use super::Kind;
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, NormOverride, SiteKind, replace};

/// The row of the table of kinds.
pub(super) const LN_TUNING: Kind = Kind {
    peft_type: "LN_TUNING",
    title: "LN tuning",
    served_as: "replaced norms",
    merged_as: "W; norms stay apart",
    suffixes: &[WEIGHT, SHIFT],
    lower,
    ..Kind::PLAIN
};

const WEIGHT: &str = "ln_tuning_layers.weight";
const SHIFT: &str = "ln_tuning_layers.bias";

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    replace::saved_modules(lowering, None)?;
    let matcher = Matcher::parse(&lowering.config, "target_modules")?;
    let targets = lowering.targets(&matcher, |kind| matches!(kind, SiteKind::Norm { .. }))?;
    for id in lowering.unread_sites() {
        let Some(suffix) = lowering.kind_suffixes(id).first().map(|suffix| (*suffix).to_owned()) else { continue };
        if !targets.contains(&id) && !matcher.is_unset() {
            return Err(lowering.refuse(id, &suffix, "`target_modules` does not name its module"));
        }
        let kind = lowering.site(id).kind;
        let SiteKind::Norm { dim, bias } = kind else {
            return Err(lowering.refuse(id, &suffix, format!("expected a norm, found {}", kind.noun())));
        };
        let weight = Some(lowering.require(id, WEIGHT, &[dim])?);
        let shift = if bias { Some(lowering.require(id, SHIFT, &[dim])?) } else { None };
        lowering.out.norms.insert(id, NormOverride { weight, shift });
    }
    Ok(())
}
