"""How exact an export of each precision has to be. Imports no PyTorch, so that ``mvmoe-export --help`` stays fast."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """What an export may differ by.

    Attributes:
        relative: largest error of a piece's output, divided by the output's largest magnitude.
        agreement: least share of images with the same top-1 class, and of images routed alike.
        margin: two routes or classes whose reference values differ by less than this are a tie, and either is right.
    """

    relative: float
    agreement: float
    margin: float


TOLERANCES = {
    # fp32 engines sum in another order and approximate erf and exp: about 1e-6 per operator, seen to reach 1e-5
    # after twelve blocks. A wrong expert shows 1e-2 and more.
    "fp32": Tolerance(1e-4, 1.0, 1e-5),
    # 11 bits of mantissa: 5e-4 per weight (and per operator, where arithmetic is fp16 too), adding up over blocks.
    "fp16": Tolerance(2e-2, 0.995, 2e-3),
    # One scale per output channel, 1/254 of its largest weight; activations are quantised as well where dynamic.
    "int8": Tolerance(0.25, 0.97, 5e-2),
    "palette6": Tolerance(0.25, 0.97, 5e-2),
    # 16 values per tensor: known to cost accuracy, exported for those who measure what it costs them.
    "palette4": Tolerance(1.0, 0.75, 1e-1),
}
"""By precision of the bundle."""
