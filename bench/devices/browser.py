"""Bundles in the browser of any phone that opens a page: the page measures, and this side makes results of its report.

What a row means is what it means on this machine: the same images of the models' size, every candidate in turn, raw
samples sent back, all statistics computed here.
"""

from __future__ import annotations

import contextlib
import datetime
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import msgspec
import numpy as np
from PIL import Image

import mvmoe_deploy
from mvmoe_deploy.bench.candidates.configuration import Configuration
from mvmoe_deploy.bench.candidates.prepare import of_bundle
from mvmoe_deploy.bench.measure.bootstrap import median_estimate, quantile_estimate, ratio_estimate
from mvmoe_deploy.bench.measure.images import Images, Shown
from mvmoe_deploy.bench.measure.noise import scatter
from mvmoe_deploy.bench.results import FORMAT, ColdStart, Latency, Memory, MemoryPoint, Noise, Results, Row
from mvmoe_deploy.bundle import Bundle, open_bundle
from mvmoe_deploy.errors import BackendError, first_line
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.selftest import StageResult
from mvmoe_deploy.serve import Handler, Server, Site, app_site
from mvmoe_deploy.terminal import unique

MAX_REPORT = 64 << 20
"""Largest report that is read, in bytes."""

SILENCE = 180.0
"""Seconds without a word from a browser after which another one may measure; memory takes a minute to answer."""

Milliseconds = Annotated[float, msgspec.Meta(gt=0, lt=1e8)]
Samples = Annotated[list[Milliseconds], msgspec.Meta(min_length=1, max_length=100_000)]
Bytes = Annotated[int, msgspec.Meta(ge=0, lt=1 << 50)]
Text = Annotated[str, msgspec.Meta(max_length=1000)]


class Times(msgspec.Struct, frozen=True):
    """Milliseconds of one operation, as a page reports them.

    Attributes:
        first: the very first call.
        warmup: calls that were not kept.
        stable: whether times had settled by then.
        samples: means of ``repeats`` calls each, in the order taken.
        repeats: calls per sample, so that a sample is long for the browser's clock.
    """

    first: Annotated[float, msgspec.Meta(ge=0, lt=1e8)]
    warmup: Annotated[int, msgspec.Meta(ge=0)]
    stable: bool
    samples: Samples
    repeats: Annotated[int, msgspec.Meta(ge=1)]


class Cold(msgspec.Struct, frozen=True):
    """One start in a fresh frame, in milliseconds, and the bytes of the bundle that it fetched."""

    frame: Annotated[float, msgspec.Meta(ge=0, lt=1e8)]
    imports: Annotated[float, msgspec.Meta(ge=0, lt=1e8)]
    load: Milliseconds
    first_run: Milliseconds
    bytes: Bytes


class Held(msgspec.Struct, frozen=True):
    """Bytes of a fresh frame at one moment, as the browser and the runtime count them."""

    resident: Annotated[int, msgspec.Meta(ge=0)]
    bytes: Bytes
    ledger: Bytes


class Measured(msgspec.Struct, frozen=True):
    """What a page found for one bundle.

    Attributes:
        selftest: each stage; empty if the bundle has no self-test.
        memory: memory once loaded and after 100 predictions; None where the browser does not tell.
    """

    name: Text
    digest: Text
    selftest: Annotated[list[StageResult], msgspec.Meta(max_length=8)]
    warm: Times
    hit: Times | None
    switch: Times | None
    cold: Annotated[list[Cold], msgspec.Meta(min_length=1, max_length=1000)]
    memory: Annotated[list[Held], msgspec.Meta(min_length=2, max_length=2)] | None


class Report(msgspec.Struct, frozen=True):
    """What a page sends.

    Attributes:
        device: what the browser tells of itself and the device.
        clock: the smallest step of its clock, in milliseconds.
        hidden: whether the page was out of sight meanwhile, where browsers slow pages down.
    """

    device: dict[Text, str | int | float | bool | None]
    clock: Milliseconds
    threads: Annotated[int, msgspec.Meta(ge=1)]
    hidden: bool
    bundles: list[Measured]


class Progress(msgspec.Struct, frozen=True):
    """How far a page is."""

    what: Text
    done: Annotated[int, msgspec.Meta(ge=0)]
    total: Annotated[int, msgspec.Meta(ge=1)]


