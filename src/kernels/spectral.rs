//! Sparse matrices between the coefficients of two one-dimensional transforms.

use std::collections::BTreeSet;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

/// What the coefficients of inputs and outputs are.
#[derive(Clone, Debug, PartialEq)]
pub enum Basis {
    /// Those of unitary Fourier transforms: input coefficient v of N is `sum_q x[q] exp(2 pi i q v / N) / sqrt N`, and
    /// output coefficient u of M adds `exp(2 pi i t u / M) / sqrt M` times itself to output t. Real parts count.
    Fourier,
    /// Those of one level of a wavelet transform: first the low band, then the high one. Input coefficient p of a band is
    /// `sum_a f[a] x[2 p + a - cut]`, and output coefficient p adds itself times `f[a]` to output `2 p + a - cut`; what
    /// is beyond inputs and outputs is zero, and dropped.
    Wavelet {
        /// The low band's filter, of even length. The high one's is its reverse with alternating signs, the first of which
        /// is positive.
        low: Arc<[f32]>,
        /// How the inputs' coefficients lie.
        inputs: Band,
        /// How the outputs' coefficients lie.
        outputs: Band,
    },
}

/// How the coefficients of two bands lie beside what they are made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Band {
    /// Coefficients of each band.
    pub half: usize,
    /// What the filters reach before the first element.
    pub cut: usize,
}

/// `T_out^T S T_in`: S is zero but for some entries, the transforms are those of the basis.
#[derive(Clone, Copy, Debug)]
pub struct Spectral<'a> {
    /// The transforms.
    pub basis: &'a Basis,
    /// Outputs and inputs.
    pub shape: (usize, usize),
    /// Output coefficients (entries), u32.
    pub rows: &'a Tensor,
    /// Input coefficients (entries), u32.
    pub columns: &'a Tensor,
    /// Values (entries).
    pub values: &'a Tensor,
}

/// Real and imaginary parts; where the latter are missing they are zero.
type Complex = (Tensor, Option<Tensor>);

/// Which of the two transforms.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Inputs,
    Outputs,
}

impl Basis {
    /// The filters of both bands of a wavelet whose low one is `low`.
    pub(super) fn filters(low: &[f32]) -> [Vec<f32>; 2] {
        let sign = |at: usize| if at.is_multiple_of(2) { 1.0 } else { -1.0 };
        let high = low.iter().rev().enumerate().map(|(at, value)| sign(at) * value).collect();
        [low.to_vec(), high]
    }

    /// Output and input coefficients of a matrix (out, in).
    pub fn num_coefficients(&self, (out_features, in_features): (usize, usize)) -> (usize, usize) {
        match self {
            Self::Fourier => (out_features, in_features),
            Self::Wavelet { inputs, outputs, .. } => (2 * outputs.half, 2 * inputs.half),
        }
    }
}

