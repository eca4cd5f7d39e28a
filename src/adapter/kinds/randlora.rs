//! RandLoRA: a sum of products of random bases, scaled by learned diagonals, that reaches full rank (PEFT 0.21
//! `tuners/randlora`). With `m = min(in, out)`, `M = max(in, out)`, `n = ceil(m / r)` bases and `s = alpha / r`:
//!
//! ```text
//! U_A[k n + b, :] = lambda[k, b] A[k, 0, :m] * gamma[b]          (r n, m)
//! U_B[:, b r + k] = B[:M, b, k]                                  (M, n r)
//! y += s U_B (U_A x)  where m = in,  else  y += s U_A^T (U_B^T x)
//! ```
//!
//! The two flattenings order their bases differently; the product pairs them by position, as PEFT does.

use candle_core::{DType, Tensor};

use super::Kind;
use crate::adapter::AdapterError;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;

/// The row of the table of kinds.
pub(super) const RANDLORA: Kind = Kind {
    peft_type: "RANDLORA",
    title: "RandLoRA",
    served_as: "own dense weight; low-rank delta of nearly full rank where the budget has no room for it",
    merged_as: "W + s U_B U_A",
    suffixes: &[LAMBDA, GAMMA, A, B],
    shared: &[SHARED_A, SHARED_B],
    pairs: &[(LAMBDA, GAMMA)],
    fields: &[
        ("r", Rule::Read),
        ("randlora_alpha", Rule::Read),
        ("bias", Rule::Read),
        (SAVED, Rule::Read),
        ("projection_prng_key", Rule::Ignored),
        // These say how the bases were drawn, which are in the file.
        ("sparse", Rule::Ignored),
        ("very_sparse", Rule::Ignored),
        ("init_weights", Rule::Ignored),
        ("randlora_dropout", Rule::Ignored),
    ],
    rank: |suffix, shape| match (suffix, shape) {
        (LAMBDA, [r, _]) => Some(*r),
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

const LAMBDA: &str = "randlora_lambda";
const GAMMA: &str = "randlora_gamma";
const A: &str = "randlora_A";
const B: &str = "randlora_B";
const SHARED_A: &str = "base_model.randlora_A";
const SHARED_B: &str = "base_model.randlora_B";
const SAVED: &str = "save_projection";

fn check(config: &Config) -> Result<(), AdapterError> {
    options(config)?;
    if config.get(SAVED).is_some() && !config.flag(SAVED)? {
        let reason = "the file does not hold the random bases; load it with PEFT and save it with true";
        return Err(field_error(SAVED, reason));
    }
    Matcher::parse(config, "target_modules").map(drop)
}

/// `r` and `s`.
fn options(config: &Config) -> Result<(usize, f64), AdapterError> {
    let r = config.positive("r")?.unwrap_or(32);
    Ok((r, config.number("randlora_alpha")?.unwrap_or(640.0) / r as f64))
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let (r, scale) = options(&lowering.config)?;
    let linears = adapted::linears(lowering)?;
    let sizes = linears
        .iter()
        .map(|linear| (linear.in_features.min(linear.out_features), linear.in_features.max(linear.out_features)));
    let (least, most) = sizes.fold((0, 0), |(m, n), (least, most)| (m.max(least), n.max(most)));
    let bases = least.div_ceil(r);
    let a_fits = |shape: &[usize]| matches!(shape, [n, 1, m] if *n == r && *m >= least);
    let b_fits = |shape: &[usize]| matches!(shape, [m, n, k] if *m >= most && *n >= bases && *k == r);
    let a = bases_of(lowering, SHARED_A, a_fits, &format!("[{r}, 1, {least} or more]"))?;
    let b = bases_of(lowering, SHARED_B, b_fits, &format!("[{most} or more, {bases} or more, {r}]"))?;
    for linear in linears {
        let AdaptedLinear { id, in_features: inputs, out_features: outputs } = linear;
        let (m, n) = (inputs.min(outputs), inputs.max(outputs));
        let bases = m.div_ceil(r);
        // PEFT writes the shared bases once more for every linear.
        for (suffix, shared) in [(A, &a), (B, &b)] {
            let Some(copy) = lowering.take(id, suffix, shared.dims())? else { continue };
            if copy.ne(shared)?.to_dtype(DType::U32)?.max_all()?.to_scalar::<u32>()? != 0 {
                return Err(lowering.refuse(id, suffix, "differs from the bases that all linears share"));
            }
        }
        let lambda = lowering.require(id, LAMBDA, &[r, bases])?;
        let gamma = lowering.require(id, GAMMA, &[bases, m])?;
        lowering.check_factors(id, r * bases)?;
        let up_a = a.narrow(2, 0, m)?.broadcast_mul(&lambda.unsqueeze(2)?)?; // [r, bases, m]
        let up_a = up_a.broadcast_mul(&gamma.unsqueeze(0)?)?.reshape((r * bases, m))?;
        let up_b = b.narrow(0, 0, n)?.narrow(1, 0, bases)?.contiguous()?.reshape((n, bases * r))?;
        let up_b = (up_b * scale)?;
        lowering.ranks.insert(r);
        if m == inputs {
            lowering.add_low_rank(id, up_a, up_b)?;
        } else {
            lowering.add_low_rank(id, up_b.t()?.contiguous()?, up_a.t()?.contiguous()?)?;
        }
    }
    Ok(())
}

/// Takes the bases that all linears share.
fn bases_of(
    lowering: &mut Lowering<'_>,
    name: &str,
    fits: impl Fn(&[usize]) -> bool,
    expected: &str,
) -> Result<Tensor, AdapterError> {
    let shape = lowering.shared_shape(name).unwrap_or_default().to_vec();
    if !shape.is_empty() && !fits(&shape) {
        return Err(lowering.refuse_shared(name, format!("expected shape {expected}, found {shape:?}")));
    }
    lowering.require_shared(name, &shape)
}
