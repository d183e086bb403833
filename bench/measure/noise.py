"""Whether times may be quoted: what else the machine did meanwhile, and how much the samples scatter."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from mvmoe_deploy.bench.results import Estimate, Noise

MAX_VARIATION = 0.25
"""Coefficient of variation above which the samples are not of one thing."""

MAX_INTERVAL = 0.05
"""Half the width of the median's interval, relative to it, above which it cannot be told to within 5 %."""

MAX_ELSEWHERE = 0.25
"""Cores kept busy by other processes: above it they take turns, caches and memory bandwidth away."""

MAX_STEAL = 0.02
"""Share of the time that a virtual machine's host kept the processor to itself."""

THROTTLE_COUNTERS = (
    ("/sys/devices/system/cpu", "cpu[0-9]*/thermal_throttle/core_throttle_count"),
    ("/sys/fs/cgroup", "cpu.stat"),
)


@dataclass(frozen=True)
class Moment:
    """What the machine had done until a moment, in seconds of processor time since it started.

    Attributes:
        at: the clock.
        busy: of all processes on all cores.
        own: of this process.
        steal: taken by a virtual machine's host.
        throttled: how often the processor, or this container, was slowed down; None where nobody tells.
    """

    at: float
    busy: float
    own: float
    steal: float
    throttled: int | None


def now() -> Moment:
    """Reads the counters."""
    all_cores, process = psutil.cpu_times(), psutil.Process().cpu_times()
    busy = sum(getattr(all_cores, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
    return Moment(
        time.monotonic(), busy, process.user + process.system, getattr(all_cores, "steal", 0.0), _throttle_count()
    )


def judge(samples: Sequence[float], p50: Estimate, stable: bool, since: Moment, until: Moment) -> Noise:
    """The verdict on samples taken between two moments.

    Args:
        samples: milliseconds.
        p50: their median.
        stable: whether warming up ended because times had settled.
        since: when they began.
        until: when they ended.
    """
    variation, doubts = scatter(samples, p50)
    seconds = max(until.at - since.at, 1e-9)
    elsewhere = max(0.0, (until.busy - since.busy) - (until.own - since.own)) / seconds
    steal = (until.steal - since.steal) / seconds / (os.cpu_count() or 1)
    throttled = None if since.throttled is None or until.throttled is None else until.throttled > since.throttled
    reasons = [
        (not stable, "times had not settled when warming up was given up"),
        (elsewhere > MAX_ELSEWHERE, f"other processes kept {elsewhere:.1f} cores busy"),
        (steal > MAX_STEAL, f"the host of this virtual machine took {steal:.0%} of the time"),
        (bool(throttled), "the processor was throttled"),
    ]
    doubts += [reason for holds, reason in reasons if holds]
    return Noise(variation, os.getloadavg()[0], throttled, doubts)


def scatter(samples: Sequence[float], p50: Estimate) -> tuple[float, list[str]]:
    """The samples' coefficient of variation, and what in the samples themselves speaks against quoting them.

    Args:
        samples: milliseconds.
        p50: their median.
    """
    variation = float(np.std(samples) / np.mean(samples))
    width = (p50.high - p50.low) / 2 / p50.value
    doubts = [
        (variation > MAX_VARIATION, f"times scatter (coefficient of variation {variation:.2f})"),
        (width > MAX_INTERVAL, f"the median is known to ±{width:.0%} only"),
    ]
    return variation, [reason for holds, reason in doubts if holds]


def _throttle_count() -> int | None:
    counts = []
    for folder, pattern in THROTTLE_COUNTERS:
        for file in Path(folder).glob(pattern):
            try:
                text = file.read_text()
            except OSError:
                continue
            found = [
                line.split()[-1] for line in text.splitlines() if file.name != "cpu.stat" or "nr_throttled" in line
            ]
            counts += [int(value) for value in found if value.isdigit()]
    return sum(counts) if counts else None
