"""The table of adapter cases: which adapter, on which models, and what is done to its files.

A case names its PEFT config by keyword arguments. Module names in a case are written for separate projections;
`family_names` rewrites them for models with fused ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from fixture_common import SPECIAL_TOKENS

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = ATTENTION + ["gate_proj", "up_proj", "down_proj"]
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]

FULL = ("llama", "llama_bias", "phi3")
FAMILIES = ("llama_tied", "mistral", "qwen2", "qwen3")
VARIANTS = ("llama_rope_llama3", "llama_rope_linear", "llama_rope_yarn", "qwen2_sliding", "phi3_longrope")
CORE = FULL + FAMILIES
EVERY = CORE + VARIANTS + ("llama_rope_dynamic",)


@dataclass
class Case:
    """One adapter. `edit` names what is done to the saved files afterwards; `identity` expects the base's output from
    PEFT's own start, or from one with the parameters `zeros` (parts of names) at zero."""

    name: str
    peft_type: str
    what: str
    models: tuple[str, ...]
    config: dict = field(default_factory=dict)
    edit: str | None = None
    identity: bool = False
    zeros: tuple[str, ...] = ()
    converted_from: str | None = None
    # Mean and spread of the random values, by part of a parameter's name; `random_like` decides for all others.
    values: dict = field(default_factory=dict)
    # Config fields that are set when the adapter is saved, because they describe what training did.
    late: dict = field(default_factory=dict)
    # The prompts by number; all where None.
    prompts: tuple[int, ...] | None = None


def lora(name: str, what: str, models: tuple[str, ...] = FULL, **config) -> Case:
    """A LORA case; rank 4, alpha 8, all linears unless the arguments say otherwise."""
    extra = {key: config.pop(key) for key in ("edit", "identity", "converted_from") if key in config}
    return Case(name, "LORA", what, models, {"r": 4, "lora_alpha": 8, "target_modules": LINEARS} | config, **extra)


def miss(name: str, what: str, models: tuple[str, ...] = FULL, **config) -> Case:
    """A MISS case; rank 4, all linears unless the arguments say otherwise."""
    extra = {key: config.pop(key) for key in ("edit", "identity") if key in config}
    return Case(name, "MISS", what, models, {"r": 4, "target_modules": LINEARS} | config, **extra)


def ssf(name: str, what: str, models: tuple[str, ...] = FULL, **config) -> Case:
    """An SSF case on all linears unless the arguments say otherwise."""
    extra = {key: config.pop(key) for key in ("edit", "identity") if key in config}
    return Case(name, "SSF", what, models, {"target_modules": LINEARS} | config, **extra)


