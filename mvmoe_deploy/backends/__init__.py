"""The engines that run pieces. A backend is opened on a bundle and loads its pieces one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

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
