//! Eigenvectors of a symmetric matrix: Householder tridiagonalisation, then QL steps with implicit shifts (Golub and
//! Van Loan, "Matrix Computations", 8.3).

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{dot, matrix, reflector, values};

/// Most QL steps for one eigenvalue; two or three are usual.
const STEPS_MAX: usize = 60;

/// Eigenvalues in ascending order, and the eigenvectors as the columns of an f64 matrix (n, n). m: (n, n), symmetric.
pub(in crate::adapter) fn symmetric_eigen(m: &Tensor) -> Result<(Vec<f64>, Tensor)> {
    let (n, _) = m.dims2()?;
    let mut rows: Vec<Vec<f64>> = values(m)?.chunks_exact(n).map(<[f64]>::to_vec).collect();
    let (mut diagonal, mut off, mut vectors) = tridiagonalise(&mut rows);
    iterate(&mut diagonal, &mut off, &mut vectors);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| diagonal[*a].total_cmp(&diagonal[*b]));
    let sorted = order.iter().map(|idx| diagonal[*idx]).collect();
    let columns = (0..n * n).map(|at| vectors[order[at % n]][at / n]).collect();
    Ok((sorted, matrix(columns, (n, n))?))
}

/// Diagonal, sub-diagonal, and the rows of `Q^T` with `Q^T A Q` tridiagonal.
fn tridiagonalise(a: &mut [Vec<f64>]) -> (Vec<f64>, Vec<f64>, Vec<Vec<f64>>) {
    let n = a.len();
    let mut off = vec![0.0; n];
    let mut reflectors = Vec::with_capacity(n);
    for k in 0..n.saturating_sub(1) {
        let column: Vec<f64> = a[k + 1..].iter().map(|row| row[k]).collect();
        let (v, beta) = reflector(&column);
        off[k] = column[0] - beta * dot(&v, &column) * v[0];
        if beta != 0.0 {
            let mut w: Vec<f64> = a[k + 1..].par_iter().map(|row| beta * dot(&row[k + 1..], &v)).collect();
            let half = 0.5 * beta * dot(&w, &v);
            w.iter_mut().zip(&v).for_each(|(w, v)| *w -= half * v);
            a[k + 1..].par_iter_mut().enumerate().for_each(|(at, row)| {
                let (v_at, w_at) = (v[at], w[at]);
                for ((value, v), w) in row[k + 1..].iter_mut().zip(&v).zip(&w) {
                    *value -= v_at * w + w_at * v;
                }
            });
        }
        reflectors.push((v, beta));
    }
    let diagonal = (0..n).map(|k| a[k][k]).collect();
    let mut q: Vec<Vec<f64>> = (0..n).map(|k| (0..n).map(|at| f64::from(at == k)).collect()).collect();
    // Row i of Q^T is Q e_i: the reflectors applied to e_i, the last one first.
    q.par_iter_mut().for_each(|row| {
        for (k, (v, beta)) in reflectors.iter().enumerate().rev() {
            super::reflect(v, *beta, &mut row[k + 1..]);
        }
    });
    (diagonal, off, q)
}

/// Makes the tridiagonal matrix diagonal; the rotations are applied to pairs of rows of `vectors`.
fn iterate(d: &mut [f64], e: &mut [f64], vectors: &mut [Vec<f64>]) {
    let n = d.len();
    for low in 0..n {
        for _ in 0..STEPS_MAX {
            let small = |at: &usize| e[*at].abs() <= f64::EPSILON * (d[*at].abs() + d[at + 1].abs());
            let high = (low..n - 1).find(small).unwrap_or(n - 1);
            if high == low {
                break;
            }
            step(d, e, vectors, (low, high));
        }
    }
}

/// One implicit QL step on the block `low..=high`.
fn step(d: &mut [f64], e: &mut [f64], vectors: &mut [Vec<f64>], (low, high): (usize, usize)) {
    let delta = (d[low + 1] - d[low]) / (2.0 * e[low]);
    let root = delta.hypot(1.0);
    let mut g = d[high] - d[low] + e[low] / (delta + if delta < 0.0 { -root } else { root });
    let (mut sine, mut cosine, mut p) = (1.0, 1.0, 0.0);
    for at in (low..high).rev() {
        let (f, b) = (sine * e[at], cosine * e[at]);
        let r = f.hypot(g);
        e[at + 1] = r;
        if r == 0.0 {
            d[at + 1] -= p;
            e[high] = 0.0;
            return;
        }
        (sine, cosine) = (f / r, g / r);
        g = d[at + 1] - p;
        let r = (d[at] - g) * sine + 2.0 * cosine * b;
        p = sine * r;
        d[at + 1] = g + p;
        g = cosine * r - b;
        let (head, tail) = vectors.split_at_mut(at + 1);
        for (x, y) in head[at].iter_mut().zip(&mut tail[0]) {
            (*x, *y) = (cosine * *x - sine * *y, sine * *x + cosine * *y);
        }
    }
    d[low] -= p;
    e[low] = g;
    e[high] = 0.0;
}
