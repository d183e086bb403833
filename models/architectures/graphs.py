"""Routed models as one static graph that holds all experts. Benchmarks compare split models with these graphs.

A graph computes what its model computes, from the same weights, but chooses the experts inside the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.models.architectures.routing import capacity
from mvmoe_deploy.models.architectures.vit import classify, embed

if TYPE_CHECKING:
    from mvmoe_deploy.models.architectures.mobile_vmoe import Experts, MobileVMoE, MoEBlock
    from mvmoe_deploy.models.architectures.vmoe import TokenMoEBlock, VMoE, VMoEConfig


class AllExperts(nn.Module):
    """A Mobile V-MoE (k = 1) as one graph that chooses the experts: images ``[B, 3, H, W]`` → logits ``[B, C]``.

    The graph takes the chosen expert's weights by index from tensors that hold all experts' weights. No other form can
    be exported by torch.onnx, takes any batch, and computes only one expert per image. ``torch.cond`` around the
    experts' MLPs would avoid copying the weights (a quarter of a tail's run), but ten experts need nested conditions,
    which torch 2.13 does not export, and a condition takes one image at a time. Computing all experts and masking their
    outputs by the gate costs E times the MLPs.

    Raises:
        ConfigError: k > 1.
    """

    def __init__(self, model: MobileVMoE) -> None:
        super().__init__()
        if model.k != 1:
            raise ConfigError(f"the graph of all experts is for k = 1, not k = {model.k}")
        self.trunk, self.router = model.trunk_module(), model.router_module()
        self.blocks = nn.ModuleList(SelectingBlock(model.moe_block(layer)) for layer in range(model.moe_layers))
        self.norm, self.head = model.norm, model.head

    def forward(self, images: Tensor) -> Tensor:
        x = self.trunk(images)
        gate, chosen = self.router(x).max(-1)
        for block in self.blocks[:-1]:
            x = block(x, gate, chosen)
        return classify(self.blocks[-1](x, gate, chosen, 1), self.norm, self.head)


class SelectingBlock(nn.Module):
    """A MoE layer that takes the chosen expert's weights by index."""

    def __init__(self, block: MoEBlock) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = block.norm1, block.attn, block.norm2
        self.experts = StackedMlp(block.mlp)

    def forward(self, x: Tensor, gate: Tensor, chosen: Tensor, n: int | None = None) -> Tensor:
        x = x[:, :n] + self.attn(self.norm1(x), n)
        all_ = self.experts
        # index_select becomes a single Gather; the exporter turns an index in brackets into more operators
        w1, b1, w2, b2 = (tensor.index_select(0, chosen) for tensor in (all_.w1, all_.b1, all_.w2, all_.b2))
        return x + (F.gelu(self.norm2(x) @ w1 + b1) @ w2 + b2) * gate[:, None, None]


class StackedMlp(nn.Module):
    """The E MLPs of a layer as tensors, laid out for a batched product: ``[E, in, out]`` and ``[E, 1, out]``."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.w1, self.w2 = (_constant(layer.weight.transpose(1, 2)) for layer in (experts.fc1, experts.fc2))
        self.b1, self.b2 = (_constant(layer.bias[:, None]) for layer in (experts.fc1, experts.fc2))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, E, c, D]`` → ``[B, E, c, D]``, each expert's rows through its own MLP."""
        return F.gelu(x @ self.w1 + self.b1) @ self.w2 + self.b2


class VMoEGraph(nn.Module):
    """A V-MoE as one static graph: images ``[B, 3, H, W]`` → logits ``[B, C]``; each image is a group of its own.

    Products with one-hot matrices send tokens to the experts' places and back, as in the authors' code. Shapes then
    depend only on the batch, as a static graph requires. All E experts run on C rows each, whether they were chosen or
    not. The logits are those that the V-MoE gives if it takes images one at a time.

    Raises:
        ConfigError: the model uses Batch Priority Routing; this graph cannot sort.
    """

    def __init__(self, model: VMoE) -> None:
        super().__init__()
        config = model.config
        if config.order != "vanilla":
            raise ConfigError(f"the V-MoE's graph is for the order 'vanilla', not {config.order!r}")
        self.patch_embed, self.cls_token, self.pos_embed = model.patch_embed, model.cls_token, model.pos_embed
        self.blocks = nn.ModuleList(
            DispatchingBlock(model.moe_block(index), config) if index in config.moe_blocks else block
            for index, block in enumerate(model.blocks)
        )
        self.norm, self.head = model.norm, model.head

    def forward(self, images: Tensor) -> Tensor:
        x = embed(images, self.patch_embed, self.cls_token, self.pos_embed)
        for block in self.blocks[:-1]:
            x = block(x)
        return classify(self.blocks[-1](x, n=1), self.norm, self.head)


class DispatchingBlock(nn.Module):
    """A V-MoE layer that moves tokens to places ``[E, C]`` and back by products with one-hot matrices."""

    def __init__(self, block: TokenMoEBlock, config: VMoEConfig) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.router = block.norm1, block.attn, block.norm2, block.router
        self.mlps = StackedMlp(block.mlp)
        self.k, self.experts = config.k, config.experts
        places = capacity(config.tokens, config.k, config.capacity_factor, config.experts)
        self.places = min(places, config.tokens * config.k)

    def forward(self, x: Tensor, n: int | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x))
        normed = self.norm2(x)
        # topk, because a sort does not export; the engine decides which of two equal gates comes first
        gates, chosen = self.router(normed).softmax(-1).topk(self.k)  # [B, N, k]
        # all first choices come before any second choice; tokens keep their order
        queue = F.one_hot(chosen.transpose(1, 2).flatten(1), self.experts)  # [B, k·N, E]
        place = (queue.cumsum(1) * queue).sum(-1) - 1
        seats = place[..., None] == torch.arange(self.places)  # [B, k·N, C]; all False if the expert is full
        sent = queue.to(x.dtype)[..., None] * seats.to(x.dtype)[:, :, None]  # [B, k·N, E, C]
        sent = sent.flatten(2).unflatten(1, (self.k, -1))  # [B, k, N, E·C]
        rows = sent.sum(1).transpose(1, 2) @ normed  # [B, E·C, D]
        outputs = self.mlps(rows.unflatten(1, (self.experts, self.places))).flatten(1, 2)
        back = (sent * gates.transpose(1, 2)[..., None]).sum(1)
        result: Tensor = x[:, :n] + back[:, :n] @ outputs
        return result


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().contiguous(), requires_grad=False)
