"""What the modules with cases of further kinds share: cases by type, and faults that every kind must refuse."""

from collections.abc import Callable

import torch

from fixture_cases import Case
from fixture_refused import MODEL, SITE, Refused, with_value

# Fewer outputs than inputs, and more.
MIXED = ["v_proj", "up_proj"]
# What the cases that equal the base have in common: little is enough.
IDENTITY = {"identity": True, "target_modules": ["q_proj"], "prompts": (1,)}
P = f"base_model.model.{SITE}."


def case_of(peft_type: str, **defaults) -> Callable[..., Case]:
    """A function that makes cases of one type; on two linears of `llama` unless the arguments say otherwise."""

    def make(name: str, what: str, models: tuple[str, ...] = ("llama",), **config) -> Case:
        extra = {key: config.pop(key) for key in ("edit", "identity", "prompts") if key in config}
        return Case(name, peft_type, what, models, {"target_modules": MIXED} | defaults | config, **extra)

    return make


class Faults:
    """Faulty files of one kind, made from a sound one of the query projection."""

    def __init__(self, peft_type: str, tensors: dict[str, torch.Tensor], **config):
        self.name = peft_type.lower()
        self.tensors = {f"{P}{suffix}": value for suffix, value in tensors.items()}
        self.config = {
            "peft_type": peft_type,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": f"patchbay/{MODEL}",
            "inference_mode": True,
            "target_modules": ["q_proj"],
            "layers_to_transform": [0],
        } | config

    def usual(self, suffix: str) -> list[Refused]:
        """What any kind refuses: an unknown key, a module that is not named, a wrong shape, NaN, an unknown field."""
        key = f"{P}{suffix}"
        longer = torch.cat([self.tensors[key], self.tensors[key][-1:]])
        nan = with_value(self.tensors, key, float("nan")) if self.tensors[key].is_floating_point() else None
        faults = [
            self.fault("suffix", "a key with an unknown suffix", "nosuch", {"nosuch": torch.ones(2)}),
            self.fault("unlisted", "a module that the config does not name", "target_modules", target_modules=["k_proj"]),
            self.fault("shape", "a tensor of the wrong shape", suffix, {suffix: longer}),
            self.fault("field", "a field that nobody knows", "mystery", mystery=1),
        ]
        if nan is not None:
            faults.append(Refused(f"{self.name}_nan", "a value is NaN", key, self.config, nan))
        return faults

    def fault(self, name: str, what: str, names: str, tensors: dict | None = None, **config) -> Refused:
        """A fault of the kind's own: tensors of the module that replace the sound ones (None removes one), and fields."""
        changed = {f"{P}{suffix}": value for suffix, value in (tensors or {}).items()}
        tensors = {key: value for key, value in (self.tensors | changed).items() if value is not None}
        return Refused(f"{self.name}_{name}", what, names, self.config | config, tensors)