LORA_PLAIN = [
    lora("lora_all", "plain, all linears, r 4", EVERY),
    lora("lora_qv", "q_proj and v_proj only (the fused qkv_proj on phi3)", target_modules=["q_proj", "v_proj"]),
    lora("lora_r1", "rank 1", r=1, lora_alpha=2),
    lora("lora_r8", "rank 8, alpha below the rank", r=8, lora_alpha=6),
    lora("lora_rslora", "rank-stabilised: alpha / sqrt(r)", use_rslora=True, lora_alpha=4),
    lora(
        "lora_patterns",
        "rank_pattern and alpha_pattern with plain names, paths and regular expressions; the first match wins",
        rank_pattern={r".*\.1\.mlp\.down_proj": 2, "down_proj": 6, "o_proj": 1},
        alpha_pattern={r".*\.0\..*o_proj": 3, "o_proj": 5, "down_proj": 7},
    ),
    lora(
        "lora_rslora_patterns",
        "rslora with rank_pattern and alpha_pattern",
        CORE,
        use_rslora=True,
        rank_pattern={"o_proj": 2, r"layers\.0\.mlp\.down_proj": 6},
        alpha_pattern={"down_proj": 5},
    ),
    lora(
        "lora_regex",
        "target_modules is a regular expression",
        target_modules=r"model\.layers\.\d+\.(self_attn\.o_proj|mlp\.down_proj)",
    ),
    lora("lora_layers", "layers_to_transform and layers_pattern", layers_to_transform=[1], layers_pattern="layers"),
    lora(
        "lora_exclude", "exclude_modules with a path and a name", exclude_modules=["layers.0.mlp.down_proj", "o_proj"]
    ),
    lora("lora_all_linear", "target_modules is the word all-linear", target_modules="all-linear"),
    lora("lora_identity", "B is zero: equals the base", identity=True),
]
LORA_BIAS = [
    lora("lora_lora_bias", "lora_bias on linears that have a bias", ("llama_bias",), lora_bias=True),
    lora(
        "lora_lora_bias",
        "lora_bias on q, k, v, which have a bias",
        ("qwen2",),
        lora_bias=True,
        target_modules=ATTENTION[:3],
    ),
    lora("lora_lora_bias", "lora_bias although the base linears have no bias", ("llama", "phi3"), lora_bias=True),
    lora("lora_bias_all", "bias all: every bias of the model is replaced", ("llama_bias", "qwen2"), bias="all"),
    lora(
        "lora_bias_only",
        "bias lora_only: the biases of the adapted linears are replaced",
        ("llama_bias", "qwen2"),
        bias="lora_only",
        target_modules=["q_proj", "down_proj"],
    ),
    lora("lora_bias_all", "bias all on a model without a bias: a plain file", ("llama", "phi3"), bias="all"),
]
LORA_EMBED = [
    lora("lora_embed", "embed_tokens only", FULL + ("llama_tied",), target_modules=["embed_tokens"]),
    lora(
        "lora_embed_head",
        "embed_tokens, lm_head and q_proj",
        FULL + ("llama_tied",),
        target_modules=["embed_tokens", "lm_head", "q_proj"],
    ),
    lora("lora_head", "lm_head only", FULL + ("llama_tied",), target_modules=["lm_head"]),
    lora(
        "lora_save_head",
        "modules_to_save lm_head",
        CORE,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head"],
    ),
    lora(
        "lora_save_embed",
        "modules_to_save embed_tokens",
        FULL + ("llama_tied",),
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
    ),
    lora("lora_save_norm", "modules_to_save model.norm", target_modules=["q_proj"], modules_to_save=["model.norm"]),
    lora(
        "lora_save_norms",
        "modules_to_save norm: PEFT matches by ending, so every norm",
        target_modules=["q_proj"],
        modules_to_save=["norm"],
    ),
    lora(
        "lora_tokens_list",
        "trainable_token_indices as a list",
        FULL + ("llama_tied",),
        target_modules=["q_proj"],
        trainable_token_indices=list(SPECIAL_TOKENS),
    ),
    lora(
        "lora_tokens_dict",
        "trainable_token_indices as a dict",
        FULL + ("llama_tied",),
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [SPECIAL_TOKENS[2], SPECIAL_TOKENS[0]]},
    ),
    lora(
        "lora_tokens_head",
        "trainable_token_indices for embed_tokens and lm_head",
        ("llama",),
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [42, 5], "lm_head": [17, 90]},
    ),
    lora(
        "lora_tied_embed",
        "embed_tokens with ensure_weight_tying",
        ("llama_tied",),
        target_modules=["embed_tokens", "q_proj"],
        ensure_weight_tying=True,
    ),
    lora(
        "lora_tied_save",
        "modules_to_save embed_tokens with ensure_weight_tying",
        ("llama_tied",),
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    ),
    lora(
        "lora_tied_tokens",
        "trainable_token_indices with ensure_weight_tying",
        ("llama_tied",),
        target_modules=["q_proj"],
        trainable_token_indices=[5, 42],
        ensure_weight_tying=True,
    ),
]
LORA_DORA = [
    lora("lora_dora", "DoRA on all linears", CORE, use_dora=True),
    lora(
        "lora_dora_embed", "DoRA on embed_tokens and o_proj", use_dora=True, target_modules=["embed_tokens", "o_proj"]
    ),
    lora(
        "lora_dora_rslora",
        "DoRA with rslora, lm_head included",
        use_dora=True,
        use_rslora=True,
        target_modules=["lm_head", "q_proj", "down_proj"],
    ),
]
LORA_FILES = [
    lora(
        "lora_init_eva",
        "init eva with a rank_pattern: a plain file",
        ("llama",),
        init_lora_weights="eva",
        rank_pattern={"q_proj": 2},
    ),
    lora("lora_init_orthogonal", "init orthogonal: a plain file", ("llama",), init_lora_weights="orthogonal"),
    lora("lora_init_gaussian", "init gaussian: a plain file", ("llama",), init_lora_weights="gaussian"),
    lora(
        "lora_pissa_converted",
        "PiSSA, converted when saved: plain, twice the rank",
        ("llama", "llama_bias"),
        converted_from="pissa",
    ),
    lora(
        "lora_olora_converted", "OLoRA, converted when saved: plain, twice the rank", ("llama",), converted_from="olora"
    ),
    lora("lora_default_keys", "keys that still contain the adapter name `default`", ("llama",), edit="default_keys"),
    lora("lora_bf16", "a bf16 file; the outputs are those of the rounded values", ("llama", "phi3"), edit="bf16"),
    lora("lora_f16", "an f16 file; the outputs are those of the rounded values", ("llama",), edit="f16"),
    lora(
        "lora_old_save_keys",
        "modules_to_save keys with the `modules_to_save` component of older files",
        ("llama",),
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        edit="old_save_keys",
    ),
    lora("lora_megatron", "a megatron_config, which serving ignores", ("llama",), edit="megatron"),
    lora(
        "lora_alpha_order",
        "alpha_pattern whose order in the file, not the alphabet, decides: o_proj is 5 in both layers",
        ("llama",),
        alpha_pattern={"o_proj": 5, r".*\.0\..*o_proj": 3},
        edit="alpha_order",
    ),
    lora(
        "lora_embed_base",
        "the file's embed_tokens.base_layer.weight differs from the base: the file's is used",
        ("llama",),
        target_modules=["embed_tokens"],
        edit="embed_base",
    ),
    lora(
        "lora_no_version", "a config without the newer keys, as older releases wrote it", ("llama",), edit="old_config"
    ),
]
LORA_ACTIVATED = [
    lora(
        "alora",
        "active from its invocation token on; one prompt has none",
        ("llama", "phi3"),
        alora_invocation_tokens=[17],
        target_modules=["k_proj", "v_proj", "down_proj"],
    ),
    lora(
        "alora_pair",
        "two invocation tokens, which one prompt has; with bias and rslora",
        ("llama",),
        alora_invocation_tokens=[17, 70],
        use_rslora=True,
        lora_bias=True,
        target_modules=["q_proj", "v_proj", "down_proj", "lm_head"],
    ),
    lora(
        "alora_last",
        "an invocation token that one prompt has twice",
        ("llama",),
        alora_invocation_tokens=[38],
        target_modules=["q_proj", "o_proj"],
    ),
]
MISS_CASES = [
    miss("miss_balance", "balance on all linears", CORE),
    miss("miss_random", "balance with init_weights false", ("llama",), init_weights=False),
    miss("miss_ragged", "balance, rank 5 does not divide the inputs", r=5),
    miss("miss_mini", "mini, mini_r 8", init_weights="mini", mini_r=8),
    miss("miss_mini_ragged", "mini, rank 5 does not divide the inputs", ("llama",), r=5, init_weights="mini", mini_r=8),
    miss("miss_bat", "bat on all linears", CORE, init_weights="bat"),
    miss("miss_head", "balance on lm_head and q_proj", FULL, target_modules=["lm_head", "q_proj"]),
    miss("miss_bias_all", "bias all: every bias of the model is replaced", ("llama_bias", "qwen2"), bias="all"),
    miss(
        "miss_save_head",
        "modules_to_save lm_head",
        ("llama", "phi3"),
        target_modules=["o_proj"],
        modules_to_save=["lm_head"],
    ),
    miss("miss_layers", "layers_to_transform", ("llama",), layers_to_transform=[0]),
    miss("miss_bf16", "a bf16 file; the outputs are those of the rounded values", ("llama",), edit="bf16"),
    miss("miss_identity", "all zero: equals the base", identity=True),
]
SSF_CASES = [
    ssf("ssf_linears", "linears only", CORE),
    ssf("ssf_norms", "linears and norms", CORE + VARIANTS, norm_modules=NORMS),
    ssf(
        "ssf_embed",
        "linears, norms and embed_tokens",
        FULL + ("llama_tied",),
        norm_modules=NORMS,
        embedding_modules=["embed_tokens"],
    ),
    ssf("ssf_scale", "scale only, linears and norms", use_shift=False, norm_modules=NORMS),
    ssf("ssf_shift", "shift only, linears and norms", use_scale=False, norm_modules=NORMS),
    ssf(
        "ssf_head",
        "lm_head and the final norm",
        FULL + ("llama_tied",),
        target_modules=["lm_head"],
        norm_modules=["model.norm"],
    ),
    ssf(
        "ssf_layers",
        "layers_to_transform and exclude_modules",
        ("llama",),
        layers_to_transform=[1],
        exclude_modules=["o_proj"],
    ),
    ssf(
        "ssf_qk_norm",
        "q_norm and k_norm only: no linear to fold the shift into",
        ("qwen3",),
        target_modules=None,
        norm_modules=["q_norm", "k_norm"],
    ),
    ssf(
        "ssf_qk_norm_scale",
        "q_norm, k_norm and linears, scale only",
        ("qwen3",),
        use_shift=False,
        norm_modules=["q_norm", "k_norm"],
    ),
    ssf("ssf_bf16", "a bf16 file; the outputs are those of the rounded values", ("llama",), edit="bf16"),
    ssf("ssf_identity", "scale one, shift zero: equals the base", identity=True, norm_modules=NORMS),
]
CASES = LORA_PLAIN + LORA_BIAS + LORA_EMBED + LORA_DORA + LORA_FILES + LORA_ACTIVATED + MISS_CASES + SSF_CASES


def family_names(value: object, rename: Callable[[str], str]) -> object:
    """Applies `rename` to every module name inside a config value; duplicates in lists are dropped."""
    if isinstance(value, str):
        return rename(value)
    if isinstance(value, dict):
        return {rename(key): family_names(item, rename) for key, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], str):
        return list(dict.fromkeys(rename(item) for item in value))
    return value


NAMED_KEYS = (
    "target_modules",
    "norm_modules",
    "embedding_modules",
    "exclude_modules",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
)


def config_for(case: Case, model_name: str) -> dict:
    """The config of `case` with the module names of the model."""
    fused = FUSED if model_name.startswith("phi3") else {}
    rename = lambda name: fused.get(name, name)
    return {key: family_names(value, rename) if key in NAMED_KEYS else value for key, value in case.config.items()}
