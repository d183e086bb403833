"""V-MoE (arXiv 2106.05974): a router in every MoE layer picks experts for each token. The comparison model."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.models import flops
from mvmoe_deploy.models.architectures.graphs import VMoEGraph
from mvmoe_deploy.models.architectures.mobile_vmoe import Experts, stacks_of
from mvmoe_deploy.models.architectures.routing import ORDERS, TokenRouting, auxiliary_loss, route
from mvmoe_deploy.models.architectures.vit import (
    AttentionBlock,
    Block,
    ViT,
    ViTConfig,
    classify,
    embed,
    init_weights,
    paper_heads,
)
from mvmoe_deploy.models.model import Output, TokenRoutes
from mvmoe_deploy.models.registry import Architecture, register, shape


@dataclass(frozen=True)
class VMoEConfig(ViTConfig):
    """Shape of a V-MoE: a ViT in which some blocks send each token to k of ``experts`` MLPs.

    Attributes:
        experts: number of experts E in every MoE layer.
        placement: which blocks are MoE layers: ``every-n`` means every n-th block, ``last-n`` the last n blocks of
            ``every-2``. The paper's last-2 of 12 blocks are therefore the blocks 9 and 11, counted from 0.
        k: experts used per token.
        capacity_factor: gives each expert ``C = ceil(S·k·capacity_factor/E)`` places, rounded up to a multiple of 4,
            for the S tokens of a batch.
        order: order in which tokens get places: ``vanilla`` or ``bpr`` (Batch Priority Routing).
    """

    architecture: ClassVar[str] = "vmoe"
    routes = "tokens"

    experts: int = shape(10, "number of experts E (default: one per super-class)")
    placement: str = shape("last-2", "which blocks are MoE layers: last-N (of every second one) or every-N")
    k: int = shape(1, "experts used per image, or per token", flag="-k")
    capacity_factor: float = shape(1.05, "places in all experts together, per choice of a token")
    order: str = shape("vanilla", "order in which tokens get places", choices=ORDERS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.experts:
            raise ConfigError(f"model config: k is {self.k}, but there are only {self.experts} experts")
        if not 0 < self.capacity_factor < math.inf:
            raise ConfigError(f"model config: capacity_factor is {self.capacity_factor}, must be above 0 and finite")
        if self.order not in ORDERS:
            raise ConfigError(f"model config: order is {self.order!r}, must be 'vanilla' or 'bpr'")
        if not re.fullmatch(r"(last|every)-[1-9]\d{0,4}", self.placement):
            raise ConfigError(f"model config: placement is {self.placement!r}, must be 'last-N' or 'every-N'")
        kind, n = self.placement.split("-")
        if int(n) > (self.depth // 2 if kind == "last" else self.depth):
            raise ConfigError(f"model config: placement is {self.placement!r}, but depth is only {self.depth}")

    @property
    def moe_blocks(self) -> list[int]:
        """Indices of the blocks that are MoE layers."""
        kind, n = self.placement.split("-")
        if kind == "every":
            return list(range(int(n) - 1, self.depth, int(n)))
        return list(range(1, self.depth, 2))[-int(n) :]

    def router_flops(self) -> int:
        """FLOPs of one layer's router over all tokens: linear layer without bias, and softmax."""
        return self.tokens * (2 * self.width * self.experts + 5 * self.experts)

    def token_mlps(self) -> float:
        """Number of MLPs that a MoE layer computes per token, at most: ``k · min(1, capacity factor)``.

        Below a capacity factor of 1 the places run out: E experts with C = S·k·cf/E places each serve S·k·cf choices.
        Above 1 there are only the S·k choices, and a place that stays empty costs nothing here. (The paper's
        implementation pads empty places and pays for ``k · cf``.) The figure is an upper bound, because an expert that
        few tokens choose keeps empty places while other experts overflow. It ignores the rounding of C, which depends
        on the batch.
        """
        return self.k * min(1.0, self.capacity_factor)

    def flops(self) -> int:
        """FLOPs of one image, including the routers, which read every token. :meth:`token_mlps` bounds the experts'."""
        layer = self.router_flops() + round((self.token_mlps() - 1) * flops.mlp(self))
        return super().flops() + len(self.moe_blocks) * layer

    def macs(self) -> int:
        layer = self.tokens * self.width * self.experts + round((self.token_mlps() - 1) * flops.mlp_macs(self))
        return super().macs() + len(self.moe_blocks) * layer

    def parameters(self) -> int:
        layer = (self.experts - 1) * self.expert_parameters() + self.width * self.experts
        return super().parameters() + len(self.moe_blocks) * layer

    def active_parameters(self) -> int:
        """Number of weights that one image can use.

        Each of its N tokens chooses its own k experts, so the image uses up to N·k of the E experts in every MoE layer.
        :meth:`TokenRouted.used` measures how many it really uses.
        """
        untouched = max(0, self.experts - self.tokens * self.k)
        return self.parameters() - untouched * len(self.moe_blocks) * self.expert_parameters()

    def expert_parameters(self) -> int:
        return flops.mlp_parameters(self)


