"""Measures configurations against each other: one run fills one :class:`mvmoe_deploy.bench.results.Results`."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.bench.candidates.configuration import Configuration, Floats, Opened, expert_turn, open_configuration
from mvmoe_deploy.bench.candidates.suite import prepare_scale
from mvmoe_deploy.bench.measure import latency, noise
from mvmoe_deploy.bench.measure.accuracy import labels_for, measure_accuracy
from mvmoe_deploy.bench.measure.bootstrap import median_estimate, ratio_estimate
from mvmoe_deploy.bench.measure.coldstart import measure_cold_start
from mvmoe_deploy.bench.measure.energy import measure_energy, open_meter
from mvmoe_deploy.bench.measure.images import Images, Shown
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
from mvmoe_deploy.images import normalise

BATCHES = (1, 2, 4, 8, 16, 32, 64)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to measure, and for how long.

    Attributes:
        threads: threads of every engine.
        rounds: least number of samples per row and kind of latency.
        min_seconds: least time for which these samples are taken.
        cold_starts: number of processes per row.
        memory_by_resident: whether to measure memory after each further expert became resident, not only with one.
        throughput: whether to measure images per second for :data:`BATCHES`.
        residency: whether to sweep over resident experts and mixes.
        residency_predictions: number of predictions per point of a sweep.
        count: largest number of labelled images to use.
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
class _Run:
    """The input of every phase of a run."""

    configurations: Sequence[Configuration]
    shown: Shown
    plan: Plan
    progress: Progress

    def within(self, what: str) -> Callable[[int, int], None]:
        """The progress function of one phase."""
        return lambda done, total: self.progress(what, done, total)


@dataclass(frozen=True)
class _Together:
    """Measurements in this process with all models open, by the configurations' names."""

    warm: Timed
    throughput: dict[str, list[Throughput]]
    energy: dict[str, Estimate] | None
    accuracy: dict[str, Accuracy]


@dataclass(frozen=True)
class _Measured:
    """The phases' measurements, by the configurations' names."""

    memory: dict[str, Memory | None]
    cold_start: dict[str, ColdStart]
    together: _Together
    alternating: Timed | None
    residency: dict[str, list[Residency]]


def measure(
    configurations: Sequence[Configuration],
    images: Images,
    plan: Plan,
    progress: Progress = lambda what, done, total: None,
) -> Results:
    """Measures configurations; ratios are to the first configuration of each group.

    Args:
        configurations: the configurations, whose names must differ.
        images: the images; in a round, every configuration is shown the same one.
        plan: what to measure.
        progress: called with the current phase, the finished part and the total.

    Raises:
        MvmoeError: a configuration or an image cannot be used.
    """
    if len({c.name for c in configurations}) < len(configurations) or not configurations:
        raise ConfigError("nothing to measure, or two configurations have the same name")
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(configurations, Shown(images, plan.count, Path(folder)), plan, progress)
        found = _Measured(
            memory=_memory(run),
            cold_start=_cold_starts(run),
            together=_together(run),
            alternating=_hit_and_switch(run),
            residency=_residency(run),
        )
    rows = [_row(c, baseline_of(c, configurations), found) for c in configurations]
    routed = next((c for c in configurations if c.experts), None)
    return Results(
        format=FORMAT,
        rows=rows,
        machine=machine(c.backend for c in configurations),
        method=method(plan, images.what),
        class_names=routed.class_names if routed else [],
        expert_names=routed.expert_names if routed else [],
    )


def measure_suite(
    scales: Sequence[str],
    images: Images,
    plan: Plan,
    folder: Path,
    backends: Sequence[str] = ("onnxruntime",),
    baselines: Sequence[str] = (),
    progress: Progress = lambda what, done, total: None,
) -> Results:
    """Exports and measures each scale with its dense baseline; the rows of a scale form a group.

    Args:
        scales: names of scales, such as ``12x192``; rows of a scale that the paper lacks have no figures of the paper.
        images: the images that the models are shown; random routers send most of them to few experts.
        plan: what to measure.
        folder: folder for exports.
        backends: backends that run each scale.
        baselines: further baselines of each scale.
        progress: as in :func:`measure`.
    """
    parts: list[Results] = []
    for done, scale in enumerate(scales):

        def step(what: str, part: int, total: int, scale: str = scale, done: int = done) -> None:
            progress(f"{scale} ({done + 1} of {len(scales)}): {what}", part, total)

        configurations = prepare_scale(
            scale, folder / scale, backends, baselines, progress=functools.partial(step, part=0, total=1)
        )
        parts.append(measure(configurations, images, plan, step))
    rows = [row for part in parts for row in part.rows]
    return msgspec.structs.replace(parts[0], rows=rows, method={**parts[0].method, "suite": "paper, random weights"})


def _memory(run: _Run) -> dict[str, Memory | None]:
    found = {}
    for done, c in enumerate(run.configurations):
        run.progress("memory", done, len(run.configurations))
        found[c.name] = measure_memory(c, run.plan.threads, sweep=run.plan.memory_by_resident)
    return found


def _cold_starts(run: _Run) -> dict[str, ColdStart]:
    found: dict[str, ColdStart] = {}
    if not run.plan.cold_starts:
        return found
    for preprocessing in dict.fromkeys(c.preprocessing for c in run.configurations):
        found |= measure_cold_start(
            [c for c in run.configurations if c.preprocessing == preprocessing],
            run.shown.file(preprocessing),
            threads=run.plan.threads,
            repeats=run.plan.cold_starts,
            progress=run.within("cold start"),
        )
    return found


