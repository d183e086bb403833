"""How far apart two outputs are, in units of what decides: no class, channel or offset can hide another's error.

Logits decide by their order and through softmax, and neither depends on an offset that all classes share. So logits
are compared after subtracting each image's mean, in *spreads*: the standard deviation over the classes. A class that
no image can reach, because a large negative bias masks it, decides nothing, so it is left out of the mean and the
spread. Tokens and features are read by layers that weigh each channel separately, so each channel is compared in units
of its own scale. ``docs/verification.md`` has the reasons.
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
"""Least unit for a router's errors, in nats: a router that prefers its experts by less hardly decides."""

USUAL_SPREAD = 2.3
"""Spread of logits, in nats, of the models that the tolerances of probabilities were found on."""

USUAL_MARGIN = 0.5
"""How far the best of ten normally distributed scores is ahead of the second on average, in standard deviations."""

NORMAL_DEVIATION = 0.6745
"""Median absolute deviation of a normal distribution, in standard deviations."""

UNLIKELY = 1e-4
"""A less probable expert is treated as if it had this probability: it is never the first choice, its gate adds next to
nothing, and half precision keeps only a few bits of it."""

LEAST_PROBABILITY = 1e-30
"""Lower bound for probabilities, because an underflow to 0 has no logarithm."""

LAST_BIT = float(np.finfo(np.float32).eps)
"""The last bit of a float32 number, relative to the number."""

SUM_ERROR = 1e-2
"""Largest error of the sum of E probabilities that were rounded to half precision."""


@dataclass(frozen=True)
class Scale:
    """The scale by which errors of logits are measured.

    Attributes:
        reachable: classes that some image can reach, boolean ``[C]``.
        limit: how far below an image's best class, in nats, a reachable class may lie.
        spread: standard deviation over the reachable classes, ``[B, 1]``: the image's own, or the median image's if
            that is larger.
    """

    reachable: NDArray[np.bool_]
    limit: float
    spread: Doubles


def check_comparable(actual: Array, expected: Array, where: str) -> None:
    """Refuses outputs that cannot be compared.

    Args:
        actual: the bundle's output.
        expected: PyTorch's output.
        where: bundle, piece and output, as named in errors.

    Raises:
        VerificationError: the shapes differ, or values are not finite; the message says on which side.
    """
    if actual.shape != expected.shape:
        raise VerificationError(f"{where}: has shape {list(actual.shape)}, PyTorch's has {list(expected.shape)}")
    for side, values in (("PyTorch's own output", expected), ("the bundle's output", actual)):
        wrong = int((~np.isfinite(values)).sum())
        if wrong:
            raise VerificationError(f"{where}: {wrong} of {values.size} values of {side} are NaN or infinite")


def logit_scale(expected: Array) -> Scale:
    """The scale of logits ``[B, C]``.

    A class counts as reachable if in some image it comes within 20 nats or 10 spreads of the best class, whichever is
    more. The spread is taken over the reachable classes. If fewer than two are reachable, all classes count.
    """
    logits = expected.astype(np.float64)
    nearest = (logits.max(axis=1, keepdims=True) - logits).min(axis=0)
    limit = UNREACHABLE_NATS
    while True:  # from the best classes downwards: a wider limit admits more classes, which may widen it again
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
    """Errors of the reachable classes ``[B, reachable]``, in spreads, after subtracting each image's mean.

    Differences below float32's resolution, the last bit of the largest logit, do not count.
    """
    right = expected.astype(np.float64)[:, scale.reachable]
    error = actual[:, scale.reachable] - right
    error = np.abs(error - error.mean(axis=1, keepdims=True)) - LAST_BIT * np.abs(right).max(axis=1, keepdims=True)
    result: NDArray[np.float64] = np.maximum(error, 0) / scale.spread
    return result


def check_masks(actual: Array, scale: Scale, where: str) -> None:
    """Checks that the same classes can be reached as in the reference.

    Raises:
        VerificationError: a class is masked on one side only; the message names it.
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
    """Errors of the classes' probabilities ``[B, C]``, minus what the last bit of the largest logit can cause."""
    right = softmax(expected)
    bit = LAST_BIT * np.abs(expected.astype(np.float64)[:, scale.reachable]).max(axis=1, keepdims=True)
    result: NDArray[np.float64] = np.maximum(np.abs(softmax(actual) - right) - bit * right, 0)
    return result


