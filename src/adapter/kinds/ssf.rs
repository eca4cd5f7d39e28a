//! SSF: the output of a module is scaled and shifted per feature, `y = ssf_scale * module(x) + ssf_shift`, where
//! `module(x)` includes the module's own bias. The method is from "Scaling & Shifting Your Features" (NeurIPS 2022);
//! the file format for decoder models is described in `docs/adapters.md`.

use candle_core::{D, Tensor};

use super::Kind;
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, Scale, SiteId, SiteKind, replace};

/// The row of the table of kinds.
pub(super) const SSF: Kind = Kind {
    peft_type: "SSF",
    title: "SSF",
    served_as: "diagonal output scale and a replaced bias; norms and embeddings scaled and shifted",
    merged_as: "diag(scale) W",
    suffixes: &[SCALE, SHIFT],
    fields: &[
        ("ssf_version", Rule::Read),
        ("norm_modules", Rule::Read),
        ("embedding_modules", Rule::Read),
        ("use_scale", Rule::Read),
        ("use_shift", Rule::Read),
        ("init_weights", Rule::Ignored),
    ],
    check,
    lower,
    ..Kind::PLAIN
};

const SCALE: &str = "ssf_scale";
const SHIFT: &str = "ssf_shift";
/// Scales beyond these are probably a mistake.
const SCALE_RANGE: std::ops::RangeInclusive<f32> = 1e-3..=10.0;

fn check(config: &Config) -> Result<(), AdapterError> {
    let version = config.positive("ssf_version")?.unwrap_or(1);
    if version != 1 {
        return Err(field_error("ssf_version", format!("expected 1, found {version}")));
    }
    for (field, _) in LISTS {
        Matcher::parse(config, field)?;
    }
    Ok(())
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    replace::saved_modules(lowering, None)?;
    let mut odd_scales = Vec::new();
    let mut targets = Vec::new();
    for (field, fits) in LISTS {
        let matcher = Matcher::parse(&lowering.config, field)?;
        targets.extend(lowering.targets(&matcher, fits)?);
    }
    for id in lowering.unread_sites() {
        if let Some(suffix) = lowering.kind_suffixes(id).first().filter(|_| !targets.contains(&id)) {
            let reason = format!("no list of the config names its module, which is {}", lowering.site(id).kind.noun());
            return Err(lowering.refuse(id, suffix, reason));
        }
    }
    for id in targets {
        let (scale, shift) = take(lowering, id)?;
        if let Some(scale) = &scale
            && scale.to_vec1::<f32>()?.iter().any(|value| !SCALE_RANGE.contains(&value.abs()))
        {
            odd_scales.push(lowering.site(id).path.as_str());
        }
        warn_if_normalised_away(lowering, id, scale.as_ref())?;
        apply(lowering, id, scale, shift)?;
    }
    if let Some(first) = odd_scales.first() {
        let (count, least, most) = (odd_scales.len(), SCALE_RANGE.start(), SCALE_RANGE.end());
        let warning = format!("{count} modules have scales below {least} or above {most}; the first is `{first}`");
        lowering.warnings.push(warning);
    }
    Ok(())
}

/// Whether a list may name what stands at a site.
type Fits = fn(&SiteKind) -> bool;

/// The config's three lists of modules, and what each may name.
const LISTS: [(&str, Fits); 3] = [
    ("target_modules", |kind| matches!(kind, SiteKind::Linear { .. })),
    ("norm_modules", |kind| matches!(kind, SiteKind::Norm { .. })),
    ("embedding_modules", |kind| matches!(kind, SiteKind::Embedding { .. })),
];

/// Scale and shift of a module; what the config leaves out is absent.
type ScaleShift = (Option<Tensor>, Option<Tensor>);

/// Reads scale and shift; `use_scale` and `use_shift` say which of them there must be.
fn take(lowering: &mut Lowering<'_>, id: SiteId) -> Result<ScaleShift, AdapterError> {
    let features = match lowering.site(id).kind {
        SiteKind::Linear { out_features, .. } => out_features,
        SiteKind::Norm { dim, .. } | SiteKind::Embedding { dim, .. } => dim,
    };
    let mut vector = |suffix: &str, switch: &str| {
        let wanted = lowering.config.get(switch).is_none() || lowering.config.flag(switch)?;
        match (wanted, lowering.has(id, suffix)) {
            (true, true) => lowering.require(id, suffix, &[features]).map(Some),
            (true, false) => Err(lowering.refuse(id, suffix, format!("is missing, but `{switch}` is true"))),
            (false, true) => Err(lowering.refuse(id, suffix, format!("is in the file, but `{switch}` is false"))),
            (false, false) => Ok(None),
        }
    };
    Ok((vector(SCALE, "use_scale")?, vector(SHIFT, "use_shift")?))
}

/// One scale for all features of q or k has no effect when a norm follows.
fn warn_if_normalised_away(
    lowering: &mut Lowering<'_>,
    id: SiteId,
    scale: Option<&Tensor>,
) -> Result<(), AdapterError> {
    let path = &lowering.site(id).path;
    let norm = path.strip_suffix("q_proj").map(|parent| format!("{parent}q_norm"));
    let norm = norm.or_else(|| path.strip_suffix("k_proj").map(|parent| format!("{parent}k_norm")));
    if let (Some(scale), Some(norm)) = (scale, norm)
        && lowering.base.sites().find(&norm).is_some()
        && scale.max(D::Minus1)?.to_scalar::<f32>()? == scale.min(D::Minus1)?.to_scalar::<f32>()?
    {
        lowering.warnings.push(format!("the scale of `{path}` is uniform, and `{norm}` removes it"));
    }
    Ok(())
}

/// `y = scale * (module(x)) + shift`: the bias of a linear or norm is scaled too.
fn apply(
    lowering: &mut Lowering<'_>,
    id: SiteId,
    scale: Option<Tensor>,
    shift: Option<Tensor>,
) -> Result<(), AdapterError> {
    match lowering.site(id).kind {
        SiteKind::Linear { .. } => {
            let c = affine(lowering.base.bias(id)?, scale.as_ref(), shift)?;
            let slots = lowering.out.linears.entry(id).or_default();
            slots.c = c;
            slots.scale = scale.map_or(Scale::One, Scale::Diag);
        }
        SiteKind::Norm { .. } => {
            let weight = scale.as_ref().map(|scale| lowering.base.weight(id)? * scale).transpose()?;
            let shift = affine(lowering.base.bias(id)?, scale.as_ref(), shift)?;
            let norm = lowering.out.norms.entry(id).or_default();
            (norm.weight, norm.shift) = (weight, shift);
        }
        SiteKind::Embedding { .. } => {
            let patch = lowering.out.embeddings.entry(id).or_default();
            (patch.scale, patch.shift) = (scale, shift);
        }
    }
    Ok(())
}

/// `scale * bias + shift`; absent parts are neutral.
fn affine(bias: Option<Tensor>, scale: Option<&Tensor>, shift: Option<Tensor>) -> Result<Option<Tensor>, AdapterError> {
    let scaled = match (bias, scale) {
        (Some(bias), Some(scale)) => Some((bias * scale)?),
        (bias, _) => bias,
    };
    Ok(match (scaled, shift) {
        (Some(scaled), Some(shift)) => Some((scaled + shift)?),
        (scaled, shift) => scaled.or(shift),
    })
}
