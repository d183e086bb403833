"""Whose weights a written piece holds: the check for experts whose outputs are too similar to tell apart."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

FOUND = 0.3
"""A weight counts as found in a bundle if a stored tensor differs from it by less than this share of its size. With 16
values per tensor the difference is below 0.1; another random weight of that size differs by 1.4. A weight that is not
found may have been folded into others by the converter.
"""


@dataclass(frozen=True)
class StoredWeights:
    """The weights of one piece, as a target's exporter reads them back.

    Attributes:
        expected: the checkpoint's weights in the form that the target stores, by name, before rounding.
        found: every weight in the written piece, in any order and layout, widened to float32.
    """

    expected: dict[str, Array]
    found: list[Array]


def whose(a: StoredWeights, b: StoredWeights) -> Literal["own", "other", "equal", "unknown"]:
    """Whether a piece holds its own expert's weights or another's.

    Only weights that differ between the two experts are compared, by their distance from the stored weights.

    Args:
        a: weights of the piece in question.
        b: weights of the other expert's piece.

    Returns:
        ``own`` or ``other``; ``equal`` if both experts have the same weights and the piece holds them; ``unknown`` if
        these weights are not stored in a recognisable form.
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
    """Root mean square difference from the most similar stored weight, whatever the order of its axes."""
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
    """Root mean square; 0 for an empty array."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0
