"""What every fixture script shares: prompts, seeds, expected outputs, file clean-up.

The expected outputs are those of transformers (+ PEFT) in float32 on the CPU with eager attention.
"""

import argparse
import copy
import json
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

VOCAB_SIZE = 128
NUM_GREEDY = 16
PROMPT_LENGTHS = (1, 5, 18, 26)
# Token ids that the trainable-token cases replace; each occurs in a prompt.
SPECIAL_TOKENS = (5, 17, 42)
# The least distance between the best and the second best logit of a greedy step.
MARGIN_MIN = 3e-3
# The least change of some logit against the base model.
EFFECT_MIN = 0.5
MERGE_TOLERANCE = 1e-3
ATTEMPTS_MAX = 60
# Models whose adapters repeat those of another one. Seeds are chosen with all prompts, but only the outputs of one short
# and one longer prompt are kept, which keeps the files small.
BRIEF = ("llama_bias", "phi3")


def seed_of(*parts: object) -> int:
    """A stable seed from names and numbers."""
    return zlib.crc32("/".join(str(part) for part in parts).encode())


def generator(*parts: object) -> torch.Generator:
    """A torch generator seeded from names and numbers."""
    return torch.Generator().manual_seed(seed_of(*parts))


def make_prompts() -> list[list[int]]:
    """The prompts that every model and adapter sees."""
    prompts = []
    for length in PROMPT_LENGTHS:
        ids = torch.randint(3, VOCAB_SIZE, (length,), generator=generator("prompt", length)).tolist()
        for place, token in zip((1, 4, 6), SPECIAL_TOKENS):
            if place < length:
                ids[place] = token
        prompts.append(ids)
    return prompts


def quiet(threads: int = 1) -> None:
    """Sums in one order, and no words of the libraries between a script's own."""
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def begin(description: str, *options: str) -> tuple[argparse.Namespace, "Bases", list[list[int]]]:
    """Reads the command line of a script that adds to the fixtures in `--out`; further `options` are texts, empty where
    they are not given. Returns it with the base models and the prompts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures"))
    for option in options:
        parser.add_argument(f"--{option}", default="")
    args = parser.parse_args()
    quiet()
    return args, Bases(args.out), json.loads((args.out / "prompts.json").read_text())


class Bases:
    """The base models of a fixture folder, loaded once and handed out as copies."""

    def __init__(self, root: Path):
        self.root = root
        self.loaded = {}

    def get(self, name: str) -> torch.nn.Module:
        """A fresh float32 copy of the model, in evaluation mode."""
        if name not in self.loaded:
            self.loaded[name] = load_base(self.root / "models" / name)
        return copy.deepcopy(self.loaded[name])


def load_base(directory: Path) -> torch.nn.Module:
    """Loads a model directory in float32 and makes its generation never stop."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def reset_rope(model: torch.nn.Module) -> None:
    """Puts the rotary embedding back to its first state: dynamic RoPE remembers the longest sequence it saw."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RotaryEmbedding"):
            model.set_submodule(name, type(module)(module.config))


@torch.no_grad()
def forward_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Logits of one full forward pass, [len, vocab] float32."""
    reset_rope(model)
    return model(input_ids=torch.tensor([ids])).logits[0].float().contiguous()


@torch.no_grad()
def greedy_cached(model: torch.nn.Module, ids: list[int]) -> tuple[torch.Tensor, float]:
    """Greedy tokens of `generate` with its KV cache, and the least margin of a step."""
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
    )
    tokens = result.sequences[0, len(ids) :].contiguous()
    if tokens.numel() != NUM_GREEDY:
        raise RuntimeError(f"expected {NUM_GREEDY} tokens, found {tokens.numel()}")
    return tokens, min(_margin(step[0]) for step in result.logits)


@torch.no_grad()
def greedy_full(model: torch.nn.Module, ids: list[int]) -> tuple[torch.Tensor, float]:
    """Greedy tokens when every step is a full forward pass without a cache, and the least margin."""
    ids, margin = list(ids), float("inf")
    start = len(ids)
    for _ in range(NUM_GREEDY):
        last = forward_logits(model, ids)[-1]
        margin = min(margin, _margin(last))
        ids.append(int(last.argmax()))
    return torch.tensor(ids[start:]), margin


@torch.no_grad()
def greedy_kept(model: torch.nn.Module, ids: list[int]) -> tuple[torch.Tensor, float]:
    """Greedy tokens with a cache that is always kept, and the least margin.

    `generate` drops the cache of a phi3 longrope model when the sequence passes the original length.
    """
    reset_rope(model)
    result = model(input_ids=torch.tensor([ids]), use_cache=True)
    tokens, margin = [], float("inf")
    for _ in range(NUM_GREEDY):
        last = result.logits[0, -1]
        margin = min(margin, _margin(last))
        tokens.append(int(last.argmax()))
        result = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=result.past_key_values, use_cache=True)
    return torch.tensor(tokens), margin


