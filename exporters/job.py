"""The data that the pipeline and a target's ``convert`` exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from mvmoe_deploy.bundle import Manifest, Piece, TensorSpec
from mvmoe_deploy.errors import ExportError
from mvmoe_deploy.exporters.exporter import Options
from mvmoe_deploy.exporters.split import PieceModule, SplitModel

Progress = Callable[[str], None]
"""Function that is called with the step about to begin, such as ``trunk: tracing``."""


CALIBRATING = 16
"""Number of images that are used for calibration: with 48, EfficientNet-Lite0 in 8 bits is not nearer to PyTorch."""

OptionsType = TypeVar("OptionsType", bound=Options)


@dataclass
class Job(Generic[OptionsType]):
    """The input of a target's ``convert``.

    Attributes:
        split: the pieces as torch modules.
        directory: an empty directory to write into.
        options: options of the target's own type, with precision and layout filled in.
        manifest: everything that is known before conversion (preprocessing, class names, what each expert is for,
            source), without files, pieces and verification.
        images: preprocessed images ``[n, 3, S, S]`` float32, for calibration.
        piece_flops: function that returns the FLOPs of a piece by its role; None if they are not known.
        progress: function to call before each step.
    """

    split: SplitModel
    directory: Path
    options: OptionsType
    manifest: Manifest
    images: Tensor
    piece_flops: Callable[[str], int | None]
    progress: Progress

    @cached_property
    def calibration(self) -> dict[str, list[Tensor]]:
        """What each piece is given for some of the images, by the piece's name."""
        count = min(CALIBRATING, len(self.images))
        images = self.images[[i * len(self.images) // count for i in range(count)]]  # evenly spaced: sorted by class
        return {piece.name: inputs for piece, inputs in self.split.reference_inputs(images, few=count)}


@dataclass
class Converted:
    """The result of a target's ``convert``; ``pieces`` names the files that it wrote.

    Attributes:
        pieces: one manifest entry per piece of the split, in the split's order.
        tools: versions of the toolchain's packages.
        notes: anything worth keeping in the manifest's ``options``, such as the operators that were not delegated.
        backends: the backends to verify with; None stands for the target's usual one.
    """

    pieces: list[Piece]
    tools: dict[str, str]
    notes: dict[str, Any] = field(default_factory=dict)
    backends: tuple[str | None, ...] = (None,)


def describe_piece(
    piece: PieceModule,
    graph: str,
    files: list[str],
    flops: int | None,
    *,
    function: str | None = None,
    bytes_per_weight: float = 4,
) -> Piece:
    """The manifest entry of a converted piece; shapes and parameters are taken from the torch module.

    Args:
        piece: the piece as it was converted.
        graph: the file or package to open, relative to the bundle.
        files: every file that loading the piece reads, including ``graph`` or the files in it.
        flops: FLOPs for one image.
        function: the method or function in ``graph``, if that holds several.
        bytes_per_weight: size of a weight once it is loaded.
    """
    outputs = piece(*piece.inputs.values())
    parameters = count_parameters(piece.module)
    return Piece(
        role=piece.role,
        graph=graph,
        files=files,
        inputs=[_spec(name, tensor) for name, tensor in piece.inputs.items()],
        outputs=[_spec(name, tensor) for name, tensor in zip(piece.outputs, outputs, strict=True)],
        parameters=parameters,
        weight_bytes=int(parameters * bytes_per_weight),
        flops=flops,
        expert=piece.expert,
        layer=piece.layer,
        function=function,
    )


def refusal(piece: str, who: str, reason: Exception) -> ExportError:
    """The error where what was written of a piece cannot be run: an operator, say, that its backend does not know.

    Args:
        piece: its name.
        who: the backend, or what it says of itself.
        reason: why.
    """
    return ExportError(
        f"{piece}: {who} refuses what was written of it ({reason}); if the model is your own, write this part of it "
        "with other operators (docs/adding-an-architecture.md)"
    )


def count_parameters(module: nn.Module) -> int:
    """Number of weights of a module, counting each tensor once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, ["batch", *tensor.shape[1:]], str(tensor.dtype).removeprefix("torch."))
