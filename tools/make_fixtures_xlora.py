"""Adds X-LoRA adapters to tests/fixtures: a classifier and LoRA experts, saved by xlora.py.

Run after make_fixtures.py, in the same environment, from the repository root.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from safetensors.torch import load_file

import xlora
from fixture_common import (
    ATTEMPTS_MAX,
    EFFECT_MIN,
    MARGIN_MIN,
    Bases,
    begin,
    expected_outputs,
    forward_logits,
    fresh_dir,
    generator,
    largest_difference,
    load_expected,
    put_cases,
    randomize_adapter,
    save_expected,
    tidy_adapter_dir,
    write_json,
)

# The least distance between the last gate that is kept and the first that is not, unless a softmax made both nothing: in
# half precision the same are kept.
GAP_MIN = 0.04
NOTHING = 0.01
# The least spread of a gate over the tokens of a prompt, so that gates of another token would show.
SPREAD_MIN = 0.1
# What an adapter without effect may differ from the base, whose outputs another processor may have made.
ROUNDING = 1e-5
# Classifiers tried with the same experts.
CLASSIFIERS = 200
# Fields that say nothing of a plain LoRA, whose configs are half of a small fixture.
KEPT = {
    "alpha_pattern", "base_model_name_or_path", "bias", "init_lora_weights", "layers_to_transform", "lora_alpha",
    "lora_dropout", "peft_type", "r", "rank_pattern", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip


@dataclass
class Case:
    """One adapter; `experts` are configs of LoRAs, `config` is the XLoraConfig's."""

    name: str
    what: str
    model: str
    experts: list[dict]
    config: dict = field(default_factory=dict)
    prompts: tuple[int, ...] = (1,)
    identity: bool = False


def lora(r: int, alpha: float, *targets: str, **config) -> dict:
    """An expert."""
    return {"r": r, "lora_alpha": alpha, "target_modules": list(targets)} | config


CASES = [
    Case(
        "xlora",
        "two experts of other ranks, scales and modules, gates for all layers",
        "llama",
        [lora(2, 8, "q_proj", "down_proj"), lora(3, 6, "q_proj", "v_proj")],
        prompts=(1, 2),
    ),
    Case(
        "xlora_layers",
        "gates for each layer, two of three kept, from three linears with dropout between",
        "llama",
        [lora(2, 8, "v_proj", "up_proj"), lora(2, 6, "v_proj"), lora(1, 5, "up_proj", layers_to_transform=[1])],
        {"layerwise_scalings": True, "top_k_lora": 2, "xlora_depth": 3, "xlora_size": 6, "softmax_temperature": 0.5},
    ),
    Case(
        "xlora_raw",
        "gates without a softmax and a weight for all, from two linears without dropout",
        "llama_bias",
        [lora(2, 3, "o_proj", use_rslora=True), lora(2, 4, "gate_proj", "o_proj", alpha_pattern={"gate_proj": 8})],
        {
            "enable_softmax": False,
            "xlora_depth": 2,
            "xlora_size": 5,
            "xlora_dropout_p": 0.0,
            "global_scaling_weight": 0.7,
        },
        prompts=(1, 2),
    ),
    Case(
        "xlora_kept",
        "a softmax of what is kept of three experts for each layer",
        "mistral",
        [lora(2, 8, "k_proj"), lora(1, 5, "k_proj", "down_proj"), lora(2, 9, "down_proj")],
        {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2, "layerwise_scalings": True},
    ),
    Case(
        "xlora_fused",
        "fused projections, which the model declares in another order than it uses them; both softmaxes",
        "phi3",
        [lora(2, 8, "o_proj", "qkv_proj"), lora(2, 6, "qkv_proj", "gate_up_proj")],
        {"layerwise_scalings": True, "enable_softmax_topk": True, "top_k_lora": 1, "softmax_temperature": 2.0},
        prompts=(1, 2),
    ),
    Case(
        "xlora_identity",
        "experts as PEFT makes them, whose up projections are zero: equals the base",
        "llama",
        [lora(1, 4, "q_proj"), lora(1, 4, "q_proj")],
        {"xlora_size": 4},
        identity=True,
    ),
]


def write_expert(config: dict, case: Case, bases: Bases, directory: Path, *seed_parts: object) -> str:
    """One random LoRA, or one without effect for a case that is to have none."""
    made = get_peft_model(bases.get(case.model), LoraConfig(task_type="CAUSAL_LM", **config))
    randomize_adapter(made, *seed_parts)
    for name, param in made.named_parameters():
        if case.identity and "lora_B" in name:
            param.data.zero_()
    made.save_pretrained(directory)
    tidy_adapter_dir(directory, f"patchbay/{case.model}")
    return str(directory)


def build(case: Case, bases: Bases, experts: list[str]) -> PeftModel:
    """The model with experts from these directories."""
    base = bases.get(case.model)
    base.config.use_cache = False
    adapters = {str(number): path for number, path in enumerate(experts)}
    config = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=adapters, **case.config
    )
    return get_peft_model(base, config).eval()


def classifier_of(model: PeftModel) -> torch.nn.Module:
    """What gives the gates."""
    return model.base_model.internal_xlora_classifier


