"""Latency, measured so that a ratio can be trusted: all candidates in one run, interleaved, nothing trimmed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mvmoe_deploy.bench.measure import noise
from mvmoe_deploy.bench.measure.bootstrap import quantile_estimate
from mvmoe_deploy.bench.results import Latency

WINDOW = 10
"""Rounds whose medians are compared to tell whether times have settled."""

SETTLED = 0.05
"""They have when no candidate's median differs by more than this from the window's before."""

MAX_WARMUP_SECONDS = 5.0
"""Warming up is given up after so long (but not before two windows); the rows then say so."""


@dataclass(frozen=True)
class Timed:
    """Milliseconds of candidates that were timed in turn.

    Attributes:
        samples: per candidate, in the order taken, one per round.
        first: of each candidate's first call of all.
        warmup: rounds before the samples.
        stable: whether times had settled by then.
        since, until: what the machine had done when the samples began and ended.
    """

    samples: dict[str, list[float]]
    first: dict[str, float]
    warmup: int
    stable: bool
    since: noise.Moment
    until: noise.Moment

    def latency(self, name: str) -> Latency:
        """Everything that is said of one candidate."""
        samples = self.samples[name]
        p50, p90, p99 = (quantile_estimate(samples, percent) for percent in (50, 90, 99))
        verdict = noise.judge(samples, p50, self.stable, self.since, self.until)
        return Latency(
            first=self.first[name], warmup=self.warmup, p50=p50, p90=p90, p99=p99, noise=verdict, samples=samples
        )


def interleave(
    candidates: Mapping[str, Callable[[int], object]],
    rounds: int,
    min_seconds: float = 0.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timed:
    """Times candidates in turn, so that whatever else the machine does falls on all alike.

    Args:
        candidates: by name, what to time; each is given the round's number (to pick an image by).
        rounds: fewest samples per candidate; each round has an order of its own, since whoever runs next to itself, or
            after a small model, finds its weights in the processor's cache.
        min_seconds: sampling goes on for at least so long.
        progress: called after each round with how many of the samples are there, and how many it will be about.
        clock: seconds.
    """
    order = random.Random(0)
    names = list(candidates)

    def round_of(number: int, into: dict[str, list[float]]) -> None:
        for name in order.sample(names, len(names)):
            started = clock()
            candidates[name](number)
            into[name].append(1e3 * (clock() - started))

    warmup: dict[str, list[float]] = {name: [] for name in names}
    started, stable, count = clock(), False, 0
    while not stable and (count < 2 * WINDOW or clock() - started < MAX_WARMUP_SECONDS):
        round_of(count, warmup)
        count += 1
        stable = count % WINDOW == 0 and all(map(_settled, warmup.values()))
    samples: dict[str, list[float]] = {name: [] for name in names}
    since, started, done = noise.now(), clock(), 0
    while done < rounds or clock() - started < min_seconds:
        round_of(count + done, samples)
        done += 1
        elapsed = max(clock() - started, 1e-9)
        progress(done, max(rounds, round(done * min_seconds / elapsed), done))
    first = {name: values[0] for name, values in warmup.items()}
    return Timed(samples, first, count, stable, since, noise.now())


def _settled(values: Sequence[float]) -> bool:
    if len(values) < 2 * WINDOW:
        return False
    before, last = np.median(values[-2 * WINDOW : -WINDOW]), np.median(values[-WINDOW:])
    return bool(abs(last / before - 1) <= SETTLED)
