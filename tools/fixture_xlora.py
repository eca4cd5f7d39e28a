"""Faulty X-LoRA adapters; make_fixtures_xlora.py makes the sound ones."""

from fixture_cases import Case
from fixture_refused import MODEL, Refused, lora_tensors, noise, with_value

CASES: list[Case] = []

CLASSIFIER = "base_model.internal_xlora_classifier.layers."
CONFIG = {
    "peft_type": "XLORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": f"patchbay/{MODEL}",
    "hidden_size": 32,
    "adapters": {"0": "0", "1": "1"},
}
TENSORS = {f"{CLASSIFIER}0.weight": noise(2, 32), f"{CLASSIFIER}0.bias": noise(2)}
EXPERT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [0]}
FACTORS = lora_tensors()
SOUND = (EXPERT, FACTORS)
HEAD = "base_model.model.lm_head"
EMBEDDED = {
    "base_model.model.model.embed_tokens.lora_embedding_A": noise(2, 128),
    "base_model.model.model.embed_tokens.lora_embedding_B": noise(32, 2),
}


def fault(name: str, what: str, names: str, tensors: dict | None = None, parts: tuple = (SOUND, SOUND), **config) -> Refused:
    """A fault of the classifier: tensors that replace the sound ones (None removes one), and fields."""
    kept = {key: value for key, value in (TENSORS | (tensors or {})).items() if value is not None}
    return Refused(f"xlora_{name}", what, names, CONFIG | config, kept, parts=parts)


def of_expert(name: str, what: str, names: str, tensors: dict | None = None, **config) -> Refused:
    """A fault of the second expert."""
    return fault(name, what, names, parts=(SOUND, (EXPERT | config, FACTORS | (tensors or {}))))


WEIGHT, BIAS = f"{CLASSIFIER}0.weight", f"{CLASSIFIER}0.bias"
REFUSED = [
    fault("field", "a field that nobody knows", "mystery", mystery=1),
    fault("adapters", "no experts", "adapters", adapters=None),
    fault("names", "names that PEFT does not give", "adapters", adapters={"first": "0", "second": "1"}),
    fault("part", "fewer experts than names", "`1` is missing", parts=(SOUND,)),
    fault("hidden", "a classifier for another model", "hidden_size", hidden_size=64),
    fault("hidden_default", "no size, for which PEFT takes 4096", "hidden_size", hidden_size=None),
    fault("pass", "a first pass with the experts", "scaling_pass_value", scaling_pass_value=0.5),
    fault("temperature", "no temperature", "softmax_temperature", softmax_temperature=0),
    fault("top_k", "more kept than there are", "top_k_lora", top_k_lora=3),
    fault("target", "modules beside the experts' own", "target_modules", target_modules=["q_proj"]),
    fault("saved", "a module beside it", "modules_to_save", modules_to_save=["lm_head"]),
    fault("missing", "no weight, as PEFT saves it", WEIGHT, {WEIGHT: None}),
    fault("bias", "no bias", BIAS, {BIAS: None}),
    fault("shape", "gates for another number of experts", WEIGHT, {WEIGHT: noise(3, 32)}),
    fault("layers", "gates for one layer where each linear has its own", WEIGHT, parts=(SOUND, (EXPERT | {"target_modules": ["k_proj"]}, lora_tensors("model.layers.0.self_attn.k_proj", features_out=16))), layerwise_scalings=True),
    fault("depth", "a linear less than the depth", f"{CLASSIFIER}3.weight", {WEIGHT: noise(4, 32), BIAS: noise(4)}, xlora_depth=2, xlora_size=4),
    fault("surplus", "a linear more than the depth", f"{CLASSIFIER}3.weight", {f"{CLASSIFIER}3.weight": noise(2, 2)}),
    fault("nan", "a value is NaN", WEIGHT, with_value(TENSORS, WEIGHT, float("nan"))),
    fault("factor", "a factor of an expert in the classifier's file", "lora_A", FACTORS),
    of_expert("type", "an expert of another kind", "peft_type", peft_type="LOHA", alpha=4),
    of_expert("dora", "an expert with magnitudes", "use_dora", use_dora=True),
    of_expert("biased", "an expert with biases", "bias", bias="all"),
    of_expert("factor_bias", "an expert with biases of its factors", "lora_bias", lora_bias=True),
    of_expert("start", "an expert on a changed base", "init_lora_weights", init_lora_weights="pissa"),
    of_expert("replaced", "an expert with a module beside it", "modules_to_save", {f"{HEAD}.weight": noise(128, 32)}, modules_to_save=["lm_head"]),
    of_expert("embedding", "an expert on the embedding", "embed_tokens", EMBEDDED, target_modules=["layers.0.self_attn.q_proj", "embed_tokens"], layers_to_transform=None),
    of_expert("expert_field", "an expert with a field that nobody knows", "mystery", mystery=1),
    of_expert("expert_key", "an expert with the prefix that PEFT gives it in a mixture", "base_model.lora_model.", {"base_model.lora_model.model.lm_head.weight": noise(2, 2)}),
]
