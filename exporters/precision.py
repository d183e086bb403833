"""What a precision is: how weights are stored, and how exact an export has to be."""

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


@dataclass(frozen=True)
class Precision:
    """A precision that a target exports in.

    Attributes:
        name: as in ``--precision`` and in manifests.
        bytes_per_weight: of a large weight, as stored.
        tolerance: what its exports may differ by from PyTorch.
        reason: why that much.
        note: for ``--help``, where the name does not say it all.
    """

    name: str
    bytes_per_weight: float
    tolerance: Tolerance
    reason: str
    note: str = ""


FP32 = Precision(
    "fp32",
    4,
    Tolerance(1e-4, 1.0, 1e-5),
    "Engines sum in another order and approximate erf and exp: about 1e-6 per operator, seen to reach 1e-5 after "
    "twelve blocks. A wrong expert shows 1e-2 and more.",
)
FP16 = Precision(
    "fp16",
    2,
    Tolerance(2e-2, 0.995, 2e-3),
    "11 bits of mantissa: 5e-4 per weight, and per operator where arithmetic is fp16 too, which adds up over blocks.",
)
INT8 = Precision(
    "int8",
    1,
    Tolerance(0.25, 0.97, 5e-2),
    "One scale per output channel: a weight is off by up to 1/254 of the largest in its channel. Activations are "
    "quantised as well where that is dynamic.",
)
