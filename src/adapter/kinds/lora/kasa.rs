//! KaSA: a LoRA beside a base weight without its weakest singular directions (PEFT 0.21 `tuners/lora/variants.py`,
//! `KasaLinearVariant`). With `W_r` the part of W in its r weakest directions, r the adapter's rank,
//!
//! ```text
//! W' = W - W_r + s B diag(d) A
//! ```
//!
//! which adds two low-rank terms to W. The file does not hold `W_r`; it is found again from W.

use candle_core::Tensor;
use serde_json::Value;

use crate::adapter::config::{Config, field_error, wrong_type};
use crate::adapter::lowering::Lowering;
use crate::adapter::{AdapterError, SiteId, linalg};

/// The field that switches it on.
pub(super) const FIELD: &str = "kasa_config";
/// The tensor `d`, (r).
pub(super) const DIAG: &str = "lora_diag";

/// Whether the config asks for it. What the object holds concerns training.
pub(super) fn parse(config: &Config) -> Result<bool, AdapterError> {
    match config.get(FIELD) {
        None | Some(Value::Bool(false)) => Ok(false),
        Some(Value::Object(_)) => Ok(true),
        Some(value) => Err(wrong_type(FIELD, "an object", value)),
    }
}

/// Both terms as one pair of factors of rank 2r, from a: (r, in) and b: (out, r), which is scaled already; all f32.
pub(super) fn factors(
    lowering: &mut Lowering<'_>,
    id: SiteId,
    (a, b): (Tensor, Tensor),
) -> Result<(Tensor, Tensor), AdapterError> {
    let (r, in_features) = a.dims2()?;
    let least = in_features.min(b.dim(0)?);
    if r >= least {
        let path = &lowering.site(id).path;
        let reason =
            format!("expected a rank below {least} at `{path}`, so that a part of its weight stays; found {r}");
        return Err(field_error(FIELD, reason));
    }
    let diag = lowering.require(id, DIAG, &[r])?;
    let (weak_a, weak_b) = linalg::weakest_part(&lowering.weight(id)?, r)?;
    let a = Tensor::cat(&[a, weak_a], 0)?;
    let b = Tensor::cat(&[b.broadcast_mul(&diag)?, weak_b.neg()?], 1)?;
    Ok((a, b))
}
