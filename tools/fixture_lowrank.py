"""Cases of the kinds whose delta is a product of factors: AdaLoRA, LoHa, LoKr and the families of VeRA and VB-LoRA."""

from fixture_cases import Case
from fixture_kinds import IDENTITY

# One short and one longer prompt keep the files small.
PROMPTS = (1, 2)
TARGETS = ["q_proj", "v_proj", "down_proj"]
VALUES = {
    "lora_E": (1.0, 0.3),
    "hada_w": (0.0, 0.45),
    "lokr_w": (0.0, 0.35),
    "vera_lambda_b": (0.0, 0.5),
    "vera_lambda_d": (0.0, 1.0),
    "randlora_lambda": (0.0, 0.3),
    "randlora_gamma": (0.0, 0.3),
    "delora_A": (0.0, 1.0),
    "delora_B": (0.0, 1.0),
    "delora_lambda": (6.0, 0.5),
    "gralora_A": (0.0, 0.25),
    "gralora_B": (0.0, 0.2),
    "vblora_logits": (0.0, 1.0),
    "vblora_vector_bank": (0.0, 0.35),
    "tinylora_v": (0.0, 0.6),
    "unilora_theta_d": (0.0, 2.0),
    "poly_lora_A": (0.0, 0.5),
    "poly_lora_B": (0.0, 0.5),
    "module_logits": (0.0, 1.5),
}


def factored(
    peft_type: str, default: dict, name: str, what: str, models: tuple[str, ...] = ("llama",), **config
) -> Case:
    """A case of one of these kinds."""
    extra = {key: config.pop(key) for key in ("edit", "identity", "zeros", "late", "prompts") if key in config}
    config = {"target_modules": TARGETS} | default | config
    extra = {"prompts": PROMPTS} | extra
    return Case(name, peft_type, what, models, config, values=VALUES, **extra)


def mask(layer: int, module: str, kept: int, of: int) -> dict:
    """An entry of the rank_pattern that AdaLoRA writes when it has pruned a linear to `kept` ranks."""
    return {f"model.layers.{layer}.{module}.lora_E": [True] * kept + [False] * (of - kept)}


def adalora(*args, **config) -> Case:
    """An ADALORA case."""
    return factored("ADALORA", {"init_r": 4, "target_r": 2, "lora_alpha": 8, "total_step": 10}, *args, **config)


def loha(*args, **config) -> Case:
    """A LOHA case."""
    return factored("LOHA", {"r": 2, "alpha": 4}, *args, **config)


def lokr(*args, **config) -> Case:
    """A LOKR case."""
    return factored("LOKR", {"r": 2, "alpha": 4}, *args, **config)


def vera(*args, **config) -> Case:
    """A VERA case."""
    return factored("VERA", {"r": 6}, *args, **config)


def pvera(*args, **config) -> Case:
    """A PVERA case."""
    return factored("PVERA", {"r": 5}, *args, **config)


def randlora(*args, **config) -> Case:
    """A RANDLORA case."""
    return factored(
        "RANDLORA",
        {"r": 5, "randlora_alpha": 10, "target_modules": ["down_proj"], "layers_to_transform": [1]},
        *args,
        **config,
    )


def delora(*args, **config) -> Case:
    """A DELORA case."""
    return factored("DELORA", {"r": 4}, *args, **config)


def gralora(*args, **config) -> Case:
    """A GRALORA case."""
    return factored("GRALORA", {"r": 4, "alpha": 8, "gralora_k": 2}, *args, **config)


def vblora(*args, **config) -> Case:
    """A VBLORA case."""
    return factored("VBLORA", {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2}, *args, **config)


def tinylora(*args, **config) -> Case:
    """A TINYLORA case."""
    return factored("TINYLORA", {"r": 2, "u": 3}, *args, **config)


def unilora(*args, **config) -> Case:
    """A UNILORA case with saved indices."""
    return factored("UNILORA", {"r": 2, "theta_d_length": 24, "save_indices": True}, *args, **config)


def poly(*args, **config) -> Case:
    """A POLY case."""
    return factored("POLY", {"r": 2, "n_tasks": 3, "n_skills": 2, "n_splits": 2}, *args, **config)


