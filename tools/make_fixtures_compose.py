"""Adds what several adapters compute together to tests/fixtures: `composed.json` and `composed/<case>.safetensors`.

The adapters are those of `tests/fixtures/adapters`. The authority is PEFT in float32, in two ways. `list`: all adapters of
one type in one model, activated together by `set_adapter`, with `set_scale` for the strengths; where they are plain LoRAs,
`add_weighted_adapter(combination_type="cat")` must agree. `chain`: one after the other is loaded at its strength and merged
into the model by PEFT (or `ssf.py`); an SSF that comes last stays attached, as its merging moves shifts of norms.

`combined.json` and `combined/<case>.safetensors` hold what `add_weighted_adapter` makes of several LoRAs: the factors of
some modules and the logits. Run after make_fixtures.py, from the repository root.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

import ssf
from fixture_common import EFFECT_MIN, Bases, begin, forward_logits, fresh_dir, load_expected, write_json

# Two prompts say enough of a composition: the parts have fixtures of their own.
PROMPTS = (1, 2)
# How far two ways to compute the same may be apart.
SAME = 1e-4
# At strength `l` a tensor t of this name becomes 1 + l (t - 1), of the others l t.
FACTORS = ("ia3_l", "ssf_scale")
SHIFTS = ("ssf_shift", "miss_block", "lora_B", "lora_embedding_B", "bone_block")

CASES: list[tuple[str, str, str, list[tuple[str, float]]]] = [
    ("lora_lora", "llama", "list", [("lora_all", 0.7), ("lora_r8", 0.3)]),
    ("lora_three", "llama", "list", [("lora_qv", 1.0), ("lora_r1", -0.5), ("lora_rslora", 2.0)]),
    ("lora_strength", "llama", "list", [("lora_all", 0.4)]),
    ("lora_embeddings", "llama", "list", [("lora_embed", 0.5), ("lora_embed_head", 0.8)]),
    ("lora_bias", "llama_bias", "list", [("lora_lora_bias", 0.5), ("lora_all", 0.5)]),
    ("lora_dora", "llama_bias", "list", [("lora_all", 0.6), ("lora_dora", 1.0)]),
    ("dora_lora", "llama_bias", "list", [("lora_dora", 1.0), ("lora_all", 0.6)]),
    ("dora_dora", "llama", "list", [("lora_dora", 1.0), ("lora_dora_rslora", 1.0)]),
    ("ia3_ia3", "llama", "list", [("ia3", 1.0), ("ia3_regex", 1.0)]),
    ("fused_lora_lora", "phi3", "list", [("lora_all", 0.7), ("lora_r8", 0.3)]),
    ("ia3_strength", "llama", "chain", [("ia3", 0.5)]),
    ("ia3_lora", "llama_bias", "chain", [("ia3_all", 0.5), ("lora_all", 0.7)]),
    ("lora_ia3", "llama", "chain", [("lora_qv", 0.7), ("ia3", 1.0)]),
    ("ssf_strength", "llama_bias", "chain", [("ssf_embed", 0.5)]),
    ("ssf_lora", "llama_bias", "chain", [("ssf_linears", 0.5), ("lora_all", 0.7)]),
    ("lora_ssf", "llama_bias", "chain", [("lora_all", 0.7), ("ssf_embed", 0.5)]),
    ("miss_lora", "llama", "chain", [("miss_balance", 0.6), ("lora_all", 0.7)]),
    ("ssf_miss", "llama", "chain", [("ssf_linears", 1.0), ("miss_mini", 1.0)]),
    ("bat_lora", "llama", "chain", [("miss_bat", 1.0), ("lora_all", 0.7)]),
    ("road_lora", "llama", "chain", [("road_2", 1.0), ("lora_all", 0.7)]),
    ("ia3_road", "llama", "chain", [("ia3", 0.5), ("road_2", 1.0)]),
    ("oft_lora", "llama", "chain", [("oft_cayley", 1.0), ("lora_all", 0.7)]),
    ("shira_ssf", "llama", "chain", [("shira_few", 0.5), ("ssf_linears", 0.5)]),
]

# Name, adapters of llama with PEFT's weights, and PEFT's options; the mode and the weights that must give the same.
# PEFT weights each factor with the root of the weight; a mean weights it with the share itself.
COMBINED: list[tuple[str, list[tuple[str, float]], dict, str, list[float], dict]] = [
    ("stack", [("lora_all", 0.7), ("lora_r8", -0.3)], {"combination_type": "cat"}, "stack", [0.7, -0.3], {}),
    ("mean", [("lora_all", 0.5625), ("lora_qv", 0.0625)], {"combination_type": "linear"}, "mean", [3.0, 1.0], {}),
    (
        "ties",
        [("lora_all", 0.7), ("lora_qv", 1.0), ("lora_rslora", 0.5)],
        {"combination_type": "ties", "density": 0.6},
        "ties",
        [0.7, 1.0, 0.5],
        {"density": 0.6},
    ),
    (
        "ties_negative",
        [("lora_all", -0.7), ("lora_qv", 1.0)],
        {"combination_type": "ties", "density": 1.0},
        "ties",
        [-0.7, 1.0],
        {"density": 1.0},
    ),
    (
        "dare_whole",
        [("lora_all", 0.7), ("lora_qv", -0.5)],
        {"combination_type": "dare_linear", "density": 1.0},
        "dare",
        [0.7, -0.5],
        {"density": 1.0, "seed": 3},
    ),
    (
        "rank",
        [("lora_all", 0.7), ("lora_r8", 0.3)],
        {"combination_type": "svd", "svd_rank": 5},
        "stack",
        [0.7, 0.3],
        {"rank": 5},
    ),
]
# The modules whose factors are kept.
COMBINED_MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def at_strength(directory: Path, strength: float, to: Path) -> Path:
    """A copy of an adapter whose own tensors carry the strength."""
    shutil.copytree(directory, to)
    tensors = load_file(to / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if any(part in key for part in FACTORS):
            tensors[key] = 1 + strength * (tensor - 1)
        elif any(part in key for part in SHIFTS) or "shira" in key and tensor.is_floating_point():
            tensors[key] = strength * tensor
        elif strength != 1 and "lora_A" not in key and "lora_embedding_A" not in key and "shira_indices" not in key:
            raise ValueError(f"{directory}: {key} at strength {strength}")
    save_file(tensors, to / "adapter_model.safetensors", metadata={"format": "pt"})
    return to


def merged(model: torch.nn.Module, directory: Path, is_last: bool) -> torch.nn.Module:
    """The model with the adapter merged into it."""
    if json.loads((directory / "adapter_config.json").read_text())["peft_type"] == "SSF":
        ssf.load(model, directory)
        return model if is_last else ssf.merge(model)
    return PeftModel.from_pretrained(model, directory, autocast_adapter_dtype=False).merge_and_unload()


def chain(model: torch.nn.Module, parts: list[tuple[Path, float]]) -> torch.nn.Module:
    """One part after the other merged into the model."""
    with tempfile.TemporaryDirectory() as temp:
        for index, (directory, strength) in enumerate(parts):
            carrying = at_strength(directory, strength, Path(temp) / str(index))
            model = merged(model, carrying, is_last=index == len(parts) - 1)
    return model


def activated(model: torch.nn.Module, parts: list[tuple[Path, float]]) -> PeftModel:
    """All parts active at once, in order."""
    names = [f"part{index}" for index in range(len(parts))]
    model = PeftModel.from_pretrained(model, parts[0][0], adapter_name=names[0])
    for name, (directory, _) in list(zip(names, parts))[1:]:
        model.load_adapter(directory, name)
    model.base_model.set_adapter(names)
    set_scales(model, {name: strength for name, (_, strength) in zip(names, parts)})
    return model.eval()


def set_scales(model: PeftModel, scales: dict[str, float]) -> None:
    """Gives each LoRA its strength; other types have none in PEFT."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, scale in scales.items():
                if name in module.scaling:
                    module.set_scale(name, scale)


