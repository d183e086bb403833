"""Measures a model's memory: the proportional set size beyond that of the process just before the model was opened.

Each figure comes from a fresh process, because a process keeps memory that it has allocated and freed. The engine is
imported before the first reading. The kernel separates anonymous from file-backed memory (``smaps_rollup``).
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from mvmoe_deploy.bench.candidates.configuration import (
    Configuration,
    Opened,
    expert_turn,
    import_engine,
    open_configuration,
    synthetic_batch,
)
from mvmoe_deploy.bench.measure.fresh import answer, in_fresh_process
from mvmoe_deploy.bench.results import Memory, MemoryPoint

PREDICTIONS = 100
IMAGES = 64
"""Number of random images shown in turn: enough that a graph that routes by itself sends some to every expert."""

ROLLUP = Path("/proc/self/smaps_rollup")


class _Request(msgspec.Struct):
    configuration: Configuration
    threads: int
    sweep: bool


class _Answer(msgspec.Struct):
    points: list[MemoryPoint]
    peak: int


def measure_memory(c: Configuration, threads: int = 1, sweep: bool = True) -> Memory | None:
    """Measures a configuration in fresh processes.

    Args:
        c: the configuration to measure.
        threads: threads of the engine.
        sweep: whether a second process also measures memory after each further expert became resident; otherwise
            ``by_resident`` is empty.

    Returns:
        The memory, or None if the platform has no proportional set size (only Linux has).

    Raises:
        BackendError: a process failed.
    """
    if not ROLLUP.exists():
        return None
    what = f"{c.name}: measuring memory failed"
    bounded = in_fresh_process("measure.memory", _Request(c, threads, False), _Answer, what)
    loaded, used = bounded.points
    has_tails = c.experts and c.opened_as == "bundle"
    by_resident = [] if has_tails else [used]
    if sweep and has_tails:
        by_resident = in_fresh_process("measure.memory", _Request(c, threads, True), _Answer, what).points
    return Memory(loaded, used, by_resident, bounded.peak)


def _measure(request: _Request) -> _Answer:
    c = request.configuration
    import_engine(c.backend)
    batches = synthetic_batch(c, IMAGES)
    pixels = np.zeros((c.preprocessing.size, c.preprocessing.size, 3), np.uint8)
    before = _now()
    start_of_peak = _reset_peak()
    model = open_configuration(c, request.threads, None if request.sweep else c.k)
    points = []
    if request.sweep:
        for count in range(1, c.experts + 1):
            experts = np.array([[(count - 1 + i) % c.experts for i in range(c.k)]])
            for _ in range(3):  # a graph's second run may still allocate memory that it keeps
                model.run(batches[:1], experts)
            points.append(_point(model, before))
    else:
        points.append(_point(model, before))
        model.predict(pixels)
        for number in range(PREDICTIONS):
            # all experts take turns, so that the figure includes evictions
            row = number % IMAGES
            model.run(batches[row : row + 1], expert_turn(c, number))
        points.append(_point(model, before))
    return _Answer(points, max(0, _status("VmHWM") - start_of_peak))


def _point(model: Opened, before: dict[str, int]) -> MemoryPoint:
    now = _now()
    stats = model.stats()
    ledger = None if stats is None else stats.fixed_bytes + stats.resident_bytes + stats.unfreed_bytes
    return MemoryPoint(
        0 if stats is None else len(stats.resident),
        now["Pss_Anon"] - before["Pss_Anon"],
        now["Pss"] - now["Pss_Anon"] - (before["Pss"] - before["Pss_Anon"]),
        ledger,
    )


def proportional_set_size() -> int:
    """Proportional set size of this process, in bytes (Linux only)."""
    return _now()["Pss"]


def _now() -> dict[str, int]:
    """Reads the fields of smaps_rollup in bytes; file-backed is all that is not anonymous (files and shared memory)."""
    lines = ROLLUP.read_text(encoding="utf-8").splitlines()[1:]
    return {name: 1024 * int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}


def _reset_peak() -> int:
    """Resets the peak to the current usage if the kernel allows it; returns the current usage."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return _status("VmHWM")
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


if __name__ == "__main__":
    answer(_Request, _measure)
