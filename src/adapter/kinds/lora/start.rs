//! Files of initialisations that subtract something from the base weight before training. What they subtract follows
//! from the base weight, so a file that was not converted is served with it as a second low-rank term:
//! `W' = W - U U^T W + s B A`.
//! - PiSSA: U are the first r left singular vectors; `s B0 A0` is the best approximation of rank r.
//! - OLoRA: U is an orthonormal basis of the first r columns, and `U U^T W = Q_r R_r`; PEFT subtracts s times that.
//!
//! Only `U U^T W` counts, so the signs of singular vectors, which differ between solvers, do not (PEFT 0.21
//! `tuners/lora/layer.py`, `pissa_init` and `olora_init`).

use candle_core::{Device, Result, Tensor};
use serde_json::Value;

/// Which initialisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// Principal singular vectors.
    Pissa,
    /// The first columns, made orthonormal.
    Olora,
}

/// More directions than are wanted make the iteration converge sooner.
const EXTRA: usize = 16;
const ITERATIONS_MAX: usize = 300;
/// The iteration ends when no direction moves by more than this, relative to the largest singular value squared. That is
/// what f32 resolves.
const RESIDUAL: f64 = 3e-6;
/// With more than this the directions are not told apart well enough to serve.
const RESIDUAL_MAX: f64 = 1e-3;

/// Why a file of an initialisation that changes the base weight is refused, and what to do.
pub(super) fn unknown_reason(init: &Value) -> &'static str {
    match init.as_str() {
        Some("loftq") => {
            "trains beside a quantised copy of the base weight, which the file does not hold; merge it with PEFT on that \
             base (`merge_and_unload`) and serve the merged model"
        }
        Some(init) if init.starts_with("pissa_niter_") => {
            "subtracts a decomposition that was made with random numbers from the base weight; save it with PEFT's \
             `path_initial_model_for_weight_conversion`, which gives a plain LoRA"
        }
        Some("corda" | "lora_ga") => {
            "subtracts what it found with training data from the base weight, which the file does not hold; save it with \
             PEFT's `path_initial_model_for_weight_conversion`, which gives a plain LoRA"
        }
        _ => {
            "is unknown and may train on a changed base weight; if it does, save the file with PEFT's \
             `path_initial_model_for_weight_conversion`, else set the field to true"
        }
    }
}

impl Start {
    /// What is subtracted from `weight` (out, in), as b: (out, r) and a: (r, in), with `r <= min(out, in)`; `scale` is that
    /// of the adapter. All f32. `None` when the weight does not determine it.
    pub(super) fn subtracted(self, weight: &Tensor, r: usize, scale: f64) -> Result<Option<(Tensor, Tensor)>> {
        let (basis, factor) = match self {
            Self::Pissa => (principal(weight, r)?, 1.0),
            Self::Olora => (orthonormal(columns(&weight.narrow(1, 0, r)?)?), scale),
        };
        let Some(basis) = basis else { return Ok(None) };
        let u = from_columns(&basis)?; // [out, r]
        let a = u.t()?.contiguous()?.matmul(weight)?;
        Ok(Some(((u * factor)?, a)))
    }
}

/// The first r left singular vectors, by subspace iteration with Rayleigh and Ritz's projection.
fn principal(weight: &Tensor, r: usize) -> Result<Option<Vec<Vec<f64>>>> {
    let (outputs, inputs) = weight.dims2()?;
    let k = (2 * r + EXTRA).min(outputs).min(inputs);
    let transposed = weight.t()?.contiguous()?;
    // Any start will do that is not orthogonal to what is sought; a fixed one gives the same adapter every time.
    let start: Vec<f32> = (0..outputs * k).map(|idx| ((idx * idx + 7 * idx + 1) as f64 * 0.618).sin() as f32).collect();
    let mut directions = Tensor::from_vec(start, (outputs, k), &Device::Cpu)?;
    let mut last = None;
    for _ in 0..ITERATIONS_MAX {
        let Some(basis) = orthonormal(columns(&directions)?) else { return Ok(None) };
        let basis = from_columns(&basis)?; // [out, k]
        directions = weight.matmul(&transposed.matmul(&basis)?)?; // [out, k]
        let small = basis.t()?.contiguous()?.matmul(&directions)?; // [k, k]
        let (values, vectors) = eigen(&small.to_vec2::<f32>()?);
        let rotation = from_columns(&vectors[..r])?; // [k, r]
        let best = columns(&basis.matmul(&rotation)?)?;
        let images = columns(&directions.matmul(&rotation)?)?;
        let most = values[0].max(f64::MIN_POSITIVE);
        let residual = best.iter().zip(&images).zip(&values).map(|((u, image), value)| {
            u.iter().zip(image).map(|(u, image)| (image - value * u).powi(2)).sum::<f64>().sqrt() / most
        });
        let residual = residual.fold(0.0, f64::max);
        last = Some((best, residual));
        if residual < RESIDUAL {
            break;
        }
    }
    Ok(last.filter(|(_, residual)| *residual < RESIDUAL_MAX).map(|(best, _)| best))
}

/// The columns of a matrix.
fn columns(matrix: &Tensor) -> Result<Vec<Vec<f64>>> {
    let rows = matrix.t()?.contiguous()?.to_vec2::<f32>()?;
    Ok(rows.into_iter().map(|row| row.into_iter().map(f64::from).collect()).collect())
}

/// The matrix with these columns, f32.
fn from_columns(columns: &[Vec<f64>]) -> Result<Tensor> {
    let rows: Vec<Vec<f32>> = columns.iter().map(|column| column.iter().map(|value| *value as f32).collect()).collect();
    Tensor::new(rows, &Device::Cpu)?.t()?.contiguous()
}

