"""Adapters that a server must refuse to load, each with the word that its message must contain.

All are made for the `llama` model and hold one layer's tensors at most, so that each has exactly one fault.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from fixture_common import fresh_dir, generator, write_json

MODEL = "llama"
SITE = "model.layers.0.self_attn.q_proj"
P = f"base_model.model.{SITE}."
SSF_SITE = "model.layers.0.mlp.gate_proj"
LORA_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": f"patchbay/{MODEL}",
    "inference_mode": True,
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "bias": "none",
    "init_lora_weights": True,
    "use_dora": False,
    "use_rslora": False,
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
MISS_CONFIG = {
    "peft_type": "MISS",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": f"patchbay/{MODEL}",
    "inference_mode": True,
    "r": 4,
    "mini_r": 1,
    "init_weights": True,
    "target_modules": ["q_proj"],
    "bias": "none",
}
SSF_CONFIG = {
    "peft_type": "SSF",
    "ssf_version": 1,
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": f"patchbay/{MODEL}",
    "target_modules": ["gate_proj"],
    "norm_modules": None,
    "embedding_modules": None,
    "exclude_modules": None,
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "use_scale": True,
    "use_shift": True,
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
}


@dataclass
class Refused:
    """One faulty adapter. `names` must occur in the message; `config` and `tensors` are its two files."""

    name: str
    what: str
    names: str
    config: dict
    tensors: dict


def noise(*shape: int) -> torch.Tensor:
    """Small random values."""
    return 0.1 * torch.randn(shape, generator=generator("refused", *shape))


def lora_tensors(site: str = SITE, r: int = 2, features_in: int = 32, features_out: int = 32) -> dict:
    """The two factors of one linear."""
    prefix = f"base_model.model.{site}."
    return {f"{prefix}lora_A.weight": noise(r, features_in), f"{prefix}lora_B.weight": noise(features_out, r)}


def with_value(tensors: dict, key: str, value: float) -> dict:
    """The tensors with one value of one of them replaced."""
    changed = tensors[key].clone()
    changed.view(-1)[3] = value
    return tensors | {key: changed}


def ssf_tensors(site: str = SSF_SITE, features: int = 48) -> dict:
    """Scale and shift of one module."""
    prefix = f"base_model.model.{site}."
    return {f"{prefix}ssf_scale": 1 + noise(features), f"{prefix}ssf_shift": noise(features)}


def lora(name: str, what: str, names: str, tensors: dict | None = None, **config) -> Refused:
    """A faulty LORA adapter; a sound file unless the arguments say otherwise."""
    return Refused(name, what, names, LORA_CONFIG | config, lora_tensors() if tensors is None else tensors)


def miss(name: str, what: str, names: str, tensors: dict, **config) -> Refused:
    """A faulty MISS adapter."""
    return Refused(name, what, names, MISS_CONFIG | config, tensors)


def ssf(name: str, what: str, names: str, tensors: dict | None = None, **config) -> Refused:
    """A faulty SSF adapter; a sound file unless the arguments say otherwise."""
    return Refused(name, what, names, SSF_CONFIG | config, ssf_tensors() if tensors is None else tensors)


def lora_files() -> list[Refused]:
    """Faults of the tensors of LORA files."""
    sound = lora_tensors()
    last = "model.layers.2.self_attn.q_proj"
    wide = lora_tensors(features_in=48)
    long = sound | {f"{P}lora_B.weight": noise(48, 2)}
    ranks = sound | {f"{P}lora_B.weight": noise(32, 3)}
    return [
        lora("unknown_suffix", "a key with an unknown suffix", "lora_C", sound | {f"{P}lora_C.weight": noise(2, 2)}),
        lora("unknown_module", "a module that the model does not have", last, sound | lora_tensors(site=last)),
        lora(
            "unknown_prefix",
            "keys without the base_model prefix and of no known module",
            "transformer.h.0.attn",
            {"transformer.h.0.attn.lora_A.weight": noise(2, 32), "transformer.h.0.attn.lora_B.weight": noise(32, 2)},
        ),
        lora(
            "not_a_linear",
            "LoRA factors on a module that is neither linear nor embedding",
            "input_layernorm",
            lora_tensors(site="model.layers.0.input_layernorm"),
            target_modules=["input_layernorm"],
        ),
        lora("wrong_shape_a", "lora_A has the wrong number of inputs", SITE, wide),
        lora("wrong_shape_b", "lora_B has the wrong number of outputs", SITE, long),
        lora("rank_mismatch", "lora_A has rank 2 and lora_B rank 3", SITE, ranks),
        lora("rank_config", "the tensors have rank 2, the config says 8", SITE, r=8),
        lora("one_dimension", "lora_A has one dimension", SITE, sound | {f"{P}lora_A.weight": noise(64)}),
        lora(
            "integer_dtype",
            "lora_A holds integers",
            f"{P}lora_A.weight",
            sound | {f"{P}lora_A.weight": torch.ones(2, 32, dtype=torch.int32)},
        ),
        lora("nan", "a value is NaN", f"{P}lora_A.weight", with_value(sound, f"{P}lora_A.weight", float("nan"))),
        lora("inf", "a value is infinite", f"{P}lora_B.weight", with_value(sound, f"{P}lora_B.weight", float("inf"))),
        lora("missing_b", "lora_A without lora_B", "lora_B", {f"{P}lora_A.weight": noise(2, 32)}),
        lora("missing_a", "lora_B without lora_A", "lora_A", {f"{P}lora_B.weight": noise(32, 2)}),
        lora("missing_magnitude", "use_dora without the magnitude vector", "lora_magnitude_vector", use_dora=True),
        lora(
            "surplus_magnitude",
            "a magnitude vector although use_dora is false",
            "use_dora",
            sound | {f"{P}lora_magnitude_vector": noise(32)},
        ),
        lora("missing_lora_bias", "lora_bias without lora_B.bias", "lora_B.bias", lora_bias=True),
        lora("empty", "a file without any tensor", "no tensors", {}),
        lora(
            "no_modules",
            "only a replaced norm, no adapted module although the config names some",
            "q_proj",
            {"base_model.model.model.norm.weight": noise(32)},
            modules_to_save=["model.norm"],
        ),
        lora(
            "token_rows",
            "three token indices and two rows",
            "trainable_tokens_delta",
            sound | {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": noise(2, 32)},
            trainable_token_indices=[3, 4, 5],
        ),
        lora(
            "token_range",
            "a token index outside the vocabulary",
            "128",
            sound | {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": noise(1, 32)},
            trainable_token_indices=[128],
        ),
        lora(
            "resized_embedding",
            "a replaced embedding with more rows than the vocabulary",
            "embed_tokens",
            sound | {"base_model.model.model.embed_tokens.weight": noise(130, 32)},
            modules_to_save=["embed_tokens"],
        ),
    ]


def lora_configs() -> list[Refused]:
    """Sound tensors whose config asks for what a plain server cannot do."""
    expert = {"model.layers.0.mlp.experts.gate_up_proj"}
    alora = {"alora_invocation_tokens": [5, 17]}
    return [
        lora("pissa", "an unconverted PiSSA file", "pissa", init_lora_weights="pissa"),
        lora("pissa_niter", "an unconverted PiSSA file of the fast start", "pissa", init_lora_weights="pissa_niter_4"),
        lora("olora", "an unconverted OLoRA file", "olora", init_lora_weights="olora"),
        lora("corda", "an unconverted CorDA file", "corda", init_lora_weights="corda"),
        lora(
            "loftq",
            "an adapter of a LoftQ base",
            "loftq",
            init_lora_weights="loftq",
            loftq_config={"loftq_bits": 4, "loftq_iter": 1},
        ),
        lora("lora_ga", "an unconverted LoRA-GA file", "lora_ga", init_lora_weights="lora_ga"),
        lora("alora", "activated LoRA", "alora_invocation_tokens", **alora),
        lora(
            "qalora",
            "QALoRA: pooled inputs",
            "use_qalora",
            lora_tensors(features_in=16),
            use_qalora=True,
            qalora_group_size=2,
        ),
        lora(
            "bdlora",
            "block-diagonal LoRA",
            "use_bdlora",
            {f"{P}lora_A.weight": noise(2, 16), f"{P}lora_B.weight": noise(32, 2)},
            use_bdlora={
                "target_modules_bd_a": ["q_proj"],
                "target_modules_bd_b": [],
                "nblocks": 2,
                "match_strict": True,
            },
        ),
        lora(
            "kasa",
            "KaSA",
            "kasa",
            lora_tensors() | {f"{P}lora_diag": noise(2)},
            kasa_config={"beta": 1e-4, "gamma": 1e-3},
        ),
        lora(
            "arrow",
            "Arrow routing between LoRAs",
            "arrow_config",
            arrow_config={
                "top_k": 2,
                "router_temperature": 1.0,
                "use_gks": False,
                "task_adapter_names": ["a", "b"],
                "gks_adapter_names": [],
            },
        ),
        lora("layer_replication", "a rebuilt layer stack", "layer_replication", layer_replication=[[0, 2], [1, 2]]),
        lora("target_parameters", "expert parameters", "target_parameters", target_parameters=sorted(expert)),
        lora(
            "fan_in_fan_out", "a transposed base, which this model does not have", "fan_in_fan_out", fan_in_fan_out=True
        ),
        Refused("type_mismatch", "peft_type MISS with LoRA keys", "lora_A", MISS_CONFIG, lora_tensors()),
        Refused(
            "type_unknown", "an unknown peft_type", "NOSUCH", LORA_CONFIG | {"peft_type": "NOSUCH"}, lora_tensors()
        ),
        Refused(
            "type_absent",
            "a config without peft_type",
            "peft_type",
            {k: v for k, v in LORA_CONFIG.items() if k != "peft_type"},
            lora_tensors(),
        ),
    ]


def miss_files() -> list[Refused]:
    """Faults of MISS files."""
    key = f"{P}miss_block"
    return [
        miss("miss_columns", "columns neither equal nor divide the outputs", SITE, {key: noise(4, 20)}),
        miss("miss_rank", "the tensor has rank 4, the config says 8", SITE, {key: noise(4, 32)}, r=8),
        miss(
            "miss_bat_blocks",
            "bat blocks that do not cover the outputs",
            SITE,
            {key: noise(6, 4, 4)},
            init_weights="bat",
        ),
        miss(
            "miss_bat_inputs",
            "bat blocks that do not divide the inputs",
            SITE,
            {key: noise(2, 16, 12)},
            r=12,
            init_weights="bat",
        ),
        miss(
            "miss_form", "a balance tensor although the config says bat", "bat", {key: noise(4, 32)}, init_weights="bat"
        ),
        miss("miss_nan", "a value is NaN", key, with_value({key: noise(4, 32)}, key, float("nan"))),
        Refused("miss_lora_type", "peft_type LORA with MiSS keys", "miss_block", LORA_CONFIG, {key: noise(4, 32)}),
    ]


def ssf_files() -> list[Refused]:
    """Faults of SSF files."""
    sound = ssf_tensors()
    prefix = f"base_model.model.{SSF_SITE}."
    numbered = {f"{prefix}ssf_scale_1": 1 + noise(48), f"{prefix}ssf_shift_1": noise(48)}
    scale_only = {f"{prefix}ssf_scale": sound[f"{prefix}ssf_scale"]}
    norm = "model.layers.0.input_layernorm"
    return [
        ssf("ssf_site_number", "site numbers of a timm checkpoint", "ssf_scale_1", numbered),
        ssf("ssf_no_shift", "no shift although use_shift is true", "ssf_shift", scale_only),
        ssf("ssf_surplus_shift", "a shift although use_shift is false", "ssf_shift", use_shift=False),
        ssf(
            "ssf_unlisted",
            "a module that no list of the config matches",
            "up_proj",
            sound | ssf_tensors(site="model.layers.0.mlp.up_proj"),
        ),
        ssf(
            "ssf_unlisted_norm",
            "a norm although norm_modules is null",
            norm,
            sound | ssf_tensors(site=norm, features=32),
        ),
        ssf("ssf_absent", "a listed module without tensors", "up_proj", target_modules=["gate_proj", "up_proj"]),
        ssf("ssf_wrong_length", "vectors of the wrong length", SSF_SITE, ssf_tensors(features=32)),
        ssf("ssf_kind", "norm_modules names a linear", SSF_SITE, target_modules=None, norm_modules=["gate_proj"]),
        ssf("ssf_version", "a later version of the format", "ssf_version", ssf_version=2),
        ssf(
            "ssf_inf",
            "a value is infinite",
            f"{prefix}ssf_scale",
            with_value(sound, f"{prefix}ssf_scale", float("inf")),
        ),
        ssf(
            "ssf_modules_to_save", "modules_to_save without the tensor it names", "lm_head", modules_to_save=["lm_head"]
        ),
    ]


def broken_files(root: Path) -> list[dict]:
    """Directories whose files cannot be read at all."""
    faults: list[tuple[str, str, str, Callable[[Path], object]]] = [
        (
            "no_weights",
            "the weights file is missing",
            "adapter_model.safetensors",
            lambda d: (d / "adapter_model.safetensors").unlink(),
        ),
        (
            "no_config",
            "the config file is missing",
            "adapter_config.json",
            lambda d: (d / "adapter_config.json").unlink(),
        ),
        (
            "config_not_json",
            "the config is not JSON",
            "adapter_config.json",
            lambda d: (d / "adapter_config.json").write_text("{\n"),
        ),
        ("truncated", "the weights file is cut short", "adapter_model.safetensors", cut_short),
    ]
    entries = []
    for name, what, names, damage in faults:
        entries.append(write_one(root, lora(name, what, names)))
        damage(root / "refused" / name)
    return entries


def cut_short(directory: Path) -> None:
    """Removes the last 100 bytes of the weights."""
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def write_one(root: Path, case: Refused) -> dict:
    """Writes one directory; returns its manifest entry."""
    directory = fresh_dir(root / "refused" / case.name)
    write_json(directory / "adapter_config.json", json.loads(json.dumps(case.config)))
    tensors = {key: value.contiguous() for key, value in case.tensors.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return {"dir": f"refused/{case.name}", "model": MODEL, "names": case.names, "what": case.what}


def write_refused(root: Path, more: list[Refused]) -> list[dict]:
    """Writes every faulty adapter, and those of `more`; returns the manifest entries."""
    fresh_dir(root / "refused")
    cases = lora_files() + lora_configs() + miss_files() + ssf_files()
    return [write_one(root, case) for case in cases] + broken_files(root) + [write_one(root, case) for case in more]
