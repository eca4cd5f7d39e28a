//! Random arrivals, cancels and faults.

use std::sync::atomic::Ordering;

use patchbay::engine::SubmitError;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::fake::Fault;
use super::world::{Sim, alone, random_request, random_world};

/// Counts over simulations: what a run must have met to prove anything.
#[derive(Debug, Default)]
struct Met {
    finished: usize,
    cancelled: usize,
    failed: usize,
    refused: usize,
    preempted: u64,
    cached: u64,
    copies: u64,
    entries: usize,
}

/// One world with random arrivals, cancels and (maybe) faults; every request must end as it would alone.
fn simulate(seed: u64, faults: &[Fault], met: &mut Met) {
    let mut rng = StdRng::seed_from_u64(seed);
    let world = random_world(&mut rng);
    let mut sim = Sim::new(&world);
    let mut requests = Vec::new();
    let mut num_faults = 0;
    let arrival = rng.random_range(0.1..0.9);
    while requests.len() < 40 {
        while rng.random_bool(arrival) {
            let request = random_request(&mut rng);
            match sim.submit(request.clone()) {
                Ok(_) => requests.push(request),
                Err(error) => {
                    assert!(matches!(error, SubmitError::QueueFull { .. } | SubmitError::PromptTooLong { .. }));
                    met.refused += 1;
                    break;
                }
            }
        }
        if !requests.is_empty() && rng.random_bool(0.1) {
            sim.cancel(rng.random_range(0..requests.len()));
        }
        if !faults.is_empty() && rng.random_bool(0.05) {
            sim.probe.set_fault(*faults.choose(&mut rng).unwrap());
            num_faults += 1;
        }
        sim.step();
    }
    sim.run();
    for (idx, request) in requests.iter().enumerate() {
        let expected = alone(&world, request).apart_from_cache();
        let outcome = sim.outcomes[idx].clone().apart_from_cache();
        if outcome.finish.is_some() {
            assert_eq!(outcome, expected, "seed {seed}, request {idx}: {request:?}\nin {world:?}");
            met.finished += 1;
        } else {
            assert!(expected.tokens.starts_with(&outcome.tokens), "seed {seed}, request {idx}: {request:?}");
            assert!(outcome.failed.is_none() || num_faults > 0);
            assert!(outcome.failed.is_some() || sim.receivers[idx].is_none());
            met.failed += usize::from(outcome.failed.is_some());
            met.cancelled += usize::from(outcome.failed.is_none());
        }
    }
    met.preempted += sim.metrics.preemptions.get();
    met.cached += sim.metrics.prefix_cache_hits.get();
    met.copies += sim.metrics.adapter_slot_copies.get();
    met.entries += sim.probe.entries.load(Ordering::SeqCst);
    assert_eq!(sim.metrics.requests_running.get(), 0);
    assert_eq!(sim.metrics.requests_waiting.get(), 0);
}

#[test]
fn every_request_ends_as_it_would_alone() {
    let mut met = Met::default();
    for seed in 0..150 {
        simulate(seed, &[], &mut met);
    }
    assert_eq!(met.failed, 0);
    assert!(met.finished > 1000 && met.cancelled > 50 && met.refused > 50, "{met:?}");
    assert!(met.preempted > 50 && met.cached > 500 && met.copies > 500 && met.entries > 2000, "{met:?}");
}

#[test]
fn faults_end_only_the_requests_they_hit() {
    let faults = [Fault::Error, Fault::Panic, Fault::Nan, Fault::Copy, Fault::CopyPanic];
    let mut met = Met::default();
    for seed in 1000..1060 {
        simulate(seed, &faults, &mut met);
    }
    assert!(met.finished > 500 && met.failed > 50, "{met:?}");
}