class TokenMoEBlock(AttentionBlock):
    """A transformer block in which a router picks the MLPs of each token."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__(config)
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.mlp = Experts(config.experts, config.width, config.mlp_ratio * config.width)

    def forward(self, x: Tensor, config: VMoEConfig, n: int | None = None) -> tuple[Tensor, TokenRouting]:
        """Tokens ``[B, N, D]`` → the first n tokens of each image ``[B, n, D]`` (default: all), and the routing.

        The tokens of the whole batch share an expert's places: S = B · N.
        """
        x = x + self.attn(self.norm1(x))
        normed = self.norm2(x)
        batch, tokens, width = normed.shape
        # float32 even under autocast, because rounded logits would tie
        logits = self.router(normed).float().flatten(0, 1)
        routing = route(
            logits=logits, k=config.k, factor=config.capacity_factor, order=config.order, training=self.training
        )
        if n is not None:
            # Tokens whose output is not read are routed as well, because in training they took places and counted in
            # the losses. If only the other tokens were routed, C and the overflow would change, and so would the
            # logits. Only the experts of the unread tokens need not run. So attention is computed for all tokens here.
            read = torch.arange(batch * tokens, device=x.device) % tokens < n
            routing = dataclasses.replace(routing, run=routing.kept & read[:, None])
        token, choice = routing.run.nonzero(as_tuple=True)
        added = torch.zeros_like(normed).flatten(0, 1)  # overflow gets a zero MoE output
        if len(token):
            # Experts takes each (token, choice) as an image of one token
            rows = normed.flatten(0, 1)[token, None]
            outputs = self.mlp(rows, routing.gates[token, choice, None], routing.chosen[token, choice, None])
            added = added.index_add(0, token, outputs[:, 0])
        return (x + added.view(batch, tokens, width))[:, :n], routing


@dataclass
class TokenRouted(Output):
    """A V-MoE's output for a batch.

    Attributes:
        layers: the routing of each MoE layer over S = B · N tokens, image by image.
    """

    layers: list[TokenRouting]

    def auxiliary_loss(self) -> Tensor:
        """Half the importance loss plus half the load loss (appendix A), summed over the layers (as in their code)."""
        k = self.layers[0].chosen.shape[1]
        return torch.stack([auxiliary_loss(layer.logits, layer.noisy_logits, k) for layer in self.layers]).sum()

    def routes(self) -> TokenRoutes:
        return TokenRoutes(self.choices().cpu(), self.used().cpu(), self.overflow().cpu())

    def choices(self) -> Tensor:
        """Share of each image's choices that fell on each expert ``[B, MoE layers, E]``, including overflow."""
        return torch.stack([self._per_image(self._chosen(layer)).float().mean(1) for layer in self.layers], 1)

    def used(self, unread: bool = False) -> Tensor:
        """Which experts each image used, boolean ``[B, MoE layers, E]``; overflow uses none.

        Experts of different layers have different weights. The number of True in an image's row is therefore the number
        of MLPs that the image needs in memory.

        Args:
            unread: whether to count the experts of tokens whose output is not read, as the model is written down. These
                experts are not run: in the last block, only those of the class token are.
        """
        return torch.stack(
            [
                self._per_image(self._chosen(layer) & (layer.kept if unread else layer.run)[:, :, None]).any(1)
                for layer in self.layers
            ],
            1,
        )

    def overflow(self) -> Tensor:
        """Share of the choices in each MoE layer that found no place ``[MoE layers]``."""
        return torch.stack([1 - layer.kept.float().mean() for layer in self.layers])

    @staticmethod
    def _chosen(layer: TokenRouting) -> Tensor:
        return F.one_hot(layer.chosen, layer.logits.shape[1]).bool()  # [S, k, E]

    def _per_image(self, of_tokens: Tensor) -> Tensor:
        """``[S, k, E]`` → ``[B, N·k, E]``."""
        result: Tensor = of_tokens.unflatten(0, (len(self.logits), -1)).flatten(1, 2)
        return result


