//! SVFit: the largest singular values of the weight are trained (Sun et al., arXiv 2409.05926). PEFT has no such type; the
//! name of the tensor is Patchbay's. With `W = U diag(S) V^T` and new values `s'` for the r largest,
//!
//! ```text
//! W' = W + U_r diag(s' - S_r) V_r^T
//! ```
//!
//! The directions are found again from W. Each term pairs one left with one right vector, so the signs that a
//! decomposition chooses cancel; but directions whose values are almost equal cannot be told apart, and a file that
//! changes such values differently is refused.

use candle_core::{DType, Tensor};

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, linalg};

/// The row of the table of kinds.
pub(super) const SVFIT: Kind = Kind {
    peft_type: "SVFIT",
    title: "SVFit",
    served_as: "low-rank delta made with W",
    merged_as: "W with other largest singular values",
    suffixes: &[SIGMA],
    fields: &[("r", Rule::Read), ("init_weights", Rule::Ignored)],
    rank: |_, shape| (shape.len() == 1).then(|| shape[0]),
    check,
    lower,
    ..Kind::PLAIN
};

const SIGMA: &str = "svfit_sigma";
/// Relative error of a weight in f32, which whoever trained the file decomposed.
const RESOLUTION: f64 = f32::EPSILON as f64;
/// Most that an unresolved direction may change the weight by, relative to its largest singular value.
const ERROR_MAX: f64 = 1e-4;

fn check(config: &Config) -> Result<(), AdapterError> {
    config.positive("r")?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let r = lowering.config.positive("r")?;
    for AdaptedLinear { id, in_features, out_features } in adapted::linears(lowering)? {
        let found = lowering.shape(id, SIGMA).and_then(|shape| shape.first().copied()).unwrap_or_default();
        if let Some(r) = r.filter(|r| *r != found) {
            return Err(lowering.refuse(id, SIGMA, format!("expected {r} values (field `r`), found {found}")));
        }
        if found > in_features.min(out_features) {
            let reason = format!("{found} values for a weight of {out_features} outputs and {in_features} inputs");
            return Err(lowering.refuse(id, SIGMA, reason));
        }
        let sigma = linalg::values(&lowering.require(id, SIGMA, &[found])?)?;
        lowering.ranks.insert(found);
        let strongest = linalg::strongest_directions(&lowering.weight(id)?, found)?;
        let changes: Vec<f64> = sigma.iter().zip(&strongest.values).map(|(new, old)| new - old).collect();
        if let Some(reason) = unresolved(&strongest.values, &changes) {
            return Err(lowering.refuse(id, SIGMA, reason));
        }
        let scale = linalg::matrix(changes, (1, found))?;
        let (a, b) = (strongest.right, strongest.left.broadcast_mul(&scale)?);
        let to_f32 = |m: Tensor| m.contiguous()?.to_dtype(DType::F32);
        lowering.add_low_rank(id, to_f32(a)?, to_f32(b)?)?;
    }
    Ok(())
}

/// Why the directions of some values cannot be told well enough for what the file does to them. `values` are all singular
/// values in descending order, `changes` belong to the first of them.
fn unresolved(values: &[f64], changes: &[f64]) -> Option<String> {
    let most = values.first().copied().unwrap_or_default();
    let change = |k: usize| changes.get(k).copied().unwrap_or_default();
    // Below the smallest value there may be any direction of the null space.
    let next = |k: usize| values.get(k + 1).copied().unwrap_or_default();
    let faulty = (0..changes.len()).find(|k| {
        let angle = RESOLUTION * most / (values[*k] - next(*k)).max(f64::MIN_POSITIVE);
        (change(*k) - change(k + 1)).abs() * angle.min(1.0) > ERROR_MAX * most
    })?;
    Some(format!(
        "the weight's singular values {faulty} ({:e}) and {} ({:e}) are too close to tell their directions apart, and the \
         file changes them differently",
        values[faulty],
        faulty + 1,
        next(faulty)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_values_may_only_change_alike() {
        let values = [3.0, 2.0, 2.0 - 1e-9, 1.0];
        assert!(unresolved(&values, &[0.5]).is_none());
        assert!(unresolved(&values, &[0.5, 0.1, 0.1]).is_none());
        assert!(unresolved(&values, &[0.5, 0.1]).is_some_and(|reason| reason.contains("1 (2e0)")));
        assert!(unresolved(&values, &[0.5, 0.1, 0.2, 0.3]).is_some());
        assert!(unresolved(&[2.0, 0.0], &[0.0, 0.1]).is_some());
    }
}