FACTORED_CASES = [
    adalora("adalora", "not pruned, every linear of rank init_r", ("llama", "qwen2")),
    adalora(
        "adalora_pruned",
        "pruned to different ranks, one of them zero",
        late={
            "rank_pattern": mask(0, "self_attn.q_proj", 3, 4)
            | mask(1, "self_attn.q_proj", 1, 4)
            | mask(0, "mlp.down_proj", 2, 4)
            | mask(1, "self_attn.v_proj", 0, 4)
        },
    ),
    adalora("adalora_alpha", "an alpha of zero, which means init_r", lora_alpha=0),
    loha("loha", "rank 2, which is 4 as one product", ("llama", "llama_bias")),
    loha("loha_patterns", "rank_pattern and alpha_pattern", rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 1}),
    loha("loha_dense", "rank 6, which is 36 as one product: dense is less", r=6, alpha=2, target_modules=["v_proj"]),
    lokr("lokr", "first factor whole, second in two parts", ("llama", "phi3")),
    lokr("lokr_both", "both factors in two parts", decompose_both=True, r=1, alpha=2),
    lokr("lokr_full", "both factors whole", r=16, alpha=8, target_modules=["v_proj", "down_proj"]),
    lokr(
        "lokr_factor",
        "decompose_factor 8 with patterns",
        decompose_factor=8,
        rank_pattern={"v_proj": 1},
        alpha_pattern={"q_proj": 6},
    ),
    vera("vera", "projections shared by linears of different sizes", ("llama", "qwen2")),
    vera("vera_bias_only", "bias vera_only", ("llama_bias",), bias="vera_only"),
    pvera("pvera", "the mean path", ("llama", "llama_bias")),
    randlora(
        "randlora",
        "more outputs than inputs and the other way round",
        target_modules=["v_proj", "down_proj", "up_proj"],
    ),
    randlora("randlora_sparse", "sparse bases", sparse=True),
    randlora(
        "randlora_square",
        "a square linear, very sparse bases",
        ("llama_bias",),
        very_sparse=True,
        target_modules=["q_proj"],
    ),
    delora("delora", "plain", ("llama", "llama_bias")),
    delora("delora_patterns", "rank_pattern", rank_pattern={"q_proj": 2}),
    gralora("gralora", "two blocks", ("llama", "llama_bias")),
    gralora("gralora_hybrid", "four blocks and a general part", gralora_k=4, hybrid_r=2),
    vblora("vblora", "logits over the whole bank", ("llama", "qwen2")),
    vblora("vblora_topk", "indices and weights of the best only", save_only_topk_weights=True, topk=3),
    tinylora("tinylora", "one group for each linear", ("llama", "llama_bias")),
    tinylora("tinylora_tied", "weight_tying: all linears of two groups", weight_tying=0.7),
    unilora("unilora", "indices and scales in the file", ("llama", "llama_bias")),
    unilora("unilora_r3", "rank 3 on one linear", r=3, target_modules=["o_proj"]),
    poly("poly", "task 1 of three", ("llama",), edit="task_1"),
    poly("poly_single", "one task needs no choice", ("llama_bias",), n_tasks=1),
    adalora("adalora_identity", "E is zero: equals the base", identity=True),
    loha("loha_identity", "one factor is zero: equals the base", identity=True),
    lokr("lokr_identity", "one factor is zero: equals the base", identity=True),
    vera("vera_identity", "lambda_b is zero: equals the base", identity=True),
    pvera("pvera_identity", "lambda_b is zero: equals the base", identity=True),
    randlora("randlora_identity", "lambda is zero: equals the base", identity=True),
    delora("delora_identity", "B is zero: equals the base", identity=True),
    gralora("gralora_identity", "B is zero: equals the base", identity=True),
    tinylora("tinylora_identity", "v is zero: equals the base", identity=True, init_v_bound=0.0),
    vblora("vblora_identity", "a bank of zeros: equals the base", zeros=("vblora_vector_bank",), **IDENTITY),
    unilora("unilora_identity", "theta is zero: equals the base", zeros=("unilora_theta_d",), **IDENTITY),
    poly("poly_identity", "B is zero: equals the base", n_tasks=1, **IDENTITY),
]
