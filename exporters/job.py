"""What passes between the pipeline and a target's ``convert``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from mvmoe_deploy.bundle import Manifest, Piece, TensorSpec
from mvmoe_deploy.exporters.exporter import Options
from mvmoe_deploy.exporters.split import PieceModule, SplitModel

Progress = Callable[[str], None]
"""Called with what is about to be done, such as ``trunk: tracing``."""


OptionsType = TypeVar("OptionsType", bound=Options)


@dataclass
class Job(Generic[OptionsType]):
    """What a target's ``convert`` is given.

    Attributes:
        split: the pieces as torch modules.
        directory: an empty directory to write into.
        options: how to convert, of the target's own type, with its precision and layout filled in.
        manifest: everything known before conversion (no files, pieces or verification): preprocessing, class names,
            what each expert is for, source.
        images: preprocessed images ``[n, 3, S, S]`` float32, for calibration.
        piece_flops: FLOPs of a piece by its role; None where they are not known.
        progress: to be told about each step.
    """

    split: SplitModel
    directory: Path
    options: OptionsType
    manifest: Manifest
    images: Tensor
    piece_flops: Callable[[str], int | None]
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


def describe_piece(
    piece: PieceModule,
    graph: str,
    files: list[str],
    flops: int | None,
    *,
    function: str | None = None,
    bytes_per_weight: float = 4,
) -> Piece:
    """The manifest entry of a converted piece, its shapes and parameters taken from the torch module.

    Args:
        piece: as it was converted.
        graph: the file or package to open, relative to the bundle.
        files: every file that loading it reads, ``graph`` or what is in it included.
        flops: of one image.
        function: the method or function in ``graph``, where that holds several.
        bytes_per_weight: what a weight takes once it is loaded.
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


def count_parameters(module: nn.Module) -> int:
    """Number of weights of a module, each tensor once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, ["batch", *tensor.shape[1:]], str(tensor.dtype).removeprefix("torch."))
