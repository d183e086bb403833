"""The dense Vision Transformer, with timm's parameter names so that timm and DeiT weights load unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.models import flops
from mvmoe_deploy.models.foreign import read_weights
from mvmoe_deploy.models.model import Model, check_state_dict
from mvmoe_deploy.models.registry import Architecture, ModelConfig, register, shape

LAYER_NORM_EPS = 1e-6


SCALES = {(depth, width): heads for width, heads in ((384, 6), (192, 3), (96, 3), (64, 2)) for depth in (12, 9, 6)}
"""Number of heads in the 12 scales of Mobile V-MoE's figure 3a, by (depth, width)."""


@dataclass(frozen=True)
class ViTConfig(ModelConfig):
    """Shape of a dense ViT.

    Attributes:
        patch_size: side of a square patch, in pixels; divides ``image_size``.
        width: token width D; a multiple of ``heads``.
        depth: number of transformer blocks L.
        heads: attention heads h.
        mlp_ratio: hidden width of an MLP divided by D.
    """

    architecture: ClassVar[str] = "vit"

    patch_size: int = shape(32, "side of a patch, in pixels", flag="--patch")
    width: int = 192
    depth: int = 12
    heads: int = shape(3, "attention heads (default: the paper's for this scale)")
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"model config: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise ConfigError(f"model config: width {self.width} is not a multiple of heads {self.heads}")

    @property
    def patches(self) -> int:
        """Number of patches P."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Number of tokens N = P + 1 (the class token comes first)."""
        return self.patches + 1

    @property
    def dense(self) -> ViTConfig:
        """The dense baseline: the same ViT without experts."""
        return ViTConfig(**{field.name: getattr(self, field.name) for field in fields(ViTConfig)})

    def classes_of(self, weights: Mapping[str, Tensor], where: str) -> int:
        if "head.weight" not in weights:
            raise ConfigError(f"{where}: holds no head.weight, so its number of classes is not known")
        return len(weights["head.weight"])

    def fewest_weights(self) -> int:
        return self.depth

    def flops(self) -> int:
        return flops.embed(self) + self.depth * flops.block(self) + flops.head(self)

    def macs(self) -> int:
        return flops.embed_macs(self) + self.depth * flops.block_macs(self) + self.width * self.classes

    def parameters(self) -> int:
        d = self.width
        block = 4 * d * d + 4 * d + 4 * d + flops.mlp_parameters(self)
        embedding = 3 * self.patch_size**2 * d + d + d + self.tokens * d
        return embedding + self.depth * block + 2 * d + d * self.classes + self.classes


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected to D: ``[B, 3, H, W]`` → ``[B, P, D]``."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return result


class Attention(nn.Module):
    """Multi-head self-attention: ``[B, N, D]`` → ``[B, n, D]``, the output of the first n tokens (default: all)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, n: int | None = None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q[:, :, :n], k, v)
        result: Tensor = self.proj(x.transpose(1, 2).flatten(2))
        return result


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return result


class AttentionBlock(nn.Module):
    """What blocks share whose MLPs differ: attention, and the norms before it and before the MLP."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)


