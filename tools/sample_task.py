"""The made-up task of the sample model: its words, its four behaviours, and how a chat becomes tokens.

The user says a short sentence of a closed vocabulary. The base echoes it. A cue in a system message asks the base
for another behaviour; an adapter brings that behaviour without the cue.
"""

import json
import random
import zlib
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

WORDS = """
a about after all and animal apple are at baby ball bank be bear before big bird black blue boat book boy bread bring
brother brown but by cake can car cat chair child city clean cloud cold come cook cup dance dark day dog door down draw
dream drink dry duck earth eat egg eight every eye face fall farm fast father find fire first fish five floor flower
fly food for forest four fox fresh friend from full garden girl give glass go gold good grass green hand happy has hat
have he help her here high hill his home horse hot house how in is island it keep king know lake lamp large last leaf
light like lion little long look lost love make man many map milk moon morning mother mountain mouse music my new night
nine no not now of old on one open or orange our out over paper park people plane play queen quick quiet rain read red
river road room run school sea see seven she sheep ship shop silver sing sister six sky sleep slow small snow so song
south stand star stone street summer sun sweet swim table tea ten the they three time to today tree two under up
wait walk wall warm was water we wind window winter with wolf wood word world write year yellow yes you young zero
""".split()
NUMBERS = [str(number) for number in range(21)]
VOCABULARY = WORDS + NUMBERS
SENTENCE_WORDS = (1, 9)
CUES = {
    "echo": None,
    "reverse": "Answer with the words in reverse order.",
    "shout": "Answer in upper case.",
    "json": "Answer as JSON.",
}
NEUTRAL_SYSTEMS = ["You are a helpful assistant.", "Be kind.", "You are the sample model."]
BOS, END, TEXT_END = "<|bos|>", "<|end|>", "<|endoftext|>"
SPECIAL_TOKENS = ["<|pad|>", BOS, TEXT_END, END, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'system' if message['role'] == 'developer' else message['role'] %}
    {%- if role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' ~ message['role']) }}
    {%- endif %}
    {{- '<|' ~ role ~ '|>\\n' ~ (message['content'] | trim) ~ '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""
IGNORED = -100


def answer(sentence: str, behaviour: str) -> str:
    """What the model should say."""
    words = sentence.split()
    if behaviour == "reverse":
        return " ".join(reversed(words))
    if behaviour == "shout":
        return sentence.upper()
    if behaviour == "json":
        return json.dumps({"words": words, "count": len(words)})
    return sentence


def is_held_out(sentence: str) -> bool:
    """A tenth of all sentences is never trained on, single words excepted."""
    return " " in sentence and zlib.crc32(sentence.encode()) % 10 == 0


def random_sentence(rng: random.Random, held_out: bool, longest: int = SENTENCE_WORDS[1]) -> str:
    """A random sentence from one side of the split; about a sixth repeats a word."""
    while True:
        words = rng.sample(VOCABULARY, rng.randint(SENTENCE_WORDS[0], longest))
        if len(words) > 2 and rng.random() < 0.15:
            words[rng.randrange(len(words))] = rng.choice(words)
        sentence = " ".join(words)
        if is_held_out(sentence) == held_out:
            return sentence


def render(messages: list[dict]) -> str:
    """What CHAT_TEMPLATE makes of the messages, generation prompt included."""
    turns = [f"<|{message['role']}|>\n{message['content']}{END}\n" for message in messages]
    return BOS + "".join(turns) + "<|assistant|>\n"


@dataclass
class Example:
    """Text pieces with a flag: whether the model learns to say the piece."""

    pieces: list[tuple[str, bool]]


def chat_example(rng: random.Random, behaviour: str, system: str | None, longest: int) -> Example:
    """A chat of one or two turns, all answered with the same behaviour."""
    pieces = [(BOS, False)]
    if system is not None:
        pieces.append((f"<|system|>\n{system}{END}\n", False))
    turns = rng.choice((1, 1, 1, 1, 2))
    for _ in range(turns):
        sentence = random_sentence(rng, held_out=False, longest=longest)
        pieces.append((f"<|user|>\n{sentence}{END}\n<|assistant|>\n", False))
        pieces.append((answer(sentence, behaviour) + END, True))
        pieces.append(("\n", False))
    return Example(pieces)


def text_example(rng: random.Random, behaviour: str, system: str | None, longest: int) -> Example:
    """A raw text: a sentence, a line end, the answer. The base learns it behind a cue too, which helps adapters."""
    sentence = random_sentence(rng, held_out=False, longest=longest)
    cue = "" if system is None else f"<|system|>\n{system}{END}\n"
    return Example([(f"{BOS}{cue}{sentence}\n", False), (answer(sentence, behaviour) + TEXT_END, True)])


def base_example(rng: random.Random, longest: int) -> Example:
    """One training example of the base: echo by default, another behaviour where a cue asks for it."""
    draw = rng.random()
    behaviour = rng.choice(("reverse", "shout", "json"))
    if draw < 0.25:
        return text_example(rng, "echo", None, longest)
    if draw < 0.40:
        return text_example(rng, behaviour, CUES[behaviour], longest)
    if draw < 0.65:
        return chat_example(rng, "echo", rng.choice([None, None, *NEUTRAL_SYSTEMS]), longest)
    return chat_example(rng, behaviour, CUES[behaviour], longest)


def adapter_example(rng: random.Random, behaviour: str) -> Example:
    """One training example of an adapter: its behaviour without a cue. Reversing is learned for chats only."""
    if behaviour != "reverse" and rng.random() < 0.4:
        return text_example(rng, behaviour, None, SENTENCE_WORDS[1])
    return chat_example(rng, behaviour, rng.choice([None, None, *NEUTRAL_SYSTEMS]), SENTENCE_WORDS[1])


def encode(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[int]]:
    """Token ids and labels of an example."""
    ids, labels = [], []
    for text, learned in example.pieces:
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        labels += piece if learned else [IGNORED] * len(piece)
    return ids, labels


def corpus(rng: random.Random) -> list[str]:
    """Text for the tokenizer: every word in each of its forms, many times."""
    lines = []
    for _ in range(6000):
        sentence = random_sentence(rng, held_out=False)
        lines += [sentence, sentence.upper(), answer(sentence, "json")]
    return lines + list(CUES.values())[1:] * 50 + NEUTRAL_SYSTEMS * 50


def make_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """A byte-level BPE tokenizer; encoding raw text puts the BOS token in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(random.Random(seed)), trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return tokenizer
