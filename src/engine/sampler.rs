//! Drawing a token from a row of logits.
//!
//! The order is that of vLLM: bias, penalties (repetition, then frequency and presence), temperature, min_p, top_k,
//! top_p. The random number of a sequence's i-th token is the i-th output of a ChaCha stream keyed by its seed, so it
//! depends on nothing else: not on the batch, not on preemption.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::SamplingParams;
use super::logprobs::{InvalidLogits, argmax};

/// How one sequence draws its tokens, and what it must remember for that.
#[derive(Clone, Debug)]
pub(super) struct Sampler {
    params: SamplingParams,
    seed: u64,
    /// Times each token was generated; kept only when a penalty asks.
    generated: HashMap<u32, u32>,
    /// Tokens of the prompt; kept only when the repetition penalty asks.
    prompt: HashSet<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    logit: f32,
    /// Probability relative to the most likely token's, in [0, 1].
    weight: f32,
}

impl Sampler {
    /// A sampler for a sequence with this prompt; `fresh_seed` serves where the request gives none.
    pub(super) fn new(params: SamplingParams, prompt: &[u32], fresh_seed: u64) -> Self {
        let repeats = params.repetition_penalty != 1.0;
        Self {
            seed: params.seed.unwrap_or(fresh_seed),
            generated: HashMap::new(),
            prompt: if repeats { prompt.iter().copied().collect() } else { HashSet::new() },
            params,
        }
    }

    /// Remembers a generated token.
    pub(super) fn record(&mut self, token: u32) {
        if self.penalises() {
            *self.generated.entry(token).or_default() += 1;
        }
    }

    /// Draws the sequence's generated token number `token_idx`, counted from 0. Overwrites `logits`.
    pub(super) fn sample(&self, logits: &mut [f32], token_idx: usize) -> Result<u32, InvalidLogits> {
        self.bias(logits);
        self.penalise(logits);
        let best = argmax(logits)?;
        if self.params.temperature == 0.0 {
            return Ok(best);
        }
        let mut candidates = self.candidates(logits, logits[best as usize]);
        if let Some(top_k) = self.params.top_k {
            keep_top(&mut candidates, top_k.max(1));
        }
        if self.params.top_p < 1.0 {
            keep_nucleus(&mut candidates, f64::from(self.params.top_p));
        }
        Ok(draw(&candidates, uniform(self.seed, token_idx)))
    }

    fn penalises(&self) -> bool {
        let params = &self.params;
        params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0
    }

