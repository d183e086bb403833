"""A routed convolutional network as an outsider would add one: docs/adding-an-architecture.md explains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mvmoe_deploy.models.model import ImageRouted, Model, routed_by_tails
from mvmoe_deploy.models.registry import Architecture, ModelConfig, shape


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    """Shape: a stride-4 stem of ``width`` channels, then one 3 × 3 convolution per expert."""

    architecture: ClassVar[str] = "toy_conv"
    routes = "images"

    width: int = 8
    experts: int = shape(3, "number of experts E (default: one per super-class)")
    k: int = 1
    bottleneck: int = shape(16, "channels before the head")

    def expert_parameters(self) -> int:
        return 9 * self.width**2 + self.width


class ToyConv(Model):
    """Images ``[B, 3, H, W]`` → feature maps ``[B, D, H / 4, W / 4]`` → one expert's branch → logits ``[B, C]``."""

    config: ToyConfig
    moe_layers = 1

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Sequential(nn.Conv2d(3, config.width, 4, 4), nn.ReLU())
        self.router = nn.Linear(config.width, config.experts)
        self.branches = nn.ModuleList(
            nn.Conv2d(config.width, config.width, 3, padding=1) for _ in range(config.experts)
        )
        self.mix = nn.Conv2d(config.width, config.bottleneck, 1)
        self.head = nn.Linear(config.bottleneck, config.classes)

    def routed(self, images: Tensor, chosen: Tensor | None = None, noisy: bool = False) -> ImageRouted:
        features = self.stem(images)
        logits = self.router(features.mean((2, 3)))
        return routed_by_tails(features, logits, self.tail_module, chosen=chosen, noisy=noisy)

    def forward(self, images: Tensor) -> Tensor:
        return self.routed(images).logits

    @property
    def experts(self) -> int:
        return self.config.experts

    @property
    def k(self) -> int:
        return 1

    def trunk_module(self) -> nn.Module:
        return self.stem

    def router_module(self) -> nn.Module:
        return ToyRouter(self.router)

    def tail_module(self, expert: int) -> nn.Module:
        return ToyTail(self.branches[expert], self.mix, self.head)


class ToyRouter(nn.Module):
    """Feature maps → probabilities ``[B, E]``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, features: Tensor) -> Tensor:
        return torch.softmax(self.linear(features.mean((2, 3))), -1)


class ToyTail(nn.Module):
    """Feature maps and gate ``[B]`` → logits ``[B, C]``."""

    def __init__(self, branch: nn.Module, mix: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.branch, self.mix, self.head = branch, mix, head

    def forward(self, features: Tensor, gate: Tensor) -> Tensor:
        x = features + self.branch(features) * gate[:, None, None, None]
        return self.head(self.mix(x).relu().mean((2, 3)))


TOY = Architecture(ToyConfig, ToyConv, "toyconv_WIDTH", ("toyconv_8",))
