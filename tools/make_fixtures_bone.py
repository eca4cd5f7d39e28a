"""Adds the BONE adapters to tests/fixtures, with the last PEFT release that has the type (requirements-bone.txt).

Run after make_fixtures.py, in its own virtual environment, from the repository root.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import peft
import transformers
from peft import BoneConfig, PeftModel, get_peft_model

from fixture_cases import CORE, FULL, LINEARS, Case, config_for
from fixture_common import (
    ATTEMPTS_MAX,
    EFFECT_MIN,
    MARGIN_MIN,
    MERGE_TOLERANCE,
    Bases,
    begin,
    expected_outputs,
    fresh_dir,
    largest_difference,
    load_expected,
    merged_difference,
    randomize_adapter,
    save_expected,
    tidy_adapter_dir,
    write_json,
)
from fixture_kinds import IDENTITY


def bone(name: str, what: str, models: tuple[str, ...] = FULL, **config) -> Case:
    """A BONE case; rank 4, all linears unless the arguments say otherwise."""
    extra = {key: config.pop(key) for key in ("identity", "prompts") if key in config}
    return Case(name, "BONE", what, models, {"r": 4, "target_modules": LINEARS} | config, **extra)


CASES = [
    bone("bone_balance", "balance on all linears", CORE),
    bone("bone_ragged", "balance, rank 5 does not divide the inputs", ("llama", "phi3"), r=5),
    bone("bone_bat", "bat on all linears", CORE, init_weights="bat"),
    bone(
        "bone_bat_r8",
        "bat, rank 8, o_proj and down_proj",
        ("llama",),
        r=8,
        init_weights="bat",
        target_modules=["o_proj", "down_proj"],
    ),
    bone("bone_identity", "all zero: equals the base", ("llama",), **IDENTITY),
]


def try_case(case: Case, model_name: str, bases: Bases, directory: Path, prompts: list) -> tuple[dict, dict]:
    """Seeds until the greedy margins and the effect are large enough; returns the outputs and what was measured."""
    base = load_expected(bases.root / "models" / model_name)
    for attempt in range(ATTEMPTS_MAX):
        fresh_dir(directory)
        config = BoneConfig(task_type="CAUSAL_LM", **config_for(case, model_name))
        model = get_peft_model(bases.get(model_name), config)
        if not case.identity:
            randomize_adapter(model, case.name, model_name, attempt)
        model.save_pretrained(directory)
        tidy_adapter_dir(directory, f"patchbay/{model_name}")
        loaded = PeftModel.from_pretrained(bases.get(model_name), directory).eval()
        expected, margin = expected_outputs(loaded, prompts)
        effect = largest_difference(expected, base)
        if margin > MARGIN_MIN and (effect < MERGE_TOLERANCE if case.identity else effect > EFFECT_MIN):
            return expected, {"margin": round(margin, 5), "effect": round(effect, 3)}
    raise RuntimeError(f"{model_name}/{case.name}: no seed is good enough")


def write_case(case: Case, model_name: str, bases: Bases, prompts: list) -> dict:
    """Writes one adapter directory with its expected outputs; returns its manifest entry."""
    directory = bases.root / "adapters" / model_name / case.name
    if case.prompts is not None:
        prompts = [ids if index in case.prompts else None for index, ids in enumerate(prompts)]
    expected, measured = try_case(case, model_name, bases, directory, prompts)
    merged = PeftModel.from_pretrained(bases.get(model_name), directory).merge_and_unload()
    difference = merged_difference(merged, expected, prompts)
    save_expected(expected, directory)
    for path in directory.iterdir():
        path.chmod(0o644)
    print(f"{model_name}/{case.name}: {measured}, merged differs by {difference:.2g}", flush=True)
    return (
        {
            "model": model_name,
            "name": case.name,
            "peft_type": "BONE",
            "dir": f"adapters/{model_name}/{case.name}",
            "what": case.what,
            "mergeable": difference < MERGE_TOLERANCE,
            "identity": case.identity,
        }
        | measured
        | ({} if difference < MERGE_TOLERANCE else {"merge_note": f"largest difference {difference:.2g}"})
    )


def main() -> None:
    """Makes the BONE adapters and puts them into the manifest."""
    args, bases, prompts = begin(__doc__)
    manifest = json.loads((args.out / "manifest.json").read_text())
    made = [write_case(case, model, bases, prompts) for case in CASES for model in case.models]
    others = [e for e in manifest["cases"] if e["peft_type"] != "BONE" or e["name"].startswith("bone_native_")]
    manifest["cases"] = sorted(others + made, key=lambda entry: (entry["model"], entry["name"]))
    manifest["versions"]["bone"] = {"peft": peft.__version__, "transformers": transformers.__version__}
    write_json(args.out / "manifest.json", manifest)
    print(f"{len(made)} BONE adapters")


if __name__ == "__main__":
    main()
