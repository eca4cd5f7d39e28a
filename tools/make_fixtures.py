"""Makes tests/fixtures: tiny models, adapters of every kind, their float32 outputs, and adapters to be refused.

Run from the repository root. Rerunning gives the same bytes. Entries made by the other make_fixtures scripts are kept.
"""

import argparse
import copy
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import peft
import safetensors
import tokenizers
import torch
import transformers
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

import fixture_arrow
import fixture_xlora
import fixture_dense
import fixture_layers
import fixture_rotation
import fixture_sparse
import ssf
from fixture_affine import AFFINE_CASES
from fixture_cases import CASES as FIRST_CASES
from fixture_cases import Case, config_for
from fixture_common import (
    ATTEMPTS_MAX,
    EFFECT_MIN,
    MARGIN_MIN,
    MERGE_TOLERANCE,
    Bases,
    expected_outputs,
    fresh_dir,
    generator,
    largest_difference,
    load_expected,
    make_prompts,
    merged_difference,
    quiet,
    randomize_adapter,
    save_expected,
    seed_of,
    tidy_adapter_dir,
    write_json,
)
from fixture_lowrank import FACTORED_CASES
from fixture_models import MODELS, write_model
from fixture_prompt import (
    PROMPT_CASES,
    is_prompt,
    load_prompt_adapter,
    name_task,
    prompt_difference,
    prompt_outputs,
    write_prompt_adapter,
)
from fixture_refused import write_refused
from fixture_refused_affine import affine_refused
from fixture_refused_lowrank import factored_refused
from fixture_refused_native import native_refused
from fixture_refused_variants import variants_refused
from fixture_variants import VARIANT_CASES, allow_qalora

# Modules with cases and faulty adapters of further kinds.
MORE = (fixture_dense, fixture_sparse, fixture_rotation, fixture_layers, fixture_arrow, fixture_xlora)
CASES = FIRST_CASES + PROMPT_CASES + AFFINE_CASES + FACTORED_CASES + VARIANT_CASES
CASES += [case for module in MORE for case in module.CASES]
WEIGHTS = "adapter_model.safetensors"
# Keys of an adapter_config.json that releases before 0.10 did not write.
NEWER_KEYS = (
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "monteclora_config",
    "peft_version",
    "qalora_group_size",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
    "velora_config",
)


def write_peft_adapter(case: Case, model_name: str, bases: Bases, directory: Path, attempt: int) -> torch.nn.Module:
    """Makes one random adapter with PEFT, saves it, and returns the model it was made on."""
    torch.manual_seed(seed_of(case.name, model_name))
    if case.converted_from:
        return write_converted_adapter(case, model_name, bases, directory, attempt)
    config_type = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(case.peft_type)]
    config = config_type(task_type="CAUSAL_LM", **config_for(case, model_name))
    made_with = config.init_lora_weights if case.peft_type == "LORA" else None
    if isinstance(made_with, str):
        config.init_lora_weights = True
    model = get_peft_model(bases.get(model_name), config)
    if not case.identity:
        randomize_adapter(model, case.name, model_name, attempt, values=case.values)
    for name, param in model.named_parameters():
        if any(part in name for part in case.zeros):
            param.data.zero_()
    if isinstance(made_with, str):
        config.init_lora_weights = made_with
    for key, value in case.late.items():
        setattr(config, key, value)
    model.save_pretrained(directory)
    choose_task(case, model)
    return model.eval()


def write_converted_adapter(
    case: Case, model_name: str, bases: Bases, directory: Path, attempt: int
) -> torch.nn.Module:
    """Makes an adapter whose start changed the base, and lets PEFT convert it to a plain one when it is saved."""
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=case.converted_from, **config_for(case, model_name))
    model = get_peft_model(bases.get(model_name), config)
    with tempfile.TemporaryDirectory() as start:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(start)
        model.peft_config["default"].init_lora_weights = case.converted_from
        randomize_adapter(model, case.name, model_name, attempt)
        before = copy.deepcopy(model).eval()
        model.save_pretrained(directory, path_initial_model_for_weight_conversion=start)
    return before


def write_ssf_adapter(case: Case, model_name: str, bases: Bases, directory: Path, attempt: int) -> torch.nn.Module:
    """Makes one random SSF adapter, saves it, and returns the model it was made on."""
    config = ssf.SsfConfig(**config_for(case, model_name))
    model = bases.get(model_name)
    ssf.attach(model, config)
    if not case.identity:
        randomize_adapter(model, case.name, model_name, attempt)
    ssf.save(model, config, directory)
    return model.eval()


def round_file(directory: Path, dtype: torch.dtype) -> None:
    """Casts every tensor of the adapter file."""
    tensors = load_file(directory / WEIGHTS)
    save_file({key: value.to(dtype) for key, value in tensors.items()}, directory / WEIGHTS, metadata={"format": "pt"})


