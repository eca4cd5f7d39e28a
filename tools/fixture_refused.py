"""Adapters that a server must refuse to load, each with the word that its message must contain.

All but some are made for the `llama` model and hold one layer's tensors at most, so that each has exactly one fault.
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
    """One faulty adapter. `names` must occur in the message; `config` and `tensors` are its two files.

    `parts` are config and tensors of the adapters in sub-directories `0`, `1` and so on.
    """

    name: str
    what: str
    names: str
    config: dict
    tensors: dict
    model: str = MODEL
    parts: tuple = ()


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
    return [
        lora("pissa_niter", "an unconverted PiSSA file of the fast start", "pissa", init_lora_weights="pissa_niter_4"),
        lora("corda", "an unconverted CorDA file", "corda", init_lora_weights="corda"),
        lora(
            "loftq",
            "an adapter of a LoftQ base",
            "loftq",
            init_lora_weights="loftq",
            loftq_config={"loftq_bits": 4, "loftq_iter": 1},
        ),
        lora("lora_ga", "an unconverted LoRA-GA file", "lora_ga", init_lora_weights="lora_ga"),
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


def alora_files() -> list[Refused]:
    """Activated LoRA that would change tokens before its invocation, or that never could be invoked."""
    names = "alora_invocation_tokens"
    norm = lora_tensors() | {"base_model.model.model.norm.weight": 1 + noise(32)}
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": noise(1, 32)}
    embedding = {
        "base_model.model.model.embed_tokens.lora_embedding_A": noise(2, 128),
        "base_model.model.model.embed_tokens.lora_embedding_B": noise(32, 2),
    }
    both = ["q_proj", "embed_tokens"]
    tokens = {"alora_invocation_tokens": [5, 17]}
    dora = lora_tensors() | {f"{P}lora_magnitude_vector": 1 + noise(32)}
    return [
        lora("alora_string", "the invocation as text", names, alora_invocation_tokens="now"),
        lora("alora_vocab", "an invocation token outside the vocabulary", "128", alora_invocation_tokens=[5, 128]),
        lora("alora_dora", "activated LoRA with DoRA", names, dora, use_dora=True, **tokens),
        lora("alora_bias", "activated LoRA that replaces biases", names, bias="all", **tokens),
        lora(
            "alora_saved", "activated LoRA with a replaced norm", names, norm, modules_to_save=["model.norm"], **tokens
        ),
        lora(
            "alora_embedding",
            "activated LoRA on the embedding",
            names,
            lora_tensors() | embedding,
            target_modules=both,
            **tokens,
        ),
        lora(
            "alora_rows",
            "activated LoRA with token rows",
            names,
            lora_tensors() | rows,
            trainable_token_indices=[3],
            **tokens,
        ),
    ]


PROMPT = "prompt_embeddings"


def prompt(
    name: str, what: str, names: str, tensors: dict | None = None, kind: str = "PROMPT_TUNING", **config
) -> Refused:
    """A faulty adapter that stands before the prompt; sound virtual tokens unless the arguments say otherwise."""
    width = 64 if kind in ("PREFIX_TUNING", "CARTRIDGE") else 32
    sound = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"patchbay/{MODEL}",
        "inference_mode": True,
        "num_virtual_tokens": 4,
        "token_dim": width // 4 if width == 64 else width,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_transformer_submodules": 1,
    }
    return Refused(name, what, names, sound | config, {PROMPT: noise(4, width)} if tensors is None else tensors)


def prompt_files() -> list[Refused]:
    """Faults of adapters that stand before the prompt."""
    multitask = {
        PROMPT: noise(4, 32),
        "prefix_task_cols": noise(3, 4, 2),
        "prefix_task_rows": noise(3, 2, 32),
    }
    tasks = {"kind": "MULTITASK_PROMPT_TUNING", "num_tasks": 3, "num_ranks": 2}
    no_rows = {key: value for key, value in multitask.items() if key != "prefix_task_rows"}
    sound = {PROMPT: noise(4, 32)}
    saved = sound | {"base_model.model.model.norm.weight": 1 + noise(32)}
    return [
        prompt("prompt_rows", "fewer rows than num_virtual_tokens", PROMPT, {PROMPT: noise(3, 32)}),
        prompt("prompt_width", "rows of another base model", PROMPT, {PROMPT: noise(4, 48)}, token_dim=None),
        prompt("prompt_token_dim", "token_dim of another base model", "token_dim", token_dim=48),
        prompt("prompt_key", "rows under another name", "embedding.weight", {"embedding.weight": noise(4, 32)}),
        prompt("prompt_nan", "a value is NaN", PROMPT, with_value(sound, PROMPT, float("nan"))),
        prompt("prompt_number", "num_virtual_tokens is missing", "num_virtual_tokens", num_virtual_tokens=None),
        prompt(
            "prompt_submodules", "rows for an encoder too", "num_transformer_submodules", num_transformer_submodules=2
        ),
        prompt(
            "prompt_saved", "a replaced norm beside the rows", "modules_to_save", saved, modules_to_save=["model.norm"]
        ),
        prompt("prompt_surplus", "tensors of a multitask file", "prefix_task_cols", multitask),
        prompt("prompt_prefix", "the entries of a KV prefix", PROMPT, {PROMPT: noise(4, 64)}),
        Refused("prompt_lora_type", "peft_type LORA with virtual tokens", PROMPT, LORA_CONFIG, sound),
        prompt(
            "p_tuning_encoder",
            "encoder weights that were not evaluated",
            "mlp_head",
            sound | {"mlp_head.0.weight": noise(8, 8)},
            kind="P_TUNING",
        ),
        prompt("multitask_task", "three tasks and none chosen", "task_id", multitask, **tasks),
        prompt("multitask_range", "a task that the file does not have", "task_id", multitask, task_id=3, **tasks),
        prompt(
            "multitask_number",
            "fewer tasks than num_tasks",
            "prefix_task_cols",
            multitask,
            task_id=0,
            **(tasks | {"num_tasks": 4}),
        ),
        prompt(
            "multitask_ranks",
            "another rank than num_ranks",
            "prefix_task_cols",
            multitask,
            task_id=0,
            **(tasks | {"num_ranks": 3}),
        ),
        prompt("multitask_rows", "a factor is missing", "prefix_task_rows", no_rows, task_id=0, **tasks),
        prompt("cpt_ids", "fewer token ids than rows", "cpt_token_ids", kind="CPT", cpt_token_ids=[9, 17, 42]),
        prompt(
            "prefix_rows", "fewer entries than num_virtual_tokens", PROMPT, {PROMPT: noise(3, 64)}, kind="PREFIX_TUNING"
        ),
        prompt(
            "prefix_layers",
            "another number of layers",
            "num_layers",
            {PROMPT: noise(4, 96)},
            kind="PREFIX_TUNING",
            num_layers=3,
        ),
        prompt(
            "prefix_heads",
            "sizes of query heads instead of key heads",
            "token_dim",
            {PROMPT: noise(4, 128)},
            kind="PREFIX_TUNING",
            token_dim=32,
        ),
        prompt(
            "prefix_tokens", "virtual tokens instead of entries", PROMPT, {PROMPT: noise(4, 32)}, kind="PREFIX_TUNING"
        ),
        prompt(
            "cartridge_rows",
            "more entries than num_virtual_tokens",
            PROMPT,
            {PROMPT: noise(6, 64)},
            kind="CARTRIDGE",
            num_frozen_tokens=1,
        ),
        prompt(
            "cartridge_inf",
            "a value is infinite",
            PROMPT,
            with_value({PROMPT: noise(4, 64)}, PROMPT, float("inf")),
            kind="CARTRIDGE",
            num_frozen_tokens=1,
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
    write_files(directory, case.config, case.tensors)
    for number, (config, tensors) in enumerate(case.parts):
        write_files(fresh_dir(directory / str(number)), config, tensors)
    return {"dir": f"refused/{case.name}", "model": case.model, "names": case.names, "what": case.what}


def write_files(directory: Path, config: dict, tensors: dict) -> None:
    """Writes an adapter's two files."""
    write_json(directory / "adapter_config.json", json.loads(json.dumps(config)))
    contiguous = {key: value.contiguous() for key, value in tensors.items()}
    save_file(contiguous, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def write_refused(root: Path, more: list[Refused]) -> list[dict]:
    """Writes every faulty adapter, those of this file and `more`; returns the manifest entries."""
    fresh_dir(root / "refused")
    cases = lora_files() + lora_configs() + alora_files() + miss_files() + ssf_files() + prompt_files()
    return [write_one(root, case) for case in cases] + broken_files(root) + [write_one(root, case) for case in more]
