//! Several adapters as one, each with a strength, on the normal form: nothing is merged, and what does not change is shared.
//!
//! The adapters act in the order given, each on what those before it made of the base. For a linear with `y = W x + b`
//! an adapter in normal form is `T(y) = scale (y(pre x) - b + sum_j delta_j(x)) + c`, and at strength `l` it is
//! `y + l (T(y) - y)`: deltas and shifts times `l`, a diagonal `g` becomes `1 + l (g - 1)`. So deltas add up, diagonal
//! scales multiply, and an output scale also scales what earlier adapters added, which is what PEFT computes for a list of
//! active adapters (DoRA among them). What has no exact form in the slots is refused with the names and the module.

mod linear;
mod other;
mod scale;

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Tensor};

use super::{AdapterError, BaseWeights, Formats, LayerSlots, LoweredAdapter, SiteId};

/// One adapter of a composition.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// Name, for messages.
    pub name: &'a str,
    /// Its normal form.
    pub adapter: &'a LoweredAdapter,
    /// Its strength; 1 is the adapter as it is, 0 would be the base.
    pub scale: f32,
}

/// Why two steps have no common form, or a strength no meaning.
pub(super) enum Fault {
    /// The reason, to follow the names of all adapters.
    Refused(String),
    /// A tensor operation failed.
    Compute(candle_core::Error),
}

impl From<candle_core::Error> for Fault {
    fn from(error: candle_core::Error) -> Self {
        Self::Compute(error)
    }
}

pub(super) fn refused<T>(reason: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Refused(reason.into()))
}

/// The adapter that acts as all parts do, one after the other.
///
/// `y_0 = W x + b`, `y_k = y_{k-1} + l_k (T_k(y_{k-1}) - y_{k-1})` at every linear; alike for embeddings. Tensors are in
/// the parts' serving formats; what changes is computed in f32 and stored in `formats`, what does not is shared.
///
/// # Errors
/// `Composition` where the slots cannot hold the result exactly.
pub fn compose(parts: &[Part<'_>], base: &dyn BaseWeights, formats: Formats) -> Result<LoweredAdapter, AdapterError> {
    let composer = Composer { parts, base, formats };
    let mut out = LoweredAdapter::default();
    composer.leading(&mut out).map_err(|fault| composer.error(parts, None, fault))?;
    let sites = |of: fn(&LoweredAdapter) -> Vec<SiteId>| -> BTreeSet<SiteId> {
        parts.iter().flat_map(|part| of(part.adapter)).collect()
    };
    for site in sites(|adapter| adapter.linears.keys().copied().collect()) {
        let slots = composer.at(site, |adapter| adapter.linears.get(&site), linear::linear)?;
        out.linears.insert(site, slots);
    }
    for site in sites(|adapter| adapter.norms.keys().copied().collect()) {
        let norm = composer.at(site, |adapter| adapter.norms.get(&site), other::norm)?;
        out.norms.insert(site, norm);
    }
    for site in sites(|adapter| adapter.embeddings.keys().copied().collect()) {
        let patch = composer.at(site, |adapter| adapter.embeddings.get(&site), other::embedding)?;
        out.embeddings.insert(site, patch);
    }
    out.layers = composer.layers().map_err(|fault| composer.error(parts, None, fault))?;
    Ok(out)
}

/// Bytes of dense weights and tables that [`compose`] makes, beside the parts' own.
pub fn own_bytes_of(parts: &[Part<'_>]) -> usize {
    let changed = parts.iter().filter(|part| part.scale != 1.0);
    changed.map(|part| part.adapter.own_bytes()).sum()
}

/// What the steps of a composition share.
pub(super) struct Composer<'a> {
    parts: &'a [Part<'a>],
    base: &'a dyn BaseWeights,
    formats: Formats,
}

/// A step of a composition at one site: the part, what it has there, its strength.
pub(super) struct Step<'a, T> {
    pub(super) name: &'a str,
    pub(super) slots: &'a T,
    pub(super) strength: f32,
}

