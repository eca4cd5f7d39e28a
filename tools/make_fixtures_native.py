"""Adds adapters of formats that PEFT does not have to tests/fixtures: SaRA, SVFit, FLoRA, and Bone of the RWKV trainer.

The expected outputs are those of transformers on weights changed by the formats' formulas. Run after make_fixtures.py,
from the repository root. `--only` is an expression: only the adapters whose name it finds are made, the rest is kept.
"""

import json
import re
from collections.abc import Callable
from functools import partial

import torch
from safetensors.torch import save_file

from fixture_common import (
    ATTEMPTS_MAX,
    EFFECT_MIN,
    MARGIN_MIN,
    MERGE_TOLERANCE,
    Bases,
    begin,
    expected_outputs,
    fresh_dir,
    generator,
    largest_difference,
    load_expected,
    save_expected,
    write_json,
)

MODEL = "llama"
TARGETS = ["v_proj", "up_proj"]
R = 8
# One short and one longer prompt keep the files of later cases small.
FEW = (1, 2)


def sara(weight: torch.Tensor, rng: torch.Generator, spread: float = 0.5, share: int = 10) -> tuple[dict, torch.Tensor]:
    """One in `share` of the entries, those with the smallest magnitude; the tensors, and the changed weight."""
    flat = weight.abs().flatten().argsort()[: weight.numel() // share]
    places = torch.stack([flat // weight.shape[1], flat % weight.shape[1]])
    values = spread * torch.randn(flat.numel(), generator=rng)
    changed = weight.clone()
    changed[places[0], places[1]] += values
    return {"sara_weight": values, "sara_indices": places.int()}, changed


def row(weight: torch.Tensor, rng: torch.Generator) -> tuple[dict, torch.Tensor]:
    """A block for each input block c: `W_ac + W_ac B_c + B_c`."""
    blocks = 0.15 * torch.randn(weight.shape[1] // R, R, R, generator=rng)
    changed = weight.clone()
    for c, block in enumerate(blocks):
        columns = weight[:, c * R : (c + 1) * R]
        changed[:, c * R : (c + 1) * R] = columns + columns @ block + block.repeat(weight.shape[0] // R, 1)
    return {"disha": blocks}, changed


def column(weight: torch.Tensor, rng: torch.Generator) -> tuple[dict, torch.Tensor]:
    """A block for each output block a, one below the other: `W_ac + W_ac B_a + B_a`."""
    blocks = 0.15 * torch.randn(weight.shape[0], R, generator=rng)
    changed = weight.clone()
    for a in range(0, weight.shape[0], R):
        for c in range(0, weight.shape[1], R):
            part = weight[a : a + R, c : c + R]
            changed[a : a + R, c : c + R] = part + part @ blocks[a : a + R] + blocks[a : a + R]
    return {"bone": blocks}, changed


def svfit(weight: torch.Tensor, rng: torch.Generator, spread: float = 0.5, r: int = 6) -> tuple[dict, torch.Tensor]:
    """Other values for the r largest singular values."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    trained = values.clone()
    trained[:r] *= 1 + spread * torch.randn(r, generator=rng)
    return {"svfit_sigma": trained[:r].contiguous()}, (left * trained) @ right


def flora(r1: int, r2: int, scale: float, spread: float = 0.1) -> Callable:
    """A Tucker core between two factors."""

    def make(weight: torch.Tensor, rng: torch.Generator) -> tuple[dict, torch.Tensor]:
        noise = lambda *shape: torch.randn(shape, generator=rng)
        a, core, b = noise(weight.shape[0], r1), spread * noise(r1, r2), noise(weight.shape[1], r2)
        return {"flora_A": a, "flora_G": core, "flora_B": b}, weight + scale * a @ core @ b.T

    return make


CASES: list[tuple[str, str, str, Callable, dict]] = [
    ("sara", "SARA", "the smallest entries, as index and value", sara, {}),
    ("bone_native_row", "BONE", "the RWKV trainer's blocks by input", row, {"r": R}),
    ("bone_native_oldest", "BONE", "the oldest form: blocks by output, one below the other", column, {"r": R}),
    ("svfit", "SVFIT", "the six largest singular values", svfit, {"r": 6}),
    ("flora", "FLORA", "a core of 3 by 5", flora(3, 5, 1.0), {"r1": 3, "r2": 5}),
    ("flora_scale", "FLORA", "a core of 6 by 2, and a scale", flora(6, 2, 0.5), {"r1": 6, "r2": 2, "scale": 0.5}),
    ("sara_identity", "SARA", "all zero: equals the base", partial(sara, spread=0), {}),
    ("svfit_identity", "SVFIT", "the base's values: equals it up to rounding", partial(svfit, spread=0), {"r": 6}),
    ("flora_identity", "FLORA", "a core of zeros: equals the base", flora(2, 3, 1.0, spread=0), {"r1": 2, "r2": 3}),
]
# What adapts one linear of a layer only; one prompt is enough.
IDENTITY_TARGETS, IDENTITY_PROMPTS = ["v_proj"], (1,)
# Cases of which all prompts are recorded.
WHOLE = ("sara", "bone_native_row", "bone_native_oldest")


def write_case(case: tuple, bases: Bases, prompts: list) -> dict:
    """Seeds until the greedy margins and the effect are large enough; returns the manifest entry."""
    name, peft_type, what, make, config = case
    directory = fresh_dir(bases.root / "adapters" / MODEL / name)
    identity = name.endswith("_identity")
    targets = IDENTITY_TARGETS if identity else TARGETS
    if name not in WHOLE:
        few = IDENTITY_PROMPTS if identity else FEW
        prompts = [ids if index in few else None for index, ids in enumerate(prompts)]
    base = load_expected(bases.root / "models" / MODEL)
    for attempt in range(ATTEMPTS_MAX):
        rng, tensors, model = generator(name, attempt), {}, bases.get(MODEL)
        for path, module in model.named_modules():
            if path.split(".")[-1] in targets:
                parts, module.weight.data = make(module.weight.data, rng)
                tensors |= {f"base_model.model.{path}.{suffix}": value for suffix, value in parts.items()}
        expected, margin = expected_outputs(model, prompts)
        effect = largest_difference(expected, base)
        if margin > MARGIN_MIN and (effect < MERGE_TOLERANCE if identity else effect > EFFECT_MIN):
            break
    else:
        raise RuntimeError(f"{name}: no seed is good enough")
    common = {"peft_type": peft_type, "base_model_name_or_path": f"patchbay/{MODEL}", "target_modules": sorted(targets)}
    write_json(directory / "adapter_config.json", common | config)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    save_expected(expected, directory)
    for path in directory.iterdir():
        path.chmod(0o644)
    print(f"{MODEL}/{name}: margin {margin:.3g}, effect {effect:.3g}")
    return {
        "model": MODEL,
        "name": name,
        "peft_type": peft_type,
        "dir": f"adapters/{MODEL}/{name}",
        "what": what,
        "mergeable": True,
        "identity": identity,
        "margin": round(margin, 5),
        "effect": round(effect, 3),
    }


def main() -> None:
    """Makes the adapters and puts them into the manifest."""
    args, bases, prompts = begin(__doc__, "only")
    manifest = json.loads((args.out / "manifest.json").read_text())
    made = [write_case(case, bases, prompts) for case in CASES if re.search(args.only, case[0])]
    names = {entry["name"] for entry in made}
    others = [entry for entry in manifest["cases"] if entry["name"] not in names]
    manifest["cases"] = sorted(others + made, key=lambda entry: (entry["model"], entry["name"]))
    write_json(args.out / "manifest.json", manifest)


if __name__ == "__main__":
    main()
