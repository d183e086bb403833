"""The ONNX Runtime backend: one session per piece, all on one thread pool."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from mvmoe_deploy.backends import GraphError, LoadedPiece, OutputCheck, native_path
from mvmoe_deploy.backends.onnx_graph import check_graph
from mvmoe_deploy.bundle import Bundle, Piece
from mvmoe_deploy.errors import BackendError, first_line

POPULATE = getattr(mmap, "MAP_POPULATE", 0)
"""Flag that maps a file's pages at once; 0 where the system has none (all but Linux)."""

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

    def load(self, piece: Piece) -> LoadedPiece:
        if piece.weights:
            with self._swapping_lock:
                if piece.graph not in self._swapping:
                    self._swapping[piece.graph] = self._session(piece)
            swapping = self._swapping[piece.graph]
            self._check_signature(piece, swapping)
            weights = self._mapped(piece, swapping)
            return self._run(piece, swapping, weights)
        session = self._session(piece)
        self._check_signature(piece, session)
        return self._run(piece, session, {})

    def _run(self, piece: Piece, session: ort.InferenceSession, weights: dict[str, NDArray[np.float32]]) -> LoadedPiece:
        """Returns a function that runs a session on positional inputs and checks the outputs."""
        names, outputs, path = [spec.name for spec in piece.inputs], [x.name for x in piece.outputs], self._path(piece)
        check, bare = OutputCheck(piece, path), bare_run(session)
        followed = not self._bundle.trusted  # then the graph check has computed every shape for one image

        def run(*inputs: NDArray[np.float32]) -> list[NDArray[Any]]:
            given = dict(zip(names, inputs, strict=True))
            if weights:
                given.update(weights)
            try:
                results = bare(outputs, given, None)
            except Exception as error:  # the bindings raise a dozen unrelated types
                raise BackendError(f"{path}: {piece.name} failed in onnxruntime ({first_line(error)})") from None
            batch = len(inputs[0])
            if batch != 1 or not followed:
                check(results, batch)
            return results

        return run

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

    def _mapped(self, piece: Piece, session: ort.InferenceSession) -> dict[str, NDArray[np.float32]]:
        """The piece's weights as views of their mapped files; a file is unmapped when its last view is dropped."""
        expected = {node.name: (node.shape, node.type) for node in session.get_inputs()}
        maps: dict[str, mmap.mmap] = {}
        weights = {}
        for weight in piece.weights:
            path = self._bundle.path / weight.file
            if expected.get(weight.name) != (weight.shape, "tensor(float)"):
                raise BackendError(
                    f"{self._bundle.path / piece.graph}: takes {weight.name} as {expected.get(weight.name)}, "
                    f"manifest.json says it is {weight.shape} of float32"
                )
            if weight.file not in maps:
                maps[weight.file] = self._map(path)
            data = maps[weight.file]
            if weight.offset + weight.bytes > len(data):  # the file was complete when its sha256 was compared
                raise BackendError(f"{path}: ends before weight {weight.name}; the file is damaged, copy it again")
            values = np.frombuffer(data, np.dtype("<f4"), weight.bytes // 4, weight.offset)
            weights[weight.name] = values.reshape(weight.shape)
        return weights

    @staticmethod
    def _map(path: Path) -> mmap.mmap:
        try:
            with open(path, "rb") as file:
                if POPULATE:  # one call instead of a page fault for every few pages
                    return mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED | POPULATE, mmap.PROT_READ)
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise BackendError(f"{path}: cannot be mapped ({error}); copy it again") from None


def open_backend(bundle: Bundle, threads: int | None = 1) -> OnnxRuntimeBackend:
    """See :func:`mvmoe_deploy.backends.open_backend`."""
    return OnnxRuntimeBackend(bundle, threads)


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
