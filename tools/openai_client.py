"""Drives a running Patchbay server, serving sample-model and adapters/, with the official `openai` package.

Prints one line per check and exits with 1 if any failed.
"""

import argparse
import sys
from collections.abc import Callable

import openai

SENTENCE = "seven sheep walk to the river"
ANSWERS = {
    None: "seven sheep walk to the river",
    "reverse": "river the to walk sheep seven",
    "shout": "SEVEN SHEEP WALK TO THE RIVER",
    "json": '{"words": ["seven", "sheep", "walk", "to", "the", "river"], "count": 6}',
}
MAX_TOKENS = 96


class Client:
    """The openai client, and the name the server gives its base model."""

    def __init__(self, api: openai.OpenAI, base: str | None):
        self.api = api
        self.base = base or self.find_base()

    def find_base(self) -> str:
        """The first listed model that is not one of the sample adapters."""
        names = [model.id for model in self.api.models.list()]
        found = [name for name in names if name not in ANSWERS]
        if not found:
            raise SystemExit(f"the server lists no base model: {names}")
        return found[0]

    def name(self, adapter: str | None) -> str:
        """The model name of a request."""
        return adapter or self.base

    def chat(self, adapter: str | None, **options):
        """One greedy chat request."""
        messages = [{"role": "user", "content": SENTENCE}]
        settings = {"temperature": 0, "max_tokens": MAX_TOKENS} | options
        return self.api.chat.completions.create(model=self.name(adapter), messages=messages, **settings)

    def complete(self, adapter: str | None, **options):
        """One greedy completion request."""
        settings = {"temperature": 0, "max_tokens": MAX_TOKENS} | options
        return self.api.completions.create(model=self.name(adapter), prompt=f"{SENTENCE}\n", **settings)


def same(found: object, expected: object) -> None:
    """Raises if the two differ."""
    if found != expected:
        raise AssertionError(f"expected {expected!r}, found {found!r}")


def truth(holds: bool, what: str) -> None:
    """Raises if the claim does not hold."""
    if not holds:
        raise AssertionError(what)


def check_models(client: Client) -> None:
    """The list holds the base and every adapter; one can be retrieved."""
    names = [model.id for model in client.api.models.list()]
    for adapter in ANSWERS:
        truth(client.name(adapter) in names, f"{client.name(adapter)} is not among {names}")
    same(client.api.models.retrieve("reverse").id, "reverse")


def check_chat(client: Client, adapter: str | None) -> None:
    """A chat answer, its finish reason and its token counts."""
    reply = client.chat(adapter)
    same(reply.choices[0].message.content, ANSWERS[adapter])
    same(reply.choices[0].message.role, "assistant")
    same(reply.choices[0].finish_reason, "stop")
    same(reply.model, client.name(adapter))
    truth(reply.usage.prompt_tokens > 5, "prompt tokens are counted")
    same(reply.usage.total_tokens, reply.usage.prompt_tokens + reply.usage.completion_tokens)


