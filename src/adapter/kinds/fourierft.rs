//! FourierFT: a few coefficients of the delta's two-dimensional Fourier transform are trained (PEFT 0.21
//! `tuners/fourierft`). Coefficient k stands at row u, column v of the spectrum, and
//!
//! ```text
//! W'[t, j] = W[t, j] + scaling / (out in) sum_k c_k cos(2 pi (u_k t / out + v_k j / in))
//! ```
//!
//! The places are not in the file: they are the first ones of torch's random permutation with `random_loc_seed`. Each
//! coefficient is two rank-one terms.

use candle_core::{Device, Tensor};

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, as_positive, field_error, wrong_type};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::{Matcher, Patterns};
use crate::adapter::torch_random::{NOT_PERMUTED, TorchRandom};
use crate::adapter::{AdapterError, Delta};

/// The row of the table of kinds.
pub(super) const FOURIERFT: Kind = Kind {
    peft_type: "FOURIERFT",
    title: "FourierFT",
    served_as: "low-rank delta of the waves, or an own dense weight where they are many",
    merged_as: "W + scaling times the real part of the inverse Fourier transform",
    suffixes: &[SPECTRUM],
    fields: &[
        ("n_frequency", Rule::Read),
        ("n_frequency_pattern", Rule::Read),
        ("scaling", Rule::Read),
        ("random_loc_seed", Rule::Read),
        ("bias", Rule::Read),
        ("init_weights", Rule::Ignored),
    ],
    check,
    lower,
    ..Kind::PLAIN
};

const SPECTRUM: &str = "fourierft_spectrum";
/// PEFT's defaults.
const DEFAULT_COUNT: usize = 1000;
const DEFAULT_SCALING: f64 = 150.0;
const DEFAULT_SEED: u64 = 777;

/// The seed of the places.
pub(super) fn seed(config: &Config) -> Result<u64, AdapterError> {
    let field = "random_loc_seed";
    match config.get(field) {
        None => Ok(DEFAULT_SEED),
        Some(value) => value.as_u64().ok_or_else(|| wrong_type(field, "a seed", value)),
    }
}

/// Expressions here need a component before them.
fn patterns(config: &Config) -> Result<Patterns, AdapterError> {
    Patterns::parse_as(config, "n_frequency_pattern", |key| format!(r"\A(?:.*\.{key}\z)"))
}

fn check(config: &Config) -> Result<(), AdapterError> {
    config.positive("n_frequency")?;
    config.number("scaling")?;
    seed(config)?;
    patterns(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let default = lowering.config.positive("n_frequency")?.unwrap_or(DEFAULT_COUNT);
    let scaling = lowering.config.number("scaling")?.unwrap_or(DEFAULT_SCALING);
    let (seed, patterns) = (seed(&lowering.config)?, patterns(&lowering.config)?);
    for AdaptedLinear { id, in_features, out_features } in adapted::linears(lowering)? {
        let path = &lowering.site(id).path;
        let count = patterns.get(path)?.map_or(Ok(default), |value| as_positive("n_frequency_pattern", value))?;
        let all = in_features.saturating_mul(out_features);
        if count > all {
            let reason = format!("{count} coefficients do not fit into {all} places of `{path}`");
            return Err(field_error("n_frequency", reason));
        }
        let spectrum = lowering.require(id, SPECTRUM, &[count])?.to_vec1::<f32>()?;
        let places = TorchRandom::new(seed).permutation(all, count);
        let places = places.ok_or_else(|| lowering.refuse(id, SPECTRUM, NOT_PERMUTED))?;
        let terms: Vec<(usize, usize, f64)> = places
            .iter()
            .zip(&spectrum)
            .map(|(at, value)| (at / in_features, at % in_features, f64::from(*value) * scaling / all as f64))
            .collect();
        let size = (out_features, in_features);
        if !lowering.costs_more(id, 2 * count) {
            let (a, b) = waves(&terms, size)?;
            lowering.out.linears.entry(id).or_default().deltas.push(Delta::LowRank { a, b });
            continue;
        }
        let reason = "so many waves would cost more than a dense weight";
        lowering.serve_own(id, reason, |weight| {
            terms.chunks(WAVES_MAX).try_fold(weight, |weight, terms| {
                let (a, b) = waves(terms, size)?;
                Ok((weight + b.matmul(&a)?)?)
            })
        })?;
    }
    Ok(())
}

/// Most coefficients that are written as waves at once, which bounds the memory of a dense weight.
const WAVES_MAX: usize = 256;

/// The factors a: (2 n, in), b: (out, 2 n) of n coefficients, each with its row, column and weight.
fn waves(
    terms: &[(usize, usize, f64)],
    (out_features, in_features): (usize, usize),
) -> Result<(Tensor, Tensor), AdapterError> {
    let count = terms.len();
    let (mut a, mut b) = (vec![0f32; 2 * count * in_features], vec![0f32; 2 * count * out_features]);
    for (k, (u, v, weight)) in terms.iter().enumerate() {
        for j in 0..in_features {
            let (sine, cosine) = angle(*v, j, in_features).sin_cos();
            a[2 * k * in_features + j] = cosine as f32;
            a[(2 * k + 1) * in_features + j] = sine as f32;
        }
        for t in 0..out_features {
            let (sine, cosine) = angle(*u, t, out_features).sin_cos();
            b[t * 2 * count + 2 * k] = (weight * cosine) as f32;
            b[t * 2 * count + 2 * k + 1] = (-weight * sine) as f32;
        }
    }
    let a = Tensor::from_vec(a, (2 * count, in_features), &Device::Cpu)?;
    Ok((a, Tensor::from_vec(b, (out_features, 2 * count), &Device::Cpu)?))
}

/// `2 pi frequency at / period`, from the remainder so that large products keep their precision.
fn angle(frequency: usize, at: usize, period: usize) -> f64 {
    std::f64::consts::TAU * ((frequency * at) % period) as f64 / period as f64
}
