"""A convolutional teacher, whose answers a ViT learns beside the labels, or instead of them.

On few images a small convolutional network learns several times faster than a ViT, and what it says of an augmented
image tells more than the image's label (DeiT, arXiv 2012.12877, section 4). Its answers to a limited number of views of
each image are asked for once and kept (as in Dataset Reinforcement, arXiv 2303.08983), so that it costs little even
where it is much larger than what it teaches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy import models
from mvmoe_deploy.checkpoint import Header
from mvmoe_deploy.errors import CheckpointError, ConfigError, DataError
from mvmoe_deploy.files import atomic_file


@dataclass(frozen=True)
class ResNetConfig:
    """Shape of a small pre-activation ResNet for small images.

    Attributes:
        image_size: side of the square input image, in pixels.
        width: channels of the first of three stages; each further one has twice as many at half the resolution.
        blocks: residual blocks per stage.
        classes: number of output classes C.
    """

    architecture: ClassVar[str] = "resnet"

    image_size: int = 32
    width: int = 64
    blocks: int = 2
    classes: int = 1000

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or not 1 <= value <= models.LARGEST:
                raise ConfigError(f"model config: {name} is {value!r}, must be a whole number from 1 on")

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values, with its ``architecture``."""
        return {"architecture": self.architecture, **asdict(self)}


def resnet_config_from_name(name: str, image_size: int, classes: int) -> ResNetConfig:
    """The config of ``resnet_2x64``: two blocks per stage, the first of width 64.

    Raises:
        ConfigError: the name is not of that form.
    """
    match = re.fullmatch(r"resnet_(\d{1,4})x(\d{1,5})", name)
    if match is None:
        raise ConfigError(f"unknown model {name!r}: expected resnet_BLOCKSxWIDTH, such as resnet_2x64")
    return ResNetConfig(image_size, int(match[2]), int(match[1]), classes)


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions, each after batch norm and ReLU (arXiv 1603.05027): ``[B, a, h, w]`` → ``[B, b, …]``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        return kept + self.conv2(F.relu(self.norm2(self.conv1(active))))


class ResNet(nn.Module):
    """Images ``[B, 3, H, W]`` → logits ``[B, C]``."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(3, config.width, 3, 2, 1, bias=False)
        widths = [config.width << stage for stage in range(3)]
        self.blocks = nn.ModuleList(
            ResidualBlock(widths[max(0, stage - (index == 0))], width, 2 if stage and not index else 1)
            for stage, width in enumerate(widths)
            for index in range(config.blocks)
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], config.classes)
        # channels last is several times faster in bfloat16 on a CPU
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class Teacher:
    """A trained model's answers to views of the training images, each view asked about once.

    Args:
        model: any that gives logits; it is put into evaluation mode.
        precision: ``fp32`` or ``bf16`` (autocast).
        folder: where answers are kept for other runs too, a file per view; None keeps them in memory.
    """

    def __init__(self, model: nn.Module, precision: str = "fp32", folder: Path | None = None) -> None:
        self.model = model.eval()
        self.precision = precision
        self.folder = folder
        self._answers: dict[str, Tensor] = {}

    def answers(self, view: str | None, shape: tuple[int, int], batches: Callable[[], Iterable[Tensor]]) -> Tensor:
        """Its probabilities for every training image in a view, float16 ``[n, C]``, in the images' order.

        Args:
            view: a name of the view that no other view has; None for one that does not come again.
            shape: ``(n, C)``.
            batches: gives the view's images, in order, as the model's input ``[B, 3, S, S]``; asked once per view.

        Raises:
            DataError: a file of kept answers is damaged.
        """
        if view is None:
            return self._asked(batches())
        if view not in self._answers:
            file = self.folder / f"{view}.safetensors" if self.folder else None
            if file is None or not file.exists():
                answers = self._asked(batches())
                if file is not None:
                    with atomic_file(file) as temporary:
                        save_file({"answers": answers}, temporary)
            if file is not None:
                answers = _kept(file, shape)
            self._answers[view] = answers
        return self._answers[view]

    @torch.no_grad()
    def _asked(self, batches: Iterable[Tensor]) -> Tensor:
        parts = []
        for x in batches:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                parts.append(self.model(x).float().softmax(-1).half().cpu())
        return torch.cat(parts)


def _kept(file: Path, shape: tuple[int, int]) -> Tensor:
    """Answers of an earlier run, mapped into memory: several runs share one copy."""
    try:
        answers = load_file(file)["answers"]
    except (SafetensorError, KeyError, OSError) as error:
        raise DataError(f"{file}: damaged ({error}); remove it, and the teacher is asked again") from None
    if answers.shape != shape or answers.dtype != torch.float16:
        raise DataError(
            f"{file}: holds {answers.dtype} {list(answers.shape)} instead of float16 {list(shape)}; remove it"
        )
    return answers


def load_teacher(path: str | Path) -> tuple[nn.Module, Header]:
    """The model of a checkpoint file, in evaluation mode: a :class:`ResNet`, or any that this project deploys.

    Raises:
        CheckpointError: the file cannot be read, or its weights do not fit its config.
    """
    checkpoint = checkpoints.load(path)
    config = dict(checkpoint.header.model)
    if config.pop("architecture", None) != ResNetConfig.architecture:
        return models.load_model(checkpoint, str(path)), checkpoint.header
    try:
        shape = ResNetConfig(**config)
        if shape.blocks > len(checkpoint.weights):
            raise ConfigError(f"blocks is {shape.blocks}, but there are only {len(checkpoint.weights)} weights")
        model = models.with_weights(lambda: ResNet(shape), checkpoint.weights)
    except (ConfigError, TypeError) as error:  # TypeError: an unknown field
        raise CheckpointError(f"{path}: {error}") from None
    return model.to(memory_format=torch.channels_last), checkpoint.header  # type: ignore[call-overload]
