"""Saves an X-LoRA model of PEFT in the format that docs/adapters.md describes.

`save_pretrained` of PEFT 0.21 takes a layer's number in a tensor's name for the name of an expert, and leaves out what
has the number of another one, in the classifier and in the experts. Use this in its place:

    from xlora import save
    save(model, Path("mixture"))
"""

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CLASSIFIER = "internal_xlora_classifier"
PREFIX = "base_model.lora_model.model."


def save(model: PeftModel, directory: Path) -> None:
    """Writes the classifier, and each expert as a LoRA in a sub-directory with its number for a name."""
    tensors = model.state_dict()
    config = config_of(model, "default")
    names = [str(number) for number in range(len(config["adapters"]))]
    if sorted(config["adapters"]) != sorted(names):
        raise ValueError(f"expected the expert names {names}, which PEFT gives them, found {list(config['adapters'])}")
    # The paths are those of the machine that trained it; the names of the sub-directories are what counts.
    config["adapters"] = {name: name for name in names}
    write(directory, config, {key: value for key, value in tensors.items() if CLASSIFIER in key})
    for name in names:
        of_expert = {expert_key(key, name): value for key, value in tensors.items() if is_of_expert(key, name)}
        write(directory / name, config_of(model, name), of_expert)


def is_of_expert(key: str, name: str) -> bool:
    """Whether a tensor of the model is a factor of this expert."""
    return any(f".{factor}.{name}." in key for factor in ("lora_A", "lora_B"))


def expert_key(key: str, name: str) -> str:
    """The key of a factor in a LoRA file."""
    for factor in ("lora_A", "lora_B"):
        key = key.replace(f".{factor}.{name}.", f".{factor}.")
    return "base_model.model." + key.removeprefix(PREFIX)


def config_of(model: PeftModel, name: str) -> dict:
    """An adapter's config as PEFT would write it."""
    config = model.peft_config[name].to_dict() | {"inference_mode": True}
    plain = lambda value: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
    return {key: plain(value) for key, value in config.items()}


def write(directory: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a directory with the two files of an adapter."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(contiguous, directory / WEIGHTS, metadata={"format": "pt"})
