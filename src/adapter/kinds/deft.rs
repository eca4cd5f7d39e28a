//! DEFT, and PaRa as its variant: a subspace of the output is removed and something else put in its place (PEFT 0.21
//! `tuners/deft`),
//!
//! ```text
//! W' = W - Q right^T W + s Q R        relu: Q = P, right = relu(P);  qr: Q = right = orthonormal columns of P
//! ```
//!
//! with `s = alpha / r`, or 1 without alpha; `para` leaves the last term out. It adds the low-rank term
//! `Q (s R - right^T W)`.

use candle_core::{DType, Tensor};

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, linalg};

/// The row of the table of kinds.
pub(super) const DEFT: Kind = Kind {
    peft_type: "DEFT",
    title: "DEFT, PaRa",
    served_as: "low-rank delta made with W",
    merged_as: "W - Q right^T W + s Q R",
    suffixes: &[P, R],
    fields: &[
        ("r", Rule::Read),
        ("alpha", Rule::Read),
        ("decomposition_method", Rule::Read),
        ("para", Rule::Read),
        ("bias", Rule::Read),
        ("deft_dropout", Rule::Ignored),
        ("init_scale", Rule::Ignored),
        ("init_weights", Rule::Ignored),
    ],
    rank: |suffix, shape| match (suffix, shape) {
        (P, [_, r]) | (R, [r, _]) => Some(*r),
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

const P: &str = "deft_P";
const R: &str = "deft_R";
/// PEFT's default of `r`.
const DEFAULT_R: usize = 8;

/// How the projector is made from P.
#[derive(Clone, Copy)]
enum Method {
    Relu,
    Qr,
}

fn method(config: &Config) -> Result<Method, AdapterError> {
    let field = "decomposition_method";
    match config.string(field)? {
        None | Some("relu") => Ok(Method::Relu),
        Some("qr") => Ok(Method::Qr),
        Some(other) => Err(field_error(field, format!("expected `relu` or `qr`, found `{other}`"))),
    }
}

fn check(config: &Config) -> Result<(), AdapterError> {
    config.positive("r")?;
    config.number("alpha")?;
    config.flag("para")?;
    method(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let config_r = lowering.config.positive("r")?.unwrap_or(DEFAULT_R);
    let alpha = lowering.config.number("alpha")?.filter(|alpha| *alpha != 0.0);
    let (para, method) = (lowering.config.flag("para")?, method(&lowering.config)?);
    for AdaptedLinear { id, in_features, out_features } in adapted::linears(lowering)? {
        let r = config_r.min(out_features);
        lowering.ranks.insert(r);
        let p = lowering.require(id, P, &[out_features, r])?;
        let injected = match (para, lowering.has(id, R)) {
            (true, true) => return Err(lowering.refuse(id, R, "is in the file, but `para` is true")),
            (true, false) => None,
            (false, _) => Some(lowering.require(id, R, &[r, in_features])?),
        };
        let (q, right) = match method {
            Method::Relu => (p.clone(), p.relu()?),
            Method::Qr => {
                let q = linalg::householder_q(&p)?.to_dtype(DType::F32)?;
                (q.clone(), q)
            }
        };
        let removed: Tensor = right.t()?.matmul(&lowering.weight(id)?)?; // [r, in]
        let a = match injected {
            Some(injected) => ((injected * alpha.map_or(1.0, |alpha| alpha / r as f64))? - removed)?,
            None => removed.neg()?,
        };
        lowering.add_low_rank(id, a, q)?;
    }
    Ok(())
}
