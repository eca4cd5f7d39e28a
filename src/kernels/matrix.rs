//! A frozen weight matrix in the form its device multiplies with fastest.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, bail};
use half::bf16;

use super::cpu::{Isa, PackedMatrix, matmul_packed};

/// A frozen weight (n, k) on its device.
#[derive(Clone, Debug)]
pub enum Matrix {
    /// Packed for the CPU's kernels: bf16 stays bf16, every other format becomes f32. Activations are f32.
    Packed(Arc<PackedMatrix>),
    /// As it is, multiplied by candle: other devices, and the plain reference. Activations are of the same dtype.
    Plain(Tensor),
}

impl Matrix {
    /// The form for the device that `w` (n, k) lies on.
    ///
    /// # Errors
    /// When `w` is not a matrix of floats, or memory is short.
    pub fn new(w: &Tensor) -> Result<Self> {
        if !matches!(w.device(), Device::Cpu) {
            return Ok(Self::Plain(w.contiguous()?));
        }
        let (n, k) = w.dims2()?;
        let packed = if w.dtype() == DType::BF16 {
            with_rows::<bf16, _>(w, |data| PackedMatrix::from_bf16(n, k, |row| &data[row * k..][..k]))?
        } else {
            with_rows::<f32, _>(&w.to_dtype(DType::F32)?, |data| {
                PackedMatrix::from_f32(n, k, |row| &data[row * k..][..k])
            })?
        };
        Ok(Self::Packed(Arc::new(packed?)))
    }

    /// (n, k): outputs and inputs.
    pub fn dims(&self) -> (usize, usize) {
        match self {
            Self::Packed(w) => (w.n(), w.k()),
            Self::Plain(w) => (w.dims()[0], w.dims()[1]),
        }
    }

    /// Memory taken.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Packed(w) => w.bytes(),
            Self::Plain(w) => w.elem_count() * w.dtype().size_in_bytes(),
        }
    }

    /// `y = x wᵀ`; x: (m, k), y: (m, n), both f32 for the packed form and of the weight's dtype for the plain one.
    ///
    /// The packed form gives a row of `y` the same bits whatever rows are computed with it.
    ///
    /// # Errors
    /// When shapes, dtypes or devices do not fit.
    pub fn matmul(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Packed(w) => x.contiguous()?.apply_op1_no_bwd(&MatmulPacked(w)),
            Self::Plain(w) => x.matmul(&w.t()?),
        }
    }

    /// Rows of the matrix, `y[i] = w[ids[i]]`; ids: (m) u32, y: (m, k), f32 for the packed form and of the weight's
    /// dtype for the plain one.
    ///
    /// # Errors
    /// When an id is not below n.
    pub fn rows(&self, ids: &[u32], device: &Device) -> Result<Tensor> {
        match self {
            Self::Packed(w) => {
                let mut values = vec![0.0; ids.len() * w.k()];
                for (row, id) in values.chunks_exact_mut(w.k()).zip(ids) {
                    let id = *id as usize;
                    if id >= w.n() {
                        bail!("row {id} of a matrix with {} rows", w.n());
                    }
                    w.read_row(id, row);
                }
                Tensor::from_vec(values, (ids.len(), w.k()), device)
            }
            Self::Plain(w) => w.index_select(&Tensor::new(ids, w.device())?, 0),
        }
    }

    /// The matrix (n, k) in f32 on the CPU, exactly as it is multiplied with.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn to_f32(&self) -> Result<Tensor> {
        match self {
            Self::Packed(w) => Tensor::from_vec(w.unpack(), (w.n(), w.k()), &Device::Cpu),
            Self::Plain(w) => w.to_device(&Device::Cpu)?.to_dtype(DType::F32),
        }
    }
}

/// Calls `f` with the values of a CPU tensor in row-major order.
fn with_rows<T: candle_core::WithDType, R>(w: &Tensor, f: impl FnOnce(&[T]) -> R) -> Result<R> {
    let w = w.contiguous()?;
    let (storage, layout) = w.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else { bail!("the tensor is not on the CPU") };
    let from = layout.start_offset();
    Ok(f(&storage.as_slice::<T>()?[from..from + w.elem_count()]))
}

struct MatmulPacked<'a>(&'a PackedMatrix);

impl CustomOp1 for MatmulPacked<'_> {
    fn name(&self) -> &'static str {
        "matmul_packed"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (m, k) = layout.shape().dims2()?;
        if k != self.0.k() {
            bail!("rows of length {k} times {:?}", self.0);
        }
        let Some((from, to)) = layout.contiguous_offsets() else { bail!("x is not contiguous") };
        let x = &storage.as_slice::<f32>()?[from..to];
        let mut y = vec![0.0; m * self.0.n()];
        matmul_packed(x, m, self.0, &mut y, Isa::best());
        Ok((CpuStorage::F32(y), (m, self.0.n()).into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_product_is_near_the_plain_one() {
        let device = Device::Cpu;
        let w = Tensor::randn(0_f32, 1.0, (70, 33), &device).expect("w");
        let x = Tensor::randn(0_f32, 1.0, (5, 33), &device).expect("x");
        let plain = Matrix::Plain(w.clone()).matmul(&x).expect("plain");
        // Rounding both factors to bf16 moves a sum of 33 products of unit size by less than 0.2.
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 0.02), (DType::BF16, 0.2)] {
            let matrix = Matrix::new(&w.to_dtype(dtype).expect("cast")).expect("pack");
            let difference = (matrix.matmul(&x).expect("product") - &plain).expect("difference");
            let worst = difference.abs().and_then(|d| d.max_all()).and_then(|d| d.to_scalar::<f32>()).expect("max");
            assert!(worst < tolerance, "{dtype:?}: {worst}");
        }
    }

    #[test]
    fn rows_and_the_whole_matrix_are_exact() {
        let w = Tensor::randn(0_f32, 1.0, (130, 9), &Device::Cpu).and_then(|w| w.to_dtype(DType::BF16)).expect("w");
        let matrix = Matrix::new(&w).expect("pack");
        let w: Vec<Vec<f32>> = w.to_dtype(DType::F32).and_then(|w| w.to_vec2()).expect("values");
        assert_eq!(matrix.to_f32().and_then(|w| w.to_vec2::<f32>()).expect("unpacked"), w);
        let rows = matrix.rows(&[129, 0, 64], &Device::Cpu).and_then(|r| r.to_vec2::<f32>()).expect("rows");
        assert_eq!(rows, [w[129].clone(), w[0].clone(), w[64].clone()]);
        assert!(matrix.rows(&[130], &Device::Cpu).is_err());
    }
}
