//! Deltas made of entries: as they are, or in a dense weight where that costs less.

use candle_core::{Device, Tensor};

use super::lowering::Lowering;
use super::{AdapterError, Basis, Delta, SiteId, merge};

/// An entry of a sparse matrix costs about as much as this many elements of a dense weight: its index, and a gather.
const ENTRY_COST: usize = 4;

impl Lowering<'_> {
    /// Adds a matrix that is zero but for some entries, each (row, column, value): sparse where that costs less than a
    /// dense weight, or where a dense weight would exceed the budget; otherwise as an own weight.
    pub(super) fn add_sparse(
        &mut self,
        site: SiteId,
        mut entries: Vec<(usize, usize, f32)>,
    ) -> Result<(), AdapterError> {
        entries.sort_unstable_by_key(|(row, column, _)| (*row, *column));
        entries.dedup_by(|next, kept| {
            let same = (next.0, next.1) == (kept.0, kept.1);
            kept.2 += if same { next.2 } else { 0.0 };
            same
        });
        let (rows, columns, values) = entry_tensors(&entries)?;
        let delta = Delta::Sparse { rows, columns, values };
        let reason = "so many entries would cost more than a dense weight";
        self.add_delta(site, delta, (entries.len().saturating_mul(ENTRY_COST), reason))
    }

    /// Adds a matrix (out, in) whose coefficients in a basis are zero but for some entries, each (row, column, value), no
    /// place twice; the transforms cost as much as `cost` elements of a dense weight.
    pub(super) fn add_spectral(
        &mut self,
        site: SiteId,
        (basis, shape): (Basis, (usize, usize)),
        mut entries: Vec<(usize, usize, f32)>,
        cost: usize,
    ) -> Result<(), AdapterError> {
        entries.sort_unstable_by_key(|(row, column, _)| (*row, *column));
        let (rows, columns, values) = entry_tensors(&entries)?;
        let delta = Delta::Spectral { basis, shape, rows, columns, values };
        let reason = "so many coefficients would cost more than a dense weight";
        self.add_delta(site, delta, (entries.len().saturating_mul(ENTRY_COST).saturating_add(cost), reason))
    }

    /// Adds a term that costs as much as `cost` elements of a dense weight: as it is where that is less than the linear's,
    /// or where a dense weight would exceed the budget; otherwise in an own weight, with `reason` for the report.
    pub(super) fn add_delta(
        &mut self,
        site: SiteId,
        delta: Delta,
        (cost, reason): (usize, &'static str),
    ) -> Result<(), AdapterError> {
        if cost <= self.site(site).kind.num_elements() || !self.finds_room(site) {
            self.out.linears.entry(site).or_default().deltas.push(delta);
            return Ok(());
        }
        self.serve_own(site, reason, |weight| {
            let (out_features, in_features) = weight.dims2()?;
            Ok((weight + merge::dense(&delta, out_features, in_features)?)?)
        })
    }
}

/// Rows and columns of entries as 32-bit integers, and their values in f32.
fn entry_tensors(entries: &[(usize, usize, f32)]) -> candle_core::Result<(Tensor, Tensor, Tensor)> {
    let index = |of: fn(&(usize, usize, f32)) -> usize| {
        let indexes: Vec<u32> = entries.iter().map(|entry| of(entry) as u32).collect();
        Tensor::from_vec(indexes, entries.len(), &Device::Cpu)
    };
    let values = entries.iter().map(|entry| entry.2).collect();
    Ok((index(|entry| entry.0)?, index(|entry| entry.1)?, Tensor::from_vec(values, entries.len(), &Device::Cpu)?))
}
