"""Faulty Arrow adapters; make_fixtures_arrow.py makes the sound ones."""

from fixture_cases import Case
from fixture_kinds import Faults
from fixture_refused import noise

CASES: list[Case] = []

ROUTER = {"top_k": 1, "router_temperature": 1.0, "use_gks": False, "rng_seed": 1}
EXPERT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
GENERAL = {"general_lora_A": noise(1, 2, 32), "general_lora_B": noise(1, 32, 2)}


def faults() -> list:
    """What is refused."""
    sound = Faults(
        "ARROW",
        {"lora_A": noise(2, 2, 32), "lora_B": noise(2, 32, 2)},
        arrow_config=ROUTER,
        experts=[EXPERT, EXPERT],
    )
    of_expert = lambda **changed: {"experts": [EXPERT, EXPERT | changed]}
    return sound.usual("lora_A") + [
        sound.fault("missing", "no up projections", "lora_B", {"lora_B": None}),
        sound.fault("flat", "factors of one LoRA", "lora_A", {"lora_A": noise(2, 32)}),
        sound.fault("experts", "more experts than tensors", "lora_A", experts=[EXPERT] * 3),
        sound.fault("router", "no router", "arrow_config", arrow_config=None),
        sound.fault("router_field", "a field that nobody knows", "mystery", arrow_config=ROUTER | {"mystery": 1}),
        sound.fault("top_k", "more chosen than there are", "top_k", arrow_config=ROUTER | {"top_k": 3}),
        sound.fault(
            "temperature", "no temperature", "router_temperature", arrow_config=ROUTER | {"router_temperature": 0}
        ),
        sound.fault("dora", "an expert with magnitudes", "use_dora", **of_expert(use_dora=True)),
        sound.fault("saved", "an expert with a module beside it", "modules_to_save", **of_expert(modules_to_save=["x"])),
        sound.fault("biased", "an expert with biases", "bias", **of_expert(bias="all")),
        sound.fault("start", "an expert on a changed base", "init_lora_weights", **of_expert(init_lora_weights="pissa")),
        sound.fault("type", "an expert of another kind", "experts", **of_expert(peft_type="LOHA")),
        sound.fault("general", "general experts without their tensors", "general_lora_A", general_experts=[EXPERT], arrow_config=ROUTER | {"use_gks": True}),
        sound.fault("no_general", "tensors of general experts that the config lacks", "general_lora_A", GENERAL),
        sound.fault("no_list", "subtraction without general experts", "general_experts", GENERAL, arrow_config=ROUTER | {"use_gks": True}),
        sound.fault("saved_beside", "a module beside it", "modules_to_save", modules_to_save=["lm_head"]),
    ]


REFUSED = faults()
