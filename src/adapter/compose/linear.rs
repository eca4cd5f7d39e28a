//! Composing what several adapters do to one linear.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::super::block_product;
use super::super::merge::{scaled, shared_factors};
use super::super::{BlockMix, Delta, LinearSlots, Pre, Scale, SharedMatrix, SiteId, Weight};
use super::scale::{at_strength, inverse, then};
use super::{Composer, Fault, Step, refused};

/// The slots that act as all steps do, one after the other.
pub(super) fn linear(
    composer: &Composer<'_>,
    site: SiteId,
    steps: &[Step<'_, LinearSlots>],
) -> Result<LinearSlots, Fault> {
    let mut slots = LinearSlots::default();
    for step in steps {
        composer.check_strength(step)?;
        composer.weight(site, &mut slots, step)?;
        composer.pre(&mut slots, step)?;
        let scale = composer.scale_and_deltas(&mut slots, step)?;
        slots.c = composer.c(site, slots.c.as_ref(), step, &scale)?;
    }
    Ok(slots)
}

impl Composer<'_> {
    /// At another strength than 1, the product must change in one way only: two together are no line between the base's
    /// product and the adapter's.
    fn check_strength(&self, step: &Step<'_, LinearSlots>) -> Result<(), Fault> {
        let slots = step.slots;
        let replaced = matches!(slots.weight, Weight::Own(_)) || slots.rows.is_some();
        let ways = [replaced, !matches!(slots.pre, Pre::Identity), !matches!(slots.scale, Scale::One)];
        let several = ways.into_iter().filter(|way| *way).count() > 1;
        let rows_of_own = matches!(slots.weight, Weight::Own(_)) && slots.rows.is_some();
        if step.strength != 1.0 && (several || rows_of_own) {
            return refused(format!("`{}` changes the product in several ways, so its strength must be 1", step.name));
        }
        Ok(())
    }

    /// `W' = W + l (W_t - W)`, for replaced rows as well.
    fn weight(&self, site: SiteId, slots: &mut LinearSlots, step: &Step<'_, LinearSlots>) -> Result<(), Fault> {
        let (weight, rows) = (&step.slots.weight, &step.slots.rows);
        if matches!(weight, Weight::Base) && rows.is_none() {
            return Ok(());
        }
        // Where its weight came from is not known here: it may have scaled what others add.
        if !leaves_product(slots) {
            return refused(format!("`{}` replaces the weight, so it must be named first, and alone do so", step.name));
        }
        if step.strength == 1.0 {
            (slots.weight, slots.rows) = (weight.clone(), rows.clone());
            return Ok(());
        }
        let base = self.base.weight(site)?;
        if let Weight::Own(own) = weight {
            slots.weight = Weight::Own(Self::between(&base, own, step.strength)?);
        }
        if let Some((indexes, rows)) = rows {
            let from = base.index_select(&Tensor::new(indexes.as_slice(), base.device())?, 0)?;
            slots.rows = Some((indexes.clone(), Self::between(&from, rows, step.strength)?));
        }
        Ok(())
    }

    /// The input transform: one, or several diagonal ones multiplied. Deltas read the input as it is, also those of
    /// earlier adapters, which a later transform would have to reach.
    fn pre(&self, slots: &mut LinearSlots, step: &Step<'_, LinearSlots>) -> Result<(), Fault> {
        let (pre, strength) = (&step.slots.pre, step.strength);
        if matches!(pre, Pre::Identity) {
            return Ok(());
        }
        if !slots.deltas.is_empty() {
            let name = step.name;
            return refused(format!(
                "`{name}` transforms the input, so it must be named before what adds to the output"
            ));
        }
        slots.pre = match (&slots.pre, pre) {
            (Pre::Identity, same) if strength == 1.0 => same.clone(),
            (_, Pre::BlockDiag(_) | Pre::Butterfly(_)) if strength != 1.0 => {
                return refused(format!("the input blocks of `{}` have no strength but 1", step.name));
            }
            (Pre::Identity | Pre::Diag(_), Pre::Diag(scale)) => {
                let scale = scale.to_dtype(DType::F32)?.affine(f64::from(strength), f64::from(1.0 - strength))?;
                let scale = match &slots.pre {
                    Pre::Diag(earlier) => (scale * earlier.to_dtype(DType::F32)?)?,
                    Pre::Identity | Pre::BlockDiag(_) | Pre::Butterfly(_) => scale,
                };
                Pre::Diag(self.store(&scale)?)
            }
            _ => return refused(format!("`{}` and an earlier one both transform the input", step.name)),
        };
        Ok(())
    }

    /// Scales multiply. The slot scales all deltas, so a step's own are brought in front of it: times the inverse of the
    /// scales before the step and, at another strength than 1, `scale_l^-1 l scale`. Answers the step's scale.
    fn scale_and_deltas(&self, slots: &mut LinearSlots, step: &Step<'_, LinearSlots>) -> Result<Scale, Fault> {
        let own = at_strength(&step.slots.scale, step.strength)?;
        let running = then(&slots.scale, &own)?;
        if !step.slots.deltas.is_empty() {
            let factor = if step.strength == 1.0 || matches!(own, Scale::One) {
                inverse(&slots.scale)?
            } else {
                then(&step.slots.scale, &inverse(&running)?)?
            };
            for delta in &step.slots.deltas {
                slots.deltas.push(self.delta(delta, step, &factor)?);
            }
        }
        slots.scale = match running {
            Scale::One => Scale::One,
            same if same_tensors(&same, &step.slots.scale) || same_tensors(&same, &slots.scale) => same,
            Scale::Diag(scale) => Scale::Diag(self.store(&scale)?),
            Scale::PairRot { p, q, half } => Scale::PairRot { p: self.store(&p)?, q: self.store(&q)?, half },
            Scale::BlockDiag(blocks) => Scale::BlockDiag(self.store(&blocks)?),
        };
        Ok(own)
    }

    /// The delta times the strength, its outputs scaled by `factor`.
    fn delta(&self, delta: &Delta, step: &Step<'_, LinearSlots>, factor: &Scale) -> Result<Delta, Fault> {
        let plain = matches!(factor, Scale::One);
        if plain && step.strength == 1.0 {
            return Ok(delta.clone());
        }
        let times = |outputs: &Tensor| -> Result<Tensor, Fault> {
            let outputs = outputs.to_dtype(DType::F32)?.contiguous()?;
            self.store_matrix(&(scaled(factor, &outputs)? * f64::from(step.strength))?)
        };
        let stronger = |values: &Tensor| values.to_dtype(DType::F32)? * f64::from(step.strength);
        Ok(match delta {
            Delta::LowRank { a, b } => Delta::LowRank { a: a.clone(), b: times(b)? },
            Delta::ShardSum { m } => {
                // A block that repeats over the outputs is written out where these are scaled apart.
                let repeats = match factor {
                    Scale::One => 1,
                    Scale::Diag(scale) => scale.dim(0)? / m.dim(1)?,
                    Scale::PairRot { p, .. } => p.dim(0)? / m.dim(1)?,
                    Scale::BlockDiag(_) => unreachable!("it has no inverse and no strength"),
                };
                let block = m.repeat((1, repeats))?; // [r, out]
                Delta::ShardSum { m: times(&block.t()?)?.t()?.contiguous()? }
            }
            Delta::Sparse { rows, columns, values } => {
                let factor = match factor {
                    Scale::One => None,
                    Scale::Diag(scale) => Some(scale.index_select(rows, 0)?),
                    Scale::PairRot { .. } | Scale::BlockDiag(_) => {
                        let name = step.name;
                        return refused(format!("an earlier one rotates the entries of `{name}`: name it first"));
                    }
                };
                let values = stronger(values)?;
                let values = factor.map_or(Ok(values.clone()), |factor| values * factor)?;
                Delta::Sparse { rows: rows.clone(), columns: columns.clone(), values: self.store_matrix(&values)? }
            }
            Delta::Routed { a, b, prototypes, top_k, temperature } => Delta::Routed {
                a: a.clone(),
                b: times(b)?,
                prototypes: prototypes.clone(),
                top_k: *top_k,
                temperature: *temperature,
            },
            Delta::Gated { a, b, places } => Delta::Gated { a: a.clone(), b: times(b)?, places: places.clone() },
            Delta::Circulant { kernel } if plain => Delta::Circulant { kernel: self.store(&stronger(kernel)?)? },
            Delta::BlockProduct { a, mix: BlockMix::Matrix(w), b } if plain => {
                let mix = BlockMix::Matrix(self.store(&stronger(w)?)?);
                Delta::BlockProduct { a: a.clone(), mix, b: b.clone() }
            }
            Delta::BlockProduct { a, mix: BlockMix::Exchange, b } if plain => {
                let a = self.store_matrix(&stronger(a)?)?;
                Delta::BlockProduct { a, mix: BlockMix::Exchange, b: b.clone() }
            }
            // Outputs that are scaled apart, or mixed, are no blocks any more.
            Delta::BlockProduct { a, mix, b } => {
                let (down, up) = block_product::factors((a, mix, b.as_ref()))?;
                Delta::LowRank { a: self.store_matrix(&down)?, b: times(&up)? }
            }
            Delta::Spectral { basis, shape, rows, columns, values } if plain => Delta::Spectral {
                basis: basis.clone(),
                shape: *shape,
                rows: rows.clone(),
                columns: columns.clone(),
                values: self.store(&stronger(values)?)?,
            },
            Delta::Circulant { .. } => {
                return refused(format!("circulant blocks cannot be scaled by output: name `{}` first", step.name));
            }
            Delta::Spectral { .. } => {
                return refused(format!("coefficients cannot be scaled by output: name `{}` first", step.name));
            }
            Delta::SharedLowRank { a, b, d, g } => self.shared((a, b), (d, g), step.strength, factor)?,
        })
    }

    /// A delta whose matrices are shared, times the strength, its outputs scaled by `factor`.
    fn shared(
        &self,
        (a, b): (&Arc<SharedMatrix>, &Arc<SharedMatrix>),
        (d, g): (&Tensor, &Tensor),
        strength: f32,
        factor: &Scale,
    ) -> Result<Delta, Fault> {
        let g = match factor {
            Scale::One => g.to_dtype(DType::F32)?,
            Scale::Diag(scale) => (scale * g.to_dtype(DType::F32)?)?,
            // What mixes outputs leaves nothing to share.
            Scale::PairRot { .. } | Scale::BlockDiag(_) => {
                let (a, b) = shared_factors((a, b), (d, g))?;
                let b = (scaled(factor, &b)? * f64::from(strength))?;
                return Ok(Delta::LowRank { a: self.store_matrix(&a)?, b: self.store_matrix(&b)? });
            }
        };
        let g = self.store(&(g * f64::from(strength))?)?;
        Ok(Delta::SharedLowRank { a: a.clone(), b: b.clone(), d: d.clone(), g })
    }

    /// `c = b + l (c_t - b) + scale_l (c' - b)`, where `c'` is what the steps before left.
    fn c(
        &self,
        site: SiteId,
        before: Option<&Tensor>,
        step: &Step<'_, LinearSlots>,
        scale: &Scale,
    ) -> Result<Option<Tensor>, Fault> {
        let (own, before) = match (&step.slots.c, before) {
            (None, None) => return Ok(None),
            (Some(own), None) if step.strength == 1.0 => return Ok(Some(own.clone())),
            (None, Some(before)) if matches!(scale, Scale::One) => return Ok(Some(before.clone())),
            found => found,
        };
        let Some(length) = own.as_ref().or(before).map(|vector| vector.dims()[0]) else { return Ok(None) };
        let bias = match self.base.bias(site)? {
            Some(bias) => bias,
            None => Tensor::zeros(length, DType::F32, &candle_core::Device::Cpu)?,
        };
        let beside = |vector: &Tensor| vector.to_dtype(DType::F32)? - &bias;
        let mut c = bias.clone();
        if let Some(own) = own {
            c = (c + (beside(own)? * f64::from(step.strength))?)?;
        }
        if let Some(before) = before {
            let difference = beside(before)?.unsqueeze(1)?; // [out, 1]
            c = (c + scaled(scale, &difference)?.squeeze(1)?)?;
        }
        Ok(Some(self.store(&c)?))
    }
}

/// Whether the base's product still stands as it is.
fn leaves_product(slots: &LinearSlots) -> bool {
    matches!(slots.weight, Weight::Base)
        && slots.rows.is_none()
        && slots.deltas.is_empty()
        && matches!(slots.pre, Pre::Identity)
        && matches!(slots.scale, Scale::One)
}

/// Whether both are the same tensors, in their final format already.
fn same_tensors(x: &Scale, y: &Scale) -> bool {
    match (x, y) {
        (Scale::Diag(x), Scale::Diag(y)) => x.id() == y.id(),
        (Scale::PairRot { p: x, .. }, Scale::PairRot { p: y, .. }) | (Scale::BlockDiag(x), Scale::BlockDiag(y)) => {
            x.id() == y.id()
        }
        _ => false,
    }
}
