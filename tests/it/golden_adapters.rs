//! Every adapter fixture against PEFT in float32: unmerged, merged, and mixed in one batch.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use patchbay::adapter::{
    AdapterFiles, Formats, KINDS, Kind, LowerOptions, LowerReport, LoweredAdapter, inspect, lower,
};
use patchbay::model::{DtypeChoice, KernelChoice, ModelConfig, QuantChoice};

use crate::fixtures::{self, AdapterCase};
use crate::runner::{Runner, relative_difference};

/// Rounding of f32 sums in another order, relative to the largest logit.
pub(crate) const F32_TOLERANCE: f32 = 1e-4;

const GREEDY_TOKENS: usize = 16;

/// What PEFT answers to a prompt.
pub(crate) struct Asked {
    prompt: usize,
    logits: Tensor,
    greedy: Vec<u32>,
}

/// A case, lowered, with what PEFT computes for it.
struct Lowered {
    case: AdapterCase,
    adapter: LoweredAdapter,
    report: LowerReport,
    /// The prompts that PEFT was asked, by number, with the logits and the greedy tokens of each.
    asked: Vec<Asked>,
}

pub(crate) fn read(case: &AdapterCase) -> AdapterFiles {
    fixtures::adapter_files(&case.dir).unwrap_or_else(|error| panic!("{}: {error}", case.dir))
}

fn lower_case(runner: &Runner, case: &AdapterCase, merge: bool) -> Lowered {
    lower_case_to(runner, case, merge, Formats::uniform(DType::F32))
}

fn lower_case_to(runner: &Runner, case: &AdapterCase, merge: bool, formats: Formats) -> Lowered {
    let options = LowerOptions { merge, formats, own_bytes_max: 1 << 30 };
    let (adapter, report) = lower(&read(case), &runner.model, &options)
        .unwrap_or_else(|error| panic!("{} (merge: {merge}): {error}", case.dir));
    Lowered { case: case.clone(), adapter, report, asked: asked(case) }
}

/// What PEFT answers to the prompts of a case.
pub(crate) fn asked(case: &AdapterCase) -> Vec<Asked> {
    let expected = fixtures::expected(&case.dir);
    let asked = (0..fixtures::prompts().len()).filter_map(|prompt| {
        let logits = expected.get(&format!("logits_{prompt}"))?.clone();
        let greedy = expected[&format!("greedy_{prompt}")].to_vec1::<i64>().unwrap();
        Some(Asked { prompt, logits, greedy: greedy.into_iter().map(|token| token as u32).collect() })
    });
    let asked: Vec<Asked> = asked.collect();
    assert!(!asked.is_empty(), "{}", case.dir);
    asked
}

/// Calls `claim` for each model with its cases.
pub(crate) fn for_each_model(claim: impl Fn(&mut Runner, &[AdapterCase])) {
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
    difference_of(runner, &lowered.asked, adapter)
}

/// The same for what PEFT answers.
pub(crate) fn difference_of(runner: &mut Runner, asked: &[Asked], adapter: Option<&LoweredAdapter>) -> f32 {
    let prompts = fixtures::prompts();
    let each = asked.iter().map(|asked| {
        let prompt = &prompts[asked.prompt];
        relative_difference(&runner.prompt_logits(prompt, adapter, prompt.len()), &asked.logits)
    });
    each.fold(0.0, f32::max)
}

