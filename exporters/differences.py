"""How far two outputs are apart, in units of what decides: no class, channel or offset can hide another's error.

Logits decide by their order and through softmax, and neither sees what all classes have in common. They are compared
after taking each image's mean away, in *spreads*, the standard deviation over the classes. A class that no image can
reach, because a large negative bias masks it, decides nothing: it counts neither for the mean nor for the spread.
Tokens and the like are read by layers that weigh each channel by itself, so each channel is compared in units of its
own scale. ``docs/verification.md`` has the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.errors import VerificationError

Array = NDArray[np.floating[Any]]
Doubles = NDArray[np.float64]

UNREACHABLE_NATS = 20.0
"""A class this far below the best one has a probability of 2e-9."""

UNREACHABLE_SPREADS = 10.0
"""The least likely of a million normally distributed classes lies 10 standard deviations below the best."""

LEAST_CHANNEL = 0.1
"""A channel that hardly varies is judged by this share of the median channel's size."""

UNDECIDED = 0.1
"""A router whose probabilities differ by less than this share of 1/E is judged as if they differed by it."""

LAST_BIT = float(np.finfo(np.float32).eps)
"""Of a number, relative to it, where it is float32."""

SUM_ERROR = 1e-2
"""Of probabilities that were rounded to half precision, E of them."""


@dataclass(frozen=True)
class Scale:
    """What logits are measured by.

    Attributes:
        reachable: classes that some image can reach, boolean ``[C]``.
        limit: how far below an image's best class, in nats, a class that can be reached may lie.
        spread: standard deviation over these classes, ``[B, 1]``: the image's own, or the median image's where that
            is larger.
    """

    reachable: NDArray[np.bool_]
    limit: float
    spread: Doubles


def check_comparable(actual: Array, expected: Array, where: str) -> None:
    """Refuses what cannot be compared.

    Args:
        actual: of the bundle.
        expected: of PyTorch.
        where: bundle, piece and output, for errors.

    Raises:
        VerificationError: another shape, or values that are not finite; the message says on which side.
    """
    if actual.shape != expected.shape:
        raise VerificationError(f"{where}: has shape {list(actual.shape)}, PyTorch's has {list(expected.shape)}")
    for side, values in (("PyTorch's own output", expected), ("the bundle's output", actual)):
        wrong = int((~np.isfinite(values)).sum())
        if wrong:
            raise VerificationError(f"{where}: {wrong} of {values.size} values of {side} are NaN or infinite")


def logit_scale(expected: Array) -> Scale:
    """What an output of logits ``[B, C]`` is measured by.

    A class counts as reachable if in some image it comes within 20 nats or 10 spreads of the best class, whichever is
    more; the spread is that over the reachable classes. If that leaves fewer than two, all classes count.
    """
    logits = expected.astype(np.float64)
    nearest = (logits.max(axis=1, keepdims=True) - logits).min(axis=0)
    limit = UNREACHABLE_NATS
    while True:  # from the best classes downwards: a wider limit takes in more, which may widen it again
        inside = nearest <= limit
        wider = max(limit, UNREACHABLE_SPREADS * float(np.sqrt(logits[:, inside].var(axis=1).mean())))
        if wider == limit:
            break
        limit = wider
    if inside.sum() < 2:
        inside, limit = np.ones(len(inside), bool), float("inf")
    own = logits[:, inside].std(axis=1, keepdims=True)
    least = max(LAST_BIT * float(np.abs(logits[:, inside]).max()), 1e-30)
    return Scale(inside, limit, np.maximum(np.maximum(own, np.median(own)), least))


def logit_errors(actual: Array, expected: Array, scale: Scale) -> Doubles:
    """Errors of the reachable classes ``[B, reachable]``, in spreads, each image's mean taken away.

    What float32 cannot hold is no error: the last bit of the largest logit.
    """
    right = expected.astype(np.float64)[:, scale.reachable]
    error = actual[:, scale.reachable] - right
    error = np.abs(error - error.mean(axis=1, keepdims=True)) - LAST_BIT * np.abs(right).max(axis=1, keepdims=True)
    result: NDArray[np.float64] = np.maximum(error, 0) / scale.spread
    return result


