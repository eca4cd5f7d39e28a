//! C3A: a block-circulant matrix is added (PEFT 0.21 `tuners/c3a`). With blocks of length b, for output block m and input
//! block n,
//!
//! ```text
//! W'[m b + t, n b + j] = W[m b + t, n b + j] + kernel[m, n, (j - t) mod b] / in
//! ```

use candle_core::{Device, Tensor};

use super::Kind;
use crate::adapter::AdapterError;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, as_positive};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::{Matcher, Patterns};

/// The row of the table of kinds.
pub(super) const C3A: Kind = Kind {
    peft_type: "C3A",
    title: "C3A",
    served_as: "own dense weight",
    merged_as: "W + a block-circulant matrix",
    suffixes: &[KERNEL],
    fields: &[
        ("block_size", Rule::Read),
        ("block_size_pattern", Rule::Read),
        ("bias", Rule::Read),
        ("init_weights", Rule::Ignored),
    ],
    check,
    lower,
    ..Kind::PLAIN
};

const KERNEL: &str = "c3a_kernel";
/// PEFT's default of `block_size`.
const DEFAULT_BLOCK: usize = 256;

/// Expressions here need a component before them.
fn patterns(config: &Config) -> Result<Patterns, AdapterError> {
    Patterns::parse_as(config, "block_size_pattern", |key| format!(r"\A(?:.*\.{key}\z)"))
}

fn check(config: &Config) -> Result<(), AdapterError> {
    config.positive("block_size")?;
    patterns(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let default = lowering.config.positive("block_size")?.unwrap_or(DEFAULT_BLOCK);
    let patterns = patterns(&lowering.config)?;
    for AdaptedLinear { id, in_features, out_features } in adapted::linears(lowering)? {
        let path = &lowering.site(id).path;
        let b = patterns.get(path)?.map_or(Ok(default), |value| as_positive("block_size_pattern", value))?;
        if in_features % b != 0 || out_features % b != 0 {
            let reason =
                format!("blocks of {b} (`block_size`) divide {in_features} inputs or {out_features} outputs not");
            return Err(lowering.refuse(id, KERNEL, reason));
        }
        let kernel = lowering.require(id, KERNEL, &[out_features / b, in_features / b, b])?;
        let reason = "a block-circulant matrix has full rank";
        lowering.serve_own(id, reason, |weight| Ok((weight + circulant(&kernel)?)?))?;
    }
    Ok(())
}

/// The matrix (out, in) that a kernel (out / b, in / b, b) stands for, f32.
fn circulant(kernel: &Tensor) -> Result<Tensor, AdapterError> {
    let (m, n, b) = kernel.dims3()?;
    let (rows, columns) = (m * b, n * b);
    let kernel = kernel.flatten_all()?.to_vec1::<f32>()?;
    let entry = |at: usize| {
        let (row, column) = (at / columns, at % columns);
        let block = row / b * n + column / b;
        kernel[block * b + (column % b + b - row % b) % b] / columns as f32
    };
    Ok(Tensor::from_vec((0..rows * columns).map(entry).collect(), (rows, columns), &Device::Cpu)?)
}
