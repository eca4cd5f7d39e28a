//! GLoRA: five small terms, each of a form of its own (PEFT 0.21 `tuners/glora`),
//!
//! ```text
//! W' = W + W * A + B          b' = b + b * D + E + W C          (C, D, E only where the base has a bias)
//! ```
//!
//! A and B are low-rank products, one value for each output, one value, or absent. With one value for each output or one
//! in all, A is an output scale and B a rank-one term; a low-rank A multiplies W elementwise and needs an own weight.

use candle_core::{Device, Tensor};

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, Delta, Scale, SiteId, SiteKind};

/// The row of the table of kinds.
pub(super) const GLORA: Kind = Kind {
    peft_type: "GLORA",
    title: "GLoRA",
    served_as: "diagonal output scale, rank-one delta and replaced bias; own dense weight where A is low-rank",
    merged_as: "W + W * A + B, elementwise",
    suffixes: &[
        "glora_A.Xd",
        "glora_A.Xu",
        "glora_A.X",
        "glora_A.zeros",
        "glora_B.Xd",
        "glora_B.Xu",
        "glora_B.X",
        "glora_B.zeros",
        "glora_C.Xd",
        "glora_C.Xu",
        "glora_C.X",
        "glora_C.zeros",
        "glora_D.X",
        "glora_D.zeros",
        "glora_E.X",
        "glora_E.zeros",
    ],
    pairs: &[("glora_A.Xd", "glora_A.Xu"), ("glora_B.Xd", "glora_B.Xu"), ("glora_C.Xd", "glora_C.Xu")],
    fields: &[
        ("r", Rule::Read),
        ("config_A_B", Rule::Read),
        ("config_C", Rule::Read),
        ("config_D_E", Rule::Read),
        ("bias", Rule::Read),
        ("init_weights", Rule::Ignored),
    ],
    rank: |suffix, shape| match (suffix, shape) {
        ("glora_A.Xd" | "glora_B.Xd" | "glora_C.Xd", [_, r]) | ("glora_A.Xu" | "glora_B.Xu" | "glora_C.Xu", [r, _]) => {
            Some(*r)
        }
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

/// PEFT's default of `r`.
const DEFAULT_R: usize = 8;
/// Below this a scale cannot stand before the additive term, which would have to be divided by it.
const SCALE_MIN: f32 = 1e-3;

/// How a term is parametrised.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Lora,
    Vector,
    Constant,
    Absent,
}

/// Forms of A and B, of C, of D and E.
struct Forms {
    ab: Form,
    c: Form,
    de: Form,
}

impl Forms {
    fn parse(config: &Config) -> Result<Self, AdapterError> {
        let form = |field: &'static str, default: &'static str, allowed: &[(&str, Form)]| {
            let name = config.string(field)?.unwrap_or(default);
            let found = allowed.iter().find(|(known, _)| *known == name).map(|(_, form)| *form);
            found.ok_or_else(|| {
                let known: Vec<&str> = allowed.iter().map(|(known, _)| *known).collect();
                field_error(field, format!("expected one of {}, found `{name}`", known.join(", ")))
            })
        };
        let [lora, vector] = [("lora", Form::Lora), ("vector", Form::Vector)];
        let [constant, none] = [("constant", Form::Constant), ("none", Form::Absent)];
        Ok(Self {
            ab: form("config_A_B", "lora", &[lora, vector, constant, none])?,
            c: form("config_C", "lora", &[lora, vector, none])?,
            de: form("config_D_E", "constant", &[vector, constant, none])?,
        })
    }
}

fn check(config: &Config) -> Result<(), AdapterError> {
    config.positive("r")?;
    Forms::parse(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let r = lowering.config.positive("r")?.unwrap_or(DEFAULT_R);
    let mut forms = Forms::parse(&lowering.config)?;
    for AdaptedLinear { id, in_features, out_features } in adapted::linears(lowering)? {
        let full = [out_features, in_features];
        let scale = term(lowering, (id, 'A', forms.ab), &full, r)?;
        let added = term(lowering, (id, 'B', forms.ab), &full, r)?;
        let has_bias = matches!(lowering.site(id).kind, SiteKind::Linear { bias: true, .. });
        if !has_bias {
            (forms.c, forms.de) = (Form::Absent, Form::Absent);
        }
        let column = term(lowering, (id, 'C', forms.c), &[in_features, 1], r)?;
        let factor = term(lowering, (id, 'D', forms.de), &[out_features], r)?;
        let shift = term(lowering, (id, 'E', forms.de), &[out_features], r)?;
        if let Some(bias) = lowering.bias(id)?.filter(|_| has_bias) {
            let mut c = bias.clone();
            if let (Some(factor), Some(shift)) = (factor, shift) {
                c = ((c + bias.broadcast_mul(&factor)?)?.broadcast_add(&shift))?;
            }
            if let Some(column) = column {
                c = (c + lowering.weight(id)?.matmul(&column)?.squeeze(1)?)?;
            }
            lowering.out.linears.entry(id).or_default().c = Some(c);
        }
        lowering.out.linears.entry(id).or_default();
        if let (Some(scale), Some(added)) = (scale, added) {
            weight(lowering, id, &scale, &added)?;
        }
        forms = Forms::parse(&lowering.config)?;
    }
    Ok(())
}

/// The value of a term: low-rank ones as the full matrix, the others as stored. `None` when it is absent; then the file
/// may hold a buffer of zeros of the full shape.
fn term(
    lowering: &mut Lowering<'_>,
    (id, letter, form): (SiteId, char, Form),
    full: &[usize],
    r: usize,
) -> Result<Option<Tensor>, AdapterError> {
    let suffix = |name: &str| format!("glora_{letter}.{name}");
    match form {
        Form::Lora => {
            let down = lowering.require(id, &suffix("Xd"), &[full[0], r])?;
            let up = lowering.require(id, &suffix("Xu"), &[r, full[1]])?;
            lowering.ranks.insert(r);
            Ok(Some(down.matmul(&up)?))
        }
        // C, D and E are vectors already; a vector for A or B has one value for each output.
        Form::Vector if full.len() == 1 => lowering.require(id, &suffix("X"), full).map(Some),
        Form::Vector => lowering.require(id, &suffix("X"), &[full[0], 1]).map(Some),
        Form::Constant => lowering.require(id, &suffix("X"), &[1]).map(Some),
        Form::Absent => {
            let zeros = suffix("zeros");
            let refused = |lowering: &Lowering<'_>| lowering.refuse(id, &zeros, "expected zeros");
            let error = refused(lowering);
            match lowering.take(id, &zeros, full)? {
                Some(buffer) if buffer.abs()?.max_all()?.to_scalar::<f32>()? != 0.0 => Err(error),
                _ => Ok(None),
            }
        }
    }
}

/// `W' = W + W * scale + added`; both are (out, in), (out, 1) or (1).
fn weight(lowering: &mut Lowering<'_>, id: SiteId, scale: &Tensor, added: &Tensor) -> Result<(), AdapterError> {
    let (in_features, out_features) = match lowering.site(id).kind {
        SiteKind::Linear { in_features, out_features, .. } => (in_features, out_features),
        SiteKind::Norm { .. } | SiteKind::Embedding { .. } => return Ok(()),
    };
    let is_full = scale.dims() == [out_features, in_features];
    let least = (scale + 1.0)?.abs()?.min_all()?.to_scalar::<f32>()?;
    if is_full || least < SCALE_MIN {
        let reason = if is_full {
            "the weight is multiplied elementwise, which has full rank"
        } else {
            "an output scale is too small to stand before the additive term"
        };
        return lowering
            .serve_own(id, reason, |weight| Ok((&weight + weight.broadcast_mul(scale)?)?.broadcast_add(added)?));
    }
    let scale = (scale.flatten_all()? + 1.0)?.broadcast_as(out_features)?.contiguous()?;
    let b = added.flatten_all()?.broadcast_div(&scale)?.reshape((out_features, 1))?;
    let slots = lowering.out.linears.entry(id).or_default();
    slots.scale = Scale::Diag(scale);
    slots.deltas.push(Delta::LowRank { a: Tensor::ones((1, in_features), b.dtype(), &Device::Cpu)?, b });
    Ok(())
}
