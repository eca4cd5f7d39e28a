//! Sparse matrices between the coefficients of two transforms, applied row by row: the transform of the row, the entries,
//! the transform back.

use std::cell::RefCell;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use realfft::num_complex::Complex32;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};

use super::dispatch::{dispatch, fma};
use super::isa::Isa;
use crate::kernels::spectral::{Band, Basis};

/// A matrix (n, k) that is sparse in a basis; see [`Basis`].
pub struct SpectralRows {
    n: usize,
    k: usize,
    form: Form,
}

enum Form {
    Waves(Waves),
    Bands(Bands),
}

/// Between the coefficients of Fourier transforms. Those of real numbers come in conjugate pairs, of which one is kept,
/// and of what the outputs get only the real part counts, so the coefficients of that come in pairs too.
struct Waves {
    forward: Arc<dyn RealToComplex<f32>>,
    inverse: Arc<dyn ComplexToReal<f32>>,
    /// By ascending coefficient of the outputs, then of the inputs.
    entries: Vec<Wave>,
}

/// Adds `re` times the real part of one coefficient to that of another, and `im` times the imaginary one.
struct Wave {
    to: u32,
    from: u32,
    re: f32,
    im: f32,
}

/// Between the coefficients of wavelet transforms.
struct Bands {
    /// Filters of the low and the high band.
    filters: [Vec<f32>; 2],
    inputs: Band,
    outputs: Band,
    /// Sorted by coefficient of the outputs.
    entries: Vec<(u32, u32, f32)>,
}

/// Working memory of a thread.
#[derive(Default)]
struct Scratch {
    row: Vec<f32>,
    from: Vec<Complex32>,
    to: Vec<Complex32>,
    fft: Vec<Complex32>,
    /// Coefficients of inputs and outputs.
    inputs: Vec<f32>,
    outputs: Vec<f32>,
    /// A row's elements with even and with odd numbers.
    even: Vec<f32>,
    odd: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Transforms of one length are one object, tables and all.
static PLANNER: LazyLock<Mutex<RealFftPlanner<f32>>> = LazyLock::new(|| Mutex::new(RealFftPlanner::new()));

impl std::fmt::Debug for SpectralRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SpectralRows(n = {}, k = {})", self.n, self.k)
    }
}

impl SpectralRows {
    /// A matrix (n, k) from its entries: coefficient of the outputs, coefficient of the inputs, value.
    ///
    /// # Panics
    /// When an entry has no place.
    pub fn new(basis: &Basis, (n, k): (usize, usize), mut entries: Vec<(u32, u32, f32)>) -> Self {
        let (rows, columns) = basis.num_coefficients((n, k));
        let fits = |(row, column, _): &(u32, u32, f32)| (*row as usize) < rows && (*column as usize) < columns;
        assert!(entries.iter().all(fits), "every entry has a place");
        entries.sort_by_key(|(row, column, _)| (*row, *column));
        let form = match basis {
            Basis::Fourier => Form::Waves(Waves::new((n, k), &entries)),
            Basis::Wavelet { low, inputs, outputs } => {
                Form::Bands(Bands { filters: Basis::filters(low), inputs: *inputs, outputs: *outputs, entries })
            }
        };
        Self { n, k, form }
    }

    /// Number of outputs.
    pub(super) fn num_outputs(&self) -> usize {
        self.n
    }

    /// `y = S x` for each row of `x` (rows, k); y: (rows, n). A row's bits depend on that row only.
    pub(super) fn multiply(&self, x: &[f32], y: &mut [f32]) {
        SCRATCH.with_borrow_mut(|scratch| {
            for (x, y) in x.chunks_exact(self.k).zip(y.chunks_exact_mut(self.n)) {
                match &self.form {
                    Form::Waves(waves) => waves.multiply(x, scratch, y),
                    Form::Bands(bands) => bands.multiply(x, scratch, y),
                }
            }
        });
    }
}

impl Waves {
    /// From sorted entries.
    fn new((n, k): (usize, usize), entries: &[(u32, u32, f32)]) -> Self {
        let scale = 1.0 / ((n * k) as f64).sqrt();
        let wave = |(u, v, value): &(u32, u32, f32)| {
            let (u, v) = (*u as usize, *v as usize);
            // The planned transform of the inputs turns the other way, so it gives the conjugate of coefficient v, which is
            // coefficient k - v.
            let (from, sign) = if v <= k / 2 { (v, -1.0) } else { (k - v, 1.0) };
            let (to, sign) = if u <= n / 2 { (u, sign) } else { (n - u, -sign) };
            let value = f64::from(*value) * scale;
            // A coefficient that is its own partner is real.
            let (re, im) = if 2 * to % n == 0 { (value, 0.0) } else { (value / 2.0, sign * value / 2.0) };
            Wave { to: to as u32, from: from as u32, re: re as f32, im: im as f32 }
        };
        let mut waves: Vec<Wave> = entries.iter().map(wave).collect();
        waves.sort_by_key(|wave| (wave.to, wave.from));
        waves.dedup_by(|next, kept| {
            let same = (next.to, next.from) == (kept.to, kept.from);
            if same {
                kept.re += next.re;
                kept.im += next.im;
            }
            same
        });
        let mut planner = PLANNER.lock().unwrap_or_else(PoisonError::into_inner);
        Self { forward: planner.plan_fft_forward(k), inverse: planner.plan_fft_inverse(n), entries: waves }
    }

