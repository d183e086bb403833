"""Statistics of all samples, with 95 % intervals.

The intervals are percentile intervals of a circular block bootstrap. It draws blocks of neighbouring samples instead
of single samples: whatever slows a machine down lasts longer than a sample, so intervals that treated samples as
independent would be too narrow. The block length is the cube root of the number of samples, the usual rate (Politis
and Romano 1992; Lahiri, Resampling Methods for Dependent Data, 2003). With few samples an interval of p99 says little,
because no resample holds anything above the largest sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.bench.results import Estimate

RESAMPLES = 1000

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Function that reduces samples along the last axis."""


def estimate(samples: Sequence[float], statistic: Statistic) -> Estimate:
    """A statistic of all samples (in the order taken) with its 95 % interval; the bootstrap is seeded."""
    low, high = np.percentile(resampled(samples, statistic), [2.5, 97.5])
    return Estimate(float(statistic(np.asarray(samples, np.float64))), float(low), float(high))


def resampled(samples: Sequence[float], statistic: Statistic, seed: int = 0) -> NDArray[np.float64]:
    """The statistic of :data:`RESAMPLES` bootstrap samples; use different seeds for two independent sets of samples."""
    values = np.asarray(samples, np.float64)
    count = len(values)
    length = max(1, round(count ** (1 / 3)))
    starts = np.random.default_rng(seed).integers(0, count, (RESAMPLES, -(-count // length)))
    at_once = max(1, 1_000_000 // count)  # with many samples, all resamples at once would fill the memory
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
    """Median over the rounds of the ratio of two candidates' times in the same round."""
    return median_estimate([a / b for a, b in zip(samples, base, strict=True)])
