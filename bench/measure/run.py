"""Measures configurations against each other: one run fills one :class:`mvmoe_deploy.bench.results.Results`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.bench.candidates.configuration import Configuration, Floats, Opened, expert_turn, open_configuration
from mvmoe_deploy.bench.measure import latency, noise
from mvmoe_deploy.bench.measure.accuracy import Labelled, labels_for, measure_accuracy, read_labelled
from mvmoe_deploy.bench.measure.bootstrap import median_estimate, ratio_estimate
from mvmoe_deploy.bench.measure.coldstart import measure_cold_start
from mvmoe_deploy.bench.measure.energy import measure_energy, open_meter
from mvmoe_deploy.bench.measure.latency import Timed, interleave
from mvmoe_deploy.bench.measure.machine import machine
from mvmoe_deploy.bench.measure.memory import PREDICTIONS, measure_memory
from mvmoe_deploy.bench.measure.residency import MEAN_BURST, measure_residency
from mvmoe_deploy.bench.results import (
    FORMAT,
    Accuracy,
    ColdStart,
    Estimate,
    Latency,
    Memory,
    Residency,
    Results,
    Row,
    Throughput,
)
from mvmoe_deploy.errors import BackendError, ConfigError
from mvmoe_deploy.images import ImageSource, Preprocessing, normalise, to_pixels

BATCHES = (1, 2, 4, 8, 16, 32, 64)
MAX_IMAGES = 256
"""Decoded images that are shown in turn; more would say nothing new and fill the memory."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to measure, and how long.

    Attributes:
        threads: of every engine.
        rounds: fewest samples per row and kind of latency.
        min_seconds: shortest time that these are taken for.
        cold_starts: processes per row.
        memory_by_resident: memory after each further expert became resident, not only with one.
        throughput: images per second for :data:`BATCHES`.
        residency: sweeps over resident experts and mixes; ``residency_predictions`` per point.
        count: labelled images, where there are any.
    """

    threads: int = 1
    rounds: int = 100
    min_seconds: float = 3.0
    cold_starts: int = 5
    memory_by_resident: bool = False
    throughput: bool = False
    residency: bool = False
    residency_predictions: int = 200
    count: int = 1000


@dataclass(frozen=True)
class Images:
    """What the models are shown.

    Attributes:
        sources: real images, or synthetic ones.
        what: says which.
        data: a folder with labelled validation images, for accuracies; where given, its images are shown.
    """

    sources: Sequence[ImageSource]
    what: str
    data: Path | None = None


@dataclass
class _Measured:
    """What the phases found, by the configurations' names."""

    warm: Timed
    alternating: Timed | None
    memory: dict[str, Memory | None]
    cold_start: dict[str, ColdStart]
    throughput: dict[str, list[Throughput]]
    energy: dict[str, Estimate] | None
    accuracy: dict[str, Accuracy]
    residency: dict[str, list[Residency]] = field(default_factory=dict)


def measure(
    configurations: Sequence[Configuration],
    images: Images,
    plan: Plan,
    progress: Progress = lambda what, done, total: None,
) -> Results:
    """Measures configurations; ratios are to the first one of each group.

    Args:
        configurations: with names that differ.
        images: every configuration is shown the same image in the same round.
        plan: what to measure.
        progress: called with what is being done, and how far it is.

    Raises:
        MvmoeError: a configuration or an image cannot be used.
    """
    if len({c.name for c in configurations}) < len(configurations) or not configurations:
        raise ConfigError("nothing to measure, or two configurations of one name")
    with tempfile.TemporaryDirectory() as folder:
        shown = _Shown(images, plan.count, Path(folder))
        found = _measure(configurations, shown, plan, progress)
    rows = [_row(c, _baseline_of(c, configurations), found) for c in configurations]
    routed = next((c for c in configurations if c.experts), None)
    names = (routed.class_names, routed.expert_names) if routed else ([], [])
    return Results(FORMAT, rows, machine(c.backend for c in configurations), method(plan, shown), *names)


