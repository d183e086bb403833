"""The engines that run pieces. A backend is opened on a bundle and loads its pieces one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy import targets
from mvmoe_deploy.bundle import Bundle, Piece
from mvmoe_deploy.errors import BackendError

LoadedPiece = Callable[..., list[NDArray[Any]]]
"""Takes the piece's inputs in the manifest's order, returns its outputs likewise; dropping it frees it."""


class Backend(Protocol):
    """What every backend offers.

    Attributes:
        name: as in the target's record, see :class:`mvmoe_deploy.targets.Engine`.
        unloads: whether dropping a loaded piece gives its memory back.
    """

    name: str
    unloads: bool

    def load(self, piece: Piece) -> LoadedPiece:
        """Makes a piece ready to run.

        The caller has compared the piece's files with the manifest.

        Raises:
            BackendError: the engine cannot read it.
        """
        ...


MAX_THREADS_PER_CPU = 4
"""More only wait for each other: 256 threads on two CPUs take a thousand times as long as one."""


def check_threads(threads: int) -> None:
    """Refuses a number of threads that would only wait for each other.

    Raises:
        BackendError: less than 1, or more than :data:`MAX_THREADS_PER_CPU` for each CPU.
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
        threads: threads a piece may use; None for as many as the engine uses in this process already, or else one.

    Raises:
        BackendError: the target has no such backend, or it is not installed or does not run here.
    """
    target = targets.get(bundle.manifest.target)
    try:
        engine = target.backend(name)
    except BackendError as error:
        raise BackendError(f"{bundle.path}: {error}") from None
    opens: Callable[[Bundle, int | None], Backend]
    opens = targets.resolve(engine.opens, f"backend {engine.name}", target.requirement, BackendError)
    return opens(bundle, threads)


Shapes = list[tuple[tuple[int | str, ...], np.dtype[Any]]]


def output_shapes(piece: Piece) -> Shapes:
    """Shape of one image's part and type of each output, as :func:`check_outputs` takes them."""
    return [(tuple(spec.shape[1:]), np.dtype(spec.dtype)) for spec in piece.outputs]


def check_outputs(outputs: list[NDArray[Any]], expected: Shapes, batch: int, piece: Piece, path: object) -> None:
    """Compares what a piece returned with what the manifest says it returns; two microseconds.

    Args:
        outputs: as returned.
        expected: by :func:`output_shapes`.
        batch: images that were given.
        piece: its manifest entry.
        path: its file, for the error.

    Raises:
        BackendError: another number of outputs, another shape or type.
    """
    if len(outputs) == len(expected):
        for output, (shape, dtype) in zip(outputs, expected, strict=True):
            if type(output) is not np.ndarray or output.dtype != dtype or output.shape != (batch, *shape):
                break
        else:
            return
    found = [f"{list(getattr(x, 'shape', []))} of {getattr(x, 'dtype', type(x).__name__)}" for x in outputs]
    wanted = [f"{[batch, *shape]} of {dtype}" for shape, dtype in expected]
    raise BackendError(
        f"{path}: {piece.name} returned {', '.join(found)}, manifest.json says {', '.join(wanted)}; export again"
    )
