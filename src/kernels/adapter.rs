//! Adapter application: what segments of the rows add to, or take instead of, the shared product of a linear.

use candle_core::{DType, Result, Tensor};

use super::{Spectral, linear};

/// What consecutive rows do at one linear.
#[derive(Clone, Debug, Default)]
pub struct SegmentTerms<'a> {
    /// First row.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
    /// What becomes of the input before it meets the weight.
    pub pre: Option<InputTerm<'a>>,
    /// Weight (out, in) that these rows multiply with instead of the shared one.
    pub own_weight: Option<&'a Tensor>,
    /// Rows (n, in) that take the place of the weight's, and their indexes in ascending order.
    pub rows: Option<(&'a [u32], &'a Tensor)>,
    /// Additive terms.
    pub terms: Vec<Term<'a>>,
    /// Output scale of product and terms.
    pub scale: Option<OutputTerm<'a>>,
    /// The rows' gates (len, gates) in f32, for terms that are weighed by them.
    pub gates: Option<&'a Tensor>,
    /// Vector (out) added last.
    pub c: Option<&'a Tensor>,
}

impl SegmentTerms<'_> {
    /// Whether the rows keep the shared product, but for `c`.
    pub fn is_neutral(&self) -> bool {
        self.pre.is_none()
            && self.own_weight.is_none()
            && self.rows.is_none()
            && self.terms.is_empty()
            && self.scale.is_none()
    }
}

/// A transform of the input.
#[derive(Clone, Copy, Debug)]
pub enum InputTerm<'a> {
    /// Elementwise product.
    Diag {
        /// Factors (in).
        scale: &'a Tensor,
    },
    /// Each block of consecutive inputs times a matrix, as a row.
    BlockDiag {
        /// Matrices (n, s, s), n s inputs; (1, s, s) when all blocks share one.
        blocks: &'a Tensor,
    },
    /// Block-diagonal factors under permutations.
    Butterfly {
        /// The factors, in the order in which they act.
        factors: &'a [ButterflyFactor],
    },
}

/// One factor of a butterfly: the inputs in the order of `places` are multiplied block by block, as rows, and the result
/// goes back to these places.
#[derive(Clone, Debug)]
pub struct ButterflyFactor {
    /// A permutation of the inputs, (in) of u32.
    pub places: Tensor,
    /// Matrices (n, s, s) with n s inputs.
    pub blocks: Tensor,
}

