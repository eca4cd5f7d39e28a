//! The matrix product with packed weights.

use super::isa::Isa;
use super::packed::{PANEL, PackedMatrix, WeightFormat};
use super::tile::{ROWS, TileArgs, tile};
use half::bf16;

/// Words of `k` per block: a block of a panel (128 KiB) stays in the second-level cache while every row uses it.
const BLOCK_STEPS: usize = 512;

/// Base of an output whose columns are written by different threads.
pub(super) struct Output(*mut f32, usize);

#[expect(unsafe_code, reason = "threads share the output's base pointer")]
// SAFETY: every panel writes its own columns only.
unsafe impl Sync for Output {}

impl Output {
    /// An output that its threads share for as long as `y` is borrowed by the caller.
    pub(super) fn new(y: &mut [f32]) -> Self {
        Self(y.as_mut_ptr(), y.len())
    }

    /// The output from row `row` of `n` elements on.
    pub(super) fn at_row(&self, row: usize, n: usize) -> Self {
        assert!(row * n <= self.1, "the row lies in the output");
        Self(self.0.wrapping_add(row * n), self.1 - row * n)
    }

    /// Elements `from..from + len`, which only the calling thread may use.
    #[expect(clippy::mut_from_ref, reason = "threads take disjoint elements")]
    pub(super) fn columns(&self, from: usize, len: usize) -> &mut [f32] {
        assert!(from + len <= self.1, "the columns lie in the output");
        #[expect(unsafe_code, reason = "a slice of the shared output")]
        // SAFETY: in bounds by the assertion; a panel's columns belong to one thread, which takes them once at a time.
        unsafe {
            std::slice::from_raw_parts_mut(self.0.add(from), len)
        }
    }
}

/// Rows of `x` (m, k) as words in `format`.
pub(super) fn to_words(x: &[f32], k: usize, format: WeightFormat) -> Vec<u32> {
    match format {
        WeightFormat::F32 => x.iter().map(|v| v.to_bits()).collect(),
        WeightFormat::Bf16 => x
            .chunks_exact(k)
            .flat_map(|row| row.chunks(2))
            .map(|pair| {
                let bits = |v: f32| u32::from(bf16::from_f32(v).to_bits());
                bits(pair[0]) | pair.get(1).map_or(0, |v| bits(*v)) << 16
            })
            .collect(),
    }
}

/// `m` rows of words times one panel, written to the panel's columns of `output`.
pub(super) fn multiply_panel(x: &[u32], m: usize, w: &PackedMatrix, panel_idx: usize, output: &Output, isa: Isa) {
    let x_stride = w.format().steps(w.k());
    let columns = PANEL.min(w.n() - panel_idx * PANEL);
    assert!(m * w.n() <= output.1, "the rows lie in the output");
    for (block_idx, block) in w.panel(panel_idx).chunks(BLOCK_STEPS * PANEL).enumerate() {
        for row in (0..m).step_by(ROWS) {
            let args = TileArgs {
                x: &x[row * x_stride + block_idx * BLOCK_STEPS..],
                x_stride,
                w: block,
                y: output.0.wrapping_add(row * w.n() + panel_idx * PANEL),
                y_stride: w.n(),
                columns,
                first: block_idx == 0,
            };
            #[expect(unsafe_code, reason = "tiles write through a shared pointer")]
            // SAFETY: rows `row..row + ROWS.min(m - row)` and this panel's columns lie in the output by the
            // assertion above, and no other thread has this panel. `isa` was detected.
            unsafe {
                tile(ROWS.min(m - row), isa, w.format(), args);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rayon::prelude::*;

    use super::*;
    use crate::kernels::cpu::testing::random;

    /// The whole product, panels spread over threads as the linear does.
    fn matmul_packed(x: &[f32], m: usize, w: &PackedMatrix, y: &mut [f32], isa: Isa) {
        assert_eq!(x.len(), m * w.k(), "x is (m, k)");
        assert_eq!(y.len(), m * w.n(), "y is (m, n)");
        let x = to_words(x, w.k(), w.format());
        let panels = w.n().div_ceil(PANEL);
        let threads = rayon::current_num_threads();
        let output = Output::new(y);
        // Each thread takes one contiguous run of panels, so that it reads memory in one forward sweep.
        (0..threads).into_par_iter().for_each(|thread| {
            for panel_idx in thread * panels / threads..(thread + 1) * panels / threads {
                multiply_panel(&x, m, w, panel_idx, &output, isa);
            }
        });
    }

    /// The plain reference: rounds as the kernel does, sums in f64.
    fn reference(x: &[f32], w: &[f32], (m, n, k): (usize, usize, usize), format: WeightFormat) -> Vec<f64> {
        let round = |v: f32| match format {
            WeightFormat::F32 => f64::from(v),
            WeightFormat::Bf16 => bf16::from_f32(v).to_f64(),
        };
        let mut y = vec![0.0; m * n];
        for (row, out) in y.chunks_exact_mut(n).enumerate() {
            for (column, value) in out.iter_mut().enumerate() {
                *value = (0..k).map(|i| round(x[row * k + i]) * round(w[column * k + i])).sum();
            }
        }
        y
    }

    fn pack(w: &[f32], n: usize, k: usize, format: WeightFormat) -> PackedMatrix {
        let rounded: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
        match format {
            WeightFormat::F32 => PackedMatrix::from_f32(n, k, |i| &w[i * k..][..k]),
            WeightFormat::Bf16 => PackedMatrix::from_bf16(n, k, |i| &rounded[i * k..][..k]),
        }
        .expect("memory for a small matrix")
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn product_equals_the_plain_reference(
            m in 1_usize..14, n in 1_usize..150, k in 1_usize..1100, f32_weights: bool, seed: u64,
        ) {
            let format = if f32_weights { WeightFormat::F32 } else { WeightFormat::Bf16 };
            let (x, w) = (random(m * k, seed), random(n * k, !seed));
            let packed = pack(&w, n, k, format);
            let expected = reference(&x, &w, (m, n, k), format);
            for isa in Isa::available() {
                let mut y = vec![f32::NAN; m * n];
                matmul_packed(&x, m, &packed, &mut y, isa);
                for (found, expected) in y.iter().zip(&expected) {
                    // f32 summation of up to 1,100 products in [-1, 1].
                    prop_assert!((f64::from(*found) - expected).abs() < 2e-4, "{isa:?} {found} {expected}");
                }
            }
        }

        #[test]
        fn a_row_has_the_same_bits_alone_and_among_others(
            m in 2_usize..20, n in 1_usize..100, k in 1_usize..1100, f32_weights: bool, seed: u64,
        ) {
            let format = if f32_weights { WeightFormat::F32 } else { WeightFormat::Bf16 };
            let (x, w) = (random(m * k, seed), random(n * k, !seed));
            let packed = pack(&w, n, k, format);
            for isa in Isa::available() {
                let mut together = vec![0.0; m * n];
                matmul_packed(&x, m, &packed, &mut together, isa);
                for (row, expected) in together.chunks_exact(n).enumerate() {
                    let mut alone = vec![0.0; n];
                    matmul_packed(&x[row * k..][..k], 1, &packed, &mut alone, isa);
                    prop_assert_eq!(expected, &alone[..]);
                }
            }
        }
    }

    #[test]
    fn unpacking_gives_the_matrix_back() {
        for format in [WeightFormat::F32, WeightFormat::Bf16] {
            let (n, k) = (70, 33);
            let w: Vec<f32> = random(n * k, 5).iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
            assert_eq!(pack(&w, n, k, format).unpack(), w);
        }
    }
}
