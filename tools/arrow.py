"""Collects LoRA directories of one base model into one Arrow adapter, in the format that docs/adapters.md describes.

Each directory is one expert. What PEFT's `create_arrow_model` would refuse is refused: other ranks, shapes or modules.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SUFFIXES = ("lora_A", "lora_B")


def read_expert(directory: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """An expert's config and its tensors by module path and factor."""
    config = json.loads((directory / CONFIG).read_text())
    if config.get("peft_type") != "LORA":
        raise SystemExit(f"{directory}: expected a LORA adapter, found {config.get('peft_type')}")
    tensors = {}
    for key, value in load_file(directory / WEIGHTS).items():
        name = key.removesuffix(".weight").removesuffix(".default")
        if not name.endswith(SUFFIXES):
            raise SystemExit(f"{directory}: tensor {key} is no factor of a LoRA on a linear")
        tensors[name] = value.float()
    return config, tensors


def stack(experts: list[dict[str, torch.Tensor]], directories: list[Path], like: dict, prefix: str) -> dict:
    """The experts' tensors one on the other, all with the keys and shapes of `like`."""
    for directory, tensors in zip(directories, experts):
        if tensors.keys() != like.keys():
            raise SystemExit(f"{directory}: it adapts other modules than {directories[0]}")
        for key, value in tensors.items():
            if value.shape != like[key].shape:
                raise SystemExit(f"{directory}: {key} is {list(value.shape)}, expected {list(like[key].shape)}")
    stacked = {}
    for key in like:
        path, _, factor = key.rpartition(".")
        stacked[f"{path}.{prefix}{factor}"] = torch.stack([tensors[key] for tensors in experts])
    return stacked


def collect(directories: list[Path], general: list[Path], router: dict, out: Path) -> None:
    """Writes the Arrow adapter."""
    configs, tensors = zip(*[read_expert(directory) for directory in directories])
    general_configs, general_tensors = zip(*[read_expert(directory) for directory in general]) if general else ((), ())
    stacked = stack(list(tensors), directories, tensors[0], "")
    if general:
        stacked |= stack(list(general_tensors), general, tensors[0], "general_")
    modules = {key.rpartition(".")[0].removeprefix("base_model.model.") for key in tensors[0]}
    config = {
        "peft_type": "ARROW",
        "base_model_name_or_path": configs[0].get("base_model_name_or_path"),
        "target_modules": sorted(modules),
        "arrow_config": router | {"use_gks": bool(general)},
        "experts": list(configs),
        "general_experts": list(general_configs),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({key: value.contiguous() for key, value in stacked.items()}, out / WEIGHTS, metadata={"format": "pt"})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experts", type=Path, nargs="+", help="directories that PEFT wrote, in order")
    parser.add_argument("--general", type=Path, nargs="*", default=[], help="experts whose mean is subtracted first")
    parser.add_argument("--top-k", type=int, default=3, help="experts of a token")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the magnitudes before the softmax")
    parser.add_argument("--seed", type=int, help="the rng_seed of PEFT's ArrowConfig")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    router = {"top_k": args.top_k, "router_temperature": args.temperature, "rng_seed": args.seed}
    collect(args.experts, args.general, router, args.out)


if __name__ == "__main__":
    main()
