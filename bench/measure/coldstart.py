"""Cold start: the time from starting a process to its first prediction, with configurations taking turns."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mvmoe_deploy.bench.candidates.configuration import Configuration
from mvmoe_deploy.bench.measure.bootstrap import median_estimate
from mvmoe_deploy.bench.measure.fresh import fresh_environment
from mvmoe_deploy.bench.results import ColdStart
from mvmoe_deploy.errors import BackendError

SCRIPT = Path(__file__).with_name("first_prediction.py")


def measure_cold_start(
    configurations: Sequence[Configuration],
    image: Path,
    threads: int = 1,
    repeats: int = 10,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, ColdStart]:
    """Starts ``repeats`` processes per configuration, in an order shuffled every round.

    Files are in the page cache, so the disk's speed is not part of the time: each configuration is started once before
    the measured starts. That start also compiles Python's files, as an installer does, even where the environment asks
    Python not to keep them: compiling this project's files at every start would take 20 ms.

    Args:
        configurations: the configurations to start.
        image: a ``.npy`` file of decoded images of the models' size; the first is predicted.
        threads: threads of the engine.
        repeats: number of processes per configuration.
        progress: called with the number of finished processes and their total number.

    Returns:
        Cold starts by the configurations' names.

    Raises:
        BackendError: a process failed.
    """
    order = random.Random(0)
    taken: dict[str, list[list[float]]] = {c.name: [] for c in configurations}
    total = (repeats + 1) * len(configurations)
    done = 0
    for number in range(-1, repeats):
        for c in order.sample(list(configurations), len(configurations)):
            steps = _start(c, image, threads)
            if number >= 0:
                taken[c.name].append(steps)
            done += 1
            progress(done, total)
    result = {}
    for name, samples in taken.items():
        interpreter, imports, load, first_run = (list(column) for column in zip(*samples, strict=True))
        result[name] = ColdStart(
            interpreter=interpreter,
            imports=imports,
            load=load,
            first_run=first_run,
            total=median_estimate([sum(s) for s in samples]),
        )
    return result


def _start(c: Configuration, image: Path, threads: int) -> list[float]:
    """Starts one process and returns the milliseconds of interpreter, imports, load and first run."""
    scale = [",".join(map(str, values)) for values in (c.preprocessing.mean, c.preprocessing.std)]
    arguments = [c.opened_as, c.backend, c.path, str(image), str(threads)]
    command = [sys.executable, "-P", str(SCRIPT), *arguments, *(scale if c.opened_as in ("graph", "pieces") else [])]
    environment = fresh_environment()
    before = time.monotonic()  # all processes of a machine share this clock
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise BackendError(f"{c.name}: measuring the cold start failed: {lines[-1] if lines else done.returncode}")
    moments = [before, *map(float, done.stdout.splitlines()[-1].split())]
    return [1e3 * (b - a) for a, b in itertools.pairwise(moments)]
