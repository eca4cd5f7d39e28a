//! Composing what several adapters do to one norm or embedding.

use candle_core::{DType, Tensor};

use super::super::{EmbeddingPatch, NormOverride, SiteId};
use super::{Composer, Fault, Step, refused};

/// One adapter's norm at its strength: `base + l (replacement - base)`.
pub(super) fn norm(
    composer: &Composer<'_>,
    site: SiteId,
    steps: &[Step<'_, NormOverride>],
) -> Result<NormOverride, Fault> {
    let [step] = steps else { return refused("more than one of them replaces this norm") };
    let mut out = step.slots.clone();
    if step.strength == 1.0 {
        return Ok(out);
    }
    if let Some(weight) = &mut out.weight {
        *weight = Composer::between(&composer.base.weight(site)?, weight, step.strength)?;
    }
    if let Some(shift) = &mut out.shift {
        let base = composer.base.bias(site)?;
        let base = base.map_or_else(|| Tensor::zeros(shift.shape(), DType::F32, shift.device()), Ok)?;
        *shift = Composer::between(&base, shift, step.strength)?;
    }
    Ok(out)
}

/// `e_k = scale_k (e_{k-1} + b_k a_k[:, token]) + shift_k`, each at its strength, where `e_0` is the base's row.
pub(super) fn embedding(
    composer: &Composer<'_>,
    site: SiteId,
    steps: &[Step<'_, EmbeddingPatch>],
) -> Result<EmbeddingPatch, Fault> {
    let mut out = EmbeddingPatch::default();
    for step in steps {
        composer.replaced_rows(site, &mut out, step)?;
        composer.low_rank_and_scale(&mut out, step)?;
    }
    Ok(out)
}

impl Composer<'_> {
    fn replaced_rows(
        &self,
        site: SiteId,
        out: &mut EmbeddingPatch,
        step: &Step<'_, EmbeddingPatch>,
    ) -> Result<(), Fault> {
        let EmbeddingPatch { table, rows, scale, .. } = step.slots;
        if table.is_none() && rows.is_none() {
            return Ok(());
        }
        if !out.tensors().is_empty() {
            return refused(format!("`{}` replaces rows, so it must be named first, and alone do so", step.name));
        }
        if step.strength == 1.0 {
            (out.table, out.rows) = (table.clone(), rows.clone());
            return Ok(());
        }
        if scale.is_some() || (table.is_some() && rows.is_some()) {
            return refused(format!("`{}` changes rows in several ways, so its strength must be 1", step.name));
        }
        let base = self.base.weight(site)?;
        if let Some(table) = table {
            out.table = Some(Self::between(&base, table, step.strength)?);
        }
        if let Some((tokens, rows)) = rows {
            let from = base.index_select(&Tensor::new(tokens.as_slice(), base.device())?, 0)?;
            out.rows = Some((tokens.clone(), Self::between(&from, rows, step.strength)?));
        }
        Ok(())
    }

    fn low_rank_and_scale(&self, out: &mut EmbeddingPatch, step: &Step<'_, EmbeddingPatch>) -> Result<(), Fault> {
        let EmbeddingPatch { low_rank, scale, shift, .. } = step.slots;
        let strength = step.strength;
        if let Some((a, b)) = low_rank {
            if out.scale.is_some() {
                return refused(format!(
                    "`{}` adds to embeddings that an earlier one scales: name it first",
                    step.name
                ));
            }
            if scale.is_some() && strength != 1.0 {
                return refused(format!(
                    "`{}` adds to embeddings and scales them, so its strength must be 1",
                    step.name
                ));
            }
            let b = if strength == 1.0 { b.clone() } else { self.store(&(wide(b)? * f64::from(strength))?)? };
            out.low_rank = Some(match &out.low_rank {
                None => (a.clone(), b),
                Some((first_a, first_b)) => (Tensor::cat(&[first_a, a], 0)?, Tensor::cat(&[first_b, &b], 1)?),
            });
        }
        if let Some(vector) = scale {
            let now = wide(vector)?.affine(f64::from(strength), f64::from(1.0 - strength))?;
            let times = |earlier: &Option<Tensor>| -> Result<Option<Tensor>, Fault> {
                earlier.as_ref().map(|earlier| self.store(&(wide(earlier)? * &now)?)).transpose()
            };
            let all = times(&out.scale)?;
            out.shift = times(&out.shift)?;
            out.scale = Some(match all {
                Some(all) => all,
                None if strength == 1.0 => vector.clone(),
                None => self.store(&now)?,
            });
        }
        if let Some(vector) = shift {
            out.shift = Some(match &out.shift {
                None if strength == 1.0 => vector.clone(),
                earlier => {
                    let own = (wide(vector)? * f64::from(strength))?;
                    let sum = earlier.as_ref().map_or(Ok(own.clone()), |earlier| wide(earlier)? + own)?;
                    self.store(&sum)?
                }
            });
        }
        Ok(())
    }
}

fn wide(tensor: &Tensor) -> candle_core::Result<Tensor> {
    tensor.to_dtype(DType::F32)
}
