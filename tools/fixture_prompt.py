"""Adapters that stand before the prompt: virtual tokens, and entries of the KV cache.

Their expected logits are those of the prompt's own tokens; rows of virtual tokens are dropped. Greedy tokens come from
`generate` and must be those of full forward passes too.
"""

import json
from pathlib import Path

import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from fixture_cases import Case
from fixture_common import NUM_GREEDY, Bases, _margin, generator, randomize_adapter, reset_rope, seed_of, write_json

CONFIGS = {
    "PROMPT_TUNING": PromptTuningConfig,
    "P_TUNING": PromptEncoderConfig,
    "MULTITASK_PROMPT_TUNING": MultitaskPromptTuningConfig,
    "CPT": CPTConfig,
    "PREFIX_TUNING": PrefixTuningConfig,
    "CARTRIDGE": CartridgeConfig,
}
CPT_TOKENS = [9, 17, 42, 80, 11, 23]

# More tokens than a block of any test, and never a multiple of one.
PROMPT_CASES = [
    Case(
        "prompt_tuning",
        "PROMPT_TUNING",
        "7 virtual tokens",
        ("llama", "qwen2", "qwen2_sliding", "phi3_longrope", "llama_rope_dynamic"),
        {"num_virtual_tokens": 7},
    ),
    Case(
        "p_tuning",
        "P_TUNING",
        "6 virtual tokens from the MLP encoder",
        ("llama", "qwen2"),
        {"num_virtual_tokens": 6, "encoder_hidden_size": 8},
    ),
    Case(
        "p_tuning_lstm",
        "P_TUNING",
        "1 virtual token from the LSTM encoder",
        ("llama",),
        {
            "num_virtual_tokens": 1,
            "encoder_hidden_size": 8,
            "encoder_reparameterization_type": "LSTM",
            "encoder_num_layers": 1,
        },
    ),
    Case(
        "multitask",
        "MULTITASK_PROMPT_TUNING",
        "the second of three tasks, 2 ranks, 5 virtual tokens",
        ("llama", "phi3"),
        {"num_virtual_tokens": 5, "num_tasks": 3, "num_ranks": 2},
        edit="task_1",
    ),
    Case(
        "multitask_one",
        "MULTITASK_PROMPT_TUNING",
        "one task, whose number goes without saying",
        ("llama",),
        {"num_virtual_tokens": 3},
    ),
    Case(
        "cpt",
        "CPT",
        "6 virtual tokens that started as those of the vocabulary",
        ("llama", "qwen2"),
        {
            "cpt_token_ids": CPT_TOKENS,
            "cpt_mask": [1] * 6,
            "cpt_tokens_type_mask": [1, 2, 2, 3, 4, 4],
            "opt_projection_epsilon": 8.0,
            "opt_projection_format_epsilon": 8.0,
        },
    ),
    Case(
        "prefix_tuning",
        "PREFIX_TUNING",
        "7 entries",
        ("llama", "qwen3", "phi3", "qwen2_sliding"),
        {"num_virtual_tokens": 7},
    ),
    Case(
        "prefix_projection",
        "PREFIX_TUNING",
        "11 entries from a projection",
        ("llama",),
        {"num_virtual_tokens": 11, "prefix_projection": True, "encoder_hidden_size": 8},
    ),
    Case(
        "cartridge",
        "CARTRIDGE",
        "17 entries, the first 2 of them frozen",
        ("llama", "qwen2"),
        {"num_virtual_tokens": 17, "num_frozen_tokens": 2},
    ),
]


def is_prompt(case: Case) -> bool:
    """Whether the case is one of this family."""
    return case.peft_type in CONFIGS


