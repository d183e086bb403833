"""Whose weights a written piece holds: what verifies experts whose outputs are too alike to tell them apart."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

FOUND = 0.3
"""A weight is in a bundle if something there differs from it by less than this share of its size. Sixteen values per
tensor come within 0.1, another random weight of that size differs by 1.4; a converter may have folded it into others.
"""


@dataclass(frozen=True)
class StoredWeights:
    """The weights of one piece; a target's exporter reads them.

    Attributes:
        expected: what the target stores of the checkpoint's weights, by name, before it rounds them.
        found: every weight in the written piece, in any order and layout, widened to float32.
    """

    expected: dict[str, Array]
    found: list[Array]


def whose(a: StoredWeights, b: StoredWeights) -> Literal["own", "other", "equal", "unknown"]:
    """Whether a piece holds its own expert's weights or another's.

    The two are compared over the weights in which they differ, by their distance from what was stored.

    Args:
        a: of the piece in question.
        b: of the other expert's piece.

    Returns:
        ``equal`` where both experts have the same weights and the piece holds them; ``unknown`` where these weights
        are not stored as they are.
    """
    differing = _differing(a, b)
    mine = theirs = 0.0
    known = False
    for name in differing or a.expected:
        own = distance(a.expected[name], a.found)
        other = distance(b.expected[name], a.found) if differing else own
        if min(own, other) <= FOUND * rms(a.expected[name]):
            known = True
            mine += own**2 * a.expected[name].size
            theirs += other**2 * a.expected[name].size
    if not known:
        return "unknown"
    if not differing:
        return "equal"
    return "other" if theirs < mine else "own"


def same_weights(a: StoredWeights, b: StoredWeights) -> bool:
    """Whether two experts have equal weights in the checkpoint."""
    return not _differing(a, b)


def _differing(a: StoredWeights, b: StoredWeights) -> list[str]:
    shared = a.expected.keys() & b.expected.keys()
    return [name for name in a.expected if name in shared and not np.array_equal(a.expected[name], b.expected[name])]


def distance(weight: Array, found: list[Array]) -> float:
    """Root mean square difference to the most similar of the stored weights, whatever the order of its axes."""
    closest = np.inf
    for stored in found:
        if stored.size != weight.size:
            continue
        if stored.ndim == weight.ndim:
            candidates = [stored.transpose(order) for order in permutations(range(stored.ndim))]
        else:
            candidates = [stored.reshape(weight.shape)]
        for candidate in candidates:
            if candidate.shape == weight.shape:
                closest = min(closest, rms(candidate - weight))
    return closest


def rms(values: Array) -> float:
    """Root mean square; 0 of nothing."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0