def check_chat_stream(client: Client, adapter: str | None) -> None:
    """The streamed pieces of a chat answer add up; the last chunk carries the usage."""
    chunks = list(client.chat(adapter, stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    same("".join(choice.delta.content or "" for choice in choices), ANSWERS[adapter])
    same(choices[0].delta.role, "assistant")
    same([choice.finish_reason for choice in choices if choice.finish_reason], ["stop"])
    truth(len(choices) > 3, f"the answer comes in pieces, found {len(choices)}")
    truth(chunks[-1].usage is not None, "the last chunk has usage")
    same(len({chunk.id for chunk in chunks}), 1)


def check_completion(client: Client, adapter: str | None) -> None:
    """A completion of raw text."""
    reply = client.complete(adapter)
    same(reply.choices[0].text, ANSWERS[adapter])
    same(reply.choices[0].finish_reason, "stop")


def check_completion_stream(client: Client, adapter: str | None) -> None:
    """The streamed pieces of a completion add up."""
    chunks = list(client.complete(adapter, stream=True))
    same("".join(chunk.choices[0].text for chunk in chunks if chunk.choices), ANSWERS[adapter])


def check_length(client: Client) -> None:
    """`max_tokens` ends an answer with the reason `length`."""
    reply = client.chat(None, max_tokens=2)
    same(reply.choices[0].finish_reason, "length")
    same(reply.usage.completion_tokens, 2)


def check_n(client: Client) -> None:
    """`n` gives that many choices, numbered from zero."""
    reply = client.chat("reverse", n=3)
    same(sorted(choice.index for choice in reply.choices), [0, 1, 2])
    same({choice.message.content for choice in reply.choices}, {ANSWERS["reverse"]})


def check_n_sampled(client: Client) -> None:
    """Sampled choices with a seed come out the same twice."""
    first = client.chat(None, n=2, temperature=1.0, seed=7)
    second = client.chat(None, n=2, temperature=1.0, seed=7)
    texts = [sorted((choice.index, choice.message.content) for choice in reply.choices) for reply in (first, second)]
    same(texts[0], texts[1])


def check_stop(client: Client) -> None:
    """A stop string ends the answer and is not part of it."""
    reply = client.chat(None, stop=" walk")
    same(reply.choices[0].message.content, "seven sheep")
    same(reply.choices[0].finish_reason, "stop")
    chunks = client.chat("shout", stop=["ZZZ", " TO"], stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    same(text, "SEVEN SHEEP WALK")


def check_chat_logprobs(client: Client) -> None:
    """Chat logprobs: one entry per token, alternatives in falling order, greedy takes the first."""
    content = client.chat("reverse", logprobs=True, top_logprobs=3).choices[0].logprobs.content
    spoken = "".join(entry.token for entry in content)
    truth(spoken.startswith(ANSWERS["reverse"]), f"the tokens spell the answer, found {spoken!r}")
    for entry in content:
        values = [option.logprob for option in entry.top_logprobs]
        same(len(values), 3)
        same(values, sorted(values, reverse=True))
        truth(abs(entry.logprob - values[0]) < 1e-3 and entry.logprob <= 1e-6, f"greedy takes the best: {entry}")


def check_completion_logprobs(client: Client) -> None:
    """Completion logprobs: tokens, their logprobs and their offsets have one length."""
    logprobs = client.complete(None, logprobs=2).choices[0].logprobs
    same(len(logprobs.tokens), len(logprobs.token_logprobs))
    same(len(logprobs.tokens), len(logprobs.text_offset))
    truth(all(len(options) >= 2 for options in logprobs.top_logprobs), "two alternatives for each token")


def check_echo(client: Client) -> None:
    """`echo` puts the prompt in front of the answer."""
    reply = client.complete(None, echo=True)
    same(reply.choices[0].text, f"{SENTENCE}\n{SENTENCE}")


def check_prompt_list(client: Client) -> None:
    """A list of prompts gives one choice for each, in order."""
    reply = client.api.completions.create(
        model="json", prompt=["good morning\n", f"{SENTENCE}\n"], temperature=0, max_tokens=MAX_TOKENS
    )
    texts = [choice.text for choice in sorted(reply.choices, key=lambda choice: choice.index)]
    same(texts, ['{"words": ["good", "morning"], "count": 2}', ANSWERS["json"]])


def check_unknown_model(client: Client) -> None:
    """An unknown model is 404 and never answered by the base."""
    for call in (client.chat, client.complete):
        try:
            call("no-such-adapter")
        except openai.NotFoundError as error:
            truth("no-such-adapter" in str(error), f"the message names the model: {error}")
        else:
            raise AssertionError("an unknown model was answered")


def check_bad_request(client: Client) -> None:
    """A parameter out of range is 400."""
    try:
        client.chat(None, temperature=-1)
    except openai.BadRequestError:
        return
    raise AssertionError("temperature -1 was accepted")


def checks() -> list[tuple[str, Callable[[Client], None]]]:
    """Every check with its name."""
    table: list[tuple[str, Callable[[Client], None]]] = [("models list", check_models)]
    for adapter in ANSWERS:
        label = adapter or "base"
        for what, check in (
            ("chat", check_chat),
            ("chat, streamed", check_chat_stream),
            ("completion", check_completion),
            ("completion, streamed", check_completion_stream),
        ):
            # The reversing adapter learned chats only.
            if adapter == "reverse" and what.startswith("completion"):
                continue
            table.append((f"{label}: {what}", lambda client, check=check, adapter=adapter: check(client, adapter)))
    return table + [
        ("max_tokens", check_length),
        ("n", check_n),
        ("n, sampled with a seed", check_n_sampled),
        ("stop", check_stop),
        ("chat logprobs", check_chat_logprobs),
        ("completion logprobs", check_completion_logprobs),
        ("echo", check_echo),
        ("several prompts", check_prompt_list),
        ("unknown model", check_unknown_model),
        ("bad request", check_bad_request),
    ]


def run(client: Client) -> int:
    """Runs every check; returns the number of failures."""
    failed = 0
    for name, check in checks():
        try:
            check(client)
            print(f"pass  {name}")
        except (AssertionError, openai.OpenAIError, AttributeError, IndexError, TypeError) as error:
            failed += 1
            print(f"FAIL  {name}: {error}")
    print(f"{len(checks()) - failed} passed, {failed} failed")
    return failed


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--base-model", help="name of the base model; found in the models list if absent")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one request")
    return parser.parse_args()


def main() -> None:
    """Connects and runs the checks."""
    args = parse_args()
    api = openai.OpenAI(base_url=args.base_url, api_key=args.api_key, timeout=args.timeout, max_retries=0)
    try:
        client = Client(api, args.base_model)
    except openai.APIConnectionError as error:
        sys.exit(f"no server at {args.base_url}: {error}")
    sys.exit(1 if run(client) else 0)


if __name__ == "__main__":
    main()
