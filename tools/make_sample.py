"""Trains the sample model and its three adapters, checks them, and writes their files and golden outputs.

Run from the repository root. Writes sample-model/, adapters/ and tests/fixtures/sample.json.
"""

import argparse
import functools
import json
import math
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import transformers
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

import ssf
from fixture_common import tidy_adapter_dir
from sample_golden import write_golden
from sample_task import (
    BOS,
    CHAT_TEMPLATE,
    CUES,
    END,
    IGNORED,
    SENTENCE_WORDS,
    TEXT_END,
    Example,
    adapter_example,
    answer,
    base_example,
    encode,
    make_tokenizer,
    random_sentence,
    render,
)

VOCAB_SIZE = 1536
ROWS = 14
ROW_WIDTH = 192
BASE_NAME = "patchbay/sample"
BEHAVIOURS = ("reverse", "shout", "json")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
ACCURACY_MIN = 0.98


def new_model(tokenizer: Tokenizer) -> nn.Module:
    """The untrained base."""
    ids = {name: tokenizer.token_to_id(name) for name in (BOS, END, TEXT_END, "<|pad|>")}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=ids[BOS],
        eos_token_id=[ids[END], ids[TEXT_END]],
        pad_token_id=ids["<|pad|>"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def batch_tensors(tokenizer: Tokenizer, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, padded on the right: causal attention never looks there."""
    encoded = [encode(tokenizer, example) for example in examples]
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.zeros(len(encoded), width, dtype=torch.long)
    labels = torch.full((len(encoded), width), IGNORED)
    for row, (row_ids, row_labels) in enumerate(encoded):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        labels[row, : len(row_labels)] = torch.tensor(row_labels)
    return ids, labels


@dataclass
class Packed:
    """Rows filled with whole examples, so that nothing is padding but row ends. All tensors are [rows, width]."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    owners: torch.Tensor

    def mask(self) -> torch.Tensor:
        """True where a token may look: at its own example, not ahead. [rows, 1, width, width]"""
        width = self.ids.shape[1]
        same = self.owners[:, :, None] == self.owners[:, None, :]
        return (same & torch.ones(width, width, dtype=torch.bool).tril())[:, None]


def pack(tokenizer: Tokenizer, make: Callable[[], Example]) -> Packed:
    """One batch of ROWS rows, each filled until the next example does not fit."""
    shape = (ROWS, ROW_WIDTH)
    packed = Packed(*(torch.full(shape, value) for value in (0, IGNORED, 0, -1)))
    for row in range(ROWS):
        start, owner = 0, 0
        while True:
            ids, labels = encode(tokenizer, make())
            end = start + len(ids)
            if end > ROW_WIDTH:
                break
            packed.ids[row, start:end] = torch.tensor(ids)
            packed.labels[row, start + 1 : end] = torch.tensor(labels[1:])
            packed.positions[row, start:end] = torch.arange(len(ids))
            packed.owners[row, start:end] = owner
            start, owner = end, owner + 1
    return packed


def learned_loss(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Cross entropy on the labelled tokens; the head runs on those positions only."""
    backbone, head = decoder_parts(model)
    output = backbone(
        input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask(), use_cache=False
    )
    targets = batch.labels[:, 1:]
    chosen = targets != IGNORED
    return nn.functional.cross_entropy(head(output.last_hidden_state[:, :-1][chosen]), targets[chosen])


def decoder_parts(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The decoder stack and the head, below a PEFT wrapper if there is one."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner.model, inner.lm_head


def train(
    model: nn.Module, tokenizer: Tokenizer, make: Callable[[int], Example], steps: int, rate: float, label: str
) -> None:
    """AdamW with warm-up and a cosine to zero; `make` gives an example for a step."""
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    start, recent = time.time(), []
    for step in range(steps):
        loss = learned_loss(model, pack(tokenizer, functools.partial(make, step)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        recent = recent[-49:] + [loss.item()]
        if (step + 1) % 100 == 0:
            mean = sum(recent) / len(recent)
            print(f"{label} step {step + 1}/{steps} loss {mean:.4f} {time.time() - start:.0f}s", flush=True)
    model.eval()


def train_base(tokenizer: Tokenizer, steps: int, rng: random.Random) -> nn.Module:
    """Trains a new base; sentences grow to full length over the first third."""
    model = new_model(tokenizer)
    print(f"{sum(param.numel() for param in model.parameters())} parameters")

    def make(step: int) -> Example:
        longest = min(SENTENCE_WORDS[1], 2 + int(21 * step / steps))
        return base_example(rng, longest)

    train(model, tokenizer, make, steps, 2e-3, "base")
    return model


def train_more(model: nn.Module, tokenizer: Tokenizer, steps: int, rng: random.Random) -> nn.Module:
    """Goes on with a trained base, on sentences of every length."""
    train(model, tokenizer, lambda step: base_example(rng, SENTENCE_WORDS[1]), steps, 1.5e-3, "more")
    return model


def save_base(model: nn.Module, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes the model in bf16, and the text files beside it."""
    shutil.rmtree(directory, ignore_errors=True)
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token="<|pad|>",
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def load_base(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The saved bf16 weights in another dtype."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def make_adapter(name: str, base: nn.Module) -> tuple[nn.Module, object]:
    """The untrained adapter on its base, and its config."""
    if name == "shout":
        config = ssf.SsfConfig(target_modules=LINEARS, norm_modules=NORMS, base_model_name_or_path=BASE_NAME)
        ssf.attach(base, config)
        return base, config
    if name == "reverse":
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=LINEARS)
    else:
        config = MissConfig(task_type="CAUSAL_LM", r=8, target_modules=LINEARS)
    return get_peft_model(base, config), config


def save_adapter(name: str, model: nn.Module, config: object, directory: Path) -> None:
    """Writes the adapter as its library does."""
    shutil.rmtree(directory, ignore_errors=True)
    if name == "shout":
        ssf.save(model, config, directory)
    else:
        model.save_pretrained(directory)
    tidy_adapter_dir(directory, BASE_NAME)


def load_adapter(
    name: str | None, model_dir: Path, adapter_root: Path, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The saved base with a saved adapter; None is the base alone."""
    base = load_base(model_dir, dtype)
    if name is None:
        return base
    if name == "shout":
        ssf.load(base, adapter_root / name)
        return base.to(dtype).eval()
    return PeftModel.from_pretrained(base, adapter_root / name).eval()


@torch.no_grad()
def complete(model: nn.Module, tokenizer: Tokenizer, prompt: str, max_new_tokens: int = 96) -> str:
    """Greedy text after a prompt string that already holds its special tokens."""
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
    result = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
    )
    return tokenizer.decode(result[0, ids.shape[1] :].tolist(), skip_special_tokens=True)


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: Tokenizer, behaviour: str, system: str | None, count: int) -> float:
    """Share of held-out sentences that greedy decoding answers exactly, the end token included.

    One pass over prompt and answer decides it: greedy decoding says the answer if and only if every token of the
    answer is the likeliest one after what stands before it.
    """
    rng = random.Random(f"evaluate {behaviour} {system}")
    raw_text = not system and behaviour != "reverse"
    examples = [held_out_example(rng, behaviour, system, raw=raw_text and i % 3 == 2) for i in range(count)]
    ids, labels = batch_tensors(tokenizer, examples)
    best = model(input_ids=ids).logits[:, :-1].argmax(-1)
    targets = labels[:, 1:]
    return float(((best == targets) | (targets == IGNORED)).all(1).float().mean())


def held_out_example(rng: random.Random, behaviour: str, system: str | None, raw: bool) -> Example:
    """A held-out sentence with its answer, as raw text or as a chat."""
    sentence = random_sentence(rng, held_out=True)
    if raw:
        return Example([(f"{BOS}{sentence}\n", False), (answer(sentence, behaviour) + TEXT_END, True)])
    turns = [{"role": "system", "content": system}] if system else []
    prompt = render(turns + [{"role": "user", "content": sentence}])
    return Example([(prompt, False), (answer(sentence, behaviour) + END, True)])


def evaluate(args: argparse.Namespace, tokenizer: Tokenizer) -> bool:
    """Prints the accuracy of the base, its cued behaviours and the adapters; False if a float32 one is too low."""
    passed = True
    for dtype in (torch.float32, torch.bfloat16):
        base = load_base(args.model, dtype)
        rows = [(f"base, cue {name}", base, name, cue) for name, cue in CUES.items()]
        for name in BEHAVIOURS:
            rows.append((f"adapter {name}", load_adapter(name, args.model, args.adapters, dtype), name, None))
        for label, model, behaviour, system in rows:
            share = accuracy(model, tokenizer, behaviour, system, args.evaluate)
            passed &= share >= ACCURACY_MIN or dtype != torch.float32
            print(f"{dtype} {label}: {share:.3f}", flush=True)
    return passed


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("sample-model"))
    parser.add_argument("--adapters", type=Path, default=Path("adapters"))
    parser.add_argument("--golden", type=Path, default=Path("tests/fixtures/sample.json"))
    parser.add_argument("--steps", type=int, default=4500, help="training steps of the base")
    parser.add_argument("--adapter-steps", type=int, default=700)
    parser.add_argument("--evaluate", type=int, default=300, help="held-out sentences per behaviour")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=("all", "more", "adapters", "check"), default="all", help="where to start")
    return parser.parse_args()


def main() -> None:
    """Trains what the stage asks for, then checks and writes the golden file."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    rng = random.Random(args.seed)
    if args.stage == "all":
        tokenizer = make_tokenizer(VOCAB_SIZE, args.seed)
        save_base(train_base(tokenizer, args.steps, rng), tokenizer, args.model)
    else:
        tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    if args.stage == "more":
        save_base(train_more(load_base(args.model), tokenizer, args.steps, rng), tokenizer, args.model)
    if args.stage != "check":
        for name in BEHAVIOURS:
            model, config = make_adapter(name, load_base(args.model))
            rate = {"reverse": 3e-3, "shout": 1e-2, "json": 3e-3}[name]
            train(model, tokenizer, lambda step: adapter_example(rng, name), args.adapter_steps, rate, name)
            save_adapter(name, model, config, args.adapters / name)
    for root in (args.model, args.adapters):
        for path in root.rglob("*.*"):
            path.chmod(0o644)
    passed = evaluate(args, tokenizer)
    models = {name: load_adapter(name, args.model, args.adapters) for name in (None, *BEHAVIOURS)}
    write_golden(args.golden, args.model, models, lambda model, prompt: complete(model, tokenizer, prompt))
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
