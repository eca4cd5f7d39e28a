"""Adds Arrow adapters to tests/fixtures: LoRA experts that PEFT routes between, collected by arrow.py.

Run after make_fixtures.py, in the same environment, from the repository root.
"""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer

import arrow
from fixture_common import (
    ATTEMPTS_MAX,
    EFFECT_MIN,
    MARGIN_MIN,
    MERGE_TOLERANCE,
    Bases,
    begin,
    expected_outputs,
    forward_logits,
    fresh_dir,
    largest_difference,
    load_expected,
    put_cases,
    randomize_adapter,
    save_expected,
    tidy_adapter_dir,
)

# The least distance between the last chosen expert and the first that is not, in lengths of the input: in half precision
# the same are chosen.
GAP_MIN = 0.01
ATTEMPTS = 10 * ATTEMPTS_MAX


@dataclass
class Case:
    """One adapter; `experts` and `general` are configs of LoRAs."""

    name: str
    what: str
    model: str
    experts: list[dict]
    top_k: int
    temperature: float
    seed: int | None
    general: list[dict] = field(default_factory=list)
    prompts: tuple[int, ...] = (1,)
    identity: bool = False


def lora(alpha: float = 8, **config) -> dict:
    """A LoRA on one linear with fewer outputs than inputs, and one with more."""
    return {"r": 4, "lora_alpha": alpha, "target_modules": ["v_proj", "up_proj"]} | config


CASES = [
    Case("arrow_top2", "two of three experts", "llama", [lora(), lora(6), lora(10)], 2, 0.5, 42),
    Case(
        "arrow_all",
        "both experts, no seed, scale factors of several kinds",
        "llama_bias",
        [lora(4, use_rslora=True), lora(alpha_pattern={"up_proj": 16})],
        2,
        1.0,
        None,
        prompts=(1, 2),
    ),
    Case(
        "arrow_general",
        "one of three experts, less the mean of two general ones",
        "mistral",
        [lora(), lora(), lora()],
        1,
        1.0,
        7,
        [lora(), lora(3)],
    ),
    Case("arrow_identity", "B is zero: equals the base", "llama", [lora(r=2), lora(r=2)], 1, 1.0, 42, identity=True),
]


def write_expert(config: dict, case: Case, bases: Bases, directory: Path, *seed_parts: object) -> Path:
    """One random LoRA whose first direction stands out, as that of a trained one does; B is zero for an identity."""
    made = get_peft_model(bases.get(case.model), LoraConfig(task_type="CAUSAL_LM", **config))
    randomize_adapter(made, *seed_parts)
    for name, param in made.named_parameters():
        if "lora_B" in name and case.identity:
            param.data.zero_()
        elif "lora_B" in name:
            param.data[:, 0] *= 4
    made.save_pretrained(directory)
    tidy_adapter_dir(directory, f"patchbay/{case.model}")
    return directory


def smallest_gap(model: torch.nn.Module, prompts: list) -> float:
    """The least distance between chosen and other experts over all tokens and linears, in lengths of the input."""
    gaps = []

    def look(module: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        magnitudes = (x @ module.prototypes.T).abs().sort(dim=1, descending=True).values
        if magnitudes.shape[1] > module.top_k:
            gap = magnitudes[:, module.top_k - 1] - magnitudes[:, module.top_k]
            gaps.append(float((gap / x.norm(dim=1)).min()))

    routers = [module for module in model.modules() if isinstance(module, ArrowLoraLinearLayer)]
    hooks = [module.register_forward_hook(look, with_kwargs=True) for module in routers]
    for ids in prompts:
        if ids is not None:
            forward_logits(model, ids)
    for hook in hooks:
        hook.remove()
    return min(gaps, default=float("inf"))


def try_case(case: Case, bases: Bases, prompts: list, directory: Path, attempt: int) -> tuple[dict, dict] | None:
    """The outputs with what was measured, when this seed is good enough."""
    base = load_expected(bases.root / "models" / case.model)
    with tempfile.TemporaryDirectory() as folder:
        write = lambda kind, index, config: write_expert(
            config, case, bases, Path(folder) / f"{kind}{index}", case.name, kind, index, attempt
        )
        experts = [write("task", index, config) for index, config in enumerate(case.experts)]
        general = [write("general", index, config) for index, config in enumerate(case.general)]
        config = ArrowConfig(
            top_k=case.top_k, router_temperature=case.temperature, use_gks=bool(general), rng_seed=case.seed
        )
        paths = [str(path) for path in experts], [str(path) for path in general]
        model = create_arrow_model(bases.get(case.model), paths[0], config, paths[1] or None).eval()
        forward_logits(model, [5])
        if not case.identity and smallest_gap(model, prompts) < GAP_MIN:
            return None
        expected, margin = expected_outputs(model, prompts)
        effect = largest_difference(expected, base)
        router = {"top_k": case.top_k, "router_temperature": case.temperature, "rng_seed": case.seed}
        arrow.collect(experts, general, router, directory)
    if margin < MARGIN_MIN or (effect > MERGE_TOLERANCE if case.identity else effect < EFFECT_MIN):
        return None
    return expected, {"margin": round(margin, 5), "effect": round(effect, 3)}


def write_case(case: Case, bases: Bases, prompts: list) -> dict:
    """Seeds until one is good enough; returns the manifest entry."""
    directory = fresh_dir(bases.root / "adapters" / case.model / case.name)
    prompts = [ids if index in case.prompts else None for index, ids in enumerate(prompts)]
    tries = (try_case(case, bases, prompts, directory, attempt) for attempt in range(ATTEMPTS))
    found = next((found for found in tries if found), None)
    if not found:
        raise RuntimeError(f"{case.name}: no seed is good enough")
    expected, measured = found
    save_expected(expected, directory)
    for path in directory.iterdir():
        path.chmod(0o644)
    print(f"{case.model}/{case.name}: {measured}", flush=True)
    return {
        "model": case.model,
        "name": case.name,
        "peft_type": "ARROW",
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
    put_cases(args.out, "ARROW", made)


if __name__ == "__main__":
    main()
