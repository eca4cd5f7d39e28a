//! Eigenvalues of a symmetric matrix and eigenvectors of a part of them: Householder tridiagonalisation, QL steps with
//! implicit shifts for the values, inverse iteration for the vectors (Golub and Van Loan, "Matrix Computations", 8.3 and
//! 8.4). Only the vectors that are asked for are computed and turned back.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::tridiagonal::Tridiagonal;
use super::{dot, matrix, reflect, reflector, values};

/// Columns of the Gram matrix that are computed at once.
const GRAM_COLUMNS: usize = 256;
/// Vectors that are turned back together, so that each reflector is read once for all.
const TURNED_TOGETHER: usize = 8;

/// Eigenvalues of `m^T m` in ascending order, and the eigenvectors of those in `which` as the columns of an f64 matrix
/// (n, which). m: (any, n). Vectors of equal eigenvalues are some orthonormal basis of what belongs to them.
pub(in crate::adapter) fn gram_eigen(m: &Tensor, which: Range<usize>) -> Result<(Vec<f64>, Tensor)> {
    let (_, n) = m.dims2()?;
    let mut rows = Vec::with_capacity(n);
    for first in (0..n).step_by(GRAM_COLUMNS) {
        let end = n.min(first + GRAM_COLUMNS);
        let lower = m.narrow(1, first, end - first)?.t()?.matmul(&m.narrow(1, 0, end)?)?; // [columns, end]
        rows.extend(values(&lower)?.chunks_exact(end).map(<[f64]>::to_vec));
    }
    let count = which.len();
    let (values, vectors) = symmetric_eigen(rows, which);
    let columns = (0..n * count).map(|at| vectors[at % count][at / count]).collect();
    Ok((values, matrix(columns, (n, count))?))
}

/// Eigenvalues in ascending order and the eigenvectors of those in `which`, as rows. Of each row of the symmetric matrix
/// what is left of the diagonal is read, and the diagonal.
pub(super) fn symmetric_eigen(mut rows: Vec<Vec<f64>>, which: Range<usize>) -> (Vec<f64>, Vec<Vec<f64>>) {
    let (tridiagonal, reflectors) = tridiagonalise(&mut rows);
    drop(rows);
    let values = tridiagonal.eigenvalues();
    let mut vectors = tridiagonal.eigenvectors(&values, which);
    vectors.par_chunks_mut(TURNED_TOGETHER).for_each(|vectors| {
        for (k, (v, beta)) in reflectors.iter().enumerate().rev() {
            vectors.iter_mut().for_each(|vector| reflect(v, *beta, &mut vector[k + 1..]));
        }
    });
    (values, vectors)
}

/// `T = Q^T A Q`, and the reflectors whose product `Q` is; the k-th one begins at row `k + 1`.
///
/// What a reflector does to the rest of A, `A - v w^T - w v^T`, is done when the next one is multiplied with A, so that A
/// is read once for each.
fn tridiagonalise(a: &mut [Vec<f64>]) -> (Tridiagonal, Vec<(Vec<f64>, f64)>) {
    let n = a.len();
    let (mut diagonal, mut off) = (Vec::with_capacity(n), Vec::with_capacity(n));
    let (mut v, mut w) = (vec![0.0; n], vec![0.0; n]);
    let mut reflectors = Vec::with_capacity(n);
    for k in 0..n {
        for (at, row) in a.iter_mut().enumerate().skip(k) {
            row[k] -= v[at] * w[k] + w[at] * v[k];
        }
        diagonal.push(a[k][k]);
        let rest = k + 1;
        if rest == n {
            break;
        }
        let column: Vec<f64> = a[rest..].iter().map(|row| row[k]).collect();
        let (x, beta) = reflector(&column);
        off.push(column[0] - beta * dot(&x, &column) * x[0]);
        let mut y = vec![0.0; n - rest];
        for (at, row) in a[rest..].iter_mut().enumerate() {
            let row = &mut row[rest..=rest + at];
            let (v_at, w_at, x_at) = (v[rest + at], w[rest + at], x[at]);
            for (((value, v), w), y) in row.iter_mut().zip(&v[rest..]).zip(&w[rest..]).zip(&mut y) {
                *value -= v_at * w + w_at * v;
                *y += x_at * *value;
            }
            y[at] += dot(&row[..at], &x[..at]);
        }
        y.iter_mut().for_each(|y| *y *= beta);
        let half = 0.5 * beta * dot(&y, &x);
        v[rest..].copy_from_slice(&x);
        w[rest..].iter_mut().zip(&y).zip(&x).for_each(|((w, y), x)| *w = y - half * x);
        reflectors.push((x, beta));
    }
    (Tridiagonal { diagonal, off }, reflectors)
}