    fn multiply(&self, x: &[f32], scratch: &mut Scratch, y: &mut [f32]) {
        let Scratch { row, from, to, fft, .. } = scratch;
        row.clear();
        row.extend_from_slice(x);
        from.resize(self.forward.complex_len(), Complex32::default());
        fft.resize(self.forward.get_scratch_len().max(self.inverse.get_scratch_len()), Complex32::default());
        let lengths = "the slices have the lengths that were planned";
        self.forward.process_with_scratch(row, from, &mut fft[..self.forward.get_scratch_len()]).expect(lengths);
        to.clear();
        to.resize(self.inverse.complex_len(), Complex32::default());
        for Wave { to: place, from: place_from, re, im } in &self.entries {
            let (sum, value) = (&mut to[*place as usize], from[*place_from as usize]);
            sum.re += re * value.re;
            sum.im += im * value.im;
        }
        // What is not finite must not make the transform refuse what is real by its place.
        to[0].im = 0.0;
        if y.len().is_multiple_of(2) {
            to[y.len() / 2].im = 0.0;
        }
        self.inverse.process_with_scratch(to, y, &mut fft[..self.inverse.get_scratch_len()]).expect(lengths);
    }
}

impl Bands {
    fn multiply(&self, x: &[f32], scratch: &mut Scratch, y: &mut [f32]) {
        let Scratch { inputs, outputs, even, odd, .. } = scratch;
        let taps = self.filters[0].len() / 2;
        split(x, self.inputs.cut, self.inputs.half + taps, (even, odd));
        inputs.clear();
        inputs.resize(2 * self.inputs.half, 0.0);
        for (filter, band) in self.filters.iter().zip(inputs.chunks_exact_mut(self.inputs.half)) {
            analyse(Isa::best(), filter, (even, odd), band);
        }
        outputs.clear();
        outputs.resize(2 * self.outputs.half, 0.0);
        for (row, column, value) in &self.entries {
            outputs[*row as usize] += value * inputs[*column as usize];
        }
        for part in [&mut *even, &mut *odd] {
            part.clear();
            part.resize(self.outputs.half + taps, 0.0);
        }
        for (filter, band) in self.filters.iter().zip(outputs.chunks_exact(self.outputs.half)) {
            synthesise(Isa::best(), filter, band, (even, odd));
        }
        for (at, y) in (self.outputs.cut..).zip(y) {
            *y = if at.is_multiple_of(2) { even[at / 2] } else { odd[at / 2] };
        }
    }
}

/// The elements with even and odd numbers of `cut` zeros and `x`, as many of each as `len`, with zeros behind.
fn split(x: &[f32], cut: usize, len: usize, (even, odd): (&mut Vec<f32>, &mut Vec<f32>)) {
    for part in [&mut *even, &mut *odd] {
        part.clear();
        part.resize(len, 0.0);
    }
    for (at, x) in (cut..).zip(x) {
        if at.is_multiple_of(2) {
            even[at / 2] = *x;
        } else {
            odd[at / 2] = *x;
        }
    }
}

dispatch! {
    /// `band[p] += sum_j filter[2 j] even[p + j] + filter[2 j + 1] odd[p + j]`.
    fn analyse(filter: &[f32], parts: (&[f32], &[f32]), band: &mut [f32]) => analyse_body
}

#[inline(always)]
fn analyse_body<const FMA: bool>(filter: &[f32], (even, odd): (&[f32], &[f32]), band: &mut [f32]) {
    for (tap, [first, second]) in filter.as_chunks::<2>().0.iter().enumerate() {
        for ((sum, even), odd) in band.iter_mut().zip(&even[tap..]).zip(&odd[tap..]) {
            *sum = fma::<FMA>(*second, *odd, fma::<FMA>(*first, *even, *sum));
        }
    }
}

dispatch! {
    /// `even[p + j] += filter[2 j] band[p]`, `odd[p + j] += filter[2 j + 1] band[p]`.
    fn synthesise(filter: &[f32], band: &[f32], parts: (&mut [f32], &mut [f32])) => synthesise_body
}