/// Gram and Schmidt's procedure, twice over for accuracy; `None` when the columns depend on each other.
fn orthonormal(mut columns: Vec<Vec<f64>>) -> Option<Vec<Vec<f64>>> {
    /// Less than this is left of a column that depends on those before.
    const LEFT_MIN: f64 = 1e-7;
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    for idx in 0..columns.len() {
        let (done, rest) = columns.split_at_mut(idx);
        let column = &mut rest[0];
        let before = dot(column, column).sqrt();
        for _ in 0..2 {
            for other in &*done {
                let along = dot(column, other);
                column.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
            }
        }
        let left = dot(column, column).sqrt();
        if left <= LEFT_MIN * before || left == 0.0 {
            return None;
        }
        column.iter_mut().for_each(|x| *x /= left);
    }
    Some(columns)
}

/// Eigenvalues in descending order and their eigenvectors, by Jacobi's rotations. Reads the upper half only.
fn eigen(symmetric: &[Vec<f32>]) -> (Vec<f64>, Vec<Vec<f64>>) {
    const SWEEPS_MAX: usize = 30;
    let n = symmetric.len();
    let entry = |i: usize, j: usize| f64::from(symmetric[i.min(j)][i.max(j)]);
    let mut a: Vec<Vec<f64>> = (0..n).map(|i| (0..n).map(|j| entry(i, j)).collect()).collect();
    // Rows of v become the eigenvectors.
    let mut v: Vec<Vec<f64>> = (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    for _ in 0..SWEEPS_MAX {
        let squares = |diagonal: bool| -> f64 {
            (0..n)
                .flat_map(|i| (0..n).map(move |j| (i, j)))
                .filter(|(i, j)| (i == j) == diagonal)
                .map(|(i, j)| a[i][j].powi(2))
                .sum()
        };
        if squares(false) <= 1e-24 * squares(true) {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                rotate(&mut a, &mut v, (p, q));
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|x, y| a[*y][*y].total_cmp(&a[*x][*x]));
    order.into_iter().map(|idx| (a[idx][idx], v[idx].clone())).unzip()
}

/// Makes `a[p][q]` zero by a rotation of rows and columns p and q, which `v` follows.
fn rotate(a: &mut [Vec<f64>], v: &mut [Vec<f64>], (p, q): (usize, usize)) {
    if a[p][q] == 0.0 {
        return;
    }
    let theta = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
    let t = theta.signum() / (theta.abs() + theta.hypot(1.0));
    let t = if theta == 0.0 { 1.0 } else { t };
    let c = 1.0 / t.hypot(1.0);
    let s = t * c;
    for row in a.iter_mut() {
        (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
    }
    for rows in [a, v] {
        let (upper, lower) = rows.split_at_mut(q);
        for (x, y) in upper[p].iter_mut().zip(&mut lower[0]) {
            (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::fake_base::{close, random};

    /// A weight (12, 9) with singular values 9, 8, ..., 1.
    fn weight() -> (Tensor, Vec<Vec<f64>>, Vec<Vec<f64>>) {
        let u = orthonormal(columns(&random(1, (12, 9))).unwrap()).unwrap();
        let v = orthonormal(columns(&random(2, (9, 9))).unwrap()).unwrap();
        let scaled: Vec<Vec<f64>> =
            u.iter().enumerate().map(|(k, u)| u.iter().map(|x| x * (9 - k) as f64).collect()).collect();
        let w = from_columns(&scaled).unwrap().matmul(&from_columns(&v).unwrap().t().unwrap()).unwrap();
        (w, scaled, v)
    }

    #[test]
    fn the_principal_part_is_the_best_approximation() {
        let (w, u, v) = weight();
        for w in [w.clone(), w.t().unwrap().contiguous().unwrap()] {
            let (b, a) = Start::Pissa.subtracted(&w, 3, 0.5).unwrap().unwrap();
            let best = from_columns(&u[..3]).unwrap().matmul(&from_columns(&v[..3]).unwrap().t().unwrap()).unwrap();
            let best = if w.dims() == best.dims() { best } else { best.t().unwrap().contiguous().unwrap() };
            assert!(close(&b.matmul(&a).unwrap(), &best, 1e-5));
        }
    }

    #[test]
    fn many_directions_are_told_apart() {
        let w = random(3, (90, 70));
        let (b, a) = Start::Pissa.subtracted(&w, 2, 1.0).unwrap().unwrap();
        let rest = (&w - b.matmul(&a).unwrap()).unwrap();
        // What is left is orthogonal to what was taken.
        let product = b.t().unwrap().contiguous().unwrap().matmul(&rest).unwrap();
        assert!(close(&product, &product.zeros_like().unwrap(), 1e-4));
    }

    #[test]
    fn the_first_columns_vanish_at_scale_one() {
        let w = random(4, (10, 7));
        let (b, a) = Start::Olora.subtracted(&w, 3, 1.0).unwrap().unwrap();
        let rest = (&w - b.matmul(&a).unwrap()).unwrap().narrow(1, 0, 3).unwrap();
        assert!(close(&rest, &rest.zeros_like().unwrap(), 1e-6));
        let dependent = Tensor::cat(&[&w, &w], 1).unwrap().narrow(1, 5, 7).unwrap().contiguous().unwrap();
        assert!(Start::Olora.subtracted(&dependent, 2, 1.0).unwrap().is_some());
        assert!(Start::Olora.subtracted(&w.zeros_like().unwrap(), 2, 1.0).unwrap().is_none());
    }
}
