"""LORA adapters whose variant a server must refuse, one fault each."""

from fixture_refused import LORA_CONFIG, SITE, P, Refused, lora_tensors, noise

EMBED = "base_model.model.model.embed_tokens."
KASA = {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}}


def variant(name: str, what: str, names: str, tensors: dict, **config) -> Refused:
    """A faulty adapter of one linear."""
    return Refused(name, what, names, LORA_CONFIG | {"target_modules": SITE} | config, tensors)


def blocks(**config) -> dict:
    """The field of BD-LoRA."""
    default = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": [], "nblocks": 2, "match_strict": True}
    return {"use_bdlora": default | config}


def variants_refused() -> list[Refused]:
    """All of them."""
    blocked = {f"{P}lora_A.weight": noise(2, 16), f"{P}lora_B.weight": noise(32, 2)}
    wide = lora_tensors(r=33)
    table = {f"{EMBED}lora_embedding_A": noise(2, 128), f"{EMBED}lora_embedding_B": noise(32, 2)}
    return [
        variant(
            "qalora_group",
            "groups that do not divide the inputs",
            "qalora_group_size",
            lora_tensors(features_in=6),
            use_qalora=True,
            qalora_group_size=5,
        ),
        variant(
            "qalora_shape",
            "an A over all inputs",
            f"{P}lora_A.weight",
            lora_tensors(),
            use_qalora=True,
            qalora_group_size=2,
        ),
        variant(
            "qalora_dora",
            "DoRA, which PEFT does not combine with it",
            "use_dora",
            lora_tensors(features_in=16),
            use_qalora=True,
            qalora_group_size=2,
            use_dora=True,
        ),
        variant(
            "bdlora_shape", "a whole A where there should be blocks", f"{P}lora_A.weight", lora_tensors(), **blocks()
        ),
        variant(
            "bdlora_strict",
            "names no factor of an adapted linear",
            "names no factor",
            blocked,
            **blocks(target_modules_bd_a=["v_proj"]),
        ),
        variant(
            "bdlora_both",
            "names both factors of a linear",
            "both factors",
            blocked,
            **blocks(target_modules_bd_b=["self_attn"]),
        ),
        variant(
            "bdlora_blocks", "blocks that do not divide the rank", "3 does not divide", blocked, **blocks(nblocks=3)
        ),
        variant("bdlora_field", "an unknown option", "nblock_sizes", blocked, **blocks(nblock_sizes=[16, 16])),
        variant(
            "pissa_rank", "more ranks than the weight has", "init_lora_weights", wide, r=33, init_lora_weights="pissa"
        ),
        variant(
            "olora_embedding",
            "an embedding",
            "embed_tokens",
            table,
            target_modules=["embed_tokens"],
            init_lora_weights="olora",
        ),
            variant(
            "kasa_rank",
            "as many ranks as the weight has, so that nothing of it would stay",
            "kasa_config",
            lora_tensors(r=32) | {f"{P}lora_diag": noise(32)},
            r=32,
            **KASA,
        ),
        variant("kasa_diag", "no diagonal", f"{P}lora_diag", lora_tensors(), **KASA),
        variant(
            "kasa_shape",
            "a diagonal of another rank",
            f"{P}lora_diag",
            lora_tensors() | {f"{P}lora_diag": noise(3)},
            **KASA,
        ),
        variant(
            "kasa_unset", "a diagonal without the config", f"{P}lora_diag", lora_tensors() | {f"{P}lora_diag": noise(2)}
        ),
        variant(
            "kasa_dora",
            "DoRA, which PEFT does not combine with it",
            "kasa_config",
            lora_tensors() | {f"{P}lora_diag": noise(2)},
            use_dora=True,
            **KASA,
        ),
        variant("kasa_embedding", "an embedding", "embed_tokens", table, target_modules=["embed_tokens"], **KASA),
        variant(
            "kasa_alora",
            "an invocation, before which the base is to be unchanged",
            "alora_invocation_tokens",
            lora_tensors() | {f"{P}lora_diag": noise(2)},
            alora_invocation_tokens=[17],
            **KASA,
        ),
    ]
