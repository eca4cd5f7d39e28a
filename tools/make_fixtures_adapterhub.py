"""Adds bottleneck adapters to tests/fixtures, with AdapterHub's library (requirements-adapterhub.txt).

Run after make_fixtures.py, in its own virtual environment, from the repository root.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import adapters
import torch
import transformers
from adapters import BnConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import load_file, save_file

from fixture_common import (
    ATTEMPTS_MAX,
    EFFECT_MIN,
    MARGIN_MIN,
    Bases,
    begin,
    forward_logits,
    fresh_dir,
    generator,
    greedy_full,
    largest_difference,
    load_expected,
    put_cases,
    save_expected,
    write_json,
)

WEIGHTS = "adapter.safetensors"
# The prompts by number; the longest adds nothing here.
PROMPTS = (1, 2)


@dataclass
class Case:
    """One adapter."""

    name: str
    what: str
    models: tuple[str, ...]
    config: BnConfig
    adapter: str = "task"
    identity: bool = False


CASES = [
    Case("bottleneck_pfeiffer", "seq_bn", ("llama", "llama_bias", "mistral"), SeqBnConfig(reduction_factor=4)),
    Case("bottleneck_houlsby", "double_seq_bn", ("llama", "mistral"), DoubleSeqBnConfig(reduction_factor=8)),
    Case("bottleneck_parallel", "par_bn", ("llama", "mistral"), ParBnConfig(reduction_factor=4)),
    Case(
        "bottleneck_plus",
        "AdapterPlus: the stream within the residual, a learned factor per channel, and the name `default`",
        ("llama",),
        BnConfig(
            mh_adapter=False,
            output_adapter=True,
            reduction_factor=3,
            non_linearity="gelu",
            original_ln_before=True,
            original_ln_after=False,
            residual_before_ln=False,
            scaling="channel",
        ),
        adapter="default",
    ),
    Case(
        "bottleneck_norms",
        "norms of its own on both sides, the residual within, a learned factor, widths by layer",
        ("llama",),
        DoubleSeqBnConfig(
            ln_before=True,
            ln_after=True,
            adapter_residual_before_ln=True,
            original_ln_before=True,
            scaling="learned",
            reduction_factor={"1": 5.5, "default": 16},
        ),
    ),
    Case(
        "bottleneck_norm_outside",
        "a norm on what is added, the stream counted twice, one layer left out",
        ("llama",),
        SeqBnConfig(ln_after=True, residual_before_ln=False, non_linearity="leakyrelu", leave_out=[0]),
    ),
    Case(
        "bottleneck_parallel_both",
        "parallel to both sublayers, with norms",
        ("llama",),
        ParBnConfig(mh_adapter=True, ln_before=True, ln_after=True, non_linearity="tanh", reduction_factor=4),
    ),
    Case("bottleneck_identity", "a way up of zeros", ("llama",), SeqBnConfig(reduction_factor=8), identity=True),
]


def randomize(model: torch.nn.Module, case: Case, *seed_parts: object) -> None:
    """Gives the adapter's parameters random values of visible effect."""
    rng = generator(case.name, *seed_parts)
    done = set()
    for name, param in model.named_parameters():
        if f".adapters.{case.adapter}." not in name or param.data_ptr() in done:
            continue
        done.add(param.data_ptr())
        noise = torch.randn(param.shape, generator=rng)
        if "adapter_up" in name:
            value = torch.zeros_like(noise) if case.identity else 0.4 * noise
        elif param.dim() == 2:
            value = noise / param.shape[1] ** 0.5
        elif "norm" in name and name.endswith("weight") or name.endswith("scaling"):
            value = 1 + 0.3 * noise
        else:
            value = 0.3 * noise
        param.data.copy_(value)