/// One additive term.
#[derive(Clone, Copy, Debug)]
pub enum Term<'a> {
    /// `b (a x)`.
    LowRank {
        /// Down projection (r, in).
        a: &'a Tensor,
        /// Up projection (out, r).
        b: &'a Tensor,
    },
    /// `y[k*q + j] += sum_i m[i, j] * s[i]`, where `s` is the sum of the width-r shards of `x`, zero-padded on the
    /// right.
    ShardSum {
        /// Block matrix (r, q), q divides out.
        m: &'a Tensor,
    },
    /// `sum_e g_e b_e (a_e x)` over experts of equal rank, whose factors lie one after the other. The gates g are the softmax of
    /// `|prototypes x| / temperature` over the `top_k` experts with the largest magnitudes.
    Routed {
        /// Down projections (experts r, in).
        a: &'a Tensor,
        /// Up projections (out, experts r).
        b: &'a Tensor,
        /// What inputs are compared with (experts, in), f32.
        prototypes: &'a Tensor,
        /// Experts of an input.
        top_k: usize,
        /// Divides the magnitudes.
        temperature: f64,
    },
    /// `b (g * (a x))`, where each row brings the gates that g is taken from: `g[j] = gates[places[j]]`.
    Gated {
        /// Down projection (r, in).
        a: &'a Tensor,
        /// Up projection (out, r).
        b: &'a Tensor,
        /// Which of a row's gates goes with each number of `a x` (r), u32.
        places: &'a Tensor,
    },
    /// `y[rows[i]] += values[i] * x[columns[i]]`.
    Sparse {
        /// Output indexes (entries), u32.
        rows: &'a Tensor,
        /// Input indexes (entries), u32.
        columns: &'a Tensor,
        /// Values (entries).
        values: &'a Tensor,
    },
    /// `y[m*b + t] += sum_n sum_j kernel[m, n, (j - t) mod b] * x[n*b + j]`.
    Circulant {
        /// First row of each block (out / b, in / b, b).
        kernel: &'a Tensor,
    },
    /// Blocks of inputs times matrices, `g[j, s] = sum_c a[j, s, c] x[j*d + c]`, mixed to `h[i, s]` and, as blocks of outputs,
    /// `y[i*q + t] += sum_s b[i, t, s] h[i, s]`.
    BlockProduct {
        /// Matrices (n, r, d) of n blocks of inputs; (1, r, d) when all share one.
        a: &'a Tensor,
        /// How the blocks are mixed.
        mix: &'a BlockMix,
        /// Matrices (p, q, r) of p blocks of outputs, (1, q, r) when all share one; `None` when h are the outputs.
        b: Option<&'a Tensor>,
    },
    /// A sparse matrix between the coefficients of two transforms.
    Spectral(Spectral<'a>),
    /// `g * (b (d * (a x)))`.
    ScaledLowRank {
        /// Down projection (r, in).
        a: &'a Tensor,
        /// Up projection (out, r).
        b: &'a Tensor,
        /// Scales the numbers between them, (r).
        d: &'a Tensor,
        /// Scales the outputs, (out).
        g: &'a Tensor,
    },
}

/// What happens between the blocks of a block product.
#[derive(Clone, Debug)]
pub enum BlockMix {
    /// `h[i, s] = sum_j w[i, j] g[j, s]`, w: (p, n).
    Matrix(Tensor),
    /// Each of the n input blocks has a part for each of the n output blocks: with `c = r / n`,
    /// `h[i, j*c + s] = g[j, i*c + s]`. The matrices of inputs are apart.
    Exchange,
}

impl BlockMix {
    /// Its matrix, if it is one.
    pub fn matrix(&self) -> Option<&Tensor> {
        match self {
            Self::Matrix(w) => Some(w),
            Self::Exchange => None,
        }
    }

    /// Its matrix, if it is one, to be replaced in place.
    pub fn matrix_mut(&mut self) -> Option<&mut Tensor> {
        match self {
            Self::Matrix(w) => Some(w),
            Self::Exchange => None,
        }
    }
}

/// An output scale of product and terms.
#[derive(Clone, Copy, Debug)]
pub enum OutputTerm<'a> {
    /// Elementwise product.
    Diag {
        /// Factors (out).
        scale: &'a Tensor,
    },
    /// In groups of `2 half` outputs, `a = y[j]` and `b = y[half + j]` become `p[j] a - q[j] b` and
    /// `p[half + j] b + q[half + j] a`.
    PairRot {
        /// (out).
        p: &'a Tensor,
        /// (out).
        q: &'a Tensor,
        /// Distance of the partners.
        half: usize,
    },
    /// Each block of consecutive outputs, as a row, times a matrix. What the last block has beyond the outputs is zero
    /// before, and dropped after.
    BlockDiag {
        /// Matrices (n, s, s).
        blocks: &'a Tensor,
    },
}

/// `pre(x)`, segment by segment: `x` (rows, in) with the rows of segments that transform their input transformed, and
/// all others as they are. The segments tile the rows in order. A row's result depends on that row only.
///
/// # Errors
/// When the shapes do not fit or the device fails.
pub fn transform_inputs(x: &Tensor, segments: &[SegmentTerms<'_>]) -> Result<Tensor> {
    if segments.iter().all(|segment| segment.pre.is_none()) {
        return Ok(x.clone());
    }
    let transform = |segment: &SegmentTerms<'_>| {
        let x = x.narrow(0, segment.start, segment.len)?;
        match segment.pre {
            None => Ok(x),
            Some(InputTerm::Diag { scale }) => x.broadcast_mul(scale),
            Some(InputTerm::BlockDiag { blocks }) => times_blocks(&x, blocks),
            Some(InputTerm::Butterfly { factors }) => factors
                .iter()
                .try_fold(x, |x, factor| at_places(&x, &factor.places, |x| times_blocks(x, &factor.blocks))),
        }
    };
    Tensor::cat(&segments.iter().map(transform).collect::<Result<Vec<_>>>()?, 0)
}

