//! FourierFT: a few coefficients of the delta's two-dimensional Fourier transform are trained (PEFT 0.21
//! `tuners/fourierft`). Coefficient k stands at row u, column v of the spectrum, and
//!
//! ```text
//! W'[t, j] = W[t, j] + scaling / (out in) sum_k c_k cos(2 pi (u_k t / out + v_k j / in))
//! ```
//!
//! The places are not in the file: they are the first ones of torch's random permutation with `random_loc_seed`.

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, as_positive, field_error, wrong_type};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::{Matcher, Patterns};
use crate::adapter::torch_random::{NOT_PERMUTED, TorchRandom};
use crate::adapter::{AdapterError, Basis};

/// The row of the table of kinds.
pub(super) const FOURIERFT: Kind = Kind {
    peft_type: "FOURIERFT",
    title: "FourierFT",
    served_as: "sparse delta between Fourier transforms, or an own dense weight where the coefficients are many",
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
        // The transforms of the basis are unitary.
        let scale = scaling / (all as f64).sqrt();
        let coefficients = places.iter().zip(&spectrum);
        let entries = coefficients.map(|(at, c)| (at / in_features, at % in_features, (f64::from(*c) * scale) as f32));
        let cost = 2 * (transform_cost(in_features) + transform_cost(out_features));
        let shape = (out_features, in_features);
        lowering.add_spectral(id, (Basis::Fourier, shape), entries.collect(), cost)?;
    }
    Ok(())
}

/// Multiplications of a fast transform of this length, about.
fn transform_cost(len: usize) -> usize {
    len * len.ilog2() as usize
}
