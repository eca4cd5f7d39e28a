"""SSF (scale and shift the features) for decoder language models.

Owns the format `peft_type = "SSF"`: an `adapter_config.json` with three module lists, and an
`adapter_model.safetensors` with one `ssf_scale` and one `ssf_shift` per wrapped module. A wrapped linear, norm or
embedding answers `ssf_scale * module(x) + ssf_shift`; the module's own bias is inside `module(x)`.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
# Which linears read a norm's output; a merge folds the norm's shift into them.
NORM_CONSUMERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"),
}


@dataclass
class SsfConfig:
    """The keys of an SSF `adapter_config.json`. Lists match as PEFT's `target_modules` do."""

    target_modules: list[str] | str | None = None
    norm_modules: list[str] | str | None = None
    embedding_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | None = None
    layers_pattern: str | None = None
    use_scale: bool = True
    use_shift: bool = True
    base_model_name_or_path: str = ""
    peft_type: str = "SSF"
    ssf_version: int = 1
    task_type: str = "CAUSAL_LM"
    revision: str | None = None
    init_weights: bool = True
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False
    inference_mode: bool = True


class SsfModule(nn.Module):
    """A frozen module whose output is scaled and shifted per feature."""

    def __init__(self, base_layer: nn.Module, features: int, config: SsfConfig):
        super().__init__()
        self.base_layer = base_layer
        self.ssf_scale = nn.Parameter(torch.ones(features)) if config.use_scale else None
        self.ssf_shift = nn.Parameter(torch.zeros(features)) if config.use_shift else None

    def forward(self, *args, **kwargs):
        """`ssf_scale * base_layer(x) + ssf_shift`, in float32 or the wider of both dtypes."""
        y = self.base_layer(*args, **kwargs)
        if self.ssf_scale is not None:
            y = y * self.ssf_scale
        if self.ssf_shift is not None:
            y = y + self.ssf_shift
        return y


def name_matches(name: str, spec: list[str] | str | None) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds paths or path endings."""
    if not spec:
        return False
    if isinstance(spec, str):
        return re.fullmatch(spec, name) is not None
    return any(name == item or name.endswith("." + item) for item in spec)


def layer_matches(name: str, config: SsfConfig) -> bool:
    """Whether `layers_to_transform` admits the module; modules outside the numbered layers are then refused.

    As in PEFT, it does not narrow modules that a list names by their whole path."""
    if config.layers_to_transform is None:
        return True
    pattern = re.escape(config.layers_pattern) if config.layers_pattern else r"[^.]*"
    found = re.match(rf".*?\.{pattern}\.(\d+)\.", name)
    return found is not None and int(found.group(1)) in config.layers_to_transform


def module_kind(module: nn.Module) -> str | None:
    """`linear`, `norm` or `embedding`; None for everything else."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "norm" if type(module).__name__.endswith("RMSNorm") else None


def num_features(module: nn.Module) -> int:
    """Length of the module's output feature axis."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    return module.weight.shape[0]


def sites(model: nn.Module, config: SsfConfig) -> list[str]:
    """Paths of the modules that the three lists of the config match, in model order."""
    spec = {"linear": config.target_modules, "norm": config.norm_modules, "embedding": config.embedding_modules}
    names = []
    for name, module in model.named_modules():
        kind = module_kind(module)
        if kind is None or not name_matches(name, spec[kind]):
            continue
        by_path = not isinstance(spec[kind], str) and name in spec[kind]
        if not name_matches(name, config.exclude_modules) and (by_path or layer_matches(name, config)):
            names.append(name)
    return names


def attach(model: nn.Module, config: SsfConfig) -> list[str]:
    """Wraps every matched module with neutral values and freezes the rest; returns the wrapped paths."""
    names = sites(model, config)
    if not names:
        raise ValueError("the SSF config matches no module")
    model.requires_grad_(False)
    for name in names:
        module = model.get_submodule(name)
        model.set_submodule(name, SsfModule(module, num_features(module), config))
    return names


def wrapped(model: nn.Module) -> dict[str, SsfModule]:
    """The wrapped modules by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SsfModule)}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the adapter file, by key."""
    tensors = {}
    for name, module in wrapped(model).items():
        for part in ("ssf_scale", "ssf_shift"):
            value = getattr(module, part)
            if value is not None:
                tensors[f"{KEY_PREFIX}{name}.{part}"] = value.detach().clone().contiguous()
    return tensors


def save(model: nn.Module, config: SsfConfig, directory: Path) -> None:
    """Writes the two files of the adapter."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(config), indent=2, sort_keys=True)
    (directory / CONFIG_FILE).write_text(text + "\n")
    save_file(state(model), directory / WEIGHTS_FILE, metadata={"format": "pt"})


