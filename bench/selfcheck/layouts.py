"""What the layouts of ONNX bundles cost beside each other: warm and switching latency, memory, start, delivery."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

import mvmoe_deploy
from mvmoe_deploy.bench.candidates.baselines import random_checkpoint
from mvmoe_deploy.bench.candidates.configuration import Configuration, expert_turn, synthetic_batch
from mvmoe_deploy.bench.candidates.prepare import of_bundle
from mvmoe_deploy.bench.measure.bootstrap import ratio_estimate
from mvmoe_deploy.bench.measure.coldstart import measure_cold_start
from mvmoe_deploy.bench.measure.latency import interleave
from mvmoe_deploy.bench.measure.memory import measure_memory
from mvmoe_deploy.exporters.exporter import Options
from mvmoe_deploy.exporters.pipeline import export_checkpoint
from mvmoe_deploy.models import config_from_name
from mvmoe_deploy.terminal import Cell

LAYOUTS = ("separate", "swappable")

HEADERS = [
    "model",
    "layout",
    "warm ms",
    "warm ratio",
    "switch ms",
    "cold ms",
    "memory MB",
    "first image MB",
    "further expert MB",
]


class Row(msgspec.Struct):
    """What a model costs in one layout.

    Attributes:
        model: its name.
        layout: its layout.
        warm: median milliseconds of an image, trunk included, whose expert is resident.
        warm_ratio: the same against the first layout, the median over rounds.
        switch: median milliseconds of an image, trunk included, whose expert is not resident, with room for one.
        cold: median milliseconds from starting a process to its first prediction.
        memory: bytes with one resident expert, after all have taken turns; None where the system does not say.
        first: bytes of the files that the first image needs, its expert's included.
        further: mean bytes of the files that a further expert needs.
    """

    model: str
    layout: str
    warm: float
    warm_ratio: float
    switch: float
    cold: float
    memory: int | None
    first: int
    further: float


def measure(
    name: str,
    checkpoint: Path | None,
    folder: Path,
    *,
    precision: str = "",
    rounds: int = 100,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """A row per layout; the bundles are measured in turn.

    Args:
        name: the model's name; without a checkpoint, a scale such as ``12x192``, whose weights are then random.
        checkpoint: a routed model.
        folder: folder for the bundles; those that are in it are used again.
        precision: of the bundles; the target's default if empty.
        rounds: warm images and switches, and a tenth as many fresh processes.
        progress: called with the step about to begin.
    """
    bundles: dict[str, Configuration] = {}
    for layout in LAYOUTS:
        out = folder / f"{'-'.join(filter(None, (name, precision, layout)))}.mvmoe"
        if not out.exists():
            progress(f"{name}, {layout}: exporting")
            if checkpoint is None:
                checkpoint = random_checkpoint(config_from_name(f"mvmoe_{name}"), folder / f"{name}.pt")
            export_checkpoint(checkpoint, "onnx", out, options=Options(precision, layout))
        bundles[layout] = of_bundle(out, name=layout)
    progress(f"{name}: latency")
    warm, switch = _latencies(bundles, rounds)
    first = bundles[LAYOUTS[0]]
    image = folder / f"{name}.npy"
    size = first.preprocessing.size
    np.save(image, np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8))
    progress(f"{name}: cold start")
    starts = measure_cold_start(list(bundles.values()), image, repeats=max(1, rounds // 10))
    progress(f"{name}: memory")
    memory = {layout: measure_memory(c, sweep=False) for layout, c in bundles.items()}
    return [
        Row(
            model=name,
            layout=layout,
            warm=statistics.median(warm[layout]),
            warm_ratio=ratio_estimate(warm[layout], warm[LAYOUTS[0]]).value,
            switch=statistics.median(switch[layout]),
            cold=starts[layout].total.value,
            memory=found.used.total if (found := memory[layout]) else None,
            first=c.bytes_first_image,
            further=statistics.mean(c.bytes_per_expert),
        )
        for layout, c in bundles.items()
    ]


def _latencies(bundles: dict[str, Configuration], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of images whose expert is resident, and of images whose expert is not, by layout."""
    found = []
    for resident in (True, False):
        runtimes = {layout: mvmoe_deploy.load(c.path, max_resident=c.k) for layout, c in bundles.items()}
        calls = {}
        for layout, c in bundles.items():
            batch = synthetic_batch(c)

            def run(number: int, c=c, batch=batch, runtime=runtimes[layout]) -> None:  # type: ignore[no-untyped-def]
                runtime.run(batch, expert_turn(c, 0 if resident else number))  # noqa: B023

            for number in range(c.experts):  # the first use of a file compares its sha256
                runtimes[layout].run(batch, expert_turn(c, number))
            calls[layout] = run
        found.append(interleave(calls, rounds).samples)
        for runtime in runtimes.values():
            runtime.close()
    return found[0], found[1]


def table_of(rows: list[Row]) -> list[list[Cell]]:
    """The rows as cells below :data:`HEADERS`."""
    return [
        [
            row.model,
            row.layout,
            f"{row.warm:.3f}",
            f"{row.warm_ratio:.3f}",
            f"{row.switch:.2f}",
            f"{row.cold:.0f}",
            None if row.memory is None else f"{row.memory / 1e6:.1f}",
            f"{row.first / 1e6:.2f}",
            f"{row.further / 1e6:.3f}",
        ]
        for row in rows
    ]