def check_masks(actual: Array, scale: Scale, where: str) -> None:
    """Compares which classes can be reached with the reference's.

    Raises:
        VerificationError: a class is masked on one side only; it is named.
    """
    nearest = (actual.max(axis=1, keepdims=True).astype(np.float64) - actual).min(axis=0)
    for wrong, what in (
        (scale.reachable & (nearest > 2 * scale.limit), "cannot be reached in the bundle but can in PyTorch"),
        (~scale.reachable & (nearest < scale.limit / 2), "can be reached in the bundle but not in PyTorch"),
    ):
        if wrong.any():
            raise VerificationError(f"{where}: class {int(wrong.argmax())} {what}: it is masked on one side only")


def softmax(logits: Array) -> Doubles:
    """Probabilities ``[B, C]``."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def class_errors(actual: Array, expected: Array, scale: Scale) -> Doubles:
    """Errors of the classes' probabilities ``[B, C]``, but for what the last bit of the largest logit does to them."""
    right = softmax(expected)
    bit = LAST_BIT * np.abs(expected.astype(np.float64)[:, scale.reachable]).max(axis=1, keepdims=True)
    result: NDArray[np.float64] = np.maximum(np.abs(softmax(actual) - right) - bit * right, 0)
    return result


def channel_errors(actual: Array, expected: Array) -> Doubles:
    """Errors of tokens ``[B, N, D]``, features ``[B, D]`` or feature maps ``[B, D, H, W]``, each channel in its scale.

    The scale is the channel's standard deviation, but at least a tenth of the median channel's root mean square (what
    all channels have in common taken away): images may be so alike that hardly any channel varies. What float32 cannot
    hold is no error: the last bits of a value that is large beside what its channel varies by.
    """
    channel = 1 if expected.ndim == 4 else expected.ndim - 1
    others = tuple(axis for axis in range(expected.ndim) if axis != channel)
    values = expected.astype(np.float64)
    common = np.median(values.mean(axis=others))
    size = np.sqrt(((values - common) ** 2).mean(axis=others))
    used = size[size > 0]  # channels of zeros, as ReLU leaves them, say nothing of the others' scale
    least = LEAST_CHANNEL * float(np.median(used)) if used.size else 1e-30
    error = np.maximum(np.abs(actual - values) - 4 * LAST_BIT * np.abs(values), 0)
    result: NDArray[np.float64] = error / np.maximum(values.std(axis=others, keepdims=True), least)
    return result


def router_errors(actual: Array, expected: Array) -> Doubles:
    """Errors of a router's probabilities ``[B, E]`` in units of what tells experts apart.

    That is the expert's root mean square over the images or the image's standard deviation over the experts, whichever
    is less, so that neither a sure router nor a popular expert hides another's error. A router that hardly decides is
    judged by a tenth of 1/E.
    """
    values = expected.astype(np.float64)
    usual = np.sqrt((values**2).mean(axis=0, keepdims=True))
    scale = np.minimum(usual, values.std(axis=1, keepdims=True))
    result: NDArray[np.float64] = np.abs(actual - values) / np.maximum(scale, UNDECIDED / values.shape[1])
    return result


def check_probabilities(values: Array, where: str, side: str) -> None:
    """Refuses a router's output that is not probabilities.

    Raises:
        VerificationError: a value is negative, or an image's do not sum to 1; ``side`` says whose they are.
    """
    sums = values.astype(np.float64).sum(axis=1)
    worst = int(np.abs(sums - 1).argmax())
    lowest = float(values.min())
    if lowest < 0 or abs(sums[worst] - 1) > SUM_ERROR:
        found = f"one is {lowest:.2g}" if lowest < 0 else f"those of image {worst} sum to {sums[worst]:.4g}"
        raise VerificationError(
            f"{where}: the router does not return probabilities ({side}: {found}); it has to end in a softmax"
        )


def gap(logits: Array, wanted: int, found: int, spread: float) -> float:
    """By how many spreads an image's logits ``[C]`` prefer one class to another."""
    return float(logits[wanted].astype(np.float64) - logits[found]) / spread
