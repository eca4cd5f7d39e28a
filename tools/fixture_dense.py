"""Cases and faults of the kinds that are made with the base weight: HRA, DEFT, PEANUT, HIRA, GLORA, OSF, FROD."""

import torch

from fixture_common import RANDOM_RULES
from fixture_kinds import IDENTITY, P, Faults, case_of
from fixture_refused import Refused, noise

RANDOM_RULES.update(
    {
        "hra_u": lambda old, noise: noise,
        "deft_": lambda old, noise: 0.3 * noise,
        "peanut_A": lambda old, noise: noise / old.shape[1] ** 0.5,
        "peanut_B": lambda old, noise: 0.3 * noise,
        "peanut_": lambda old, noise: noise / old.shape[1] ** 0.5,
        "hira_A": lambda old, noise: noise,
        "hira_B": lambda old, noise: 0.3 * noise,
        "hira_embedding_A": lambda old, noise: 0.7 * noise,
        "hira_embedding_B": lambda old, noise: 0.4 * noise,
        "Xd": lambda old, noise: 0.2 * noise,
        "Xu": lambda old, noise: 0.7 * noise,
        "glora_": lambda old, noise: 0.2 * noise,
        "frod_lambda_s_values": lambda old, noise: 0.15 * noise,
        "frod_lambda_l": lambda old, noise: old * (1 + 0.2 * noise),
    }
)

hra = case_of("HRA", r=4)
deft = case_of("DEFT", r=4)
peanut = case_of("PEANUT", r=4)
hira = case_of("HIRA", r=3)
glora = case_of("GLORA", r=2)
osf = case_of("OSF")
frod = case_of("FROD", target_modules=["q_proj", "up_proj"], progressbar=False)

CASES = [
    hra("hra_chain", "a chain of reflections"),
    hra("hra_gs", "orthonormal columns: apply_GS", r=3, apply_GS=True),
    hra("hra_identity", "pairs of equal reflections: equals the base", identity=True),
    deft("deft_relu", "relu, with alpha", alpha=6),
    deft("deft_qr", "qr, without alpha", decomposition_method="qr"),
    deft("deft_para", "PaRa: the subspace is removed only", ("llama_bias",), para=True, r=2),
    deft("deft_identity", "what is removed is put back: equals the base up to rounding", **IDENTITY),
    peanut("peanut_flat", "no hidden layers, relu"),
    peanut("peanut_deep", "two hidden layers on each side, gelu, scaling", depth=2, act_fn="gelu", scaling=0.5),
    peanut("peanut_identity", "B is zero: equals the base", **IDENTITY),
    hira("hira_embed", "embed_tokens and q_proj", target_modules=["embed_tokens", "q_proj"]),
    hira("hira_identity", "B is zero: equals the base", identity=True, target_modules=["q_proj"]),
    glora("glora_lora", "A, B and C low-rank, D and E constant", ("llama_bias",)),
    glora("glora_vector", "all vectors", ("llama_bias",), config_A_B="vector", config_C="vector", config_D_E="vector"),
    glora("glora_constant", "A and B constant, on a base without biases", config_A_B="constant"),
    glora("glora_bias", "C, D and E only", ("llama_bias",), config_A_B="none", config_D_E="vector", target_modules=["v_proj"]),
    glora("glora_identity", "all zero: equals the base", ("llama_bias",), identity=True, config_A_B="vector"),
    osf("osf_half", "half of the directions trained, the default"),
    osf("osf_few", "few directions trained, a fraction in rank_pattern", effective_rank=29, rank_pattern={"v_proj": 0.75}),
    osf("osf_identity", "the base's own directions: equals it up to rounding", effective_rank=28, **IDENTITY),
    frod("frod_sparse", "a basis for each category", sparse_rate=0.1),
    frod("frod_identity", "the base in the basis: equals it up to rounding", **IDENTITY),
]


