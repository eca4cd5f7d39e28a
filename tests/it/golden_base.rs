//! The base models against transformers in float32.

use candle_core::Tensor;
use patchbay::model::{KernelChoice, ModelConfig};

use crate::fixtures;
use crate::runner::{Runner, relative_difference};

/// Rounding of f32 sums in another order, relative to the largest logit.
const F32_TOLERANCE: f32 = 1e-4;

const GREEDY_TOKENS: usize = 16;

/// Calls `claim` with each model's name, runner, prompts and expected logits, under the device's own kernels and under
/// the plain ones.
fn for_each_model(claim: impl Fn(&str, &mut Runner, &[Vec<u32>], &[Tensor])) {
    let prompts = fixtures::prompts();
    for model in fixtures::manifest().models {
        let expected = fixtures::expected(&model.dir);
        let logits: Vec<Tensor> = (0..prompts.len()).map(|p| expected[&format!("logits_{p}")].clone()).collect();
        for kernels in [KernelChoice::Auto, KernelChoice::Plain] {
            let loaded = fixtures::load_model_with(&ModelConfig { kernels, ..fixtures::model_config(&model.name) });
            claim(&format!("{} ({kernels:?})", model.name), &mut Runner::new(loaded), &prompts, &logits);
        }
    }
}

#[track_caller]
fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f32, what: &str) {
    let difference = relative_difference(found, expected);
    assert!(difference < tolerance, "{what}: differs by {difference:e}");
}

#[test]
fn logits_equal_transformers() {
    for_each_model(|name, runner, prompts, expected| {
        for (p, prompt) in prompts.iter().enumerate() {
            let logits = runner.prompt_logits(prompt, None, prompt.len());
            assert_close(&logits, &expected[p], F32_TOLERANCE, &format!("{name} prompt {p}"));
        }
    });
}

#[test]
fn greedy_tokens_equal_transformers() {
    let prompts = fixtures::prompts();
    for model in fixtures::manifest().models {
        let expected = fixtures::expected(&model.dir);
        let mut runner = Runner::new(fixtures::load_model(&model.name));
        for (p, prompt) in prompts.iter().enumerate() {
            let greedy = runner.greedy(&[(prompt, None)], GREEDY_TOKENS).remove(0);
            let greedy: Vec<i64> = greedy.into_iter().map(i64::from).collect();
            assert_eq!(greedy, expected[&format!("greedy_{p}")].to_vec1::<i64>().unwrap(), "{} prompt {p}", model.name);
        }
    }
}

#[test]
fn chunked_prefill_equals_whole() {
    for_each_model(|name, runner, prompts, expected| {
        for chunk in [1, 3, 7] {
            let p = prompts.len() - 1;
            let logits = runner.prompt_logits(&prompts[p], None, chunk);
            assert_close(&logits, &expected[p], F32_TOLERANCE, &format!("{name} chunk {chunk}"));
        }
    });
}

#[test]
fn mixed_batch_equals_each_alone() {
    for_each_model(|name, runner, prompts, expected| {
        let mut contexts: Vec<_> = prompts.iter().map(|prompt| runner.context(prompt, None)).collect();
        // First step: all but the last token of each, where there is one; second step: one token each.
        let mut work: Vec<_> = contexts.iter_mut().filter(|c| c.tokens.len() > 1).collect();
        let mut work: Vec<_> = work
            .iter_mut()
            .map(|c| {
                let len = c.tokens.len() - 1;
                (&mut **c, len)
            })
            .collect();
        runner.step(&mut work);
        let mut work: Vec<_> = contexts.iter_mut().map(|context| (context, 1)).collect();
        for (p, logits) in runner.step(&mut work).iter().enumerate() {
            let last = expected[p].narrow(0, prompts[p].len() - 1, 1).unwrap();
            assert_close(logits, &last, F32_TOLERANCE, &format!("{name} prompt {p}"));
        }
    });
}
