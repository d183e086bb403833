"""Residency sweeps: what each further resident expert gains under different mixes of images.

A mix is a seeded sequence of groups of images, with as many groups as experts:

- ``uniform``: each image's group is drawn independently, with equal probabilities.
- ``skewed``: each image's group is drawn independently; the i-th group of a shuffled order has a probability
  proportional to 1 / i (Zipf).
- ``bursts``: a group drawn as in ``uniform`` stays for a geometrically distributed number of images, 20 on average
  (as when a user takes several photos of one kind).

With labelled images, a group is a super-class: the images belong to that super-class, and the router routes them,
mistakes included. Without labels, a group is an expert, and the route to it is forced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.bench.candidates.configuration import Configuration, import_engine, open_configuration
from mvmoe_deploy.bench.measure import memory
from mvmoe_deploy.bench.measure.fresh import answer, in_fresh_process
from mvmoe_deploy.bench.results import Residency
from mvmoe_deploy.images import normalise
from mvmoe_deploy.runtime import Runtime

MIXES = ("uniform", "skewed", "bursts")
MEAN_BURST = 20


class _Request(msgspec.Struct):
    """One point of a sweep; ``images`` are rows of the file, ``experts`` is empty if the router decides."""

    configuration: Configuration
    threads: int
    mix: str
    resident: int
    pixels: str
    images: list[int]
    experts: list[int]


def mix_sequence(mix: str, groups: int, length: int, seed: int = 0) -> NDArray[np.int64]:
    """The groups ``[length]`` of a mix's images, in order; this module's docstring defines the mixes."""
    generator = np.random.default_rng([seed, MIXES.index(mix)])
    if mix == "uniform":
        return generator.integers(0, groups, length)
    if mix == "skewed":
        weights = 1 / np.arange(1, groups + 1)
        return generator.permutation(groups)[generator.choice(groups, length, p=weights / weights.sum())]
    lengths = generator.geometric(1 / MEAN_BURST, length)
    return np.repeat(generator.integers(0, groups, length), lengths)[:length]


def measure_residency(
    c: Configuration,
    pixels: Path,
    super_classes: Sequence[int] | None,
    threads: int = 1,
    predictions: int = 200,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Residency]:
    """Measures every mix with k…E resident experts, each point in a fresh process.

    Args:
        c: a routed bundle.
        pixels: a ``.npy`` file of decoded images.
        super_classes: for each image, the expert of its super-class; None without labels.
        threads: threads of the engine.
        predictions: number of predictions per point.
        progress: called with the number of finished points and their total number.

    Raises:
        BackendError: a process failed.
    """
    count = len(np.load(pixels, mmap_mode="r"))
    points = []
    total = len(MIXES) * (c.experts - c.k + 1)
    for mix in MIXES:
        images, experts = _images_of(c=c, mix=mix, count=count, super_classes=super_classes, length=predictions)
        for resident in range(c.k, c.experts + 1):
            request = _Request(
                c, threads, mix=mix, resident=resident, pixels=str(pixels), images=images, experts=experts
            )
            what = f"{c.name}: measuring residency failed"
            points.append(in_fresh_process("measure.residency", request, Residency, what))
            progress(len(points), total)
    return points


def _images_of(
    c: Configuration, mix: str, count: int, super_classes: Sequence[int] | None, length: int
) -> tuple[list[int], list[int]]:
    """The rows of the images to show, and the experts to force (none if the router decides)."""
    if super_classes is None:
        return [number % count for number in range(length)], mix_sequence(mix, c.experts, length).tolist()
    present = sorted(set(super_classes))
    members = [np.flatnonzero(np.asarray(super_classes) == group) for group in present]
    generator = np.random.default_rng(0)
    return [int(generator.choice(members[group])) for group in mix_sequence(mix, len(present), length)], []


def _measure(request: _Request) -> Residency:
    c = request.configuration
    import_engine(c.backend)
    pixels = np.load(request.pixels)
    before = memory.proportional_set_size() if memory.ROLLUP.exists() else None
    runtime = open_configuration(c, request.threads, request.resident)
    assert isinstance(runtime, Runtime)
    taken = []
    for number, image in enumerate(request.images):
        batch = normalise(pixels[image], c.preprocessing)[None]
        experts = (np.arange(c.k)[None] + request.experts[number]) % c.experts if request.experts else None
        started = time.perf_counter()
        runtime.run(batch, experts)
        taken.append(1e3 * (time.perf_counter() - started))
    stats = runtime.stats()
    held = stats.fixed_bytes + stats.resident_bytes + stats.unfreed_bytes
    used = held if before is None else memory.proportional_set_size() - before
    p50, p99 = np.percentile(taken, [50, 99])
    hit_rate = stats.hits / (stats.hits + stats.misses)
    return Residency(
        mix=request.mix, resident=request.resident, hit_rate=hit_rate, p50=float(p50), p99=float(p99), bytes=used
    )


if __name__ == "__main__":
    answer(_Request, _measure)
