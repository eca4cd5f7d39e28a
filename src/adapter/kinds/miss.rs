//! MiSS and its predecessor Bone: blocks that are shared by all shards of the input. The types differ in name only;
//! what a tensor means follows from its shape, and the config must agree (PEFT 0.21 `tuners/miss`, 0.18 `tuners/bone`).
//!
//! The input is cut into shards of width r, `x = (x_0, ..., x_{n-1})`, the last one padded with zeros.
//! - balance, block (r, out): `y += block^T sum_c x_c`
//! - mini, block (r, q) where q divides out: the same with the columns repeated
//! - bat, block (out/r, r, r): `W'_ac = W_ac + W_ac block_a + block_a` for output block a and input block c

use candle_core::Tensor;
use serde_json::Value;

use super::Kind;
use crate::adapter::config::{Config, Rule};
use crate::adapter::linears::{LinearSite, adapted_linears};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, Delta, Weight};

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
    rank: |_, shape| (shape.len() > 1).then(|| shape[shape.len().min(3) - 2]),
    check,
    lower,
    ..Kind::PLAIN
};

/// The row of Bone.
pub(super) const BONE: Kind = Kind {
    peft_type: "BONE",
    title: "Bone",
    served_as: "as MiSS: balance through the sum of input shards, bat from an own dense weight",
    fields: &[
        ("r", Rule::Read),
        ("init_weights", Rule::Read),
        ("bias", Rule::Read),
        ("mini_r", Rule::Refused("belongs to peft_type MISS")),
    ],
    ..MISS
};

/// Both spellings are read for both types: files were renamed when Bone became MiSS.
const SUFFIXES: [&str; 2] = ["miss_block", "bone_block"];

/// What a block means.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Shards,
    Bat,
}

fn check(config: &Config) -> Result<(), AdapterError> {
    for field in ["r", "mini_r"] {
        config.positive(field)?;
    }
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let mut blocks = Vec::new();
    for linear in adapted_linears(lowering)? {
        let LinearSite { id, inputs, outputs } = linear;
        let first = lowering.kind_suffixes(id).first().and_then(|suffix| SUFFIXES.iter().find(|s| *s == suffix));
        let Some(suffix) = first else { continue };
        let (form, shape) = form(lowering, linear, suffix)?;
        if form == Form::Bat {
            lowering.reserve_own(inputs.saturating_mul(outputs))?;
        }
        blocks.push((id, *suffix, form, shape));
    }
    for (id, suffix, form, shape) in blocks {
        let block = lowering.require(id, suffix, &shape)?;
        match form {
            Form::Shards => {
                lowering.out.linears.entry(id).or_default().deltas.push(Delta::ShardSum { m: block });
            }
            Form::Bat => {
                let weight = bat_weight(&lowering.weight(id)?, &block)?;
                let own = lowering.own(&weight)?;
                *lowering.paths.entry(BAT).or_default() += 1;
                lowering.out.linears.entry(id).or_default().weight = Weight::Own(own);
            }
        }
    }
    Ok(())
}

/// The form that a block's shape shows, checked against `r`, `init_weights` and `mini_r`.
fn form(lowering: &mut Lowering<'_>, linear: LinearSite, suffix: &str) -> Result<(Form, Vec<usize>), AdapterError> {
    let LinearSite { id, inputs: in_features, outputs: out_features } = linear;
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

/// What the report says of a linear of form bat.
const BAT: &str = "have a dense weight of their own, because the form bat fits no other slot";
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
