//! Vectors with a number for each output, which adapters multiply with and add.

use std::ops::Range;

use super::memory::Memory;
use super::packed::WeightFormat;
use super::tile::Fetch;
use super::words::bf16_bits;

/// A vector (n) in the CPU's form.
#[derive(Clone, Debug)]
pub struct PackedVector(Form);

#[derive(Clone, Debug)]
enum Form {
    F32(Memory<f32>),
    /// Bits of bf16.
    Differences(Memory<u16>),
}

/// Some columns of a vector.
#[derive(Clone, Copy)]
pub(super) enum Columns<'a> {
    /// Its numbers.
    F32(&'a [f32]),
    /// How far they are from what takes their place where there is no adapter, in bits of bf16.
    Differences(&'a [u16]),
}

impl Columns<'_> {
    /// Nothing.
    pub(super) const NONE: Self = Self::F32(&[]);
}

impl PackedVector {
    /// The numbers as they are.
    fn exact(values: &[f32]) -> Self {
        Self(Form::F32(Memory::copy_of(values)))
    }

    /// Factors. With `Bf16` their differences from one are kept, rounded: these are what adapters learn, and of a factor of about
    /// one bf16 would leave little of them. Factors stay as they are if one of them would lose more than by being rounded
    /// itself, as those near zero do.
    pub fn factors(format: WeightFormat, values: &[f32]) -> Self {
        let near = Self::differences(format, values, |_| 1.0);
        let keeps = |(bits, value): (&u16, &f32)| (1.0 + widened(*bits) - value).abs() <= value.abs() / 256.0;
        match &near.0 {
            Form::Differences(bits) if !bits.iter().zip(values).all(keeps) => Self::exact(values),
            _ => near,
        }
    }

    /// What is added in the place of `bias`, which is as long or, for zeros, empty; with `Bf16` the difference is kept, rounded.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn added(format: WeightFormat, values: &[f32], bias: &[f32]) -> Self {
        assert!(bias.is_empty() || bias.len() == values.len(), "a bias for each output");
        Self::differences(format, values, |idx| bias.get(idx).copied().unwrap_or(0.0))
    }

    fn differences(format: WeightFormat, values: &[f32], from: impl Fn(usize) -> f32) -> Self {
        match format {
            WeightFormat::F32 => Self::exact(values),
            WeightFormat::Bf16 => {
                let mut bits = Memory::zeros(values.len()).expect("memory for an adapter");
                for (idx, (bits, value)) in bits.iter_mut().zip(values).enumerate() {
                    *bits = bf16_bits(value - from(idx)) as u16;
                }
                Self(Form::Differences(bits))
            }
        }
    }

    /// The columns from `first` on.
    pub(super) fn columns(&self, first: usize) -> Columns<'_> {
        match &self.0 {
            Form::F32(values) => Columns::F32(&values[first..]),
            Form::Differences(bits) => Columns::Differences(&bits[first..]),
        }
    }

    /// Those of its columns that are there, to be fetched.
    pub(super) fn ahead(&self, columns: Range<usize>) -> Fetch {
        match &self.0 {
            Form::F32(values) => Fetch::of_part(values, columns),
            Form::Differences(bits) => Fetch::of_part(bits, columns),
        }
    }

    /// Its numbers, where `neutral` are those without an adapter.
    #[cfg(test)]
    pub(super) fn value(&self, idx: usize, neutral: f32) -> f32 {
        match &self.0 {
            Form::F32(values) => values[idx],
            Form::Differences(bits) => neutral + widened(bits[idx]),
        }
    }
}

/// The number that bits of bf16 stand for.
#[inline(always)]
pub(super) fn widened(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::cpu::testing::random;

    fn is_near(vector: &PackedVector) -> bool {
        matches!(vector.columns(0), Columns::Differences(_))
    }

    proptest! {
        #[test]
        fn what_an_adapter_adds_or_scales_by_keeps_eight_bits(n in 1_usize..200, size in -12_i32..0, seed: u64) {
            let learnt: Vec<f32> = random(n, seed).iter().map(|v| v * 2_f32.powi(size)).collect();
            // Biases and learnt vectors of any proportion.
            let bias: Vec<f32> = random(n, !seed).iter().map(|v| v * 100.0).collect();
            let factors: Vec<f32> = learnt.iter().map(|v| 1.0 + v).collect();
            let added: Vec<f32> = learnt.iter().zip(&bias).map(|(v, bias)| bias + v).collect();
            let pack = |format| (PackedVector::factors(format, &factors), PackedVector::added(format, &added, &bias));
            let (near, exact) = (pack(WeightFormat::Bf16), pack(WeightFormat::F32));
            prop_assert!(is_near(&near.1) && is_near(&near.0));
            for idx in 0..n {
                prop_assert_eq!(exact.0.value(idx, 1.0), factors[idx]);
                prop_assert_eq!(exact.1.value(idx, bias[idx]), added[idx]);
                for (found, value, neutral) in
                    [(near.0.value(idx, 1.0), factors[idx], 1.0), (near.1.value(idx, bias[idx]), added[idx], bias[idx])]
                {
                    // Half a unit in the eighth bit, and two sums in f32.
                    let bound = (value - neutral).abs() / 256.0 + value.abs().max(neutral) * 2_f32.powi(-23);
                    prop_assert!((found - value).abs() <= bound, "{found} {value} {neutral}");
                }
            }
        }
    }

    #[test]
    fn a_factor_that_the_difference_from_one_would_lose_stays() {
        let factors = [1.0, 0.001, 1.5];
        let vector = PackedVector::factors(WeightFormat::Bf16, &factors);
        assert_eq!([0, 1, 2].map(|idx| vector.value(idx, 1.0)), factors);
        assert!(!is_near(&vector));
        assert!(!is_near(&PackedVector::factors(WeightFormat::Bf16, &[f32::NAN])));
        assert!(is_near(&PackedVector::factors(WeightFormat::Bf16, &[0.0, 2.0, -1.0])));
    }
}
