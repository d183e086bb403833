"""Energy per prediction from the processor's own counters, where the system lets us read them.

Linux has RAPL's counters, macOS ``powermetrics``; both usually take root. They count the whole processor: a figure
includes what other programs used meanwhile, and what the processor uses when idle. Where there are no counters there is
no figure; nothing is estimated.
"""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from mvmoe_deploy.bench.measure.bootstrap import median_estimate
from mvmoe_deploy.bench.results import Estimate

POWERCAP = Path("/sys/class/powercap")
CHUNK_SECONDS = 0.5
"""RAPL's counters advance once a millisecond; over half a second that does not matter."""
SAMPLE_SECONDS = 0.05
"""How often powermetrics reports; what a chunk has of the first and the last sample is taken by time."""


class Meter(Protocol):
    """Something that counts energy."""

    def measure(self, work: Callable[[], object]) -> float:
        """Millijoules used while ``work`` ran."""
        ...

    def close(self) -> None: ...


class Rapl:
    """The counters of all packages, in microjoules; those of their parts (cores, memory) are left out."""

    def __init__(self, counters: list[Path]) -> None:
        self.counters = counters

    @classmethod
    def open(cls, folder: Path = POWERCAP) -> Rapl | None:
        """None where there are no counters, or we may not read them all: a part of the energy is no answer."""
        found = []
        for each in sorted(folder.glob("intel-rapl:*")) if folder.is_dir() else []:
            if re.fullmatch(r"intel-rapl:\d+", each.name):
                try:
                    int((each / "energy_uj").read_text())
                    found.append(each)
                except (OSError, ValueError):
                    return None
        return cls(found) if found else None

    def measure(self, work: Callable[[], object]) -> float:
        before = [self._read(counter, "energy_uj") for counter in self.counters]
        work()
        used = 0
        for counter, start in zip(self.counters, before, strict=True):
            difference = self._read(counter, "energy_uj") - start
            used += difference if difference >= 0 else difference + self._read(counter, "max_energy_range_uj")
        return used / 1e3

    def close(self) -> None:
        pass

    @staticmethod
    def _read(counter: Path, name: str) -> int:
        return int((counter / name).read_text())


class Powermetrics:
    """Apple's ``powermetrics``: a property list per sample with the millijoules of CPU, GPU and neural engine."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._samples: list[tuple[float, float, float]] = []  # from, to (monotonic), millijoules
        self._new = threading.Condition()
        self._ended = False
        threading.Thread(target=self._listen, daemon=True).start()

    @classmethod
    def open(cls) -> Powermetrics | None:
        """None where there is no such command, or we may not run it (as root, or by sudo without a password)."""
        if shutil.which("powermetrics") is None:
            return None
        options = ["--samplers", "cpu_power", "--format", "plist", "--buffer-size", "0"]
        command = ["powermetrics", *options, "--sample-rate", str(round(1e3 * SAMPLE_SECONDS))]
        if os.geteuid() != 0:
            command = ["sudo", "-n", *command]
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError:
            return None
        meter = cls(process)
        if meter._wait_until(time.monotonic()):
            return meter
        meter.close()
        return None

    def measure(self, work: Callable[[], object]) -> float:
        started = time.monotonic()
        work()
        ended = time.monotonic()
        if not self._wait_until(ended):
            raise OSError("powermetrics ended")
        with self._new:
            samples = list(self._samples)
        return sum(
            energy * max(0.0, min(until, ended) - max(since, started)) / (until - since)
            for since, until, energy in samples
        )

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _wait_until(self, moment: float, seconds: float = 10) -> bool:
        """Waits for a sample that reaches up to ``moment``; False if none comes."""
        with self._new:
            self._new.wait_for(lambda: self._ended or bool(self._samples and self._samples[-1][1] >= moment), seconds)
            return bool(self._samples and self._samples[-1][1] >= moment)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        text = b""
        while part := os.read(self._process.stdout.fileno(), 1 << 16):
            arrived = time.monotonic()
            *whole, text = (text + part).split(b"\0")  # which ends each list, but the first begins with none
            if text.rstrip().endswith(b"</plist>"):
                whole, text = [*whole, text], b""
            for each in filter(bytes.strip, whole):
                sample = plistlib.loads(each.strip())
                energy = sum(sample["processor"].get(f"{unit}_energy", 0) for unit in ("cpu", "gpu", "ane"))
                with self._new:
                    since = self._samples[-1][1] if self._samples else arrived - sample["elapsed_ns"] / 1e9
                    self._samples.append((since, arrived, energy))
                    self._new.notify_all()
        with self._new:
            self._ended = True
            self._new.notify_all()


def open_meter() -> Meter | None:
    """What counts energy here, or None."""
    return Rapl.open() or Powermetrics.open()


def measure_energy(
    candidates: Mapping[str, Callable[[int], object]],
    meter: Meter | None,
    chunks: int = 5,
    chunk_seconds: float = CHUNK_SECONDS,
) -> dict[str, Estimate] | None:
    """Millijoules per prediction, candidates in turn, each for ``chunks`` times half a second.

    Returns:
        None where there is no meter.
    """
    if meter is None:
        return None
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(chunks):
        for name, predict in candidates.items():
            count = 0

            def work(predict: Callable[[int], object] = predict) -> None:
                nonlocal count
                started = time.monotonic()
                while not count or time.monotonic() - started < chunk_seconds:
                    predict(count)
                    count += 1

            used = meter.measure(work)
            taken[name].append(used / count)
    meter.close()
    return {name: median_estimate(values) for name, values in taken.items()}
