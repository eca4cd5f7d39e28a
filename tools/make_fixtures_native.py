"""Adds adapters of formats that PEFT does not have to tests/fixtures: SaRA, and Bone of the RWKV trainer.

The expected outputs are those of transformers on weights changed by the formats' formulas. Run after make_fixtures.py,
from the repository root.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from fixture_common import (
    ATTEMPTS_MAX,
    EFFECT_MIN,
    MARGIN_MIN,
    Bases,
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


def sara(weight: torch.Tensor, rng: torch.Generator) -> tuple[dict, torch.Tensor]:
    """The tenth of the entries with the smallest magnitude; the tensors, and the changed weight."""
    flat = weight.abs().flatten().argsort()[: weight.numel() // 10]
    places = torch.stack([flat // weight.shape[1], flat % weight.shape[1]])
    values = 0.5 * torch.randn(flat.numel(), generator=rng)
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


CASES: list[tuple[str, str, str, Callable, dict]] = [
    ("sara", "SARA", "the smallest entries, as index and value", sara, {}),
    ("bone_native_row", "BONE", "the RWKV trainer's blocks by input", row, {"r": R}),
    ("bone_native_oldest", "BONE", "the oldest form: blocks by output, one below the other", column, {"r": R}),
]


def write_case(case: tuple, bases: Bases, prompts: list) -> dict:
    """Seeds until the greedy margins and the effect are large enough; returns the manifest entry."""
    name, peft_type, what, make, config = case
    directory = fresh_dir(bases.root / "adapters" / MODEL / name)
    base = load_expected(bases.root / "models" / MODEL)
    for attempt in range(ATTEMPTS_MAX):
        rng, tensors, model = generator(name, attempt), {}, bases.get(MODEL)
        for path, module in model.named_modules():
            if path.split(".")[-1] in TARGETS:
                parts, module.weight.data = make(module.weight.data, rng)
                tensors |= {f"base_model.model.{path}.{suffix}": value for suffix, value in parts.items()}
        expected, margin = expected_outputs(model, prompts)
        effect = largest_difference(expected, base)
        if margin > MARGIN_MIN and effect > EFFECT_MIN:
            break
    else:
        raise RuntimeError(f"{name}: no seed is good enough")
    common = {"peft_type": peft_type, "base_model_name_or_path": f"patchbay/{MODEL}", "target_modules": sorted(TARGETS)}
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
        "identity": False,
        "margin": round(margin, 5),
        "effect": round(effect, 3),
    }


def main() -> None:
    """Makes the adapters and puts them into the manifest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    manifest = json.loads((args.out / "manifest.json").read_text())
    prompts = json.loads((args.out / "prompts.json").read_text())
    bases = Bases(args.out)
    made = [write_case(case, bases, prompts) for case in CASES]
    names = {entry["name"] for entry in made}
    others = [entry for entry in manifest["cases"] if entry["name"] not in names]
    manifest["cases"] = sorted(others + made, key=lambda entry: (entry["model"], entry["name"]))
    write_json(args.out / "manifest.json", manifest)


if __name__ == "__main__":
    main()