def edit_before(case: Case, directory: Path) -> None:
    """Changes that PEFT can still read."""
    dtypes = {"bf16": torch.bfloat16, "f16": torch.float16}
    if case.edit in dtypes:
        round_file(directory, dtypes[case.edit])
    if case.edit == "embed_base":
        tensors = load_file(directory / WEIGHTS)
        key = "base_model.model.model.embed_tokens.base_layer.weight"
        tensors[key] += 0.5 * torch.randn(tensors[key].shape, generator=generator("embed_base"))
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    if case.edit == "alpha_order":
        path = directory / "adapter_config.json"
        config = json.loads(path.read_text()) | {"alpha_pattern": case.config["alpha_pattern"]}
        path.write_text(json.dumps(config, indent=2) + "\n")


def edit_after(case: Case, directory: Path) -> None:
    """Changes to the files that leave the outputs as they are."""
    if case.edit in (None, "alpha_order"):
        return
    renames = {
        "default_keys": lambda key: key.replace(".weight", ".default.weight"),
        "old_save_keys": lambda key: key.replace("lm_head.weight", "lm_head.modules_to_save.weight"),
    }
    if case.edit in renames:
        tensors = {renames[case.edit](key): value for key, value in load_file(directory / WEIGHTS).items()}
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    if case.edit.startswith("task_"):
        config["task_id"] = int(case.edit.removeprefix("task_"))
    if case.edit == "megatron":
        config["megatron_config"] = {"tensor_model_parallel_size": 1, "hidden_size": 32}
    if case.edit == "old_config":
        config = {key: value for key, value in config.items() if key not in NEWER_KEYS}
    write_json(path, config)


def load_adapter(case: Case, model_name: str, bases: Bases, directory: Path) -> torch.nn.Module:
    """The base with the saved adapter on it, unmerged."""
    model = bases.get(model_name)
    if case.peft_type == "SSF":
        ssf.load(model, directory)
        return model.eval()
    model = PeftModel.from_pretrained(model, directory).eval()
    choose_task(case, model)
    return model


def choose_task(case: Case, model: torch.nn.Module) -> None:
    """Gives the task that the case names (the first unless it does) to every module that asks for one."""
    task = int(case.edit.removeprefix("task_")) if case.edit and case.edit.startswith("task_") else 0
    for name, module in model.named_modules():
        if name.endswith("poly_router.default"):
            module.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | {"task_ids": torch.tensor([task])}), with_kwargs=True
            )


