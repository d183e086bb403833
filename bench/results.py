"""The results of a benchmark run, as written to JSON and read back: one :class:`Results` with a :class:`Row` each.

Every figure is measured or computed by a stated formula; None means that a platform or a model cannot give it. The
docstrings give the units: milliseconds, bytes, shares from 0 to 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.files import atomic_file
from mvmoe_deploy.selftest import StageResult

FORMAT = 2
"""Version of the JSON file's format; :func:`read_json` refuses all others."""

Kind = Literal["mobile-vmoe", "dense", "dense-wide", "all-experts", "vmoe", "stock"]
"""The kind of a row's model: a bundle whose experts are separate pieces; its dense baseline; a dense model as wide as
all experts together; one graph that holds all experts; a per-token V-MoE; a stock export of the dense baseline."""


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
        throttled: whether the processor was seen throttling; None if that cannot be read.
        reasons: why the times should not be quoted; empty if they may be.
    """

    variation: float
    load_average: float
    throttled: bool | None
    reasons: list[str]


class Latency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Milliseconds of one operation; nothing is trimmed.

    Attributes:
        first: time of the very first call, before any warm-up.
        warmup: number of calls before the samples.
        samples: times in the order taken, one per round.
    """

    first: float
    warmup: int
    p50: Estimate
    p90: Estimate
    p99: Estimate
    noise: Noise
    samples: list[float]


class ColdStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Milliseconds from process start to first prediction; each list has a sample per fresh process."""

    interpreter: list[float]
    imports: list[float]
    load: list[float]
    first_run: list[float]
    total: Estimate


class MemoryPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes beyond those of the process just before the model was opened.

    Attributes:
        resident: number of resident experts at this moment.
        anonymous: proportional set size of anonymous memory.
        file_backed: proportional set size of mapped files.
        ledger: bytes of weights that the runtime reports to hold; None for an engine that does not report them.
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
        loaded: memory just after opening.
        used: memory after 100 predictions with at most one resident expert.
        by_resident: memory after each further expert became resident, 1…E; one point for a model without experts.
        peak: highest resident set size beyond that before opening, in bytes.
    """

    loaded: MemoryPoint
    used: MemoryPoint
    by_resident: list[MemoryPoint]
    peak: int


class Throughput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Images per second in batches that are grouped by expert; the images are preprocessed beforehand."""

    batch: int
    images_per_second: Estimate


class Residency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One point of a residency sweep.

    Attributes:
        mix: the mix of images: ``uniform``, ``skewed`` or ``bursts``.
        resident: limit on the number of resident experts.
        hit_rate: share of predictions whose expert was resident, 0…1.
        p50, p99: milliseconds of a prediction, loading included.
        bytes: proportional set size at the end beyond that before opening; where the platform has none, the ledger's
            bytes.
    """

    mix: str
    resident: int
    hit_rate: float
    p50: float
    p99: float
    bytes: int


class Accuracy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Accuracy on labelled images, run by the row's engine; shares are 0…1.

    Attributes:
        images: number of images.
        router: share of images sent to their super-class's expert; None without super-classes.
        heat_map: number of images of each class sent to each expert ``[C][E]``; empty without experts.
    """

    images: int
    top1: float
    top5: float
    router: float | None
    heat_map: list[list[int]]


class Paper(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The values of arXiv 2309.04354, figure 3a, for this scale: FLOPs in millions, ImageNet top-1 in percent."""

    mflops: float
    top1: float


class Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a configuration before it is measured.

    Attributes:
        name: the row's name, unique in the run.
        group: name of the group; rows of one group are compared with each other, and ratios are to its ``baseline``.
        backend: name of the backend that runs the model, such as ``onnxruntime``.
        flops: FLOPs for one image, by the paper's convention; None for a foreign model.
        macs: multiply-accumulates of the matrix products for one image, in closed form.
        counted_macs: multiply-accumulates as counted in the exported graphs that one image runs through.
        parameters: number of all parameters.
        active_parameters: number of the parameters that one image uses.
        bytes_on_disk: size of all files except the manifest and its sha256.
        bytes_first_image: size of the files that a device needs for its first image.
        bytes_per_expert: size of the files that each expert adds; empty without experts.
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
    bytes_per_expert: list[int] = []
    paper: Paper | None = None


class Row(Facts, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measured configuration.

    Attributes:
        ratio: the row's warm latency divided by that of the group's baseline row, paired by round.
        hit: warm latency of a prediction whose expert is resident.
        switch: warm latency of a prediction whose expert has to be loaded; its files are in the page cache.
        energy: millijoules per prediction; None where the platform has no readable counter.
        selftest: what each stage of the bundle's self-test says on this machine; empty where it was not run.
    """

    warm: Latency
    ratio: Estimate | None = None
    hit: Latency | None = None
    switch: Latency | None = None
    cold_start: ColdStart | None = None
    memory: Memory | None = None
    throughput: list[Throughput] = msgspec.field(default_factory=list)
    residency: list[Residency] = msgspec.field(default_factory=list)
    accuracy: Accuracy | None = None
    energy: Estimate | None = None
    selftest: list[StageResult] = msgspec.field(default_factory=list)


class Results(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A benchmark run.

    Attributes:
        machine: processor, cores, system, versions, commit, date.
        method: threads, rounds, images, order and everything else that is needed to repeat the run.
        class_names, expert_names: names from the first row with experts; empty if no row has experts.
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
        ConfigError: the file does not exist, does not hold results, or has another format.
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
        raise ConfigError(f"{path}: {problem}; the file was altered or truncated, measure again")
    return results


def _inconsistency(results: Results) -> str | None:
    """What is inconsistent in results of the right types; None if nothing is."""
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
