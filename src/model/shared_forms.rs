//! The forms on the device of matrices that adapters share: made once for as long as an adapter there reads them.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::device_adapter::{host, pack_as};
use crate::adapter::{Delta, LinearSlots, SharedMatrix, WeakTable};
use crate::kernels::cpu::{JointLowRank, PackedMatrix, WeightFormat};

/// A matrix by its digest, and the format that it is packed in.
type Key = ([u8; 32], WeightFormat);

/// All that adapters on the device of a model read.
#[derive(Debug, Default)]
pub(super) struct SharedForms {
    tensors: WeakTable<[u8; 32], SharedMatrix>,
    packed: WeakTable<Key, PackedMatrix>,
}

/// Those that one adapter reads packed.
#[derive(Default)]
pub(super) struct PackedForms {
    matrices: HashMap<Key, Arc<PackedMatrix>>,
}

impl SharedForms {
    /// The matrix as a tensor; `place` brings a tensor to the device, in the format that serves.
    pub(super) fn tensor(
        &self,
        matrix: &SharedMatrix,
        place: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Arc<SharedMatrix>> {
        self.tensors.get_or_make(matrix.digest(), || Ok(matrix.placed_as(place(matrix.tensor())?)))
    }

    /// What these linears read packed, each with the format of its base weight. Packing uses several threads, so it is
    /// not for those that already share work.
    pub(super) fn packed<'a>(
        &self,
        linears: impl Iterator<Item = (&'a LinearSlots, WeightFormat)>,
    ) -> Result<PackedForms> {
        let mut forms = PackedForms::default();
        for (slots, format) in linears {
            for delta in &slots.deltas {
                let Delta::SharedLowRank { a, b, .. } = delta else { continue };
                for matrix in [a, b] {
                    let key = (matrix.digest(), format);
                    let packed = self.packed.get_or_make(key, || pack_as(matrix.tensor(), format))?;
                    forms.matrices.insert(key, packed);
                }
            }
        }
        Ok(forms)
    }
}

impl PackedForms {
    /// The term `g * (b (d * (a x)))` of a linear that [`SharedForms::packed`] was given.
    ///
    /// # Panics
    /// When it was not.
    pub(super) fn term(
        &self,
        (a, b): (&SharedMatrix, &SharedMatrix),
        (d, g): (&Tensor, &Tensor),
        format: WeightFormat,
    ) -> Result<JointLowRank> {
        let packed = |matrix: &SharedMatrix| self.matrices[&(matrix.digest(), format)].clone();
        Ok(JointLowRank { a: packed(a), b: packed(b), d: host(d)?, g: host(g)? })
    }
}
