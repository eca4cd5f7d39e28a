//! What requests share: prefixes of contexts, and what stands before prompts.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use patchbay::adapter::LoadedAdapter;
use patchbay::engine::{FinishReason, GenerationRequest, SubmitError};

use super::fake::{ASLEEP, BOTH, Fault, GATED, PREFIX, VIRTUAL, VOCAB, fresh_adapter, lead, request, with_adapter};
use super::world::{ROOMY, Sim, World, finish, prompt, run_alone};

#[test]
fn equal_prompts_reuse_all_full_blocks_but_the_last_tokens() {
    let world = World { prefix_cache: true, ..ROOMY };
    let mut sim = Sim::new(&world);
    let mut cached = |request| {
        let idx = sim.submit(request).unwrap();
        sim.run();
        sim.outcomes[idx].finish.unwrap().cached_tokens
    };
    assert_eq!(cached(request(prompt(12), 1)), 0);
    assert_eq!(cached(request(prompt(12), 1)), 8);
    assert_eq!(cached(request(prompt(13), 1)), 12);
    assert_eq!(cached(with_adapter(prompt(13), 1, 1)), 0);
    assert_eq!(cached(with_adapter(prompt(13), 1, 1)), 12);
    assert_eq!(cached(with_adapter(prompt(13), 1, 2)), 0);
    assert_eq!(cached(GenerationRequest { cache_salt: Some(String::new()), ..request(prompt(13), 1) }), 0);
    assert_eq!(cached(GenerationRequest { prompt_logprobs: Some(0), ..request(prompt(13), 1) }), 0);
}

#[test]
fn a_context_of_the_base_is_shared_with_the_base() {
    let world = World { prefix_cache: true, ..ROOMY };
    let mut sim = Sim::new(&world);
    let mut cached = |request: GenerationRequest| {
        let idx = sim.submit(request).unwrap();
        sim.run();
        sim.outcomes[idx].finish.unwrap().cached_tokens
    };
    let other = || prompt(13).into_iter().rev().collect::<Vec<u32>>();
    assert_eq!(cached(with_adapter(prompt(13), 1, GATED)), 0);
    assert_eq!(cached(request(prompt(13), 1)), 12, "the base finds what the gates needed");
    assert_eq!(cached(with_adapter(prompt(13), 1, GATED)), 12);
    assert_eq!(cached(request(other(), 1)), 0);
    assert_eq!(cached(with_adapter(other(), 1, GATED)), 0, "without its own context that of the base gives no gates");
    assert_eq!(cached(with_adapter(other(), 1, GATED)), 12);
}

#[test]
fn two_contexts_fit_the_cache_together() {
    let world = World { num_blocks: 9, sequences_max: 2, prefix_cache: true, ..ROOMY };
    let mut sim = Sim::new(&world);
    assert_eq!(
        sim.submit(with_adapter(prompt(16), 1, GATED)).unwrap_err(),
        SubmitError::PromptTooLong { found: 16, limit: 15 }
    );
    sim.submit(request(prompt(16), 1)).unwrap();
    for _ in 0..2 {
        sim.submit(with_adapter(prompt(9), 20, GATED)).unwrap();
    }
    sim.run();
    assert_eq!(finish(&sim.outcomes[1]), (FinishReason::Length, 7));
    assert_eq!(sim.outcomes[1].ids(), sim.outcomes[2].ids());
    let tiny = World { num_blocks: 1, ..ROOMY };
    assert!(Sim::new(&tiny).submit(with_adapter(prompt(1), 0, GATED)).is_err());
}