def check_merge(case: Case, model: torch.nn.Module, expected: dict, prompts: list) -> tuple[bool, str]:
    """Whether merging gives the unmerged outputs, and why not."""
    try:
        merged = ssf.merge(model) if case.peft_type == "SSF" else model.merge_and_unload()
    except (ValueError, AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        return False, f"{type(error).__name__}: {error}"
    difference = merged_difference(merged, expected, prompts)
    return difference < MERGE_TOLERANCE, f"largest difference {difference:.2g}"


def try_case(case: Case, model_name: str, bases: Bases, directory: Path, prompts: list) -> tuple[dict, dict]:
    """Seeds until the greedy margins and the effect are large enough; returns the outputs and what was measured."""
    if is_prompt(case):
        return try_prompt_case(case, model_name, bases, directory, prompts)
    write = write_ssf_adapter if case.peft_type == "SSF" else write_peft_adapter
    base = load_expected(bases.root / "models" / model_name)
    for attempt in range(ATTEMPTS_MAX):
        fresh_dir(directory)
        trained = write(case, model_name, bases, directory, attempt)
        tidy_adapter_dir(directory, f"patchbay/{model_name}")
        edit_before(case, directory)
        expected, margin = expected_outputs(load_adapter(case, model_name, bases, directory), prompts)
        effect = largest_difference(expected, base)
        if margin > MARGIN_MIN and (case.identity or effect > EFFECT_MIN):
            reload = merged_difference(trained, expected, prompts)
            return expected, {"margin": round(margin, 5), "effect": round(effect, 3), "reload": float(f"{reload:.2g}")}
    raise RuntimeError(f"{model_name}/{case.name}: no seed is good enough (margin {margin}, effect {effect})")


def try_prompt_case(case: Case, model_name: str, bases: Bases, directory: Path, prompts: list) -> tuple[dict, dict]:
    """The same for an adapter that stands before the prompt."""
    base = load_expected(bases.root / "models" / model_name)
    for attempt in range(ATTEMPTS_MAX):
        fresh_dir(directory)
        trained = write_prompt_adapter(case, model_name, bases, directory, attempt)
        tidy_adapter_dir(directory, f"patchbay/{model_name}")
        loaded = load_prompt_adapter(model_name, bases, directory)
        expected, margin = prompt_outputs(case, model_name, loaded, prompts)
        effect = largest_difference(expected, base)
        if margin > MARGIN_MIN and effect > EFFECT_MIN:
            reload = prompt_difference(case, trained, expected, prompts)
            return expected, {"margin": round(margin, 5), "effect": round(effect, 3), "reload": float(f"{reload:.2g}")}
    raise RuntimeError(f"{model_name}/{case.name}: no seed is good enough (margin {margin}, effect {effect})")


def write_case(case: Case, model_name: str, bases: Bases, prompts: list) -> dict:
    """Writes one adapter directory with its expected outputs; returns its manifest entry."""
    directory = bases.root / "adapters" / model_name / case.name
    if case.prompts is not None:
        prompts = [ids if index in case.prompts else None for index, ids in enumerate(prompts)]
    expected, measured = try_case(case, model_name, bases, directory, prompts)
    if case.identity and measured["effect"] > 0:
        raise RuntimeError(f"{model_name}/{case.name}: an identity adapter changed the output by {measured['effect']}")
    if is_prompt(case):
        mergeable, note = False, "nothing of it is a weight"
        name_task(case, directory)
    else:
        mergeable, note = check_merge(case, load_adapter(case, model_name, bases, directory), expected, prompts)
        edit_after(case, directory)
    save_expected(expected, directory)
    print(f"{model_name}/{case.name}: {measured}, mergeable {mergeable} ({note})", flush=True)
    # What PEFT itself computes before saving and after loading differs for some tied models.
    if measured.pop("reload") > MERGE_TOLERANCE and case.edit is None:
        measured["reload_differs"] = True
    return (
        {
            "model": model_name,
            "name": case.name,
            "peft_type": case.peft_type,
            "dir": f"adapters/{model_name}/{case.name}",
            "what": case.what,
            "mergeable": mergeable,
            "identity": case.identity,
        }
        | measured
        | ({} if mergeable else {"merge_note": note})
    )


def versions() -> dict:
    """The releases that made the fixtures."""
    modules = {
        "torch": torch,
        "transformers": transformers,
        "peft": peft,
        "tokenizers": tokenizers,
        "safetensors": safetensors,
    }
    return {name: module.__version__ for name, module in modules.items()}


def merge_entries(old: list[dict], new: list[dict], keys: tuple[str, ...]) -> list[dict]:
    """Old entries with the new ones in place of, or behind, them; sorted by `keys`."""
    entries = {tuple(entry[key] for key in keys): entry for entry in old + new}
    return [entries[key] for key in sorted(entries)]


def is_made_elsewhere(entry: dict) -> bool:
    """Whether another script makes this adapter: one with an earlier PEFT release, or for a format that PEFT has not."""
    elsewhere = ("BONE", "SARA", "SVFIT", "FLORA", "BOTTLENECK", "ARROW", "XLORA")
    return entry["peft_type"] in elsewhere or entry["name"].startswith("oft_0_")


def remove_strays(root: Path, cases: list[dict]) -> None:
    """Removes adapter directories that the manifest does not name."""
    named = {root / entry["dir"] for entry in cases}
    for directory in (root / "adapters").glob("*/*"):
        if directory not in named:
            shutil.rmtree(directory)


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures"))
    parser.add_argument(
        "--only", default="", help="make only the adapters whose model/name this expression finds; keep the rest"
    )
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Makes everything, or the selected adapters."""
    args = parse_args()
    quiet(args.threads)
    allow_qalora()
    args.out.mkdir(parents=True, exist_ok=True)
    manifest_path = args.out / "manifest.json"
    old = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
    prompts = make_prompts()
    (args.out / "prompts.json").write_text(json.dumps(prompts) + "\n")
    models = old.get("models", [])
    if not args.only or not models:
        models = [write_model(spec, args.out, prompts) for spec in MODELS]
    bases = Bases(args.out)
    chosen = [(case, model) for case in CASES for model in case.models if re.search(args.only, f"{model}/{case.name}")]
    cases = [write_case(case, model, bases, prompts) for case, model in chosen]
    kept = [entry for entry in old.get("cases", []) if args.only or is_made_elsewhere(entry)]
    refused = affine_refused() + factored_refused() + variants_refused() + native_refused()
    refused += [case for module in MORE for case in module.REFUSED]
    manifest = {
        "versions": old.get("versions", {}) | versions(),
        "peft_types": [peft_type.value for peft_type in PeftType],
        "models": models,
        "cases": merge_entries(kept, cases, ("model", "name")),
        "refused": write_refused(args.out, refused),
    }
    write_json(manifest_path, manifest)
    remove_strays(args.out, manifest["cases"])
    for path in args.out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    print(f"{len(models)} models, {len(manifest['cases'])} adapters, {len(manifest['refused'])} refused")


if __name__ == "__main__":
    main()
