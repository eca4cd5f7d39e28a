//! Entries of the KV cache: keys and values that stand before the context at positions from 0 on; the prompt follows
//! them. Keys are served as they are, without norm or rotation (PEFT 0.21, `PeftModel.get_prompt`).
//!
//! The file's row of entry i is flat: for each layer the keys of all kv heads, then the values. The projection of prefix
//! tuning was applied when the file was saved, and a cartridge's frozen entries are in it.

use super::Kind;
use super::prompt::{PROMPT, check_size, num_virtual_tokens};
use crate::adapter::config::{Config, Rule};
use crate::adapter::lowering::Lowering;
use crate::adapter::{AdapterError, KvPrefix};

/// The row of prefix tuning.
pub(super) const PREFIX_TUNING: Kind = Kind {
    peft_type: "PREFIX_TUNING",
    title: "Prefix tuning",
    served_as: "KV cache entries before the prompt, in blocks that all its requests share",
    merged_as: "nothing to merge",
    shared: &[PROMPT],
    fields: &[
        ("num_virtual_tokens", Rule::Read),
        ("token_dim", Rule::Read),
        ("num_layers", Rule::Read),
        ("num_transformer_submodules", Rule::Read),
        ("num_attention_heads", Rule::Ignored),
        ("encoder_hidden_size", Rule::Ignored),
        ("prefix_projection", Rule::Ignored),
        ("init_weights", Rule::Ignored),
    ],
    check,
    lower,
    ..Kind::PLAIN
};

/// The row of Cartridges.
pub(super) const CARTRIDGE: Kind = Kind {
    peft_type: "CARTRIDGE",
    title: "Cartridge",
    served_as: "as prefix tuning",
    fields: &[
        ("num_virtual_tokens", Rule::Read),
        ("token_dim", Rule::Read),
        ("num_layers", Rule::Read),
        ("num_transformer_submodules", Rule::Read),
        ("num_attention_heads", Rule::Ignored),
        ("num_frozen_tokens", Rule::Ignored),
    ],
    ..PREFIX_TUNING
};

fn check(config: &Config) -> Result<(), AdapterError> {
    for field in ["token_dim", "num_layers"] {
        config.positive(field)?;
    }
    num_virtual_tokens(config).map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let number = num_virtual_tokens(&lowering.config)?;
    let shape = lowering.base.shape();
    check_size(&lowering.config, "num_layers", shape.num_layers)?;
    check_size(&lowering.config, "token_dim", shape.kv_width)?;
    let rows = lowering.require_shared(PROMPT, &[number, shape.num_layers * 2 * shape.kv_width])?;
    let part = |idx: usize| rows.narrow(1, idx * shape.kv_width, shape.kv_width)?.contiguous();
    let layers = (0..shape.num_layers).map(|layer| Ok((part(2 * layer)?, part(2 * layer + 1)?)));
    lowering.out.kv_prefix = Some(KvPrefix { layers: layers.collect::<candle_core::Result<_>>()? });
    Ok(())
}
