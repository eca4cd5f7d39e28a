//! HRA: the input goes through a chain of Householder reflections (PEFT 0.21 `tuners/hra`),
//!
//! ```text
//! W' = W (I - 2 u_0 u_0^T) (I - 2 u_1 u_1^T) ...      columns u_k of unit length
//! ```
//!
//! The chain is `I - U T U^T` with T upper triangular (the compact form of products of reflections), so it adds the
//! low-rank term `-(W U T) U^T`. With `apply_GS` the columns are made orthonormal first and T is 2 I.

use candle_core::{DType, Tensor};

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, Delta, linalg};

/// The row of the table of kinds.
pub(super) const HRA: Kind = Kind {
    peft_type: "HRA",
    title: "HRA",
    served_as: "low-rank delta made with W",
    merged_as: "W times a chain of Householder reflections",
    suffixes: &[U],
    fields: &[("r", Rule::Read), ("apply_GS", Rule::Read), ("bias", Rule::Read), ("init_weights", Rule::Ignored)],
    rank: |_, shape| (shape.len() == 2).then(|| shape[1]),
    check,
    lower,
    ..Kind::PLAIN
};

const U: &str = "hra_u";
/// PEFT's default of `r`.
const DEFAULT_R: usize = 8;

fn check(config: &Config) -> Result<(), AdapterError> {
    config.positive("r")?;
    config.flag("apply_GS")?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let r = lowering.config.positive("r")?.unwrap_or(DEFAULT_R);
    let orthogonalise = lowering.config.flag("apply_GS")?;
    for AdaptedLinear { id, in_features, .. } in adapted::linears(lowering)? {
        let u = lowering.require(id, U, &[in_features, r])?;
        let flat = linalg::values(&u)?;
        let mut columns: Vec<Vec<f64>> = (0..r).map(|k| flat[k..].iter().step_by(r).copied().collect()).collect();
        lowering.ranks.insert(r);
        if orthogonalise {
            gram_schmidt(&mut columns);
        } else {
            columns.iter_mut().for_each(|column| normalise(column));
        }
        if columns.iter().flatten().any(|value| !value.is_finite()) {
            let reason = "a column is zero, or depends on the ones before it, so it has no direction";
            return Err(lowering.refuse(id, U, reason));
        }
        let is_identity = !orthogonalise && cancel(&mut columns);
        let factor = if orthogonalise { two(columns.len()) } else { chain_factor(&columns) };
        let u = linalg::matrix(columns.concat(), (columns.len(), in_features))?; // [r, in]
        let factor = linalg::matrix(factor, (columns.len(), columns.len()))?;
        let weight = lowering.weight(id)?.to_dtype(DType::F64)?;
        let b: Tensor = weight.matmul(&u.t()?)?.matmul(&factor)?.neg()?; // [out, r]
        let (a, b) = (u.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
        if is_identity {
            let delta = Delta::LowRank { a, b: b.zeros_like()? };
            lowering.out.linears.entry(id).or_default().deltas.push(delta);
        } else {
            lowering.add_low_rank(id, a, b)?;
        }
    }
    Ok(())
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn normalise(column: &mut [f64]) {
    let norm = dot(column, column).sqrt();
    column.iter_mut().for_each(|value| *value /= norm);
}

/// Each column loses its part along the ones before it, one after the other, and gets unit length.
fn gram_schmidt(columns: &mut [Vec<f64>]) {
    for k in 0..columns.len() {
        let (before, rest) = columns.split_at_mut(k);
        for earlier in before {
            let along = dot(earlier, &rest[0]);
            rest[0].iter_mut().zip(earlier.iter()).for_each(|(value, earlier)| *value -= along * earlier);
        }
        normalise(&mut rest[0]);
    }
}

/// Removes neighbours that are equal: reflecting twice does nothing. That is how untrained files are. Returns whether
/// all cancelled; then one column stays.
fn cancel(columns: &mut Vec<Vec<f64>>) -> bool {
    let mut kept: Vec<Vec<f64>> = Vec::with_capacity(columns.len());
    let first = columns.first().cloned();
    for column in columns.drain(..) {
        if kept.last() == Some(&column) {
            kept.pop();
        } else {
            kept.push(column);
        }
    }
    *columns = kept;
    let is_identity = columns.is_empty();
    if is_identity {
        columns.extend(first);
    }
    is_identity
}

/// T with `(I - 2 u_0 u_0^T) (I - 2 u_1 u_1^T) ... = I - U T U^T`: `T_kk = 2` and, above the diagonal,
/// `T[:k, k] = -2 T[:k, :k] U[:, :k]^T u_k`. Row-major.
fn chain_factor(columns: &[Vec<f64>]) -> Vec<f64> {
    let r = columns.len();
    let mut factor = two(r);
    for k in 1..r {
        let along: Vec<f64> = columns[..k].iter().map(|earlier| dot(earlier, &columns[k])).collect();
        for row in 0..k {
            factor[row * r + k] = -2.0 * dot(&factor[row * r..row * r + k], &along);
        }
    }
    factor
}

fn two(r: usize) -> Vec<f64> {
    (0..r * r).map(|at| if at % (r + 1) == 0 { 2.0 } else { 0.0 }).collect()
}
