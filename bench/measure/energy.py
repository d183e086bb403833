"""Energy per prediction from the processor's own counters, if the system allows reading them.

Linux has RAPL's counters and macOS has ``powermetrics``; both usually need root. They count the whole processor, so a
figure includes the energy of other programs and of the idle processor. Without counters there is no figure; nothing is
estimated.
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
"""Length of a measurement. RAPL's counters advance once a millisecond, which does not matter over half a second."""
SAMPLE_SECONDS = 0.05
"""Interval at which powermetrics reports; the first and last sample of a chunk count by their share of time in it."""


class Meter(Protocol):
    """A meter that counts energy."""

    def measure(self, work: Callable[[], object]) -> float:
        """Runs ``work`` and returns the millijoules used meanwhile."""
        ...

    def close(self) -> None: ...


class Rapl:
    """RAPL's counters of all packages, in microjoules; the counters of their parts (cores, memory) are left out."""

    def __init__(self, counters: list[Path]) -> None:
        self.counters = counters

    @classmethod
    def open(cls, folder: Path = POWERCAP) -> Rapl | None:
        """Opens the counters; None if there are none or not all can be read, since part of the energy is no answer."""
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
        self._samples: list[tuple[float, float, float]] = []  # start and end (monotonic clock), millijoules
        self._new = threading.Condition()
        self._ended = False
        threading.Thread(target=self._listen, daemon=True).start()

    @classmethod
    def open(cls) -> Powermetrics | None:
        """Starts the command; None if it is missing or may not be run (as root, or with sudo without a password)."""
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
        """Waits for a sample that extends to ``moment``; False if none arrives within ``seconds``."""
        with self._new:
            self._new.wait_for(lambda: self._ended or bool(self._samples and self._samples[-1][1] >= moment), seconds)
            return bool(self._samples and self._samples[-1][1] >= moment)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        text = b""
        while part := os.read(self._process.stdout.fileno(), 1 << 16):
            arrived = time.monotonic()
            *whole, text = (text + part).split(b"\0")  # a zero byte separates the property lists
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
    """The energy meter of this system, or None."""
    return Rapl.open() or Powermetrics.open()


def measure_energy(
    candidates: Mapping[str, Callable[[int], object]],
    meter: Meter | None,
    chunks: int = 5,
    chunk_seconds: float = CHUNK_SECONDS,
) -> dict[str, Estimate] | None:
    """Measures millijoules per prediction; candidates take turns, each for ``chunks`` times ``chunk_seconds``.

    Returns:
        Estimates by the candidates' names; None without a meter.
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