def check_cat(model: PeftModel, parts: list[tuple[Path, float]], ids: list[int], logits: torch.Tensor) -> None:
    """Plain LoRAs at weights are what `add_weighted_adapter` concatenates."""
    names = [f"part{index}" for index in range(len(parts))]
    set_scales(model, dict.fromkeys(names, 1.0))
    model.base_model.add_weighted_adapter(names, [strength for _, strength in parts], "cat", combination_type="cat")
    model.base_model.set_adapter("cat")
    difference = float((forward_logits(model, ids) - logits).abs().max())
    if difference > SAME:
        raise RuntimeError(f"cat differs by {difference}")


def write_case(case: tuple, bases: Bases, prompts: list, out: Path) -> dict:
    """Computes and writes one case; returns its entry."""
    name, model_name, way, parts = case
    located = [(bases.root / "adapters" / model_name / part, strength) for part, strength in parts]
    model = (activated if way == "list" else chain)(bases.get(model_name), located)
    tensors = {f"logits_{prompt}": forward_logits(model, prompts[prompt]) for prompt in PROMPTS}
    base = load_expected(bases.root / "models" / model_name)
    effect = max(float((tensors[key] - base[key]).abs().max()) for key in tensors)
    if effect < EFFECT_MIN:
        raise RuntimeError(f"{name}: no effect")
    if way == "list" and len(parts) > 1 and all(part.startswith("lora_") for part, _ in parts):
        if not any("dora" in part or "bias" in part for part, _ in parts):
            check_cat(model, located, prompts[PROMPTS[-1]], tensors[f"logits_{PROMPTS[-1]}"])
    save_file(tensors, out / f"{name}.safetensors", metadata={"format": "pt"})
    print(f"{name}: effect {effect:.3g}")
    entries = [{"dir": f"adapters/{model_name}/{part}", "scale": strength} for part, strength in parts]
    return {"name": name, "model": model_name, "way": way, "parts": entries}


