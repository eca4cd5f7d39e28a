//! Activations as the words that packed weights are multiplied with.

#![expect(unsafe_code, reason = "an instruction of one instruction set")]

use super::dispatch::dispatch;
use super::isa::Isa;
use super::packed::WeightFormat;

/// Words per vector; rows are padded with zeros to a multiple of it.
pub(super) const LANES: usize = 16;

/// Words per padded row of `k` elements.
pub(super) fn row_words(format: WeightFormat, k: usize) -> usize {
    format.steps(k).next_multiple_of(LANES)
}

/// Writes one row as padded words: f32 bits, or pairs of bf16 (rounded to nearest, ties to even) of which the first
/// is in the lower half. `words` is [`row_words`] long. Where there is an instruction for it, what is less than the smallest
/// normal number becomes zero, as which the product of bf16 takes it anyway.
pub(super) fn write_row(isa: Isa, format: WeightFormat, row: &[f32], words: &mut [u32]) {
    assert_eq!(words.len(), row_words(format, row.len()), "a padded row");
    #[cfg(target_arch = "x86_64")]
    if let (Isa::Avx512Bf16, WeightFormat::Bf16) = (isa, format) {
        // SAFETY: the words hold the row by the assertion, and the instruction set was detected.
        unsafe { write_bf16(row, words) };
        return;
    }
    write_plain(isa, format, row, words);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn write_bf16(row: &[f32], words: &mut [u32]) {
    use std::arch::x86_64::{_mm512_cvtneps_pbh, _mm512_maskz_loadu_ps};

    let (halves, _) = words.as_chunks_mut::<{ LANES / 2 }>();
    for (idx, half) in halves.iter_mut().enumerate() {
        let lanes = row.len().saturating_sub(LANES * idx).min(LANES);
        let mask = u16::try_from((1_u32 << lanes) - 1).expect("at most 16 lanes");
        // SAFETY: lanes outside of the row are not read; sixteen bf16 are half of a vector's words.
        unsafe {
            let rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, row.as_ptr().wrapping_add(LANES * idx)));
            *half = std::mem::transmute::<std::arch::x86_64::__m256bh, [u32; LANES / 2]>(rounded);
        }
    }
}

dispatch! {
    fn write_plain(format: WeightFormat, row: &[f32], words: &mut [u32]) => write_row_body
}

#[inline(always)]
fn write_row_body<const FMA: bool>(format: WeightFormat, row: &[f32], words: &mut [u32]) {
    match format {
        WeightFormat::F32 => {
            let (values, padding) = words.split_at_mut(row.len());
            for (word, value) in values.iter_mut().zip(row) {
                *word = value.to_bits();
            }
            padding.fill(0);
        }
        WeightFormat::Bf16 => {
            let (pairs, rest) = row.as_chunks::<2>();
            let (whole, padding) = words.split_at_mut(pairs.len());
            for (word, [low, high]) in whole.iter_mut().zip(pairs) {
                *word = bf16_bits(*low) | bf16_bits(*high) << 16;
            }
            padding.fill(0);
            if let (Some(word), [last]) = (padding.first_mut(), rest) {
                *word = bf16_bits(*last);
            }
        }
    }
}

/// The bits of the nearest bf16, ties to even; a NaN stays one.
#[inline(always)]
pub(super) fn bf16_bits(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if value.is_nan() { bits >> 16 | 0x40 } else { rounded }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn words_hold_the_rounded_values(bits in proptest::collection::vec(any::<u32>(), 1..70)) {
            let row: Vec<f32> = bits.iter().map(|bits| f32::from_bits(*bits)).collect();
            for isa in Isa::available() {
                let mut words = vec![7; row_words(WeightFormat::Bf16, row.len())];
                write_row(isa, WeightFormat::Bf16, &row, &mut words);
                for (i, half) in words.iter().flat_map(|word| [word & 0xffff, word >> 16]).enumerate() {
                    let expected = row.get(i).map_or(0, |value| u32::from(bf16::from_f32(*value).to_bits()));
                    let is_tiny = row.get(i).is_some_and(|value| value.is_subnormal());
                    prop_assert!(half == expected || is_tiny && half & 0x7fff == 0, "{isa:?} {half:x} {expected:x}");
                }
                let mut words = vec![7; row_words(WeightFormat::F32, row.len())];
                write_row(isa, WeightFormat::F32, &row, &mut words);
                prop_assert_eq!(&words[..row.len()], &bits[..]);
                prop_assert!(words[row.len()..].iter().all(|word| *word == 0));
            }
        }
    }
}
