"""A configuration: what is measured, with which engine, and how it is opened.

A configuration is passed to fresh processes as JSON, so this file imports no PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

import mvmoe_deploy
from mvmoe_deploy import targets
from mvmoe_deploy.backends import native_path
from mvmoe_deploy.bench.results import Facts
from mvmoe_deploy.errors import BackendError, ConfigError
from mvmoe_deploy.images import Preprocessing, normalise, preprocess
from mvmoe_deploy.runtime import RoutedBatch, Stats

Floats = NDArray[np.float32]

TORCH = targets.Engine("torch", "mvmoe_deploy.models:load_checkpoint", ("torch",))
"""The engine that runs checkpoints directly, without a bundle."""

BASELINES = ("dense", "stock", "dense-wide", "all-experts", "vmoe")
"""The baselines that can be made from a routed checkpoint; see :data:`mvmoe_deploy.bench.results.Kind`."""


class Configuration(Facts, frozen=True, kw_only=True):
    """One thing to measure.

    Attributes:
        path: a bundle's directory, a bare ``.onnx`` graph, or a checkpoint (backend ``torch``).
        experts: E; 0 for a model that is not split.
        k: experts per image.
        trained: whether its weights were trained, so that its accuracy is worth measuring.
    """

    path: str
    preprocessing: Preprocessing
    experts: int
    k: int
    class_ids: list[str] = msgspec.field(default_factory=list)
    class_names: list[str] = msgspec.field(default_factory=list)
    expert_names: list[str] = msgspec.field(default_factory=list)
    class_experts: list[int] = msgspec.field(default_factory=list)
    trained: bool = True

    def facts(self) -> dict[str, Any]:
        """What is known before measuring, as the arguments of a row."""
        return {name: getattr(self, name) for name in Facts.__struct_fields__}

    @property
    def opened_as(self) -> str:
        """``bundle``, ``graph`` or ``checkpoint``."""
        if self.backend == TORCH.name:
            return "checkpoint"
        return "graph" if self.path.endswith(".onnx") else "bundle"


class BarePieces(Configuration, frozen=True, kw_only=True):
    """A bundle of which only the graphs of one image are opened, in bare sessions: for measuring a cold start."""

    @property
    def opened_as(self) -> str:
        """``pieces``."""
        return "pieces"


class Opened(Protocol):
    """An opened configuration; :class:`mvmoe_deploy.Runtime` is one."""

    def predict(self, image: NDArray[np.uint8]) -> object:
        """Predicts one decoded image ``[H, W, 3]``, preprocessing included."""
        ...

    def run(self, batch: Floats, experts: NDArray[np.integer] | None = None) -> tuple[Floats, RoutedBatch | None]:
        """Preprocessed images ``[B, 3, S, S]`` → logits ``[B, C]`` and the experts that the images were routed to."""
        ...

    def stats(self) -> Stats | None:
        """The runtime's counts and resident experts; None for an engine that does not report them."""
        ...

    def close(self) -> None:
        """Drops everything."""
        ...


def import_engine(backend: str) -> None:
    """Imports what opening a configuration will import, so that its memory and time are not charged to the model.

    Raises:
        ConfigError: the backend's package is not installed.
    """
    found = engine(backend)
    try:
        for module in (found.opens.partition(":")[0], *found.imports):
            import_module(module)
    except ModuleNotFoundError as error:
        needed = "mvmoe-deploy[train]" if backend == TORCH.name else targets.of_backend(backend).requirement
        raise ConfigError(f"backend {backend} needs {error.name}: pip install '{needed}'") from None


def backend_names() -> list[str]:
    """Backends that a checkpoint can be measured on: the default one of each target, and PyTorch."""
    return [*(target.backend().name for target in targets.known().values()), TORCH.name]


def engine(backend: str) -> targets.Engine:
    """The engine of a row's backend.

    Raises:
        BackendError: there is no such backend.
    """
    return TORCH if backend == TORCH.name else targets.of_backend(backend).backend(backend)