def save(model: torch.nn.Module, case: Case, directory: Path) -> None:
    """Saves the adapter as the library does; a norm before the bottleneck has two names, of which one is kept."""
    (norms,) = {module.add_layer_norm_before for module in adapter_modules(model, case)}
    if not norms:
        model.save_adapter(str(directory), case.adapter, use_safetensors=True, with_head=False)
        return
    model.save_adapter(str(directory), case.adapter, use_safetensors=False, with_head=False)
    tensors = torch.load(directory / "pytorch_adapter.bin")
    (directory / "pytorch_adapter.bin").unlink()
    save_file({key: value for key, value in tensors.items() if "adapter_norm_before" not in key}, directory / WEIGHTS)


def adapter_modules(model: torch.nn.Module, case: Case) -> list[torch.nn.Module]:
    """The adapter's modules."""
    return [module for name, module in model.named_modules() if name.endswith(f".adapters.{case.adapter}")]


def load(case: Case, model_name: str, bases: Bases, directory: Path) -> torch.nn.Module:
    """The base with the saved adapter on it."""
    model = bases.get(model_name)
    adapters.init(model)
    name = model.load_adapter(str(directory), use_safetensors=True, with_head=False)
    if any(module.add_layer_norm_before for module in adapter_modules(model, case)):
        tensors = load_file(directory / WEIGHTS)
        missing = [key for key in tensors if not torch.equal(model.state_dict()[key], tensors[key])]
        assert not missing, missing
    model.set_active_adapters(name)
    return model.eval()


def full_outputs(model: torch.nn.Module, prompts: list) -> tuple[dict, float]:
    """Logits and greedy tokens, all of full passes.

    The library's attention does not take the cache by the name that its transformers passes it under, so `generate` with
    a cache would answer as if there were no context.
    """
    tensors, margin = {}, float("inf")
    for index, ids in enumerate(prompts):
        if ids is not None:
            tensors[f"logits_{index}"] = forward_logits(model, ids)
            tensors[f"greedy_{index}"], least = greedy_full(model, ids)
            margin = min(margin, least)
    return tensors, margin


def write_case(case: Case, model_name: str, bases: Bases, prompts: list) -> dict:
    """Seeds until the greedy margins and the effect are large enough; returns the manifest entry."""
    directory = bases.root / "adapters" / model_name / case.name
    base = load_expected(bases.root / "models" / model_name)
    prompts = [ids if index in PROMPTS else None for index, ids in enumerate(prompts)]
    for attempt in range(ATTEMPTS_MAX):
        fresh_dir(directory)
        model = bases.get(model_name)
        adapters.init(model)
        model.add_adapter(case.adapter, config=case.config)
        model.set_active_adapters(case.adapter)
        randomize(model, case, model_name, attempt)
        save(model, case, directory)
        expected, margin = full_outputs(load(case, model_name, bases, directory), prompts)
        effect = largest_difference(expected, base)
        if margin > MARGIN_MIN and (case.identity or effect > EFFECT_MIN):
            break
    else:
        raise RuntimeError(f"{model_name}/{case.name}: no seed is good enough (margin {margin}, effect {effect})")
    path = directory / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | {"model_name": f"patchbay/{model_name}"})
    save_expected(expected, directory)
    for path in directory.iterdir():
        path.chmod(0o644)
    print(f"{model_name}/{case.name}: margin {margin:.3g}, effect {effect:.3g}")
    return {
        "model": model_name,
        "name": case.name,
        "peft_type": "BOTTLENECK",
        "dir": f"adapters/{model_name}/{case.name}",
        "what": case.what,
        "mergeable": False,
        "identity": case.identity,
        "margin": round(margin, 5),
        "effect": round(effect, 3),
        "merge_note": "nothing of it is a weight",
    }


def main() -> None:
    """Makes the adapters and puts them into the manifest."""
    args, bases, prompts = begin(__doc__)
    made = [write_case(case, model, bases, prompts) for case in CASES for model in case.models]
    versions = {"adapters": adapters.__version__, "transformers": transformers.__version__}
    put_cases(args.out, "BOTTLENECK", made, {"adapterhub": versions})
    print(f"{len(made)} bottleneck adapters")


if __name__ == "__main__":
    main()
