"""Cases and faults of the rotations (ROAD, OFT of today, BOFT), and the kinds that are refused as a whole.

The files of earlier OFT generations are made by make_fixtures_oft.py.
"""

import peft.tuners.boft.layer
import torch

from fixture_common import RANDOM_RULES
from fixture_kinds import P, Faults, case_of
from fixture_refused import Refused, noise

RANDOM_RULES.update(
    {
        "road_theta": lambda old, noise: 0.6 * noise,
        "road_alpha": lambda old, noise: 1 + 0.3 * noise,
        "oft_R": lambda old, noise: 0.25 * noise,
        "oft_embedding_R": lambda old, noise: 0.25 * noise,
        "oft_r": lambda old, noise: 0.5 * noise,
        "oft_s": lambda old, noise: 1 + 0.3 * noise,
        "boft_R": lambda old, noise: 0.5 * noise,
        "boft_s": lambda old, noise: 1 + 0.3 * noise,
    }
)


class BlockDiagonal:
    """What PEFT's CUDA extension computes: block-diagonal matrices from (factors, blocks, s, s)."""

    @staticmethod
    def apply(blocks: torch.Tensor) -> torch.Tensor:
        """(factors, blocks s, blocks s)."""
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


# Without its extension PEFT makes one factor whatever the config says, so it is given one.
peft.tuners.boft.layer.FastBlockDiag = BlockDiagonal
peft.tuners.boft.layer.get_fbd_cuda = lambda: True

road = case_of("ROAD", group_size=8)
oft = case_of("OFT", oft_block_size=8)
boft = case_of("BOFT", boft_block_size=4)

CASES = [
    road("road_1", "one angle for each pair; the bias is rotated too", ("llama_bias",)),
    road("road_2", "one angle for each output, groups of all outputs", variant="road_2", group_size=16),
    road("road_4", "two angles for each output", ("llama_bias",), variant="road_4", target_modules=["q_proj", "up_proj"]),
    road("road_identity", "no angle: equals the base", identity=True, target_modules=["q_proj"]),
    oft("oft_series", "the series of five terms, the default", ("qwen2",)),
    oft("oft_cayley", "the exact map, one block for all", use_cayley_neumann=False, block_share=True),
    oft("oft_coft", "a limited norm, three terms, the number of blocks given", coft=True, eps=1.5, r=4, oft_block_size=0, num_cayley_neumann_terms=3),
    oft("oft_embed", "embed_tokens and q_proj", target_modules=["embed_tokens", "q_proj"]),
    oft("oft_identity", "no rotation: equals the base", identity=True, target_modules=["q_proj"]),
    boft("boft_one", "one factor; the bias is not scaled", ("llama_bias",)),
    boft("boft_three", "three butterfly factors, the number of blocks given", boft_block_size=0, boft_block_num=8, boft_n_butterfly_factor=3),
    boft("boft_identity", "no rotation: equals the base", identity=True, target_modules=["q_proj"]),
]


def refused() -> list[Refused]:
    """Faulty adapters of these kinds, and whole kinds."""
    road = Faults("ROAD", {"road_theta": noise(16), "road_alpha": 1 + noise(16)}, group_size=8)
    oft = Faults("OFT", {"oft_R.weight": noise(4, 28)}, oft_block_size=8, use_cayley_neumann=False)
    boft = Faults("BOFT", {"boft_R": noise(1, 8, 4, 4), "boft_s": 1 + noise(32, 1)}, boft_block_size=4)
    old = {"oft_R.weight": None, "oft_r": noise(3, 8, 8)}
    kinds = ["LILY", "ADAMSS", "PSOFT", "SHADOW"]
    whole = [Faults(kind, {"part": noise(2)}).fault("kind", "a kind that is not served", kind) for kind in kinds]
    return [
        *road.usual("road_theta"),
        road.fault("group", "groups that do not divide", "group_size", group_size=12),
        road.fault("odd", "an odd group", "group_size", group_size=7),
        road.fault("variant", "an unknown variant", "variant", variant="road_3"),
        *oft.usual("oft_R.weight"),
        oft.fault("triangle", "no upper triangle", "upper triangle", {"oft_R.weight": noise(4, 27)}),
        oft.fault("share", "several blocks although they are shared", "block_share", block_share=True),
        oft.fault("old", "blocks of an earlier generation that do not cover", f"{P}oft_r", old),
        *boft.usual("boft_s"),
        boft.fault("size", "another block size than the config's", "boft_block_size", boft_block_size=8),
        boft.fault("factors", "more factors than the blocks allow", "factors", {"boft_R": noise(5, 8, 4, 4)}),
        boft.fault("no_s", "the scale is missing", "boft_s", {"boft_s": None}),
        *whole,
    ]


REFUSED = refused()
