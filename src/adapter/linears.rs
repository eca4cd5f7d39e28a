//! What most kinds have in common: whole tensors that replace the base's, then one set of tensors per adapted linear.

use super::lowering::Lowering;
use super::matching::Matcher;
use super::{AdapterError, SiteId, SiteKind, replace};

/// A linear that an adapter changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinearSite {
    /// Where it stands.
    pub(super) id: SiteId,
    /// Length of its input.
    pub(super) inputs: usize,
    /// Length of its output.
    pub(super) outputs: usize,
}

/// Applies `modules_to_save`, `bias` and saved base layers, then answers with the linears that have tensors of the
/// kind, in forward order. `target_modules` must name each of them, unless it is unset.
pub(super) fn adapted_linears(lowering: &mut Lowering<'_>) -> Result<Vec<LinearSite>, AdapterError> {
    replace::saved_modules(lowering, None)?;
    replace::biases(lowering)?;
    replace::base_layers(lowering)?;
    let matcher = Matcher::parse(&lowering.config, "target_modules")?;
    let targets = lowering.targets(&matcher, |kind| matches!(kind, SiteKind::Linear { .. }))?;
    let mut linears = Vec::new();
    for id in lowering.unread_sites() {
        let Some(suffix) = lowering.kind_suffixes(id).first().map(|suffix| (*suffix).to_owned()) else { continue };
        if !targets.contains(&id) && !matcher.is_unset() {
            return Err(lowering.refuse(id, &suffix, "`target_modules` does not name its module"));
        }
        match lowering.site(id).kind {
            SiteKind::Linear { in_features: inputs, out_features: outputs, .. } => {
                linears.push(LinearSite { id, inputs, outputs });
            }
            SiteKind::Norm { .. } | SiteKind::Embedding { .. } => {
                let noun = lowering.site(id).kind.noun();
                return Err(lowering.refuse(id, &suffix, format!("expected a linear, found {noun}")));
            }
        }
    }
    Ok(linears)
}