def frod_faults() -> list[Refused]:
    """FROD keeps tensors outside the modules."""
    eye = torch.eye(32)
    faults = Faults("FROD", {"frod_lambda_l": 1 + noise(32), "frod_lambda_s_values": noise(2)}, save_projection=True)
    sound = faults.tensors | {
        "base_model.frod_V.self_attn_q_proj": eye,
        "base_model.frod_s_indices.self_attn_q_proj": torch.tensor([[1, 2], [3, 4]]),
        "base_model.frod_s_size.self_attn_q_proj": torch.tensor([32, 32]),
    }
    faults.tensors = sound
    basis = "base_model.frod_V.self_attn_q_proj"
    places = "base_model.frod_s_indices.self_attn_q_proj"

    def broken(name: str, what: str, names: str, changed: dict) -> Refused:
        tensors = {key: value for key, value in (sound | changed).items() if value is not None}
        return Refused(f"frod_{name}", what, names, faults.config, tensors)

    return faults.usual("frod_lambda_l") + [
        faults.fault("unsaved", "the basis is not saved", "save_projection", save_projection=False),
        broken("no_basis", "the basis is missing", basis, {basis: None}),
        broken("singular", "a basis without an inverse", basis, {basis: torch.ones(32, 32)}),
        broken("place", "a place outside the matrix", places, {places: torch.tensor([[1, 2], [3, 32]])}),
        broken("category", "a basis of a category that no module has", "mlp_nosuch", {"base_model.frod_V.mlp_nosuch": eye.clone()}),
    ]


def refused() -> list[Refused]:
    """Faulty adapters of these kinds."""
    hra = Faults("HRA", {"hra_u": noise(32, 2)}, r=2)
    deft = Faults("DEFT", {"deft_P": noise(32, 2), "deft_R": noise(2, 32)}, r=2)
    peanut = Faults("PEANUT", {"peanut_A.weight": noise(2, 32), "peanut_B.weight": noise(32, 2)}, r=2)
    hira = Faults("HIRA", {"hira_A": noise(2, 32), "hira_B": noise(32, 2)}, r=2)
    glora_parts = {"glora_A.X": noise(32, 1), "glora_B.X": noise(32, 1)}
    glora = Faults("GLORA", glora_parts, r=2, config_A_B="vector")
    osf_parts = {"U_low": noise(32, 4), "S_low": noise(4), "V_low": noise(4, 32)}
    osf = Faults("OSF", {f"osf_svd_params.{name}": value for name, value in osf_parts.items()}, effective_rank=28)
    return [
        *hra.usual("hra_u"),
        hra.fault("rank", "the tensor has rank 2, the config says 4", f"{P}hra_u", r=4),
        hra.fault("zero", "a column of zeros has no direction", f"{P}hra_u", {"hra_u": torch.zeros(32, 2)}),
        *deft.usual("deft_P"),
        deft.fault("no_r", "R is missing although para is false", "deft_R", {"deft_R": None}),
        deft.fault("surplus_r", "R is in the file although para is true", "para", para=True),
        deft.fault("method", "an unknown decomposition", "decomposition_method", decomposition_method="svd"),
        *peanut.usual("peanut_A.weight"),
        peanut.fault("depth", "hidden layers that the file does not have", "peanut_encoders.0", depth=1),
        peanut.fault(
            "surplus", "hidden layers that the config does not name", "peanut_encoders.0",
            {"peanut_encoders.0.weight": noise(2, 2)},
        ),
        peanut.fault("act", "an unknown activation", "act_fn", act_fn="nosuch"),
        *hira.usual("hira_A"),
        hira.fault("no_b", "A without B", "hira_B", {"hira_B": None}),
        *glora.usual("glora_A.X"),
        glora.fault("form", "vectors although the config says low-rank", "glora_A.Xd", config_A_B="lora"),
        glora.fault("zeros", "a buffer of zeros that is not", "glora_C.zeros", {"glora_C.zeros": torch.ones(32, 1)}),
        glora.fault("bias", "a bias term although the base has no bias", "glora_D.X", {"glora_D.X": noise(1)}),
        *osf.usual("osf_svd_params.U_low"),
        osf.fault("rank", "four directions, the config says sixteen", "effective_rank", effective_rank=16),
        *frod_faults(),
    ]


REFUSED = refused()
