"""What a precision is: how weights are stored, and how exact an export has to be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """What an export may differ by; the units are those of :mod:`mvmoe_deploy.exporters.differences`.

    Attributes:
        logits: largest error of a logit, in spreads.
        probabilities: largest error of a class's probability.
        channels: largest error of tokens and the like, in their channel's scale, and of a router's probabilities in
            units of what tells experts apart.
        margin: two classes or routes that PyTorch tells apart by no more spreads than this are a tie, and either is
            right.
        agreement: least share of images with the same top-1 class, and of images routed alike, ties aside.
    """

    logits: float
    probabilities: float
    channels: float
    margin: float
    agreement: float


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
    Tolerance(logits=2e-5, probabilities=1e-5, channels=5e-5, margin=1e-5, agreement=1.0),
    "Engines sum in another order and approximate erf and exp. Seen: logits 5e-6, probabilities 2e-6, channels 1.6e-5, "
    "at 6 to 12 blocks of width 64 to 384.",
)
FP16 = Precision(
    "fp16",
    2,
    Tolerance(logits=2.5e-2, probabilities=6e-3, channels=4e-2, margin=1e-2, agreement=1.0),
    "11 bits of mantissa, per weight and per operator, which adds up over blocks. Seen: logits 9e-3, probabilities "
    "2e-3, channels 1.4e-2.",
)
INT8 = Precision(
    "int8",
    1,
    Tolerance(logits=0.3, probabilities=0.1, channels=0.6, margin=0.1, agreement=0.97),
    "One scale per output channel: a weight is off by up to 1/254 of the largest in its channel. Activations are "
    "quantised as well where that is dynamic. Seen: logits 0.12, probabilities 0.03, channels 0.26, another class "
    "where PyTorch prefers its own by 0.03.",
)