def open_configuration(
    c: Configuration, threads: int = 1, max_resident: int | None = None, preload: bool = False
) -> Opened:
    """Opens a configuration.

    Args:
        c: what to open.
        threads: CPU threads.
        max_resident: largest number of resident experts.
        preload: load all experts now.

    Raises:
        MvmoeError: the configuration cannot be opened.
    """
    if c.opened_as == "checkpoint":
        return TorchModel(c, threads)
    if c.opened_as == "graph":
        return BareGraph(c, threads)
    return mvmoe_deploy.load(
        c.path,
        threads=threads,
        max_resident=max_resident if c.experts else None,
        preload="all" if preload and c.experts else (),
        backend=c.backend,
    )


class BareGraph:
    """An ``.onnx`` file in a bare onnxruntime session, as a user would run it without this toolkit."""

    def __init__(self, c: Configuration, threads: int) -> None:
        import onnxruntime as ort

        from mvmoe_deploy.backends.onnxruntime import session_options

        self._session = ort.InferenceSession(
            native_path(c.path), session_options(threads), providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        self._preprocessing, self._path = c.preprocessing, c.path

    def predict(self, image: NDArray[np.uint8]) -> object:
        """Index of the most probable class."""
        return int(self.run(normalise(image, self._preprocessing)[None])[0].argmax())

    def run(self, batch: Floats, experts: NDArray[np.integer] | None = None) -> tuple[Floats, None]:
        """See :class:`Opened`; the experts inside a graph cannot be chosen from outside.

        Raises:
            BackendError: the graph does not accept the batch; a stock export takes one image at a time.
        """
        try:
            return self._session.run(None, {self._input: batch})[0], None
        except Exception as error:  # the bindings raise a dozen unrelated types
            reason = " ".join(str(error).split())[:200]
            raise BackendError(f"{self._path}: onnxruntime cannot run a batch of {len(batch)} ({reason})") from None

    def stats(self) -> None:
        """None: this engine does not report what it holds."""

    def close(self) -> None:
        """Drops the session."""
        del self._session


class TorchModel:
    """A checkpoint run by PyTorch in eager mode."""

    def __init__(self, c: Configuration, threads: int) -> None:
        import torch

        from mvmoe_deploy.models import load_checkpoint

        torch.set_num_threads(threads)
        self._torch: Any = torch
        self._model: Any = load_checkpoint(c.path)[0]
        self._preprocessing = c.preprocessing
        self._routed = bool(c.experts)

    def predict(self, image: NDArray[np.uint8]) -> object:
        """Index of the most probable class."""
        return int(self.run(preprocess(image, self._preprocessing)[None])[0].argmax())

    def run(self, batch: Floats, experts: NDArray[np.integer] | None = None) -> tuple[Floats, RoutedBatch | None]:
        """See :class:`Opened`."""
        images = self._torch.from_numpy(batch)
        with self._torch.inference_mode():
            if not self._routed:
                return self._model(images).numpy(), None
            chosen = None if experts is None else self._torch.from_numpy(np.asarray(experts, np.int64))
            routed = self._model.routed(images, chosen)
        probabilities = routed.router_logits.softmax(-1).numpy()
        return routed.logits.numpy(), RoutedBatch(probabilities, routed.chosen.numpy(), routed.gates.numpy())

    def stats(self) -> None:
        """None: this engine does not report what it holds."""

    def close(self) -> None:
        """Drops the model."""
        del self._model


def synthetic_batch(c: Configuration, count: int = 1) -> Floats:
    """Random preprocessed images ``[count, 3, S, S]``, for measurements that do not depend on an image's content."""
    size = c.preprocessing.size
    return np.random.default_rng(0).standard_normal((count, 3, size, size)).astype(np.float32)


def expert_turn(c: Configuration, number: int) -> NDArray[np.int64] | None:
    """Experts ``[1, k]`` for the ``number``-th image, so that all E take turns; None for a model without experts."""
    if not c.experts:
        return None
    return (np.arange(c.k)[None] + number * c.k) % c.experts
