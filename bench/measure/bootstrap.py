"""Statistics with their 95 % intervals, from all samples.

The intervals are percentile intervals of a circular block bootstrap: blocks of neighbouring samples are drawn, not
single ones, since what slows a machine down lasts longer than a sample, and intervals that took samples for
independent would be too narrow. Blocks have the cube root of the number of samples, the usual rate (Politis and
Romano 1992; Lahiri, Resampling Methods for Dependent Data, 2003). Of few samples an interval of p99 says little: no
resample holds anything above the largest one seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.bench.results import Estimate

RESAMPLES = 1000

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Takes samples along the last axis."""


def estimate(samples: Sequence[float], statistic: Statistic) -> Estimate:
    """A statistic of all samples, in their order, with its 95 % interval; seeded."""
    low, high = np.percentile(resampled(samples, statistic), [2.5, 97.5])
    return Estimate(float(statistic(np.asarray(samples, np.float64))), float(low), float(high))


def resampled(samples: Sequence[float], statistic: Statistic, seed: int = 0) -> NDArray[np.float64]:
    """The statistic of :data:`RESAMPLES` bootstrap samples; for two sets of samples, give two seeds."""
    values = np.asarray(samples, np.float64)
    count = len(values)
    length = max(1, round(count ** (1 / 3)))
    starts = np.random.default_rng(seed).integers(0, count, (RESAMPLES, -(-count // length)))
    at_once = max(1, 1_000_000 // count)  # long runs would fill the memory
    found = []
    for part in np.array_split(starts, -(-RESAMPLES // at_once)):
        rows = (part[:, :, None] + np.arange(length)).reshape(len(part), -1)[:, :count] % count
        found.append(statistic(values[rows]))
    return np.concatenate(found)


def quantile_estimate(samples: Sequence[float], percent: float) -> Estimate:
    """A percentile."""
    return estimate(samples, lambda values: np.percentile(values, percent, axis=-1))


def median_estimate(samples: Sequence[float]) -> Estimate:
    """The median."""
    return estimate(samples, lambda values: np.median(values, axis=-1))


def ratio_estimate(samples: Sequence[float], base: Sequence[float]) -> Estimate:
    """Median over the rounds of one's time divided by the other's in the same round."""
    return median_estimate([a / b for a, b in zip(samples, base, strict=True)])
