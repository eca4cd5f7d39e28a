//! The table of adapter kinds. A kind is one file here and one row of [`KINDS`].

mod lora;
mod miss;
mod prefix;
mod prompt;
mod ssf;

use super::AdapterError;
use super::config::{Config, Rule};
use super::lowering::Lowering;

/// One kind of adapter.
#[derive(Debug)]
pub struct Kind {
    /// `peft_type` in the config.
    pub peft_type: &'static str,
    /// Its usual name.
    pub title: &'static str,
    /// How it is served when it is not merged.
    pub served_as: &'static str,
    /// The dense weight that merging gives, for a linear with weight W.
    pub merged_as: &'static str,
    /// Key suffixes of its tensors. A key that is one of them as a whole belongs to no module.
    pub(super) suffixes: &'static [&'static str],
    /// Suffixes that occur only together.
    pub(super) pairs: &'static [(&'static str, &'static str)],
    /// Config fields beyond the common ones.
    pub(super) fields: &'static [(&'static str, Rule)],
    /// Rank that a tensor shows, from its suffix and shape.
    pub(super) rank: fn(&str, &[usize]) -> Option<usize>,
    /// Checks what the config alone shows.
    pub(super) check: fn(&Config) -> Result<(), AdapterError>,
    /// Checks the file against config and base model, and lowers it.
    pub(super) lower: fn(&mut Lowering<'_>) -> Result<(), AdapterError>,
}

/// Every kind that can be loaded.
pub static KINDS: &[Kind] = &[
    lora::LORA,
    ssf::SSF,
    miss::MISS,
    miss::BONE,
    prompt::PROMPT_TUNING,
    prompt::P_TUNING,
    prompt::MULTITASK_PROMPT_TUNING,
    prompt::CPT,
    prefix::PREFIX_TUNING,
    prefix::CARTRIDGE,
];

/// The row with this `peft_type`.
pub(super) fn find(peft_type: &str) -> Result<&'static Kind, AdapterError> {
    KINDS.iter().find(|kind| kind.peft_type == peft_type).ok_or_else(|| {
        let known: Vec<&str> = KINDS.iter().map(|kind| kind.peft_type).collect();
        super::config::field_error("peft_type", format!("expected one of {}, found `{peft_type}`", known.join(", ")))
    })
}
