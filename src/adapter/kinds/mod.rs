//! The table of adapter kinds. A kind is one file here and one row of [`KINDS`].

mod boft;
mod c3a;
mod deft;
mod fourierft;
mod frod;
mod glora;
mod hira;
mod hra;
mod lora;
mod miss;
mod oft;
mod osf;
mod peanut;
mod refused;
mod road;
mod shira;
mod ssf;
mod supertuning;
mod waveft;

pub use refused::{REFUSED, Refused};

use super::AdapterError;
use super::config::{Config, Rule};
use super::lowering::Lowering;
use super::matching::Matcher;

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
    /// Key suffixes of its tensors.
    pub(super) suffixes: &'static [&'static str],
    /// Suffixes that occur only together.
    pub(super) pairs: &'static [(&'static str, &'static str)],
    /// Suffixes and shared names whose tensors hold integers.
    pub(super) integers: &'static [&'static str],
    /// Tensors that all modules share: names directly below `base_model.`, alone or with more components behind.
    pub(super) shared: &'static [&'static str],
    /// Config fields beyond the common ones.
    pub(super) fields: &'static [(&'static str, Rule)],
    /// Rank that a tensor shows, from its suffix and shape.
    pub(super) rank: fn(&str, &[usize]) -> Option<usize>,
    /// Checks what the config alone shows.
    pub(super) check: fn(&Config) -> Result<(), AdapterError>,
    /// Checks the file against config and base model, and lowers it.
    pub(super) lower: fn(&mut Lowering<'_>) -> Result<(), AdapterError>,
}

/// What a kind does not say: no such tensors, no rank, and `target_modules` is all that the config alone shows.
const PLAIN: Kind = Kind {
    peft_type: "",
    title: "",
    served_as: "",
    merged_as: "",
    suffixes: &[],
    pairs: &[],
    integers: &[],
    shared: &[],
    fields: &[],
    rank: |_, _| None,
    check: |config| Matcher::parse(config, "target_modules").map(drop),
    lower: |_| Ok(()),
};

/// Every kind that can be loaded.
pub static KINDS: &[Kind] = &[
    lora::LORA,
    ssf::SSF,
    miss::MISS,
    miss::BONE,
    hra::HRA,
    deft::DEFT,
    peanut::PEANUT,
    hira::HIRA,
    glora::GLORA,
    osf::OSF,
    frod::FROD,
    shira::SHIRA,
    shira::SARA,
    supertuning::SUPERTUNING,
    c3a::C3A,
    fourierft::FOURIERFT,
    waveft::WAVEFT,
    road::ROAD,
    oft::OFT,
    boft::BOFT,
];

/// The row with this `peft_type`.
pub(super) fn find(peft_type: &str) -> Result<&'static Kind, AdapterError> {
    KINDS.iter().find(|kind| kind.peft_type == peft_type).ok_or_else(|| {
        if let Some(refused) = REFUSED.iter().find(|refused| refused.peft_type == peft_type) {
            return super::config::field_error("peft_type", format!("`{peft_type}` is not served: {}", refused.reason));
        }
        let known: Vec<&str> = KINDS.iter().map(|kind| kind.peft_type).collect();
        super::config::field_error("peft_type", format!("expected one of {}, found `{peft_type}`", known.join(", ")))
    })
}
