//! Variants of LoRA that store a factor in fewer numbers (PEFT 0.21 `tuners/lora/variants.py`).
//! - QALoRA pools the input in groups of g: `A[:, j] = stored[:, j / g] (in / g) / g`, stored: (r, in / g).
//! - BD-LoRA makes one factor block-diagonal with n blocks: block i of A's rows reads part i of the input, stored:
//!   (r, in / n); or block i of B's rows reads part i of the inner vector, stored: (out, r / n).

use candle_core::{DType, Device, Result, Tensor};
use serde_json::Value;

use crate::adapter::AdapterError;
use crate::adapter::config::{Config, as_positive, as_strings, field_error, wrong_type};

const BLOCKS: &str = "use_bdlora";
const POOLED: &str = "use_qalora";
const GROUP: &str = "qalora_group_size";

/// How factors are stored.
pub(super) enum Storage {
    /// As they are.
    Plain,
    /// A over pooled inputs, in groups of this size.
    Pooled(usize),
    /// One factor in blocks.
    Blocks(Blocks),
}

/// `use_bdlora`.
pub(super) struct Blocks {
    a: Vec<String>,
    b: Vec<String>,
    count: usize,
    strict: bool,
}

/// How the factors of one module are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    /// As they are.
    Plain,
    /// A over inputs that are pooled in groups of this size.
    Pooled(usize),
    /// A in this many blocks.
    BlocksA(usize),
    /// B in this many blocks.
    BlocksB(usize),
}

impl Storage {
    /// Reads the fields of the variants, which PEFT does not combine.
    pub(super) fn parse(config: &Config) -> std::result::Result<Self, AdapterError> {
        let pooled = config.flag(POOLED)?;
        let group = config.positive(GROUP)?.unwrap_or(16);
        let blocks = match config.get(BLOCKS) {
            None | Some(Value::Bool(false)) => None,
            Some(Value::Object(_)) => Some(Blocks::parse(config)?),
            Some(value) => return Err(wrong_type(BLOCKS, "an object", value)),
        };
        match (pooled, blocks) {
            (true, Some(_)) => Err(field_error(BLOCKS, format!("PEFT does not combine it with `{POOLED}`"))),
            (true, None) => Ok(Self::Pooled(group)),
            (false, Some(blocks)) => Ok(Self::Blocks(blocks)),
            (false, None) => Ok(Self::Plain),
        }
    }

    /// Whether a factor may be stored in another form than its own.
    pub(super) fn is_plain(&self) -> bool {
        matches!(self, Self::Plain)
    }

    /// How the factors of the linear at `path` are stored; `r`, `inputs` and `outputs` are its sizes.
    pub(super) fn of(
        &self,
        path: &str,
        r: usize,
        (inputs, outputs): (usize, usize),
    ) -> std::result::Result<Stored, AdapterError> {
        let divides = |field: &str, count: usize, sizes: [usize; 2]| match sizes.iter().find(|size| *size % count != 0)
        {
            Some(size) => Err(field_error(field, format!("{count} does not divide {size} at `{path}`"))),
            None => Ok(()),
        };
        match self {
            Self::Plain => Ok(Stored::Plain),
            Self::Pooled(group) => divides(GROUP, *group, [inputs, inputs]).map(|()| Stored::Pooled(*group)),
            Self::Blocks(Blocks { a, b, count, strict }) => {
                let named = |names: &[String]| names.iter().any(|name| path.contains(name.as_str()));
                match (named(a), named(b)) {
                    (true, true) => Err(field_error(BLOCKS, format!("names `{path}` for both factors"))),
                    (true, false) => divides(BLOCKS, *count, [inputs, r]).map(|()| Stored::BlocksA(*count)),
                    (false, true) => divides(BLOCKS, *count, [outputs, r]).map(|()| Stored::BlocksB(*count)),
                    (false, false) if *strict => Err(field_error(BLOCKS, format!("names no factor of `{path}`"))),
                    (false, false) => Ok(Stored::Plain),
                }
            }
        }
    }
}

impl Blocks {
    fn parse(config: &Config) -> std::result::Result<Self, AdapterError> {
        let (mut a, mut b, mut count, mut strict) = (Vec::new(), Vec::new(), 1, true);
        for (name, value) in config.entries(BLOCKS)? {
            match (name.as_str(), value) {
                ("target_modules_bd_a" | "target_modules_bd_b", Value::Null) => {}
                ("target_modules_bd_a", list) => a = as_strings(BLOCKS, list)?,
                ("target_modules_bd_b", list) => b = as_strings(BLOCKS, list)?,
                ("nblocks", number) => count = as_positive(BLOCKS, number)?,
                ("match_strict", Value::Bool(flag)) => strict = *flag,
                _ => return Err(field_error(BLOCKS, format!("does not know `{name}` with the value {value}"))),
            }
        }
        Ok(Self { a, b, count, strict })
    }
}

impl Stored {
    /// Shape of A in the file.
    pub(super) fn shape_a(self, r: usize, inputs: usize) -> [usize; 2] {
        match self {
            Self::Plain | Self::BlocksB(_) => [r, inputs],
            Self::Pooled(count) | Self::BlocksA(count) => [r, inputs / count],
        }
    }

    /// Shape of B in the file.
    pub(super) fn shape_b(self, r: usize, outputs: usize) -> [usize; 2] {
        match self {
            Self::Plain | Self::Pooled(_) | Self::BlocksA(_) => [outputs, r],
            Self::BlocksB(count) => [outputs, r / count],
        }
    }

    /// The factors A (r, in) and B (out, r) from those in the file; all f32.
    pub(super) fn expand(self, a: Tensor, b: Tensor) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Plain => Ok((a, b)),
            Self::Pooled(group) => {
                let (r, groups) = a.dims2()?;
                let repeated = a.unsqueeze(2)?.repeat((1, 1, group))?.reshape((r, groups * group))?;
                Ok(((repeated * (groups as f64 / group as f64))?, b))
            }
            Self::BlocksA(count) => Ok((block_diagonal(&a, count)?, b)),
            Self::BlocksB(count) => Ok((a, block_diagonal(&b, count)?)),
        }
    }
}

/// The matrix (m, n count) with `count` blocks of rows of `stored` (m, n) on its diagonal, f32.
fn block_diagonal(stored: &Tensor, count: usize) -> Result<Tensor> {
    let (m, n) = stored.dims2()?;
    let rows = m / count;
    let zeros = |columns: usize| Tensor::zeros((rows, columns), DType::F32, &Device::Cpu);
    let mut blocks = Vec::with_capacity(count);
    for block in 0..count {
        let own = stored.narrow(0, block * rows, rows)?;
        let (before, after) = (block * n, (count - 1 - block) * n);
        let mut parts = Vec::new();
        if before > 0 {
            parts.push(zeros(before)?);
        }
        parts.push(own);
        if after > 0 {
            parts.push(zeros(after)?);
        }
        blocks.push(Tensor::cat(&parts, 1)?);
    }
    Tensor::cat(&blocks, 0)
}
