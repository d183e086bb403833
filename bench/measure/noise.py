"""Decides whether times may be quoted, from the machine's other load and the scatter of the samples."""

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
"""Coefficient of variation above which the samples do not describe one steady state."""

MAX_INTERVAL = 0.05
"""Half the width of the median's interval, relative to the median; above it the median is not known to within 5 %."""

MAX_ELSEWHERE = 0.25
"""Number of cores that other processes may keep busy; more take processor time, caches and memory bandwidth away."""

MAX_STEAL = 0.02
"""Largest share of the time that a virtual machine's host may take the processor away."""

THROTTLE_COUNTERS = (
    ("/sys/devices/system/cpu", "cpu[0-9]*/thermal_throttle/core_throttle_count"),
    ("/sys/fs/cgroup", "cpu.stat"),
)


@dataclass(frozen=True)
class Moment:
    """The machine's counters at one moment, in seconds of processor time since it started.

    Attributes:
        at: clock time, in seconds.
        busy: processor time of all processes on all cores.
        own: processor time of this process.
        steal: processor time taken by a virtual machine's host.
        throttled: how often the processor, or this container, was slowed down; None if the system does not report it.
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
        at=time.monotonic(),
        busy=busy,
        own=process.user + process.system,
        steal=getattr(all_cores, "steal", 0.0),
        throttled=_throttle_count(),
    )


def judge(samples: Sequence[float], p50: Estimate, stable: bool, since: Moment, until: Moment) -> Noise:
    """The verdict on samples that were taken between two moments.

    Args:
        samples: times in milliseconds.
        p50: median of the samples.
        stable: whether warming up ended because times had settled.
        since: counters when the samples began.
        until: counters when the samples ended.
    """
    variation, doubts = scatter(samples, p50)
    seconds = max(until.at - since.at, 1e-9)
    elsewhere = max(0.0, (until.busy - since.busy) - (until.own - since.own)) / seconds
    steal = (until.steal - since.steal) / seconds / (os.cpu_count() or 1)
    throttled = None if since.throttled is None or until.throttled is None else until.throttled > since.throttled
    reasons = [
        (not stable, "times had not settled when warming up was abandoned"),
        (elsewhere > MAX_ELSEWHERE, f"other processes kept {elsewhere:.1f} cores busy"),
        (steal > MAX_STEAL, f"the host of this virtual machine took {steal:.0%} of the time"),
        (bool(throttled), "the processor was throttled"),
    ]
    doubts += [reason for holds, reason in reasons if holds]
    return Noise(variation, os.getloadavg()[0], throttled, doubts)


def scatter(samples: Sequence[float], p50: Estimate) -> tuple[float, list[str]]:
    """The samples' coefficient of variation, and the reasons in the samples themselves for not quoting them.

    Args:
        samples: times in milliseconds.
        p50: median of the samples.
    """
    variation = float(np.std(samples) / np.mean(samples))
    width = (p50.high - p50.low) / 2 / p50.value
    doubts = [
        (variation > MAX_VARIATION, f"times scatter (coefficient of variation {variation:.2f})"),
        (width > MAX_INTERVAL, f"the median is known only to ±{width:.0%}"),
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
