"""The figures by which this project judges itself, each compared side by side with a baseline.

The models have random weights, because none of these figures depends on what a model has learned.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

import mvmoe_deploy
from mvmoe_deploy.backends import Backend, LoadedPiece, native_path, open_backend
from mvmoe_deploy.bench.candidates.baselines import export_stock, random_checkpoint
from mvmoe_deploy.bench.candidates.configuration import BarePieces, Configuration
from mvmoe_deploy.bench.candidates.prepare import of_bundle, prepare
from mvmoe_deploy.bench.measure.bootstrap import ratio_estimate
from mvmoe_deploy.bench.measure.coldstart import measure_cold_start
from mvmoe_deploy.bench.measure.latency import interleave
from mvmoe_deploy.bench.measure.memory import measure_memory
from mvmoe_deploy.bundle import Bundle, Piece, open_bundle
from mvmoe_deploy.errors import BackendError
from mvmoe_deploy.exporters.exporter import Options
from mvmoe_deploy.exporters.pipeline import export_checkpoint
from mvmoe_deploy.images import preprocess
from mvmoe_deploy.models import build, config_from_name
from mvmoe_deploy.terminal import counted

if TYPE_CHECKING:
    import onnxruntime as ort


@dataclass(frozen=True)
class Figure:
    """One measured figure and the bar that it must not exceed.

    Attributes:
        what: what was measured.
        value: the figure.
        bar: the bar.
        detail: the times or sizes behind it.
        floor: the same figure of bare onnxruntime sessions of the same graphs, measured in the same process; no runtime
            that runs these graphs can be below it. None where there is no such figure.
    """

    what: str
    value: float
    bar: float
    detail: str
    floor: float | None = None

    @property
    def met(self) -> bool:
        """Whether the figure does not exceed the bar."""
        return self.value <= self.bar


def measure_all(rounds: int, folder: Path) -> Iterator[Figure]:
    """Yields the figures one by one."""
    config = config_from_name("mvmoe_12x192")
    yield export_time(folder)
    routed, dense = _exported("mvmoe_12x192", folder)
    stored = sum(file.bytes for file in routed.manifest.files)
    distinct = 4 * (config.parameters() or 0)
    yield Figure(
        "bundle bytes / bytes of distinct fp32 parameters", stored / distinct, 1.03, f"{stored:,} / {distinct:,}"
    )
    for threads in (1, 2):
        for scale in ("12x192", "6x64"):
            yield _in_fresh_process(
                function="routed_against_dense", scale=scale, threads=threads, rounds=rounds, folder=folder
            )
    eight, _ = _exported("mvmoe_12x192", folder, "int8")
    small = sum(file.bytes for file in eight.manifest.files)
    yield Figure("int8 bytes / fp32 bytes, 12x192", small / stored, 0.3, f"{small:,} / {stored:,}")
    yield _in_fresh_process(function="int8_against_fp32", scale="12x192", threads=1, rounds=rounds, folder=folder)
    yield _in_fresh_process(function="int8_against_dense", scale="12x192", threads=1, rounds=rounds, folder=folder)
    yield _in_fresh_process(function="routed_against_stock", scale="12x192", threads=1, rounds=rounds, folder=folder)
    whole = _all_experts("12x192", folder)
    a, b, c = ([_memory(each) for _ in range(5)] for each in (of_bundle(routed.path), of_bundle(dense.path), whole))
    yield Figure(
        "memory, one resident expert / dense baseline",
        statistics.median(a) / statistics.median(b),
        1.15,
        f"{statistics.median(a) / 1e6:.1f} MB / {statistics.median(b) / 1e6:.1f} MB",
    )
    yield Figure(
        "memory, one resident expert / one graph of all experts",
        statistics.median(a) / statistics.median(c),
        0.6,
        f"{statistics.median(a) / 1e6:.1f} MB / {statistics.median(c) / 1e6:.1f} MB",
    )
    yield from cold_start(of_bundle(routed.path), whole, folder)
    yield _in_fresh_process(function="expert_switch", scale="12x192", threads=1, rounds=rounds, folder=folder)
    yield _in_fresh_process(function="swappable_switch", scale="12x192", threads=1, rounds=rounds, folder=folder)
    yield _in_fresh_process(function="swappable_warm", scale="12x192", threads=1, rounds=rounds, folder=folder)
    yield _in_fresh_process(function="predict_overhead", scale="12x192", threads=1, rounds=rounds, folder=folder)
    yield _in_fresh_process(function="tails_in_turn", scale="6x64", threads=1, rounds=rounds, folder=folder)
    code = (
        "import sys, mvmoe_deploy; print(sum(m in sys.modules for m in ('torch', 'onnx', 'executorch', 'coremltools')))"
    )
    heavy = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    yield Figure(
        "heavy packages imported by import mvmoe_deploy", int(heavy), 0, "torch, onnx, executorch, coremltools"
    )


def export_time(folder: Path, repeats: int = 3) -> Figure:
    """Times whole ``mvmoe-export`` commands in turn: all experts against the dense baseline."""
    checkpoints = [
        random_checkpoint(config_from_name("mvmoe_12x192"), folder / "12x192-moe.pt"),
        random_checkpoint(config_from_name("vit_12x192"), folder / "12x192-dense.pt"),
    ]
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats):
        for checkpoint, taken in zip(checkpoints, seconds, strict=True):
            started = time.perf_counter()
            command = [
                sys.executable,
                "-P",
                "-m",
                "mvmoe_deploy.cli.export",
                str(checkpoint),
                "--target",
                "onnx",
                "--force",
            ]
            out = ["--out", str(folder / f"{checkpoint.stem}.mvmoe")]
            subprocess.run([*command, *out], check=True, capture_output=True)
            taken.append(time.perf_counter() - started)
    moe, dense = map(statistics.median, seconds)
    return Figure("exporting mvmoe_12x192 / its dense baseline, time", moe / dense, 2.5, f"{moe:.1f} s / {dense:.1f} s")


def routed_against_dense(scale: str, threads: int, rounds: int, folder: Path) -> Figure:
    """Times ``run`` with one preprocessed image: the routed bundle against the dense one, both exported here."""
    routed, dense = _exported(f"mvmoe_{scale}", folder)
    what = f"routed p50 / dense p50, {scale}, {counted(threads, 'thread')}"
    figure = _runs(what, routed, dense, ("routed", "dense"), threads, rounds, bar=1.05)
    batch = _batch(routed)
    trunk, tail = (_bare(routed, piece, threads) for piece in (routed.piece("trunk"), routed.pieces("tail")[0]))
    model = _bare(dense, dense.piece("model"), threads)

    def bare(_: int) -> None:
        tokens, probabilities = trunk.run(None, {"images": batch})
        tail.run(None, {"tokens": tokens, "gate": probabilities[:, 0]})

    samples = interleave({"routed": bare, "dense": lambda _: model.run(None, {"images": batch})}, rounds).samples
    return replace(figure, floor=_ratio_of_medians(samples, "routed", "dense"))


def int8_against_fp32(scale: str, threads: int, rounds: int, folder: Path) -> Figure:
    """Times ``run`` of the same model in 8 bits and in float32, on a processor with VNNI or without."""
    eight, full = _exported(f"mvmoe_{scale}", folder, "int8")[0], _exported(f"mvmoe_{scale}", folder)[0]
    what = f"int8 p50 / fp32 p50, {scale}, {counted(threads, 'thread')}"
    return _runs(what, eight, full, ("int8", "fp32"), threads, rounds, bar=1.0)


def int8_against_dense(scale: str, threads: int, rounds: int, folder: Path) -> Figure:
    """Times ``run`` of the routed bundle against the dense one, both in 8 bits."""
    routed, dense = _exported(f"mvmoe_{scale}", folder, "int8")
    what = f"routed p50 / dense p50, both int8, {scale}, {counted(threads, 'thread')}"
    return _runs(what, routed, dense, ("routed", "dense"), threads, rounds, bar=1.05)


def _runs(
    what: str, first: Bundle, second: Bundle, names: tuple[str, str], threads: int, rounds: int, bar: float
) -> Figure:
    """Times ``run`` of two bundles with one preprocessed image."""
    batch = _batch(first)
    with mvmoe_deploy.load(first.path, threads=threads) as a, mvmoe_deploy.load(second.path, threads=threads) as b:
        samples = interleave({names[0]: lambda _: a.run(batch), names[1]: lambda _: b.run(batch)}, rounds).samples
    return _latency_figure(what=what, samples=samples, a=names[0], b=names[1], bar=bar)


def routed_against_stock(scale: str, threads: int, rounds: int, folder: Path) -> Figure:
    """Times a routed bundle against a bare session of ``torch.onnx.export``'s default export of the dense baseline."""
    import onnxruntime as ort

    from mvmoe_deploy.backends.onnxruntime import session_options

    routed, _ = _exported(f"mvmoe_{scale}", folder)
    config = config_from_name(f"vit_{scale}")
    stock = folder / f"stock-{scale}.onnx"
    if not stock.exists():
        export_stock(build(config), stock)
    session = ort.InferenceSession(native_path(stock), session_options(threads), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    batch = np.random.default_rng(0).standard_normal((1, 3, config.image_size, config.image_size)).astype(np.float32)
    with mvmoe_deploy.load(routed.path, threads=threads) as runtime:
        candidates: dict[str, Callable[[int], object]] = {
            "routed": lambda _: runtime.run(batch),
            "stock": lambda _: session.run(None, {name: batch}),
        }
        samples = interleave(candidates, rounds).samples
    what = f"routed p50 / stock torch.onnx.export of the dense baseline, {scale}, {counted(threads, 'thread')}"
    return _latency_figure(what=what, samples=samples, a="routed", b="stock", bar=1.0)


def cold_start(routed: Configuration, whole: Configuration, folder: Path, repeats: int = 20) -> Iterator[Figure]:
    """Process start to first prediction, against one graph of all experts, both bare and in the same runtime.

    The bare graph needs none of this project's imports, manifest and hashes. With the same runtime, only the layout
    makes the difference. The floor has this project's imports, and trunk and tail in bare sessions.
    """
    image = folder / "image.npy"
    size = routed.preprocessing.size
    np.save(image, np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8))
    bundle = str(Path(whole.path).parent)
    candidates = [
        msgspec.structs.replace(routed, name="routed"),
        msgspec.structs.replace(whole, name="in a bare session"),
        msgspec.structs.replace(whole, name="in the same runtime", path=bundle),
        BarePieces(**{**msgspec.structs.asdict(routed), "name": "floor"}),
    ]
    found = measure_cold_start(candidates, image, repeats=repeats)

    def parts(name: str) -> str:
        c = found[name]
        return " + ".join(f"{statistics.median(part):.0f}" for part in (c.interpreter, c.imports, c.load, c.first_run))

    for name, bar in (("in a bare session", 1.15), ("in the same runtime", 0.8)):
        detail = f"interpreter + imports + load + run: {parts('routed')} ms / {parts(name)} ms"
        ratio, floor = (found[first].total.value / found[name].total.value for first in ("routed", "floor"))
        yield Figure(f"cold start / one graph of all experts {name}", ratio, bar, detail, floor)


