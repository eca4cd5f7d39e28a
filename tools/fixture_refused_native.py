"""Adapters of formats that PEFT does not have and that a server must refuse, one fault each."""

import torch

from fixture_kinds import Faults
from fixture_refused import Refused, noise

SVFIT = Faults("SVFIT", {"svfit_sigma": 1 + noise(4)}, r=4)
FLORA = Faults("FLORA", {"flora_A": noise(32, 2), "flora_G": noise(2, 3), "flora_B": noise(32, 3)}, r1=2, r2=3)


def native_refused() -> list[Refused]:
    """All of them."""
    return (
        SVFIT.usual("svfit_sigma")
        + [
            SVFIT.fault("rank", "more values than the weight has", "svfit_sigma", {"svfit_sigma": torch.ones(33)}, r=33),
            SVFIT.fault("matrix", "a matrix instead of values", "svfit_sigma", {"svfit_sigma": noise(4, 4)}),
        ]
        + FLORA.usual("flora_A")
        + [
            FLORA.fault("core", "a core of another rank", "flora_G", {"flora_G": noise(3, 3)}),
            FLORA.fault("missing", "no core", "flora_G", {"flora_G": None}),
            FLORA.fault("scale", "a scale that is no number", "scale", scale="large"),
        ]
    )
