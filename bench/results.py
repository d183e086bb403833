"""What a benchmark run found, as it is written to JSON and read back: one :class:`Results` of :class:`Row`.

Every figure is measured, or computed by a stated formula; None stands for what a platform or a model cannot give. The
docstrings give the units: milliseconds, bytes, shares from 0 to 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.files import atomic_file

FORMAT = 2
"""Version of the JSON file's form; :func:`read_json` refuses every other."""

Kind = Literal["mobile-vmoe", "dense", "dense-wide", "all-experts", "vmoe", "stock"]
"""What kind of model a row is of: a bundle whose experts are separate pieces; its dense baseline; a dense model as wide
as all experts together; one graph that holds all experts; a per-token V-MoE; a stock export of the dense baseline."""


class Estimate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A statistic with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Noise(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether a row's times should be quoted.

    Attributes:
        variation: coefficient of variation of the samples.
        load_average: one-minute load average at the end of its measurement.
        throttled: whether the processor was seen throttling; None where that cannot be read.
        reasons: why not to quote; empty if the row is fine.
    """

    variation: float
    load_average: float
    throttled: bool | None
    reasons: list[str]


class Latency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Milliseconds of one operation; nothing trimmed.

    Attributes:
        first: the very first call, before any warm-up.
        warmup: number of calls before the samples.
        samples: in the order taken, one per round.
    """

    first: float
    warmup: int
    p50: Estimate
    p90: Estimate
    p99: Estimate
    noise: Noise
    samples: list[float]


class ColdStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Process start to first prediction, in fresh processes: milliseconds, a sample per process in each list."""

    interpreter: list[float]
    imports: list[float]
    load: list[float]
    first_run: list[float]
    total: Estimate


class MemoryPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes beyond those of the process just before the model was opened.

    Attributes:
        resident: resident experts at this moment.
        anonymous: proportional set size of anonymous memory.
        file_backed: of mapped files.
        ledger: weights that the runtime says it holds; None for an engine that does not say.
    """

    resident: int
    anonymous: int
    file_backed: int
    ledger: int | None

    @property
    def total(self) -> int:
        """Proportional set size."""
        return self.anonymous + self.file_backed


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Memory of one model, measured in fresh processes.

    Attributes:
        loaded: just after opening.
        used: after 100 predictions with at most one resident expert.
        by_resident: after each further expert became resident, 1…E; one point for a model without experts.
        peak: highest resident set size beyond that before opening, bytes.
    """

    loaded: MemoryPoint
    used: MemoryPoint
    by_resident: list[MemoryPoint]
    peak: int


class Throughput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Images per second of batches (grouped by expert), preprocessed beforehand."""

    batch: int
    images_per_second: Estimate


class Residency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One point of a residency sweep.

    Attributes:
        mix: which images come: ``uniform``, ``skewed`` or ``bursts``.
        resident: most resident experts.
        hit_rate: share of predictions whose expert was resident, 0…1.
        p50, p99: milliseconds of a prediction, loading included.
        bytes: proportional set size at the end beyond that before opening; the ledger's where there is no such.
    """

    mix: str
    resident: int
    hit_rate: float
    p50: float
    p99: float
    bytes: int


class Accuracy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """On labelled images, run by the engine that the row is of; shares 0…1.

    Attributes:
        images: how many.
        router: share of images sent to their super-class's expert; None where there are no super-classes.
        heat_map: images of each class sent to each expert ``[C][E]``; empty without experts.
    """

    images: int
    top1: float
    top5: float
    router: float | None
    heat_map: list[list[int]]


class Paper(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What arXiv 2309.04354, figure 3a, says of this scale: FLOPs in millions, ImageNet top-1 in percent."""

    mflops: float
    top1: float


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One configuration.

    Attributes:
        name: unique in the run.
        group: rows of one group are compared with each other; ratios are to its ``baseline`` row.
        backend: onnxruntime, executorch, torch or coreml.
        flops: of one image, the paper's convention; None for a foreign model.
        macs: multiply-accumulates of its matrix products, closed form.
        counted_macs: the same counted from the exported graph(s) that one image runs through.
        parameters: number of all parameters.
        active_parameters: number of those that one image uses.
        bytes_on_disk: without the manifest.
        bytes_first_image: files a device needs for its first image.
        bytes_per_expert: size of the files that each expert adds; empty without experts.
        ratio: its warm latency divided by the group's baseline row's, paired by round.
        hit: warm latency of a prediction whose expert is resident.
        switch: warm latency of a prediction whose expert has to be loaded; its files are in the page cache.
        energy: millijoules per prediction; None where the platform has no readable counter.
    """

    name: str
    group: str
    kind: Kind
    backend: str
    precision: str
    layout: str
    flops: int | None
    macs: int | None
    counted_macs: int | None
    parameters: int
    active_parameters: int | None
    bytes_on_disk: int
    bytes_first_image: int
    bytes_per_expert: list[int]
    warm: Latency
    ratio: Estimate | None = None
    hit: Latency | None = None
    switch: Latency | None = None
    cold_start: ColdStart | None = None
    memory: Memory | None = None
    throughput: list[Throughput] = []
    residency: list[Residency] = []
    accuracy: Accuracy | None = None
    energy: Estimate | None = None
    paper: Paper | None = None


class Results(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A benchmark run.

    Attributes:
        machine: processor, cores, system, versions, commit, date.
        method: threads, rounds, images, order and whatever else is needed to repeat it.
        class_names, expert_names: of the first row with experts; empty without.
    """

    format: int
    rows: list[Row]
    machine: dict[str, Any]
    method: dict[str, Any]
    class_names: list[str] = []
    expert_names: list[str] = []


def write_json(results: Results, path: Path) -> None:
    """Writes results with their raw samples; :func:`read_json` reads them back."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")


def read_json(path: Path) -> Results:
    """Reads results.

    Raises:
        ConfigError: no such file, not results, or of another format.
    """
    try:
        results = msgspec.json.decode(path.read_bytes(), type=Results)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: not a benchmark's JSON ({error})") from None
    if results.format != FORMAT:
        raise ConfigError(f"{path}: has format {results.format}, this version reads {FORMAT}; measure again")
    if problem := _inconsistency(results):
        raise ConfigError(f"{path}: {problem}; the file was altered or cut, measure again")
    return results


def _inconsistency(results: Results) -> str | None:
    """What the types cannot say; None where all is well."""
    names = [row.name for row in results.rows]
    if not names:
        return "holds no rows"
    if len(set(names)) != len(names):
        return "names a row twice"
    for row in results.rows:
        if any(latency is not None and not latency.samples for latency in (row.warm, row.hit, row.switch)):
            return f"row {row.name!r} has a latency without samples"
        cold = row.cold_start
        if cold and not len(cold.interpreter) == len(cold.imports) == len(cold.load) == len(cold.first_run) > 0:
            return f"row {row.name!r} has parts of cold starts that do not belong together"
        if row.accuracy and len({len(counts) for counts in row.accuracy.heat_map}) > 1:
            return f"row {row.name!r} has a heat map that is not a rectangle"
    return None
