//! Several adapters as one, or one at another strength: composed on demand, kept while it is used.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::StoreError;
use super::catalog::{Shared, Store};
use super::memory::{Bytes, Recipe, RecipePart};
use super::name::parse_reference;
use crate::adapter::{LoadedAdapter, Part, compose, own_bytes_of};

impl Store {
    /// The adapter that acts as all of these (`name` or `name@generation`) do, one after the other, each with its
    /// strength. All must exist; those of strength 0 are not even loaded, and without any other the answer is `None`, the base.
    ///
    /// # Errors
    /// As [`Store::resolve`] for each; `TooManyParts`; `NamedTwice`; a refusal where they cannot act together.
    pub async fn compose(&self, parts: &[(String, f32)]) -> Result<Option<Arc<LoadedAdapter>>, StoreError> {
        let limit = self.shared.config.composition_parts_max;
        if parts.len() > limit {
            return Err(StoreError::TooManyParts { limit });
        }
        let mut active = Vec::with_capacity(parts.len());
        for (name, strength) in parts {
            if *strength == 0.0 {
                let reference = parse_reference(name)?;
                self.shared.find(reference.name, reference.generation).await?;
            } else {
                let adapter = self.resolve(name).await?;
                if active.iter().any(|(other, _): &(Arc<LoadedAdapter>, f32)| is_same(other, &adapter)) {
                    return Err(StoreError::NamedTwice(name.clone()));
                }
                active.push((adapter, *strength));
            }
        }
        match active.as_slice() {
            [] => Ok(None),
            [(adapter, strength)] if *strength == 1.0 => Ok(Some(adapter.clone())),
            _ => self.shared.compose(active).await.map(Some),
        }
    }
}

impl Shared {
    async fn compose(&self, parts: Vec<(Arc<LoadedAdapter>, f32)>) -> Result<Arc<LoadedAdapter>, StoreError> {
        let recipe: Recipe = parts.iter().map(|(adapter, strength)| RecipePart::new(adapter, *strength)).collect();
        if let Some(composition) = self.memory.composition(&recipe) {
            return Ok(composition);
        }
        // One at a time: whoever waits for the same composition finds it then, also when the first has gone away.
        let turn = self.composing.clone().lock_owned().await;
        if let Some(composition) = self.memory.composition(&recipe) {
            return Ok(composition);
        }
        let permit = self.loads.admit().await?;
        let (loader, count_max) = (self.loader.clone(), self.config.compositions_max);
        self.work(permit, move || {
            let _turn = turn;
            let mut reservation = loader.memory.reservation();
            let steps: Vec<Part<'_>> = parts
                .iter()
                .map(|(adapter, scale)| Part { name: &adapter.name, adapter: &adapter.lowered, scale: *scale })
                .collect();
            let own = own_bytes_of(&steps);
            reservation.resize(Bytes { host: own, own })?;
            let lowered = compose(&steps, loader.base.as_ref(), loader.formats)?;
            let host = lowered.bytes_beside(parts.iter().map(|(adapter, _)| &adapter.lowered));
            reservation.resize(Bytes { host, own })?;
            let composition = Arc::new(LoadedAdapter {
                name: name(&parts),
                generation: 0,
                digest: digest(&parts),
                lowered,
                bytes: host,
                parts: parts.into_iter().map(|(adapter, _)| adapter).collect(),
            });
            Ok(reservation.commit_composition(recipe, composition, count_max))
        })
        .await
    }
}

/// Whether both are one generation of one name; two generations may act together.
fn is_same(x: &LoadedAdapter, y: &LoadedAdapter) -> bool {
    (&x.name, x.generation) == (&y.name, y.generation)
}

/// The parts with their strengths, for logs: no adapter can have such a name.
fn name(parts: &[(Arc<LoadedAdapter>, f32)]) -> String {
    let parts: Vec<String> = parts.iter().map(|(adapter, strength)| format!("{}*{strength}", adapter.name)).collect();
    parts.join("+")
}

/// SHA-256 over the parts' digests and strengths, in order.
fn digest(parts: &[(Arc<LoadedAdapter>, f32)]) -> [u8; 32] {
    let mut sha = Sha256::new();
    sha.update("composition");
    for (adapter, strength) in parts {
        sha.update(adapter.digest);
        sha.update(strength.to_le_bytes());
    }
    sha.finalize().into()
}