class _Shown:
    """The images as each preprocessing wants them, decoded once."""

    def __init__(self, images: Images, count: int, folder: Path) -> None:
        self.images, self.count, self._folder = images, count, folder
        self._pixels: dict[Preprocessing, NDArray[np.uint8]] = {}
        self._files: dict[Preprocessing, Path] = {}
        self._labelled: dict[Preprocessing, Labelled] = {}

    def labelled(self, preprocessing: Preprocessing) -> Labelled | None:
        """Labelled images, or None."""
        if self.images.data is not None and preprocessing not in self._labelled:
            self._labelled[preprocessing] = read_labelled(self.images.data, preprocessing, self.count)
        return self._labelled.get(preprocessing)

    def pixels(self, preprocessing: Preprocessing) -> NDArray[np.uint8]:
        """``[n, S, S, 3]``: how large the photos are says nothing about the models, so they are resampled before."""
        if preprocessing not in self._pixels:
            labelled = self.labelled(preprocessing)
            if labelled is not None:
                self._pixels[preprocessing] = _evenly(labelled.pixels)
            else:
                sources = self.images.sources
                rows = _evenly(np.arange(len(sources)))
                self._pixels[preprocessing] = np.stack([to_pixels(sources[row], preprocessing) for row in rows])
        return self._pixels[preprocessing]

    def file(self, preprocessing: Preprocessing) -> Path:
        """The same for a fresh process to read."""
        if preprocessing not in self._files:
            self._files[preprocessing] = self._folder / f"pixels-{len(self._files)}.npy"
            np.save(self._files[preprocessing], self.pixels(preprocessing))
        return self._files[preprocessing]


def _evenly(rows: NDArray[Any]) -> NDArray[Any]:
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), MAX_IMAGES)).astype(int)]


def _measure(configurations: Sequence[Configuration], shown: _Shown, plan: Plan, progress: Progress) -> _Measured:
    memory = {}
    for done, c in enumerate(configurations):
        progress("memory", done, len(configurations))
        memory[c.name] = measure_memory(c, plan.threads, plan.memory_by_resident)
    cold_start: dict[str, ColdStart] = {}
    if plan.cold_starts:
        for preprocessing in dict.fromkeys(c.preprocessing for c in configurations):
            alike = [c for c in configurations if c.preprocessing == preprocessing]
            cold_start |= measure_cold_start(
                alike, shown.file(preprocessing), plan.threads, plan.cold_starts, _part(progress, "cold start")
            )
    with contextlib.ExitStack() as stack:
        models: dict[str, Opened] = {}
        for c in configurations:
            models[c.name] = open_configuration(c, plan.threads, preload=True)
            stack.callback(models[c.name].close)
        predictors = {c.name: _predictor(models[c.name], shown.pixels(c.preprocessing)) for c in configurations}
        warm = interleave(predictors, plan.rounds, plan.min_seconds, _part(progress, "warm latency"))
        throughput: dict[str, list[Throughput]] = {}
        if plan.throughput:
            throughput = _throughput(configurations, models, shown, progress)
        progress("energy", 0, 1)
        energy = measure_energy(predictors, open_meter())
        accuracy: dict[str, Accuracy] = {}
        for c in configurations:
            labelled = shown.labelled(c.preprocessing)
            if labelled is not None and c.trained:
                labels = labels_for(c, labelled)
                accuracy[c.name] = measure_accuracy(
                    c, models[c.name], labelled.pixels, labels, _part(progress, "accuracy")
                )
    alternating = _hit_and_switch(configurations, shown, plan, progress)
    found = _Measured(warm, alternating, memory, cold_start, throughput, energy, accuracy)
    for c in configurations:
        if plan.residency and c.experts and c.opened_as == "bundle":
            found.residency[c.name] = measure_residency(
                c,
                shown.file(c.preprocessing),
                _super_classes(c, shown),
                plan.threads,
                plan.residency_predictions,
                _part(progress, "residency"),
            )
    return found


def _predictor(model: Opened, pixels: NDArray[np.uint8]) -> Callable[[int], object]:
    return lambda number: model.predict(pixels[number % len(pixels)])


def _hit_and_switch(
    configurations: Sequence[Configuration], shown: _Shown, plan: Plan, progress: Progress
) -> Timed | None:
    """Preprocessed images through routed bundles with as few resident experts as an image needs.

    Experts are forced, so that every image of ``hit`` finds its own resident and every one of ``switch`` has to load
    it; each has a runtime of its own. Below 2k experts no two images in turn would need different ones.
    """
    routed = [c for c in configurations if c.opened_as == "bundle" and c.experts >= 2 * c.k > 0]
    if not routed:
        return None
    with contextlib.ExitStack() as stack:
        candidates: dict[str, Callable[[int], object]] = {}
        for c in routed:
            batches = normalise(shown.pixels(c.preprocessing), c.preprocessing)
            for kind, turn in (("hit", lambda number: 0), ("switch", lambda number: number)):
                model = open_configuration(c, plan.threads, max_resident=c.k)
                stack.callback(model.close)
                candidates[f"{kind} {c.name}"] = _forced(c, model, batches, turn)
        return interleave(candidates, plan.rounds, plan.min_seconds, _part(progress, "expert hit and switch"))


def _forced(c: Configuration, model: Opened, batches: Floats, turn: Callable[[int], int]) -> Callable[[int], object]:
    def run(number: int) -> None:
        row = number % len(batches)
        model.run(batches[row : row + 1], expert_turn(c, turn(number)))

    return run