#[inline(always)]
fn synthesise_body<const FMA: bool>(filter: &[f32], band: &[f32], (even, odd): (&mut [f32], &mut [f32])) {
    for (tap, [first, second]) in filter.as_chunks::<2>().0.iter().enumerate() {
        for ((even, odd), value) in even[tap..].iter_mut().zip(&mut odd[tap..]).zip(band) {
            *even = fma::<FMA>(*first, *value, *even);
            *odd = fma::<FMA>(*second, *value, *odd);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::cpu::testing::random;
    use crate::kernels::spectral::Spectral;

    proptest! {
        #[test]
        fn equals_the_plain_form_and_a_row_has_the_same_bits_alone(
            rows in 1_usize..5, n in 1_usize..70, k in 1_usize..70, count in 1_usize..60, taps in 0_usize..6, seed: u64,
        ) {
            let basis = if taps == 0 {
                Basis::Fourier
            } else {
                let band = |size: usize, seed: u64| {
                    let cut = seed as usize % (2 * taps);
                    Band { half: (size + cut).div_ceil(2).max(taps), cut }
                };
                Basis::Wavelet { low: random(2 * taps, 3).into(), inputs: band(k, seed), outputs: band(n, seed >> 9) }
            };
            let (num_rows, num_columns) = basis.num_coefficients((n, k));
            let values = random(count, seed);
            // Places may coincide.
            let place = |i: usize, of: usize, shift: u32| (seed.rotate_left(shift + 7 * i as u32) % of as u64) as u32;
            let entries: Vec<(u32, u32, f32)> =
                (0..count).map(|i| (place(i, num_rows, 0), place(i, num_columns, 31), values[i])).collect();
            let x = random(rows * k, !seed);
            let matrix = SpectralRows::new(&basis, (n, k), entries.clone());
            let mut y = vec![f32::NAN; rows * n];
            matrix.multiply(&x, &mut y);
            for (row, y) in y.chunks_exact(n).enumerate() {
                let mut alone = vec![f32::NAN; n];
                matrix.multiply(&x[row * k..][..k], &mut alone);
                prop_assert_eq!(y, &alone);
            }
            let index = |of: fn(&(u32, u32, f32)) -> u32| {
                Tensor::from_vec(entries.iter().map(of).collect::<Vec<_>>(), count, &Device::Cpu).expect("entries")
            };
            let values = Tensor::from_vec(values, count, &Device::Cpu).expect("values");
            let (rows_of, columns_of) = (index(|e| e.0), index(|e| e.1));
            let plain = Spectral { basis: &basis, shape: (n, k), rows: &rows_of, columns: &columns_of, values: &values };
            let x = Tensor::from_vec(x, (rows, k), &Device::Cpu).expect("x");
            let expected = plain.apply(&x).expect("the shapes fit").flatten_all().expect("y").to_vec1::<f32>().expect("y");
            for (found, expected) in y.iter().zip(expected) {
                // Sums of up to 60 entries of coefficients that are sums of up to 70 products, in f32.
                prop_assert!((found - expected).abs() < 1e-4, "{found} {expected}");
            }
        }
    }

    #[test]
    fn long_rows_keep_their_precision() {
        let (n, k) = (4864, 896);
        let values = random(300, 1);
        let entries: Vec<(u32, u32, f32)> =
            (0..300).map(|i| (i * 16 + i % 7, i * 2 + i % 3, values[i as usize])).collect();
        let x = random(k, 2);
        let mut y = vec![f32::NAN; n];
        SpectralRows::new(&Basis::Fourier, (n, k), entries.clone()).multiply(&x, &mut y);
        for (t, found) in y.iter().enumerate().step_by(97) {
            let mut expected = 0.0;
            for (u, v, value) in &entries {
                let (u, v) = (*u as usize, *v as usize);
                for (q, x) in x.iter().enumerate() {
                    let turn = ((t * u) % n) as f64 / n as f64 + ((q * v) % k) as f64 / k as f64;
                    expected += f64::from(*value) * f64::from(*x) * (std::f64::consts::TAU * turn).cos();
                }
            }
            expected /= ((n * k) as f64).sqrt();
            assert!((f64::from(*found) - expected).abs() < 2e-6, "{t}: {found} {expected}");
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for (n, k) in [(8, 6), (7, 5)] {
            let entries = (0..n as u32).map(|u| (u, u % k as u32, 1.0)).collect();
            let mut y = vec![0.0; n];
            SpectralRows::new(&Basis::Fourier, (n, k), entries).multiply(&vec![f32::NAN; k], &mut y);
            assert!(y.iter().all(|y| y.is_nan()));
        }
    }
}