def write_prompt_adapter(case: Case, model_name: str, bases: Bases, directory: Path, attempt: int) -> torch.nn.Module:
    """Makes one random adapter with PEFT, saves it, and returns the model it was made on."""
    torch.manual_seed(seed_of(case.name, model_name, attempt))
    config = CONFIGS[case.peft_type](task_type="CAUSAL_LM", **case.config)
    model = get_peft_model(bases.get(model_name), config)
    randomize_adapter(model, case.name, model_name, attempt)
    if case.peft_type == "CPT":
        # It starts at zero, where noise in proportion to its spread is none.
        delta = model.prompt_encoder["default"].delta_embedding.weight
        delta.data = torch.randn(delta.shape, generator=generator("delta", case.name, model_name, attempt))
    model.save_pretrained(directory)
    return model.eval()


def load_prompt_adapter(model_name: str, bases: Bases, directory: Path) -> torch.nn.Module:
    """The base with the saved adapter on it."""
    return PeftModel.from_pretrained(bases.get(model_name), directory).eval()


def task_of(case: Case) -> int:
    """The task that the outputs are made for."""
    return int(case.edit.removeprefix("task_")) if case.edit else 0


def name_task(case: Case, directory: Path) -> None:
    """Writes the task into the config, where the server reads it."""
    if case.edit:
        path = directory / "adapter_config.json"
        write_json(path, json.loads(path.read_text()) | {"task_id": task_of(case)})


def _task_ids(case: Case) -> dict:
    multitask = case.peft_type == "MULTITASK_PROMPT_TUNING"
    return {"task_ids": torch.tensor([task_of(case)])} if multitask else {}


@torch.no_grad()
def prompt_logits(case: Case, model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Logits of the prompt's own tokens in one full forward pass, [len, vocab] float32."""
    reset_rope(model)
    logits = model(input_ids=torch.tensor([ids]), **_task_ids(case)).logits[0]
    return logits[-len(ids) :].float().contiguous()


@torch.no_grad()
def _greedy(case: Case, model: torch.nn.Module, ids: list[int]) -> tuple[torch.Tensor, float]:
    reset_rope(model)
    input_ids = torch.tensor([ids])
    result = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=NUM_GREEDY,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
        **_task_ids(case),
    )
    tokens = result.sequences[0, len(ids) :].contiguous()
    if tokens.numel() != NUM_GREEDY:
        raise RuntimeError(f"expected {NUM_GREEDY} tokens, found {tokens.numel()}")
    return tokens, min(_margin(step[0]) for step in result.logits)


def _greedy_full(case: Case, model: torch.nn.Module, ids: list[int]) -> tuple[torch.Tensor, float]:
    ids, start, margin = list(ids), len(ids), float("inf")
    for _ in range(NUM_GREEDY):
        last = prompt_logits(case, model, ids)[-1]
        margin = min(margin, _margin(last))
        ids.append(int(last.argmax()))
    return torch.tensor(ids[start:]), margin


def prompt_outputs(case: Case, model_name: str, model: torch.nn.Module, prompts: list) -> tuple[dict, float]:
    """The tensors of `expected.safetensors`, and the least greedy margin."""
    tensors, margin = {}, float("inf")
    for index, ids in enumerate(prompts):
        tensors[f"logits_{index}"] = prompt_logits(case, model, ids)
        tokens, least = _greedy(case, model, ids)
        full, full_least = _greedy_full(case, model, ids)
        if "longrope" in model_name:
            # `generate` drops its cache when the frequencies switch, but counts without the virtual tokens, so that keys
            # of both sets mix. Full passes never mix them.
            tokens, least = full, full_least
        elif "dynamic" not in model_name and not torch.equal(tokens, full):
            raise RuntimeError(f"{model_name}/{case.name}: generate and full passes differ on prompt {index}")
        tensors[f"greedy_{index}"] = tokens
        margin = min(margin, least)
    return tensors, margin


def prompt_difference(case: Case, model: torch.nn.Module, expected: dict, prompts: list) -> float:
    """The largest absolute difference between a model's logits and the expected ones."""
    return max(
        float((prompt_logits(case, model, ids) - expected[f"logits_{index}"]).abs().max())
        for index, ids in enumerate(prompts)
    )
