//! FRoD: the weight is written in a basis that all layers of a category share, and scaled and rotated there (PEFT 0.21
//! `tuners/frod`),
//!
//! ```text
//! W' = U (S + diag(lambda)) V^T          U: the columns of W V^-T at unit length, S: sparse
//! ```
//!
//! V and the places of S are in the file, one for each category (the last two components of the path); U is computed
//! again from W.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, linalg};

/// The row of the table of kinds.
pub(super) const FROD: Kind = Kind {
    peft_type: "FROD",
    title: "FRoD",
    served_as: "own dense weight",
    merged_as: "U (S + diag(lambda)) V^T",
    suffixes: &[LAMBDA, VALUES],
    pairs: &[(LAMBDA, VALUES)],
    integers: &[PLACES, SIZE],
    shared: &[BASIS, PLACES, SIZE],
    fields: &[
        ("save_projection", Rule::Read),
        ("bias", Rule::Read),
        ("frod_dropout", Rule::Ignored),
        ("init_weights", Rule::Ignored),
        ("progressbar", Rule::Ignored),
        ("projection_prng_key", Rule::Ignored),
        ("regularization_alpha", Rule::Ignored),
        ("runtime_offload_base_weight", Rule::Ignored),
        ("sparse_rate", Rule::Ignored),
    ],
    check,
    lower,
    ..Kind::PLAIN
};

const LAMBDA: &str = "frod_lambda_l";
const VALUES: &str = "frod_lambda_s_values";
const BASIS: &str = "base_model.frod_V";
const PLACES: &str = "base_model.frod_s_indices";
const SIZE: &str = "base_model.frod_s_size";
/// Columns of `W V^-T` that are shorter count as zero, as in PEFT.
const NORM_MIN: f64 = 1e-12;

/// What the layers of a category share.
struct Basis {
    /// `V^T`, row-major (in, in).
    transposed: Vec<f64>,
    /// `V^-T`, (in, in), f64.
    inverse: Tensor,
    /// Rows, then columns, of the entries of S.
    places: Vec<usize>,
}

fn check(config: &Config) -> Result<(), AdapterError> {
    if config.get("save_projection").is_some() && !config.flag("save_projection")? {
        let reason =
            "the basis is not in the file and depends on all layers at once; save it with `save_projection` true";
        return Err(field_error("save_projection", reason));
    }
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let mut bases: HashMap<String, Basis> = HashMap::new();
    for AdaptedLinear { id, in_features, .. } in adapted::linears(lowering)? {
        let category = category(&lowering.site(id).path);
        if !bases.contains_key(&category) {
            bases.insert(category.clone(), basis(lowering, &category, in_features)?);
        }
        let basis = &bases[&category];
        if basis.inverse.dims() != [in_features, in_features] {
            let reason = format!("its category `{category}` has linears with different inputs");
            return Err(lowering.refuse(id, LAMBDA, reason));
        }
        let lambda = linalg::values(&lowering.require(id, LAMBDA, &[in_features])?)?;
        let nnz = basis.places.len() / 2;
        let values = match nnz {
            0 => Vec::new(),
            _ => linalg::values(&lowering.require(id, VALUES, &[nnz])?)?,
        };
        let scaled = basis.scaled(&lambda, &values)?;
        let reason = "the weight is rebuilt in another basis, which has full rank";
        lowering.serve_own(id, reason, |weight| {
            let coordinates = weight.to_dtype(DType::F64)?.matmul(&basis.inverse)?; // [out, in]
            let norms = linalg::values(&coordinates.sqr()?.sum(0)?.sqrt()?)?;
            let scale = norms.iter().map(|norm| if *norm > NORM_MIN { 1.0 / norm } else { 0.0 }).collect();
            let scale = Tensor::from_vec(scale, in_features, &Device::Cpu)?;
            let u = coordinates.broadcast_mul(&scale)?;
            Ok(u.matmul(&scaled)?.to_dtype(DType::F32)?)
        })?;
    }
    Ok(())
}

impl Basis {
    /// `(S + diag(lambda)) V^T`, (in, in) f64; entries of S at one place add up.
    fn scaled(&self, lambda: &[f64], values: &[f64]) -> Result<Tensor, AdapterError> {
        let n = lambda.len();
        let mut scaled = vec![0.0; n * n];
        let (rows, columns) = self.places.split_at(values.len());
        let diagonal = lambda.iter().enumerate().map(|(at, value)| (at, at, value));
        let entries = rows.iter().zip(columns).zip(values).map(|((row, column), value)| (*row, *column, value));
        for (row, column, value) in diagonal.chain(entries) {
            let from = &self.transposed[column * n..][..n];
            scaled[row * n..][..n].iter_mut().zip(from).for_each(|(sum, v)| *sum += value * v);
        }
        Ok(linalg::matrix(scaled, (n, n))?)
    }
}

/// The name under which PEFT shares a basis: the last two components of the path, without layer numbers.
fn category(path: &str) -> String {
    let parts: Vec<&str> = path.split('.').collect();
    match parts.as_slice() {
        [.., number, last] if number.bytes().all(|byte| byte.is_ascii_digit()) => (*last).to_owned(),
        [.., "attention", "output", "dense"] => "attention_output".to_owned(),
        [.., second, last] => format!("{second}_{last}"),
        _ => path.to_owned(),
    }
}

fn basis(lowering: &mut Lowering<'_>, category: &str, n: usize) -> Result<Basis, AdapterError> {
    let name = |part: &str| format!("{part}.{category}");
    let v = lowering.require_shared(&name(BASIS), &[n, n])?.to_dtype(DType::F64)?;
    let size = lowering.require_shared_indexes(&name(SIZE), (&[2], usize::MAX))?;
    if size != [n, n] {
        return Err(lowering.refuse_shared(&name(SIZE), format!("expected [{n}, {n}], found {size:?}")));
    }
    let nnz = match lowering.shared_shape(&name(PLACES)) {
        Some([2, nnz]) => *nnz,
        Some(found) => {
            let reason = format!("expected shape [2, entries], found {found:?}");
            return Err(lowering.refuse_shared(&name(PLACES), reason));
        }
        None => return Err(lowering.refuse_shared(&name(PLACES), "is missing")),
    };
    let places = lowering.require_shared_indexes(&name(PLACES), (&[2, nnz], n))?;
    let transposed = v.t()?.contiguous()?;
    let inverse = linalg::inverse(&transposed)?;
    let inverse = inverse.ok_or_else(|| lowering.refuse_shared(&name(BASIS), "has no inverse"))?;
    Ok(Basis { transposed: linalg::values(&transposed)?, inverse, places })
}
