"""What a target's exporter consists of. Imports no PyTorch and no toolchain, so that ``--help`` stays fast."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mvmoe_deploy import targets
from mvmoe_deploy.errors import ExportError
from mvmoe_deploy.exporters.precision import Precision

if TYPE_CHECKING:
    from mvmoe_deploy.bundle import Bundle, Piece
    from mvmoe_deploy.exporters.job import Converted, Job
    from mvmoe_deploy.exporters.split import PieceModule
    from mvmoe_deploy.exporters.weights import StoredWeights


@dataclass(frozen=True)
class Options:
    """How to convert: what all targets have in common. A target that offers more has a subclass of its own.

    Attributes:
        precision: one of the target's; empty for its default.
        layout: likewise.
        separate_router: make the router a piece of its own.
    """

    precision: str = ""
    layout: str = ""
    separate_router: bool = False


COMMON = frozenset(field.name for field in dataclasses.fields(Options))
"""Names of the options that every target has."""


def no_arguments(group: argparse._ArgumentGroup) -> None:
    """For a target whose options are the common ones."""


@dataclass(frozen=True)
class Exporter:
    """What a target adds to exporting.

    Attributes:
        converts: ``module:function``, the function ``convert(job: Job) -> Converted``. It is imported at its first use,
            and may import the toolchain.
        precisions: what the target exports in, the default first.
        layouts: how it can lay out pieces in files, the default first.
        options: the type of its options, :class:`Options` or a frozen subclass of it.
        add_arguments: adds the command line options of the subclass, named as its fields, with the same defaults.
        stored_weights: ``module:function``, the function ``stored_weights(piece, written, bundle) -> StoredWeights``,
            which reads a piece's weights back from a bundle; empty where the target has none. Without it, experts whose
            outputs are too alike cannot be verified.
    """

    converts: str
    precisions: tuple[Precision, ...]
    layouts: tuple[str, ...] = ("separate",)
    options: type[Options] = Options
    add_arguments: Callable[[argparse._ArgumentGroup], None] = no_arguments
    stored_weights: str = ""

    @property
    def own_options(self) -> frozenset[str]:
        """Names of the options that other targets need not have."""
        return frozenset(field.name for field in dataclasses.fields(self.options)) - COMMON

    def precision(self, name: str) -> Precision:
        """A precision by name.

        Raises:
            KeyError: the target has none of that name.
        """
        return {precision.name: precision for precision in self.precisions}[name]


def exporter_of(target: str) -> Exporter:
    """The exporter of a target.

    Raises:
        ConfigError: there is no such target.
        ExportError: the package that has its exporter is not installed.
    """
    record = targets.get(target)
    exporter = targets.resolve(record.exporter, f"target {target}", record.requirement, ExportError)
    assert isinstance(exporter, Exporter)
    return exporter


def converter_of(target: str) -> Callable[[Job[Any]], Converted]:
    """A target's ``convert``; imports its toolchain.

    Raises:
        ConfigError: there is no such target.
        ExportError: its toolchain is not installed.
    """
    record = targets.get(target)
    convert: Callable[[Job[Any]], Converted]
    convert = targets.resolve(exporter_of(target).converts, f"target {target}", record.requirement, ExportError)
    return convert


def weights_reader_of(target: str) -> Callable[[PieceModule, Piece, Bundle], StoredWeights] | None:
    """A target's ``stored_weights``, or None where it has none.

    Raises:
        ConfigError: there is no such target.
        ExportError: its toolchain is not installed.
    """
    name = exporter_of(target).stored_weights
    if not name:
        return None
    read: Callable[[PieceModule, Piece, Bundle], StoredWeights]
    read = targets.resolve(name, f"target {target}", targets.get(target).requirement, ExportError)
    return read


def complete_options(given: Options | None, target: str) -> Options:
    """The options of an export, of the target's own type, with the target's precision and layout where none is given.

    Args:
        given: of the target's type, or the common ones alone; None for all defaults.
        target: its name.

    Raises:
        ConfigError: there is no such target.
        ExportError: the options are another target's, or the target has no such precision or layout.
    """
    exporter = exporter_of(target)
    given = given or exporter.options()
    if type(given) is Options:
        given = exporter.options(**vars(given))
    if type(given) is not exporter.options:
        raise ExportError(
            f"target {target} takes {exporter.options.__name__}, it was given {type(given).__name__} of another target"
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
