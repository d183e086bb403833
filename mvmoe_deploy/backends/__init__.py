"""The engines that run pieces. A backend is opened on a bundle and loads its pieces one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy import targets
from mvmoe_deploy.bundle import Bundle, Piece
from mvmoe_deploy.errors import BackendError

LoadedPiece = Callable[..., list[NDArray[Any]]]
"""Takes the piece's inputs and returns its outputs, both in the manifest's order; dropping it frees the piece."""


class Backend(Protocol):
    """What every backend offers.

    A backend may also have an attribute ``plain_weights`` that is true: the files of a piece beside its graph hold
    nothing but numbers, so the engine may read them before their sha256 is known. The runtime then compares them while
    the piece is loaded, and drops the piece if they differ.

    A backend that keeps memory of a dropped piece for the next one says how much in an attribute ``spare_bytes``, and
    frees it in a method ``drop_spare()``.

    Attributes:
        name: the backend's name in the target's record, see :class:`mvmoe_deploy.targets.Engine`.
        unloads: whether dropping a loaded piece gives its memory back.
    """

    name: str
    unloads: bool

    def load(self, piece: Piece) -> LoadedPiece:
        """Makes a piece ready to run.

        The caller has already compared the piece's files with the manifest, of plain weights only the sizes.

        Raises:
            BackendError: the engine cannot read the piece.
        """
        ...


def native_path(path: str | os.PathLike[str]) -> str:
    """A path for a library that is not written in Python and takes paths as UTF-8.

    In a locale without UTF-8, Python keeps the bytes that it cannot decode as surrogates, which such a library refuses
    with a message about something else.

    Raises:
        BackendError: the path is not UTF-8.
    """
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise BackendError(f"{path}: not UTF-8, as its reader needs; rename the file or folder") from None


class GraphError(ValueError):
    """A graph that must not be passed to an engine; the message says why."""


MAX_THREADS_PER_CPU = 4
"""Largest number of threads per CPU. More threads only wait for each other: 256 on two CPUs take a thousand times as
long as one."""


def check_threads(threads: int) -> None:
    """Refuses a number of threads that would only wait for each other.

    Raises:
        BackendError: the number is below 1, or above :data:`MAX_THREADS_PER_CPU` for each CPU.
    """
    if threads < 1:
        raise BackendError(f"threads={threads}: must be at least 1")
    cpus = os.cpu_count() or 1
    if threads > MAX_THREADS_PER_CPU * cpus:
        most = MAX_THREADS_PER_CPU * cpus
        raise BackendError(f"threads={threads}: must be at most {most}, {MAX_THREADS_PER_CPU} for each CPU here")


def open_backend(bundle: Bundle, name: str | None = None, threads: int | None = 1) -> Backend:
    """Opens a backend on a bundle.

    Args:
        bundle: the bundle whose pieces it will load.
        name: one of the target's backends; by default its first.
        threads: threads a piece may use; None for the number that the engine already uses in this process, or else one.

    Raises:
        BackendError: the target has no such backend, or the backend is not installed or does not run here.
    """
    target = targets.get(bundle.manifest.target)
    try:
        engine = target.backend(name)
    except BackendError as error:
        raise BackendError(f"{bundle.path}: {error}") from None
    opens: Callable[[Bundle, int | None], Backend]
    opens = targets.resolve(engine.opens, f"backend {engine.name}", target.requirement, BackendError)
    return opens(bundle, threads)


class OutputCheck:
    """Compares a piece's outputs with the manifest in about a microsecond."""

    def __init__(self, piece: Piece, path: object) -> None:
        self._piece, self._path = piece, path
        self._specs = [(tuple(spec.shape[1:]), np.dtype(spec.dtype)) for spec in piece.outputs]
        self._of_one = self._of(1)

    def _of(self, batch: int) -> list[tuple[tuple[int | str, ...], np.dtype[Any]]]:
        return [((batch, *shape), dtype) for shape, dtype in self._specs]

    def __call__(self, outputs: list[NDArray[Any]], batch: int) -> None:
        """Checks the outputs of ``batch`` images.

        Raises:
            BackendError: the number of outputs, a shape or a type differs from the manifest.
        """
        try:
            found = [(output.shape, output.dtype) for output in outputs]
        except AttributeError:  # an output is not an array
            found = []
        if found != (self._of_one if batch == 1 else self._of(batch)):
            self._fail(found, batch)

    def _fail(self, found: list[tuple[tuple[int, ...], np.dtype[Any]]], batch: int) -> NoReturn:
        returned, wanted = (
            ", ".join(f"{list(shape)} of {dtype}" for shape, dtype in each) for each in (found, self._of(batch))
        )
        raise BackendError(
            f"{self._path}: {self._piece.name} returned {returned or 'no tensors'}, manifest.json says {wanted}; "
            "export again"
        )
