//! Dense linear algebra in f64 for lowering: what candle does not have. Matrices are row-major slices.

mod eigen;
mod tridiagonal;

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

pub(super) use eigen::gram_eigen;

/// A matrix as f64 values, row-major. m: (rows, columns), any float format.
pub(super) fn values(m: &Tensor) -> Result<Vec<f64>> {
    m.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// An f64 matrix (rows, columns) from row-major values.
pub(super) fn matrix(values: Vec<f64>, shape: (usize, usize)) -> Result<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// `Q` of the reduced QR decomposition `m = Q R`, m: (rows, columns) with rows >= columns; Q: (rows, columns) f64 with
/// orthonormal columns. The signs are those of LAPACK's Householder QR, which torch uses: `R_kk` has the sign opposite
/// to that of the pivot, unless the pivot's column is zero below it.
pub(super) fn householder_q(m: &Tensor) -> Result<Tensor> {
    let (rows, columns) = m.dims2()?;
    let mut work = columns_of(&values(m)?, rows, columns);
    let mut reflectors: Vec<(Vec<f64>, f64)> = Vec::with_capacity(columns);
    for k in 0..columns {
        let (v, beta) = reflector(&work[k][k..]);
        for column in &mut work[k..] {
            reflect(&v, beta, &mut column[k..]);
        }
        reflectors.push((v, beta));
    }
    let mut q: Vec<Vec<f64>> = (0..columns).map(|k| (0..rows).map(|row| f64::from(row == k)).collect()).collect();
    for (k, (v, beta)) in reflectors.iter().enumerate().rev() {
        q.iter_mut().for_each(|column| reflect(v, *beta, &mut column[k..]));
    }
    matrix((0..rows * columns).map(|at| q[at % columns][at / columns]).collect(), (rows, columns))
}

fn columns_of(values: &[f64], rows: usize, columns: usize) -> Vec<Vec<f64>> {
    (0..columns).map(|column| (0..rows).map(|row| values[row * columns + column]).collect()).collect()
}

/// `v` and `beta` with `(I - beta v v^T) x = -sign(x_0) |x| e_0`; beta is zero when `x` has that direction already.
fn reflector(x: &[f64]) -> (Vec<f64>, f64) {
    let tail = dot(&x[1..], &x[1..]);
    let mut v = x.to_vec();
    if tail == 0.0 {
        return (v, 0.0);
    }
    let norm = (x[0] * x[0] + tail).sqrt();
    v[0] += if x[0].is_sign_negative() { -norm } else { norm };
    let beta = 2.0 / (v[0] * v[0] + tail);
    (v, beta)
}

/// `x -= beta (v . x) v`.
fn reflect(v: &[f64], beta: f64, x: &mut [f64]) {
    let scale = beta * dot(v, x);
    x.iter_mut().zip(v).for_each(|(x, v)| *x -= scale * v);
}

/// Sum of products of two equally long vectors; eight sums at a time, which do not wait for each other.
fn dot(x: &[f64], y: &[f64]) -> f64 {
    assert_eq!(x.len(), y.len());
    let (xs, ys) = (x.chunks_exact(8), y.chunks_exact(8));
    let rest: f64 = xs.remainder().iter().zip(ys.remainder()).map(|(x, y)| x * y).sum();
    let mut sums = [0.0; 8];
    for (x, y) in xs.zip(ys) {
        sums.iter_mut().zip(x.iter().zip(y)).for_each(|(sum, (x, y))| *sum += x * y);
    }
    rest + sums.iter().sum::<f64>()
}

/// The inverse of `m`, (n, n) f64, by elimination with row pivots; `None` when a pivot vanishes.
pub(super) fn inverse(m: &Tensor) -> Result<Option<Tensor>> {
    let (n, _) = m.dims2()?;
    let source = values(m)?;
    let width = 2 * n;
    let mut rows: Vec<Vec<f64>> = source
        .chunks_exact(n)
        .enumerate()
        .map(|(at, row)| row.iter().copied().chain((0..n).map(|column| f64::from(column == at))).collect())
        .collect();
    for k in 0..n {
        let pivot = (k..n).max_by(|a, b| rows[*a][k].abs().total_cmp(&rows[*b][k].abs())).unwrap_or(k);
        rows.swap(k, pivot);
        let head = rows[k][k];
        if head == 0.0 || !head.is_finite() {
            return Ok(None);
        }
        rows[k][k..width].iter_mut().for_each(|value| *value /= head);
        let pivot_row = std::mem::take(&mut rows[k]);
        rows.par_iter_mut().filter(|row| !row.is_empty()).for_each(|row| {
            let factor = row[k];
            if factor != 0.0 {
                row[k..].iter_mut().zip(&pivot_row[k..]).for_each(|(value, pivot)| *value -= factor * pivot);
            }
        });
        rows[k] = pivot_row;
    }
    Ok(Some(matrix(rows.iter().flat_map(|row| &row[n..]).copied().collect(), (n, n))?))
}

/// The strongest part of a singular value decomposition `W = left diag(values) right`, strongest first.
pub(super) struct Strongest {
    /// All singular values in descending order, as many as the smaller side of W has features.
    pub(super) values: Vec<f64>,
    /// The first left singular vectors as columns, (out, count) f64.
    pub(super) left: Tensor,
    /// The first right singular vectors as rows, (count, in) f64.
    pub(super) right: Tensor,
}

/// The `count` strongest singular directions of `weight` (out, in), from the eigenvectors of the smaller one of `W W^T` and
/// `W^T W`. The signs of a pair of vectors are arbitrary. Where a value is zero its vector on the larger side is zero too.
pub(super) fn strongest_directions(weight: &Tensor, count: usize) -> Result<Strongest> {
    let (out_features, in_features) = weight.dims2()?;
    let w = weight.to_dtype(DType::F64)?;
    let n = out_features.min(in_features);
    let tall = in_features <= out_features;
    let (eigenvalues, vectors) = gram_eigen(&if tall { w.clone() } else { w.t()? }, n - count..n)?;
    let descending: Vec<u32> = (0..count as u32).rev().collect();
    let vectors = vectors.index_select(&Tensor::new(descending, &Device::Cpu)?, 1)?; // [n, count], columns
    let values: Vec<f64> = eigenvalues.iter().rev().map(|value| value.max(0.0).sqrt()).collect();
    let inverses = values[..count].iter().map(|value| if *value > 0.0 { 1.0 / value } else { 0.0 }).collect();
    let turned = vectors.t()?.contiguous()?; // [count, n], rows
    let (left, right) = if tall {
        (w.matmul(&vectors)?.broadcast_mul(&matrix(inverses, (1, count))?)?, turned)
    } else {
        (vectors, turned.matmul(&w)?.broadcast_mul(&matrix(inverses, (count, 1))?)?)
    };
    Ok(Strongest { values, left, right })
}

/// The part of `weight` (out, in) in its `q` weakest singular directions as factors `b a`, a: (q, in), b: (out, q); f32.
/// They come from the eigenvectors of the smaller one of `W W^T` and `W^T W`; as a projection of W the product does not
/// depend on the signs that a decomposition chooses.
pub(super) fn weakest_part(weight: &Tensor, q: usize) -> Result<(Tensor, Tensor)> {
    let (out_features, in_features) = weight.dims2()?;
    let w = weight.to_dtype(DType::F64)?;
    let (a, b) = if in_features <= out_features {
        let (_, weak) = gram_eigen(&w, 0..q)?; // [in, q]
        (weak.t()?.contiguous()?, w.matmul(&weak)?)
    } else {
        let (_, weak) = gram_eigen(&w.t()?, 0..q)?; // [out, q]
        (weak.t()?.matmul(&w)?, weak)
    };
    Ok((a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::fake_base::{close, random};

    fn f64s(m: &Tensor) -> Tensor {
        m.to_dtype(DType::F64).unwrap()
    }

    fn f32s(m: &Tensor) -> Tensor {
        m.to_dtype(DType::F32).unwrap()
    }

    #[test]
    fn q_is_orthonormal_spans_the_columns_and_has_lapack_signs() {
        for (seed, shape) in [(1, (7, 3)), (2, (5, 5)), (3, (4, 1))] {
            let m = random(seed, shape);
            let q = householder_q(&m).unwrap();
            let gram = q.t().unwrap().matmul(&q).unwrap();
            let identity = Tensor::eye(shape.1, DType::F64, &Device::Cpu).unwrap();
            assert!(close(&f32s(&gram), &f32s(&identity), 1e-6));
            let r = q.t().unwrap().matmul(&f64s(&m)).unwrap();
            assert!(close(&f32s(&q.matmul(&r).unwrap()), &m, 1e-6));
            let first = m.to_vec2::<f32>().unwrap()[0][0];
            if shape.0 > 1 {
                assert_eq!(r.to_vec2::<f64>().unwrap()[0][0] > 0.0, first < 0.0);
            }
        }
    }

    #[test]
    fn the_inverse_undoes_and_singular_matrices_have_none() {
        let m = random(4, (9, 9));
        let product = inverse(&m).unwrap().unwrap().matmul(&f64s(&m)).unwrap();
        assert!(close(&f32s(&product), &Tensor::eye(9, DType::F32, &Device::Cpu).unwrap(), 1e-5));
        assert!(inverse(&Tensor::ones((3, 3), DType::F32, &Device::Cpu).unwrap()).unwrap().is_none());
    }

    #[test]
    fn eigenvectors_diagonalise_a_gram_matrix_in_ascending_order() {
        // One column; fewer rows than columns, so that most values are zero; more columns than are computed at once.
        for shape in [(3, 1), (5, 2), (4, 4), (3, 12), (40, 30), (300, 270)] {
            let m = f64s(&random(5, shape));
            let (n, gram) = (shape.1, m.t().unwrap().matmul(&m).unwrap());
            for which in [0..n, n / 3..n, 0..n / 2, n..n] {
                let (eigenvalues, vectors) = gram_eigen(&m, which.clone()).unwrap();
                assert!(eigenvalues.windows(2).all(|pair| pair[0] <= pair[1]));
                assert_eq!((eigenvalues.len(), vectors.dims()), (n, [n, which.len()].as_slice()));
                if which.is_empty() {
                    continue;
                }
                let values = Tensor::new(&eigenvalues[which.clone()], &Device::Cpu).unwrap();
                let scaled = vectors.broadcast_mul(&values).unwrap();
                let most = eigenvalues[n - 1];
                assert!(apart(&gram.matmul(&vectors).unwrap(), &scaled) <= 1e-13 * most, "{shape:?}");
                let eye = Tensor::eye(which.len(), DType::F64, &Device::Cpu).unwrap();
                assert!(apart(&vectors.t().unwrap().matmul(&vectors).unwrap(), &eye) <= 1e-9, "{shape:?}");
            }
        }
    }

    /// Eigenvalues that are equal, nearly equal, zero, or far apart, on matrices that fall into parts.
    #[test]
    fn eigenvectors_are_orthonormal_whatever_the_eigenvalues() {
        let n = 41;
        let diagonal = |value: fn(usize) -> f64| -> Vec<Vec<f64>> {
            (0..n).map(|row| (0..n).map(|column| if row == column { value(row) } else { 0.0 }).collect()).collect()
        };
        let mut chain = diagonal(|at| at.abs_diff(20) as f64);
        (1..n).for_each(|at| chain[at][at - 1] = 1.0);
        let rotated = |values: fn(usize) -> f64| -> Vec<Vec<f64>> {
            let q = householder_q(&random(8, (n, n))).unwrap();
            let values = matrix((0..n).map(values).collect(), (1, n)).unwrap();
            q.broadcast_mul(&values).unwrap().matmul(&q.t().unwrap()).unwrap().to_vec2().unwrap()
        };
        let cases = [
            diagonal(|_| 0.0),
            diagonal(|_| 1.0),
            diagonal(|at| (at / 3) as f64),
            chain,
            rotated(|at| 1.0 + (at / 4) as f64 * 1e-9),
            rotated(|at| 0.5_f64.powi(at as i32)),
        ];
        for (case, rows) in cases.into_iter().enumerate() {
            let full = |row: usize, column: usize| rows[row.max(column)][row.min(column)];
            let (values, vectors) = eigen::symmetric_eigen(rows.clone(), 0..n);
            let most = values[n - 1].max(1e-300);
            for (at, vector) in vectors.iter().enumerate() {
                for row in 0..n {
                    let product: f64 = (0..n).map(|column| full(row, column) * vector[column]).sum();
                    assert!((product - values[at] * vector[row]).abs() <= 1e-13 * most, "{case} {at}");
                }
                for (other_at, other) in vectors.iter().enumerate() {
                    let expected = f64::from(u8::from(at == other_at));
                    assert!((dot(vector, other) - expected).abs() < 1e-9, "{case} {at} {other_at}");
                }
            }
        }
    }

    /// The largest difference of two elements.
    fn apart(x: &Tensor, y: &Tensor) -> f64 {
        (x - y).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn singular_directions_give_the_matrix_and_its_weakest_part() {
        for shape in [(9, 5), (5, 9), (6, 6)] {
            let w = random(6, shape);
            let Strongest { values, left, right } = strongest_directions(&w, shape.0.min(shape.1)).unwrap();
            assert!(values.windows(2).all(|pair| pair[0] >= pair[1]));
            let n = values.len();
            let scaled = left.broadcast_mul(&matrix(values, (1, n)).unwrap()).unwrap();
            assert!(close(&f32s(&scaled.matmul(&right).unwrap()), &w, 1e-6));
            let first = strongest_directions(&w, 2).unwrap();
            let product = |left: &Tensor, right: &Tensor| {
                let part = left.narrow(1, 0, 2).unwrap().contiguous().unwrap();
                f32s(&part.matmul(&right.narrow(0, 0, 2).unwrap().contiguous().unwrap()).unwrap())
            };
            assert!(close(&product(&first.left, &first.right), &product(&left, &right), 1e-6));
            let (a, b) = weakest_part(&w, 2).unwrap();
            let last = |m: &Tensor, axis| m.narrow(axis, n - 2, 2).unwrap().contiguous().unwrap();
            let expected = last(&scaled, 1).matmul(&last(&right, 0)).unwrap();
            assert!(close(&b.matmul(&a).unwrap(), &f32s(&expected), 1e-6));
        }
    }
}
