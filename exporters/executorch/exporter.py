"""The ExecuTorch target's exporter: its options, precisions and layouts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mvmoe_deploy.errors import ExportError
from mvmoe_deploy.exporters.exporter import Exporter, Options
from mvmoe_deploy.exporters.precision import FP32, INT8

MAX_BATCH = 16
"""Default upper bound of the batch dimension. It costs memory, because tensors that pass between delegates are planned
for it (0.1 MB per image in the trunk of mvmoe_12x192). A dynamic batch costs no time at batch 1; larger batches are a
tenth faster per image."""


@dataclass(frozen=True)
class ExecuTorchOptions(Options):
    """How to convert to ExecuTorch.

    Attributes:
        max_batch: the largest batch that a piece takes at once.

    Raises:
        ExportError: ``max_batch`` is below 1.
    """

    max_batch: int = MAX_BATCH

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ExportError(f"--max-batch is {self.max_batch}; it must be at least 1")


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds an argument for each field of :class:`ExecuTorchOptions`."""
    group.add_argument(
        "--max-batch", type=int, default=MAX_BATCH, metavar="N",
        help="largest batch a piece accepts; use 1 for ExecuTorch's executor_runner, which always runs the largest",
    )  # fmt: skip


EXPORTER = Exporter(
    converts="mvmoe_deploy.exporters.executorch.convert:convert",
    precisions=(FP32, INT8),
    layouts=("separate", "packed"),
    options=ExecuTorchOptions,
    add_arguments=add_arguments,
    stored_weights="mvmoe_deploy.exporters.executorch.convert:stored_weights",
)
