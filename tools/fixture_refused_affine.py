"""Adapters of the kinds of fixture_affine.py that a server must refuse, one fault each."""

from fixture_refused import MODEL, SITE, P, Refused, noise

EMBED = "base_model.model.model.embed_tokens."
NORM = "base_model.model.model.layers.0.input_layernorm."


def config(peft_type: str, targets: object, **more) -> dict:
    """A sound config for the first layer."""
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": f"patchbay/{MODEL}", "inference_mode": True}
    return common | {"peft_type": peft_type, "target_modules": targets} | more


def ia3(name: str, what: str, names: str, tensors: dict, **more) -> Refused:
    """A faulty IA3 adapter of one linear."""
    return Refused(name, what, names, config("IA3", "model.layers.0.self_attn.q_proj", **more), tensors)


def beft(name: str, what: str, names: str, tensors: dict, **more) -> Refused:
    """A faulty BEFT adapter of one linear."""
    return Refused(name, what, names, config("BEFT", "model.layers.0.self_attn.q_proj", **more), tensors)


def ln_tuning(name: str, what: str, names: str, tensors: dict, targets: object = None) -> Refused:
    """A faulty LN_TUNING adapter of one norm."""
    return Refused(name, what, names, config("LN_TUNING", targets or "model.layers.0.input_layernorm"), tensors)


def tokens(name: str, what: str, names: str, tensors: dict, model: str = MODEL, **more) -> Refused:
    """A faulty TRAINABLE_TOKENS adapter."""
    default = {"token_indices": [5, 42]}
    return Refused(
        name, what, names, config("TRAINABLE_TOKENS", "model.embed_tokens", **(default | more)), tensors, model
    )


def affine_refused() -> list[Refused]:
    """All of them."""
    vector, rows = f"{P}ia3_l", f"{EMBED}trainable_tokens_delta"
    head = "base_model.model.lm_head.trainable_tokens_delta"
    sound_norm = {f"{NORM}ln_tuning_layers.weight": 1 + noise(32)}
    return [
        ia3(
            "ia3_side",
            "an input vector although the config makes it an output one",
            "feedforward_modules",
            {vector: noise(1, 32)},
        ),
        ia3(
            "ia3_other_side",
            "an output vector although the config makes it an input one",
            "feedforward_modules",
            {vector: noise(32, 1)},
            feedforward_modules=["q_proj"],
        ),
        ia3("ia3_length", "a vector of the wrong length", SITE, {vector: noise(48, 1)}),
        ia3(
            "ia3_list",
            "feedforward_modules is a number",
            "feedforward_modules",
            {vector: noise(32, 1)},
            feedforward_modules=3,
        ),
        ia3("ia3_bias", "a field that IA3 does not have", "bias", {vector: noise(32, 1)}, bias="all"),
        Refused(
            "ia3_embedding",
            "an embedding, which IA3 does not adapt",
            "embed_tokens",
            config("IA3", ["embed_tokens"]),
            {f"{EMBED}ia3_l": noise(32, 1)},
        ),
        beft("beft_length", "a vector of the wrong length", SITE, {f"{P}beft_bias": noise(1, 48)}),
        beft("beft_dimension", "a vector of one dimension", SITE, {f"{P}beft_bias": noise(32)}),
        beft(
            "beft_suffix",
            "a tensor of another kind",
            "lora_A",
            {f"{P}beft_bias": noise(1, 32), f"{P}lora_A.weight": noise(2, 32)},
        ),
        ln_tuning(
            "ln_tuning_length",
            "a weight of the wrong length",
            "input_layernorm",
            {f"{NORM}ln_tuning_layers.weight": noise(48)},
        ),
        ln_tuning(
            "ln_tuning_surplus_bias",
            "a bias although the base's norm has none",
            "ln_tuning_layers.bias",
            sound_norm | {f"{NORM}ln_tuning_layers.bias": noise(32)},
        ),
        ln_tuning(
            "ln_tuning_linear",
            "target_modules names a linear",
            "q_proj",
            {f"{P}ln_tuning_layers.weight": noise(32, 32)},
            ["q_proj"],
        ),
        tokens("tokens_absent", "no token_indices", "token_indices", {rows: noise(2, 32)}, token_indices=[]),
        tokens("tokens_twice", "a token twice", "twice", {rows: noise(2, 32)}, token_indices=[5, 5]),
        tokens("tokens_range", "a token outside the vocabulary", "128", {rows: noise(2, 32)}, token_indices=[5, 128]),
        tokens("tokens_rows", "three rows for two tokens", "trainable_tokens_delta", {rows: noise(3, 32)}),
        tokens(
            "tokens_unnamed_head",
            "rows of a head that the config does not name",
            "lm_head",
            {rows: noise(2, 32), head: noise(2, 32)},
        ),
        tokens(
            "tokens_tied_head",
            "a head that shares the embedding's weight but has other rows",
            "lm_head",
            {rows: noise(2, 32), head: 1 + noise(2, 32)},
            model="llama_tied",
        ),
    ]
