//! Figures from exact samples: nothing is binned, every sample is kept until the run ends.

use serde::Serialize;

/// What is told of some samples; all values in their unit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Number of samples.
    pub count: usize,
    /// Arithmetic mean.
    pub mean: f64,
    /// Half the samples are at most this.
    pub p50: f64,
    /// Nine in ten are at most this.
    pub p90: f64,
    /// Ninety-nine in a hundred are at most this.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    /// The summary of `samples`, which it sorts; `None` where there are none.
    ///
    /// # Panics
    /// When a sample is not a number.
    pub fn of(samples: &mut [f64]) -> Option<Self> {
        samples.sort_by(|a, b| a.partial_cmp(b).expect("samples are numbers"));
        let max = *samples.last()?;
        Some(Self {
            count: samples.len(),
            mean: samples.iter().sum::<f64>() / samples.len() as f64,
            p50: percentile(samples, 0.5),
            p90: percentile(samples, 0.9),
            p99: percentile(samples, 0.99),
            max,
        })
    }
}

/// The smallest of `sorted` that at least the part `q` of all samples does not exceed (nearest rank): always a value that
/// was measured.
///
/// # Panics
/// When there are no samples or `q` is not in 0..=1.
pub fn percentile(sorted: &[f64], q: f64) -> f64 {
    assert!(!sorted.is_empty() && (0.0..=1.0).contains(&q), "a part {q} of {} samples", sorted.len());
    // Products such as 0.99 * 100 must not round up to the next rank.
    let rank = (q * sorted.len() as f64 - 1e-9).ceil().max(1.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to the number of samples")]
    let rank = rank as usize;
    sorted[rank - 1]
}

/// Draws from 0..n with a weight of `(i + 1)^-s`.
#[derive(Clone, Debug)]
pub(super) struct Zipf {
    /// Running sums of the weights.
    sums: Vec<f64>,
}

impl Zipf {
    /// # Panics
    /// When `n` is 0.
    pub(super) fn new(n: usize, s: f64) -> Self {
        assert!(n > 0, "something to draw from");
        let sums = (1..=n).scan(0.0, |sum, i| {
            *sum += (i as f64).powf(-s);
            Some(*sum)
        });
        Self { sums: sums.collect() }
    }

    /// How many different values so many draws have, in the mean.
    pub(super) fn distinct(&self, draws: usize) -> f64 {
        let total = self.sums.last().expect("not empty");
        let starts = std::iter::once(0.0).chain(self.sums.iter().copied());
        self.sums.iter().zip(starts).map(|(end, start)| 1.0 - (1.0 - (end - start) / total).powf(draws as f64)).sum()
    }

    /// The value that `unit`, uniform in [0, 1), stands for.
    pub(super) fn at(&self, unit: f64) -> usize {
        let total = self.sums.last().expect("not empty");
        self.sums.partition_point(|sum| *sum <= unit * total).min(self.sums.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let samples: Vec<f64> = (1..=100).map(f64::from).collect();
        for (q, expected) in
            [(0.0, 1.0), (0.01, 1.0), (0.5, 50.0), (0.9, 90.0), (0.99, 99.0), (0.991, 100.0), (1.0, 100.0)]
        {
            assert!((percentile(&samples, q) - expected).abs() < 1e-12, "{q}");
        }
        assert!((percentile(&[7.0], 0.5) - 7.0).abs() < 1e-12);
        assert!((percentile(&[1.0, 2.0], 0.5) - 1.0).abs() < 1e-12);
        assert!((percentile(&[1.0, 2.0, 3.0], 0.5) - 2.0).abs() < 1e-12);
    }

    #[test]
    fn a_summary_sorts_and_keeps_the_largest() {
        let summary = Summary::of(&mut [4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(summary, Summary { count: 4, mean: 2.5, p50: 2.0, p90: 4.0, p99: 4.0, max: 4.0 });
        assert_eq!(Summary::of(&mut []), None);
    }

    #[test]
    fn zipf_gives_each_rank_its_share() {
        // Equidistant units hit each value in proportion to its weight, but for one at each border.
        let (n, draws) = (50, 100_000);
        for s in [0.0, 0.7, 1.0, 2.0] {
            let zipf = Zipf::new(n, s);
            let mut counts = vec![0_u32; n];
            for i in 0..draws {
                counts[zipf.at(f64::from(i) / f64::from(draws))] += 1;
            }
            let total: f64 = (1..=n).map(|i| (i as f64).powf(-s)).sum();
            for (i, count) in counts.iter().enumerate() {
                let expected = f64::from(draws) * ((i + 1) as f64).powf(-s) / total;
                assert!((f64::from(*count) - expected).abs() <= 1.5, "s {s}, rank {i}: {count}, {expected}");
            }
        }
    }

    #[test]
    fn zipf_stays_in_range() {
        let zipf = Zipf::new(3, 1.0);
        assert_eq!((zipf.at(0.0), zipf.at(1.0 - f64::EPSILON)), (0, 2));
    }
}