impl Spectral<'_> {
    /// The product with rows `x` (rows, in): (rows, out) in the format of `x`. It computes in f32.
    ///
    /// # Errors
    /// When the shapes do not fit or the device fails.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        /// Products at once, which bounds the memory.
        const PRODUCTS_MAX: usize = 1 << 24;
        let rows = x.dim(0)?;
        let (re, im) = self.analyse(&x.to_dtype(DType::F32)?.contiguous()?)?;
        let zeros = Tensor::zeros((rows, self.num_coefficients().0), DType::F32, x.device())?;
        let (values, count) = (self.values.to_dtype(DType::F32)?, self.values.dim(0)?);
        let at_once = (PRODUCTS_MAX / rows.max(1)).max(1);
        let spread = |part: &Tensor| {
            (0..count).step_by(at_once).try_fold(zeros.clone(), |sums, from| {
                let piece = |t: &Tensor| t.narrow(0, from, at_once.min(count - from))?.contiguous();
                let products = part.index_select(&piece(self.columns)?, 1)?.broadcast_mul(&piece(&values)?)?;
                sums.index_add(&piece(self.rows)?, &products, 1)
            })
        };
        let coefficients = (spread(&re)?, im.map(|im| spread(&im)).transpose()?);
        self.synthesise(coefficients, Side::Outputs)?.0.to_dtype(x.dtype())
    }

    /// The matrix (out, in) in f32.
    ///
    /// # Errors
    /// When an entry has no place or the device fails.
    pub fn matrix(&self) -> Result<Tensor> {
        let all: Vec<u32> = (0..self.num_coefficients().0 as u32).collect();
        let (re, im) = self.synthesise((self.of_rows(&all)?, None), Side::Inputs)?;
        let turned = |part: Tensor| part.t()?.contiguous(); // [in, rows]
        let coefficients = (turned(re)?, im.map(turned).transpose()?);
        self.synthesise(coefficients, Side::Outputs)?.0.t()?.contiguous()
    }

    /// Factors a: (r, in), b: (out, r) in f32 whose product `b a` is the matrix. r is the number of rows or columns of S
    /// that have entries, whichever is less, and twice that where coefficients are complex.
    ///
    /// # Errors
    /// When an entry has no place or the device fails.
    pub fn factors(&self) -> Result<(Tensor, Tensor)> {
        let distinct = |ids: &Tensor| -> Result<Vec<u32>> {
            Ok(ids.to_vec1::<u32>()?.into_iter().collect::<BTreeSet<_>>().into_iter().collect())
        };
        let (rows, columns) = (distinct(self.rows)?, distinct(self.columns)?);
        let (num_rows, num_columns) = self.num_coefficients();
        let (left, right) = if rows.len() <= columns.len() {
            (one_hot(&rows, num_rows, self.values.device())?, self.of_rows(&rows)?)
        } else {
            let transposed = Self { rows: self.columns, columns: self.rows, ..*self };
            (transposed.entries(&columns, num_rows)?, one_hot(&columns, num_columns, self.values.device())?)
        };
        let (a, b) = (self.synthesise((right, None), Side::Inputs)?, self.synthesise((left, None), Side::Outputs)?);
        // Of a product of complex numbers the real part: that of the real parts less that of the others.
        let (a, b) = match (a, b) {
            ((a, Some(a_im)), (b, Some(b_im))) => (Tensor::cat(&[a, a_im], 0)?, Tensor::cat(&[b, b_im.neg()?], 0)?),
            ((a, _), (b, _)) => (a, b),
        };
        Ok((a, b.t()?.contiguous()?))
    }

    fn num_coefficients(&self) -> (usize, usize) {
        self.basis.num_coefficients(self.shape)
    }

    /// These rows of S, dense in f32.
    fn of_rows(&self, rows: &[u32]) -> Result<Tensor> {
        self.entries(rows, self.num_coefficients().1)
    }

    /// Those rows (sorted) of a matrix with `width` columns and the entries at (rows, columns), dense in f32.
    fn entries(&self, rows: &[u32], width: usize) -> Result<Tensor> {
        let mut dense = vec![0f32; rows.len() * width];
        let places = self.rows.to_vec1::<u32>()?.into_iter().zip(self.columns.to_vec1::<u32>()?);
        for ((row, column), value) in places.zip(self.values.to_dtype(DType::F32)?.to_vec1::<f32>()?) {
            if let Ok(at) = rows.binary_search(&row) {
                dense[at * width + column as usize] += value;
            }
        }
        Tensor::from_vec(dense, (rows.len(), width), self.values.device())
    }

    /// `T_in x` for rows `x` (rows, in).
    fn analyse(&self, x: &Tensor) -> Result<Complex> {
        match self.basis {
            Basis::Fourier => fourier((x.clone(), None)),
            Basis::Wavelet { low, inputs, .. } => Ok((analyse_bands(x, low, *inputs)?, None)),
        }
    }

    /// The transposed transform of one side, of rows of its coefficients.
    fn synthesise(&self, coefficients: Complex, side: Side) -> Result<Complex> {
        let (out_features, in_features) = self.shape;
        match self.basis {
            Basis::Fourier => fourier(coefficients),
            Basis::Wavelet { low, inputs, outputs } => {
                let (band, size) = if side == Side::Inputs { (inputs, in_features) } else { (outputs, out_features) };
                Ok((synthesise_bands(&coefficients.0, low, *band, size)?, None))
            }
        }
    }
}

/// Rows of zeros (ids, width) with a one each.
fn one_hot(ids: &[u32], width: usize, device: &Device) -> Result<Tensor> {
    let mut rows = vec![0f32; ids.len() * width];
    ids.iter().enumerate().for_each(|(row, id)| rows[row * width + *id as usize] = 1.0);
    Tensor::from_vec(rows, (ids.len(), width), device)
}

