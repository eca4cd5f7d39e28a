//! A small network behind a sublayer, beside or within the residual connection.

use candle_core::{DType, Result, Tensor};

use super::cpu::{PackedMatrix, SlotRun, SweepLinear, join_op};
use super::linear;

/// Added to the variance of a layer norm, as in torch.
const NORM_EPS: f32 = 1e-5;

/// A matrix (out, in) in the form of its device.
#[derive(Clone, Copy, Debug)]
pub enum Factor<'a> {
    /// A tensor, for any device.
    Dense(&'a Tensor),
    /// Packed for the CPU's kernels.
    Packed(&'a PackedMatrix),
}

/// `outer(s, o) + norm_after( inner(s, o) + up act( down norm_before( input(s, o) ) + b ) + b' )`, where a pair of
/// numbers (p, q) stands for `p s + q o`.
#[derive(Clone, Copy, Debug)]
pub struct StreamTerm<'a> {
    /// What the network reads.
    pub input: (f32, f32),
    /// Weight and shift (hidden).
    pub norm_before: Option<(&'a Tensor, &'a Tensor)>,
    /// Weight (width, hidden) and bias (width).
    pub down: (Factor<'a>, &'a Tensor),
    /// Elementwise, on f32.
    pub activation: fn(&Tensor) -> Result<Tensor>,
    /// Weight (hidden, width) and bias (hidden).
    pub up: (Factor<'a>, &'a Tensor),
    /// What is added before `norm_after`.
    pub inner: (f32, f32),
    /// Weight and shift (hidden).
    pub norm_after: Option<(&'a Tensor, &'a Tensor)>,
    /// What is added last.
    pub outer: (f32, f32),
}

impl Factor<'_> {
    /// `x W^T`, (rows, out) in the format of `x`.
    pub(super) fn times(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(w) => linear(x, w),
            Self::Packed(weight) => {
                let runs = vec![SlotRun::bare(0..x.dim(0)?)];
                join_op(x, &[SweepLinear { weight: (*weight).into(), bias: None, runs }])
            }
        }
    }
}

/// What stands behind a sublayer for rows with this term; see [`StreamTerm`].
///
/// `stream` and `output` are (rows, hidden), and so is the result, in their format. A row's result depends on that row
/// only, and with packed factors to the bit. The activation is computed in f32.
///
/// # Errors
/// When the shapes do not fit or the device fails.
pub fn stream_function(stream: &Tensor, output: &Tensor, term: &StreamTerm<'_>) -> Result<Tensor> {
    let mix = |(p, q): (f32, f32)| match (p == 0.0, q == 0.0) {
        (true, true) => Ok(None),
        (false, true) => scaled(stream, p).map(Some),
        (true, false) => scaled(output, q).map(Some),
        (false, false) => (scaled(stream, p)? + scaled(output, q)?).map(Some),
    };
    let add = |x: Tensor, other: Option<Tensor>| match other {
        Some(other) => other + x,
        None => Ok(x),
    };
    let norm = |x: Tensor, norm: Option<(&Tensor, &Tensor)>| match norm {
        Some((weight, shift)) => candle_nn::ops::layer_norm(&x.contiguous()?, weight, shift, NORM_EPS),
        None => Ok(x),
    };
    let input = mix(term.input)?.map_or_else(|| stream.zeros_like(), Ok)?;
    let input = norm(input, term.norm_before)?;
    let narrow = term.down.0.times(&input.contiguous()?)?.broadcast_add(term.down.1)?; // [rows, width]
    let narrow = (term.activation)(&narrow.to_dtype(DType::F32)?)?.to_dtype(input.dtype())?;
    let wide = term.up.0.times(&narrow.contiguous()?)?.broadcast_add(term.up.1)?; // [rows, hidden]
    let result = norm(add(wide, mix(term.inner)?)?, term.norm_after)?;
    add(result, mix(term.outer)?)
}

/// `factor x`; a factor of one costs nothing.
fn scaled(x: &Tensor, factor: f32) -> Result<Tensor> {
    if factor == 1.0 { Ok(x.clone()) } else { x * f64::from(factor) }
}

#[cfg(test)]
mod tests {
    use super::super::cpu::testing::random;
    use super::*;
    use candle_core::Device;

    const HIDDEN: usize = 70;
    const WIDTH: usize = 5;
    const ROWS: usize = 9;

    fn tensor(seed: u64, shape: &[usize]) -> Tensor {
        Tensor::from_vec(random(shape.iter().product(), seed), shape, &Device::Cpu).unwrap()
    }

