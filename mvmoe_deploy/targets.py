"""The targets: one record each. Every list of targets, backends or packages is made from these records.

Records name modules and functions as ``module:attribute``, and :func:`resolve` imports them at first use: this file
imports no toolchain and no PyTorch. docs/adding-a-target.md shows how to add a target.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import msgspec

from mvmoe_deploy.errors import BackendError, ConfigError, MvmoeError
from mvmoe_deploy.plugins import announced

GROUP = "mvmoe_deploy.targets"
"""The entry point group under which another package announces its targets."""


class Engine(msgspec.Struct, frozen=True):
    """How a backend is opened, and which packages it needs.

    Attributes:
        name: the backend's name; no two targets share one.
        opens: function ``(bundle, threads) -> Backend``, as :func:`mvmoe_deploy.backends.open_backend` calls it.
        packages: installed packages whose versions a measurement reports.
        imports: modules that are imported only when a bundle is opened, after ``opens`` itself. Measurements of
            memory and of a cold process's load time import them beforehand.
    """

    name: str
    opens: str
    packages: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()


class Target(msgspec.Struct, frozen=True):
    """An export format.

    Attributes:
        name: the target's name in ``--target`` and in manifests.
        title: the format's own name, as its makers write it.
        requirement: pip requirement for exporting to the target and running its bundles.
        backends: backends that run its bundles, the default first.
        exporter: its :class:`mvmoe_deploy.exporters.exporter.Exporter`, which holds options, precisions and layouts.
        snippets: by language, the function that writes an app's source code, as :mod:`mvmoe_deploy.snippets` calls it.
        android: its :class:`mvmoe_deploy.bench.devices.android.Runner`; empty if it has none.
    """

    name: str
    title: str
    requirement: str
    backends: tuple[Engine, ...]
    exporter: str
    snippets: Mapping[str, str] = msgspec.field(default_factory=dict)
    android: str = ""

    def backend(self, name: str | None = None) -> Engine:
        """A backend by name, or the default.

        Raises:
            BackendError: the target has no backend of that name.
        """
        for engine in self.backends:
            if name in (None, engine.name):
                return engine
        known = ", ".join(engine.name for engine in self.backends)
        raise BackendError(f"backend {name!r} does not run {self.name} bundles: expected {known}")


_registered: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="onnx",
            title="ONNX",
            requirement="mvmoe-deploy[onnx]",
            backends=(Engine("onnxruntime", "mvmoe_deploy.backends.onnxruntime:open_backend", ("onnxruntime",)),),
            exporter="mvmoe_deploy.exporters.onnx.exporter:EXPORTER",
            snippets={"kotlin": "mvmoe_deploy.snippets:kotlin_onnx"},
            android="mvmoe_deploy.bench.devices.android:ONNXRUNTIME",
        ),
        Target(
            name="executorch",
            title="ExecuTorch",
            requirement="mvmoe-deploy[executorch]",
            backends=(
                Engine(
                    "executorch",
                    "mvmoe_deploy.backends.executorch:open_backend",
                    packages=("executorch", "torch"),
                    imports=("executorch.runtime",),
                ),
            ),
            exporter="mvmoe_deploy.exporters.executorch.exporter:EXPORTER",
            snippets={
                "swift": "mvmoe_deploy.snippets:swift_executorch",
                "kotlin": "mvmoe_deploy.snippets:kotlin_executorch",
            },
            android="mvmoe_deploy.bench.devices.android:EXECUTORCH",
        ),
        Target(
            name="coreml",
            title="Core ML",
            requirement="mvmoe-deploy[coreml]",
            backends=(
                Engine("coreml", "mvmoe_deploy.backends.coreml:open_backend", ("coremltools",)),
                # interprets bundles where Core ML does not run
                Engine("reference", "mvmoe_deploy.backends.mil:open_backend"),
            ),
            exporter="mvmoe_deploy.exporters.coreml.exporter:EXPORTER",
            snippets={"swift": "mvmoe_deploy.snippets:swift_coreml"},
        ),
    )
}


def register(target: Target) -> None:
    """Adds a target in this process.

    Measurements start processes of their own. These know a target only if its package announces it as an entry point
    of the group :data:`GROUP`.

    Raises:
        ConfigError: a target or a backend of that name exists.
    """
    _check_new(target, _registered)
    _registered[target.name] = target


@functools.cache
def installed() -> Mapping[str, Target]:
    """Targets that other installed packages announce as entry points, by name.

    Raises:
        ConfigError: a target cannot be imported, is not a :class:`Target`, or has a name that already exists.
    """
    found: dict[str, Target] = {}
    for target in announced(GROUP, Target):
        _check_new(target, {**_registered, **found})
        found[target.name] = target
    return found


def known() -> dict[str, Target]:
    """All targets by name, this project's own first."""
    return {**_registered, **installed()}


def get(name: str) -> Target:
    """A target by name.

    Raises:
        ConfigError: there is no target of that name.
    """
    target = _registered.get(name) or installed().get(name)
    if target is None:
        raise ConfigError(f"unknown target {name!r}: expected one of {', '.join(known())}")
    return target


def of_backend(name: str) -> Target:
    """The target whose bundles a backend runs.

    Raises:
        BackendError: no target has a backend of that name.
    """
    for targets in (lambda: _registered, installed):  # looking for installed ones takes 15 ms
        for target in targets().values():
            if any(engine.name == name for engine in target.backends):
                return target
    names = ", ".join(engine.name for target in known().values() for engine in target.backends)
    raise BackendError(f"unknown backend {name!r}: expected one of {names}")


def resolve(reference: str, what: str, requirement: str, error: type[MvmoeError]) -> Any:
    """Imports the object that a record names.

    Args:
        reference: the object as ``module:attribute``.
        what: what needs the object, such as ``target onnx``; named in the error.
        requirement: pip requirement that the error suggests when a package is missing.
        error: type of the error.

    Raises:
        MvmoeError: a package is not installed; the error is of type ``error``.
    """
    try:
        module, _, attribute = reference.partition(":")
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        raise error(f"{what} needs the package {package}: pip install '{requirement}'") from None


def _check_new(target: Target, others: Mapping[str, Target]) -> None:
    if target.name in others:
        raise ConfigError(f"target {target.name!r} is registered twice")
    taken = {engine.name for other in others.values() for engine in other.backends}
    for engine in target.backends:
        if engine.name in taken:
            raise ConfigError(f"target {target.name!r}: another target already has a backend called {engine.name!r}")