def expert_switch(scale: str, threads: int, rounds: int, folder: Path) -> Figure:
    """Times loading and running a tail against running a resident tail; the files are in the page cache.

    The floor is a bare session, created and run.
    """
    routed, _ = _exported(f"mvmoe_{scale}", folder)
    tails = _Tails(routed, threads)
    calls = {"switch": tails.switch, "warm": tails.warm, "bare": tails.switch_bare}
    samples = interleave(calls, rounds).samples
    what = f"expert switch / warm tail run, {scale}"
    figure = _latency_figure(what=what, samples=samples, a="switch", b="warm", bar=4.5)
    return replace(figure, floor=_ratio_of_medians(samples, "bare", "warm"))


def swappable_switch(scale: str, threads: int, rounds: int, folder: Path) -> Figure:
    """Times loading and running a tail of the swappable layout against a warm run of the standalone tail.

    The floor is resident tails in turn: their weights have left the processor's cache, but nothing is loaded.
    """
    routed, _ = _exported(f"mvmoe_{scale}", folder)
    swappable, standalone = _Tails(_swappable(scale, folder), threads), _Tails(routed, threads)
    samples = interleave({"switch": swappable.switch, "warm": standalone.warm}, rounds).samples
    what = f"expert switch, swappable / warm standalone tail run, {scale}"
    figure = _latency_figure(what=what, samples=samples, a="switch", b="warm", bar=1.5)
    # after the figure, because ten resident tails leave it less of the processor's cache
    samples = interleave({"turn": standalone.resident_in_turn(), "warm": standalone.warm}, rounds).samples
    return replace(figure, floor=_ratio_of_medians(samples, "turn", "warm"))


