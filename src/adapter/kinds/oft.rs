//! OFT: blocks of the input, or in the oldest files of the output, are rotated. Three generations of PEFT wrote files
//! that differ, and their tensors tell them apart:
//!
//! - `oft_R.weight` (PEFT 0.16 and later): strict upper triangles of skew-symmetric Q; `W' = W blkdiag(R)^T`
//! - `oft_r` and `oft_s` (0.14 and 0.15): blocks D, `Q = (D - D^T) / 2`; `W' = diag(s) W blkdiag(R)^T`
//! - `oft_r` alone (up to 0.13): the same blocks over the outputs; `W' = blkdiag(R)^T W`
//!
//! R is Cayley's map of Q, or with `use_cayley_neumann` a series. `coft` limits the norm, of Q in the first generation and
//! of D in the others. The bias is neither rotated nor scaled. An embedding's rows are rotated as they are read.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use serde_json::Value;

use super::Kind;
use crate::adapter::adapted;
use crate::adapter::config::{Config, Rule};
use crate::adapter::keys::key_of;
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::rotation::{self, Map};
use crate::adapter::{
    AdapterError, AdapterFiles, LinearSlots, Pre, Scale, SiteId, SiteKind, linalg, merge, tensor_file,
};

/// The row of the table of kinds.
pub(super) const OFT: Kind = Kind {
    peft_type: "OFT",
    title: "OFT",
    served_as: "blocks that multiply the input, or in files up to PEFT 0.13 the output (large ones from an own dense weight); embeddings from an own table",
    merged_as: "W blkdiag(R)^T",
    suffixes: &[NEW, EMBEDDING, OLD, OLD_SCALE],
    fields: &[
        // The tensors show both.
        ("r", Rule::Ignored),
        ("oft_block_size", Rule::Ignored),
        ("block_share", Rule::Read),
        ("coft", Rule::Read),
        ("eps", Rule::Read),
        ("use_cayley_neumann", Rule::Read),
        ("num_cayley_neumann_terms", Rule::Read),
        ("bias", Rule::Read),
        ("module_dropout", Rule::Ignored),
        ("init_weights", Rule::Ignored),
        // The oldest generation's: numbers of blocks, which the tensors show, and something that PEFT never read.
        ("rank_pattern", Rule::Ignored),
        ("alpha_pattern", Rule::Ignored),
    ],
    check,
    lower,
    ..Kind::PLAIN
};

const NEW: &str = "oft_R.weight";
const EMBEDDING: &str = "oft_embedding_R.weight";
const OLD: &str = "oft_r";
const OLD_SCALE: &str = "oft_s";
/// PEFT's defaults.
const DEFAULT_EPS: f64 = 6e-5;
const DEFAULT_TERMS: usize = 5;
/// A number of a block over the outputs costs as much as this many of a dense weight.
const DENSE_COST: usize = 4;

/// What the config says for all modules.
struct Options {
    shared: bool,
    /// Limit of the norm, before it is divided among the blocks.
    eps: Option<f64>,
    map: Map,
}

impl Options {
    fn parse(config: &Config) -> Result<Self, AdapterError> {
        let eps = config.number("eps")?.unwrap_or(DEFAULT_EPS);
        let terms = config.positive("num_cayley_neumann_terms")?.unwrap_or(DEFAULT_TERMS);
        let series = config.get("use_cayley_neumann").is_none() || config.flag("use_cayley_neumann")?;
        Ok(Self {
            shared: config.flag("block_share")?,
            eps: config.flag("coft")?.then_some(eps),
            map: if series { Map::Neumann(terms) } else { Map::Cayley },
        })
    }
}

