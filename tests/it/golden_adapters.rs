//! Every adapter fixture against PEFT in float32: unmerged, merged, and mixed in one batch.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use patchbay::adapter::{AdapterFiles, LowerOptions, LowerReport, LoweredAdapter, inspect, lower};
use patchbay::model::{DtypeChoice, ModelConfig, QuantChoice};

use crate::fixtures::{self, AdapterCase};
use crate::runner::{Runner, relative_difference};

/// Rounding of f32 sums in another order, relative to the largest logit.
const F32_TOLERANCE: f32 = 1e-4;

const GREEDY_TOKENS: usize = 16;

/// A case, lowered, with what PEFT computes for it.
struct Lowered {
    case: AdapterCase,
    adapter: LoweredAdapter,
    report: LowerReport,
    logits: Vec<Tensor>,
    greedy: Vec<Vec<u32>>,
}

fn read(case: &AdapterCase) -> AdapterFiles {
    let dir = fixtures::dir().join(&case.dir);
    let read =
        |name: &str| std::fs::read(dir.join(name)).unwrap_or_else(|error| panic!("{}/{name}: {error}", case.dir));
    AdapterFiles { config: read("adapter_config.json"), weights: read("adapter_model.safetensors") }
}

fn lower_case(runner: &Runner, case: &AdapterCase, merge: bool) -> Lowered {
    lower_case_to(runner, case, merge, DType::F32)
}

fn lower_case_to(runner: &Runner, case: &AdapterCase, merge: bool, dtype: DType) -> Lowered {
    let options = LowerOptions { merge, dtype, own_bytes_max: 1 << 30 };
    let (adapter, report) = lower(&read(case), &runner.model, &options)
        .unwrap_or_else(|error| panic!("{} (merge: {merge}): {error}", case.dir));
    let expected = fixtures::expected(&case.dir);
    let prompts = fixtures::prompts().len();
    let tokens = |p: usize| expected[&format!("greedy_{p}")].to_vec1::<i64>().unwrap();
    Lowered {
        case: case.clone(),
        adapter,
        report,
        logits: (0..prompts).map(|p| expected[&format!("logits_{p}")].clone()).collect(),
        greedy: (0..prompts).map(|p| tokens(p).into_iter().map(|token| token as u32).collect()).collect(),
    }
}

/// Calls `claim` for each model with its cases.
fn for_each_model(claim: impl Fn(&mut Runner, &[AdapterCase])) {
    for_each_model_with(|_| (), claim);
}

/// The same with another model config.
fn for_each_model_with(change: impl Fn(&mut ModelConfig), claim: impl Fn(&mut Runner, &[AdapterCase])) {
    let mut by_model: BTreeMap<String, Vec<AdapterCase>> = BTreeMap::new();
    for case in fixtures::manifest().cases {
        by_model.entry(case.model.clone()).or_default().push(case);
    }
    for (model, cases) in by_model {
        let mut config = fixtures::model_config(&model);
        change(&mut config);
        claim(&mut Runner::new(fixtures::load_model_with(&config)), &cases);
    }
}

/// The largest difference of the logits over all prompts; every prompt alone, prefilled in one piece.
fn difference(runner: &mut Runner, lowered: &Lowered, adapter: Option<&LoweredAdapter>) -> f32 {
    let prompts = fixtures::prompts();
    let each = prompts.iter().zip(&lowered.logits).map(|(prompt, expected)| {
        let found = runner.prompt_logits(prompt, adapter, prompt.len());
        relative_difference(&found, expected)
    });
    each.fold(0.0, f32::max)
}