/// Panics with all the failures, so that one run shows the pattern in them.
#[track_caller]
pub(crate) fn assert_none(failures: &[String]) {
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

/// The device's own kernels have their tests against the plain ones; what stands before a prompt, or inside a layer, goes
/// another way in each.
#[test]
fn logits_of_adapters_beside_the_linears_equal_peft_with_plain_kernels() {
    let failures = std::cell::RefCell::new(Vec::new());
    for_each_model_with(
        |config| config.kernels = KernelChoice::Plain,
        |runner, cases| {
            for case in cases {
                let lowered = lower_case(runner, case, false);
                let LoweredAdapter { invocation_tokens, layers, gates, .. } = &lowered.adapter;
                let is_beside = lowered.adapter.num_leading() > 0 || !layers.is_empty() || gates.is_some();
                if !is_beside && invocation_tokens.is_empty() {
                    continue;
                }
                let difference = difference(runner, &lowered, Some(&lowered.adapter));
                if difference >= F32_TOLERANCE {
                    failures.borrow_mut().push(format!("{}: differs by {difference:e}", case.dir));
                }
            }
        },
    );
    assert_none(&failures.into_inner());
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
                    let lowered = lower_case_to(runner, case, merge, runner.model.info().adapter_formats);
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

/// So do the CPU's own 8-bit integers, the output head's included, by groups of 64 inputs.
const INT8_TOLERANCE: f32 = 0.12;

/// DoRA and bat read the base weight: it must be the one that the quantised product multiplies with.
#[test]
fn merged_equals_unmerged_on_a_quantised_base() {
    let failures = std::cell::RefCell::new(Vec::new());
    for (quant, tolerance) in [(QuantChoice::Q8_0, Q8_TOLERANCE), (QuantChoice::Int8, INT8_TOLERANCE)] {
        for_each_model_with(
            |config| config.quant = Some(quant),
            |runner, cases| {
                let prompt = &fixtures::prompts()[1];
                for case in cases {
                    let [apart, merged] = [false, true].map(|merge| {
                        let lowered = lower_case(runner, case, merge);
                        runner.prompt_logits(prompt, Some(&lowered.adapter), prompt.len())
                    });
                    let difference = relative_difference(&merged, &apart);
                    if difference >= tolerance {
                        failures.borrow_mut().push(format!("{quant:?} {}: differs by {difference:e}", case.dir));
                    }
                }
            },
        );
    }
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
                let asked: Vec<&Asked> =
                    batch.iter().enumerate().map(|(idx, one)| &one.asked[(p + idx) % one.asked.len()]).collect();
                let rest = batch.iter().zip(&asked);
                work.extend(rest.map(|(one, asked)| (prompts[asked.prompt].as_slice(), Some(&one.adapter))));
                let found = runner.greedy(&work, GREEDY_TOKENS);
                assert_eq!(found[0].iter().map(|t| i64::from(*t)).collect::<Vec<_>>(), expected, "{} base", model.name);
                for ((one, asked), found) in batch.iter().zip(&asked).zip(&found[1..]) {
                    if *found != asked.greedy {
                        let at = format!("{} (merged: {}) prompt {}", one.case.dir, one.report.merged, asked.prompt);
                        failures.borrow_mut().push(at);
                    }
                }
            }
        }
    });
    assert_none(&failures.into_inner());
}

/// One request of every kind that there is, and one to the bare base.
#[test]
fn one_batch_holds_every_kind() {
    const MODEL: &str = "llama";
    /// Room for 100 contexts of some 60 positions.
    const NUM_BLOCKS: usize = 1200;
    let model = fixtures::load_model(MODEL);
    let dtype = model.info().dtype;
    let mut runner = Runner::with_cache(model, NUM_BLOCKS, dtype);
    let cases = fixtures::manifest().cases;
    let of_kind = |kind: &Kind| {
        let mut cases = cases.iter().filter(|case| case.model == MODEL && case.peft_type == kind.peft_type);
        let case = cases.find(|case| !case.identity);
        lower_case(&runner, case.unwrap_or_else(|| panic!("{} has no case on {MODEL}", kind.peft_type)), false)
    };
    let lowered: Vec<Lowered> = KINDS.iter().map(of_kind).collect();
    let prompts = fixtures::prompts();
    let mut work = vec![(prompts[1].as_slice(), None)];
    let asked: Vec<&Asked> = lowered.iter().enumerate().map(|(idx, one)| &one.asked[idx % one.asked.len()]).collect();
    work.extend(lowered.iter().zip(&asked).map(|(one, asked)| (prompts[asked.prompt].as_slice(), Some(&one.adapter))));
    let found = runner.greedy(&work, GREEDY_TOKENS);
    let expected: Vec<i64> = fixtures::expected(&format!("models/{MODEL}"))["greedy_1"].to_vec1().unwrap();
    assert_eq!(found[0].iter().map(|t| i64::from(*t)).collect::<Vec<_>>(), expected, "base");
    for ((one, asked), found) in lowered.iter().zip(&asked).zip(&found[1..]) {
        assert_eq!(*found, asked.greedy, "{} prompt {}", one.case.dir, asked.prompt);
    }
}

