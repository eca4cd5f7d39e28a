//! VB-LoRA: low-rank factors put together from one bank of vectors that all linears share (PEFT 0.21 `tuners/vblora`).
//! Each piece of length v is a mixture of the `topk` vectors with the highest logits, weighted by their softmax; pieces
//! tile A (r, in) along the inputs and B (out, r) along the outputs.
//!
//! A file has all logits, or (`save_only_topk_weights`) the indices of the best and all weights but the last.

use candle_core::{Device, Tensor};

use super::Kind;
use crate::adapter::adapted::{self, AdaptedLinear};
use crate::adapter::config::{Config, Rule, field_error};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::Matcher;
use crate::adapter::{AdapterError, SiteId};

/// The row of the table of kinds.
pub(super) const VBLORA: Kind = Kind {
    peft_type: "VBLORA",
    title: "VB-LoRA",
    served_as: "low-rank delta",
    merged_as: "W + B A, both mixed from the bank",
    suffixes: &[FIRST[0], FIRST[1], FIRST[2], SECOND[0], SECOND[1], SECOND[2]],
    shared: &[BANK],
    integers: &[FIRST[1], SECOND[1]],
    pairs: &[(FIRST[0], SECOND[0]), (FIRST[1], FIRST[2]), (SECOND[1], SECOND[2]), (FIRST[1], SECOND[1])],
    fields: &[
        ("r", Rule::Read),
        ("num_vectors", Rule::Read),
        ("vector_length", Rule::Read),
        ("topk", Rule::Read),
        (ONLY_TOPK, Rule::Read),
        ("bias", Rule::Read),
        ("vblora_dropout", Rule::Ignored),
        ("init_vector_bank_bound", Rule::Ignored),
        ("init_logits_std", Rule::Ignored),
    ],
    rank: |suffix, shape| match shape {
        [r, _, _] if FIRST.contains(&suffix) => Some(*r),
        [_, r, _] if SECOND.contains(&suffix) => Some(*r),
        _ => None,
    },
    check,
    lower,
    ..Kind::PLAIN
};

/// Logits, indices and weights of a factor.
const FIRST: [&str; 3] = ["vblora_logits_A", "vblora_logits_A_topk_indices", "vblora_logits_A_topk_weights"];
const SECOND: [&str; 3] = ["vblora_logits_B", "vblora_logits_B_topk_indices", "vblora_logits_B_topk_weights"];
const BANK: &str = "base_model.vblora_vector_bank";
const ONLY_TOPK: &str = "save_only_topk_weights";

/// What the config says for all linears.
struct Options {
    r: usize,
    num_vectors: usize,
    length: usize,
    topk: usize,
    only_topk: bool,
}

fn check(config: &Config) -> Result<(), AdapterError> {
    Options::parse(config)?;
    Matcher::parse(config, "target_modules").map(drop)
}

impl Options {
    fn parse(config: &Config) -> Result<Self, AdapterError> {
        let number = |name: &str, default: usize| Ok::<_, AdapterError>(config.positive(name)?.unwrap_or(default));
        let options = Self {
            r: number("r", 4)?,
            num_vectors: number("num_vectors", 256)?,
            length: number("vector_length", 256)?,
            topk: number("topk", 2)?,
            only_topk: config.flag(ONLY_TOPK)?,
        };
        if options.topk > options.num_vectors {
            let reason = format!("{} is more than the {} vectors (`num_vectors`)", options.topk, options.num_vectors);
            return Err(field_error("topk", reason));
        }
        Ok(options)
    }
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let options = Options::parse(&lowering.config)?;
    let linears = adapted::linears(lowering)?;
    let expected = [options.num_vectors, options.length];
    if let Some(found) = lowering.shared_shape(BANK)
        && found != expected
    {
        let reason = format!("expected shape {expected:?} (`num_vectors`, `vector_length`), found {found:?}");
        return Err(lowering.refuse_shared(BANK, reason));
    }
    let bank = lowering.require_shared(BANK, &expected)?.to_vec2::<f32>()?;
    let (r, length) = (options.r, options.length);
    for linear in linears {
        let AdaptedLinear { id, in_features: inputs, out_features: outputs } = linear;
        if inputs % length != 0 || outputs % length != 0 {
            let reason = format!("vectors of length {length} do not divide {inputs} inputs and {outputs} outputs");
            return Err(lowering.refuse(id, FIRST[usize::from(options.only_topk)], reason));
        }
        let a = pieces(lowering, id, (FIRST, [r, inputs / length]), &options, &bank)?;
        let b = pieces(lowering, id, (SECOND, [outputs / length, r]), &options, &bank)?;
        let a = a.reshape((r, inputs))?;
        let b = b.reshape((outputs / length, r, length))?.transpose(1, 2)?; // [out / v, v, r]
        let b = b.contiguous()?.reshape((outputs, r))?;
        lowering.ranks.insert(r);
        lowering.add_low_rank(id, a, b)?;
    }
    Ok(())
}

/// The pieces of one factor, (rows * columns, v) in f32.
fn pieces(
    lowering: &mut Lowering<'_>,
    id: SiteId,
    ([logits, indexes, weights], [rows, columns]): ([&str; 3], [usize; 2]),
    options: &Options,
    bank: &[Vec<f32>],
) -> Result<Tensor, AdapterError> {
    let (topk, num_vectors) = (options.topk, options.num_vectors);
    let parts: Box<dyn Iterator<Item = Vec<(usize, f32)>>> = if options.only_topk {
        let chosen = lowering.require_indexes(id, indexes, (&[rows, columns, topk], num_vectors))?;
        let known = if topk > 1 {
            lowering.require(id, weights, &[rows, columns, topk - 1])?.flatten_all()?.to_vec1::<f32>()?
        } else {
            lowering.discard(id, weights);
            Vec::new()
        };
        Box::new((0..rows * columns).map(move |piece| {
            let known = &known[piece * (topk - 1)..][..topk - 1];
            let last = 1.0 - known.iter().sum::<f32>();
            let weights = known.iter().copied().chain([last]);
            chosen[piece * topk..][..topk].iter().copied().zip(weights).collect()
        }))
    } else {
        let all = lowering.require(id, logits, &[rows, columns, num_vectors])?.flatten_all()?.to_vec1::<f32>()?;
        Box::new((0..rows * columns).map(move |piece| best(&all[piece * num_vectors..][..num_vectors], topk)))
    };
    // The file has a few numbers for each piece, however long the pieces are.
    lowering.check_factors(id, options.r)?;
    let mut mixed = vec![0.0f32; rows * columns * options.length];
    for (mixed, parts) in mixed.chunks_mut(options.length).zip(parts) {
        for (vector, weight) in parts {
            mixed.iter_mut().zip(&bank[vector]).for_each(|(sum, value)| *sum += weight * value);
        }
    }
    Ok(Tensor::from_vec(mixed, (rows * columns, options.length), &Device::Cpu)?)
}

/// The `count` highest logits and the softmax over them.
fn best(logits: &[f32], count: usize) -> Vec<(usize, f32)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|x, y| logits[*y].total_cmp(&logits[*x]));
    order.truncate(count);
    let most = order.first().map_or(0.0, |first| logits[*first]);
    let powers: Vec<f32> = order.iter().map(|index| (logits[*index] - most).exp()).collect();
    let sum: f32 = powers.iter().sum();
    order.into_iter().zip(powers).map(|(index, power)| (index, power / sum)).collect()
}
