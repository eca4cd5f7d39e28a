//! The modules that a file of tensors per module adapts: what kinds of this sort do first, and alike.

use super::lowering::Lowering;
use super::matching::Matcher;
use super::{AdapterError, SiteId, SiteKind, replace};

/// A linear with tensors of the kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct AdaptedLinear {
    /// Where it stands.
    pub(super) id: SiteId,
    /// Length of its input.
    pub(super) in_features: usize,
    /// Length of its output.
    pub(super) out_features: usize,
}

/// Applies what replaces tensors as a whole (`modules_to_save`, `bias`, base layers), then finds the modules that have
/// tensors of this kind, in forward order. `target_modules` must name each, unless it is absent; each must satisfy
/// `fits`, and what it names must have tensors.
pub(super) fn sites(
    lowering: &mut Lowering<'_>,
    fits: impl Fn(&SiteKind) -> bool,
) -> Result<Vec<SiteId>, AdapterError> {
    replace::saved_modules(lowering, None)?;
    replace::biases(lowering)?;
    replace::base_layers(lowering)?;
    let matcher = Matcher::parse(&lowering.config, "target_modules")?;
    let targets = lowering.targets(&matcher, &fits)?;
    let mut adapted = Vec::new();
    for id in lowering.unread_sites() {
        let Some(suffix) = lowering.kind_suffixes(id).first().map(|suffix| (*suffix).to_owned()) else { continue };
        if !targets.contains(&id) && !matcher.is_unset() {
            return Err(lowering.refuse(id, &suffix, "`target_modules` does not name its module"));
        }
        let site = lowering.site(id);
        if !fits(&site.kind) {
            let reason = format!("its module `{}` is {}", site.path, site.kind.noun());
            return Err(lowering.refuse(id, &suffix, reason));
        }
        adapted.push(id);
    }
    Ok(adapted)
}

/// As [`sites`], for kinds that adapt linears only.
pub(super) fn linears(lowering: &mut Lowering<'_>) -> Result<Vec<AdaptedLinear>, AdapterError> {
    let ids = sites(lowering, |kind| matches!(kind, SiteKind::Linear { .. }))?;
    let linear = |id: SiteId| match lowering.site(id).kind {
        SiteKind::Linear { in_features, out_features, .. } => Some(AdaptedLinear { id, in_features, out_features }),
        SiteKind::Norm { .. } | SiteKind::Embedding { .. } => None,
    };
    Ok(ids.into_iter().filter_map(linear).collect())
}
