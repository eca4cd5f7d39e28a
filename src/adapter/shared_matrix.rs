//! Matrices that many linears read, of several adapters too: kept once for as long as anybody reads them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use candle_core::{DType, Result, Tensor};
use sha2::{Digest, Sha256};

/// A matrix that never changes, with the digest of its content.
#[derive(Debug)]
pub struct SharedMatrix {
    tensor: Tensor,
    digest: [u8; 32],
}

/// What [`SharedMatrix::kept_once`] has given out.
static MATRICES: WeakTable<[u8; 32], SharedMatrix> = WeakTable::new();

impl SharedMatrix {
    /// From a matrix in host memory, in any float format; it is made contiguous.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn new(tensor: &Tensor) -> Result<Self> {
        /// Values that are hashed at once.
        const CHUNK: usize = 1 << 14;
        let tensor = tensor.contiguous()?;
        let mut hasher = Sha256::new();
        hasher.update(tensor.dtype().as_str());
        tensor.dims().iter().for_each(|size| hasher.update((*size as u64).to_le_bytes()));
        let mut bytes = Vec::with_capacity(CHUNK * size_of::<f32>());
        for values in tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?.chunks(CHUNK) {
            bytes.clear();
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            hasher.update(&bytes);
        }
        Ok(Self { tensor, digest: hasher.finalize().into() })
    }

    /// The matrix that the process keeps of this content: an equal one that somebody holds already, or this one.
    pub fn kept_once(self) -> Arc<Self> {
        let digest = self.digest;
        let kept: std::result::Result<_, std::convert::Infallible> = MATRICES.get_or_make(digest, || Ok(self));
        kept.unwrap_or_else(|never| match never {})
    }

    /// The same content as another tensor, on a device or in the format that is served there.
    pub(crate) fn placed_as(&self, tensor: Tensor) -> Self {
        Self { tensor, digest: self.digest }
    }

    /// The matrix.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// SHA-256 of format, shape and values.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }
}

/// Values by key that are there for as long as somebody else holds them.
#[derive(Debug)]
pub struct WeakTable<K, V> {
    values: Mutex<BTreeMap<K, Weak<V>>>,
}

impl<K: Ord, V> Default for WeakTable<K, V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Ord, V> WeakTable<K, V> {
    /// A table without values.
    pub const fn new() -> Self {
        Self { values: Mutex::new(BTreeMap::new()) }
    }

    /// The value under the key; `make` gives it where nobody holds it. Others wait meanwhile, so it must not ask again.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn get_or_make<E>(
        &self,
        key: K,
        make: impl FnOnce() -> std::result::Result<V, E>,
    ) -> std::result::Result<Arc<V>, E> {
        // A value is complete before it is in the table.
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = values.get(&key).and_then(Weak::upgrade) {
            return Ok(value);
        }
        let value = Arc::new(make()?);
        values.retain(|_, value| value.strong_count() > 0);
        values.insert(key, Arc::downgrade(&value));
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::fake_base::random;

    #[test]
    fn equal_matrices_are_kept_once_and_no_longer_than_they_are_read() {
        let matrix = |seed| SharedMatrix::new(&random(seed, (3, 5))).unwrap().kept_once();
        let (first, other) = (matrix(71), matrix(72));
        assert!(Arc::ptr_eq(&first, &matrix(71)) && !Arc::ptr_eq(&first, &other));
        let wider = SharedMatrix::new(&random(71, (5, 3))).unwrap();
        let half = SharedMatrix::new(&random(71, (3, 5)).to_dtype(DType::BF16).unwrap()).unwrap();
        assert!(wider.digest() != first.digest() && half.digest() != first.digest());
        let gone = Arc::downgrade(&first);
        drop(first);
        assert!(gone.upgrade().is_none());
        assert!(matrix(71).tensor().dims() == [3, 5]);
    }

    #[test]
    fn a_slice_is_the_same_matrix_as_its_copy() {
        let all = random(73, (4, 6));
        let slice = all.narrow(0, 0, 2).unwrap().narrow(1, 0, 3).unwrap();
        let copy = Tensor::new(slice.to_vec2::<f32>().unwrap(), all.device()).unwrap();
        assert_eq!(SharedMatrix::new(&slice).unwrap().digest(), SharedMatrix::new(&copy).unwrap().digest());
    }
}
