"""A small pre-activation ResNet for small images; it can teach ViTs, since it learns several times faster on few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy.models.model import Model
from mvmoe_deploy.models.registry import Architecture, ModelConfig, register

STAGES = 3


@dataclass(frozen=True)
class ResNetConfig(ModelConfig):
    """Shape of a ResNet.

    Attributes:
        width: channels of the first of three stages; each further stage has twice as many, at half the resolution.
        blocks: number of residual blocks per stage.
    """

    architecture: ClassVar[str] = "resnet"

    image_size: int = 32
    width: int = 64
    blocks: int = 2

    @property
    def layers(self) -> list[tuple[int, int, int]]:
        """Input channels, output channels and stride of every block."""
        widths = [self.width << stage for stage in range(STAGES)]
        return [
            (widths[max(0, stage - (index == 0))], width, 2 if stage and not index else 1)
            for stage, width in enumerate(widths)
            for index in range(self.blocks)
        ]

    def fewest_weights(self) -> int:
        return STAGES * self.blocks

    def _sizes(self) -> list[tuple[int, int, int, int]]:
        """For every block: input channels, output channels, pixels of its input, pixels of its output."""
        side = -(-self.image_size // 2)  # after the stem
        found = []
        for inputs, outputs, stride in self.layers:
            before, side = side, -(-side // stride)
            found.append((inputs, outputs, before**2, side**2))
        return found

    def macs(self) -> int:
        total = 27 * self.width * (-(-self.image_size // 2)) ** 2 + (self.width << STAGES - 1) * self.classes
        for inputs, outputs, _, after in self._sizes():
            shortcut = inputs * outputs if inputs != outputs else 0
            total += after * (9 * inputs * outputs + 9 * outputs * outputs + shortcut)
        return total

    def flops(self) -> int:
        """FLOPs of one image: two per multiply-accumulate and per batch-normalised value, one per ReLU and addition."""
        last = self._sizes()[-1]
        total = 2 * self.macs() + 4 * last[1] * last[3] + self.classes  # norm, ReLU and mean; the head's bias
        for inputs, outputs, before, after in self._sizes():
            total += 3 * inputs * before + 3 * outputs * after + outputs * after
        return total

    def parameters(self) -> int:
        last = self.width << STAGES - 1
        total = 27 * self.width + 2 * last + last * self.classes + self.classes
        for inputs, outputs, _ in self.layers:
            shortcut = inputs * outputs if inputs != outputs else 0
            total += 2 * inputs + 2 * outputs + 9 * inputs * outputs + 9 * outputs * outputs + shortcut
        return total


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions, each after batch norm and ReLU (arXiv 1603.05027).

    ``[B, inputs, h, w]`` → ``[B, outputs, h / stride, w / stride]``, sizes rounded up.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        result: Tensor = kept + self.conv2(F.relu(self.norm2(self.conv1(active))))
        return result


class ResNet(Model):
    """A pre-activation ResNet: images ``[B, 3, H, W]`` → logits ``[B, C]``."""

    config: ResNetConfig

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(3, config.width, 3, 2, 1, bias=False)
        self.blocks = nn.ModuleList(ResidualBlock(*layer) for layer in config.layers)
        last = config.layers[-1][1]
        self.norm = nn.BatchNorm2d(last)
        self.head = nn.Linear(last, config.classes)
        self._channels_last()
        nn.Module.register_load_state_dict_post_hook(self, lambda *_: self._channels_last())

    def _channels_last(self) -> None:
        # this layout is several times faster in bfloat16 on a CPU
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(F.relu(self.norm(x)).mean((2, 3)))
        return result

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The blocks' convolutions; not the stem or the head."""
        return [parameter for parameter in self.blocks.parameters() if parameter.ndim > 1]


register(Architecture(ResNetConfig, ResNet, "resnet_BLOCKSxWIDTH", ("resnet_2x64",)))