class VMoE(ViT):
    """V-MoE: images ``[B, 3, H, W]`` → logits ``[B, C]``.

    The tokens of a batch compete for places. Unless the capacity is ample, an image's logits depend on its batch.
    """

    config: VMoEConfig
    cannot_split = "a V-MoE routes every token in every MoE layer: only a model that routes images can be split"

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__(config)
        for index in config.moe_blocks:
            self.blocks[index] = TokenMoEBlock(config)
        init_weights(self)

    def moe_block(self, index: int) -> TokenMoEBlock:
        """The MoE layer that is block ``index``."""
        block = self.blocks[index]
        assert isinstance(block, TokenMoEBlock)
        return block

    def set_capacity(self, factor: float, order: str | None = None) -> None:
        """Changes the capacity factor and, if ``order`` is given, the order in which tokens get places.

        A factor below 1 at inference is the adaptive compute of section 4.

        Raises:
            ConfigError: the factor is not above 0, or the order is unknown.
        """
        self.config = dataclasses.replace(self.config, capacity_factor=factor, order=order or self.config.order)

    @property
    def moe_layers(self) -> int:  # type: ignore[override]
        """Number of MoE layers."""
        return len(self.config.moe_blocks)

    def routed(self, images: Tensor, chosen: Tensor | None = None, noisy: bool = False) -> TokenRouted:
        """Runs the model, and returns the routing of every MoE layer beside the logits.

        Noise is added in training mode, whatever ``noisy`` says.

        Raises:
            ConfigError: ``chosen`` is given, but each token of a V-MoE chooses its own experts.
        """
        if chosen is not None:
            raise ConfigError("a V-MoE's experts are chosen by each token: they cannot be forced for an image")
        x = embed(images, self.patch_embed, self.cls_token, self.pos_embed)
        layers = []
        for index, block in enumerate(self.blocks):
            n = 1 if index == len(self.blocks) - 1 else None  # the classifier reads only the class token
            if isinstance(block, Block):
                x = block(x, n=n)
            else:
                x, routing = block(x, self.config, n=n)
                layers.append(routing)
        return TokenRouted(classify(x, self.norm, self.head), layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.routed(images).logits

    def expert_stacks(self) -> list[nn.Parameter]:
        return stacks_of(self)

    def graph_module(self) -> nn.Module:
        return VMoEGraph(self)


register(
    Architecture(config=VMoEConfig, model=VMoE, form="vmoe_DEPTHxWIDTH", examples=("vmoe_12x192",), derived=paper_heads)
)