/// Panics with all the failures, so that one run shows the pattern in them.
#[track_caller]
fn assert_none(failures: &[String]) {
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

#[track_caller]
fn check_logits(merge: bool) {
    let failures = std::cell::RefCell::new(Vec::new());
    for_each_model(|runner, cases| {
        for case in cases {
            let lowered = lower_case(runner, case, merge);
            let difference = difference(runner, &lowered, Some(&lowered.adapter));
            if difference >= F32_TOLERANCE {
                failures.borrow_mut().push(format!("{}: differs by {difference:e}", case.dir));
            }
        }
    });
    assert_none(&failures.into_inner());
}

#[test]
fn logits_equal_peft() {
    check_logits(false);
}

#[test]
fn merged_logits_equal_peft() {
    check_logits(true);
}

/// Half precision rounds weights and activations to 8 bits, and some fixtures scale their deltas up; 0.055 is the worst
/// that was measured. A wrong formula is off by a multiple of this.
const BF16_TOLERANCE: f32 = 0.08;

#[test]
fn bf16_logits_are_close_to_peft() {
    let failures = std::cell::RefCell::new(Vec::new());
    for_each_model_with(
        |config| config.dtype = DtypeChoice::Bf16,
        |runner, cases| {
            for case in cases {
                for merge in [false, true] {
                    let lowered = lower_case_to(runner, case, merge, DType::BF16);
                    let difference = difference(runner, &lowered, Some(&lowered.adapter));
                    if difference >= BF16_TOLERANCE {
                        failures.borrow_mut().push(format!("{} (merge: {merge}): differs by {difference:e}", case.dir));
                    }
                }
            }
        },
    );
    assert_none(&failures.into_inner());
}

/// The quantised product rounds the activations too, to 8 bits per block; 0.056 is the worst that was measured.
const Q8_TOLERANCE: f32 = 0.08;

/// DoRA and bat read the base weight: it must be the one that the quantised product multiplies with.
#[test]
fn merged_equals_unmerged_on_a_quantised_base() {
    let failures = std::cell::RefCell::new(Vec::new());
    for_each_model_with(
        |config| config.quant = Some(QuantChoice::Q8_0),
        |runner, cases| {
            let prompt = &fixtures::prompts()[1];
            for case in cases {
                let [apart, merged] = [false, true].map(|merge| {
                    let lowered = lower_case(runner, case, merge);
                    runner.prompt_logits(prompt, Some(&lowered.adapter), prompt.len())
                });
                let difference = relative_difference(&merged, &apart);
                if difference >= Q8_TOLERANCE {
                    failures.borrow_mut().push(format!("{}: differs by {difference:e}", case.dir));
                }
            }
        },
    );
    assert_none(&failures.into_inner());
}

/// All adapters of a model and the bare base, in one batch, from the first token to the last.
#[test]
fn greedy_tokens_equal_peft_with_all_adapters_in_one_batch() {
    /// Contexts that the runner's cache holds at once.
    const CONTEXTS_MAX: usize = 8;
    let prompts = fixtures::prompts();
    let models = fixtures::manifest().models;
    let failures = std::cell::RefCell::new(Vec::new());
    for_each_model(|runner, cases| {
        let model = models.iter().find(|model| model.name == cases[0].model).unwrap();
        let base = fixtures::expected(&model.dir);
        let lowered: Vec<Lowered> = cases
            .iter()
            .enumerate()
            .flat_map(|(idx, case)| [idx % 2 == 0, idx % 2 == 1].map(|merge| lower_case(runner, case, merge)))
            .collect();
        for batch in lowered.chunks(CONTEXTS_MAX - 1) {
            for p in 0..prompts.len() {
                let expected: Vec<i64> = base[&format!("greedy_{p}")].to_vec1().unwrap();
                let mut work = vec![(prompts[p].as_slice(), None)];
                // Prompts of different lengths side by side.
                let prompt_of = |idx: usize| (p + idx) % prompts.len();
                let rest = batch.iter().enumerate();
                work.extend(rest.map(|(idx, one)| (prompts[prompt_of(idx)].as_slice(), Some(&one.adapter))));
                let found = runner.greedy(&work, GREEDY_TOKENS);
                assert_eq!(found[0].iter().map(|t| i64::from(*t)).collect::<Vec<_>>(), expected, "{} base", model.name);
                for (idx, one) in batch.iter().enumerate() {
                    if found[idx + 1] != one.greedy[prompt_of(idx)] {
                        let at = format!("{} (merged: {}) prompt {}", one.case.dir, one.report.merged, prompt_of(idx));
                        failures.borrow_mut().push(at);
                    }
                }
            }
        }
    });
    assert_none(&failures.into_inner());
}

#[test]
fn identity_adapters_equal_the_base_and_say_so() {
    for_each_model(|runner, cases| {
        for case in cases {
            let lowered = lower_case(runner, case, false);
            let warned = lowered.report.warnings.iter().any(|warning| warning.contains("no effect"));
            assert_eq!(warned, case.identity, "{}: {:?}", case.dir, lowered.report.warnings);
            if case.identity {
                assert!(difference(runner, &lowered, None) < F32_TOLERANCE, "{}", case.dir);
            }
        }
    });
}

#[test]
fn reports_name_kind_modules_ranks_and_bytes() {
    for_each_model(|runner, cases| {
        for case in cases {
            let Lowered { report, adapter, .. } = lower_case(runner, case, false);
            let at = format!("{}: {report:?}", case.dir);
            assert_eq!(report.kind, case.peft_type, "{at}");
            assert!(report.modules > 0, "{at}");
            assert_eq!(report.ranks, inspect(&read(case)).unwrap().ranks, "{at}");
            assert_eq!(report.own_weights.is_empty(), report.own_weight_bytes == 0, "{at}");
            assert_eq!(report.bytes, adapter.bytes(), "{at}");
            assert!(report.own_weight_bytes <= report.bytes, "{at}");
        }
    });
}

#[test]
fn merging_beyond_the_budget_is_refused() {
    for_each_model(|runner, cases| {
        for case in cases {
            let merged = lower_case(runner, case, true);
            if merged.report.own_weight_bytes == 0 {
                continue;
            }
            let own_bytes_max = merged.report.own_weight_bytes - 1;
            let options = LowerOptions { merge: true, dtype: DType::F32, own_bytes_max };
            let error = lower(&read(case), &runner.model, &options).unwrap_err().to_string();
            assert!(error.contains("merged_bytes_max"), "{}: {error}", case.dir);
        }
    });
}
