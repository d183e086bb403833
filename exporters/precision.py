"""Precisions: how weights are stored, and how exact an export has to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mvmoe_deploy.selftest import Tolerance as SelftestTolerance

SAME_ARITHMETIC = SelftestTolerance(gate=1e-4, logits=1e-4)
"""For engines that compute in fp32, in whatever order. Largest departures seen, from wasm and ARM64: logits 7e-6."""


@dataclass(frozen=True)
class Tolerance:
    """The differences that an export may show; the units are those of :mod:`mvmoe_deploy.exporters.differences`.

    Attributes:
        logits: largest error of a logit, in spreads.
        probabilities: largest error of a class's probability, where logits have a spread of at most 2.3 nats; in
            proportion more where it is larger.
        channels: largest error of tokens and features, in units of their channel's scale, and of the logarithms of a
            router's probabilities, in margins between its two best experts.
        margin: if PyTorch prefers one class or route to another by at most this many spreads, the two are a tie and
            either is right.
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
        name: the precision's name in ``--precision`` and in manifests.
        bytes_per_weight: size of a large weight, as stored.
        tolerance: the differences from PyTorch that its exports may show.
        reason: why the tolerance is this large.
        note: explanation for ``--help``, if the name does not say everything.
        selftest: how far a device may depart from the exporting one. Both have the same weights, so that only their
            arithmetic differs: by a few bits of fp32, or by the rounding of a lower precision where the engine
            computes in one.
        rounds: what is rounded to half precision: the weights, or operators' results as well; None if nothing is.
    """

    name: str
    bytes_per_weight: float
    tolerance: Tolerance
    reason: str
    note: str = ""
    selftest: SelftestTolerance = SAME_ARITHMETIC
    rounds: Literal["weights", "results"] | None = None


FP32 = Precision(
    "fp32",
    4,
    Tolerance(logits=2e-5, probabilities=1e-5, channels=5e-5, margin=1e-5, agreement=1.0),
    "Engines sum in another order and approximate erf and exp. Largest errors seen: logits 5e-6, probabilities 2e-6, "
    "channels 1.6e-5, with 6 to 12 blocks of width 64 to 384.",
)
FP16 = Precision(
    "fp16",
    2,
    Tolerance(logits=2.5e-2, probabilities=6e-3, channels=4e-2, margin=1e-2, agreement=1.0),
    "Weights and results of operators have 11 bits of mantissa, and rounding adds up over blocks. Largest errors seen: "
    "logits 1.03e-2, probabilities 2e-3 (8.9e-3 at a spread of 6.6 nats), channels 1.4e-2, router 2e-2.",
    selftest=SelftestTolerance(gate=6e-3, logits=2.5e-2),
    rounds="results",
)
INT8 = Precision(
    "int8",
    1,
    Tolerance(logits=0.3, probabilities=0.1, channels=0.6, margin=0.1, agreement=0.97),
    "With one scale per output channel, a weight is off by up to 1/254 of the largest weight in its channel. Dynamic "
    "quantisation also quantises activations. Largest errors seen: logits 0.12, probabilities 0.03, channels 0.26; the "
    "class differed where PyTorch prefers its own by 0.03.",
    # Where float32 differs by a bit, some activations are rounded to the next number: 0.08 to 0.10 of the spread, on
    # x86 emulated without AVX-512 against x86 with it. Sums of 8-bit products that overflow gave 2.8, gates 0.31.
    selftest=SelftestTolerance(gate=5e-2, logits=0.2),
)
