//! `alpha / r` with patterns by module, as several kinds have it.

use crate::adapter::AdapterError;
use crate::adapter::config::{Config, Rule, as_number, as_positive};
use crate::adapter::matching::Patterns;

/// `r`, `alpha` and their patterns.
pub(super) struct Scaling {
    r: usize,
    alpha: f64,
    ranks: Patterns,
    alphas: Patterns,
}

/// The fields that [`Scaling`] reads and those that every kind of the LyCORIS family has beside them.
pub(super) const FIELDS: &[(&str, Rule)] = &[
    ("r", Rule::Read),
    ("alpha", Rule::Read),
    ("rank_pattern", Rule::Read),
    ("alpha_pattern", Rule::Read),
    ("rank_dropout", Rule::Ignored),
    ("rank_dropout_scale", Rule::Ignored),
    ("module_dropout", Rule::Ignored),
    ("init_weights", Rule::Ignored),
    // The sizes of the tensors say how they are cut.
    ("decompose_both", Rule::Ignored),
    ("decompose_factor", Rule::Ignored),
    // Concerns convolutions, which no supported base model has.
    ("use_effective_conv2d", Rule::Ignored),
];

impl Scaling {
    /// Reads the fields; both default to 8.
    pub(super) fn parse(config: &Config) -> Result<Self, AdapterError> {
        Ok(Self {
            r: config.positive("r")?.unwrap_or(8),
            alpha: config.number("alpha")?.unwrap_or(8.0),
            ranks: Patterns::parse(config, "rank_pattern")?,
            alphas: Patterns::parse(config, "alpha_pattern")?,
        })
    }

    /// Rank of a module, and `alpha / r`.
    pub(super) fn of(&self, path: &str) -> Result<(usize, f64), AdapterError> {
        let r = self.ranks.get(path)?.map_or(Ok(self.r), |value| as_positive("rank_pattern", value))?;
        let alpha = self.alphas.get(path)?.map_or(Ok(self.alpha), |value| as_number("alpha_pattern", value))?;
        Ok((r, alpha / r as f64))
    }
}