def _together(run: _Run) -> _Together:
    """Measures with all models open at once and every expert resident."""
    with contextlib.ExitStack() as stack:
        models: dict[str, Opened] = {}
        for c in run.configurations:
            models[c.name] = open_configuration(c, run.plan.threads, preload=True)
            stack.callback(models[c.name].close)
        predictors = {c.name: _predictor(models[c.name], run.shown.pixels(c.preprocessing)) for c in run.configurations}
        warm = interleave(predictors, run.plan.rounds, run.plan.min_seconds, progress=run.within("warm latency"))
        throughput = _throughput(run, models)
        run.progress("energy", 0, 1)
        energy = measure_energy(predictors, open_meter())
        return _Together(warm, throughput, energy, _accuracy(run, models))


def _accuracy(run: _Run, models: Mapping[str, Opened]) -> dict[str, Accuracy]:
    found = {}
    for c in run.configurations:
        labelled = run.shown.labelled(c.preprocessing)
        if labelled is not None and c.trained:
            labels = labels_for(c, labelled)
            found[c.name] = measure_accuracy(
                c, models[c.name], labelled.pixels, labels, progress=run.within("accuracy")
            )
    return found


def _residency(run: _Run) -> dict[str, list[Residency]]:
    if not run.plan.residency:
        return {}
    return {
        c.name: measure_residency(
            c,
            run.shown.file(c.preprocessing),
            run.shown.super_classes(c),
            threads=run.plan.threads,
            predictions=run.plan.residency_predictions,
            progress=run.within("residency"),
        )
        for c in run.configurations
        if c.experts and c.opened_as == "bundle"
    }


def _predictor(model: Opened, pixels: NDArray[np.uint8]) -> Callable[[int], object]:
    return lambda number: model.predict(pixels[number % len(pixels)])


def _hit_and_switch(run: _Run) -> Timed | None:
    """Times routed bundles on preprocessed images, with only as many resident experts as an image needs.

    Experts are forced, so that every image of ``hit`` finds its experts resident and every image of ``switch`` has to
    load them; each of the two has a runtime of its own. With fewer than 2k experts, two successive images could not
    need entirely different ones.
    """
    routed = [c for c in run.configurations if c.opened_as == "bundle" and c.experts >= 2 * c.k > 0]
    if not routed:
        return None
    with contextlib.ExitStack() as stack:
        candidates: dict[str, Callable[[int], object]] = {}
        for c in routed:
            batches = normalise(run.shown.pixels(c.preprocessing), c.preprocessing)
            for kind, turn in (("hit", lambda number: 0), ("switch", lambda number: number)):
                model = open_configuration(c, run.plan.threads, max_resident=c.k)
                stack.callback(model.close)
                candidates[f"{kind} {c.name}"] = _forced(c, model, batches, turn)
        progress = run.within("expert hit and switch")
        return interleave(candidates, run.plan.rounds, run.plan.min_seconds, progress=progress)


def _forced(c: Configuration, model: Opened, batches: Floats, turn: Callable[[int], int]) -> Callable[[int], object]:
    def run(number: int) -> None:
        row = number % len(batches)
        model.run(batches[row : row + 1], expert_turn(c, turn(number)))

    return run


def _throughput(run: _Run, models: Mapping[str, Opened]) -> dict[str, list[Throughput]]:
    if not run.plan.throughput:
        return {}
    result: dict[str, list[Throughput]] = {c.name: [] for c in run.configurations}
    for done, batch in enumerate(BATCHES):
        run.progress("throughput", done, len(BATCHES))
        candidates: dict[str, Callable[[int], object]] = {}
        for c in run.configurations:
            pixels = run.shown.pixels(c.preprocessing)
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


def baseline_of(c: Configuration, configurations: Sequence[Configuration]) -> Configuration:
    """The first configuration of its group."""
    return next(other for other in configurations if other.group == c.group)


def _row(c: Configuration, baseline: Configuration, found: _Measured) -> Row:
    def alternating(kind: str) -> Latency | None:
        name = f"{kind} {c.name}"
        if found.alternating is None or name not in found.alternating.samples:
            return None
        return found.alternating.latency(name)

    samples = found.together.warm.samples
    return Row(
        **c.facts(),
        warm=found.together.warm.latency(c.name),
        ratio=ratio_estimate(samples[c.name], samples[baseline.name]),
        hit=alternating("hit"),
        switch=alternating("switch"),
        cold_start=found.cold_start.get(c.name),
        memory=found.memory[c.name],
        throughput=found.together.throughput.get(c.name, []),
        residency=found.residency.get(c.name, []),
        accuracy=found.together.accuracy.get(c.name),
        energy=None if found.together.energy is None else found.together.energy[c.name],
    )


def method(plan: Plan, images: str) -> dict[str, Any]:
    """Describes in words and numbers what is needed to repeat a run."""
    return {
        **asdict(plan),
        "images": images,
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
        "memory": "proportional set size beyond that before the model was opened, in a fresh process; "
        f"used: after {PREDICTIONS} predictions with experts taking turns and one resident",
        "cold start": "process start to first prediction, fresh processes in turn, files in the page cache",
        "mixes": "uniform: each image's expert is drawn independently; skewed: also, with probability ∝ 1/i for the "
        f"i-th of a shuffled order; bursts: an expert stays for a geometric number of images, {MEAN_BURST} on average",
    }
