//! The table of adapter kinds. A kind is one file here and one row of [`KINDS`].

mod adalora;
mod adaption_prompt;
mod arrow;
mod beft;
mod boft;
mod bottleneck;
mod c3a;
mod deft;
mod delora;
mod flora;
mod fourierft;
mod frod;
mod glora;
mod gralora;
mod hira;
mod hra;
mod ia3;
mod ln_tuning;
mod loha;
mod lokr;
mod lora;
mod miss;
mod oft;
mod osf;
mod peanut;
mod poly;
mod prefix;
mod prompt;
mod randlora;
mod refused;
mod road;
mod scaling;
mod shira;
mod ssf;
mod supertuning;
mod svfit;
mod task;
mod tinylora;
mod trainable_tokens;
mod unilora;
mod vblora;
mod vera;
mod waveft;
mod xlora;

pub use lora::{CombineInput, CombineMode, CombineOptions, combine};
pub(super) use miss::to_miss;
pub(super) use oft::to_current;
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
    /// Whether a config without `peft_type` is of this kind.
    pub(super) claims: fn(&Config) -> bool,
    /// Its usual name.
    pub title: &'static str,
    /// How it is served when it is not merged.
    pub served_as: &'static str,
    /// The dense weight that merging gives, for a linear with weight W.
    pub merged_as: &'static str,
    /// Key suffixes of its tensors.
    pub(super) suffixes: &'static [&'static str],
    /// Tensors that belong to no module in particular: their keys, or how these begin.
    pub(super) shared: &'static [&'static str],
    /// Suffixes and shared names whose tensors hold integers.
    pub(super) integers: &'static [&'static str],
    /// Whether a tensor may have no values.
    pub(super) may_be_empty: bool,
    /// Suffixes that occur only together.
    pub(super) pairs: &'static [(&'static str, &'static str)],
    /// How many adapters a config names that lie in sub-directories beside it, with numbers for names.
    pub(super) parts: fn(&Config) -> Result<usize, AdapterError>,
    /// Config fields beyond the common ones.
    pub(super) fields: &'static [(&'static str, Rule)],
    /// Rank that a tensor shows, from its suffix and shape.
    pub(super) rank: fn(&str, &[usize]) -> Option<usize>,
    /// Whether a config lets tensors show a part of the rank only; the largest is the rank then.
    pub(super) shows_parts: fn(&Config) -> bool,
    /// Checks what the config alone shows.
    pub(super) check: fn(&Config) -> Result<(), AdapterError>,
    /// Checks the file against config and base model, and lowers it.
    pub(super) lower: fn(&mut Lowering<'_>) -> Result<(), AdapterError>,
}

impl Kind {
    /// What a row says where nothing is special; each kind gives its names, its suffixes and `lower`.
    const PLAIN: Self = Self {
        peft_type: "",
        claims: |_| false,
        title: "",
        served_as: "",
        merged_as: "",
        suffixes: &[],
        shared: &[],
        integers: &[],
        may_be_empty: false,
        pairs: &[],
        parts: |_| Ok(0),
        fields: &[],
        rank: |_, _| None,
        shows_parts: |_| false,
        check: |config| Matcher::parse(config, "target_modules").map(drop),
        lower: |_| Ok(()),
    };
}

/// Every kind that can be loaded.
pub static KINDS: &[Kind] = &[
    lora::LORA,
    ssf::SSF,
    miss::MISS,
    miss::BONE,
    ia3::IA3,
    ln_tuning::LN_TUNING,
    trainable_tokens::TRAINABLE_TOKENS,
    beft::BEFT,
    adalora::ADALORA,
    loha::LOHA,
    lokr::LOKR,
    vera::VERA,
    vera::PVERA,
    randlora::RANDLORA,
    delora::DELORA,
    gralora::GRALORA,
    vblora::VBLORA,
    tinylora::TINYLORA,
    unilora::UNILORA,
    poly::POLY,
    flora::FLORA,
    hra::HRA,
    deft::DEFT,
    peanut::PEANUT,
    hira::HIRA,
    glora::GLORA,
    osf::OSF,
    svfit::SVFIT,
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
    prompt::PROMPT_TUNING,
    prompt::P_TUNING,
    prompt::MULTITASK_PROMPT_TUNING,
    prompt::CPT,
    prefix::PREFIX_TUNING,
    prefix::CARTRIDGE,
    arrow::ARROW,
    xlora::XLORA,
    adaption_prompt::ADAPTION_PROMPT,
    bottleneck::BOTTLENECK,
];

/// The row that a config belongs to.
pub(super) fn of(config: &Config) -> Result<&'static Kind, AdapterError> {
    if config.get("peft_type").is_none()
        && let Some(kind) = KINDS.iter().find(|kind| (kind.claims)(config))
    {
        return Ok(kind);
    }
    find(config.peft_type()?)
}

/// The row with this `peft_type`.
fn find(peft_type: &str) -> Result<&'static Kind, AdapterError> {
    KINDS.iter().find(|kind| kind.peft_type == peft_type).ok_or_else(|| {
        if let Some(refused) = REFUSED.iter().find(|refused| refused.peft_type == peft_type) {
            return super::config::field_error("peft_type", format!("`{peft_type}` is not served: {}", refused.reason));
        }
        let known: Vec<&str> = KINDS.iter().map(|kind| kind.peft_type).collect();
        super::config::field_error("peft_type", format!("expected one of {}, found `{peft_type}`", known.join(", ")))
    })
}