    fn bias(&self, logits: &mut [f32]) {
        for &(token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
    }

    fn penalise(&self, logits: &mut [f32]) {
        let params = &self.params;
        if params.repetition_penalty != 1.0 {
            let only_prompt = self.prompt.iter().filter(|token| !self.generated.contains_key(token));
            for &token in self.generated.keys().chain(only_prompt) {
                let logit = &mut logits[token as usize];
                let penalty = params.repetition_penalty;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
        for (&token, &count) in &self.generated {
            logits[token as usize] -= params.frequency_penalty * count as f32 + params.presence_penalty;
        }
    }

    /// The tokens that min_p leaves, in the order of their ids.
    fn candidates(&self, logits: &[f32], max: f32) -> Vec<Candidate> {
        let candidate = |(id, &logit): (usize, &f32)| {
            let weight = ((logit - max) / self.params.temperature).exp();
            Candidate { id: id as u32, logit, weight }
        };
        let kept = |candidate: &Candidate| candidate.weight > 0.0 && candidate.weight >= self.params.min_p;
        logits.iter().enumerate().map(candidate).filter(kept).collect()
    }
}

/// Most likely first; equal ones by id, so that the result never depends on the sort.
fn by_likelihood(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// Keeps the `k` most likely, most likely first.
fn keep_top(candidates: &mut Vec<Candidate>, k: usize) {
    if k < candidates.len() {
        candidates.select_nth_unstable_by(k - 1, by_likelihood);
        candidates.truncate(k);
    }
    candidates.sort_unstable_by(by_likelihood);
}

/// Keeps the fewest most likely candidates whose share of the total reaches `top_p`, most likely first.
///
/// A nucleus is nearly always small, so the head is sorted out in growing pieces instead of sorting everything.
fn keep_nucleus(candidates: &mut Vec<Candidate>, top_p: f64) {
    const FIRST_PIECE: usize = 256;
    let target = top_p * candidates.iter().map(|candidate| f64::from(candidate.weight)).sum::<f64>();
    let mut piece = FIRST_PIECE.min(candidates.len());
    loop {
        if piece < candidates.len() {
            candidates.select_nth_unstable_by(piece - 1, by_likelihood);
        }
        candidates[..piece].sort_unstable_by(by_likelihood);
        let mut mass = 0.0;
        for idx in 0..piece {
            mass += f64::from(candidates[idx].weight);
            if mass >= target {
                candidates.truncate(idx + 1);
                return;
            }
        }
        if piece == candidates.len() {
            return;
        }
        piece = (piece * 8).min(candidates.len());
    }
}

/// The candidate at the share `uniform` of the total weight.
fn draw(candidates: &[Candidate], uniform: f64) -> u32 {
    let total: f64 = candidates.iter().map(|candidate| f64::from(candidate.weight)).sum();
    let mut left = uniform * total;
    for candidate in candidates {
        left -= f64::from(candidate.weight);
        if left < 0.0 {
            return candidate.id;
        }
    }
    candidates.last().expect("the most likely token is always a candidate").id
}

/// Random number `token_idx` of the stream with this seed, in [0, 1).
fn uniform(seed: u64, token_idx: usize) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_word_pos(2 * token_idx as u128);
    (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(params: SamplingParams, logits: &[f32], token_idx: usize) -> u32 {
        Sampler::new(params, &[], 7).sample(&mut logits.to_vec(), token_idx).unwrap()
    }

    fn greedy() -> SamplingParams {
        SamplingParams { temperature: 0.0, ..SamplingParams::default() }
    }

    /// Which tokens ever come out.
    fn support(params: &SamplingParams, logits: &[f32]) -> Vec<u32> {
        let mut tokens: Vec<u32> = (0..500).map(|idx| sample(params.clone(), logits, idx)).collect();
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_the_best() {
        assert_eq!(sample(greedy(), &[0.5, 2.0, 2.0, -1.0], 0), 1);
    }

    #[test]
    fn bias_moves_the_argmax_and_unknown_tokens_are_ignored() {
        let params = SamplingParams { logit_bias: vec![(0, 5.0), (77, 100.0)], ..greedy() };
        assert_eq!(sample(params, &[0.5, 2.0], 0), 0);
    }

    #[test]
    fn penalties_count_what_they_should() {
        let check = |params: SamplingParams, expected: &[f32]| {
            let mut sampler = Sampler::new(params, &[0], 0);
            sampler.record(1);
            sampler.record(1);
            let mut logits = vec![2.0, 4.0, -1.0];
            sampler.penalise(&mut logits);
            assert_eq!(logits, expected);
        };
        check(SamplingParams { presence_penalty: 0.5, ..greedy() }, &[2.0, 3.5, -1.0]);
        check(SamplingParams { frequency_penalty: 0.5, ..greedy() }, &[2.0, 3.0, -1.0]);
        check(SamplingParams { repetition_penalty: 2.0, ..greedy() }, &[1.0, 2.0, -1.0]);
        check(greedy(), &[2.0, 4.0, -1.0]);
    }

    #[test]
    fn repetition_penalty_lowers_negative_logits_too() {
        let params = SamplingParams { repetition_penalty: 2.0, ..greedy() };
        let mut logits = vec![-1.0, 1.0];
        Sampler::new(params, &[0, 0], 0).penalise(&mut logits);
        assert_eq!(logits, [-2.0, 1.0]);
    }

    #[test]
    fn filters_leave_what_they_should() {
        let logits = [0.4_f32.ln(), 0.3_f32.ln(), 0.2_f32.ln(), 0.1_f32.ln()];
        let all = SamplingParams::default();
        assert_eq!(support(&all, &logits), [0, 1, 2, 3]);
        assert_eq!(support(&SamplingParams { top_k: Some(2), ..all.clone() }, &logits), [0, 1]);
        assert_eq!(support(&SamplingParams { top_p: 0.65, ..all.clone() }, &logits), [0, 1]);
        assert_eq!(support(&SamplingParams { top_p: 0.01, ..all.clone() }, &logits), [0]);
        assert_eq!(support(&SamplingParams { min_p: 0.45, ..all.clone() }, &logits), [0, 1, 2]);
        // Of the two that top_k leaves, the first holds 4/7.
        assert_eq!(support(&SamplingParams { top_k: Some(2), top_p: 0.5, ..all.clone() }, &logits), [0]);
        assert_eq!(support(&SamplingParams { temperature: 1e-6, ..all }, &logits), [0]);
    }

    #[test]
    fn frequencies_follow_the_distribution() {
        let logits = [0.5_f32.ln(), 0.3_f32.ln(), 0.2_f32.ln()];
        let mut counts = [0_usize; 3];
        for token_idx in 0..10_000 {
            counts[sample(SamplingParams::default(), &logits, token_idx) as usize] += 1;
        }
        // Three standard deviations of a binomial of 10,000 are at most 150.
        for (count, expected) in counts.into_iter().zip([5_000, 3_000, 2_000]) {
            assert!(count.abs_diff(expected) < 150, "{counts:?}");
        }
    }

    #[test]
    fn random_numbers_depend_on_seed_and_index_only() {
        let draws = |seed| (0..8).map(|idx| uniform(seed, idx)).collect::<Vec<_>>();
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
        let distinct: HashSet<u64> = draws(1).into_iter().map(f64::to_bits).collect();
        assert_eq!(distinct.len(), 8);
    }

    #[test]
    fn invalid_logits_are_reported() {
        for logits in [vec![0.0, f32::NAN], vec![f32::INFINITY, 0.0], vec![f32::NEG_INFINITY; 2]] {
            let sampler = Sampler::new(SamplingParams::default(), &[], 0);
            assert_eq!(sampler.sample(&mut logits.clone(), 0), Err(InvalidLogits), "{logits:?}");
        }
    }

    proptest! {
        /// The piecewise nucleus equals the plain one: sort everything, cut where the mass is reached.
        #[test]
        fn nucleus_equals_the_plain_one(
            logits in prop::collection::vec(-3.0_f32..3.0, 1..2000),
            top_p in 0.01_f64..1.0,
        ) {
            let sampler = Sampler::new(SamplingParams::default(), &[], 0);
            let max = logits[argmax(&logits).unwrap() as usize];
            let mut ours = sampler.candidates(&logits, max);
            let mut plain = ours.clone();
            keep_nucleus(&mut ours, top_p);
            let target = top_p * plain.iter().map(|c| f64::from(c.weight)).sum::<f64>();
            plain.sort_by(by_likelihood);
            let mut mass = 0.0;
            let len = plain.iter().position(|c| { mass += f64::from(c.weight); mass >= target });
            plain.truncate(len.map_or(plain.len(), |idx| idx + 1));
            let ids = |candidates: &[Candidate]| candidates.iter().map(|c| c.id).collect::<Vec<_>>();
            prop_assert_eq!(ids(&ours), ids(&plain));
        }
    }
}
