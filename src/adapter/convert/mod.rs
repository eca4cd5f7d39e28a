//! Offline conversion: an adapter's files in another form that has the same effect on the base model.
//!
//! A conversion is exact up to rounding or it is refused; nothing is approximated. What comes out are bytes and tensors:
//! writing them is the caller's.

mod factors;
mod merged;

use candle_core::DType;

use super::{AdapterError, AdapterFiles, BaseWeights, Formats, LowerOptions, kinds, lower};

pub use merged::MergedModel;

/// What to convert an adapter to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// A plain PEFT LoRA, from whatever adds low-rank terms to the weights.
    Lora,
    /// PEFT's MISS, from BONE files and those of the RWKV trainer.
    Miss,
    /// The current OFT file, from those of PEFT 0.14 and 0.15.
    Oft,
    /// A model directory with the adapter merged into the weights.
    Merged,
}

/// A converted adapter.
#[derive(Debug)]
pub enum Converted {
    /// An adapter's two files, and what is odd about the one they were made from.
    Adapter(AdapterFiles, Vec<String>),
    /// What to change in the base model's checkpoint, and what is odd about the adapter.
    Model(MergedModel, Vec<String>),
}

/// Converts an adapter of `base`. `dtype` is the format of the base model's weights, in which merged ones are returned;
/// adapters are converted in f32.
///
/// # Errors
/// Refuses what cannot be loaded, and what has no exact equal in that form.
pub fn convert(
    files: &AdapterFiles,
    base: &dyn BaseWeights,
    form: Form,
    dtype: DType,
) -> Result<Converted, AdapterError> {
    let merge = form == Form::Merged;
    let dtype = if merge { dtype } else { DType::F32 };
    // What is made here lives as long as the conversion; the checkpoint's size bounds it.
    let options = LowerOptions { merge, formats: Formats::uniform(dtype), own_bytes_max: usize::MAX };
    if merge {
        let (lowered, report) = lower::lower(files, base, &options)?;
        return Ok(Converted::Model(merged::merged_model(&lowered, base)?, report.warnings));
    }
    let mut lowering = lower::open(files, base, &options)?;
    let kind = lowering.kind.peft_type;
    let only = |types: &[&str]| match types.contains(&kind) {
        true => Ok(()),
        false => Err(AdapterError::NotConvertible {
            place: "peft_type".to_owned(),
            reason: format!("expected {}, found `{kind}`", types.join(" or ")),
        }),
    };
    let converted = match form {
        Form::Lora => {
            lowering.keep_terms = true;
            lower::run(&mut lowering)?;
            factors::to_lora(&lowering)?
        }
        Form::Miss => only(&["BONE", "MISS"]).and_then(|()| kinds::to_miss(&mut lowering))?,
        Form::Oft => only(&["OFT"]).and_then(|()| kinds::to_current(&mut lowering))?,
        Form::Merged => unreachable!("merged above"),
    };
    let mut warnings = std::mem::take(&mut lowering.warnings);
    // The result must load: what carries over as it is has not been checked yet.
    for warning in lower::lower(&converted, base, &options)?.1.warnings {
        if !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }
    Ok(Converted::Adapter(converted, warnings))
}
