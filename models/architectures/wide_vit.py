"""A dense ViT whose last MLPs are as wide as all experts of a routed model together; every image uses all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.models import flops
from mvmoe_deploy.models.architectures.vit import Mlp, ViT, ViTConfig, init_weights
from mvmoe_deploy.models.registry import Architecture, register


@dataclass(frozen=True)
class WideViTConfig(ViTConfig):
    """Shape of a dense ViT with wider MLPs in its last blocks.

    It has as many parameters as the routed model that it is compared with, except for the router and for E - 1 output
    biases per layer.

    Attributes:
        wide_layers: how many of the last blocks have a wider MLP.
        times: the hidden width of their MLPs divided by that of the other blocks' MLPs.
    """

    architecture: ClassVar[str] = "vit_wide"

    wide_layers: int = 2
    times: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wide_layers > self.depth:
            raise ConfigError(f"model config: wide_layers is {self.wide_layers}, but depth is only {self.depth}")

    @property
    def wide_mlp(self) -> ViTConfig:
        """The config of a dense ViT in which all MLPs are as wide as those of the last blocks here."""
        return dataclasses.replace(self.dense, mlp_ratio=self.mlp_ratio * self.times)

    def flops(self) -> int:
        return super().flops() + self.wide_layers * (flops.mlp(self.wide_mlp) - flops.mlp(self))

    def macs(self) -> int:
        return super().macs() + self.wide_layers * (flops.mlp_macs(self.wide_mlp) - flops.mlp_macs(self))

    def parameters(self) -> int:
        more = flops.mlp_parameters(self.wide_mlp) - flops.mlp_parameters(self)
        return super().parameters() + self.wide_layers * more


class WideViT(ViT):
    """A dense ViT with wider MLPs in its last blocks: images ``[B, 3, H, W]`` → logits ``[B, C]``."""

    config: WideViTConfig

    def __init__(self, config: WideViTConfig) -> None:
        super().__init__(config)
        for block in self.blocks[config.depth - config.wide_layers :]:
            block.mlp = Mlp(config.width, config.times * config.mlp_ratio * config.width)
        init_weights(self)


register(Architecture(WideViTConfig, WideViT))