def write_combined(case: tuple, bases: Bases, prompts: list, out: Path) -> dict:
    """Lets PEFT combine LoRAs; returns the entry."""
    name, parts, options, mode, weights, ours = case
    model = activated(bases.get("llama"), [(bases.root / "adapters/llama" / part, 1.0) for part, _ in parts])
    names = [f"part{index}" for index in range(len(parts))]
    model.base_model.add_weighted_adapter(names, [weight for _, weight in parts], "combined", **options)
    model.base_model.set_adapter("combined")
    prompt = PROMPTS[0]
    tensors = {f"logits_{prompt}": forward_logits(model, prompts[prompt])}
    for path in COMBINED_MODULES:
        module = model.base_model.model.get_submodule(path)
        if module.scaling["combined"] != 1:
            raise RuntimeError(f"{name}: a scale of {module.scaling['combined']}")
        tensors[f"{path}.a"] = module.lora_A["combined"].weight.detach().contiguous()
        tensors[f"{path}.b"] = module.lora_B["combined"].weight.detach().contiguous()
    save_file(tensors, out / f"{name}.safetensors", metadata={"format": "pt"})
    print(f"combined {name}")
    entries = [{"dir": f"adapters/llama/{part}", "weight": weight} for (part, _), weight in zip(parts, weights)]
    return {"name": name, "mode": mode, "parts": entries, "options": ours}


def main() -> None:
    """Makes all cases."""
    args, bases, prompts = begin(__doc__)
    out = fresh_dir(args.out / "composed")
    write_json(args.out / "composed.json", [write_case(case, bases, prompts, out) for case in CASES])
    out = fresh_dir(args.out / "combined")
    write_json(args.out / "combined.json", [write_combined(case, bases, prompts, out) for case in COMBINED])


if __name__ == "__main__":
    main()
