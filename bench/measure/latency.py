"""Measures latency so that ratios can be trusted: all candidates run interleaved in one run, and nothing is trimmed."""

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
"""Number of rounds in a window; the medians of two windows are compared to see whether times have settled."""

SETTLED = 0.05
"""Times have settled when no candidate's median differs by more than this share from the previous window's median."""

MAX_WARMUP_SECONDS = 5.0
"""Warming up is abandoned after this time (but not before two windows); the rows then say so."""


@dataclass(frozen=True)
class Timed:
    """Milliseconds of candidates that were timed in turn.

    Attributes:
        samples: times per candidate in the order taken, one per round.
        first: time of each candidate's very first call.
        warmup: number of rounds before the samples.
        stable: whether times had settled when the samples began.
        since, until: the machine's counters when the samples began and ended.
    """

    samples: dict[str, list[float]]
    first: dict[str, float]
    warmup: int
    stable: bool
    since: noise.Moment
    until: noise.Moment

    def latency(self, name: str) -> Latency:
        """The latency record of one candidate."""
        samples = self.samples[name]
        p50, p90, p99 = (quantile_estimate(samples, percent) for percent in (50, 90, 99))
        verdict = noise.judge(samples=samples, p50=p50, stable=self.stable, since=self.since, until=self.until)
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
    """Times candidates in turn, so that whatever else the machine does affects all of them alike.

    Each round has its own order: a candidate that runs right after itself, or after a small model, finds its weights in
    the processor's cache.

    Args:
        candidates: the functions to time, by name; each is given the round's number (to pick an image).
        rounds: least number of samples per candidate.
        min_seconds: least time that sampling takes.
        progress: called after each round with the number of samples so far and the expected total.
        clock: returns seconds.
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
    return Timed(samples=samples, first=first, warmup=count, stable=stable, since=since, until=noise.now())


def _settled(values: Sequence[float]) -> bool:
    if len(values) < 2 * WINDOW:
        return False
    before, last = np.median(values[-2 * WINDOW : -WINDOW]), np.median(values[-WINDOW:])
    return bool(abs(last / before - 1) <= SETTLED)
