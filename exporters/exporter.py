"""What a target's exporter consists of. It imports no PyTorch and no toolchain, so that ``--help`` stays fast."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mvmoe_deploy import targets
from mvmoe_deploy.errors import ExportError
from mvmoe_deploy.exporters.precision import Precision

if TYPE_CHECKING:
    from mvmoe_deploy.bundle import Bundle
    from mvmoe_deploy.exporters.job import Converted, Job
    from mvmoe_deploy.exporters.split import PieceModule
    from mvmoe_deploy.exporters.weights import StoredWeights


@dataclass(frozen=True)
class Options:
    """The conversion options that all targets share. A target with more options has a subclass of its own.

    Attributes:
        precision: name of one of the target's precisions; empty for the default.
        layout: name of one of the target's layouts; empty for the default.
        separate_router: whether the router becomes a piece of its own.
    """

    precision: str = ""
    layout: str = ""
    separate_router: bool = False


COMMON = frozenset(field.name for field in dataclasses.fields(Options))
"""Names of the options that all targets share."""


def no_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds nothing: for a target that has only the shared options."""


@dataclass(frozen=True)
class Exporter:
    """How a target exports.

    Attributes:
        converts: ``module:function`` of the function ``convert(job: Job) -> Converted``. It is imported at its first
            use and may import the toolchain.
        precisions: the precisions that the target exports in, the default first.
        layouts: the ways in which it can lay out pieces in files, the default first.
        options: the type of its options, :class:`Options` or a frozen subclass of it.
        add_arguments: function that adds the command line options of the subclass, with the names and defaults of its
            fields.
        stored_weights: ``module:function`` of the function ``stored_weights(family, bundle) ->
            Iterable[StoredWeights]``, which reads the weights of a layer's experts back from a bundle; empty if the
            target has none. Without it, experts whose outputs are too similar cannot be verified.
    """

    converts: str
    precisions: tuple[Precision, ...]
    layouts: tuple[str, ...] = ("separate",)
    options: type[Options] = Options
    add_arguments: Callable[[argparse._ArgumentGroup], None] = no_arguments
    stored_weights: str = ""

    @property
    def own_options(self) -> frozenset[str]:
        """Names of the options that the target adds to the shared ones."""
        return frozenset(field.name for field in dataclasses.fields(self.options)) - COMMON

    def precision(self, name: str) -> Precision:
        """A precision by name.

        Raises:
            KeyError: the target has no precision of that name.
        """
        return {precision.name: precision for precision in self.precisions}[name]


def exporter_of(target: str) -> Exporter:
    """The exporter of a target.

    Raises:
        ConfigError: there is no such target.
        ExportError: the package that contains its exporter is not installed.
    """
    record = targets.get(target)
    exporter = targets.resolve(record.exporter, f"target {target}", record.requirement, ExportError)
    assert isinstance(exporter, Exporter)
    return exporter


def converter_of(target: str) -> Callable[[Job[Any]], Converted]:
    """Imports a target's ``convert`` function, and with it the toolchain.

    Raises:
        ConfigError: there is no such target.
        ExportError: its toolchain is not installed.
    """
    record = targets.get(target)
    convert: Callable[[Job[Any]], Converted]
    convert = targets.resolve(exporter_of(target).converts, f"target {target}", record.requirement, ExportError)
    return convert


def weights_reader_of(target: str) -> Callable[[list[PieceModule], Bundle], Iterable[StoredWeights]] | None:
    """Imports a target's ``stored_weights`` function; None if it has none.

    Raises:
        ConfigError: there is no such target.
        ExportError: its toolchain is not installed.
    """
    name = exporter_of(target).stored_weights
    if not name:
        return None
    read: Callable[[list[PieceModule], Bundle], Iterable[StoredWeights]]
    read = targets.resolve(name, f"target {target}", targets.get(target).requirement, ExportError)
    return read


def complete_options(given: Options | None, target: str) -> Options:
    """Completes export options: the result has the target's own type, with the default precision and layout filled in.

    Args:
        given: options of the target's type or only the shared ones; None for all defaults.
        target: the target's name.

    Raises:
        ConfigError: there is no such target.
        ExportError: the options belong to another target, or the target has no such precision or layout.
    """
    exporter = exporter_of(target)
    given = given or exporter.options()
    if type(given) is Options:
        given = exporter.options(**vars(given))
    if type(given) is not exporter.options:
        raise ExportError(
            f"target {target} takes {exporter.options.__name__}, but was given another target's {type(given).__name__}"
        )
    precisions = tuple(precision.name for precision in exporter.precisions)
    given = dataclasses.replace(
        given, precision=given.precision or precisions[0], layout=given.layout or exporter.layouts[0]
    )
    for what, value, allowed in (
        ("precision", given.precision, precisions),
        ("layout", given.layout, exporter.layouts),
    ):
        if value not in allowed:
            raise ExportError(f"target {target} has no {what} {value!r}: expected one of {', '.join(allowed)}")
    return given