class Failure(msgspec.Struct, frozen=True):
    """Why a page gave up."""

    error: Text


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: samples per kind of latency.
        cold_starts: starts in a fresh frame per bundle.
        threads: threads of the engine; browsers give more than one only to pages by HTTPS or from localhost.
        provider: where the engine runs.
        memory: whether the browser is asked for its memory, for which some need a minute.
    """

    rounds: int = 100
    cold_starts: int = 5
    threads: int = 1
    provider: Literal["wasm", "webgpu"] = "wasm"
    memory: bool = True


@dataclass
class MeasuringSite(Site):
    """The app's site, whose page measures and reports.

    Attributes:
        key: what a report's address has to contain; the page knows it.
        said: what the page sent, in order.
        owner: the browser that measures, and when it last said something.
    """

    key: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    said: queue.Queue[Progress | Failure | Report] = field(default_factory=queue.Queue)
    owner: tuple[str, float] = ("", 0.0)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def admit(self, browser: str) -> bool:
        """Whether a browser may report: one at a time."""
        with self.lock:
            name, last = self.owner
            if name not in ("", browser) and time.monotonic() - last < SILENCE:
                return False
            self.owner = (browser, time.monotonic())
            return True


class ReportHandler(Handler):
    """Takes reports as well; bundles are sent anew every time, so that a cold start is one."""

    def cache_control(self) -> str:
        """What browsers may keep of the answer."""
        return "no-store" if urlsplit(self.path).path.startswith("/bundles/") else super().cache_control()

    def do_POST(self) -> None:  # noqa: N802
        """Takes ``/report/KEY/BROWSER/KIND``."""
        site = self.server.site
        assert isinstance(site, MeasuringSite)
        parts = unquote(urlsplit(self.path).path).split("/")
        length = self.headers.get("Content-Length", "")
        if len(parts) != 5 or parts[:3] != ["", "report", site.key] or parts[4] not in KINDS:
            self._refuse(HTTPStatus.NOT_FOUND, "no such address")
        elif self.headers.get_content_type() != "application/json" or not length.isdecimal():
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected JSON and its length")
        elif int(length) > MAX_REPORT:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MAX_REPORT} bytes")
        elif not site.admit(parts[3]):
            self._refuse(HTTPStatus.CONFLICT, "another browser is measuring for this command; wait until it is done")
        else:
            self._take(site, KINDS[parts[4]], self.rfile.read(int(length)))

    def _take(self, site: MeasuringSite, kind: type[Progress | Failure | Report], body: bytes) -> None:
        try:
            said = msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, first_line(error))
            return
        site.said.put(said)
        self.send_document({"taken": True})

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = True  # its body may not have been read
        self.send_document({"error": reason}, status=status)


KINDS: dict[str, type[Progress | Failure | Report]] = {"progress": Progress, "failure": Failure, "results": Report}


def measuring_site(
    paths: Sequence[Path], images: Images, plan: Plan, engine: Path, folder: Path
) -> tuple[MeasuringSite, list[Configuration]]:
    """A site whose page measures bundles.

    Args:
        paths: bundles; ratios are to the first.
        images: what is predicted.
        plan: how much is measured.
        engine: the folder of :func:`mvmoe_deploy.web_engine.find`.
        folder: an empty folder for the images.

    Raises:
        BundleError: a bundle is damaged, or no browser can run it.
    """
    names = unique([path.stem for path in paths])
    bundles = {name: open_bundle(path) for name, path in zip(names, paths, strict=True)}
    base = app_site(bundles, engine)
    site = MeasuringSite(files=base.files, documents=base.documents, headers=base.headers)
    urls = _add_images(site, bundles, images, folder)
    page = site.documents["/site.json"]
    for entry in page["bundles"]:
        routing = bundles[entry["name"]].manifest.routing
        entry |= {"k": routing.k if routing else 0, "images": urls[entry["name"]]}
    page["measure"] = {
        "report": f"report/{site.key}", "rounds": plan.rounds, "coldStarts": plan.cold_starts, "threads": plan.threads,
        "provider": plan.provider, "memory": plan.memory,
    }  # fmt: skip
    made = [of_bundle(path, name, group="browser") for name, path in zip(names, paths, strict=True)]
    backend = f"onnxruntime-web {plan.provider}"
    return site, [msgspec.structs.replace(each, backend=backend) for each in made]


def _add_images(site: Site, bundles: Mapping[str, Bundle], images: Images, folder: Path) -> dict[str, list[str]]:
    """Writes the images in the size of each model, without loss; returns where the page finds those of each bundle."""
    shown = Shown(images, count=0, folder=folder)
    urls: dict[Preprocessing, list[str]] = {}
    for bundle in bundles.values():
        preprocessing = bundle.manifest.preprocessing
        if preprocessing in urls:
            continue
        urls[preprocessing] = []
        for number, pixels in enumerate(shown.pixels(preprocessing)):
            path = f"images/{len(urls)}-{number:03d}.png"
            file = folder / path.replace("/", "-")
            Image.fromarray(pixels).save(file)
            site.files[f"/{path}"] = file
            urls[preprocessing].append(path)
    return {name: urls[bundle.manifest.preprocessing] for name, bundle in bundles.items()}


def wait_for_report(
    server: Server, timeout: float, progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> Report:
    """Serves until a page has reported.

    Args:
        server: a server of a :class:`MeasuringSite`, with :class:`ReportHandler`.
        timeout: seconds without a word from a page after which this gives up.
        progress: called with what the page does, how many steps are done, and their number.

    Raises:
        BackendError: the page failed, or nothing came.
    """
    site = server.site
    assert isinstance(site, MeasuringSite)
    with _answering(server):
        while True:
            try:
                said = site.said.get(timeout=timeout)
            except queue.Empty:
                raise BackendError(f"no word from a browser for {timeout:g} s; open the address again") from None
            if isinstance(said, Report):
                time.sleep(0.2)  # for the page to get its answer
                return said
            if isinstance(said, Failure):
                raise BackendError(f"the browser could not measure: {first_line(Exception(said.error))}")
            progress(said.what, said.done, said.total)


@contextlib.contextmanager
def _answering(server: Server) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def results_of(report: Report, configurations: Sequence[Configuration], plan: Plan, images: str) -> Results:
    """Results of a page's report.

    Raises:
        BackendError: the report is of other bundles, or its parts do not belong together.
    """
    wanted = {c.name: open_bundle(Path(c.path)).digest for c in configurations}
    if {each.name: each.digest for each in report.bundles} != wanted or len(report.bundles) != len(wanted):
        raise BackendError("the browser measured other bundles than these; open the address again")
    found = {each.name: each for each in report.bundles}
    base = found[configurations[0].name]
    if len({len(each.warm.samples) for each in report.bundles}) != 1:
        raise BackendError("the browser's report has another number of rounds for each bundle; measure again")
    rows = [_row(c, found[c.name], base, report.hidden) for c in configurations]
    return Results(
        format=FORMAT,
        rows=rows,
        machine={
            **report.device,
            "mvmoe-deploy": mvmoe_deploy.__version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
        method=_method(report, configurations, plan, images),
        class_names=next((c.class_names for c in configurations if c.experts), []),
        expert_names=next((c.expert_names for c in configurations if c.experts), []),
    )


def _row(c: Configuration, found: Measured, base: Measured, hidden: bool) -> Row:
    cold, memory = found.cold, found.memory
    return Row(
        **c.facts(),
        warm=_latency(found.warm, hidden),
        ratio=None if found is base else ratio_estimate(found.warm.samples, base.warm.samples),
        hit=None if found.hit is None else _latency(found.hit, hidden),
        switch=None if found.switch is None else _latency(found.switch, hidden),
        cold_start=ColdStart(
            interpreter=[each.frame for each in cold],
            imports=[each.imports for each in cold],
            load=[each.load for each in cold],
            first_run=[each.first_run for each in cold],
            total=median_estimate([each.frame + each.imports + each.load + each.first_run for each in cold]),
        ),
        memory=None if memory is None else _memory(memory),
        selftest=found.selftest,
    )


def _memory(held: Sequence[Held]) -> Memory:
    loaded, used = map(_point, held)
    return Memory(loaded=loaded, used=used, by_resident=[], peak=max(each.bytes for each in held))


def _point(held: Held) -> MemoryPoint:
    return MemoryPoint(resident=held.resident, anonymous=held.bytes, file_backed=0, ledger=held.ledger)


def _latency(times: Times, hidden: bool) -> Latency:
    p50, p90, p99 = (quantile_estimate(times.samples, percent) for percent in (50, 90, 99))
    variation, doubts = scatter(times.samples, p50)
    if not times.stable:
        doubts.append("times had not settled when warming up was abandoned")
    if hidden:
        doubts.append("the page was out of sight meanwhile")
    noise = Noise(variation=variation, load_average=0.0, throttled=None, reasons=doubts)
    return Latency(
        first=times.first, warmup=times.warmup, p50=p50, p90=p90, p99=p99, noise=noise, samples=times.samples
    )


def _method(report: Report, configurations: Sequence[Configuration], plan: Plan, images: str) -> dict[str, Any]:
    base = report.bundles[0].warm.samples
    tenth = {each.name: float(np.percentile(each.warm.samples, 10)) for each in report.bundles}
    return {
        "rounds": plan.rounds,
        "cold_starts": plan.cold_starts,
        "threads": report.threads,
        "provider": plan.provider,
        "images": images,
        "clock ms": report.clock,
        "calls per sample": {each.name: each.warm.repeats for each in report.bundles},
        "order": "interleaved, shuffled every round",
        "warm": "predict() of a decoded image of the model's size, all experts resident",
        "hit and switch": "run() of a preprocessed image, experts forced, only as many resident as an image needs; "
        "files in memory, compared with their sha256",
        "cold start": "in a fresh frame: interpreter is the frame, imports are the modules, load is the engine and "
        "every file over the network; the engine's own files come from the browser's cache",
        "memory": "measureUserAgentSpecificMemory of a fresh frame"
        if any(each.memory for each in report.bundles)
        else "the browser does not tell",
        "ratio": "median over the rounds, to the first row",
        "p10 ms": tenth,
        "p10 ratio": {name: value / float(np.percentile(base, 10)) for name, value in tenth.items()},
        "bytes fetched before the first prediction": {each.name: each.cold[0].bytes for each in report.bundles},
        "bytes of its files": {c.name: c.bytes_first_image for c in configurations},
    }
