//! Preemption, cancelling, and who waits for whom.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use patchbay::engine::{FinishReason, GenerationRequest, SamplingParams, SubmitError};
use patchbay::model::RopeLengthRule;

use super::fake::{request, with_adapter};
use super::world::{ROOMY, Sim, World, finish, prompt, run_alone};

#[test]
fn preempted_sequences_go_on_with_the_same_random_numbers() {
    let world = World { num_blocks: 10, sequences_max: 4, ..ROOMY };
    let requests: Vec<_> = (0..4)
        .map(|seed| {
            let sampling = SamplingParams { temperature: 1.0, seed: Some(seed), ..SamplingParams::default() };
            GenerationRequest { sampling, ..request(prompt(4), 30) }
        })
        .collect();
    let mut sim = Sim::new(&world);
    for request in &requests {
        sim.submit(request.clone()).unwrap();
    }
    sim.run();
    assert!(sim.metrics.preemptions.get() >= 3, "{}", sim.metrics.preemptions.get());
    for (request, outcome) in requests.iter().zip(&sim.outcomes) {
        assert_eq!(*outcome, run_alone(request));
    }
}

#[test]
fn a_context_that_outgrows_its_frequencies_is_recomputed_once() {
    let world = World { rope_length_rule: RopeLengthRule::Switch { threshold: 8 }, prefix_cache: true, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.submit(request(prompt(4), 9)).unwrap();
    sim.run();
    assert_eq!(finish(&sim.outcomes[0]), (FinishReason::Length, 9));
    assert_eq!(sim.probe.tokens.load(Ordering::SeqCst), 4 + 4 + 9 + 3, "prompt, decodes, recomputation, decodes");
    assert_eq!(sim.metrics.preemptions.get(), 0);
    assert_eq!(sim.metrics.prompt_tokens.get(), 4);
}

#[test]
fn cancelling_frees_the_place_within_a_step() {
    let world = World { sequences_max: 1, step_tokens_max: 4, queue_max: 1, ..ROOMY };
    let mut sim = Sim::new(&world);
    let running = sim.submit(request(prompt(4), 50)).unwrap();
    sim.step();
    let waiting = sim.submit(request(prompt(4), 50)).unwrap();
    assert_eq!(sim.submit(request(prompt(4), 1)), Err(SubmitError::QueueFull { limit: 1 }));
    sim.cancel(waiting);
    sim.step();
    sim.submit(request(prompt(4), 1)).unwrap();
    sim.cancel(running);
    sim.step();
    assert_eq!(sim.outcomes[2].ids(), run_alone(&request(prompt(4), 1)).ids(), "the seat is free at once");
}

#[test]
fn a_satisfied_client_that_leaves_has_a_finished_request() {
    let mut sim = Sim::new(&ROOMY);
    let request = request(prompt(4), 50);
    let satisfied = Arc::clone(&request.satisfied);
    let left_early = sim.submit(request).unwrap();
    sim.step();
    satisfied.store(true, Ordering::SeqCst);
    sim.cancel(left_early);
    sim.step();
    let ended = |reason| sim.metrics.request_success.with_label_values(&[reason]).get();
    assert_eq!((ended("stop"), ended("abort")), (1, 0));
    assert_eq!(sim.metrics.request_generation_tokens.get_sample_count(), 1);
}

#[test]
fn a_deferred_request_holds_up_nobody_else() {
    let world = World { adapter_slots: 1, ..ROOMY };
    let mut sim = Sim::new(&world);
    let long = sim.submit(with_adapter(prompt(4), 100, 1)).unwrap();
    sim.step();
    let deferred = sim.submit(with_adapter(prompt(4), 2, 2)).unwrap();
    let resident = sim.submit(with_adapter(prompt(4), 2, 1)).unwrap();
    let base = sim.submit(request(prompt(4), 2)).unwrap();
    sim.step();
    assert_eq!(sim.metrics.requests_waiting_by_reason.with_label_values(&["deferred"]).get(), 1);
    assert_eq!(sim.metrics.requests_waiting_by_reason.with_label_values(&["capacity"]).get(), 0);
    assert_eq!(sim.metrics.requests_running.get(), 3);
    sim.step();
    assert!(!sim.is_live(resident) && !sim.is_live(base) && sim.is_live(deferred) && sim.is_live(long));
    sim.run();
}

#[test]
fn a_deferred_request_is_overtaken_a_bounded_number_of_times() {
    let world = World { adapter_slots: 1, sequences_max: 3, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.submit(with_adapter(prompt(4), 5, 1)).unwrap();
    sim.step();
    let deferred = sim.submit(with_adapter(prompt(4), 2, 2)).unwrap();
    // The resident adapter's requests never stop coming.
    let mut submitted = Vec::new();
    for _ in 0..40 {
        submitted.push(sim.submit(with_adapter(prompt(4), 5, 1)).unwrap());
        sim.step();
        if !sim.is_live(deferred) {
            break;
        }
    }
    assert!(!sim.is_live(deferred), "starved");
    let overtook = submitted.iter().filter(|idx| !sim.outcomes[**idx].tokens.is_empty()).count();
    assert!(overtook <= world.sequences_max, "{overtook} passed");
    sim.run();
}

#[test]
fn base_requests_pass_even_when_adapters_are_barred() {
    let world = World { adapter_slots: 1, sequences_max: 2, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.submit(with_adapter(prompt(4), 60, 1)).unwrap();
    sim.step();
    sim.submit(with_adapter(prompt(4), 2, 2)).unwrap();
    for _ in 0..3 {
        sim.submit(with_adapter(prompt(4), 1, 1)).unwrap();
        sim.step();
    }
    assert_eq!(sim.metrics.requests_waiting_by_reason.with_label_values(&["deferred"]).get(), 2);
    let base = sim.submit(request(prompt(4), 1)).unwrap();
    sim.step();
    assert!(!sim.is_live(base));
    sim.run();
}
