"""What a bundle costs by its number of experts E: nothing that one image needs may grow with E."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

import mvmoe_deploy
from mvmoe_deploy.bench.candidates.baselines import random_checkpoint
from mvmoe_deploy.bench.candidates.prepare import of_bundle
from mvmoe_deploy.bench.measure.coldstart import measure_cold_start
from mvmoe_deploy.bench.measure.latency import interleave
from mvmoe_deploy.bench.measure.memory import measure_memory
from mvmoe_deploy.bundle import MANIFEST
from mvmoe_deploy.exporters.exporter import Options
from mvmoe_deploy.exporters.pipeline import export_checkpoint
from mvmoe_deploy.models import config_from_name
from mvmoe_deploy.runtime import Runtime
from mvmoe_deploy.terminal import Cell

EXPERTS = (10, 50, 200, 1000)
SCALES = ("6x64", "12x192")

HEADERS = [
    "scale",
    "E",
    "export s",
    "export ms / expert",
    "manifest kB",
    "open ms",
    "first prediction ms",
    "switch ms",
    "memory MB",
]


class Row(msgspec.Struct):
    """What a bundle with E experts costs.

    Attributes:
        scale: such as ``6x64``.
        experts: E.
        export: seconds that exporting the checkpoint takes, verification included.
        manifest: bytes of the manifest.
        open: median milliseconds of opening the bundle in a fresh process.
        first: median milliseconds of the first prediction after that, which loads an expert.
        switch: median milliseconds of running an image whose expert is not resident, with room for one.
        memory: median bytes with one resident expert, after all have taken turns; None where the system does not say.
    """

    scale: str
    experts: int
    export: float
    manifest: int
    open: float
    first: float
    switch: float
    memory: int | None


def measure(
    scale: str,
    experts: list[int],
    folder: Path,
    *,
    layout: str = "",
    rounds: int = 50,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Exports models of random weights and measures them in turn.

    Args:
        scale: such as ``6x64``.
        experts: the numbers of experts.
        folder: an empty folder for checkpoints and bundles.
        layout: of the bundles; the target's default if empty.
        rounds: switches; half as many fresh processes for first predictions, and a sixth for memory.
        progress: called with the step about to begin.
    """
    seconds: dict[int, float] = {}
    paths: dict[int, Path] = {}
    for count in experts:
        progress(f"{scale}, E = {count}: exporting")
        config = config_from_name(f"mvmoe_{scale}", experts=count)
        checkpoint = random_checkpoint(config, folder / f"{scale}-{count}.pt")
        started = time.perf_counter()
        paths[count] = export_checkpoint(
            checkpoint, "onnx", folder / f"{scale}-{count}.mvmoe", options=Options(layout=layout)
        ).path
        seconds[count] = time.perf_counter() - started
        checkpoint.unlink()
    configurations = {count: of_bundle(path, name=str(count)) for count, path in paths.items()}
    size = configurations[experts[0]].preprocessing.size
    image = folder / "image.npy"
    np.save(image, np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8))
    progress(f"{scale}: first predictions")
    starts = measure_cold_start(list(configurations.values()), image, repeats=max(1, rounds // 2))
    progress(f"{scale}: switches")
    switches = _switches(paths, rounds)
    progress(f"{scale}: memory")
    # in turn and more than once: where the allocator finds room differs by a megabyte from process to process
    used: dict[int, list[int]] = {count: [] for count in experts}
    for _ in range(max(1, rounds // 6)):
        for count, c in configurations.items():
            found = measure_memory(c, sweep=False)
            used[count] += [found.used.total] if found else []
    return [
        Row(
            scale=scale,
            experts=count,
            export=seconds[count],
            manifest=(path / MANIFEST).stat().st_size,
            open=statistics.median(starts[str(count)].load),
            first=statistics.median(starts[str(count)].first_run),
            switch=statistics.median(switches[count]),
            memory=int(statistics.median(used[count])) if used[count] else None,
        )
        for count, path in paths.items()
    ]


def _switches(paths: dict[int, Path], rounds: int) -> dict[int, list[float]]:
    """Milliseconds of images whose experts are not resident, with all bundles in turn."""
    runtimes = {count: mvmoe_deploy.load(path, max_resident=1) for count, path in paths.items()}
    size = next(iter(runtimes.values())).bundle.manifest.preprocessing.size
    batch = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)

    def switch(runtime: Runtime, number: int) -> None:
        routing = runtime.bundle.manifest.routing
        assert routing is not None
        # ten experts, whatever E: the first use of a file compares its sha256
        runtime.run(batch, np.array([[number % min(10, routing.experts)]]))

    for runtime in runtimes.values():
        for number in range(10):
            switch(runtime, number)
    calls = {str(count): (lambda n, r=runtime: switch(r, n)) for count, runtime in runtimes.items()}
    samples = interleave(calls, rounds).samples
    for runtime in runtimes.values():
        runtime.close()
    return {int(name): values for name, values in samples.items()}


def table_of(rows: list[Row]) -> list[list[Cell]]:
    """The rows as cells below :data:`HEADERS`."""
    return [
        [
            row.scale,
            row.experts,
            f"{row.export:.1f}",
            f"{1e3 * row.export / row.experts:.0f}",
            f"{row.manifest / 1e3:.0f}",
            f"{row.open:.2f}",
            f"{row.first:.2f}",
            f"{row.switch:.2f}",
            None if row.memory is None else f"{row.memory / 1e6:.1f}",
        ]
        for row in rows
    ]


def missed(rows: list[Row]) -> list[str]:
    """What misses its bar: E = 200 against E = 10, of each scale that has both."""
    found = []
    for scale in dict.fromkeys(row.scale for row in rows):
        by_count = {row.experts: row for row in rows if row.scale == scale}
        few, many = by_count.get(10), by_count.get(200)
        if few is None or many is None:
            continue
        for what, ratio, bar in (
            ("opening and first prediction", (many.open + many.first) / (few.open + few.first), 1.2),
            ("memory", many.memory / few.memory if many.memory and few.memory else 0.0, 1.02),
            ("export", many.export / few.export, 2.0),
        ):
            if ratio > bar:
                found.append(f"{scale}: {what} at E = 200 is {ratio:.3f} of that at E = 10, the bar is {bar}")
    return found
