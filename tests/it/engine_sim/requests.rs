//! Scores, and the limits of one request.

use patchbay::engine::{FinishReason, GenerationRequest, SubmitError};

use super::fake::request;
use super::world::{ROOMY, Sim, World, finish, prompt, run_alone};

#[test]
fn prompt_logprobs_are_equal_however_the_prompt_is_cut() {
    let request = GenerationRequest { prompt_logprobs: Some(2), ..request(prompt(23), 2) };
    let whole = run_alone(&request);
    let scores = whole.prompt.clone().unwrap();
    assert_eq!(scores.len(), 23);
    assert!(scores[0].is_none() && scores[1..].iter().all(|score| score.as_ref().unwrap().top.len() == 2));
    for step_tokens_max in [1, 2, 5, 22] {
        let world = World { sequences_max: 1, step_tokens_max, ..ROOMY };
        let mut sim = Sim::new(&world);
        sim.submit(request.clone()).unwrap();
        sim.run();
        assert_eq!(sim.outcomes[0], whole, "{step_tokens_max} tokens per step");
    }
}

#[test]
fn zero_max_tokens_only_scores_the_prompt() {
    let silent = run_alone(&request(prompt(9), 0));
    assert_eq!(finish(&silent), (FinishReason::Length, 0));
    assert!(silent.prompt.is_none());
    let scored = run_alone(&GenerationRequest { prompt_logprobs: Some(0), ..request(prompt(9), 0) });
    assert_eq!(finish(&scored), (FinishReason::Length, 0));
    assert_eq!(scored.prompt.unwrap().len(), 9);
}

#[test]
fn a_prompt_of_one_token_has_one_empty_score() {
    let scored = run_alone(&GenerationRequest { prompt_logprobs: Some(3), ..request(vec![4], 1) });
    assert_eq!(scored.prompt, Some(vec![None]));
}

#[test]
fn generated_logprobs_name_the_drawn_token() {
    let outcome = run_alone(&GenerationRequest { logprobs: Some(3), ..request(prompt(5), 8) });
    for (id, logprob) in outcome.tokens {
        let logprob = logprob.unwrap();
        assert_eq!((logprob.rank, logprob.top[0]), (1, (id, logprob.logprob)), "greedy takes the most likely");
        assert!(logprob.top.is_sorted_by(|a, b| a.1 >= b.1));
    }
}

#[test]
fn generation_ends_at_the_context_limit() {
    let world = World { context_tokens_max: 16, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.submit(request(prompt(10), 1000)).unwrap();
    sim.submit(request(prompt(16), 0)).unwrap();
    sim.submit(request(prompt(15), 5)).unwrap();
    assert_eq!(sim.submit(request(prompt(16), 1)), Err(SubmitError::PromptTooLong { found: 16, limit: 15 }));
    assert_eq!(sim.submit(request(prompt(17), 0)), Err(SubmitError::PromptTooLong { found: 17, limit: 16 }));
    sim.run();
    let finishes: Vec<_> = sim.outcomes.iter().map(finish).collect();
    assert_eq!(finishes, [(FinishReason::Length, 6), (FinishReason::Length, 0), (FinishReason::Length, 1)]);
}

#[test]
fn a_small_cache_bounds_the_context() {
    let world = World { num_blocks: 3, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.submit(request(prompt(5), 1000)).unwrap();
    assert_eq!(sim.submit(request(prompt(12), 1)), Err(SubmitError::PromptTooLong { found: 12, limit: 11 }));
    sim.run();
    assert_eq!(finish(&sim.outcomes[0]), (FinishReason::Length, 7));
}
