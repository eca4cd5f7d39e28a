//! MiSS and its predecessor Bone: blocks that are shared by all shards of the input. The types differ in name only;
//! what a tensor means follows from its shape, and the config must agree (PEFT 0.21 `tuners/miss`, 0.18 `tuners/bone`).
//!
//! The input is cut into shards of width r, `x = (x_0, ..., x_{n-1})`, the last one padded with zeros.
//! - balance, block (r, out): `y += block^T sum_c x_c`
//! - mini, block (r, q) where q divides out: the same with the columns repeated
//! - bat, block (out/r, r, r): `W'_ac = W_ac + W_ac block_a + block_a` for output block a and input block c
//! - row, block (in/r, r, r): `W'_ac = W_ac + W_ac block_c + block_c`, only in files of the RWKV trainer
//!
//! The RWKV trainer names its tensors `bone`, later `disha`, and has no PEFT config; with one of type BONE beside them
//! its files are served too. Its three-dimensional blocks are of form row, unless `bone_layout` is `col`; there is also
//! an oldest form (out, r), which is bat with its blocks one below the other.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde_json::Value;

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::keys::key_of;
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, AdapterFiles, Delta, Pre, tensor_file};

/// The row of MiSS.
pub(super) const MISS: Kind = Kind {
    peft_type: "MISS",
    title: "MiSS",
    served_as: "sum of input shards through one block (balance, mini); own dense weight (bat)",
    merged_as: "W + block^T on every shard (balance, mini); W + W block + block per block (bat)",
    suffixes: &SUFFIXES,
    fields: &[
        ("r", Rule::Read),
        ("init_weights", Rule::Read),
        ("mini_r", Rule::Read),
        ("bias", Rule::Read),
        ("miss_dropout", Rule::Ignored),
    ],
    rank: |suffix, shape| match (suffix, shape) {
        (_, [_, r, _]) => Some(*r),
        // The trainer's oldest form has r last; r is the smaller one.
        ("bone" | "disha", [rows, columns]) => Some(*rows.min(columns)),
        (_, [r, _]) => Some(*r),
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

/// The row of Bone.
pub(super) const BONE: Kind = Kind {
    peft_type: "BONE",
    title: "Bone",
    served_as: "as MiSS; row as blocks that multiply the input and a low-rank delta",
    merged_as: "as MiSS; W + W block + block per input block (row)",
    suffixes: &["miss_block", "bone_block", NATIVE[0], NATIVE[1]],
    fields: &[
        ("r", Rule::Read),
        ("init_weights", Rule::Read),
        ("bias", Rule::Read),
        ("mini_r", Rule::Refused("belongs to peft_type MISS")),
        ("bone_layout", Rule::Read),
    ],
    ..MISS
};

/// Both spellings are read for both types: files were renamed when Bone became MiSS.
const SUFFIXES: [&str; 2] = ["miss_block", "bone_block"];

/// The RWKV trainer's spellings.
const NATIVE: [&str; 2] = ["bone", "disha"];

/// What a block means.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Shards,
    Bat,
    Row,
}

fn check(config: &Config) -> Result<(), AdapterError> {
    for field in ["r", "mini_r"] {
        config.positive(field)?;
    }
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    for Found { linear, suffix, form, shape } in find_blocks(lowering)? {
        let id = linear.id;
        let block = lowering.require(id, suffix, &shape)?;
        match form {
            Form::Shards => {
                lowering.out.linears.entry(id).or_default().deltas.push(Delta::ShardSum { m: block });
            }
            Form::Row => row(lowering, linear, &block)?,
            Form::Bat => {
                let block = if block.rank() == 2 { by_output(&block)? } else { block };
                let reason = "the blocks of form bat multiply the weight by output block";
                lowering.serve_own(id, reason, |weight| bat_weight(&weight, &block))?;
            }
        }
    }
    Ok(())
}

/// A linear's block.
struct Found {
    linear: AdaptedLinear,
    suffix: &'static str,
    form: Form,
    shape: Vec<usize>,
}

/// The blocks of all linears, with their forms.
fn find_blocks(lowering: &mut Lowering<'_>) -> Result<Vec<Found>, AdapterError> {
    let mut blocks = Vec::new();
    for linear in adapted::linears(lowering)? {
        let mut known = SUFFIXES.iter().chain(&NATIVE);
        let Some(suffix) = lowering.kind_suffixes(linear.id).first().and_then(|suffix| known.find(|s| *s == suffix))
        else {
            continue;
        };
        let form = if NATIVE.contains(suffix) { native_form } else { form };
        let (form, shape) = form(lowering, linear, suffix)?;
        blocks.push(Found { linear, suffix, form, shape });
    }
    Ok(blocks)
}

/// The same adapter as a file of PEFT's type MISS: its spelling, and blocks of form bat in three dimensions.
pub(in crate::adapter) fn to_miss(lowering: &mut Lowering<'_>) -> Result<AdapterFiles, AdapterError> {
    let mut tensors: BTreeMap<String, Tensor> = lowering.other_tensors()?.into_iter().collect();
    let blocks = find_blocks(lowering)?;
    let not_convertible = |place: &str, reason: &str| {
        Err(AdapterError::NotConvertible { place: place.to_owned(), reason: reason.to_owned() })
    };
    let Some(first) = blocks.first().map(|found| found.form) else {
        return not_convertible("target_modules", "the file has no blocks");
    };
    for Found { linear, suffix, form, shape } in blocks {
        let path = &lowering.site(linear.id).path;
        if form == Form::Row {
            return not_convertible(path, "a block for each input block (form row) is none of MISS's forms");
        }
        if form != first {
            return not_convertible(path, "its block is of another form than those before, and MISS has one for all");
        }
        let block = lowering.require(linear.id, suffix, &shape)?;
        let block = if form == Form::Bat && block.rank() == 2 { by_output(&block)? } else { block };
        tensors.insert(key_of(path, SUFFIXES[0]), block);
    }
    let mode = match (first, lowering.config.get("init_weights")) {
        (Form::Bat, _) => Value::from("bat"),
        (Form::Shards | Form::Row, Some(mode)) => mode.clone(),
        (Form::Shards | Form::Row, None) => Value::from(true),
    };
    let mut changes = vec![("peft_type", "MISS".into()), ("init_weights", mode)];
    changes.extend([("bone_layout", Value::Null), ("peft_version", Value::Null)]);
    if lowering.config.get("r").is_none() {
        changes.push(("r", DEFAULT_R.into()));
    }
    if lowering.config.string("bias")? == Some("bone_only") {
        changes.push(("bias", "miss_only".into()));
    }
    Ok(AdapterFiles::new(lowering.config.edited(&changes)?, tensor_file::write(&tensors)?))
}

/// The form that a block's shape shows, checked against `r`, `init_weights` and `mini_r`.
fn form(
    lowering: &mut Lowering<'_>,
    AdaptedLinear { id, in_features, out_features }: AdaptedLinear,
    suffix: &str,
) -> Result<(Form, Vec<usize>), AdapterError> {
    let shape = lowering.shape(id, suffix).unwrap_or_default().to_vec();
    let refuse = |reason: String| Err(lowering.refuse(id, suffix, reason));
    let form = match *shape.as_slice() {
        [_, columns] if out_features % columns == 0 => Form::Shards,
        [n, r, columns] if r == columns && n.checked_mul(r) == Some(out_features) && in_features % r == 0 => Form::Bat,
        _ => {
            return refuse(format!(
                "shape {shape:?} is no block for {in_features} inputs and {out_features} outputs: expected \
                 [r, {out_features}], [r, a divisor of {out_features}] or [{out_features} / r, r, r]"
            ));
        }
    };
    let r = shape[shape.len() - 2];
    let config_r = lowering.config.positive("r")?.unwrap_or(DEFAULT_R);
    if r != config_r {
        return refuse(format!("expected rank {config_r} (field `r`), found {r}"));
    }
    if r > in_features {
        return refuse(format!("rank {r} is larger than the {in_features} inputs"));
    }
    if let Some(reason) = disagreement(lowering, form, &shape, out_features)? {
        return refuse(reason);
    }
    lowering.ranks.insert(r);
    if form == Form::Bat && lowering.config.get("init_weights") != Some(&Value::from("bat")) {
        let warning = "blocks of form bat although `init_weights` is not `bat`, as pre-release Bone wrote them";
        if !lowering.warnings.iter().any(|known| known == warning) {
            lowering.warnings.push(warning.to_owned());
        }
    }
    Ok((form, shape))
}

/// The form of a block of the RWKV trainer, whose config is the user's.
fn native_form(
    lowering: &mut Lowering<'_>,
    AdaptedLinear { id, in_features, out_features }: AdaptedLinear,
    suffix: &str,
) -> Result<(Form, Vec<usize>), AdapterError> {
    let by_output = match lowering.config.string("bone_layout")? {
        None | Some("row") => false,
        Some("col") => true,
        Some(other) => return Err(field_error("bone_layout", format!("expected `row` or `col`, found `{other}`"))),
    };
    let shape = lowering.shape(id, suffix).unwrap_or_default().to_vec();
    let tiles = |r: usize| in_features % r == 0 && out_features % r == 0;
    let (form, r) = match *shape.as_slice() {
        [n, r, columns] if r == columns && tiles(r) && !by_output && n == in_features / r => (Form::Row, r),
        [n, r, columns] if r == columns && tiles(r) && by_output && n == out_features / r => (Form::Bat, r),
        [r, columns] if columns == out_features && r <= in_features => (Form::Shards, r),
        [rows, r] if rows == out_features && tiles(r) => (Form::Bat, r),
        _ => {
            let reason = format!(
                "shape {shape:?} is no block for {in_features} inputs and {out_features} outputs: expected \
                 [{in_features} / r, r, r], [r, {out_features}] or [{out_features}, r]"
            );
            return Err(lowering.refuse(id, suffix, reason));
        }
    };
    let config_r = lowering.config.positive("r")?.unwrap_or(DEFAULT_R);
    if r != config_r {
        return Err(lowering.refuse(id, suffix, format!("expected rank {config_r} (field `r`), found {r}")));
    }
    lowering.ranks.insert(r);
    Ok((form, shape))
}

/// Blocks one below the other (out, r) as (out / r, r, r).
fn by_output(block: &Tensor) -> Result<Tensor, AdapterError> {
    let (out_features, r) = block.dims2()?;
    Ok(block.reshape((out_features / r, r, r))?)
}

/// `y_a = sum_c W_ac (x_c + B_c x_c) + sum_c B_c x_c`: the blocks multiply the input, and what they add to it is summed
/// and added to every output block. block: (in / r, r, r).
fn row(lowering: &mut Lowering<'_>, linear: AdaptedLinear, block: &Tensor) -> Result<(), AdapterError> {
    let AdaptedLinear { id, in_features, out_features } = linear;
    let (_, r, _) = block.dims3()?;
    let eye = Tensor::eye(r, block.dtype(), block.device())?;
    let pre = block.transpose(1, 2)?.broadcast_add(&eye)?.contiguous()?;
    let a = block.transpose(0, 1)?.reshape((r, in_features))?;
    let slots = lowering.out.linears.entry(id).or_default();
    slots.pre = Pre::BlockDiag(pre);
    slots.deltas.push(Delta::LowRank { a, b: eye.repeat((out_features / r, 1))? });
    Ok(())
}

/// PEFT's default of `r`.
const DEFAULT_R: usize = 64;

/// What in the config contradicts the form.
fn disagreement(
    lowering: &Lowering<'_>,
    form: Form,
    shape: &[usize],
    out_features: usize,
) -> Result<Option<String>, AdapterError> {
    let columns = shape[shape.len() - 1];
    let mini_r = lowering.config.positive("mini_r")?.unwrap_or(1);
    Ok(match (lowering.config.get("init_weights"), form) {
        (_, Form::Row) => None,
        (Some(Value::String(mode)), Form::Bat) if mode == "bat" => None,
        (Some(Value::Bool(_)) | None, Form::Bat) => None,
        (Some(Value::String(mode)), Form::Shards) if mode == "mini" && lowering.kind.peft_type == "MISS" => {
            (columns != mini_r).then(|| format!("expected {mini_r} columns (field `mini_r`), found {columns}"))
        }
        (Some(Value::Bool(_)) | None, Form::Shards) => (columns != out_features)
            .then(|| format!("expected {out_features} columns, found {columns}; only the form mini has fewer")),
        (Some(mode), _) => Some(format!("shape {shape:?} contradicts `init_weights`, which is {mode}")),
    })
}

/// `W'_ac = W_ac + W_ac B_a + B_a`, a: output block, c: input block. weight: (out, in) f32, block: (out/r, r, r) f32;
/// result: (out, in) f32. PEFT 0.21 `MissLinear.get_delta_weight`.
fn bat_weight(weight: &Tensor, block: &Tensor) -> Result<Tensor, AdapterError> {
    let (out_features, in_features) = weight.dims2()?;
    let (n, r, _) = block.dims3()?;
    let shards = in_features / r;
    let product = weight.reshape((n, r * shards, r))?.matmul(block)?; // [out/r, r * in/r, r]
    let product = product.reshape((out_features, in_features))?;
    let repeated = block.reshape((out_features, r))?.repeat((1, shards))?; // [out, in]
    Ok(((weight + product)? + repeated)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::fake_base::random;

    #[test]
    fn bat_equals_the_formula_block_by_block() {
        let (weight, block) = (random(1, (6, 9)), random(2, (2, 3, 3)));
        let found = bat_weight(&weight, &block).unwrap();
        let (w, b) = (weight.to_vec2::<f32>().unwrap(), block.to_vec3::<f32>().unwrap());
        for (row, found) in found.to_vec2::<f32>().unwrap().iter().enumerate() {
            for (col, found) in found.iter().enumerate() {
                let (a, j, c, k) = (row / 3, row % 3, col / 3, col % 3);
                let product: f32 = (0..3).map(|l| w[row][c * 3 + l] * b[a][l][k]).sum();
                assert!((found - (w[row][col] + product + b[a][j][k])).abs() < 1e-5);
            }
        }
    }
}