def randomize_classifier(model: PeftModel, *seed_parts: object) -> None:
    """Values with which gates differ from token to token."""
    rng = generator("classifier", *seed_parts)
    for name, param in classifier_of(model).named_parameters():
        noise = torch.randn(param.shape, generator=rng)
        param.data.copy_(2.5 * noise / param.shape[1] ** 0.5 if name.endswith("weight") else 0.3 * noise)


def measure_gates(model: PeftModel, prompts: list) -> tuple[float, float]:
    """The least distance of kept gates from the others, and the least spread that some gate has over a prompt."""
    kept = classifier_of(model).config.top_k_lora
    gap = spread = float("inf")
    for ids in prompts:
        if ids is None:
            continue
        forward_logits(model, ids)
        gates = model.base_model.internal_xlora_scalings[0]
        spread = min(spread, float((gates.amax(0) - gates.amin(0)).max()))
        if kept and kept < gates.shape[-1]:
            ordered = gates.sort(dim=-1, descending=True).values
            last, next_one = ordered[..., kept - 1], ordered[..., kept]
            apart = last - next_one
            if classifier_of(model).config.enable_softmax:
                apart = apart.masked_fill(last < NOTHING, float("inf"))
            gap = min(gap, float(apart.min()))
    return gap, spread


def find_classifier(model: PeftModel, prompts: list, *seed_parts: object) -> bool:
    """Gives the model a classifier whose gates are good enough, if one is found."""
    for number in range(CLASSIFIERS):
        randomize_classifier(model, *seed_parts, number)
        gap, spread = measure_gates(model, prompts)
        if gap >= GAP_MIN and spread >= SPREAD_MIN:
            return True
    return False


def check_saved(case: Case, bases: Bases, directory: Path, expected: dict, prompts: list) -> None:
    """What was saved, put together again, computes the same."""
    experts = [str(directory / str(number)) for number in range(len(case.experts))]
    model = build(case, bases, experts)
    loaded = load_file(directory / xlora.WEIGHTS)
    classifier_of(model).load_state_dict({key.split(f"{xlora.CLASSIFIER}.")[1]: value for key, value in loaded.items()})
    for index, ids in enumerate(prompts):
        if ids is not None and not torch.equal(forward_logits(model, ids), expected[f"logits_{index}"]):
            raise RuntimeError(f"{case.name}: what was saved computes something else")


def tidy(case: Case, directory: Path) -> None:
    """Names the base, and leaves out of the experts' configs what says nothing."""
    for path in [directory, *(directory / str(number) for number in range(len(case.experts)))]:
        tidy_adapter_dir(path, f"patchbay/{case.model}")
        if path != directory:
            config = json.loads((path / xlora.CONFIG).read_text())
            write_json(path / xlora.CONFIG, {key: value for key, value in config.items() if key in KEPT})


def try_case(case: Case, bases: Bases, prompts: list, directory: Path, attempt: int) -> tuple[dict, dict] | None:
    """The outputs with what was measured, when this seed is good enough."""
    base = load_expected(bases.root / "models" / case.model)
    with tempfile.TemporaryDirectory() as folder:
        experts = [
            write_expert(config, case, bases, Path(folder) / str(number), case.name, number, attempt)
            for number, config in enumerate(case.experts)
        ]
        model = build(case, bases, experts)
        if not find_classifier(model, prompts, case.name, attempt):
            return None
        expected, margin = expected_outputs(model, prompts)
        effect = largest_difference(expected, base)
        if margin < MARGIN_MIN or (effect > ROUNDING if case.identity else effect < EFFECT_MIN):
            return None
        xlora.save(model, fresh_dir(directory))
    tidy(case, directory)
    check_saved(case, bases, directory, expected, prompts)
    return expected, {"margin": round(margin, 5), "effect": round(effect, 3)}


def write_case(case: Case, bases: Bases, prompts: list) -> dict:
    """Seeds until one is good enough; returns the manifest entry."""
    directory = bases.root / "adapters" / case.model / case.name
    prompts = [ids if index in case.prompts else None for index, ids in enumerate(prompts)]
    tries = (try_case(case, bases, prompts, directory, attempt) for attempt in range(ATTEMPTS_MAX))
    found = next((found for found in tries if found), None)
    if not found:
        shutil.rmtree(directory, ignore_errors=True)
        raise RuntimeError(f"{case.name}: no seed is good enough")
    expected, measured = found
    save_expected(expected, directory)
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    print(f"{case.model}/{case.name}: {measured}", flush=True)
    return {
        "model": case.model,
        "name": case.name,
        "peft_type": "XLORA",
        "dir": f"adapters/{case.model}/{case.name}",
        "what": case.what,
        "mergeable": False,
        "identity": case.identity,
        "merge_note": "every token has its own weight",
    } | measured


def main() -> None:
    """Makes the adapters and puts them into the manifest."""
    args, bases, prompts = begin(__doc__)
    made = [write_case(case, bases, prompts) for case in CASES]
    put_cases(args.out, "XLORA", made)


if __name__ == "__main__":
    main()