/// `sum_q x[q] exp(2 pi i q v / N) / sqrt N` of each row of x (rows, N), f32.
///
/// With `N = m n`, `q = q1 n + q2` and `v = v1 + m v2` it is a transform of length m over q1, a factor
/// `exp(2 pi i q2 v1 / N)`, and a transform of length n over q2: two products with small matrices.
fn fourier((re, im): Complex) -> Result<Complex> {
    let (rows, len) = re.dims2()?;
    let m = (1..=len.isqrt()).rev().find(|m| len.is_multiple_of(*m)).unwrap_or(1);
    let n = len / m;
    let device = re.device();
    let blocks = |part: &Tensor| part.reshape((rows, m, n));
    let (first_re, first_im) = waves((m, m), m, 1.0, device)?;
    let (re, im) = (blocks(&re)?, im.as_ref().map(blocks).transpose()?);
    let product = |wave: &Tensor, part: &Tensor| wave.broadcast_matmul(part);
    let (re, im) = match im {
        None => (product(&first_re, &re)?, product(&first_im, &re)?),
        Some(im) => (
            (product(&first_re, &re)? - product(&first_im, &im)?)?,
            (product(&first_re, &im)? + product(&first_im, &re)?)?,
        ),
    };
    let (turn_re, turn_im) = waves((m, n), len, 1.0, device)?;
    let turned_re = (re.broadcast_mul(&turn_re)? - im.broadcast_mul(&turn_im)?)?;
    let turned_im = (re.broadcast_mul(&turn_im)? + im.broadcast_mul(&turn_re)?)?;
    let (last_re, last_im) = waves((n, n), n, 1.0 / (len as f64).sqrt(), device)?;
    let product = |part: &Tensor, wave: &Tensor| part.reshape((rows * m, n))?.matmul(wave);
    let re = (product(&turned_re, &last_re)? - product(&turned_im, &last_im)?)?;
    let im = (product(&turned_re, &last_im)? + product(&turned_im, &last_re)?)?;
    let in_order = |part: Tensor| part.reshape((rows, m, n))?.transpose(1, 2)?.contiguous()?.reshape((rows, len));
    Ok((in_order(re)?, Some(in_order(im)?)))
}

/// `scale exp(2 pi i j k / period)` for j and k below the sizes: real and imaginary parts.
fn waves((rows, columns): (usize, usize), period: usize, scale: f64, device: &Device) -> Result<(Tensor, Tensor)> {
    let turn = |at: usize| std::f64::consts::TAU * (at / columns * (at % columns) % period) as f64 / period as f64;
    let of = |f: fn(f64) -> f64| {
        let values = (0..rows * columns).map(|at| (scale * f(turn(at))) as f32).collect();
        Tensor::from_vec(values, (rows, columns), device)
    };
    Ok((of(f64::cos)?, of(f64::sin)?))
}

/// Both bands' coefficients (rows, 2 half) of each row of x (rows, size), f32.
fn analyse_bands(x: &Tensor, low: &[f32], Band { half, cut }: Band) -> Result<Tensor> {
    let (rows, size) = x.dims2()?;
    let pairs = half + low.len() / 2;
    let pairs = x.pad_with_zeros(1, cut, 2 * pairs - cut - size)?.reshape((rows, pairs, 2))?;
    let [low, high] = Basis::filters(low).map(|filter| {
        let zeros = Tensor::zeros((rows, half), DType::F32, x.device())?;
        filter.iter().enumerate().try_fold(zeros, |sums, (tap, factor)| {
            let met = pairs.narrow(1, tap / 2, half)?.narrow(2, tap % 2, 1)?.squeeze(2)?;
            sums + (met * f64::from(*factor))?
        })
    });
    Tensor::cat(&[low?, high?], 1)
}