def sharpness(scale: Scale) -> float:
    """How many times the usual spread the median image's logits have; at least 1.

    Rounding is relative, so that the same share of the spread is more nats where the spread is larger, and a class's
    probability moves by up to a quarter of these nats. Models of thousands of classes have spreads of six nats.
    """
    return max(1.0, float(np.median(scale.spread)) / USUAL_SPREAD)


def channel_errors(actual: Array, expected: Array) -> Doubles:
    """Errors of tokens ``[B, N, D]``, features ``[B, D]`` or feature maps ``[B, D, H, W]``, each channel in its scale.

    The scale is the channel's standard deviation, but at least a tenth of the median channel's root mean square (after
    subtracting what all channels share), because images may be so alike that hardly any channel varies. Differences
    below float32's resolution do not count: the last bits of a value that is large compared with its channel's
    variation.
    """
    channel = 1 if expected.ndim == 4 else expected.ndim - 1
    others = tuple(axis for axis in range(expected.ndim) if axis != channel)
    values = expected.astype(np.float64)
    common = np.median(values.mean(axis=others))
    size = np.sqrt(((values - common) ** 2).mean(axis=others))
    used = size[size > 0]  # channels of zeros, as ReLU leaves them, say nothing about the other channels' scale
    least = LEAST_CHANNEL * float(np.median(used)) if used.size else 1e-30
    error = np.maximum(np.abs(actual - values) - 4 * LAST_BIT * np.abs(values), 0)
    result: NDArray[np.float64] = error / np.maximum(values.std(axis=others, keepdims=True), least)
    return result


def router_errors(actual: Array, expected: Array) -> Doubles:
    """Errors of the logarithms of a router's probabilities ``[B, E]``, in *margins*.

    Logarithms, because the route depends on the ratio of two probabilities, and a gate matters by its ratio to what it
    should be. The margin is how many nats the best expert is ahead of the second: in the image itself or in the median
    image, whichever is larger. An image at the border between two experts has no margin of its own, but it cannot be
    computed more exactly than other images. Nor can a router of many experts, whose two best are always close: the
    margin is at least what ten experts with scores of the same spread would have. The spread is taken from the median
    absolute deviation, so that experts which are never chosen do not widen it.
    """
    scores = np.log(np.maximum(expected.astype(np.float64), LEAST_PROBABILITY))
    if scores.shape[1] < 2:
        return np.abs(actual - expected.astype(np.float64))
    best = np.sort(scores, axis=1)[:, -2:]
    own = best[:, 1:] - best[:, :1]
    right = likely_scores(expected)
    error = np.abs(likely_scores(actual) - right)
    deviation = np.median(np.abs(right - np.median(right, axis=1, keepdims=True)), axis=1)
    least = max(float(np.median(own)), USUAL_MARGIN * float(np.median(deviation)) / NORMAL_DEVIATION, UNDECIDED)
    result: NDArray[np.float64] = error / np.maximum(own, least)
    return result


def likely_scores(probabilities: Array) -> Doubles:
    """Logarithms of a router's probabilities ``[B, E]``, each at least that of :data:`UNLIKELY`."""
    return np.asarray(np.log(np.maximum(probabilities.astype(np.float64), UNLIKELY)))


def check_probabilities(values: Array, where: str, side: str) -> None:
    """Refuses a router's output that is not probabilities.

    Raises:
        VerificationError: a value is negative, or an image's values do not sum to 1; the message names the ``side``.
    """
    sums = values.astype(np.float64).sum(axis=1)
    worst = int(np.abs(sums - 1).argmax())
    lowest = float(values.min())
    if lowest < 0 or abs(sums[worst] - 1) > SUM_ERROR:
        found = f"one is {lowest:.2g}" if lowest < 0 else f"those of image {worst} sum to {sums[worst]:.4g}"
        raise VerificationError(
            f"{where}: the router does not return probabilities ({side}: {found}); it has to end in a softmax"
        )
