//! Activations as the words that packed weights are multiplied with.

use super::dispatch::dispatch;
use super::packed::WeightFormat;

/// Words per vector; rows are padded with zeros to a multiple of it.
pub(super) const LANES: usize = 16;

/// Words per padded row of `k` elements.
pub(super) fn row_words(format: WeightFormat, k: usize) -> usize {
    format.steps(k).next_multiple_of(LANES)
}

dispatch! {
    /// Writes one row as padded words: f32 bits, or pairs of bf16 (rounded to nearest, ties to even) of which the first
    /// is in the lower half. `words` is [`row_words`] long.
    pub(super) fn write_row(format: WeightFormat, row: &[f32], words: &mut [u32]) => write_row_body
}

#[inline(always)]
fn write_row_body<const FMA: bool>(format: WeightFormat, row: &[f32], words: &mut [u32]) {
    assert_eq!(words.len(), row_words(format, row.len()), "a padded row");
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

    use super::super::isa::Isa;
    use super::*;

    proptest! {
        #[test]
        fn words_hold_the_rounded_values(bits in proptest::collection::vec(any::<u32>(), 1..70)) {
            let row: Vec<f32> = bits.iter().map(|bits| f32::from_bits(*bits)).collect();
            for isa in Isa::available() {
                let mut words = vec![7; row_words(WeightFormat::Bf16, row.len())];
                write_row(isa, WeightFormat::Bf16, &row, &mut words);
                for (i, half) in words.iter().flat_map(|word| [word & 0xffff, word >> 16]).enumerate() {
                    let expected = row.get(i).map_or(0, |value| bf16::from_f32(*value).to_bits());
                    prop_assert_eq!(half, u32::from(expected));
                }
                let mut words = vec![7; row_words(WeightFormat::F32, row.len())];
                write_row(isa, WeightFormat::F32, &row, &mut words);
                prop_assert_eq!(&words[..row.len()], &bits[..]);
                prop_assert!(words[row.len()..].iter().all(|word| *word == 0));
            }
        }
    }
}