/// What both bands' coefficients (rows, 2 half) make of `size` elements: (rows, size), f32.
fn synthesise_bands(coefficients: &Tensor, low: &[f32], Band { half, cut }: Band, size: usize) -> Result<Tensor> {
    let rows = coefficients.dim(0)?;
    let pairs = half + low.len() / 2;
    let zeros = Tensor::zeros((rows, pairs), DType::F32, coefficients.device())?;
    let mut sums = [zeros.clone(), zeros];
    for (band, filter) in Basis::filters(low).iter().enumerate() {
        let band = coefficients.narrow(1, band * half, half)?;
        for (tap, factor) in filter.iter().enumerate() {
            let moved = band.pad_with_zeros(1, tap / 2, pairs - half - tap / 2)?;
            sums[tap % 2] = (&sums[tap % 2] + (moved * f64::from(*factor))?)?;
        }
    }
    Tensor::stack(&sums, 2)?.reshape((rows, 2 * pairs))?.narrow(1, cut, size)?.contiguous()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers below one that look random.
    fn values(len: usize, seed: u32) -> Vec<f32> {
        let next = |i: u32| ((i + seed).wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 23) as f32 - 1.0;
        (0..len as u32).map(next).collect()
    }

    /// The entry (t, q) by the definition of the basis.
    fn entry(basis: &Basis, (m, n): (usize, usize), entries: &[(usize, usize, f32)], (t, q): (usize, usize)) -> f64 {
        let filtered = |low: &[f32], band: Band, coefficient: usize, at: usize| {
            let filter = &Basis::filters(low)[coefficient / band.half];
            let tap = (at + band.cut).checked_sub(2 * (coefficient % band.half));
            tap.and_then(|tap| filter.get(tap)).map_or(0.0, |value| f64::from(*value))
        };
        let part = |(u, v, value): &(usize, usize, f32)| {
            let factor = match basis {
                Basis::Fourier => {
                    let angle = (t * u) as f64 / m as f64 + (q * v) as f64 / n as f64;
                    (std::f64::consts::TAU * angle).cos() / ((m * n) as f64).sqrt()
                }
                Basis::Wavelet { low, inputs, outputs } => {
                    filtered(low, *outputs, *u, t) * filtered(low, *inputs, *v, q)
                }
            };
            f64::from(*value) * factor
        };
        entries.iter().map(part).sum()
    }

    fn check(basis: &Basis, shape: (usize, usize), count: usize) {
        let (m, n) = shape;
        let (rows, columns) = basis.num_coefficients(shape);
        let step = (rows * columns / count).max(1);
        let values = values(count, 5);
        let entries: Vec<(usize, usize, f32)> =
            (0..count).map(|i| (i * step / columns, i * step % columns, values[i])).collect();
        let index = |of: fn(&(usize, usize, f32)) -> usize| {
            Tensor::from_vec(entries.iter().map(|e| of(e) as u32).collect::<Vec<_>>(), count, &Device::Cpu).unwrap()
        };
        let (rows, columns) = (index(|e| e.0), index(|e| e.1));
        let values = Tensor::from_vec(values, count, &Device::Cpu).unwrap();
        let spectral = Spectral { basis, shape, rows: &rows, columns: &columns, values: &values };
        let matrix = spectral.matrix().unwrap();
        let (a, b) = spectral.factors().unwrap();
        let identity = Tensor::eye(n, DType::F32, &Device::Cpu).unwrap();
        let applied = spectral.apply(&identity).unwrap().t().unwrap();
        for found in [matrix, b.matmul(&a).unwrap(), applied] {
            assert_eq!(found.dims(), [m, n]);
            for (t, row) in found.to_vec2::<f32>().unwrap().iter().enumerate() {
                for (q, found) in row.iter().enumerate() {
                    let expected = entry(basis, shape, &entries, (t, q));
                    assert!((f64::from(*found) - expected).abs() < 2e-6, "{shape:?} ({t}, {q}): {found} {expected}");
                }
            }
        }
    }

    #[test]
    fn every_basis_is_its_formula() {
        for shape in [(1, 1), (12, 30), (7, 16), (8, 13), (49, 5)] {
            for count in [1, shape.0.min(4), (shape.0 * shape.1).min(20)] {
                check(&Basis::Fourier, shape, count);
            }
        }
        let band = |half, cut| Band { half, cut };
        let wavelet = |len: usize, outputs, inputs| Basis::Wavelet { low: values(len, 9).into(), inputs, outputs };
        check(&wavelet(2, band(4, 0), band(5, 0)), (8, 10), 7);
        check(&wavelet(2, band(4, 0), band(5, 0)), (7, 9), 7);
        check(&wavelet(6, band(5, 4), band(8, 5)), (6, 11), 30);
        check(&wavelet(8, band(9, 6), band(5, 7)), (11, 3), 3);
    }
}
