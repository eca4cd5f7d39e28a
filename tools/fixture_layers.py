"""Cases and faulty adapters of the kinds that work inside a decoder layer, beside its linears and norms."""

import torch

from fixture_cases import Case
from fixture_common import RANDOM_RULES
from fixture_refused import MODEL, Refused, noise, with_value

HIDDEN = 32
PLACE = "model.layers.0.output_adapters.adapters.task."
RANDOM_RULES.update(
    {"adaption_prompt": lambda old, noise: 2 * noise, "adaption_gate": lambda old, noise: 1.5 + 0.1 * noise}
)


def adaption(name: str, what: str, models: tuple[str, ...] = ("llama",), identity: bool = False, **config) -> Case:
    """A case of adaption prompts."""
    return Case(name, "ADAPTION_PROMPT", what, models, config, identity=identity, prompts=(1, 2))


CASES = [
    adaption(
        "adaption_prompt",
        "all layers; a bias of the output projection counts twice",
        ("llama", "llama_bias", "mistral", "llama_rope_yarn"),
        adapter_len=5,
        adapter_layers=2,
    ),
    adaption("adaption_prompt_last", "the last layer only, more vectors", adapter_len=17, adapter_layers=1),
    adaption("adaption_prompt_one", "one vector, whose softmax is one", adapter_len=1, adapter_layers=2),
    adaption("adaption_prompt_identity", "gates of zero", identity=True, adapter_len=3, adapter_layers=2),
]


def bottleneck(name: str, what: str, names: str, tensors: dict | None = None, top: dict | None = None, **config) -> Refused:
    """A faulty AdapterHub bottleneck; tensors replace the sound ones (None removes one)."""
    sound = {
        "adapter_down.0.weight": noise(4, HIDDEN),
        "adapter_down.0.bias": noise(4),
        "adapter_up.weight": noise(HIDDEN, 4),
        "adapter_up.bias": noise(HIDDEN),
    }
    sound = {f"{PLACE}{suffix}": value for suffix, value in sound.items()}
    tensors = {key: value for key, value in (sound | (tensors or {})).items() if value is not None}
    inner = {
        "mh_adapter": False,
        "output_adapter": True,
        "reduction_factor": 8,
        "non_linearity": "relu",
        "original_ln_before": True,
        "leave_out": [1],
    }
    files = {
        "config": inner | config,
        "hidden_size": HIDDEN,
        "model_name": f"patchbay/{MODEL}",
        "model_type": "llama",
        "name": "task",
        "version": "adapters.1.3.0",
    }
    return Refused(f"bottleneck_{name}", what, names, files | (top or {}), tensors)


def bottlenecks() -> list[Refused]:
    """Faults of AdapterHub's bottlenecks."""
    down, up = f"{PLACE}adapter_down.0.weight", f"{PLACE}adapter_up.bias"
    nan = with_value({down: noise(4, HIDDEN)}, down, float("nan"))
    return [
        bottleneck("key", "a key outside the layers", "prefix", {"invertible_adapters.task.F.0.weight": noise(2, 2)}),
        bottleneck("surplus", "a layer that is left out", "output_adapters", {PLACE.replace("0", "1") + "x": noise(2)}),
        bottleneck("missing", "no bias on the way up", up, {up: None}),
        bottleneck("shape", "another width than the config's", down, reduction_factor=16),
        bottleneck("nan", "a value is NaN", down, nan),
        bottleneck("field", "a field that nobody knows", "mystery", mystery=1),
        bottleneck("top_field", "a field that nobody knows", "mystery", top={"mystery": 1}),
        bottleneck("hidden", "made for another size", "hidden_size", top={"hidden_size": 64}),
        bottleneck("name", "keys of another name", "other", top={"name": "other"}),
        bottleneck("gating", "a gate over all tokens", "use_gating", use_gating=True),
        bottleneck("invertible", "an invertible adapter", "inv_adapter", inv_adapter="nice"),
        bottleneck("compacter", "hypercomplex layers", "phm_layer", phm_layer=True),
        bottleneck("post_add", "a residual behind a norm that is not there", "residual_before_ln", residual_before_ln="post_add"),
        bottleneck("architecture", "AdapterHub's LoRA", "architecture", architecture="lora", r=8),
        bottleneck("activation", "an unknown function", "non_linearity", non_linearity="wobble"),
        bottleneck("factor", "no width for a layer", "reduction_factor", reduction_factor={"1": 8}),
        bottleneck("scaling", "an unknown factor", "scaling", scaling="twice"),
        bottleneck(
            "norms",
            "two names of one norm that differ",
            "same norm",
            {
                down: None,
                f"{PLACE}adapter_down.0.weight": noise(HIDDEN),
                f"{PLACE}adapter_down.0.bias": noise(HIDDEN),
                f"{PLACE}adapter_norm_before.weight": torch.ones(HIDDEN),
                f"{PLACE}adapter_norm_before.bias": noise(HIDDEN),
                f"{PLACE}adapter_down.1.weight": noise(4, HIDDEN),
                f"{PLACE}adapter_down.1.bias": noise(4),
            },
            ln_before=True,
        ),
        bottleneck("idle", "tensors of a sublayer that is not chosen", "output_adapters", output_adapter=False),
    ]


ATTENTION = "base_model.model.model.layers.1.self_attn."


def adaption_fault(name: str, what: str, names: str, tensors: dict | None = None, **changed) -> Refused:
    """A faulty file of adaption prompts; tensors replace the sound ones (None removes one)."""
    model = changed.pop("model", MODEL)
    hidden = changed.pop("hidden", HIDDEN)
    sound = {f"{ATTENTION}adaption_prompt": noise(1, 4, hidden), f"{ATTENTION}adaption_gate": noise(1)}
    tensors = {key: value for key, value in (sound | (tensors or {})).items() if value is not None}
    config = {
        "peft_type": "ADAPTION_PROMPT",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"patchbay/{model}",
        "inference_mode": True,
        "target_modules": "self_attn",
        "adapter_len": 4,
        "adapter_layers": 1,
    }
    return Refused(f"adaption_{name}", what, names, config | changed, tensors, model)


def adaptions() -> list[Refused]:
    """Faults of adaption prompts."""
    prompt, gate = f"{ATTENTION}adaption_prompt", f"{ATTENTION}adaption_gate"
    nan = with_value({prompt: noise(1, 4, HIDDEN)}, prompt, float("nan"))
    return [
        adaption_fault("key", "an unknown tensor", "adaption_bias", {f"{ATTENTION}adaption_bias": noise(1)}),
        adaption_fault("missing", "no gate", gate, {gate: None}),
        adaption_fault("shape", "another length than the config's", prompt, adapter_len=5),
        adaption_fault("layers", "more layers than there are", "adapter_layers", adapter_layers=3),
        adaption_fault("first", "a layer that is not among the last ones", "layers.0", {prompt.replace("1.self", "0.self"): noise(1, 4, HIDDEN)}),
        adaption_fault("nan", "a value is NaN", prompt, nan),
        adaption_fault("length", "no length", "adapter_len", adapter_len=None),
        adaption_fault("target", "another module", "target_modules", target_modules="attn"),
        adaption_fault("field", "a field that nobody knows", "mystery", mystery=1),
        adaption_fault("saved", "a module beside it", "modules_to_save", modules_to_save=["lm_head"]),
        adaption_fault("fused", "a base with fused projections", "k_proj", model="phi3"),
        adaption_fault("normed", "a base that norms its queries", "norms its queries", model="qwen3"),
    ]


REFUSED = bottlenecks() + adaptions()
