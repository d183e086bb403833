"""Mobile V-MoE (arXiv 2309.04354): one router looks at the whole image once and picks its expert MLPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.models.architectures.routing import select, with_noise
from mvmoe_deploy.models.architectures.vit import (
    LAYER_NORM_EPS,
    Attention,
    Block,
    Mlp,
    ViT,
    ViTConfig,
    classify,
    embed,
    init_weights,
)


@dataclass(frozen=True)
class MobileVMoEConfig(ViTConfig):
    """Shape of a Mobile V-MoE: a ViT whose last ``moe_layers`` blocks have ``experts`` MLPs each.

    Attributes:
        experts: number of experts E in every MoE layer.
        moe_layers: number of MoE layers L; the first ``depth - moe_layers`` blocks are the dense trunk.
        k: experts used per image.
        router_input: ``class_token`` or ``mean`` (of all tokens).
    """

    architecture: ClassVar[str] = "mobile_vmoe"

    experts: int = 10
    moe_layers: int = 2
    k: int = 1
    router_input: str = "class_token"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.experts:
            raise ConfigError(f"model config: k is {self.k}, but there are only {self.experts} experts")
        if self.moe_layers > self.depth:
            raise ConfigError(f"model config: moe_layers is {self.moe_layers}, but depth is only {self.depth}")
        if self.router_input not in ("class_token", "mean"):
            raise ConfigError(f"model config: router_input is {self.router_input!r}, must be 'class_token' or 'mean'")


class Router(nn.Module):
    """One linear layer and a softmax over the experts: tokens ``[B, N, D]`` → probabilities ``[B, E]``."""

    def __init__(self, width: int, experts: int, router_input: str) -> None:
        super().__init__()
        self.router_input = router_input
        self.linear = nn.Linear(width, experts)

    def logits(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, N, D]`` → router logits ``[B, E]``, which the router loss is taken on."""
        return self.linear(tokens[:, 0] if self.router_input == "class_token" else tokens.mean(1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens).softmax(-1)


class StackedLinear(nn.Module):
    """E linear layers of one shape, stored as one tensor: weight ``[E, out, in]``, bias ``[E, out]``."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(experts, outputs))


class Experts(nn.Module):
    """The E separate MLPs of one MoE layer."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = StackedLinear(experts, width, hidden)
        self.fc2 = StackedLinear(experts, hidden, width)

    def expert(self, index: int, x: Tensor) -> Tensor:
        """Output of MLP ``index`` for tokens ``[b, N, D]``, without its gate."""
        hidden = F.gelu(F.linear(x, self.fc1.weight[index], self.fc1.bias[index]))
        return F.linear(hidden, self.fc2.weight[index], self.fc2.bias[index])

    def forward(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Sum over each image's chosen experts of gate times MLP output.

        Args:
            x: tokens ``[B, N, D]``.
            gates: ``[B, k]``.
            chosen: expert indices ``[B, k]``.
        """
        # Rows (image, choice) are sorted by expert, so each expert computes once, on a contiguous slice.
        k = chosen.shape[1]
        expert_of_row = chosen.flatten()
        order = expert_of_row.argsort(stable=True)
        image_of_row = order // k
        counts = torch.bincount(expert_of_row, minlength=self.fc1.weight.shape[0]).tolist()
        groups = x[image_of_row].split(counts)
        outputs = [self.expert(e, group) for e, group in enumerate(groups) if len(group)]
        weighted = torch.cat(outputs) * gates.flatten()[order, None, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, image_of_row, weighted.to(x.dtype))


class MoEBlock(nn.Module):
    """A transformer block in which the MLP differs per expert; attention and norms are shared."""

    def __init__(self, config: MobileVMoEConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.mlp = Experts(config.experts, config.width, config.mlp_ratio * config.width)

    def forward(self, x: Tensor, gates: Tensor, chosen: Tensor, n: int | None = None) -> Tensor:
        x = x[:, :n] + self.attn(self.norm1(x), n)
        return x + self.mlp(self.norm2(x), gates, chosen)


@dataclass
class Routed:
    """What a training step needs.

    ``logits [B, C]``, ``router_logits [B, E]``, those with noise that were routed by (the same without noise),
    ``gates`` and ``chosen [B, k]``.
    """

    logits: Tensor
    router_logits: Tensor
    noisy_logits: Tensor
    gates: Tensor
    chosen: Tensor


class MobileVMoE(ViT):
    """Mobile V-MoE: images ``[B, 3, H, W]`` → logits ``[B, C]``."""

    config: MobileVMoEConfig

    def __init__(self, config: MobileVMoEConfig) -> None:
        super().__init__(config)
        dense = config.depth - config.moe_layers
        self.blocks = nn.ModuleList(
            [Block(config) for _ in range(dense)] + [MoEBlock(config) for _ in range(config.moe_layers)]
        )
        self.router = Router(config.width, config.experts, config.router_input)
        init_weights(self)

    @property
    def trunk_depth(self) -> int:
        """Number of dense blocks before the router."""
        return self.config.depth - self.config.moe_layers

    def moe_block(self, layer: int) -> MoEBlock:
        """MoE layer ``layer``, from 0."""
        block = self.blocks[self.trunk_depth + layer]
        assert isinstance(block, MoEBlock)
        return block

    def trunk(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` → tokens ``[B, N, D]``."""
        x = embed(images, self.patch_embed, self.cls_token, self.pos_embed)
        for block in self.blocks[: self.trunk_depth]:
            x = block(x)
        return x

    def routed(self, images: Tensor, chosen: Tensor | None = None, noisy: bool = False) -> Routed:
        """Runs the model and returns what it routed as well.

        Args:
            images: ``[B, 3, H, W]``.
            chosen: expert indices ``[B, k]`` to use instead of the router's choice; gates stay the router's
                probabilities of those experts.
            noisy: route by logits with V-MoE's noise, to train a router that no super-classes teach.
        """
        x = self.trunk(images)
        router_logits = self.router.logits(x)
        noisy_logits = with_noise(router_logits) if noisy else router_logits
        probabilities = noisy_logits.softmax(-1)
        # Softmax first, then top-k: gates are not renormalised (DESIGN, "gate").
        if chosen is None:
            gates, chosen = select(probabilities, self.config.k)
        else:
            gates = probabilities.gather(1, chosen)
        for block in self.blocks[self.trunk_depth : -1]:
            x = block(x, gates, chosen)
        x = self.blocks[-1](x, gates, chosen, n=1)  # the classifier reads the class token alone
        return Routed(classify(x, self.norm, self.head), router_logits, noisy_logits, gates, chosen)

    def forward(self, images: Tensor) -> Tensor:
        return self.routed(images).logits

    # The rest is the protocol of mvmoe_deploy.exporters.split. Pieces share their parameters with this model.

    @property
    def experts(self) -> int:
        """E."""
        return self.config.experts

    @property
    def k(self) -> int:
        """Experts per image."""
        return self.config.k

    @property
    def moe_layers(self) -> int:
        """L."""
        return self.config.moe_layers

    def trunk_module(self) -> nn.Module:
        """Images ``[B, 3, H, W]`` → tokens ``[B, N, D]``."""
        return Trunk(self)

    def router_module(self) -> nn.Module:
        """Tokens ``[B, N, D]`` → probabilities ``[B, E]``."""
        return self.router

    def tail_module(self, expert: int) -> nn.Module:
        """Tokens ``[B, N, D]`` and gate ``[B]`` → logits ``[B, C]`` (k = 1)."""
        return Tail(self, expert)

    def attention_module(self, layer: int) -> nn.Module:
        """Tokens ``[B, N, D]`` → the residual stream and the experts' input, both ``[B, N, D]``.

        Of the last layer only the class token's, ``[B, 1, D]``.
        """
        return AttentionSegment(self.moe_block(layer), 1 if layer == self.moe_layers - 1 else None)

    def expert_module(self, expert: int, layer: int) -> nn.Module:
        """The experts' input ``[B, N, D]`` and gate ``[B]`` → what to add to the residual stream."""
        return GatedMlp(dense_mlp(self.moe_block(layer).mlp, expert))

    def head_module(self) -> nn.Module:
        """Tokens ``[B, N, D]`` → logits ``[B, C]``."""
        return Classifier(self.norm, self.head)


class Trunk(nn.Module):
    """Images → tokens: the patch embedding and the dense blocks of a model."""

    def __init__(self, model: MobileVMoE) -> None:
        super().__init__()
        self.patch_embed, self.cls_token, self.pos_embed = model.patch_embed, model.cls_token, model.pos_embed
        self.blocks = model.blocks[: model.trunk_depth]

    def forward(self, images: Tensor) -> Tensor:
        x = embed(images, self.patch_embed, self.cls_token, self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return x


class GatedMlp(nn.Module):
    """One expert of one MoE layer: tokens ``[B, N, D]``, gate ``[B]`` → gate times MLP output."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.mlp(x) * gate[:, None, None]


class AttentionSegment(nn.Module):
    """The shared part of a MoE layer: tokens → (tokens after attention, the experts' normalised input)."""

    def __init__(self, block: MoEBlock, n: int | None) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = block.norm1, block.attn, block.norm2
        self.n = n

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x[:, : self.n] + self.attn(self.norm1(x), self.n)
        return x, self.norm2(x)


class GatedBlock(nn.Module):
    """A MoE layer with one expert's MLP in place: tokens ``[B, N, D]``, gate ``[B]`` → tokens."""

    def __init__(self, block: MoEBlock, expert: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = block.norm1, block.attn, block.norm2
        self.mlp = dense_mlp(block.mlp, expert)

    def forward(self, x: Tensor, gate: Tensor, n: int | None = None) -> Tensor:
        x = x[:, :n] + self.attn(self.norm1(x), n)
        return x + self.mlp(self.norm2(x)) * gate[:, None, None]


class Classifier(nn.Module):
    """Final norm and head on the class token: tokens ``[B, N, D]`` → logits ``[B, C]``."""

    def __init__(self, norm: nn.LayerNorm, head: nn.Linear) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, x: Tensor) -> Tensor:
        return classify(x, self.norm, self.head)


class Tail(nn.Module):
    """What follows the router for one expert: tokens ``[B, N, D]``, gate ``[B]`` → logits ``[B, C]``."""

    def __init__(self, model: MobileVMoE, expert: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GatedBlock(model.moe_block(i), expert) for i in range(model.moe_layers))
        self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        for block in self.blocks[:-1]:
            x = block(x, gate)
        return classify(self.blocks[-1](x, gate, n=1), self.norm, self.head)


def dense_mlp(experts: Experts, expert: int) -> Mlp:
    """One expert as a plain MLP whose parameters are views of the stacked ones."""
    _, hidden, width = experts.fc1.weight.shape
    with torch.device("meta"):
        mlp = Mlp(width, hidden)
    views = {
        f"{name}.{kind}": getattr(getattr(experts, name), kind)[expert]
        for name in ("fc1", "fc2")
        for kind in ("weight", "bias")
    }
    mlp.load_state_dict(views, assign=True)
    return mlp
