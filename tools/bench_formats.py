"""Adapters for make_bench_adapters.py in formats that PEFT does not write: random values of the size that users take."""

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import arrow
from fixture_common import generator, write_json
from make_fixtures_native import flora, sara, svfit

# The spread of values, small enough for logits that stay finite on 24 layers of random weights.
SPREAD = 0.02


def _save(out: Path, config: dict, tensors: dict[str, torch.Tensor], weights: str = "adapter_model.safetensors") -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "adapter_config.json", config)
    save_file(tensors, out / weights, metadata={"format": "pt"})


def by_formula(kind: str, make: Callable, targets: list[str], **config) -> Callable:
    """Adapters that the fixtures make from each weight."""

    def write(model: torch.nn.Module, out: Path, _randomize: Callable) -> None:
        rng, tensors = generator(kind), {}
        for path, module in model.named_modules():
            if path.split(".")[-1] in targets:
                parts, _changed = make(module.weight.data, rng)
                tensors |= {f"base_model.model.{path}.{suffix}": value for suffix, value in parts.items()}
        _save(out, {"peft_type": kind, "target_modules": targets} | config, tensors)

    return write


def routed(count: int, top_k: int, **lora) -> Callable:
    """LoRA experts that tokens choose among by Arrow."""

    def write(model: torch.nn.Module, out: Path, randomize: Callable) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            experts = [Path(scratch, str(number)) for number in range(count)]
            for path in experts:
                expert = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
                randomize(expert, "lora")
                expert.save_pretrained(path)
                model = expert.unload()
            arrow.collect(experts, [], {"top_k": top_k, "router_temperature": 1.0, "rng_seed": 42}, out)

    return write


def adaption_prompts(length: int, layers: int) -> Callable:
    """Vectors that the last layers attend to."""

    def write(model: torch.nn.Module, out: Path, _randomize: Callable) -> None:
        rng, tensors, size = generator("adaption-prompt"), {}, model.config
        for layer in range(size.num_hidden_layers - layers, size.num_hidden_layers):
            place = f"base_model.model.model.layers.{layer}.self_attn.adaption_"
            tensors[f"{place}prompt"] = torch.randn(1, length, size.hidden_size, generator=rng)
            tensors[f"{place}gate"] = SPREAD * torch.randn(1, generator=rng)
        config = {"peft_type": "ADAPTION_PROMPT", "adapter_len": length, "adapter_layers": layers}
        _save(out, config, tensors)

    return write


def bottlenecks(factor: int, places: tuple[str, ...]) -> Callable:
    """AdapterHub's networks behind attention, feed-forward, or both."""

    def write(model: torch.nn.Module, out: Path, _randomize: Callable) -> None:
        rng, tensors, hidden = generator("bottleneck", *places), {}, model.config.hidden_size
        noise = lambda *shape: SPREAD * torch.randn(shape, generator=rng)
        width = hidden // factor
        for layer, place in itertools.product(range(model.config.num_hidden_layers), places):
            prefix = f"model.layers.{layer}.{place}.adapters.task.adapter_"
            tensors |= {f"{prefix}down.0.weight": noise(width, hidden), f"{prefix}down.0.bias": noise(width)}
            tensors |= {f"{prefix}up.weight": noise(hidden, width), f"{prefix}up.bias": noise(hidden)}
        inner = {
            "mh_adapter": "attention_adapters" in places,
            "output_adapter": "output_adapters" in places,
            "reduction_factor": factor,
            "non_linearity": "swish",
            "original_ln_before": True,
        }
        config = {"config": inner, "name": "task", "hidden_size": hidden, "version": "adapters.1.3.0"}
        _save(out, config, tensors, "adapter.safetensors")

    return write


def formats(every: list[str], few: list[str]) -> dict[str, tuple[str, Callable]]:
    """What is made, and how, by the kind's name; on all linears or on a few."""
    return {
        "arrow": ("four experts of rank 8, two for each token", routed(4, 2, r=8, lora_alpha=16, target_modules=every)),
        "svfit": ("16 singular values", by_formula("SVFIT", partial(svfit, spread=SPREAD, r=16), few, r=16)),
        "flora": ("a core of 16 by 16", by_formula("FLORA", flora(16, 16, 1.0, SPREAD / 16), every, r1=16, r2=16)),
        "sara": ("one entry in 50", by_formula("SARA", partial(sara, spread=SPREAD / 10, share=50), every)),
        "adaption-prompt": ("10 vectors in all layers but two", adaption_prompts(10, 22)),
        "pfeiffer": ("a sixteenth of the stream's width", bottlenecks(16, ("output_adapters",))),
        "houlsby": ("a sixteenth, twice a layer", bottlenecks(16, ("attention_adapters", "output_adapters"))),
    }