def load(model: nn.Module, directory: Path) -> SsfConfig:
    """Wraps `model` with the adapter in `directory`; keys must be exactly those that the config asks for."""
    config = SsfConfig(**json.loads((directory / CONFIG_FILE).read_text()))
    attach(model, config)
    tensors = load_file(directory / WEIGHTS_FILE)
    expected = state(model)
    if set(tensors) != set(expected):
        raise ValueError(f"expected keys {sorted(expected)}, found {sorted(tensors)}")
    for name, module in wrapped(model).items():
        for part in ("ssf_scale", "ssf_shift"):
            if getattr(module, part) is not None:
                getattr(module, part).data = tensors[f"{KEY_PREFIX}{name}.{part}"].float()
    return config


def _scale_shift(module: SsfModule) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift with neutral values in place of absent tensors."""
    given = module.ssf_scale if module.ssf_scale is not None else module.ssf_shift
    scale = module.ssf_scale if module.ssf_scale is not None else torch.ones_like(given)
    shift = module.ssf_shift if module.ssf_shift is not None else torch.zeros_like(given)
    return scale.detach(), shift.detach()


def _affine_linear(linear: nn.Linear, scale: torch.Tensor, shift: torch.Tensor) -> nn.Linear:
    """The linear `diag(scale) W`, `scale * b + shift`, with parameters of its own."""
    bias = linear.bias.detach() if linear.bias is not None else torch.zeros(linear.out_features)
    merged = nn.Linear(linear.in_features, linear.out_features, bias=True)
    merged.weight = nn.Parameter(scale[:, None] * linear.weight.detach())
    merged.bias = nn.Parameter(scale * bias + shift)
    return merged


def _consumers(model: nn.Module, norm_name: str) -> list[str]:
    """Paths of the linears that read the output of a norm; empty when there are none (per-head norms)."""
    parent, _, leaf = norm_name.rpartition(".")
    if norm_name == "model.norm":
        return ["lm_head"]
    names = [f"{parent}.{tail}" for tail in NORM_CONSUMERS.get(leaf, ())]
    known = {name for name, _ in model.named_modules()}
    return [name for name in names if name in known]


def _fold_shift(model: nn.Module, name: str, shift: torch.Tensor) -> None:
    """Adds `W shift` to the bias of the linear at `name`, below its own SSF wrapper if it has one."""
    target = model.get_submodule(name)
    inner = target.base_layer if isinstance(target, SsfModule) else target
    linear = _affine_linear(inner, torch.ones(inner.out_features), inner.weight.detach() @ shift)
    if isinstance(target, SsfModule):
        target.base_layer = linear
    else:
        model.set_submodule(name, linear)


def merge(model: nn.Module) -> nn.Module:
    """Folds every wrapper into plain modules; ValueError for a shifted norm without a linear behind it."""
    for name, module in wrapped(model).items():
        if module_kind(module.base_layer) != "norm":
            continue
        scale, shift = _scale_shift(module)
        consumers = _consumers(model, name)
        if not consumers and bool((shift != 0).any()):
            raise ValueError(f"the shift of {name} has no linear to be folded into")
        for consumer in consumers:
            _fold_shift(model, consumer, shift)
        module.base_layer.weight = nn.Parameter(module.base_layer.weight.detach() * scale)
        model.set_submodule(name, module.base_layer)
    for name, module in wrapped(model).items():
        scale, shift = _scale_shift(module)
        inner = module.base_layer
        if isinstance(inner, nn.Linear):
            model.set_submodule(name, _affine_linear(inner, scale, shift))
        else:
            inner.weight = nn.Parameter(inner.weight.detach() * scale + shift)
            model.set_submodule(name, inner)
    return model
