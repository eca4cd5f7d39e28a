//! What adapters cost beside the base model, and what they must cost at least.
//!
//! A step of decode reads the base's weights once and every adapter in it once. If memory is what bounds it, the adapters'
//! bytes take their time on top of the base's step:
//!
//! ```text
//! bound = t_base / (t_base + adapter_bytes / bandwidth)
//! ```

use serde::Serialize;

use super::plan::Distribution;
use super::report::{AdapterReport, RunReport};
use super::stats::Zipf;

/// A run beside the run of the bare base at the same concurrency in the same round.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AgainstBase {
    /// Output tokens per second by those of the base.
    pub output_rate: f64,
    /// The base's median time per output token by this run's.
    pub token_speed: f64,
    /// What `token_speed` can be at most, were memory all that bounds a step; null unless the bandwidth was
    /// measured and the server tells how large its adapters are.
    pub bound: Option<f64>,
}

/// Compares `run` with the base's run among `runs`, if there is one.
pub(super) fn against_base(run: &RunReport, runs: &[RunReport], adapters: &[AdapterReport]) -> Option<AgainstBase> {
    let is_base = |other: &&RunReport| {
        other.distribution == Distribution::Base
            && other.load_while.is_none()
            && (other.concurrency, other.round) == (run.concurrency, run.round)
    };
    if run.distribution == Distribution::Base && run.load_while.is_none() {
        return None;
    }
    let base = runs.iter().rev().find(is_base)?;
    let base_ms = base.time_per_output_token_ms?.p50;
    let per_step = adapters_per_step(&run.distribution, run.concurrency, adapters.len());
    let bound = run.read_gb_per_s.zip(mean_bytes(adapters)).map(|(read_gb_per_s, bytes)| {
        let adapters_ms = per_step * bytes / (read_gb_per_s * 1e6);
        base_ms / (base_ms + adapters_ms)
    });
    Some(AgainstBase {
        output_rate: run.output_tokens_per_s / base.output_tokens_per_s,
        token_speed: base_ms / run.time_per_output_token_ms?.p50,
        bound,
    })
}

/// Mean size of the adapters whose size is known.
fn mean_bytes(adapters: &[AdapterReport]) -> Option<f64> {
    let bytes: Vec<f64> = adapters.iter().filter_map(|adapter| adapter.bytes).map(|bytes| bytes as f64).collect();
    (!bytes.is_empty()).then(|| bytes.iter().sum::<f64>() / bytes.len() as f64)
}

/// Different adapters among the requests of one step, in the mean.
fn adapters_per_step(distribution: &Distribution, concurrency: usize, num_adapters: usize) -> f64 {
    match distribution {
        Distribution::Base => 0.0,
        Distribution::One => 1.0,
        Distribution::RoundRobin | Distribution::Distinct => concurrency.min(num_adapters) as f64,
        Distribution::Cold => concurrency as f64,
        Distribution::Zipf(s) => Zipf::new(num_adapters, *s).distinct(concurrency),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::stats::Summary;

    fn run(distribution: Distribution, output_tokens_per_s: f64, token_ms: f64) -> RunReport {
        RunReport {
            distribution,
            concurrency: 4,
            round: 1,
            requests: 0,
            completed: 0,
            errors: crate::bench::Errors::default(),
            short_answers: 0,
            duration_s: 1.0,
            prompt_tokens: 0,
            output_tokens: 0,
            requests_per_s: 0.0,
            output_tokens_per_s,
            total_tokens_per_s: 0.0,
            ttft_ms: None,
            time_per_output_token_ms: Summary::of(&mut [token_ms]),
            inter_token_gap_ms: None,
            request_ms: None,
            read_gb_per_s: None,
            against_base: None,
            load_while: None,
        }
    }

    fn adapter(bytes: Option<u64>) -> AdapterReport {
        AdapterReport { name: "a".to_owned(), kind: None, bytes }
    }

    #[test]
    fn the_bound_adds_the_time_to_read_the_adapters() {
        // 4 adapters of 5 MB at 10 GB/s take 2 ms beside the base's 8.
        let adapters = [Some(4_000_000), Some(6_000_000), None, Some(5_000_000), Some(5_000_000)].map(adapter);
        let runs = [run(Distribution::Base, 100.0, 8.0), RunReport { round: 2, ..run(Distribution::Base, 1.0, 1.0) }];
        let unmeasured = run(Distribution::RoundRobin, 75.0, 12.5);
        assert_eq!(against_base(&unmeasured, &runs, &adapters).unwrap().bound, None);
        let mixed = RunReport { read_gb_per_s: Some(10.0), ..unmeasured };
        let found = against_base(&mixed, &runs, &adapters).unwrap();
        assert!((found.output_rate - 0.75).abs() < 1e-12 && (found.token_speed - 0.64).abs() < 1e-12);
        assert!((found.bound.unwrap() - 0.8).abs() < 1e-12);
        assert_eq!(against_base(&mixed, &runs, &[adapter(None)]).unwrap().bound, None);
        assert_eq!(against_base(&runs[0], &runs, &adapters), None);
        assert_eq!(against_base(&RunReport { concurrency: 5, ..mixed }, &runs, &adapters), None);
    }

    #[test]
    fn a_step_holds_so_many_different_adapters() {
        assert!((adapters_per_step(&Distribution::One, 16, 8) - 1.0).abs() < 1e-12);
        assert!((adapters_per_step(&Distribution::RoundRobin, 16, 8) - 8.0).abs() < 1e-12);
        assert!((adapters_per_step(&Distribution::Distinct, 4, 8) - 4.0).abs() < 1e-12);
        // Two draws of two equally likely adapters differ half of the time.
        assert!((adapters_per_step(&Distribution::Zipf(0.0), 2, 2) - 1.5).abs() < 1e-12);
    }
}