def _throughput(
    configurations: Sequence[Configuration], models: Mapping[str, Opened], shown: _Shown, progress: Progress
) -> dict[str, list[Throughput]]:
    result: dict[str, list[Throughput]] = {c.name: [] for c in configurations}
    for done, batch in enumerate(BATCHES):
        progress("throughput", done, len(BATCHES))
        candidates: dict[str, Callable[[int], object]] = {}
        for c in configurations:
            pixels = shown.pixels(c.preprocessing)
            rows = np.arange(batch) % len(pixels)
            images = np.ascontiguousarray(normalise(pixels[rows], c.preprocessing))
            with contextlib.suppress(BackendError):  # Core ML's pieces and a stock export take one image at a time
                models[c.name].run(images)
                candidates[c.name] = _runner(models[c.name], images)
        samples = interleave(candidates, 10, 1.0).samples if candidates else {}
        for name, taken in samples.items():
            result[name].append(Throughput(batch, median_estimate([1e3 * batch / ms for ms in taken])))
    return result


def _runner(model: Opened, images: Floats) -> Callable[[int], object]:
    return lambda _: model.run(images)


def _super_classes(c: Configuration, shown: _Shown) -> list[int] | None:
    """Of each image shown, the expert its class belongs to; None without labels or super-classes."""
    labelled = shown.labelled(c.preprocessing)
    if labelled is None or not c.class_experts:
        return None
    labels = _evenly(labels_for(c, labelled))
    return [c.class_experts[label] for label in labels]


def _part(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)


def _baseline_of(c: Configuration, configurations: Sequence[Configuration]) -> Configuration:
    return next(other for other in configurations if other.group == c.group)


def _row(c: Configuration, baseline: Configuration, found: _Measured) -> Row:
    def alternating(kind: str) -> Latency | None:
        name = f"{kind} {c.name}"
        if found.alternating is None or name not in found.alternating.samples:
            return None
        return found.alternating.latency(name)

    samples = found.warm.samples
    return Row(
        name=c.name,
        group=c.group,
        kind=c.kind,
        backend=c.backend,
        precision=c.precision,
        layout=c.layout,
        flops=c.flops,
        macs=c.macs,
        counted_macs=c.counted_macs,
        parameters=c.parameters,
        active_parameters=c.active_parameters,
        bytes_on_disk=c.bytes_on_disk,
        bytes_first_image=c.bytes_first_image,
        bytes_per_expert=c.bytes_per_expert,
        warm=found.warm.latency(c.name),
        ratio=ratio_estimate(samples[c.name], samples[baseline.name]),
        hit=alternating("hit"),
        switch=alternating("switch"),
        cold_start=found.cold_start.get(c.name),
        memory=found.memory[c.name],
        throughput=found.throughput.get(c.name, []),
        residency=found.residency.get(c.name, []),
        accuracy=found.accuracy.get(c.name),
        energy=None if found.energy is None else found.energy[c.name],
        paper=c.paper,
    )


def method(plan: Plan, shown: _Shown) -> dict[str, Any]:
    """What is needed to repeat a run, in words and numbers."""
    return {
        **asdict(plan),
        "images": shown.images.what,
        "order": "interleaved, shuffled every round (seed 0)",
        "warm-up": f"until the medians of {latency.WINDOW} rounds and of the {latency.WINDOW} before differ by at most "
        f"{latency.SETTLED:.0%} for every row, or {latency.MAX_WARMUP_SECONDS:g} s",
        "warm": "predict() of a decoded image, preprocessing included, all experts resident",
        "hit and switch": "run() of a preprocessed image, experts forced, only as many resident as an image needs; "
        "files in the page cache",
        "ratio": "median over the rounds, to the first row of the group",
        "intervals": "95 %, circular block bootstrap, 1000 resamples; nothing trimmed",
        "not to be quoted": f"coefficient of variation above {noise.MAX_VARIATION}, median's interval beyond "
        f"±{noise.MAX_INTERVAL:.0%}, other processes above {noise.MAX_ELSEWHERE} cores, steal above "
        f"{noise.MAX_STEAL:.0%}, throttling, or times that did not settle",
        "memory": "proportional set size beyond that before the model was opened, fresh process, "
        f"used: after {PREDICTIONS} predictions with experts in turn and one resident",
        "cold start": "process start to first prediction, fresh processes in turn, files in the page cache",
        "mixes": "uniform: every image's expert anew; skewed: likewise, probability of the i-th of a shuffled order "
        f"∝ 1/i; bursts: an expert stays for a geometric number of images, {MEAN_BURST} in the mean",
    }
