//! RoAd: pairs of outputs are rotated and scaled, bias included (PEFT 0.21 `tuners/road`). Within a group of
//! `group_size` outputs the first half is paired with the second; with `p = alpha cos(theta)`, `q = alpha sin(theta)`
//!
//! ```text
//! y1' = p1 y1 - q1 y2          y2' = p2 y2 + q2 y1
//! ```
//!
//! `road_1` has one alpha and theta for each pair, `road_2` for each output, `road_4` for each p and each q.

use candle_core::{Device, Tensor};

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, Scale, merge};

/// The row of the table of kinds.
pub(super) const ROAD: Kind = Kind {
    peft_type: "ROAD",
    title: "RoAd",
    served_as: "rotated pairs of outputs and a replaced bias",
    merged_as: "R W with R rotating pairs",
    suffixes: &[THETA, ALPHA],
    pairs: &[(THETA, ALPHA)],
    fields: &[("variant", Rule::Read), ("group_size", Rule::Read), ("init_weights", Rule::Ignored)],
    check,
    lower,
    ..Kind::PLAIN
};

const THETA: &str = "road_theta";
const ALPHA: &str = "road_alpha";
/// PEFT's default of `group_size`.
const DEFAULT_GROUP: usize = 64;

/// How many numbers a pair of outputs has.
#[derive(Clone, Copy)]
enum Variant {
    One,
    Two,
    Four,
}

impl Variant {
    fn parse(config: &Config) -> Result<Self, AdapterError> {
        match config.string("variant")? {
            None | Some("road_1") => Ok(Self::One),
            Some("road_2") => Ok(Self::Two),
            Some("road_4") => Ok(Self::Four),
            Some(other) => {
                Err(field_error("variant", format!("expected `road_1`, `road_2` or `road_4`, found `{other}`")))
            }
        }
    }

    fn len(self, out_features: usize) -> usize {
        match self {
            Self::One => out_features / 2,
            Self::Two => out_features,
            Self::Four => 2 * out_features,
        }
    }

    /// Where the number of output `at` is, for p and for q.
    fn places(self, at: usize, half: usize) -> (usize, usize) {
        let (group, within) = (at / (2 * half), at % (2 * half));
        match self {
            Self::One => (group * half + within % half, group * half + within % half),
            Self::Two => (at, at),
            Self::Four => (group * 4 * half + within, group * 4 * half + 2 * half + within),
        }
    }
}

fn group_size(config: &Config) -> Result<usize, AdapterError> {
    let size = config.positive("group_size")?.unwrap_or(DEFAULT_GROUP);
    if size % 2 != 0 {
        return Err(field_error("group_size", format!("expected an even number, found {size}")));
    }
    Ok(size)
}

fn check(config: &Config) -> Result<(), AdapterError> {
    Variant::parse(config)?;
    group_size(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let (variant, size) = (Variant::parse(&lowering.config)?, group_size(&lowering.config)?);
    let half = size / 2;
    for AdaptedLinear { id, out_features, .. } in adapted::linears(lowering)? {
        if out_features % size != 0 {
            let reason = format!("groups of {size} (`group_size`) do not divide {out_features} outputs");
            return Err(lowering.refuse(id, THETA, reason));
        }
        let len = variant.len(out_features);
        let theta = lowering.require(id, THETA, &[len])?.to_vec1::<f32>()?;
        let alpha = lowering.require(id, ALPHA, &[len])?.to_vec1::<f32>()?;
        let places = (0..out_features).map(|at| variant.places(at, half));
        let p = places.clone().map(|(p, _)| alpha[p] * theta[p].cos()).collect();
        let q = places.map(|(_, q)| alpha[q] * theta[q].sin()).collect();
        let p = Tensor::from_vec(p, out_features, &Device::Cpu)?;
        let q = Tensor::from_vec(q, out_features, &Device::Cpu)?;
        let c = match lowering.bias(id)? {
            Some(bias) => Some(((&bias * &p)? + (merge::partners(&bias, half)? * &q)?)?),
            None => None,
        };
        let slots = lowering.out.linears.entry(id).or_default();
        (slots.scale, slots.c) = (Scale::PairRot { p, q, half }, c);
    }
    Ok(())
}
