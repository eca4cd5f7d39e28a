//! WaveFT: a few coefficients of the delta's wavelet transform are trained (PEFT 0.21 `tuners/waveft`), in a matrix of
//! the weight's size plus what the wavelet's filter loses at the edges, rounded up to even sizes. Its quadrants are the
//! four sub-bands of one level; a coefficient at row p, column q of a sub-band adds, before the edges are cut off,
//!
//! ```text
//! delta[2 p + a, 2 q + b] += scaling c f[a] g[b]      f, g: low or high pass, by rows and columns of the sub-band
//! ```
//!
//! which is a sparse matrix between wavelet transforms of inputs and outputs. Without `use_idwt` the coefficients are the
//! delta's entries. The places are not in the file: they are the first ones of torch's random permutation with
//! `random_loc_seed`.

use std::sync::Arc;

use super::Kind;
use super::fourierft::seed;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, as_positive, field_error};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::{Matcher, Patterns};
use crate::adapter::torch_random::{NOT_PERMUTED, TorchRandom};
use crate::adapter::wavelets::FILTERS;
use crate::adapter::{AdapterError, Band, Basis};

/// The row of the table of kinds.
pub(super) const WAVEFT: Kind = Kind {
    peft_type: "WAVEFT",
    title: "WaveFT",
    served_as: "sparse delta between wavelet transforms, or an own dense weight where the coefficients are many",
    merged_as: "W + scaling times the inverse wavelet transform",
    suffixes: &[SPECTRUM],
    fields: &[
        ("n_frequency", Rule::Read),
        ("n_frequency_pattern", Rule::Read),
        ("proportional_parameters", Rule::Read),
        ("scaling", Rule::Read),
        ("wavelet_family", Rule::Read),
        ("use_idwt", Rule::Read),
        ("random_loc_seed", Rule::Read),
        ("bias", Rule::Read),
        ("init_weights", Rule::Ignored),
    ],
    check,
    lower,
    ..Kind::PLAIN
};

const SPECTRUM: &str = "waveft_spectrum";
/// PEFT's defaults.
const DEFAULT_COUNT: usize = 2592;
const DEFAULT_SCALING: f64 = 25.0;

/// How coefficients become entries.
enum Transform {
    /// They are the entries.
    Direct,
    /// Through filters; that of the low pass.
    Inverse { low: Arc<[f32]> },
}

impl Transform {
    fn parse(config: &Config) -> Result<Self, AdapterError> {
        if config.get("use_idwt").is_some() && !config.flag("use_idwt")? {
            return Ok(Self::Direct);
        }
        let field = "wavelet_family";
        let name = config.string(field)?.unwrap_or("db1");
        let Some((_, low)) = FILTERS.iter().find(|(known, _)| *known == name) else {
            let known: Vec<&str> = FILTERS.iter().map(|(known, _)| *known).collect();
            return Err(field_error(field, format!("expected one of {}, found `{name}`", known.join(", "))));
        };
        Ok(Self::Inverse { low: low.iter().map(|value| *value as f32).collect() })
    }
}

fn check(config: &Config) -> Result<(), AdapterError> {
    config.positive("n_frequency")?;
    config.number("scaling")?;
    config.flag("proportional_parameters")?;
    seed(config)?;
    Transform::parse(config)?;
    Patterns::parse(config, "n_frequency_pattern")?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let default = lowering.config.positive("n_frequency")?.unwrap_or(DEFAULT_COUNT);
    let scaling = lowering.config.number("scaling")?.unwrap_or(DEFAULT_SCALING);
    let proportional = lowering.config.flag("proportional_parameters")?;
    let (seed, transform) = (seed(&lowering.config)?, Transform::parse(&lowering.config)?);
    let patterns = Patterns::parse(&lowering.config, "n_frequency_pattern")?;
    let linears = adapted::linears(lowering)?;
    let elements = |linear: &AdaptedLinear| linear.in_features.saturating_mul(linear.out_features);
    let total: f64 = linears.iter().map(|linear| elements(linear) as f64).sum();
    let budget = (default * linears.len()) as f64;
    for linear in linears {
        let AdaptedLinear { id, in_features, out_features } = linear;
        let all = elements(&linear);
        let path = &lowering.site(id).path;
        let count = if proportional {
            // Ties go to the even number, as in Python.
            ((all as f64 / total * budget).round_ties_even() as usize).max(1)
        } else {
            patterns.get(path)?.map_or(Ok(default), |value| as_positive("n_frequency_pattern", value))?
        };
        if count > all {
            let reason = format!("{count} coefficients do not fit into {all} places of `{path}`");
            return Err(field_error("n_frequency", reason));
        }
        let spectrum = lowering.require(id, SPECTRUM, &[count])?.to_vec1::<f32>()?;
        let places = TorchRandom::new(seed).permutation(all, count);
        let places = places.ok_or_else(|| lowering.refuse(id, SPECTRUM, NOT_PERMUTED))?;
        let coefficients = places.iter().zip(spectrum);
        let value = |c: f32| (f64::from(c) * scaling) as f32;
        let entries = coefficients.map(|(at, c)| (at / in_features, at % in_features, value(c)));
        match &transform {
            Transform::Direct => lowering.add_sparse(id, entries.collect())?,
            Transform::Inverse { low } => {
                let (outputs, inputs) = (Axis::new(out_features, low.len()), Axis::new(in_features, low.len()));
                let entries = entries.map(|(row, column, value)| {
                    let ((p, is_lower), (q, is_right)) = (outputs.place(row), inputs.place(column));
                    // Details are crosswise: those in the right half of the matrix have passed the high pass by rows,
                    // those in the lower half by columns.
                    (outputs.coefficient(p, is_right), inputs.coefficient(q, is_lower), value)
                });
                let (entries, cost) = (entries.collect(), low.len() * (in_features + out_features));
                let basis = Basis::Wavelet { low: low.clone(), inputs: inputs.band(), outputs: outputs.band() };
                lowering.add_spectral(id, (basis, (out_features, in_features)), entries, cost)?;
            }
        }
    }
    Ok(())
}

/// How an axis of the weight lies in the matrix of coefficients, and in what the filters make of it.
struct Axis {
    size: usize,
    /// Coefficients on the axis, half of them of the low pass.
    padded: usize,
    /// What the filters' result has before the weight begins.
    cut: usize,
}

impl Axis {
    /// `length`: of the filter.
    fn new(size: usize, length: usize) -> Self {
        let padded = (size + length - 2).next_multiple_of(2);
        let edge = (2 * length - 3) / 2;
        let made = padded + length - 2 - 2 * edge;
        Self { size, padded, cut: edge + (made - size) / 2 }
    }

    /// The sub-band's index of a coefficient at place `at` of the weight's size, and whether it lies in the second half.
    fn place(&self, at: usize) -> (usize, bool) {
        let at = at + (self.padded - self.size) / 2;
        let half = self.padded / 2;
        (at % half, at >= half)
    }

    /// The number of a sub-band's coefficient among those of both bands.
    fn coefficient(&self, p: usize, is_high: bool) -> usize {
        p + if is_high { self.padded / 2 } else { 0 }
    }

    fn band(&self) -> Band {
        Band { half: self.padded / 2, cut: self.cut }
    }
}