def swappable_warm(scale: str, threads: int, rounds: int, folder: Path) -> Figure:
    """Times ``run`` with one preprocessed image in both layouts; the expert is resident."""
    routed, _ = _exported(f"mvmoe_{scale}", folder)
    what = f"warm total, swappable / standalone, {scale}"
    return _runs(what, _swappable(scale, folder), routed, ("swappable", "standalone"), threads, rounds, bar=1.015)


def tails_in_turn(scale: str, threads: int, rounds: int, folder: Path) -> Figure:
    """Times images that go to all experts in turn against images that stay with one; all experts are resident.

    A tail that others ran after has left the processor's cache, in bare sessions too.
    """
    routed, _ = _exported(f"mvmoe_{scale}", folder)
    routing = routed.manifest.routing
    assert routing is not None
    batch = _batch(routed)
    trunk = _bare(routed, routed.piece("trunk"), threads)
    tails = [_bare(routed, piece, threads) for piece in routed.pieces("tail")]

    def bare(expert: int) -> None:
        tokens, probabilities = trunk.run(None, {"images": batch})
        tails[expert].run(None, {"tokens": tokens, "gate": probabilities[:, expert]})

    with mvmoe_deploy.load(routed.path, threads=threads, preload="all") as runtime:
        one, turn = _runs_of(lambda expert: runtime.run(batch, np.array([[expert]])), routing.experts, rounds)
    floor, floor_turn = _runs_of(bare, routing.experts, rounds)
    detail = f"{turn:.3f} ms / {one:.3f} ms"
    return Figure(f"images to all experts in turn / to one, {scale}", turn / one, 1.1, detail, floor_turn / floor)