/// Kinds that put a whole or a part of W together anew: their start is W up to rounding. Whether that is nothing at all
/// depends on the processor.
const REBUILT: &[&str] = &["DEFT", "OSF", "FROD", "SVFIT"];

#[test]
fn identity_adapters_equal_the_base_and_say_so() {
    for_each_model(|runner, cases| {
        for case in cases {
            let lowered = lower_case(runner, case, false);
            let warned = lowered.report.warnings.iter().any(|warning| warning.contains("no effect"));
            let is_rounded = case.identity && REBUILT.contains(&case.peft_type.as_str());
            assert!(is_rounded || warned == case.identity, "{}: {:?}", case.dir, lowered.report.warnings);
            if case.identity {
                assert!(difference(runner, &lowered, None) < F32_TOLERANCE, "{}", case.dir);
            }
        }
    });
}

/// Kinds without an adapter that equals the base: what stands before a prompt is attended to, whatever its values.
const NO_IDENTITY: &[&str] =
    &["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "MULTITASK_PROMPT_TUNING"];

#[test]
fn every_kind_has_an_identity_case_unless_it_cannot() {
    let cases = fixtures::manifest().cases;
    for Kind { peft_type, .. } in KINDS {
        let has = cases.iter().any(|case| case.identity && case.peft_type == *peft_type);
        assert_ne!(has, NO_IDENTITY.contains(peft_type), "{peft_type}: has an identity case: {has}");
    }
    let served = |name: &&&str| KINDS.iter().any(|kind| kind.peft_type == **name);
    assert_eq!(NO_IDENTITY.iter().chain(REBUILT).filter(served).count(), NO_IDENTITY.len() + REBUILT.len());
}

#[test]
fn reports_name_kind_modules_ranks_and_bytes() {
    for_each_model(|runner, cases| {
        for case in cases {
            let Lowered { report, adapter, .. } = lower_case(runner, case, false);
            let at = format!("{}: {report:?}", case.dir);
            assert_eq!(report.kind, case.peft_type, "{at}");
            let is_leading = report.leading_tokens > 0;
            assert_eq!(report.modules == 0, is_leading, "{at}");
            assert_eq!(report.leading_tokens, adapter.num_leading(), "{at}");
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
            let options = LowerOptions { merge: true, formats: Formats::uniform(DType::F32), own_bytes_max };
            let error = lower(&read(case), &runner.model, &options).unwrap_err().to_string();
            assert!(error.contains("merged_bytes_max"), "{}: {error}", case.dir);
        }
    });
}

/// A delta of high rank is served from a dense weight where that costs less, from its factors where the budget is spent,
/// and either way the report says so.
#[test]
fn without_room_for_dense_weights_high_ranks_stay_factors() {
    let seen = std::cell::Cell::new(0);
    for_each_model(|runner, cases| {
        for case in cases {
            let dense = lower_case(runner, case, false);
            if !dense.report.own_weights.iter().all(|own| own.reason.contains("delta of this rank"))
                || dense.report.own_weights.is_empty()
            {
                continue;
            }
            assert!(dense.report.own_weight_bytes > 0, "{}: {:?}", case.dir, dense.report);
            let options = LowerOptions { merge: false, formats: Formats::uniform(DType::F32), own_bytes_max: 0 };
            let (adapter, report) = lower(&read(case), &runner.model, &options).unwrap();
            assert_eq!(report.own_weight_bytes, 0, "{}: {report:?}", case.dir);
            assert!(
                report.warnings.iter().any(|warning| warning.contains("merged_bytes_max")),
                "{}: {report:?}",
                case.dir
            );
            let difference = difference(runner, &dense, Some(&adapter));
            assert!(difference < F32_TOLERANCE, "{}: differs by {difference:e}", case.dir);
            seen.set(seen.get() + 1);
        }
    });
    assert!(seen.get() > 0, "no fixture has such a delta");
}