impl Composer<'_> {
    /// Composes what the parts have at a site.
    fn at<'p, T: 'p>(
        &'p self,
        site: SiteId,
        of: impl Fn(&'p LoweredAdapter) -> Option<&'p T>,
        compose: impl Fn(&Self, SiteId, &[Step<'p, T>]) -> Result<T, Fault>,
    ) -> Result<T, AdapterError> {
        let concerned: Vec<Part<'_>> = self.parts.iter().filter(|part| of(part.adapter).is_some()).copied().collect();
        let steps: Vec<Step<'_, T>> = self
            .parts
            .iter()
            .filter_map(|part| Some(Step { name: part.name, slots: of(part.adapter)?, strength: part.scale }))
            .collect();
        compose(self, site, &steps).map_err(|fault| self.error(&concerned, Some(site), fault))
    }

    /// What stands before the prompt, and what the adapters wait for.
    fn leading(&self, out: &mut LoweredAdapter) -> Result<(), Fault> {
        let mut waiting = self.parts.iter().map(|part| &part.adapter.invocation_tokens);
        let first = waiting.next().cloned().unwrap_or_default();
        if waiting.any(|tokens| *tokens != first) {
            return refused("they begin to act at different tokens (`alora_invocation_tokens`)");
        }
        out.invocation_tokens = first;
        self.gates(out)?;
        let leads: Vec<_> = self.parts.iter().filter(|part| part.adapter.num_leading() > 0).collect();
        let Some(lead) = leads.first() else { return Ok(()) };
        if leads.len() > 1 {
            return refused(format!("`{}` and `{}` both stand before the prompt", lead.name, leads[1].name));
        }
        if lead.scale != 1.0 {
            return refused(format!("what `{}` puts before the prompt has no strength but 1", lead.name));
        }
        if let Some(patch) = self.parts.iter().find(|part| !part.adapter.embeddings.is_empty()) {
            let (lead, patch) = (lead.name, patch.name);
            return refused(format!("`{lead}` brings embedded tokens or entries, and `{patch}` changes embeddings"));
        }
        out.virtual_tokens.clone_from(&lead.adapter.virtual_tokens);
        out.kv_prefix.clone_from(&lead.adapter.kv_prefix);
        Ok(())
    }

    /// What gives the gates: one adapter's network, at any strength, since its terms alone are weighed by them.
    fn gates(&self, out: &mut LoweredAdapter) -> Result<(), Fault> {
        let mut gated = self.parts.iter().filter(|part| part.adapter.gates.is_some());
        let Some(only) = gated.next() else { return Ok(()) };
        if let Some(other) = gated.next() {
            return refused(format!("`{}` and `{}` both bring a network that gives gates", only.name, other.name));
        }
        if let Some(other) = self.parts.iter().find(|part| part.adapter.num_leading() > 0) {
            let (only, other) = (only.name, other.name);
            return refused(format!(
                "`{only}` takes gates from the bare base, which knows nothing of what `{other}` puts before the prompt"
            ));
        }
        if !out.invocation_tokens.is_empty() {
            return refused(format!("`{}` always acts, and the others wait for tokens", only.name));
        }
        out.gates.clone_from(&only.adapter.gates);
        Ok(())
    }

    /// What acts inside the layers: a function is not linear, so one adapter brings it, as it is.
    fn layers(&self) -> Result<BTreeMap<usize, LayerSlots>, Fault> {
        let mut bringing = self.parts.iter().filter(|part| !part.adapter.layers.is_empty());
        let Some(only) = bringing.next() else { return Ok(BTreeMap::new()) };
        if let Some(other) = bringing.next() {
            return refused(format!("`{}` and `{}` both bring functions inside the layers", only.name, other.name));
        }
        if only.scale != 1.0 {
            return refused(format!(
                "the functions that `{}` brings inside the layers have no strength but 1",
                only.name
            ));
        }
        Ok(only.adapter.layers.clone())
    }

    /// A computed tensor that is no matrix in its final format; one that the format cannot hold is refused.
    pub(super) fn store(&self, tensor: &Tensor) -> Result<Tensor, Fault> {
        Self::store_as(self.formats.values, tensor)
    }

    /// The same for one of the matrices.
    pub(super) fn store_matrix(&self, tensor: &Tensor) -> Result<Tensor, Fault> {
        Self::store_as(self.formats.matrices, tensor)
    }

    fn store_as(format: DType, tensor: &Tensor) -> Result<Tensor, Fault> {
        let stored = tensor.to_dtype(format)?.contiguous()?;
        if super::lower::is_finite(&stored)? {
            return Ok(stored);
        }
        refused(format!("the composed values are not finite in {}", format.as_str()))
    }

    /// `from + strength (to - from)` in the format of `to`, which at strength 1 is returned itself. All have one shape.
    pub(super) fn between(from: &Tensor, to: &Tensor, strength: f32) -> Result<Tensor, Fault> {
        if strength == 1.0 {
            return Ok(to.clone());
        }
        let step = ((to.to_dtype(DType::F32)? - from)? * f64::from(strength))?;
        Self::store_as(to.dtype(), &(from + step)?)
    }

    fn error(&self, parts: &[Part<'_>], site: Option<SiteId>, fault: Fault) -> AdapterError {
        match fault {
            Fault::Compute(error) => AdapterError::Compute(error),
            Fault::Refused(reason) => {
                let names: Vec<String> = parts.iter().map(|part| format!("`{}`", part.name)).collect();
                let place = site.map(|site| format!("`{}`: ", self.base.sites().get(site).path)).unwrap_or_default();
                AdapterError::Composition { adapters: names.join(", "), reason: format!("{place}{reason}") }
            }
        }
    }
}

#[cfg(test)]
mod tests;
