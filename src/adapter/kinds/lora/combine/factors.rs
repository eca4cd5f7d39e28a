//! The arithmetic on one module's factors. Matrices are f32 unless said otherwise.

use candle_core::{DType, Device, Result, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use super::{Method, Term, fault};
use crate::adapter::{AdapterError, linalg};

/// A module's factors: the matrix `scale b a`.
pub(in super::super) struct Factors {
    /// (r, inputs).
    pub(super) a: Tensor,
    /// (outputs, r).
    pub(super) b: Tensor,
    pub(super) scale: f64,
    /// The names of both in a file.
    pub(super) form: [&'static str; 2],
}

impl Factors {
    /// Inputs and outputs, and whether it is an embedding's.
    pub(super) fn sizes(&self) -> (usize, usize, &str) {
        (self.a.dims()[1], self.b.dims()[0], self.form[0])
    }

    pub(super) fn rank(&self) -> usize {
        self.a.dims()[0]
    }

    /// The names of both factors in a file.
    pub(super) fn suffixes(&self) -> [&'static str; 2] {
        self.form
    }

    /// Factors of the same matrix with scale 1: the root of the scale in each, its sign in `a`.
    fn balanced(&self) -> Result<[Tensor; 2]> {
        let root = self.scale.abs().sqrt();
        Ok([(&self.a * (root * self.scale.signum()))?, (&self.b * root)?])
    }
}

/// The result's factors, both with scale 1.
pub(super) fn combined(
    path: &str,
    terms: &[Term<'_>],
    method: Method,
) -> std::result::Result<[Tensor; 2], AdapterError> {
    let [a, b] = match method {
        Method::Mean => means(terms)?,
        Method::Stack { rank } => {
            let [a, b] = stacked(terms)?;
            match rank {
                Some(rank) if rank < a.dim(0)? => nearest(&a, &b, rank)?,
                _ => [a, b],
            }
        }
        Method::Fair { lambda } => match corrected(terms, lambda)? {
            Some(factors) => factors,
            None => return Err(fault("lambda", format!("the factors of `{path}` need one above {lambda}"))),
        },
        Method::Ties { density } => per_factor(terms, |values, weights, _| ties(values, weights, density))?,
        Method::Dare { density, seed } => per_factor(terms, |values, weights, factor| {
            let random = |at: usize| generator(seed, terms[at].idx, path, factor);
            dare(values, weights, density, random)
        })?,
    };
    let is_finite = |tensor: &Tensor| -> Result<bool> {
        Ok(tensor.flatten_all()?.to_vec1::<f32>()?.iter().all(|value| value.is_finite()))
    };
    if !is_finite(&a)? || !is_finite(&b)? {
        return Err(fault("weight", format!("the factors of `{path}` are not finite with these")));
    }
    Ok([a.contiguous()?, b.contiguous()?])
}

/// `[A_k]` (sum r_k, in) and `[w_k s_k B_k]` (out, sum r_k): `B A = sum w_k s_k B_k A_k` (PEFT `cat`).
fn stacked(terms: &[Term<'_>]) -> Result<[Tensor; 2]> {
    let a: Vec<&Tensor> = terms.iter().map(|term| &term.factors.a).collect();
    let b = terms.iter().map(|term| &term.factors.b * (f64::from(term.weight) * term.factors.scale));
    Ok([Tensor::cat(&a, 0)?, Tensor::cat(&b.collect::<Result<Vec<_>>>()?, 1)?])
}

/// The product `b a` brought to `rank`, as near as that rank gets (Eckart-Young): `B = b a V`, `A = V^T`, V the first
/// right singular vectors (in, rank). The rows of `A` are orthonormal, as those of PEFT's `svd` are.
fn nearest(a: &Tensor, b: &Tensor, rank: usize) -> Result<[Tensor; 2]> {
    let (rows, inputs) = a.dims2()?;
    let (a, b) = (a.to_dtype(DType::F64)?, b.to_dtype(DType::F64)?);
    // An orthonormal basis (in, n) of the rows of `a`, in which the right singular vectors are small.
    let basis = if rows <= inputs {
        linalg::householder_q(&a.t()?.contiguous()?)?
    } else {
        Tensor::eye(inputs, DType::F64, &Device::Cpu)?
    };
    let image = b.matmul(&a.matmul(&basis)?)?; // [out, n]
    let n = image.dim(1)?;
    let kept = rank.min(n);
    let (_, vectors) = linalg::gram_eigen(&image, n - kept..n)?;
    // Ascending eigenvalues: the last one is the largest.
    let descending: Vec<u32> = (0..kept as u32).rev().collect();
    let vectors = vectors.index_select(&Tensor::new(descending, &Device::Cpu)?, 1)?; // [n, kept]
    let (a, b) = (basis.matmul(&vectors)?.t()?, image.matmul(&vectors)?);
    Ok([a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?])
}

/// `sum p_k A_k` and `sum p_k B_k`.
fn means(terms: &[Term<'_>]) -> Result<[Tensor; 2]> {
    let mut sums: Option<[Tensor; 2]> = None;
    for term in terms {
        let [a, b] = term.factors.balanced()?;
        let share = f64::from(term.share);
        let own = [(a * share)?, (b * share)?];
        sums = Some(match sums {
            None => own,
            Some([a, b]) => [(a + &own[0])?, (b + &own[1])?],
        });
    }
    sums.ok_or_else(|| candle_core::Error::Msg("no factors".to_owned()))
}

/// The means `A`, `B` with `B + (D - B A) A^T (A A^T + lambda I)^-1` in place of `B`, where `D = sum p_k B_k A_k`: the
/// least `|D - (B + X) A|^2 + lambda |X|^2` over X, in Frobenius norms. In f64; `None` where there is no unique one.
fn corrected(terms: &[Term<'_>], lambda: f64) -> Result<Option<[Tensor; 2]>> {
    let wide = |tensor: &Tensor| tensor.to_dtype(DType::F64);
    let [a, b] = means(terms)?;
    let (mean_a, mean_b) = (wide(&a)?, wide(&b)?);
    let across = mean_a.t()?;
    let gram = mean_a.matmul(&across)?; // [r, r]
    let mut target = mean_b.matmul(&gram)?.neg()?; // [out, r]
    for term in terms {
        let [own_a, own_b] = term.factors.balanced()?;
        let own = wide(&own_b)?.matmul(&wide(&own_a)?.matmul(&across)?)?;
        target = (target + (own * f64::from(term.share))?)?;
    }
    let ridge = (Tensor::eye(gram.dim(0)?, DType::F64, &Device::Cpu)? * lambda)?;
    let Some(inverse) = linalg::inverse(&(gram + ridge)?)? else { return Ok(None) };
    let b = (mean_b + target.matmul(&inverse)?)?.to_dtype(DType::F32)?;
    Ok(Some([a, b]))
}

/// Applies `merge` to the values of all `A_k` and then of all `B_k`, with the weights `sqrt |w_k s_k|`, those of `A` with
/// the sign; the last argument says which factor it is.
fn per_factor(
    terms: &[Term<'_>],
    merge: impl Fn(&[Vec<f32>], &[f32], &'static str) -> Vec<f32>,
) -> Result<[Tensor; 2]> {
    let weights: Vec<f64> = terms.iter().map(|term| f64::from(term.weight) * term.factors.scale).collect();
    let root = |weight: &f64| weight.abs().sqrt() as f32;
    let signed = |weight: &f64| if *weight < 0.0 { -root(weight) } else { root(weight) };
    let merged = |of: fn(&super::Factors) -> &Tensor, weights: Vec<f32>, factor| -> Result<Tensor> {
        let values = terms.iter().map(|term| of(term.factors).flatten_all()?.to_vec1::<f32>());
        let merged = merge(&values.collect::<Result<Vec<_>>>()?, &weights, factor);
        Tensor::from_vec(merged, of(terms[0].factors).shape(), &Device::Cpu)
    };
    Ok([
        merged(|factors| &factors.a, weights.iter().map(signed).collect(), "a")?,
        merged(|factors| &factors.b, weights.iter().map(root).collect(), "b")?,
    ])
}

/// TIES: of each adapter the `density` values of largest magnitude; at each place the sign that their sum has (positive
/// for zero), and the weighted mean of those with that sign.
pub(super) fn ties(values: &[Vec<f32>], weights: &[f32], density: f64) -> Vec<f32> {
    let trimmed: Vec<Vec<f32>> = values.iter().map(|values| largest(values, density)).collect();
    let at = |idx: usize| {
        let sum: f32 = trimmed.iter().map(|values| values[idx]).sum();
        let agrees = |value: f32| if sum >= 0.0 { value > 0.0 } else { value < 0.0 };
        let agreeing = trimmed.iter().zip(weights).filter(|(values, _)| agrees(values[idx]));
        let (total, count) = agreeing.fold((0.0, 0.0), |(total, count): (f32, f32), (values, weight)| {
            (total + weight * values[idx], count + 1.0)
        });
        total / count.max(1.0)
    };
    (0..trimmed[0].len()).map(at).collect()
}

/// The values with all but the `density` of largest magnitude set to zero; of equal ones the first stay.
fn largest(values: &[f32], density: f64) -> Vec<f32> {
    if density >= 1.0 {
        return values.to_vec();
    }
    let kept = (density * values.len() as f64) as usize;
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|x, y| values[*y].abs().total_cmp(&values[*x].abs()));
    let mut trimmed = vec![0.0; values.len()];
    order[..kept].iter().for_each(|idx| trimmed[*idx] = values[*idx]);
    trimmed
}

/// DARE: each value is kept with probability `density` and then divided by it; the weighted sum of what is kept.
fn dare(values: &[Vec<f32>], weights: &[f32], density: f64, random: impl Fn(usize) -> ChaCha8Rng) -> Vec<f32> {
    let mut sum = vec![0.0; values[0].len()];
    for (at, (values, weight)) in values.iter().zip(weights).enumerate() {
        let mut rng = random(at);
        for (sum, value) in sum.iter_mut().zip(values) {
            if density >= 1.0 || rng.random_bool(density) {
                *sum += weight * value / density as f32;
            }
        }
    }
    sum
}

/// Random numbers of one adapter's factor, whatever else is combined.
fn generator(seed: u64, idx: usize, path: &str, factor: &str) -> ChaCha8Rng {
    let mut sha = Sha256::new();
    sha.update(seed.to_le_bytes());
    sha.update((idx as u64).to_le_bytes());
    sha.update(factor);
    sha.update(path);
    ChaCha8Rng::from_seed(sha.finalize().into())
}