#[test]
fn a_conversation_reuses_its_generated_tokens() {
    let world = World { prefix_cache: true, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.submit(request(prompt(6), 6)).unwrap();
    sim.run();
    let next_turn = [prompt(6), sim.outcomes[0].ids(), prompt(3)].concat();
    sim.submit(request(next_turn, 1)).unwrap();
    sim.run();
    // The last generated token was never computed, so 11 of the 12 are known and two blocks are full.
    assert_eq!(sim.outcomes[1].finish.unwrap().cached_tokens, 8);
}

#[test]
fn a_new_generation_of_a_name_shares_nothing_with_the_old() {
    let world = World { prefix_cache: true, ..ROOMY };
    let mut sim = Sim::new(&world);
    let generation = |id: usize| {
        let LoadedAdapter { digest, lowered, .. } = fresh_adapter(id);
        let name = "one-name".to_owned();
        let loaded = LoadedAdapter { name, generation: id as u64, digest, lowered, bytes: 0, parts: Vec::new() };
        GenerationRequest { adapter: Some(Arc::new(loaded)), ..request(prompt(13), 4) }
    };
    // Both at once, and the old one again after the new one.
    for id in [1, 1, 2, 1, 2] {
        sim.submit(generation(id)).unwrap();
    }
    sim.run();
    for (outcome, id) in sim.outcomes.iter().zip([1, 1, 2, 1, 2]) {
        assert_eq!(outcome.ids(), run_alone(&with_adapter(prompt(13), 4, id)).ids());
    }
}

#[test]
fn an_adapter_that_left_the_host_leaves_its_slot() {
    let mut sim = Sim::new(&ROOMY);
    let copies = |sim: &Sim| sim.metrics.adapter_slot_copies.get();
    let on = |adapter: &Arc<LoadedAdapter>| GenerationRequest {
        adapter: Some(Arc::clone(adapter)),
        ..request(prompt(5), 2)
    };
    let first = Arc::new(fresh_adapter(1));
    // The same content under another name shares the slot, and names it from then on.
    let second = Arc::new(LoadedAdapter { name: "other-name".to_owned(), ..fresh_adapter(1) });
    for adapter in [&first, &first, &second] {
        sim.submit(on(adapter)).unwrap();
        sim.run();
    }
    assert_eq!(copies(&sim), 1);
    let runs = |sim: &Sim, names: &str| sim.metrics.render().contains(&format!("running_lora_adapters=\"{names}\""));
    assert!(runs(&sim, "other-name"));
    drop(first);
    assert!(sim.engine.tidy() && runs(&sim, "other-name"));
    // A running request keeps what it uses.
    sim.submit(on(&second)).unwrap();
    sim.step();
    drop(second);
    assert!(sim.engine.tidy() && runs(&sim, "other-name"));
    sim.run();
    assert!(!sim.engine.tidy() && runs(&sim, ""));
    sim.engine.audit();
    sim.submit(on(&Arc::new(fresh_adapter(1)))).unwrap();
    sim.run();
    assert_eq!((copies(&sim), sim.outcomes[4].ids()), (2, sim.outcomes[0].ids()));
}

#[test]
fn what_stands_before_a_prompt_changes_its_answer_and_nothing_else() {
    for id in [VIRTUAL, PREFIX, BOTH] {
        let outcome = run_alone(&with_adapter(prompt(9), 5, id));
        let finish = outcome.finish.unwrap();
        assert_eq!((finish.prompt_tokens, finish.cached_tokens, finish.generated_tokens), (9, 0, 5));
        assert!(outcome.tokens.iter().all(|(token, _)| (*token as usize) < VOCAB));
    }
}

#[test]
fn prompt_scores_skip_what_stands_before_the_prompt() {
    for id in [VIRTUAL, PREFIX, BOTH, ASLEEP] {
        let request = GenerationRequest { prompt_logprobs: Some(2), ..with_adapter(prompt(13), 2, id) };
        let whole = run_alone(&request);
        let scores = whole.prompt.clone().unwrap();
        assert_eq!(scores.len(), 13);
        assert!(scores[0].is_none() && scores[1..].iter().all(Option::is_some));
        for (step_tokens_max, prefix_cache) in [(1, false), (2, true), (4, true), (5, false)] {
            let world = World { sequences_max: 1, step_tokens_max, prefix_cache, ..ROOMY };
            let mut sim = Sim::new(&world);
            sim.submit(request.clone()).unwrap();
            sim.submit(request.clone()).unwrap();
            sim.run();
            assert_eq!(sim.outcomes, [whole.clone(), whole.clone()], "adapter {id}, {step_tokens_max} tokens per step");
        }
    }
}

#[test]
fn what_stands_before_the_prompt_counts_against_the_context() {
    let world = World { context_tokens_max: 16, ..ROOMY };
    let mut sim = Sim::new(&world);
    for (id, taken) in [(VIRTUAL, 3), (PREFIX, 9), (BOTH, 6), (ASLEEP, 0)] {
        let limit = 15 - taken;
        let found = limit + 1;
        let too_long = Err(SubmitError::PromptTooLong { found, limit });
        assert_eq!(sim.submit(with_adapter(prompt(found as u32), 1, id)), too_long);
        let idx = sim.submit(with_adapter(prompt(limit as u32 - 1), 100, id)).unwrap();
        sim.run();
        assert_eq!(finish(&sim.outcomes[idx]), (FinishReason::Length, 2));
    }
    let mut tiny = Sim::new(&World { context_tokens_max: 8, ..ROOMY });
    assert_eq!(
        tiny.submit(with_adapter(prompt(1), 1, PREFIX)),
        Err(SubmitError::PromptTooLong { found: 1, limit: 0 }),
        "not even the prefix fits"
    );
}

#[test]
fn a_kv_prefix_is_copied_once_and_counted_once() {
    for prefix_cache in [false, true] {
        let world = World { prefix_cache, ..ROOMY };
        let mut sim = Sim::new(&world);
        let salted = |salt: usize| {
            let cache_salt = (salt > 0).then(|| salt.to_string());
            GenerationRequest { cache_salt, ..with_adapter(prompt(2), 3, PREFIX) }
        };
        // Nine entries are two blocks of four and one more, which shares a block with the prompt.
        for salt in 0..4 {
            sim.submit(salted(salt)).unwrap();
        }
        sim.step();
        assert_eq!(sim.engine.blocks_in_use(), 3, "one copies, the others wait for it");
        sim.step();
        assert_eq!(sim.engine.blocks_in_use(), 2 + 4);
        assert_eq!(sim.probe.entries.load(Ordering::SeqCst), 8 + 4);
        sim.run();
        // Nobody refers to the blocks now, and nobody has needed them otherwise.
        let idx = sim.submit(salted(9)).unwrap();
        sim.run();
        assert_eq!(sim.probe.entries.load(Ordering::SeqCst), 8 + 5);
        assert_eq!(sim.outcomes[idx].ids(), run_alone(&salted(9)).ids());
        assert_eq!(sim.outcomes[idx].finish.unwrap().cached_tokens, 0, "the prefix is no part of the prompt");
    }
}

#[test]
fn an_idle_kv_prefix_makes_room_and_comes_back() {
    let world = World { num_blocks: 8, ..ROOMY };
    let mut sim = Sim::new(&world);
    sim.submit(with_adapter(prompt(4), 3, PREFIX)).unwrap();
    sim.run();
    assert_eq!(sim.probe.entries.load(Ordering::SeqCst), 9);
    sim.submit(request(prompt(20), 12)).unwrap();
    sim.run();
    assert_eq!(finish(&sim.outcomes[1]), (FinishReason::Length, 12), "the base may use the whole cache");
    let again = sim.submit(with_adapter(prompt(4), 3, PREFIX)).unwrap();
    sim.run();
    assert_eq!(sim.probe.entries.load(Ordering::SeqCst), 18);
    assert_eq!(sim.outcomes[again], sim.outcomes[0]);
}

#[test]
fn a_kv_prefix_whose_step_failed_is_copied_again() {
    for fault in [Fault::Error, Fault::Panic, Fault::Copy] {
        let mut sim = Sim::new(&World { prefix_cache: true, ..ROOMY });
        sim.probe.set_fault(fault);
        sim.submit(with_adapter(prompt(4), 3, PREFIX)).unwrap();
        sim.run();
        assert!(sim.outcomes[0].failed.is_some());
        let copied = sim.probe.entries.load(Ordering::SeqCst);
        let idx = sim.submit(with_adapter(prompt(4), 3, PREFIX)).unwrap();
        sim.run();
        assert_eq!(sim.probe.entries.load(Ordering::SeqCst), copied + 9);
        assert_eq!(sim.outcomes[idx].ids(), run_alone(&with_adapter(prompt(4), 3, PREFIX)).ids());
    }
}

#[test]
fn preempted_and_cancelled_sequences_give_their_leading_blocks_back() {
    let world = World { num_blocks: 14, sequences_max: 4, prefix_cache: true, ..ROOMY };
    let requests: Vec<_> = [PREFIX, VIRTUAL, BOTH, PREFIX].map(|id| with_adapter(prompt(4), 20, id)).into();
    let mut sim = Sim::new(&world);
    for request in &requests {
        sim.submit(request.clone()).unwrap();
    }
    let cancelled = sim.submit(with_adapter(prompt(4), 20, PREFIX)).unwrap();
    for _ in 0..6 {
        sim.step();
    }
    sim.cancel(cancelled);
    sim.run();
    assert!(sim.metrics.preemptions.get() >= 2, "{}", sim.metrics.preemptions.get());
    for (request, outcome) in requests.iter().zip(&sim.outcomes) {
        assert_eq!(outcome.clone().apart_from_cache(), run_alone(request));
    }
}

#[test]
fn virtual_tokens_are_shared_under_their_adapter() {
    let mut sim = Sim::new(&World { prefix_cache: true, ..ROOMY });
    let mut tokens_of = |request| {
        let before = sim.probe.tokens.load(Ordering::SeqCst);
        let idx = sim.submit(request).unwrap();
        sim.run();
        (sim.probe.tokens.load(Ordering::SeqCst) - before, sim.outcomes[idx].finish.unwrap().cached_tokens)
    };
    assert_eq!(tokens_of(with_adapter(prompt(9), 1, VIRTUAL)), (12, 0));
    // Three virtual tokens and five of the prompt are two blocks; the last block is never reused.
    assert_eq!(tokens_of(with_adapter(prompt(9), 1, VIRTUAL)), (4, 5));
    assert_eq!(tokens_of(with_adapter(prompt(9), 1, 1)), (9, 0));
}

#[test]
fn tokens_before_the_invocation_are_the_bases() {
    let mut sim = Sim::new(&World { prefix_cache: true, ..ROOMY });
    let [first, second] = lead(ASLEEP).invocation else { panic!("two tokens") };
    let invoked = [prompt(9), vec![*first, *second], prompt(3)].concat();
    let mut cached = |request: &GenerationRequest| {
        let idx = sim.submit(request.clone()).unwrap();
        sim.run();
        assert_eq!(sim.outcomes[idx].ids(), run_alone(request).ids());
        sim.outcomes[idx].finish.unwrap().cached_tokens
    };
    let asleep = with_adapter(prompt(13), 4, ASLEEP);
    assert_eq!(cached(&request(prompt(13), 4)), 0);
    assert_eq!(cached(&asleep), 12, "never invoked: the base");
    assert_eq!(run_alone(&asleep).ids(), run_alone(&request(prompt(13), 4)).ids());
    let awake = with_adapter(invoked.clone(), 4, ASLEEP);
    assert_eq!(cached(&awake), 8, "invoked at 9");
    assert_ne!(run_alone(&awake).ids(), run_alone(&request(invoked.clone(), 4)).ids());
    assert_eq!(cached(&awake), 12);
    assert_eq!(cached(&request(invoked.clone(), 4)), 8, "what the adapter wrote is not the base's");
    // The last occurrence decides.
    let twice = with_adapter([invoked.clone(), invoked].concat(), 1, ASLEEP);
    assert_eq!(cached(&twice), 12, "the base computed them");
}
