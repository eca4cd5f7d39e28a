//! From files to the normal form.

use super::{AdapterError, AdapterFiles, BaseWeights, LowerOptions, LowerReport, LoweredAdapter};

/// Checks an adapter's files against the base model and lowers them to the normal form.
///
/// # Errors
/// Refuses whatever is not fully understood: see [`AdapterError`].
pub fn lower(
    _files: &AdapterFiles,
    _base: &dyn BaseWeights,
    _options: &LowerOptions,
) -> Result<(LoweredAdapter, LowerReport), AdapterError> {
    unimplemented!()
}

/// SHA-256 over the files' bytes and the options that change the adapter's effect.
pub fn digest(_files: &AdapterFiles, _options: &LowerOptions) -> [u8; 32] {
    unimplemented!()
}
