"""Cases of the kinds that scale, shift or replace what is there: IA3, BEFT, LN_TUNING, TRAINABLE_TOKENS."""

from fixture_cases import ATTENTION, LINEARS, NORMS, Case
from fixture_common import SPECIAL_TOKENS

# One short and one longer prompt keep the files small.
PROMPTS = (1, 2)
VALUES = {"ia3_l": (1.0, 0.3), "beft_bias": (0.0, 0.3)}


def affine(peft_type: str, name: str, what: str, models: tuple[str, ...] = ("llama",), **config) -> Case:
    """A case of one of these kinds."""
    extra = {key: config.pop(key) for key in ("edit", "identity") if key in config}
    return Case(name, peft_type, what, models, config, values=VALUES, prompts=PROMPTS, **extra)


def ia3(name: str, what: str, models: tuple[str, ...] = ("llama",), **config) -> Case:
    """An IA3 case; keys, values and the last feed-forward linear unless the arguments say otherwise."""
    default = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return affine("IA3", name, what, models, **(default | config))


AFFINE_CASES = [
    ia3("ia3", "outputs of k_proj and v_proj, inputs of down_proj", ("llama", "phi3", "qwen2")),
    ia3(
        "ia3_all",
        "every linear with a bias; up_proj, down_proj and q_proj scale their input",
        ("llama_bias",),
        target_modules=LINEARS,
        feedforward_modules=["q_proj", "up_proj", "down_proj"],
    ),
    ia3(
        "ia3_regex",
        "both lists are regular expressions; a head saved as a whole",
        target_modules=r".*\.(v_proj|up_proj)",
        feedforward_modules=r".*\.1\.mlp\.up_proj",
        modules_to_save=["lm_head"],
    ),
    ia3(
        "ia3_head", "the output of lm_head", ("llama", "llama_tied"), target_modules=["lm_head"], feedforward_modules=[]
    ),
    ia3("ia3_identity", "all ones: equals the base", identity=True),
    affine("BEFT", "beft", "shifted values of linears without a bias", target_modules=["v_proj"]),
    affine("BEFT", "beft_bias", "shifts on top of biases", ("llama_bias", "qwen2"), target_modules=ATTENTION),
    affine(
        "BEFT",
        "beft_save_norm",
        "modules_to_save model.norm",
        target_modules=["v_proj", "down_proj"],
        modules_to_save=["model.norm"],
    ),
    affine("BEFT", "beft_identity", "all zero: equals the base", identity=True, target_modules=["v_proj"]),
    affine("LN_TUNING", "ln_tuning", "every norm", ("llama", "phi3"), target_modules=NORMS),
    affine(
        "LN_TUNING", "ln_tuning_qk", "the norms of queries and keys", ("qwen3",), target_modules=["q_norm", "k_norm"]
    ),
    affine(
        "LN_TUNING",
        "ln_tuning_regex",
        "norms by regular expression, a head saved as a whole",
        target_modules=r"model\.layers\.1\..*layernorm",
        modules_to_save=["lm_head"],
    ),
    affine(
        "LN_TUNING", "ln_tuning_identity", "copies of the base's: equals it", identity=True, target_modules=["norm"]
    ),
    affine(
        "TRAINABLE_TOKENS",
        "tokens",
        "rows of embed_tokens, in no order",
        ("llama", "llama_tied"),
        token_indices=[SPECIAL_TOKENS[2], SPECIAL_TOKENS[0], SPECIAL_TOKENS[1]],
    ),
    affine(
        "TRAINABLE_TOKENS",
        "tokens_head",
        "the same rows of embed_tokens and of lm_head, each with values of its own",
        ("llama",),
        token_indices=[5, 42],
        target_modules=["embed_tokens", "lm_head"],
    ),
    affine("TRAINABLE_TOKENS", "tokens_identity", "rows of the base: equals it", identity=True, token_indices=[5, 42]),
]
