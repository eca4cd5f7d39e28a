//! Quantised base weights.

use patchbay::adapter::{BaseWeights, LinearSlots, LoweredAdapter, SiteKind, Weight};
use patchbay::model::QuantChoice;

use crate::fixtures;
use crate::runner::{Runner, relative_difference};

/// What rounding weights and activations may do to the logits of the tiny model, relative to the largest. Random
/// weights over 32 inputs average little out: 8 bits give some percent, 4 bits ten times that.
const FORMATS: &[(QuantChoice, f32)] = &[(QuantChoice::Q8_0, 0.06), (QuantChoice::Q4_0, 0.5)];

/// The quantised product also rounds the activations, to 8 bits by blocks of 32; a dense copy does not.
const ACTIVATION_ROUNDING: f32 = 0.05;

#[test]
fn logits_stay_near_the_unquantized_ones() {
    let prompt = &fixtures::prompts()[3];
    let exact = Runner::new(fixtures::load_model("llama")).prompt_logits(prompt, None, prompt.len());
    for (quant, bound) in FORMATS {
        let logits = Runner::new(fixtures::load_quantized("llama", *quant)).prompt_logits(prompt, None, prompt.len());
        let difference = relative_difference(&logits, &exact);
        assert!(difference > 0. && difference < *bound, "{quant:?} differs by {difference}");
    }
}

#[test]
fn reported_weights_are_those_multiplied_with() {
    let prompt = &fixtures::prompts()[3];
    for (quant, _) in FORMATS {
        let mut quantized = Runner::new(fixtures::load_quantized("llama_bias", *quant));
        let mut dense_copy = LoweredAdapter::default();
        for (id, site) in quantized.model.sites().iter() {
            if matches!(site.kind, SiteKind::Linear { .. }) {
                let weight = Weight::Own(quantized.model.weight(id).unwrap());
                dense_copy.linears.insert(id, LinearSlots { weight, ..LinearSlots::default() });
            }
        }
        let base = quantized.prompt_logits(prompt, None, prompt.len());
        let copy = quantized.prompt_logits(prompt, Some(&dense_copy), prompt.len());
        let difference = relative_difference(&base, &copy);
        assert!(difference < ACTIVATION_ROUNDING, "{quant:?} differs by {difference}");
    }
}

#[test]
fn rows_that_blocks_do_not_fill_take_smaller_blocks_or_none() {
    // Rows of 32 and 48 elements: no block of 256 fits, 32 fits the former only.
    let exact = fixtures::load_model("llama");
    let quantized = fixtures::load_quantized("llama", QuantChoice::Q4K);
    let changed = |path: &str| {
        let id = exact.sites().find(path).unwrap();
        relative_difference(&quantized.weight(id).unwrap(), &exact.weight(id).unwrap()) > 0.
    };
    assert!(changed("model.layers.0.self_attn.q_proj"));
    for path in ["model.layers.0.mlp.down_proj", "lm_head", "model.embed_tokens", "model.norm"] {
        assert!(!changed(path), "{path}");
    }
    assert!(quantized.info().weight_bytes < exact.info().weight_bytes);
}