    /// The formula, number by number.
    fn by_hand(stream: &Tensor, output: &Tensor, term: &StreamTerm<'_>, down: &Tensor, up: &Tensor) -> Vec<Vec<f32>> {
        let rows = |t: &Tensor| t.to_vec2::<f32>().unwrap();
        let vector = |t: &Tensor| t.to_vec1::<f32>().unwrap();
        let norm = |x: Vec<f32>, norm: Option<(&Tensor, &Tensor)>| {
            let Some((weight, shift)) = norm else { return x };
            let mean = x.iter().sum::<f32>() / x.len() as f32;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / x.len() as f32;
            let unit = x.iter().map(|x| (x - mean) / (variance + NORM_EPS).sqrt());
            unit.zip(vector(weight)).zip(vector(shift)).map(|((x, w), s)| x * w + s).collect()
        };
        let times = |w: &Tensor, x: &[f32], b: &Tensor| -> Vec<f32> {
            let dot = |row: &Vec<f32>| row.iter().zip(x).map(|(w, x)| w * x).sum::<f32>();
            rows(w).iter().zip(vector(b)).map(|(row, b)| dot(row) + b).collect()
        };
        let pairs = rows(stream).into_iter().zip(rows(output));
        pairs
            .map(|(s, o)| {
                let mix = |(p, q): (f32, f32)| s.iter().zip(&o).map(|(s, o)| p * s + q * o).collect::<Vec<f32>>();
                let sum = |x: Vec<f32>, y: Vec<f32>| x.iter().zip(y).map(|(x, y)| x + y).collect::<Vec<f32>>();
                let mut narrow = times(down, &norm(mix(term.input), term.norm_before), term.down.1);
                narrow.iter_mut().for_each(|x| *x = x.max(0.0));
                let wide = times(up, &narrow, term.up.1);
                sum(mix(term.outer), norm(sum(mix(term.inner), wide), term.norm_after))
            })
            .collect()
    }

    #[test]
    fn packed_and_dense_factors_follow_the_formula_and_rows_stand_alone() {
        let (stream, output) = (tensor(1, &[ROWS, HIDDEN]), tensor(2, &[ROWS, HIDDEN]));
        let (down, up) = (tensor(3, &[WIDTH, HIDDEN]), tensor(4, &[HIDDEN, WIDTH]));
        let (down_bias, up_bias) = (tensor(5, &[WIDTH]), tensor(6, &[HIDDEN]));
        let (weight, shift) = (tensor(7, &[HIDDEN]), tensor(8, &[HIDDEN]));
        let pack = |w: &Tensor| {
            let (n, k) = w.dims2().unwrap();
            let values = w.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            PackedMatrix::from_f32(n, k, |row| &values[row * k..][..k]).unwrap()
        };
        let packed = (pack(&down), pack(&up));
        let norm = Some((&weight, &shift));
        let cases = [
            ((0.0, 1.0), (0.0, 0.0), (1.0, 1.0), None, None),
            ((1.0, 1.0), (0.0, 0.0), (2.0, 1.0), norm, None),
            ((1.0, 0.0), (0.5, -1.0), (0.0, 0.0), None, norm),
            ((1.0, -0.5), (1.0, 1.0), (1.0, 0.0), norm, norm),
        ];
        for (input, inner, outer, norm_before, norm_after) in cases {
            let activation = Tensor::relu;
            let (down_factor, up_factor) = (Factor::Dense(&down), Factor::Dense(&up));
            let dense = StreamTerm {
                input,
                norm_before,
                down: (down_factor, &down_bias),
                activation,
                up: (up_factor, &up_bias),
                inner,
                norm_after,
                outer,
            };
            let by_hand = by_hand(&stream, &output, &dense, &down, &up);
            let fast = StreamTerm {
                down: (Factor::Packed(&packed.0), &down_bias),
                up: (Factor::Packed(&packed.1), &up_bias),
                ..dense
            };
            let found = stream_function(&stream, &output, &fast).unwrap().to_vec2::<f32>().unwrap();
            let plain = stream_function(&stream, &output, &dense).unwrap().to_vec2::<f32>().unwrap();
            for ((found, plain), expected) in found.iter().zip(&plain).zip(&by_hand) {
                for ((found, plain), expected) in found.iter().zip(plain).zip(expected) {
                    assert!((found - expected).abs() < 1e-4 && (plain - expected).abs() < 1e-4, "{found} {expected}");
                }
            }
            for (row, together) in found.iter().enumerate() {
                let one = |t: &Tensor| t.narrow(0, row, 1).unwrap();
                let alone = stream_function(&one(&stream), &one(&output), &fast).unwrap();
                assert_eq!(&alone.to_vec2::<f32>().unwrap()[0], together);
            }
        }
    }
}
