"""Cases of the variants inside the type LORA that change what its tensors mean."""

import peft.tuners.lora.layer as lora_layer
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.variants import QALoraLinearVariant

from fixture_cases import Case

# One short and one longer prompt keep the files small.
PROMPTS = (1, 2)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def variant(name: str, what: str, models: tuple[str, ...] = ("llama",), **config) -> Case:
    """A LORA case of rank 4 on three linears unless the arguments say otherwise."""
    default = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    return Case(name, "LORA", what, models, default | config, prompts=PROMPTS)


def allow_qalora() -> None:
    """PEFT has this variant for GPTQ layers only; its arithmetic does not depend on how the base is stored."""
    resolve = lora_layer.Linear.resolve_lora_variant

    def with_qalora(self, *, config, **kwargs):
        return QALoraLinearVariant() if config.use_qalora else resolve(self, config=config, **kwargs)

    lora_layer.Linear.resolve_lora_variant = with_qalora


VARIANT_CASES = [
    variant(
        "lora_bdlora",
        "two blocks: A of down_proj, B of the others",
        use_bdlora=BdLoraConfig(target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj", "v_proj"], nblocks=2),
    ),
    variant(
        "lora_bdlora_mixed",
        "four blocks in one linear, names by any part of the path, the others plain",
        use_bdlora=BdLoraConfig(target_modules_bd_b=["layers.1.self_attn.q"], nblocks=4, match_strict=False),
    ),
    variant("lora_qalora", "inputs pooled in groups of four", use_qalora=True, qalora_group_size=4),
    variant(
        "lora_qalora_rslora",
        "inputs pooled in groups of eight, rslora",
        use_qalora=True,
        qalora_group_size=8,
        use_rslora=True,
    ),
    variant("lora_velora", "a config of VeLoRA, and the buffer that only training reads", velora_config=VeloraConfig()),
    variant(
        "lora_monteclora",
        "a config of MonteCLoRA, and the sampler that only training reads",
        monteclora_config=MontecloraConfig(),
    ),
    variant("lora_kasa", "KaSA, on linears with and without a bias", ("llama_bias", "phi3"), kasa_config=KasaConfig()),
    variant(
        "lora_kasa_patterns",
        "KaSA, rslora and patterns",
        kasa_config=KasaConfig(),
        use_rslora=True,
        rank_pattern={"q_proj": 2, "down_proj": 6},
        alpha_pattern={"v_proj": 3},
    ),
    variant("lora_pissa", "an unconverted PiSSA file", ("llama", "llama_bias"), init_lora_weights="pissa"),
    variant(
        "lora_pissa_rslora",
        "an unconverted PiSSA file, rslora and patterns",
        init_lora_weights="pissa",
        use_rslora=True,
        rank_pattern={"q_proj": 2},
    ),
    variant("lora_olora", "an unconverted OLoRA file", init_lora_weights="olora"),
    variant(
        "lora_olora_patterns",
        "an unconverted OLoRA file, patterns and another alpha",
        init_lora_weights="olora",
        rank_pattern={"v_proj": 3},
        alpha_pattern={"down_proj": 2},
    ),
]
