"""What an export target is: one module per format, imported at first use, each with the same function ``convert``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from mvmoe_deploy.bundle import Manifest, Piece, TensorSpec
from mvmoe_deploy.errors import ExportError
from mvmoe_deploy.exporters.split import PieceModule, Split

MODULES = {
    "onnx": "mvmoe_deploy.exporters.onnx",
    "executorch": "mvmoe_deploy.exporters.executorch.convert",
    "coreml": "mvmoe_deploy.exporters.coreml.convert",
}

Progress = Callable[[str], None]
"""Called with what is about to be done, such as ``trunk: tracing``."""


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        precision: ``fp32``, ``fp16`` or what else the target offers (its ``PRECISIONS``).
        layout: ``separate`` or what else the target offers (its ``LAYOUTS``).
        separate_router: make the router a piece of its own.
        max_batch: ExecuTorch's; the largest batch that a piece takes at once.
        minimum_deployment_target: Core ML's, such as ``iOS17``.
        image_input: Core ML's; the trunk takes an image and normalises it itself, instead of a normalised tensor.
        classifier: Core ML's; what returns logits also returns the class label and the probabilities.
        author: Core ML's metadata, shown by Xcode.
        licence: likewise.
    """

    precision: str = "fp32"
    layout: str = "separate"
    separate_router: bool = False
    max_batch: int = 16
    minimum_deployment_target: str = "iOS17"
    image_input: bool = False
    classifier: bool = False
    author: str = ""
    licence: str = ""


@dataclass
class Job:
    """What a target's ``convert`` is given.

    Attributes:
        split: the pieces as torch modules.
        directory: an empty directory to write into.
        options: how to convert.
        manifest: everything known before conversion (no files, pieces or verification): preprocessing, class names,
            what each expert is for, source.
        images: preprocessed images ``[n, 3, S, S]`` float32, for calibration.
        piece_flops: FLOPs of a piece by its role; 0 where they are not known.
        progress: to be told about each step.
    """

    split: Split
    directory: Path
    options: Options
    manifest: Manifest
    images: Tensor
    piece_flops: Callable[[str], int]
    progress: Progress


@dataclass
class Converted:
    """What a target's ``convert`` gives back; the files it wrote are found through ``pieces``.

    Attributes:
        pieces: one manifest entry per piece of the split, in its order.
        tools: versions of the toolchain's packages.
        notes: anything worth keeping in the manifest's ``options``, such as which operators were not delegated.
        backends: the backends to verify with; None is the target's usual one.
    """

    pieces: list[Piece]
    tools: dict[str, str]
    notes: dict[str, Any] = field(default_factory=dict)
    backends: tuple[str | None, ...] = (None,)


def target_module(target: str) -> ModuleType:
    """The module of a target: ``convert(job) -> Converted``, ``PRECISIONS``, ``LAYOUTS``.

    Raises:
        ExportError: an unknown target, or one whose toolchain is not installed.
    """
    if target not in MODULES:
        raise ExportError(f"unknown target {target!r}: expected one of {', '.join(MODULES)}")
    try:
        return import_module(MODULES[target])
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise ExportError(
            f"target {target} needs the package {package}: pip install 'mvmoe-deploy[{target}]'"
        ) from None


def describe_piece(
    piece: PieceModule,
    graph: str,
    files: list[str],
    flops: int,
    *,
    function: str | None = None,
    bytes_per_weight: float = 4,
) -> Piece:
    """The manifest entry of a converted piece, its shapes and parameters taken from the torch module."""
    outputs = piece(*piece.inputs.values())
    parameters = count_parameters(piece.module)
    return Piece(
        piece.role,
        graph,
        files,
        [_spec(name, tensor) for name, tensor in piece.inputs.items()],
        [_spec(name, tensor) for name, tensor in zip(piece.outputs, outputs, strict=True)],
        parameters,
        int(parameters * bytes_per_weight),
        flops,
        piece.expert,
        piece.layer,
        function,
    )


def count_parameters(module: nn.Module) -> int:
    """Number of weights of a module, each tensor once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, ["batch", *tensor.shape[1:]], str(tensor.dtype).removeprefix("torch."))
