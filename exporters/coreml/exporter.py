"""The Core ML target's exporter: its options, precisions and layouts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from mvmoe_deploy.errors import ExportError
from mvmoe_deploy.exporters.exporter import Exporter, Options
from mvmoe_deploy.exporters.precision import FP16, FP32, INT8, Precision, Tolerance

DEPLOYMENT_TARGETS = ("iOS16", "iOS17", "iOS18")
DEPLOYMENT_TARGET = "iOS17"
"""The default deployment target."""


@dataclass(frozen=True)
class CoreMLOptions(Options):
    """How to convert to Core ML.

    Attributes:
        minimum_deployment_target: the oldest system that the packages run on.
        image_input: the trunk takes an image and normalises it itself, instead of a normalised tensor.
        classifier: pieces that return logits also return the class label and the probabilities.
        author: the author that Xcode shows.
        licence: the licence that Xcode shows.

    Raises:
        ExportError: the deployment target is unknown.
    """

    minimum_deployment_target: str = DEPLOYMENT_TARGET
    image_input: bool = False
    classifier: bool = False
    author: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        if self.minimum_deployment_target not in DEPLOYMENT_TARGETS:
            raise ExportError(
                f"--minimum-deployment-target {self.minimum_deployment_target!r} is unknown: expected one of "
                f"{', '.join(DEPLOYMENT_TARGETS)}"
            )


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds an argument for each field of :class:`CoreMLOptions`."""
    group.add_argument(
        "--minimum-deployment-target", default=DEPLOYMENT_TARGET, metavar="OS", help=", ".join(DEPLOYMENT_TARGETS)
    )
    group.add_argument("--image-input", action="store_true", help="the trunk takes an image and normalises it itself")
    group.add_argument("--classifier", action="store_true", help="tails also return the class label and probabilities")
    group.add_argument("--author", default="", help="author that Xcode shows")
    group.add_argument("--licence", default="", help="licence that Xcode shows")


INT8_WEIGHTS = replace(INT8, note="weights stored in 8 bits, arithmetic in fp16", selftest=FP16.selftest)
PALETTE6 = Precision(
    "palette6",
    0.75,
    tolerance=Tolerance(logits=0.6, probabilities=0.3, channels=1.5, margin=0.2, agreement=0.97),
    reason="Each weight tensor has 64 values, placed by k-means. Largest errors seen: logits 0.24, probabilities 0.11, "
    "channels 0.6; the class differed where PyTorch prefers its own by 0.09.",
    note="64 values per weight tensor",
    selftest=FP16.selftest,
)
PALETTE4 = Precision(
    "palette4",
    0.5,
    tolerance=Tolerance(logits=1.5, probabilities=0.7, channels=5.0, margin=0.3, agreement=0.75),
    reason="Each weight tensor has 16 values. This is known to cost accuracy and exists for measuring how much. "
    "Largest errors seen: logits 0.8, probabilities 0.4, channels 2.8; 16 of 64 images got another class, 6 of them "
    "where PyTorch prefers its own by more than the margin.",
    note="16 values per weight tensor",
    selftest=FP16.selftest,
)
EXPORTER = Exporter(
    converts="mvmoe_deploy.exporters.coreml.convert:convert",
    precisions=(FP16, FP32, INT8_WEIGHTS, PALETTE6, PALETTE4),
    layouts=("separate", "packed"),
    options=CoreMLOptions,
    add_arguments=add_arguments,
    stored_weights="mvmoe_deploy.exporters.coreml.convert:stored_weights",
)
