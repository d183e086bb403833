"""Energy per prediction from the processor's own counters (RAPL), where the system lets us read them.

The counters are of whole packages: what everything else on the machine used meanwhile, and what the processor uses
when idle, is in the figures. Nothing is estimated where there are none.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mvmoe_deploy.bench.bootstrap import median_estimate
from mvmoe_deploy.bench.results import Estimate

POWERCAP = Path("/sys/class/powercap")
CHUNK_SECONDS = 0.5
"""The counters advance once a millisecond; over half a second that does not matter."""


def packages(folder: Path = POWERCAP) -> list[Path]:
    """Folders of the packages' counters that can be read; those of their parts (cores, memory) are left out."""
    found = []
    for each in sorted(folder.glob("intel-rapl:*")) if folder.is_dir() else []:
        if re.fullmatch(r"intel-rapl:\d+", each.name):
            try:
                int((each / "energy_uj").read_text())
                found.append(each)
            except (OSError, ValueError):
                return []  # a part of the machine's energy is no answer
    return found


def measure_energy(
    candidates: Mapping[str, Callable[[int], object]],
    chunks: int = 5,
    folder: Path = POWERCAP,
    chunk_seconds: float = CHUNK_SECONDS,
) -> dict[str, Estimate] | None:
    """Millijoules per prediction, candidates in turn, each for ``chunks`` times half a second.

    Returns:
        None where there are no counters, or we may not read them.
    """
    counters = packages(folder)
    if not counters:
        return None
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(chunks):
        for name, predict in candidates.items():
            before, started, count = [_read(c, "energy_uj") for c in counters], time.monotonic(), 0
            while not count or time.monotonic() - started < chunk_seconds:
                predict(count)
                count += 1
            used = 0
            for counter, start in zip(counters, before, strict=True):
                difference = _read(counter, "energy_uj") - start
                used += difference if difference >= 0 else difference + _read(counter, "max_energy_range_uj")
            taken[name].append(used / 1e3 / count)
    return {name: median_estimate(values) for name, values in taken.items()}


def _read(counter: Path, name: str) -> int:
    return int((counter / name).read_text())
