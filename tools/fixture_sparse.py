"""Cases and faults of the sparse and spectral kinds: SHIRA, SARA, SUPERTUNING, C3A, FOURIERFT, WAVEFT."""

import torch

from fixture_common import RANDOM_RULES
from fixture_kinds import IDENTITY, P, Faults, case_of
from fixture_refused import Refused, noise

RANDOM_RULES.update(
    {
        "shira_weight": lambda old, noise: 0.5 * noise,
        "supertuning_values": lambda old, noise: 0.5 * noise,
        "supertuning_lora_A": lambda old, noise: noise / old.shape[1] ** 0.5,
        "supertuning_lora_B": lambda old, noise: 0.2 * noise,
        "c3a_kernel": lambda old, noise: 3 * noise,
        "fourierft_spectrum": lambda old, noise: noise,
        "waveft_spectrum": lambda old, noise: noise,
    }
)

shira = case_of("SHIRA", r=2, random_seed=5)
supertuning = case_of("SUPERTUNING")
c3a = case_of("C3A", block_size=8)
fourierft = case_of("FOURIERFT", n_frequency=6, scaling=80.0)
waveft = case_of("WAVEFT", n_frequency=12, scaling=0.8)

CASES = [
    shira("shira_few", "few entries: a sparse delta"),
    shira("shira_many", "many entries: a dense weight", ("llama_bias",), r=6),
    shira("shira_identity", "all zero: equals the base", identity=True, target_modules=["q_proj"]),
    supertuning("supertuning_top", "the largest entries", sparsity=0.9),
    supertuning("supertuning_supra", "the smallest entries, and a low-rank term", sparsity=0.95, select_top=False, r=3, lora_alpha=4),
    supertuning("supertuning_identity", "all zero: equals the base", sparsity=0.9, **IDENTITY),
    c3a("c3a_pattern", "blocks, another size for one module", block_size_pattern={"up_proj": 16}),
    c3a("c3a_identity", "all zero: equals the base", identity=True, init_weights=True, target_modules=["q_proj"]),
    fourierft("fourierft_few", "few coefficients: low rank", random_loc_seed=123, n_frequency_pattern={"v_proj": 3}),
    fourierft("fourierft_many", "many coefficients: a dense weight; the default seed", n_frequency=100, scaling=20.0),
    fourierft("fourierft_identity", "all zero: equals the base", init_weights=True, **IDENTITY),
    waveft("waveft_db1", "Haar wavelets"),
    waveft("waveft_db3", "longer filters, odd edges", wavelet_family="db3", n_frequency_pattern={"v_proj": 5}),
    waveft("waveft_coif1", "a coiflet, and a budget shared in proportion", wavelet_family="coif1", proportional_parameters=True),
    waveft("waveft_direct", "without the transform", use_idwt=False, scaling=0.6, random_loc_seed=9),
    waveft("waveft_identity", "all zero: equals the base", init_weights=True, **IDENTITY),
]


def refused() -> list[Refused]:
    """Faulty adapters of these kinds."""
    places = torch.stack([torch.arange(64) % 32, torch.arange(64) // 32]).int()
    shira = Faults("SHIRA", {"shira_weight": noise(64), "shira_indices": places}, r=1)
    flat = torch.arange(102).int()
    supertuning_parts = {"supertuning_values": noise(102), "supertuning_indices": flat}
    supertuning = Faults("SUPERTUNING", supertuning_parts, sparsity=0.9, save_precomputed_indices=True)
    c3a = Faults("C3A", {"c3a_kernel": noise(4, 4, 8)}, block_size=8)
    fourierft = Faults("FOURIERFT", {"fourierft_spectrum": noise(6)}, n_frequency=6)
    waveft = Faults("WAVEFT", {"waveft_spectrum": noise(6)}, n_frequency=6)
    sara = Faults("SARA", {"sara_weight": noise(64), "sara_indices": places})
    return [
        *shira.usual("shira_weight"),
        shira.fault("rank", "64 values, the config's r gives 128", "shira_weight", r=2),
        shira.fault("place", "a column outside the weight", "shira_indices", {"shira_indices": places + 31}),
        shira.fault("fraction", "places that are no integers", "shira_indices", {"shira_indices": places + 0.5}),
        shira.fault("no_indices", "the places are missing", "shira_indices", {"shira_indices": None}),
        sara.fault("no_indices", "only values: the places cannot be known", "sara_indices", {"sara_indices": None}),
        *supertuning.usual("supertuning_values"),
        supertuning.fault("unsaved", "the places are not saved", "save_precomputed_indices", save_precomputed_indices=False),
        supertuning.fault("no_indices", "the places are missing", f"{P}supertuning_indices", {"supertuning_indices": None}),
        supertuning.fault("count", "fewer values than the sparsity gives", "sparsity", sparsity=0.8),
        supertuning.fault("no_lora", "r without a low-rank term", "supertuning_lora_A", r=2, lora_alpha=4),
        *c3a.usual("c3a_kernel"),
        c3a.fault("block", "blocks that do not divide", "block_size", block_size=5),
        *fourierft.usual("fourierft_spectrum"),
        fourierft.fault("count", "more coefficients than places", "n_frequency", n_frequency=2000),
        fourierft.fault("seed", "a seed that is none", "random_loc_seed", random_loc_seed="x"),
        *waveft.usual("waveft_spectrum"),
        waveft.fault("family", "an unknown wavelet", "wavelet_family", wavelet_family="nosuch"),
    ]


REFUSED = refused()
