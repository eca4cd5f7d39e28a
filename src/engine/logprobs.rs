//! Reading rows of logits: the best token, and log-probabilities.

use std::cmp::Ordering;

use super::TokenLogprob;

/// Partial maxima of a row.
const LANES: usize = 16;

/// A row of logits with NaN or +inf, or without any finite value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InvalidLogits;

/// The token with the greatest logit; of equals the lowest id.
pub(super) fn argmax(logits: &[f32]) -> Result<u32, InvalidLogits> {
    // Lanes without branches first, which the compiler vectorises; then the place of the greatest.
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut has_nan = [false; LANES];
    for chunk in logits.chunks(LANES) {
        for ((max, has_nan), &logit) in max.iter_mut().zip(&mut has_nan).zip(chunk) {
            *max = if logit > *max { logit } else { *max };
            *has_nan |= logit.is_nan();
        }
    }
    let max = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if has_nan.contains(&true) || !max.is_finite() {
        return Err(InvalidLogits);
    }
    let best = logits.iter().position(|&logit| logit == max).expect("the greatest is among them");
    Ok(best as u32)
}

/// `log softmax(logits)[token]` with the token's rank and the `num_top` most likely alternatives.
///
/// Sums in f64. Of equal logits the lower id counts as the more likely, as in [`argmax`].
pub(super) fn token_logprob(logits: &[f32], token: u32, num_top: usize) -> Result<TokenLogprob, InvalidLogits> {
    let max = logits[argmax(logits)? as usize];
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    let log_sum = f64::from(max) + sum.ln();
    let logprob = |token: u32| (f64::from(logits[token as usize]) - log_sum) as f32;
    let by_likelihood =
        |a: &u32, b: &u32| -> Ordering { logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)) };

    let own = logits[token as usize];
    let before = |(id, &logit): (usize, &f32)| logit > own || (logit == own && id < token as usize);
    let rank = 1 + logits.iter().enumerate().filter(|entry| before(*entry)).count();

    let mut top: Vec<u32> = Vec::new();
    if num_top > 0 {
        top.extend(0..logits.len() as u32);
        if num_top < top.len() {
            top.select_nth_unstable_by(num_top - 1, by_likelihood);
            top.truncate(num_top);
        }
        top.sort_unstable_by(by_likelihood);
    }
    Ok(TokenLogprob { logprob: logprob(token), rank, top: top.into_iter().map(|id| (id, logprob(id))).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOLERANCE: f32 = 1e-6; // One rounding to f32 of numbers below 4.

    #[test]
    fn logprob_rank_and_top_of_a_known_row() {
        let logits = [0.2_f32.ln() + 9.0, 0.5_f32.ln() + 9.0, 0.3_f32.ln() + 9.0];
        let found = token_logprob(&logits, 0, 2).unwrap();
        assert!((found.logprob - 0.2_f32.ln()).abs() < TOLERANCE);
        assert_eq!(found.rank, 3);
        assert_eq!(found.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2]);
        assert!((found.top[0].1 - 0.5_f32.ln()).abs() < TOLERANCE);
    }

    #[test]
    fn equal_logits_rank_by_id_and_top_is_bounded_by_the_vocabulary() {
        let found = token_logprob(&[1.0, 1.0, 1.0], 1, 9).unwrap();
        assert_eq!(found.rank, 2);
        assert_eq!(found.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(argmax(&[1.0, 1.0]), Ok(0));
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let found = token_logprob(&[1e30, 0.0], 0, 0).unwrap();
        assert_eq!(found.logprob, 0.0);
        assert!(found.top.is_empty());
    }

    #[test]
    fn the_greatest_is_found_in_every_lane_and_a_nan_anywhere_is_reported() {
        for len in [1, 15, 16, 17, 40] {
            for place in 0..len {
                let mut logits = vec![-2.0; len];
                logits[place] = -1.0;
                assert_eq!(argmax(&logits), Ok(place as u32));
                logits[place] = f32::NAN;
                assert_eq!(argmax(&logits), Err(InvalidLogits));
                logits[place] = f32::INFINITY;
                assert_eq!(argmax(&logits), Err(InvalidLogits));
            }
        }
    }

    #[test]
    fn rows_without_meaning_are_reported() {
        assert_eq!(token_logprob(&[f32::NAN, 0.0], 1, 0), Err(InvalidLogits));
        assert_eq!(argmax(&[]), Err(InvalidLogits));
    }
}
