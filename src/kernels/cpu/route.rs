//! Which experts of a routed term a row goes to, and with which weights.

use super::words::LANES;

/// Chooses experts by the magnitude of a row's products with their prototypes.
#[derive(Debug)]
pub struct Router {
    /// Row-major, (experts, k).
    prototypes: Vec<f32>,
    k: usize,
    top_k: usize,
    temperature: f32,
}

impl Router {
    /// Of `prototypes` (experts, k).
    ///
    /// # Panics
    /// When there are fewer experts than are to be chosen, or none is.
    pub fn new(prototypes: Vec<f32>, k: usize, top_k: usize, temperature: f32) -> Self {
        assert!((1..=prototypes.len() / k).contains(&top_k), "experts are chosen among those there are");
        Self { prototypes, k, top_k, temperature }
    }

    /// Multiplies each expert's equal share of `h` with the row's gate for it; x: (k).
    ///
    /// The gates are the softmax of `|prototypes x| / temperature` over the experts whose magnitude is at least the
    /// `top_k`-th largest, and zero for the others.
    pub(super) fn gate(&self, x: &[f32], h: &mut [f32]) {
        let magnitudes: Vec<f32> = self.prototypes.chunks_exact(self.k).map(|p| dot(p, x).abs()).collect();
        let mut sorted = magnitudes.clone();
        sorted.sort_unstable_by(|a, b| b.total_cmp(a));
        let (most, least) = (sorted[0], sorted[self.top_k - 1]);
        let weight = |value: f32| if value >= least { ((value - most) / self.temperature).exp() } else { 0.0 };
        let sum: f32 = magnitudes.iter().map(|value| weight(*value)).sum();
        let share = h.len() / magnitudes.len();
        for (h, magnitude) in h.chunks_exact_mut(share).zip(&magnitudes) {
            let gate = weight(*magnitude) / sum;
            h.iter_mut().for_each(|h| *h *= gate);
        }
    }
}

/// In a fixed order that vectors can follow.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    let (a_lanes, b_lanes) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_lanes.zip(b_lanes) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + rest
}
