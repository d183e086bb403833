"""The engines that run pieces. A backend is opened on a bundle and loads its pieces one at a time."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

from numpy.typing import NDArray

from mvmoe_deploy.bundle import Bundle, Piece
from mvmoe_deploy.errors import BackendError

LoadedPiece = Callable[..., list[NDArray[Any]]]
"""Takes the piece's inputs in the manifest's order, returns its outputs likewise; dropping it frees it."""


class Backend(Protocol):
    """What every backend offers.

    Attributes:
        name: as in :data:`MODULES`.
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


MODULES = {
    "onnxruntime": "mvmoe_deploy.backends.onnxruntime",
    "executorch": "mvmoe_deploy.backends.executorch",
    "coreml": "mvmoe_deploy.backends.coreml",
    "reference": "mvmoe_deploy.backends.mil",  # interprets Core ML bundles where Core ML does not run
}
DEFAULT = {"onnx": "onnxruntime", "executorch": "executorch", "coreml": "coreml"}
"""The backend that runs a target's bundles."""


def open_backend(bundle: Bundle, name: str | None = None, threads: int | None = 1) -> Backend:
    """Opens a backend on a bundle.

    Args:
        bundle: the bundle whose pieces it will load.
        name: a key of :data:`MODULES`; by default the one for the bundle's target.
        threads: threads a piece may use; None for as many as the engine uses in this process already, or else one.

    Raises:
        BackendError: an unknown backend, or one that cannot run this target or does not run here.
    """
    name = name or DEFAULT[bundle.manifest.target]
    if name not in MODULES:
        raise BackendError(f"unknown backend {name!r}: expected one of {', '.join(MODULES)}")
    try:
        module = import_module(MODULES[name])
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise BackendError(
            f"backend {name} needs the package {package}: pip install 'mvmoe-deploy[{bundle.manifest.target}]'"
        ) from None
    return module.open_backend(bundle, threads)
