"""The tiny base models of the fixtures: their configs, random weights and expected outputs.

Each model exists to test one property of a family; `what` says which. Config files come in three styles:
`new` is what transformers 5 writes, `both` adds the older keys, `old` has the older keys only.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from fixture_common import (
    ATTEMPTS_MAX,
    MARGIN_MIN,
    VOCAB_SIZE,
    expected_outputs,
    fresh_dir,
    generator,
    greedy_full,
    greedy_kept,
    load_base,
    save_expected,
    write_json,
)


@dataclass
class ModelSpec:
    """One base model. `config` holds what differs from `COMMON`."""

    name: str
    model_type: str
    what: str
    style: str = "new"
    shard_size: str | None = None
    config: dict = field(default_factory=dict)


COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.3],
    "long_factor": [1.7, 4.0],
    "original_max_position_embeddings": 16,
}
MODELS = [
    ModelSpec("llama", "llama", "plain llama, untied head"),
    ModelSpec("llama_tied", "llama", "tied head", "both", config={"tie_word_embeddings": True}),
    ModelSpec(
        "llama_bias",
        "llama",
        "bias on every attention and mlp linear",
        "both",
        config={
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        },
    ),
    ModelSpec("llama_rope_llama3", "llama", "llama3 rope scaling", config={"rope_parameters": LLAMA3}),
    ModelSpec(
        "llama_rope_linear",
        "llama",
        "linear rope scaling, config with the older keys only",
        "old",
        config={"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    ),
    ModelSpec(
        "llama_rope_dynamic",
        "llama",
        "dynamic NTK rope: base grows with the sequence length",
        config={
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
    ModelSpec(
        "llama_rope_yarn",
        "llama",
        "yarn rope scaling, config with the older keys only",
        "old",
        config={"max_position_embeddings": 64, "rope_parameters": YARN},
    ),
    ModelSpec(
        "mistral",
        "mistral",
        "sliding window of 8, weights in several shards",
        shard_size="40KB",
        config={"sliding_window": 8, "head_dim": 8},
    ),
    ModelSpec(
        "qwen2",
        "qwen2",
        "bias on q, k, v only; tied head",
        "both",
        config={
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        },
    ),
    ModelSpec(
        "qwen2_sliding",
        "qwen2",
        "sliding window of 8 in layer 1 only (max_window_layers); untied head",
        "both",
        config={"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    ModelSpec(
        "qwen3",
        "qwen3",
        "q_norm and k_norm; head_dim 16 differs from hidden / heads",
        config={"head_dim": 16, "rms_norm_eps": 1e-6},
    ),
    ModelSpec("phi3", "phi3", "fused qkv_proj and gate_up_proj", "both"),
    ModelSpec(
        "phi3_longrope",
        "phi3",
        "longrope with partial rotary factor 0.5, config with the older keys only",
        "old",
        config={"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
    ),
]


def random_weights(model: torch.nn.Module, tied: bool, rng: torch.Generator) -> None:
    """Random values for every parameter, of a scale that makes logits spread over several units."""
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=rng)
        if "norm" in name:
            param.data = 1 + 0.3 * noise
        elif name.endswith("bias"):
            param.data = 0.3 * noise
        elif "embed_tokens" in name:
            param.data = (0.5 if tied else 1.0) * noise
        elif "lm_head" in name:
            param.data = 2.5 * noise / param.shape[1] ** 0.5
        else:
            param.data = 1.2 * noise / param.shape[1] ** 0.5


def build_model(spec: ModelSpec, attempt: int) -> torch.nn.Module:
    """The model of `spec` with the random weights of one attempt."""
    values = json.loads(json.dumps(COMMON | spec.config))
    config = AutoConfig.for_model(spec.model_type, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    random_weights(model, config.tie_word_embeddings, generator("model", spec.name, attempt))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return model.eval()


def older_rope_keys(config: dict) -> dict:
    """`rope_theta`, `rope_scaling`, `partial_rotary_factor` and `torch_dtype` as transformers 4 wrote them."""
    rope = dict(config["rope_parameters"])
    keys = {"torch_dtype": config["dtype"], "rope_theta": rope.pop("rope_theta"), "rope_scaling": None}
    if "partial_rotary_factor" in rope:
        keys["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    rope_type = rope.pop("rope_type")
    if rope_type != "default":
        name = "type" if rope_type == "longrope" else "rope_type"
        if "original_max_position_embeddings" in config:
            rope.pop("original_max_position_embeddings")
        keys["rope_scaling"] = {name: rope_type, **rope}
    return keys


def restyle_config(path: Path, style: str) -> None:
    """Rewrites config.json in the wanted style."""
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    if style == "new":
        write_json(path, config)
        return
    older = older_rope_keys(config)
    if style == "old":
        for key in ("rope_parameters", "dtype"):
            config.pop(key)
    write_json(path, config | older)


def write_model(spec: ModelSpec, root: Path, prompts: list[list[int]]) -> dict:
    """Writes one model directory with its expected outputs; returns its manifest entry."""
    directory = root / "models" / spec.name
    for attempt in range(ATTEMPTS_MAX):
        fresh_dir(directory)
        extra = {"max_shard_size": spec.shard_size} if spec.shard_size else {}
        build_model(spec, attempt).save_pretrained(directory, **extra)
        restyle_config(directory / "config.json", spec.style)
        model = load_base(directory)
        expected, margin = expected_outputs(model, prompts)
        other_margin = add_other_greedy(model, prompts, expected)
        if min(margin, other_margin) > MARGIN_MIN:
            break
    else:
        raise RuntimeError(f"{spec.name}: no seed has a greedy margin above {MARGIN_MIN}")
    save_expected(expected, directory)
    print(f"model {spec.name}: attempt {attempt}, margin {margin:.4f}, logits std {expected['logits_3'].std():.2f}")
    config = json.loads((directory / "config.json").read_text())
    return {
        "name": spec.name,
        "dir": f"models/{spec.name}",
        "architecture": config["architectures"][0],
        "model_type": config["model_type"],
        "what": spec.what,
        "config_style": spec.style,
        "sharded": spec.shard_size is not None,
        "tied": model.config.tie_word_embeddings,
        "other_greedy": sorted(key for key in expected if key.startswith(("greedy_full_", "greedy_kept_"))),
        "margin": round(margin, 5),
    }


def add_other_greedy(model: torch.nn.Module, prompts: list[list[int]], expected: dict) -> float:
    """Adds `greedy_full_<p>` and `greedy_kept_<p>` where they differ from `greedy_<p>`; returns their least margin.

    They differ only where rope depends on the sequence length: a kept cache holds keys of the earlier frequencies.
    """
    margin = float("inf")
    for index, ids in enumerate(prompts):
        for kind, decode in (("full", greedy_full), ("kept", greedy_kept)):
            tokens, least = decode(model, ids)
            margin = min(margin, least)
            if not torch.equal(tokens, expected[f"greedy_{index}"]):
                expected[f"greedy_{kind}_{index}"] = tokens
    return margin
