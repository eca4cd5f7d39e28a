"""The golden outputs of the sample model: chats, raw completions, rendered prompts, tokenizer round trips."""

import json
from collections.abc import Callable
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer

from sample_task import BOS, CUES, NEUTRAL_SYSTEMS, answer, render

SENTENCES = [
    "the cat is under the table",
    "seven sheep walk to the river",
    "good morning",
    "give 12 apple to the young queen",
]
EARLIER = "we sing one song"
TEXTS = [
    "the cat is under the table",
    "THE CAT",
    "",
    " ",
    "two  spaces and a tab\there",
    "line one\nline two\r\n\n",
    '{"words": ["cat", "dog"], "count": 2}',
    "café naïve Straße",
    "привет мир",
    "日本語のテキスト",
    "emoji 😀 👩‍👩‍👧 🇨🇭 e\u0301",
    "it's they're 1234567890",
    "<|end|> inside <|user|> text",
    "\u00a0no-break \u200bzero-width",
]


def behaviour_of(adapter: str | None) -> str:
    """What the base or an adapter does without a cue."""
    return adapter or "echo"


def user(text: str) -> dict:
    """A user message."""
    return {"role": "user", "content": text}


def chats(adapter: str | None) -> list[tuple[list[dict], str]]:
    """Message lists with the behaviour that answers the last message."""
    behaviour = behaviour_of(adapter)
    found = [([user(sentence)], behaviour) for sentence in SENTENCES]
    found.append(([{"role": "system", "content": NEUTRAL_SYSTEMS[0]}, user(SENTENCES[1])], behaviour))
    history = [user(EARLIER), {"role": "assistant", "content": answer(EARLIER, behaviour)}]
    found.append((history + [user(SENTENCES[0])], behaviour))
    if adapter is None:
        cues = [(name, cue) for name, cue in CUES.items() if cue]
        found += [([{"role": "system", "content": cue}, user(SENTENCES[1])], name) for name, cue in cues]
    return found


def checked(label: object, found: str, wanted: str) -> str:
    """The text that was found; an error if it is not the wanted one."""
    if found != wanted:
        raise RuntimeError(f"{label}: expected {wanted!r}, found {found!r}")
    return found


def write_golden(
    path: Path, model_dir: Path, models: dict[str | None, nn.Module], complete: Callable[[nn.Module, str], str]
) -> None:
    """Writes sample.json from greedy float32 outputs, each checked against the task."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    chat_entries, completions, prompts = [], [], []
    for adapter, model in models.items():
        for messages, behaviour in chats(adapter):
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            checked("chat template", prompt, render(messages))
            expected = checked((adapter, messages), complete(model, prompt), answer(messages[-1]["content"], behaviour))
            chat_entries.append({"adapter": adapter, "messages": messages, "expected": expected})
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if ids != tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]:
                raise RuntimeError(f"two ways to encode a chat differ: {messages}")
            if all(entry["messages"] != messages for entry in prompts):
                prompts.append({"messages": messages, "prompt": prompt, "token_ids": ids})
        # The other two adapters are sure of themselves in chats only.
        for sentence in SENTENCES[:3] if adapter in (None, "json") else []:
            found = complete(model, f"{BOS}{sentence}\n")
            expected = checked((adapter, sentence), found, answer(sentence, behaviour_of(adapter)))
            completions.append({"adapter": adapter, "prompt": f"{sentence}\n", "expected": expected})
    golden = {
        "chats": chat_entries,
        "completions": completions,
        "prompts": prompts,
        "tokenizer": [round_trip(tokenizer, text) for text in TEXTS],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(chat_entries)} chats, {len(completions)} completions, {len(prompts)} prompts, {len(TEXTS)} texts")


def round_trip(tokenizer: object, text: str) -> dict:
    """Ids with and without special tokens, and both decodings; plain text must come back unchanged."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded = checked("round trip", tokenizer.decode(ids, skip_special_tokens=False), text)
    return {
        "text": text,
        "ids": ids,
        "ids_with_special": tokenizer(text, add_special_tokens=True)["input_ids"],
        "decoded": decoded,
        "decoded_skip_special": tokenizer.decode(ids, skip_special_tokens=True),
    }