fn check(config: &Config) -> Result<(), AdapterError> {
    Options::parse(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let options = Options::parse(&lowering.config)?;
    for id in adapted::sites(lowering, |kind| !matches!(kind, SiteKind::Norm { .. }))? {
        match lowering.site(id).kind {
            SiteKind::Linear { in_features, out_features, .. } => {
                if lowering.has(id, OLD) {
                    old(lowering, &options, id, (in_features, out_features))?;
                } else {
                    let blocks = new(lowering, &options, (id, NEW), in_features)?;
                    lowering.out.linears.entry(id).or_default().pre = Pre::BlockDiag(blocks);
                }
            }
            SiteKind::Embedding { dim, .. } => {
                let blocks = new(lowering, &options, (id, EMBEDDING), dim)?;
                let turned = blocks.transpose(1, 2)?.contiguous()?;
                let reason = "its rows are rotated";
                lowering.serve_own_table(id, reason, |table| Ok(merge::times_blocks(&table, &turned)?))?;
            }
            SiteKind::Norm { .. } => {}
        }
    }
    Ok(())
}

/// Rotations of the newest generation, (blocks or 1, s, s).
fn new(
    lowering: &mut Lowering<'_>,
    options: &Options,
    (id, suffix): (SiteId, &str),
    features: usize,
) -> Result<Tensor, AdapterError> {
    if matches!(options.map, Map::Neumann(_)) && lowering.config.get("peft_version").is_none() {
        let warning = "no `peft_version`: PEFT 0.16 and 0.17 ended the series of `use_cayley_neumann` in another way, \
                       which the file does not show; it is read as PEFT reads it since 0.18";
        if !lowering.warnings.iter().any(|known| known == warning) {
            lowering.warnings.push(warning.to_owned());
        }
    }
    let shape = lowering.shape(id, suffix).unwrap_or_default().to_vec();
    let &[blocks, count] = shape.as_slice() else {
        let reason = format!("expected shape [blocks, s (s - 1) / 2], found {shape:?}");
        return Err(lowering.refuse(id, suffix, reason));
    };
    let s = count.saturating_mul(8).saturating_add(1).isqrt().div_ceil(2);
    if s.saturating_mul(s - 1) / 2 != count {
        let reason = format!("{count} values are no upper triangle of a square block");
        return Err(lowering.refuse(id, suffix, reason));
    }
    check_blocks(lowering, (id, suffix), options, (blocks, s, features))?;
    let triangles = linalg::values(&lowering.require(id, suffix, &[blocks, count])?)?;
    let mut skew = rotation::from_upper(&triangles, s);
    if let Some(eps) = options.eps {
        rotation::limit_norm(&mut skew, s, eps / (blocks as f64).sqrt());
    }
    rotation::rotations(&skew, s, options.map)
}

/// Blocks must cover the features, unless they share one.
fn check_blocks(
    lowering: &Lowering<'_>,
    (id, suffix): (SiteId, &str),
    options: &Options,
    (blocks, s, features): (usize, usize, usize),
) -> Result<(), AdapterError> {
    let fits = match options.shared {
        true => blocks == 1 && features % s == 0,
        false => blocks.checked_mul(s) == Some(features),
    };
    if fits {
        return Ok(());
    }
    let sharing = if options.shared { "with" } else { "without" };
    let reason = format!("{blocks} blocks of {s} do not cover {features} features {sharing} `block_share`");
    Err(lowering.refuse(id, suffix, reason))
}

/// Blocks of one of the two older generations.
struct Old {
    /// Skew-symmetric Q, block by block.
    skew: Vec<f64>,
    /// Side of a block.
    s: usize,
    /// Whether the input is rotated, and not the output.
    on_input: bool,
}

/// Takes the blocks of a linear.
fn old_blocks(
    lowering: &mut Lowering<'_>,
    options: &Options,
    id: SiteId,
    (in_features, out_features): (usize, usize),
) -> Result<Old, AdapterError> {
    let on_input = lowering.has(id, OLD_SCALE);
    let shape = lowering.shape(id, OLD).unwrap_or_default().to_vec();
    let &[blocks, s, _] = shape.as_slice() else {
        return Err(lowering.refuse(id, OLD, format!("expected shape [blocks, s, s], found {shape:?}")));
    };
    // The oldest generation rounded the blocks' size up; what is beyond the outputs is cut off, even whole blocks.
    let covered = match (on_input, options.shared) {
        (true, _) => in_features,
        (false, true) => out_features.next_multiple_of(s.max(1)),
        (false, false) if out_features.div_ceil(blocks) == s => blocks.saturating_mul(s),
        (false, false) => out_features,
    };
    check_blocks(lowering, (id, OLD), options, (blocks, s, covered))?;
    let mut values = linalg::values(&lowering.require(id, OLD, &[blocks, s, s])?)?;
    if let Some(eps) = options.eps {
        // PEFT multiplies with the square of the outputs that one block of the input or output stands for.
        let per_block = if on_input { out_features.div_ceil(in_features / s) } else { s } as f64;
        rotation::limit_norm(&mut values, s, eps * per_block * per_block / (blocks as f64).sqrt());
    }
    Ok(Old { skew: rotation::skew_part(&values, s), s, on_input })
}

/// The two older generations.
fn old(
    lowering: &mut Lowering<'_>,
    options: &Options,
    id: SiteId,
    (in_features, out_features): (usize, usize),
) -> Result<(), AdapterError> {
    let Old { skew, s, on_input } = old_blocks(lowering, options, id, (in_features, out_features))?;
    let rotations = rotation::rotations(&skew, s, Map::Cayley)?;
    if on_input {
        let scale = lowering.require(id, OLD_SCALE, &[out_features, 1])?.squeeze(1)?;
        let slots = lowering.out.linears.entry(id).or_default();
        (slots.pre, slots.scale) = (Pre::BlockDiag(rotations), Scale::Diag(scale));
        return Ok(());
    }
    let num_blocks = out_features.div_ceil(s);
    let rotations = match options.shared {
        true => rotations.repeat((num_blocks, 1, 1))?,
        false => rotations.narrow(0, 0, num_blocks)?.contiguous()?,
    };
    // Each output is a product with the others of its block; as f32, which a dense weight need not be.
    if s.saturating_mul(DENSE_COST) <= in_features || !lowering.finds_room(id) {
        lowering.out.linears.entry(id).or_default().scale = Scale::BlockDiag(rotations);
        return Ok(());
    }
    let reason = "files up to PEFT 0.13 rotate the output, here in blocks that cost more than a dense weight";
    lowering.serve_own(id, reason, |weight| {
        let slots = LinearSlots { scale: Scale::BlockDiag(rotations), ..LinearSlots::default() };
        Ok(merge::effective_weight(&slots, weight)?)
    })
}

/// The same adapter as a file of the newest generation. A norm's limit is applied, the exact map asked for.
pub(in crate::adapter) fn to_current(lowering: &mut Lowering<'_>) -> Result<AdapterFiles, AdapterError> {
    let options = Options::parse(&lowering.config)?;
    let mut tensors: BTreeMap<String, Tensor> = lowering.other_tensors()?.into_iter().collect();
    let not_convertible = |path: &str, reason: &str| {
        Err(AdapterError::NotConvertible { place: path.to_owned(), reason: reason.to_owned() })
    };
    // Side and number of blocks of each linear.
    let mut sizes = Vec::new();
    for id in adapted::sites(lowering, |kind| !matches!(kind, SiteKind::Norm { .. }))? {
        let path = &lowering.site(id).path;
        let SiteKind::Linear { in_features, out_features, .. } = lowering.site(id).kind else {
            return not_convertible(path, "only the current form has embeddings");
        };
        if !lowering.has(id, OLD) {
            return not_convertible(path, "its file has the current form already");
        }
        let Old { skew, s, on_input } = old_blocks(lowering, &options, id, (in_features, out_features))?;
        if !on_input {
            return not_convertible(path, "its output is rotated (files up to PEFT 0.13), now it is always the input");
        }
        let scale = linalg::values(&lowering.require(id, OLD_SCALE, &[out_features, 1])?)?;
        if scale.iter().any(|scale| *scale != 1.0) {
            return not_convertible(path, "its output is scaled (`oft_s`), which the current form has no tensor for");
        }
        let triangles = linalg::matrix(rotation::upper(&skew, s), (skew.len() / (s * s), s * (s - 1) / 2))?;
        tensors.insert(key_of(path, NEW), triangles.to_dtype(DType::F32)?);
        sizes.push((s, in_features / s));
    }
    let Some(first) = sizes.first().copied() else {
        return not_convertible("target_modules", "the file has no blocks");
    };
    // One of the two fields is given, the other is 0.
    let (r, block_size) = if sizes.iter().all(|(s, _)| *s == first.0) {
        (0, first.0)
    } else if sizes.iter().all(|(_, count)| *count == first.1) {
        (first.1, 0)
    } else {
        return not_convertible("r", "neither the size nor the number of blocks is the same everywhere");
    };
    let config = lowering.config.edited(&[
        ("r", r.into()),
        ("oft_block_size", block_size.into()),
        ("coft", false.into()),
        ("use_cayley_neumann", false.into()),
        ("rank_pattern", Value::Null),
        ("alpha_pattern", Value::Null),
        ("peft_version", Value::Null),
    ])?;
    Ok(AdapterFiles::new(config, tensor_file::write(&tensors)?))
}