class Block(AttentionBlock):
    """A pre-norm transformer block: attention, then MLP, each with a residual.

    ``[B, N, D]`` → ``[B, n, D]``, the output of the first n tokens (default: all).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.mlp = Mlp(config.width, config.mlp_ratio * config.width)

    def forward(self, x: Tensor, n: int | None = None) -> Tensor:
        x = x[:, :n] + self.attn(self.norm1(x), n)
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


@dataclass(frozen=True)
class Stream:
    """Says which part of a pre-norm transformer a module is. Its layers have timm's names.

    The module has ``blocks``. If it takes images, it also has ``patch_embed``, ``cls_token`` and ``pos_embed``; if it
    gives logits, it also has ``norm`` and ``head``.

    Attributes:
        takes: the module's input, ``images`` or ``tokens``.
        gives: the module's output, ``tokens`` or ``logits``.
    """

    takes: Literal["images", "tokens"]
    gives: Literal["tokens", "logits"]


class ViT(Model):
    """The dense baseline: images ``[B, 3, H, W]`` → logits ``[B, C]``."""

    config: ViTConfig
    stream: ClassVar[Stream] = Stream("images", "logits")

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(config.width, config.classes)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        x = embed(images, self.patch_embed, self.cls_token, self.pos_embed)
        for block in self.blocks[:-1]:
            x = block(x)
        # The classifier reads only the class token, so the last block computes only that token. The logits are the
        # same, for five sixths less work in this block.
        return classify(self.blocks[-1](x, n=1), self.norm, self.head)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The blocks' weight matrices except the routers'; not the patch embedding or the head."""
        return [
            parameter
            for name, parameter in self.blocks.named_parameters()
            if name.endswith("weight") and parameter.ndim > 1 and "router" not in name
        ]

    def load_dense(self, dense: nn.Module) -> None:
        """Takes a dense ViT's weights; every expert gets a copy of its block's dense MLP."""
        weights = self.state_dict()
        for name, tensor in dense.state_dict().items():
            # expand adds the leading expert dimension to stacked MLP weights and is the identity on all others
            weights[name].copy_(tensor.expand_as(weights[name]))

    def load_foreign(self, weights: Mapping[str, Tensor], where: str) -> list[str]:
        check_state_dict(self, weights, where)
        self.load_state_dict(weights)
        return []

    def stock_module(self) -> nn.Module:
        stock = StockViT(self.config).eval()
        stock.load_state_dict(self.state_dict())
        return stock


class StockViT(ViT):
    """The dense ViT as it is usually written: every block computes every token, as in timm."""

    def forward(self, images: Tensor) -> Tensor:
        x = embed(images, self.patch_embed, self.cls_token, self.pos_embed)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(self.norm(x)[:, 0])
        return result


def embed(images: Tensor, patch_embed: nn.Module, cls_token: Tensor, pos_embed: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]`` → tokens ``[B, N, D]``: the class token first, positions added."""
    x = patch_embed(images)
    return torch.cat([cls_token.expand(x.shape[0], -1, -1), x], dim=1) + pos_embed


def classify(tokens: Tensor, norm: nn.Module, head: nn.Module) -> Tensor:
    """Tokens ``[B, N, D]`` → logits ``[B, C]`` from the class token."""
    result: Tensor = head(norm(tokens[:, 0]))
    return result


def init_weights(model: nn.Module) -> None:
    """Initialises a model as timm and DeiT do.

    Linear weights, class token and positions come from a truncated normal distribution (std 0.02); biases are zero.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "norm" not in name:
            nn.init.trunc_normal_(parameter, std=0.02)


def load_timm_state_dict(model: ViT, saved: Mapping[str, Any] | str | Path, ema: bool = False) -> str:
    """Loads into ``model`` the weights of a ViT that timm's or DeiT's training scripts saved.

    Args:
        model: a ViT of the same shape.
        saved: a state dict, a training checkpoint with one in it, or a file with either;
            see :func:`mvmoe_deploy.models.foreign.read_weights`.
        ema: take the moving average of the weights instead of the weights themselves.

    Returns:
        The entry that the weights were taken from, such as ``state_dict_ema``; empty for a bare state dict.

    Raises:
        ConfigError: no weights can be recognised, a weight is missing or unknown, a shape differs, or values are not
            finite floating-point numbers; the message names the weight.
        CheckpointError: the file cannot be read.
    """
    weights, entry = read_weights(saved, ema)
    check_state_dict(model, weights, entry or "state dict")
    model.load_state_dict(weights)
    return entry


def paper_heads(given: dict[str, int]) -> dict[str, int]:
    """Number of heads for a depth and width: the paper's at its 12 scales, otherwise width / 64 (at least 1)."""
    depth, width = given["depth"], given["width"]
    return {"heads": SCALES.get((depth, width), max(1, width // 64))}


register(
    Architecture(config=ViTConfig, model=ViT, form="vit_DEPTHxWIDTH", examples=("vit_12x192",), derived=paper_heads)
)
