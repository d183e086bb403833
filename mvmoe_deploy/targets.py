"""The targets: one record each, which every list of targets, backends or packages is made from.

Records name modules and functions as ``module:attribute``, and :func:`resolve` imports them at first use: this file
imports no toolchain and no PyTorch. docs/adding-a-target.md shows how to add a target.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mvmoe_deploy.errors import BackendError, ConfigError, MvmoeError, first_line

GROUP = "mvmoe_deploy.targets"
"""The entry point group under which another package announces its targets."""


@dataclass(frozen=True)
class Engine:
    """What stands behind a backend's name.

    Attributes:
        name: of the backend; no two targets share one.
        opens: function ``(bundle, threads) -> Backend``, as :func:`mvmoe_deploy.backends.open_backend` calls it.
        packages: installed packages whose versions a measurement reports.
        imports: modules that opening a bundle imports later than ``opens`` does; where memory or a cold process's
            load time is measured, they are imported before.
    """

    name: str
    opens: str
    packages: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """An export format.

    Attributes:
        name: as in ``--target`` and in manifests.
        title: what its makers call it.
        requirement: what pip installs to export it and to run it.
        backends: what runs its bundles, the default first.
        exporter: its :class:`mvmoe_deploy.exporters.exporter.Exporter`, which holds options, precisions and layouts.
        snippets: by language, the function that writes source code of an app, as :mod:`mvmoe_deploy.snippets` calls it.
        android: its :class:`mvmoe_deploy.bench.devices.android.Runner`; empty where there is none.
    """

    name: str
    title: str
    requirement: str
    backends: tuple[Engine, ...]
    exporter: str
    snippets: Mapping[str, str] = field(default_factory=dict)
    android: str = ""

    def backend(self, name: str | None = None) -> Engine:
        """A backend by name, or the default.

        Raises:
            BackendError: the target has none of that name.
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
    """Adds a target, for this process.

    Measurements start processes of their own, which know a target only if its package announces it as an entry point
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
        ConfigError: one cannot be imported, is no :class:`Target`, or takes a name that exists.
    """
    from importlib.metadata import entry_points  # 15 ms, which a bundle of a built-in target does without

    found: dict[str, Target] = {}
    for entry in entry_points(group=GROUP):
        try:
            target = entry.load()
        except Exception as error:
            raise ConfigError(f"entry point {entry.value}: cannot be imported ({first_line(error)})") from None
        if not isinstance(target, Target):
            raise ConfigError(f"entry point {entry.value}: is a {type(target).__name__}, not a Target")
        _check_new(target, {**_registered, **found})
        found[target.name] = target
    return found


def known() -> dict[str, Target]:
    """All targets by name: this project's first."""
    return {**_registered, **installed()}


def get(name: str) -> Target:
    """A target by name.

    Raises:
        ConfigError: there is none.
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
    for targets in (_registered, installed()):
        for target in targets.values():
            if any(engine.name == name for engine in target.backends):
                return target
    names = ", ".join(engine.name for target in known().values() for engine in target.backends)
    raise BackendError(f"unknown backend {name!r}: expected one of {names}")


def resolve(reference: str, what: str, requirement: str, error: type[MvmoeError]) -> Any:
    """Imports what a record names.

    Args:
        reference: ``module:attribute``.
        what: needs it, such as ``target onnx``; for the error.
        requirement: what pip installs where a package is missing.
        error: type of the error.

    Raises:
        MvmoeError: of type ``error``: a package is not installed.
    """
    try:
        return pkgutil.resolve_name(reference)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        raise error(f"{what} needs the package {package}: pip install '{requirement}'") from None


def _check_new(target: Target, others: Mapping[str, Target]) -> None:
    if target.name in others:
        raise ConfigError(f"target {target.name!r} is registered twice")
    taken = {engine.name for other in others.values() for engine in other.backends}
    for engine in target.backends:
        if engine.name in taken:
            raise ConfigError(f"target {target.name!r}: another target has a backend called {engine.name!r} already")
