"""The ONNX Runtime backend: one session per piece, all on one thread pool."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from mvmoe_deploy.backends import GraphError, LoadedPiece, OutputCheck, native_path
from mvmoe_deploy.backends.onnx_graph import check_graph
from mvmoe_deploy.bundle import WEIGHT_ALIGNMENT, Bundle, Piece
from mvmoe_deploy.errors import BackendError, first_line

ENGINE_TYPES = {"float32": "tensor(float)", "int8": "tensor(int8)", "uint8": "tensor(uint8)"}
"""The engine's names of the types that weights have."""

_lock = threading.Lock()
_pool_threads: int | None = None  # size of the process-wide thread pool, once there is one


class OnnxRuntimeBackend:
    """Runs ``onnx`` bundles on the CPU."""

    name = "onnxruntime"
    unloads = True
    plain_weights = True  # the check of a graph bounds which bytes of which file each weight is

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self._bundle = bundle
        self._options = session_options(threads)
        self._ready_options = session_options(threads)
        self._ready_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._swapping: dict[str, ort.InferenceSession] = {}  # graphs that take weights as inputs, each loaded once
        self._swapping_lock = threading.Lock()
        self._sizes = {file.path: file.bytes for file in bundle.manifest.files}
        self._sound: set[str] = set()  # pieces whose graphs have passed the check
        self._fitting: set[str] = set()  # swappable pieces that have been compared with their graph
        self._plans: dict[str, _Plan] = {}
        self._spare = _Spare()
        self._checks: dict[str, OutputCheck] = {}

    @property
    def spare_bytes(self) -> int:
        return self._spare.bytes

    def drop_spare(self) -> None:
        self._spare.drop()

    def load(self, piece: Piece) -> LoadedPiece:
        if piece.weights:
            with self._swapping_lock:
                if piece.graph not in self._swapping:
                    self._swapping[piece.graph] = self._session(piece)
            swapping = self._swapping[piece.graph]
            if piece.name not in self._fitting:
                self._check_signature(piece, swapping)
                self._check_weights(piece, swapping)
                self._fitting.add(piece.name)
            return self._run(piece, swapping, self._weights(piece))
        session = self._session(piece)
        self._check_signature(piece, session)
        return self._run(piece, session, None)

    def _run(self, piece: Piece, session: ort.InferenceSession, weights: _Weights | None) -> LoadedPiece:
        """Returns a function that runs a session on positional inputs and checks the outputs."""
        names, outputs, path = [spec.name for spec in piece.inputs], [x.name for x in piece.outputs], self._path(piece)
        bare = bare_run(session)
        followed = not self._bundle.trusted  # then the graph check has computed every shape for one image

        def run(*inputs: NDArray[np.float32]) -> list[NDArray[Any]]:
            given = dict(zip(names, inputs, strict=True))
            if weights is not None:
                given.update(weights.arrays)
            try:
                results = bare(outputs, given, None)
            except Exception as error:  # the bindings raise a dozen unrelated types
                raise BackendError(f"{path}: {piece.name} failed in onnxruntime ({first_line(error)})") from None
            batch = len(inputs[0])
            if batch != 1 or not followed:
                self._output_check(piece)(results, batch)
            return results

        return one_at_a_time(run) if piece.inputs[0].shape[0] == 1 else run

    def _output_check(self, piece: Piece) -> OutputCheck:
        check = self._checks.get(piece.name)
        if check is None:
            check = self._checks[piece.name] = OutputCheck(piece, self._path(piece))
        return check

    def _path(self, piece: Piece) -> Path:
        return self._bundle.path / piece.graph

    def _check(self, piece: Piece) -> None:
        """Checks a piece's graph once, however often the piece is loaded.

        Raises:
            BackendError: the graph is damaged or unsafe.
        """
        if self._bundle.trusted or piece.name in self._sound:
            return
        path = self._path(piece)
        try:
            check_graph(path.read_bytes(), piece, self._sizes)
        except OSError as error:
            raise BackendError(f"{path}: cannot be read ({first_line(error)})") from None
        except GraphError as error:
            raise BackendError(
                f"{path}: refused, {first_line(error)}; if you trust whoever made this bundle, load it with trust=True "
                "(--trust)"
            ) from None
        self._sound.add(piece.name)

    def _session(self, piece: Piece) -> ort.InferenceSession:
        path = self._path(piece)
        self._check(piece)
        options, native = self._ready_options if piece.optimised else self._options, native_path(path)
        try:
            return ort.InferenceSession(native, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the bindings raise a dozen unrelated types
            raise BackendError(f"{path}: onnxruntime {ort.__version__} cannot load it ({first_line(error)})") from None

    def _check_signature(self, piece: Piece, session: ort.InferenceSession) -> None:
        inputs = [spec.name for spec in piece.inputs] + [weight.name for weight in piece.weights]
        for what, nodes, names in (
            ("takes inputs", session.get_inputs(), inputs),
            ("has outputs", session.get_outputs(), [spec.name for spec in piece.outputs]),
        ):
            found = [node.name for node in nodes]
            if found != names:
                path = self._bundle.path / piece.graph
                raise BackendError(f"{path}: {what} {found}, manifest.json says {names}")

    def _check_weights(self, piece: Piece, session: ort.InferenceSession) -> None:
        expected = {node.name: (node.shape, node.type) for node in session.get_inputs()}
        for weight in piece.weights:
            if expected.get(weight.name) != (weight.shape, ENGINE_TYPES[weight.dtype]):
                raise BackendError(
                    f"{self._path(piece)}: takes {weight.name} as {expected.get(weight.name)}, "
                    f"manifest.json says it is {weight.shape} of {weight.dtype}"
                )

    def _weights(self, piece: Piece) -> _Weights:
        """Reads the piece's weights into memory, that of an expert that was dropped if there is one.

        Reading 2.4 MB takes 0.14 ms and leaves them in the processor's cache. Mapping the file takes 0.22 ms, most of
        it for entries of the page table, and the run after that has to fetch the weights.
        """
        plan = self._plans.get(piece.name)
        if plan is None:
            plan = self._plans[piece.name] = _Plan.of(piece)
        weights = self._spare.take(plan)
        for file, start, end in plan.files:
            path = self._bundle.path / file
            try:
                with open(path, "rb", buffering=0) as opened:
                    count = opened.readinto(weights.memory[start:end])
            except OSError as error:
                raise BackendError(f"{path}: cannot be read ({first_line(error)}); copy it again") from None
            if count != end - start:  # the file was complete when its sha256 was compared
                raise BackendError(f"{path}: ends before its last weight; the file is damaged, copy it again")
        return weights


class _Plan(msgspec.Struct, frozen=True):
    """Where a swappable piece's weights go in memory.

    Attributes:
        files: each file with the place where its bytes begin, and the place where its last weight ends.
        views: name, type, number of values, place and shape of each weight. Pieces for which they are equal can take
            each other's memory.
        size: bytes in all.
    """

    files: list[tuple[str, int, int]]
    views: list[tuple[str, np.dtype[Any], int, int, list[int]]]
    size: int

    @classmethod
    def of(cls, piece: Piece) -> _Plan:
        ends: dict[str, int] = {}
        for weight in piece.weights:
            ends[weight.file] = max(ends.get(weight.file, 0), weight.offset + weight.bytes)
        starts: dict[str, int] = {}
        size = 0
        for file, end in ends.items():
            starts[file] = size
            size += -(-end // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT
        views = []
        for weight in piece.weights:
            kind = np.dtype(weight.dtype).newbyteorder("<")
            place = starts[weight.file] + weight.offset
            views.append((weight.name, kind, weight.bytes // kind.itemsize, place, weight.shape))
        return cls([(file, start, start + ends[file]) for file, start in starts.items()], views, size)


class _Spare:
    """The memory of the expert that was dropped last, for the next one: fresh memory takes longer than reading."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[_Plan, memoryview, dict[str, NDArray[Any]]] | None = None

    def take(self, plan: _Plan) -> _Weights:
        """Memory for weights, aligned as they are in their files."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None and kept[0].views == plan.views:
            return _Weights(self, *kept)
        fresh = np.empty(plan.size + WEIGHT_ALIGNMENT, np.uint8)
        start = -fresh.ctypes.data % WEIGHT_ALIGNMENT
        memory = fresh.data[start : start + plan.size]
        arrays = {
            name: np.frombuffer(memory, kind, count, place).reshape(shape)
            for name, kind, count, place, shape in plan.views
        }
        return _Weights(self, plan, memory, arrays)

    def give(self, plan: _Plan, memory: memoryview, arrays: dict[str, NDArray[Any]]) -> None:
        """Keeps memory in place of what is kept already."""
        with self._lock:
            self._kept = plan, memory, arrays

    @property
    def bytes(self) -> int:
        """Size of the memory that is kept now."""
        kept = self._kept
        return kept[0].size if kept is not None else 0

    def drop(self) -> None:
        """Frees what is kept."""
        with self._lock:
            self._kept = None


class _Weights:
    """The weights of a swappable piece; when the piece is dropped, their memory is kept for the next one."""

    def __init__(self, spare: _Spare, plan: _Plan, memory: memoryview, arrays: dict[str, NDArray[Any]]) -> None:
        self.memory, self.arrays = memory, arrays
        self._spare, self._plan = spare, plan

    def __del__(self) -> None:
        self._spare.give(self._plan, self.memory, self.arrays)


def open_backend(bundle: Bundle, threads: int | None = 1) -> OnnxRuntimeBackend:
    """See :func:`mvmoe_deploy.backends.open_backend`."""
    return OnnxRuntimeBackend(bundle, threads)


def one_at_a_time(run: LoadedPiece) -> LoadedPiece:
    """Gives a piece whose graph takes one image the images of a batch in turn."""

    # A function that called itself would be a cycle: an evicted expert would stay until the garbage collector came.
    def run_each(*inputs: NDArray[np.float32]) -> list[NDArray[Any]]:
        if len(inputs[0]) == 1:
            return run(*inputs)
        parts = [run(*(array[i : i + 1] for array in inputs)) for i in range(len(inputs[0]))]
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    return run_each


def bare_run(session: ort.InferenceSession) -> Callable[..., list[NDArray[Any]]]:
    """The session's ``run`` without the checks that it first makes in Python.

    After a model's run has filled the processor's cache, these checks cost 15 µs per call, which matters for a piece
    that takes half a millisecond. The names were compared when the piece was loaded, and the engine checks shapes and
    dtypes itself.
    """
    run: Callable[..., list[NDArray[Any]]] = getattr(session, "_sess", session).run
    return run


def session_options(threads: int | None) -> ort.SessionOptions:
    """Options for sessions that run in turn.

    By default each session has its own thread pool, and the idle workers of one keep spinning while another computes:
    two sessions with two threads each on two cores take 2.3 times as long as necessary. A single thread needs no pool.
    Several threads come from one pool that all sessions of the process share.

    Args:
        threads: number of threads; None for the size of the process's pool, or one if there is no pool.

    Raises:
        BackendError: this process already has a pool of another size, which onnxruntime cannot change.
    """
    global _pool_threads
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; a warning about an unused initialiser helps nobody
    with _lock:
        threads = threads or _pool_threads or 1
        if _pool_threads not in (None, threads):
            # once there is a shared pool, onnxruntime refuses sessions with threads of their own
            raise BackendError(
                f"threads={threads}: this process already runs onnxruntime with {_pool_threads} threads; "
                "use that number, or another process"
            )
        if threads == 1:
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            return options
        if _pool_threads is None:
            ort.set_global_thread_pool_sizes(threads, 1)
            _pool_threads = threads
    options.use_per_session_threads = False
    return options
