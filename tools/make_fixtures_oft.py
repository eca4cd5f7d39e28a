"""Adds OFT adapters of earlier PEFT releases to tests/fixtures: run once with 0.13 and once with 0.15.

Run after make_fixtures.py, with the releases that README.md names, from the repository root.
"""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import peft
import transformers
from peft import OFTConfig, PeftModel, get_peft_model

from fixture_cases import Case
from fixture_common import (
    ATTEMPTS_MAX,
    EFFECT_MIN,
    MARGIN_MIN,
    MERGE_TOLERANCE,
    RANDOM_RULES,
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

RELEASE = "_".join(peft.__version__.split(".")[:2])
MIXED = ["v_proj", "up_proj"]
RANDOM_RULES.update({"oft_r": lambda old, noise: 0.5 * noise, "oft_s": lambda old, noise: 1 + 0.3 * noise})


def oft(name: str, what: str, model: str = "llama", **config) -> Case:
    """A case of the release that runs."""
    return Case(f"oft_{RELEASE}_{name}", "OFT", what, (model,), {"target_modules": MIXED} | config)


CASES = {
    "0_13": [
        oft("blocks", "blocks of the output", "llama_bias", r=4),
        oft("ragged", "blocks that do not divide the outputs", r=5),
        oft("coft", "a limited norm, one block for all", r=4, coft=True, eps=0.02, block_share=True),
    ],
    "0_15": [
        oft("blocks", "blocks of the input and a scale", "llama_bias", r=0, oft_block_size=8),
        oft("coft", "a limited norm, one block for all", r=4, oft_block_size=0, coft=True, eps=0.02, block_share=True),
    ],
}


def write_case(case: Case, bases: Bases, prompts: list) -> dict:
    """Seeds until the greedy margins and the effect are large enough; returns the manifest entry."""
    model_name = case.models[0]
    directory = bases.root / "adapters" / model_name / case.name
    base = load_expected(bases.root / "models" / model_name)
    for attempt in range(ATTEMPTS_MAX):
        fresh_dir(directory)
        model = get_peft_model(bases.get(model_name), OFTConfig(task_type="CAUSAL_LM", **case.config))
        randomize_adapter(model, case.name, model_name, attempt)
        model.save_pretrained(directory)
        tidy_adapter_dir(directory, f"patchbay/{model_name}")
        loaded = PeftModel.from_pretrained(bases.get(model_name), directory).eval()
        expected, margin = expected_outputs(loaded, prompts)
        effect = largest_difference(expected, base)
        if margin > MARGIN_MIN and effect > EFFECT_MIN:
            break
    else:
        raise RuntimeError(f"{model_name}/{case.name}: no seed is good enough")
    merged = PeftModel.from_pretrained(bases.get(model_name), directory).merge_and_unload()
    difference = merged_difference(merged, expected, prompts)
    save_expected(expected, directory)
    for path in directory.iterdir():
        path.chmod(0o644)
    print(f"{model_name}/{case.name}: margin {margin:.3g}, effect {effect:.3g}, merged differs by {difference:.2g}")
    return {
        "model": model_name,
        "name": case.name,
        "peft_type": "OFT",
        "dir": f"adapters/{model_name}/{case.name}",
        "what": case.what,
        "mergeable": difference < MERGE_TOLERANCE,
        "identity": False,
        "margin": round(margin, 5),
        "effect": round(effect, 3),
    }


def main() -> None:
    """Makes the adapters of this release and puts them into the manifest."""
    args, bases, prompts = begin(__doc__)
    manifest = json.loads((args.out / "manifest.json").read_text())
    made = [write_case(case, bases, prompts) for case in CASES[RELEASE]]
    others = [entry for entry in manifest["cases"] if not entry["name"].startswith(f"oft_{RELEASE}_")]
    manifest["cases"] = sorted(others + made, key=lambda entry: (entry["model"], entry["name"]))
    versions = {"peft": peft.__version__, "transformers": transformers.__version__}
    manifest["versions"][f"oft_{RELEASE}"] = versions
    write_json(args.out / "manifest.json", manifest)


if __name__ == "__main__":
    main()