/// `y = scale * (W pre(x) + sum terms(x)) + c`, segment by segment.
///
/// `x` and `pre_x` are (rows, in), see [`transform_inputs`]; `product` is the shared `W pre(x)` of all rows (rows, out); it may be missing when every segment has its
/// own weight. The segments tile the rows in order. The result is (rows, out) in the format of `x`. Cost beyond the
/// shared product: one pass over each touched segment and one concatenation.
///
/// # Errors
/// When the shapes do not fit or the device fails.
pub fn apply_segments(
    (x, pre_x): (&Tensor, &Tensor),
    product: Option<&Tensor>,
    segments: &[SegmentTerms<'_>],
) -> Result<Tensor> {
    let rows = x.dim(0)?;
    let mut next_row = 0;
    let mut pieces = Vec::with_capacity(segments.len());
    for segment in segments {
        assert_eq!(segment.start, next_row, "the segments tile the rows in order");
        next_row += segment.len;
        pieces.push(apply_one((x, pre_x), product, segment)?);
    }
    assert_eq!(next_row, rows, "the segments cover all rows");
    Tensor::cat(&pieces, 0)
}

fn apply_one((x, pre_x): (&Tensor, &Tensor), product: Option<&Tensor>, segment: &SegmentTerms<'_>) -> Result<Tensor> {
    let x = x.narrow(0, segment.start, segment.len)?;
    let pre_x = pre_x.narrow(0, segment.start, segment.len)?;
    let mut y = match (segment.own_weight, product) {
        (Some(w), _) => linear(&pre_x, w)?,
        (None, Some(product)) => product.narrow(0, segment.start, segment.len)?,
        (None, None) => panic!("a segment without a weight of its own needs the shared product"),
    };
    if let Some((indexes, rows)) = segment.rows {
        y = with_rows(&y, &pre_x, indexes, rows)?;
    }
    for term in &segment.terms {
        y = match *term {
            Term::LowRank { a, b } => (y + low_rank(&x, a, b)?)?,
            Term::Routed { a, b, prototypes, top_k, temperature } => {
                let gates = route(&x, prototypes, top_k, temperature)?;
                (y + linear(&gated(&linear(&x, a)?, &gates)?, b)?)?
            }
            Term::Gated { a, b, places } => {
                let gates = segment.gates.expect("rows with a gated term bring their gates");
                let gates = gates.index_select(places, 1)?.to_dtype(x.dtype())?; // [rows, r]
                (y + linear(&(linear(&x, a)? * gates)?, b)?)?
            }
            Term::ShardSum { m } => add_shard_sum(&y, &x, m)?,
            Term::Sparse { rows, columns, values } => add_sparse(&y, &x, (rows, columns), values)?,
            Term::Circulant { kernel } => (y + linear(&x, &circulant_matrix(kernel)?)?)?,
            Term::BlockProduct { a, mix, b } => (y + block_product(&x, (a, mix, b))?)?,
            Term::Spectral(spectral) => (y + spectral.apply(&x)?)?,
            Term::ScaledLowRank { a, b, d, g } => {
                let h = linear(&x, a)?.broadcast_mul(d)?; // [rows, r]
                (y + linear(&h, b)?.broadcast_mul(g)?)?
            }
        };
    }
    y = match segment.scale {
        None => y,
        Some(OutputTerm::Diag { scale }) => y.broadcast_mul(scale)?,
        Some(OutputTerm::PairRot { p, q, half }) => rotate_pairs(&y, (p, q), half)?,
        Some(OutputTerm::BlockDiag { blocks }) => {
            let (out_features, covered) = (y.dim(1)?, blocks.dim(0)? * blocks.dim(1)?);
            let padded = y.pad_with_zeros(1, 0, covered - out_features)?;
            times_blocks(&padded, blocks)?.narrow(1, 0, out_features)?
        }
    };
    if let Some(c) = segment.c {
        y = y.broadcast_add(c)?;
    }
    Ok(y)
}

/// `y[:, indexes] = x rows^T`: the product with a weight whose rows `indexes` are replaced.
fn with_rows(y: &Tensor, x: &Tensor, indexes: &[u32], rows: &Tensor) -> Result<Tensor> {
    let replaced = linear(x, rows)?; // [rows of x, n]
    let index = Tensor::new(indexes, y.device())?.broadcast_as(replaced.shape())?.contiguous()?;
    y.contiguous()?.scatter(&index, &replaced, 1)
}

/// `f` of the columns of `x` (rows, n) in the order of `places` (n, u32), its columns put back to these places.
///
/// # Errors
/// When the shapes do not fit or the device fails.
pub fn at_places(x: &Tensor, places: &Tensor, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let moved = f(&x.contiguous()?.index_select(places, 1)?)?.contiguous()?;
    let index = places.unsqueeze(0)?.broadcast_as(moved.shape())?.contiguous()?;
    moved.zeros_like()?.scatter(&index, &moved, 1)
}

/// Each block of a row of `x` (rows, n s) times its matrix of `blocks` (n or 1, s, s).
fn times_blocks(x: &Tensor, blocks: &Tensor) -> Result<Tensor> {
    let (rows, in_features) = x.dims2()?;
    let s = blocks.dim(1)?;
    let n = in_features / s;
    if blocks.dim(0)? == 1 {
        return x.reshape((rows * n, s))?.matmul(&blocks.squeeze(0)?)?.reshape((rows, in_features));
    }
    let pieces = x.reshape((rows, n, s))?.transpose(0, 1)?.contiguous()?; // [n, rows, s]
    pieces.matmul(blocks)?.transpose(0, 1)?.reshape((rows, in_features))
}

/// Adds the entries' products. The columns that they read are gathered, a bounded number of entries at a time.
fn add_sparse(y: &Tensor, x: &Tensor, (rows, columns): (&Tensor, &Tensor), values: &Tensor) -> Result<Tensor> {
    /// Entries gathered at once, which bounds the memory.
    const ENTRIES_MAX: usize = 1 << 16;
    let (count, mut y) = (values.dim(0)?, y.clone());
    for from in (0..count).step_by(ENTRIES_MAX) {
        let piece = |t: &Tensor| t.narrow(0, from, ENTRIES_MAX.min(count - from))?.contiguous();
        let products = x.contiguous()?.index_select(&piece(columns)?, 1)?.broadcast_mul(&piece(values)?)?;
        y = y.contiguous()?.index_add(&piece(rows)?, &products, 1)?;
    }
    Ok(y)
}

fn rotate_pairs(y: &Tensor, (p, q): (&Tensor, &Tensor), half: usize) -> Result<Tensor> {
    let (rows, out_features) = y.dims2()?;
    let pairs = y.reshape((rows, out_features / (2 * half), 2, half))?;
    let (first, second) = (pairs.narrow(2, 0, 1)?, pairs.narrow(2, 1, 1)?);
    let partners = Tensor::cat(&[second.neg()?, first], 2)?.reshape((rows, out_features))?;
    y.broadcast_mul(p)? + partners.broadcast_mul(q)?
}

/// The matrix (out, in) of circulant blocks whose first rows are `kernel` (out / b, in / b, b): entry (t, j) of a block
/// is `kernel[(j - t) mod b]`. It has the format of `kernel`.
///
/// # Errors
/// When the device fails.
pub fn circulant_matrix(kernel: &Tensor) -> Result<Tensor> {
    let (m, n, b) = kernel.dims3()?;
    let from = (0..b).flat_map(|t| (0..b).map(move |j| ((j + b - t) % b) as u32)).collect::<Vec<_>>();
    let entries = kernel.contiguous()?.index_select(&Tensor::from_vec(from, b * b, kernel.device())?, 2)?;
    entries.reshape((m, n, b, b))?.transpose(1, 2)?.reshape((m * b, n * b))
}

/// The experts' gates for each row of `x` (rows, in): (rows, experts) in f32, the softmax of `|prototypes x| / temperature`
/// over the experts whose magnitude is at least the `top_k`-th largest, and zero for the others. prototypes: (experts, in)
/// in f32.
fn route(x: &Tensor, prototypes: &Tensor, top_k: usize, temperature: f64) -> Result<Tensor> {
    let magnitudes = linear(&x.to_dtype(DType::F32)?, prototypes)?.abs()?.contiguous()?;
    let (sorted, _) = magnitudes.sort_last_dim(false)?;
    let chosen = magnitudes.broadcast_ge(&sorted.narrow(1, top_k - 1, 1)?)?;
    let never = Tensor::full(f32::NEG_INFINITY, magnitudes.shape(), x.device())?;
    candle_nn::ops::softmax_last_dim(&chosen.where_cond(&(magnitudes / temperature)?, &never)?)
}

/// Each expert's equal share of `h` (rows, experts r) times its gate (rows, experts).
fn gated(h: &Tensor, gates: &Tensor) -> Result<Tensor> {
    let ((rows, width), experts) = (h.dims2()?, gates.dim(1)?);
    let shares = h.reshape((rows, experts, width / experts))?;
    shares.broadcast_mul(&gates.to_dtype(h.dtype())?.unsqueeze(2)?)?.reshape((rows, width))
}

/// The outputs (rows, out) of a block product of `x` (rows, in).
fn block_product(x: &Tensor, (a, mix, b): (&Tensor, &BlockMix, Option<&Tensor>)) -> Result<Tensor> {
    let (rows, in_features) = x.dims2()?;
    let (_, r, d) = a.dims3()?;
    let n = in_features / d;
    let blocks = x.reshape((rows, n, d))?.transpose(0, 1)?.contiguous()?; // [n, rows, d]
    let g = times_each(&blocks, a)?;
    let h = match mix {
        BlockMix::Matrix(w) => w.matmul(&g.reshape((n, rows * r))?)?.reshape((w.dim(0)?, rows, r))?,
        BlockMix::Exchange => {
            let parts = g.reshape((n, rows, n, r / n))?.transpose(0, 2)?; // [n outputs, rows, n inputs, r / n]
            parts.contiguous()?.reshape((n, rows, r))?
        }
    };
    let y = match b {
        None => h,
        Some(b) => times_each(&h, b)?,
    };
    let (p, _, q) = y.dims3()?;
    y.transpose(0, 1)?.contiguous()?.reshape((rows, p * q))
}

/// `x[i] m[i]^T` for x: (blocks, rows, k) and m: (blocks or 1, n, k).
fn times_each(x: &Tensor, m: &Tensor) -> Result<Tensor> {
    let ((blocks, rows, k), (count, n, _)) = (x.dims3()?, m.dims3()?);
    if count == 1 {
        return linear(&x.reshape((blocks * rows, k))?, &m.squeeze(0)?)?.reshape((blocks, rows, n));
    }
    x.matmul(&m.transpose(1, 2)?.contiguous()?)
}

fn low_rank(x: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    linear(&linear(x, a)?, b) // [rows, out]
}

fn add_shard_sum(y: &Tensor, x: &Tensor, m: &Tensor) -> Result<Tensor> {
    let (rows, in_features) = x.dims2()?;
    let out_features = y.dim(1)?;
    let (r, q) = m.dims2()?;
    assert!(out_features.is_multiple_of(q), "block width {q} does not divide {out_features} outputs");
    let shards = in_features.div_ceil(r);
    let padded = x.pad_with_zeros(1, 0, shards * r - in_features)?;
    let s = padded.reshape((rows, shards, r))?.sum(1)?; // [rows, r]
    let block = s.matmul(m)?; // [rows, q]
    let tiles = y.reshape((rows, out_features / q, q))?; // [rows, out / q, q]
    tiles.broadcast_add(&block.unsqueeze(1)?)?.reshape((rows, out_features))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn matrix(values: &[f32], shape: (usize, usize)) -> Tensor {
        Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn shard_sum_pads_ragged_inputs_and_repeats_over_the_outputs() {
        let x = matrix(&[1., 2., 3., 4., 5.], (1, 5));
        let m = matrix(&[1., 10., 100., 1000.], (2, 2));
        let y = add_shard_sum(&Tensor::zeros((1, 4), candle_core::DType::F32, &Device::Cpu).unwrap(), &x, &m).unwrap();
        // s = [1 + 3 + 5, 2 + 4 + 0] = [9, 6]
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[609., 6090., 609., 6090.]]);
    }

    #[test]
    fn replaced_rows_take_the_place_of_the_product() {
        let x = matrix(&[1., 2., 3., 4.], (2, 2));
        let product = matrix(&[5., 6., 7., 8., 9., 10.], (2, 3));
        let rows = matrix(&[1., 0., 1., 1.], (2, 2));
        let segment = SegmentTerms { len: 2, rows: Some((&[0, 2], &rows)), ..SegmentTerms::default() };
        let y = apply_segments((&x, &x), Some(&product), &[segment]).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[1., 6., 3.], [3., 9., 7.]]);
    }

    #[test]
    fn only_the_weight_reads_the_transformed_input() {
        let x = matrix(&[1., 2., 3., 4.], (2, 2));
        let w = matrix(&[1., 1.], (1, 2));
        let (a, b) = (matrix(&[1., 0.], (1, 2)), matrix(&[1.], (1, 1)));
        let scale = Tensor::new(&[10f32, 100.], &Device::Cpu).unwrap();
        let segments = [
            SegmentTerms { len: 1, ..SegmentTerms::default() },
            SegmentTerms {
                start: 1,
                len: 1,
                pre: Some(InputTerm::Diag { scale: &scale }),
                terms: vec![Term::LowRank { a: &a, b: &b }],
                ..SegmentTerms::default()
            },
        ];
        let pre_x = transform_inputs(&x, &segments).unwrap();
        let product = linear(&pre_x, &w).unwrap();
        let y = apply_segments((&x, &pre_x), Some(&product), &segments).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[3.], [433.]]);
    }

    #[test]
    fn scale_multiplies_product_and_terms_but_not_c() {
        let x = matrix(&[1., 2.], (1, 2));
        let product = matrix(&[3., 4.], (1, 2));
        let (a, b) = (matrix(&[1., 1.], (1, 2)), matrix(&[1., 2.], (2, 1)));
        let scale = Tensor::new(&[2f32, 3.], &Device::Cpu).unwrap();
        let c = Tensor::new(&[0.5f32, 0.25], &Device::Cpu).unwrap();
        let segment = SegmentTerms {
            len: 1,
            terms: vec![Term::LowRank { a: &a, b: &b }],
            scale: Some(OutputTerm::Diag { scale: &scale }),
            c: Some(&c),
            ..SegmentTerms::default()
        };
        let y = apply_segments((&x, &x), Some(&product), &[segment]).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[12.5, 30.25]]);
    }

    #[test]
    fn pairs_are_rotated_within_groups() {
        let y = matrix(&[1., 2., 3., 4., 5., 6., 7., 8.], (1, 8));
        let p = Tensor::new(&[1f32, 1., 1., 1., 2., 2., 2., 2.], &Device::Cpu).unwrap();
        let q = Tensor::new(&[10f32, 10., 10., 10., 0., 0., 1., 1.], &Device::Cpu).unwrap();
        let rotated = rotate_pairs(&y, (&p, &q), 2).unwrap();
        assert_eq!(rotated.to_vec2::<f32>().unwrap(), [[-29., -38., 13., 24., 10., 12., 19., 22.]]);
    }

    #[test]
    fn circulant_blocks_turn_their_first_row() {
        let kernel = Tensor::new(&[[[1f32, 2., 3.], [4., 5., 6.]]], &Device::Cpu).unwrap();
        let expected = [[1., 2., 3., 4., 5., 6.], [3., 1., 2., 6., 4., 5.], [2., 3., 1., 5., 6., 4.]];
        assert_eq!(circulant_matrix(&kernel).unwrap().to_vec2::<f32>().unwrap(), expected);
    }

    #[test]
    fn blocks_are_multiplied_mixed_and_multiplied_again() {
        let cube =
            |values: &[f32], shape: (usize, usize, usize)| Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
        let found = |x: &Tensor, a: &Tensor, mix: &BlockMix, b: Option<&Tensor>| {
            block_product(x, (a, mix, b)).unwrap().to_vec2::<f32>().unwrap()
        };
        let x = matrix(&[1., 2., 3., 4., 0., 1., 0., 1.], (2, 4));
        // kron([[1, 10], [0, 2], [3, 0]], [[1, 1]]), then with a second factor (1, 5) on the left.
        let w = BlockMix::Matrix(matrix(&[1., 10., 0., 2., 3., 0.], (3, 2)));
        let a = cube(&[1., 1.], (1, 1, 2));
        assert_eq!(found(&x, &a, &w, None), [[73., 14., 9.], [11., 2., 3.]]);
        let b = cube(&[1., 5.], (1, 2, 1));
        assert_eq!(found(&x, &a, &w, Some(&b))[0], [73., 365., 14., 70., 9., 45.]);
        let b = cube(&[1., 2., 3.], (3, 1, 1));
        assert_eq!(found(&x, &a, &w, Some(&b)), [[73., 28., 27.], [11., 4., 9.]]);
        // g = (1, 2), (7, -1): the first numbers go to the first block of outputs, the second ones to the second.
        let a = cube(&[1., 0., 0., 1., 1., 1., 1., -1.], (2, 2, 2));
        assert_eq!(found(&x, &a, &BlockMix::Exchange, None)[0], [1., 7., 2., -1.]);
        let b = cube(&[1., 10., 100., 1000.], (2, 1, 2));
        assert_eq!(found(&x, &a, &BlockMix::Exchange, Some(&b)), [[71., -800.], [10., -900.]]);
    }

    #[test]
    fn butterfly_factors_act_at_their_places_and_in_order() {
        let x = matrix(&[1., 2., 3., 4.], (1, 4));
        let swap = Tensor::new(&[[[0f32, 1.], [1., 0.]], [[10., 0.], [0., 100.]]], &Device::Cpu).unwrap();
        let places = |order: &[u32]| Tensor::new(order, &Device::Cpu).unwrap();
        let factor = |order: &[u32]| ButterflyFactor { places: places(order), blocks: swap.clone() };
        let factors = [factor(&[0, 2, 1, 3]), factor(&[0, 1, 2, 3])];
        let segment =
            SegmentTerms { len: 1, pre: Some(InputTerm::Butterfly { factors: &factors }), ..Default::default() };
        // First (1, 3) and (2, 4) are at places 0, 2 and 1, 3: 3, 20, 1, 400. Then 3 and 20 are swapped.
        let found = transform_inputs(&x, &[segment]).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(found, [[20., 3., 10., 40000.]]);
    }

    #[test]
    fn a_block_of_outputs_may_reach_beyond_them() {
        let (x, product) = (matrix(&[0.], (1, 1)), matrix(&[1., 2., 3.], (1, 3)));
        let blocks = Tensor::new(&[[[1f32, 1.], [0., 1.]], [[2., 7.], [7., 7.]]], &Device::Cpu).unwrap();
        let scale = Some(OutputTerm::BlockDiag { blocks: &blocks });
        let y = apply_segments((&x, &x), Some(&product), &[SegmentTerms { len: 1, scale, ..Default::default() }]);
        assert_eq!(y.unwrap().to_vec2::<f32>().unwrap(), [[1., 3., 6.]]);
    }

    #[test]
    fn the_nearest_experts_share_a_row() {
        let x = matrix(&[1., 0., 0., -2.], (2, 2));
        let prototypes = matrix(&[3., 0., -3., 0.1, 0.1, 1.], (3, 2));
        let gates = route(&x, &prototypes, 2, 0.5).unwrap().to_vec2::<f32>().unwrap();
        // Magnitudes 3, 3, 0.1 and 0, 0.2, 2.
        assert_eq!(gates[0], [0.5, 0.5, 0.]);
        let (low, high) = ((0.2f32 / 0.5).exp(), (2f32 / 0.5).exp());
        assert!((gates[1][1] - low / (low + high)).abs() < 1e-6 && gates[1][0] == 0., "{gates:?}");
        let a = matrix(&[1., 1., 2., 2., 4., 4.], (3, 2));
        let b = matrix(&[1., 10., 100.], (1, 3));
        let segment = SegmentTerms {
            len: 2,
            terms: vec![Term::Routed { a: &a, b: &b, prototypes: &prototypes, top_k: 1, temperature: 1. }],
            ..SegmentTerms::default()
        };
        let y = apply_segments((&x, &x), Some(&matrix(&[0., 0.], (2, 1))), &[segment]).unwrap();
        // The first row has two equals, the second goes to the last expert.
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[10.5], [-800.]]);
    }

    #[test]
    fn rows_bring_their_gates() {
        let x = matrix(&[1., 2., 3., 4.], (2, 2));
        let (a, b) = (matrix(&[1., 0., 0., 1., 1., 1.], (3, 2)), matrix(&[1., 10., 100.], (1, 3)));
        let gates = matrix(&[7., 1., 0., 7., 2., -1.], (2, 3));
        let places = Tensor::new(&[1u32, 2, 2], &Device::Cpu).unwrap();
        let segment = SegmentTerms {
            len: 2,
            terms: vec![Term::Gated { a: &a, b: &b, places: &places }],
            gates: Some(&gates),
            ..SegmentTerms::default()
        };
        let y = apply_segments((&x, &x), Some(&matrix(&[0., 0.], (2, 1))), &[segment]).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[1.], [2. * 3. - 40. - 700.]]);
    }

    #[test]
    fn blocks_multiply_rows_and_entries_add_up() {
        let x = matrix(&[1., 2., 3., 4.], (1, 4));
        let blocks = Tensor::new(&[[[0f32, 1.], [1., 0.]], [[1., 1.], [0., 1.]]], &Device::Cpu).unwrap();
        assert_eq!(times_blocks(&x, &blocks).unwrap().to_vec2::<f32>().unwrap(), [[2., 1., 3., 7.]]);
        let shared = blocks.narrow(0, 0, 1).unwrap();
        assert_eq!(times_blocks(&x, &shared).unwrap().to_vec2::<f32>().unwrap(), [[2., 1., 4., 3.]]);
        let index = |values: &[u32]| Tensor::new(values, &Device::Cpu).unwrap();
        let values = Tensor::new(&[10f32, 100., 1000.], &Device::Cpu).unwrap();
        let y = add_sparse(&matrix(&[1., 1.], (1, 2)), &x, (&index(&[0, 0, 1]), &index(&[0, 3, 1])), &values).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[411., 2001.]]);
    }
}