def _runs_of(run: Callable[[int], object], experts: int, rounds: int) -> tuple[float, float]:
    """Median milliseconds of images that stay with one expert, and of images that go to all in turn, in blocks."""
    samples: tuple[list[float], list[float]] = [], []
    for number in range(2 * max(1, rounds // 20)):
        for image in range(24):
            started = time.perf_counter()
            run(image % experts if number % 2 else 0)
            if image >= 4:  # the first ones of a block find the caches as the block before left them
                samples[number % 2].append(1e3 * (time.perf_counter() - started))
    return statistics.median(samples[0]), statistics.median(samples[1])


class _Tails:
    """The tails of a bundle, which get the tokens of one image."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._backend = open_backend(bundle, threads=threads)
        self._bundle, self._threads, self._pieces = bundle, threads, bundle.pieces("tail")
        tokens, probabilities = self._backend.load(bundle.piece("trunk"))(_batch(bundle))
        self._inputs = (tokens, probabilities[:, 0])
        self._resident = self._backend.load(self._pieces[0])

    def switch(self, number: int) -> None:
        """Loads, runs and drops a tail that differs from the last one."""
        self._backend.load(self._other(number))(*self._inputs)

    def switch_bare(self, number: int) -> None:
        """Does so with a bare session."""
        tokens, gate = self._inputs
        _bare(self._bundle, self._other(number), self._threads).run(None, {"tokens": tokens, "gate": gate})

    def resident_in_turn(self) -> Callable[[int], object]:
        """Loads all tails; returns a function that runs one which differs from the last one."""
        resident = {piece.name: self._backend.load(piece) for piece in self._pieces}
        return lambda number: resident[self._other(number).name](*self._inputs)

    def _other(self, number: int) -> Piece:
        return self._pieces[1 + number % (len(self._pieces) - 1)]

    def warm(self, _: int) -> None:
        """Runs a resident tail."""
        self._resident(*self._inputs)


def predict_overhead(scale: str, threads: int, rounds: int, folder: Path) -> Figure:
    """Milliseconds that ``predict(array)`` takes beyond its bare session runs and preprocessing."""
    routed, _ = _exported(f"mvmoe_{scale}", folder)
    size = routed.manifest.preprocessing.size
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    loaded: dict[str, LoadedPiece] = {}

    class Remembering:
        """Keeps the sessions that the runtime loads; other sessions would have weights of their own to cache."""

        def __init__(self, backend: Backend) -> None:
            self.name, self.unloads, self._backend = backend.name, backend.unloads, backend

        def load(self, piece: Piece) -> LoadedPiece:
            loaded[piece.name] = self._backend.load(piece)
            return loaded[piece.name]

    with mvmoe_deploy.Runtime(routed, Remembering(open_backend(routed, threads=threads))) as runtime:
        expert = runtime.predict(image).expert
        trunk, tail = loaded["trunk"], loaded[routed.piece("tail", expert).name]

        def bare(_: int) -> None:
            tokens, probabilities = trunk(preprocess(image, routed.manifest.preprocessing)[None])
            tail(tokens, probabilities[:, expert])

        samples = interleave({"predict": lambda _: runtime.predict(image), "bare": bare}, rounds).samples
    difference = np.median(np.array(samples["predict"]) - np.array(samples["bare"]))
    detail = f"{np.median(samples['predict']):.3f} ms - {np.median(samples['bare']):.3f} ms"
    return Figure(f"predict(array) minus bare runs and preprocessing, {scale}, ms", float(difference), 0.05, detail)


def _memory(c: Configuration) -> int:
    memory = measure_memory(c, sweep=False)
    if memory is None:
        raise BackendError("memory: only Linux has proportional set sizes; measure on Linux")
    return memory.used.total


def _latency_figure(what: str, samples: dict[str, list[float]], a: str, b: str, bar: float) -> Figure:
    p50 = {name: statistics.median(values) for name, values in samples.items()}
    paired = ratio_estimate(samples[a], samples[b]).value
    return Figure(what, p50[a] / p50[b], bar, f"{p50[a]:.2f} ms / {p50[b]:.2f} ms, paired by round {paired:.3f}")


def _ratio_of_medians(samples: dict[str, list[float]], a: str, b: str) -> float:
    return statistics.median(samples[a]) / statistics.median(samples[b])


def _batch(bundle: Bundle) -> NDArray[np.float32]:
    """One preprocessed image of noise."""
    size = bundle.manifest.preprocessing.size
    return np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)


def _bare(bundle: Bundle, piece: Piece, threads: int) -> ort.InferenceSession:
    """A session of a piece's graph, with the options that the backend gives it and nothing around it."""
    import onnxruntime as ort

    from mvmoe_deploy.backends.onnxruntime import session_options

    options = session_options(threads)
    if piece.optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = native_path(bundle.path / piece.graph)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _exported(name: str, folder: Path, precision: str = "fp32") -> tuple[Bundle, Bundle]:
    """The bundles of a scale and of its dense baseline; they are exported only once."""
    scale = name.removeprefix("mvmoe_")
    options = Options(precision)
    bundles = []
    for kind, shape in (("moe", config_from_name(name)), ("dense", config_from_name(f"vit_{scale}"))):
        out = folder / (f"{scale}-{kind}.mvmoe" if precision == "fp32" else f"{scale}-{kind}-{precision}.mvmoe")
        if not out.exists():
            checkpoint = random_checkpoint(shape, folder / f"{scale}-{kind}.pt")
            export_checkpoint(checkpoint, "onnx", out, options=options)
        bundles.append(open_bundle(out))
    return bundles[0], bundles[1]


def _swappable(scale: str, folder: Path) -> Bundle:
    """A bundle with the same weights in the swappable layout."""
    out = folder / f"{scale}-swappable.mvmoe"
    if not out.exists():
        export_checkpoint(folder / f"{scale}-moe.pt", "onnx", out, options=Options(layout="swappable"))
    return open_bundle(out)


def _all_experts(scale: str, folder: Path) -> Configuration:
    """The same weights in one graph that selects the expert itself."""
    return prepare([folder / f"{scale}-moe.pt"], folder, ["torch"], ["all-experts"])[-1]


def _in_fresh_process(function: str, scale: str, threads: int, rounds: int, folder: Path) -> Figure:
    """Calls a function of this module in a new process, where threads can be set and memory starts empty."""
    _exported(f"mvmoe_{scale}", folder)
    code = (
        f"import json, pathlib, dataclasses; from mvmoe_deploy.bench.selfcheck import bars as f; print(json.dumps("
        f"dataclasses.asdict(f.{function}({scale!r}, {threads}, {rounds}, pathlib.Path({str(folder)!r})))))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{function} failed:\n{done.stderr}")
    return Figure(**json.loads(done.stdout.splitlines()[-1]))
