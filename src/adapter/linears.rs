//! What most kinds have in common: whole tensors that replace the base's, then one set of tensors per adapted linear.

use super::lowering::Lowering;
use super::matching::Matcher;
use super::{AdapterError, Delta, SiteId, SiteKind, Weight, replace};
use candle_core::Tensor;

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

/// Why a linear has a weight of its own.
const DENSE: &str = "have a dense weight of their own, which costs less than the rank of their delta";
/// Why it has none.
const NO_ROOM: &str =
    "keep a delta that costs more than a dense weight, for which adapters.merged_bytes_max has no room";

/// Adds a delta of rank `rank` to a linear in the form that costs less per token: as the factors a: (rank, in) and
/// b: (out, rank), or, when these have more elements than the weight, as a dense weight `W + delta` of the adapter's
/// own if the budget has room. Only the form that is chosen is computed.
pub(super) fn add_delta(
    lowering: &mut Lowering<'_>,
    LinearSite { id, inputs, outputs }: LinearSite,
    rank: usize,
    factors: impl FnOnce() -> candle_core::Result<(Tensor, Tensor)>,
    dense: impl FnOnce() -> candle_core::Result<Tensor>,
) -> Result<(), AdapterError> {
    if rank.saturating_mul(inputs + outputs) > inputs * outputs {
        let fits = lowering.try_reserve_own(inputs * outputs);
        *lowering.paths.entry(if fits { DENSE } else { NO_ROOM }).or_default() += 1;
        if fits {
            let own = lowering.own(&(lowering.weight(id)? + dense()?)?)?;
            lowering.out.linears.entry(id).or_default().weight = Weight::Own(own);
            return Ok(());
        }
    }
    let (a, b) = factors()?;
    lowering.out.linears.entry(id).or_default().deltas.push(Delta::LowRank { a, b });
    Ok(())
}

/// [`add_delta`] for a delta that is known by its factors.
pub(super) fn add_factors(
    lowering: &mut Lowering<'_>,
    linear: LinearSite,
    (a, b): (&Tensor, &Tensor),
) -> Result<(), AdapterError> {
    add_delta(lowering, linear, a.dim(0)?, || Ok((a.clone(), b.clone())), || b.matmul(a))
}