def _margin(logits: torch.Tensor) -> float:
    """Distance between the two best logits."""
    best = logits.float().topk(2).values
    return float(best[0] - best[1])


def expected_outputs(model: torch.nn.Module, prompts: list[list[int]]) -> tuple[dict[str, torch.Tensor], float]:
    """The tensors of `expected.safetensors`, and the least greedy margin. Prompts that are None are left out."""
    tensors, margin = {}, float("inf")
    for index, ids in enumerate(prompts):
        if ids is None:
            continue
        tensors[f"logits_{index}"] = forward_logits(model, ids)
        tokens, least = greedy_cached(model, ids)
        tensors[f"greedy_{index}"] = tokens
        margin = min(margin, least)
    return tensors, margin


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between the logits of two expected outputs."""
    return max(float((a[key] - b[key]).abs().max()) for key in a if key.startswith("logits_"))


def merged_difference(model: torch.nn.Module, expected: dict[str, torch.Tensor], prompts: list[list[int]]) -> float:
    """The largest absolute difference between a merged model's logits and the unmerged ones."""
    return max(
        float((forward_logits(model, ids) - expected[f"logits_{index}"]).abs().max())
        for index, ids in enumerate(prompts)
        if ids is not None
    )


def save_expected(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Writes `expected.safetensors`; of two prompts only for adapters of `BRIEF` models."""
    if directory.parent.parent.name == "adapters" and directory.parent.name in BRIEF:
        tensors = {key: value for key, value in tensors.items() if key[-2:] in ("_1", "_2")}
    save_file(tensors, directory / "expected.safetensors", metadata={"format": "pt"})


def load_expected(directory: Path) -> dict[str, torch.Tensor]:
    """Reads `expected.safetensors`."""
    return load_file(directory / "expected.safetensors")


def fresh_dir(directory: Path) -> Path:
    """An empty directory in place of whatever was there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def tidy_adapter_dir(directory: Path, base_name: str) -> None:
    """Removes the README, names the base, and sorts the lists that PEFT keeps as unordered sets."""
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_name
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    write_json(path, config)


def write_json(path: Path, value: object) -> None:
    """JSON with sorted keys and a final newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def put_cases(root: Path, peft_type: str, made: list[dict], versions: dict | None = None) -> None:
    """Puts entries into the manifest in place of all of their type; `versions` names the releases that made them."""
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    others = [entry for entry in manifest["cases"] if entry["peft_type"] != peft_type]
    manifest["cases"] = sorted(others + made, key=lambda entry: (entry["model"], entry["name"]))
    manifest["versions"] |= versions or {}
    write_json(path, manifest)


def randomize_adapter(model: torch.nn.Module, *seed_parts: object, values: dict | None = None) -> None:
    """Gives every trainable parameter random values of visible effect, in the model's own order.

    Values are written in place and once per storage, because tied adapters share it. `values` gives mean and spread by
    part of a name.
    """
    rng = generator(*seed_parts)
    done = set()
    for name, param in model.named_parameters():
        if param.requires_grad and param.data_ptr() not in done:
            done.add(param.data_ptr())
            chosen = next((value for part, value in (values or {}).items() if part in name), None)
            if chosen:
                param.data.copy_(chosen[0] + chosen[1] * torch.randn(param.shape, generator=rng))
            else:
                param.data.copy_(random_like(name, param.data, rng))


# Further rules for `random_like`: the first whose key is part of the name decides. Modules of cases add theirs.
RANDOM_RULES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {}


def random_like(name: str, old: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Random values for one adapter tensor, scaled by what the tensor does."""
    noise = torch.randn(old.shape, generator=rng)
    for part, rule in RANDOM_RULES.items():
        if part in name:
            return rule(old, noise)
    if "lora_embedding_A" in name:
        return noise
    if "lora_A" in name:
        return noise / old.shape[1] ** 0.5
    if "lora_B" in name or "lora_embedding_B" in name:
        return 0.2 * noise
    if "lora_magnitude_vector" in name:
        return old * (1 + 0.25 * noise)
    if "miss_block" in name or "bone_block" in name:
        return (0.15 if old.dim() == 3 else 0.06) * noise
    if "ssf_scale" in name or ("norm" in name and name.endswith("weight")):
        return 1 + 0.3 * noise
    if "ssf_shift" in name or name.endswith("bias"):
        return 0.3 * noise
    return old + 0.5 * old.std() * noise
