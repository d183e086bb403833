"""Mobile V-MoE (arXiv 2309.04354): one router looks at the whole image once and picks its expert MLPs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.models import flops
from mvmoe_deploy.models.architectures.graphs import AllExperts
from mvmoe_deploy.models.architectures.routing import choose
from mvmoe_deploy.models.architectures.vit import (
    AttentionBlock,
    Block,
    Mlp,
    Stream,
    ViT,
    ViTConfig,
    classify,
    embed,
    init_weights,
    paper_heads,
)
from mvmoe_deploy.models.architectures.wide_vit import WideViTConfig
from mvmoe_deploy.models.model import ImageRouted
from mvmoe_deploy.models.registry import Architecture, ModelConfig, config_from_dict, register, shape

ROUTER_INPUTS = ("class_token", "mean")


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
    routes = "images"

    experts: int = shape(10, "number of experts E (default: one per super-class)")
    moe_layers: int = shape(2, "number of MoE layers L, at the end of the model")
    k: int = shape(1, "experts used per image, or per token", flag="-k")
    router_input: str = shape("class_token", "the router's input, from the tokens", choices=ROUTER_INPUTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.experts:
            raise ConfigError(f"model config: k is {self.k}, but there are only {self.experts} experts")
        if self.moe_layers > self.depth:
            raise ConfigError(f"model config: moe_layers is {self.moe_layers}, but depth is only {self.depth}")
        if self.router_input not in ROUTER_INPUTS:
            raise ConfigError(f"model config: router_input is {self.router_input!r}, must be 'class_token' or 'mean'")

    @property
    def wide(self) -> WideViTConfig:
        """The dense ViT whose last ``moe_layers`` MLPs are as wide as all experts together."""
        return WideViTConfig(**asdict(self.dense), wide_layers=self.moe_layers, times=self.experts)

    @property
    def token_routed(self) -> ModelConfig:
        """The V-MoE with the same k and number of experts, and as many MoE layers (at most every second block)."""
        layers = min(self.moe_layers, self.depth // 2)
        experts = {"experts": self.experts, "k": self.k, "placement": f"last-{layers}"}
        return config_from_dict({**self.dense.to_dict(), "architecture": "vmoe", **experts})

    def router_flops(self) -> int:
        """FLOPs of the router: linear layer with bias, softmax and, if that is its input, the mean over the tokens."""
        mean = self.tokens * self.width if self.router_input == "mean" else 0
        return mean + 2 * self.width * self.experts + self.experts + 5 * self.experts

    def flops(self) -> int:
        """FLOPs of one image; each further expert (k > 1) adds its MLPs.

        The router is not counted, as in the paper's figures (it is about 1e-6 of the whole).
        """
        return super().flops() + (self.k - 1) * self.moe_layers * flops.mlp(self)

    def macs(self) -> int:
        return super().macs() + (self.k - 1) * self.moe_layers * flops.mlp_macs(self) + self.width * self.experts

    def piece_flops(self, role: str) -> int | None:
        gate = self.tokens * self.width
        return {
            "model": self.flops(),
            "trunk": flops.embed(self) + (self.depth - self.moe_layers) * flops.block(self),
            "router": self.router_flops(),
            "tail": self.moe_layers * (flops.block(self) + gate) + flops.head(self),
            "attention": 2 * flops.norm(self) + flops.attention(self) + self.tokens * self.width,
            "expert_layer": flops.mlp(self) + gate,
            "head": flops.head(self),
        }.get(role)

    def parameters(self) -> int:
        more = (self.experts - 1) * self.moe_layers * self.expert_parameters()
        return super().parameters() + more + self.width * self.experts + self.experts

    def active_parameters(self) -> int:
        return self.parameters() - (self.experts - self.k) * self.moe_layers * self.expert_parameters()

    def expert_parameters(self) -> int:
        return flops.mlp_parameters(self)


class Router(nn.Module):
    """One linear layer and a softmax over the experts: tokens ``[B, N, D]`` → probabilities ``[B, E]``."""

    def __init__(self, width: int, experts: int, router_input: str) -> None:
        super().__init__()
        self.router_input = router_input
        self.linear = nn.Linear(width, experts)

    def logits(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, N, D]`` → router logits ``[B, E]``, from which the router loss is computed."""
        result: Tensor = self.linear(tokens[:, 0] if self.router_input == "class_token" else tokens.mean(1))
        return result

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens).softmax(-1)


class StackedLinear(nn.Module):
    """E linear layers of one shape, stored as one tensor: weight ``[E, out, in]``, bias ``[E, out]``."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(experts, outputs))


def stacks_of(model: nn.Module) -> list[nn.Parameter]:
    """The experts' parameters of a model built of :class:`StackedLinear` layers."""
    layers = [module for module in model.modules() if isinstance(module, StackedLinear)]
    return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]


class Experts(nn.Module):
    """The E separate MLPs of one MoE layer."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = StackedLinear(experts, width, hidden)
        self.fc2 = StackedLinear(experts, hidden, width)

    def expert(self, index: int, x: Tensor) -> Tensor:
        """Output of MLP ``index`` for tokens ``[b, N, D]``, not yet multiplied by the gate."""
        hidden = F.gelu(F.linear(x, self.fc1.weight[index], self.fc1.bias[index]))
        return F.linear(hidden, self.fc2.weight[index], self.fc2.bias[index])

    def forward(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Sum over each image's chosen experts of gate times MLP output.

        Args:
            x: tokens ``[B, N, D]``.
            gates: ``[B, k]``.
            chosen: expert indices ``[B, k]``.
        """
        # Rows (image, choice) are sorted by expert, so that each expert runs once, on a contiguous slice.
        k = chosen.shape[1]
        expert_of_row = chosen.flatten()
        order = expert_of_row.argsort(stable=True)
        image_of_row = order // k
        counts = torch.bincount(expert_of_row, minlength=self.fc1.weight.shape[0]).tolist()
        groups = x[image_of_row].split(counts)
        outputs = [self.expert(e, group) for e, group in enumerate(groups) if len(group)]
        weighted = torch.cat(outputs) * gates.flatten()[order, None, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, image_of_row, weighted.to(x.dtype))


class MoEBlock(AttentionBlock):
    """A transformer block in which the MLP differs per expert; attention and norms are shared."""

    def __init__(self, config: MobileVMoEConfig) -> None:
        super().__init__(config)
        self.mlp = Experts(config.experts, config.width, config.mlp_ratio * config.width)

    def forward(self, x: Tensor, gates: Tensor, chosen: Tensor, n: int | None = None) -> Tensor:
        x = x[:, :n] + self.attn(self.norm1(x), n)
        result: Tensor = x + self.mlp(self.norm2(x), gates, chosen)
        return result


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
        """MoE layer ``layer``, counted from 0."""
        block = self.blocks[self.trunk_depth + layer]
        assert isinstance(block, MoEBlock)
        return block

    def trunk(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` → tokens ``[B, N, D]``."""
        x = embed(images, self.patch_embed, self.cls_token, self.pos_embed)
        for block in self.blocks[: self.trunk_depth]:
            x = block(x)
        return x

    def routed(self, images: Tensor, chosen: Tensor | None = None, noisy: bool = False) -> ImageRouted:
        x = self.trunk(images)
        router_logits = self.router.logits(x)
        choice = choose(router_logits, self.config.k, chosen, noisy)
        for block in self.blocks[self.trunk_depth : -1]:
            x = block(x, choice.gates, choice.chosen)
        x = self.blocks[-1](x, choice.gates, choice.chosen, n=1)  # the classifier reads only the class token
        logits = classify(x, self.norm, self.head)
        return ImageRouted.by(choice, logits, router_logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.routed(images).logits

    def expert_stacks(self) -> list[nn.Parameter]:
        return stacks_of(self)

    @torch.no_grad()
    def balance_router(self, images: int = 64) -> None:
        """Shifts and scales the router so that it spreads random images over its experts.

        A freshly initialised router sends all of them to one expert, so that a graph of all experts would never read
        the other experts' weights.
        """
        size = self.config.image_size
        tokens = torch.cat([self.trunk(torch.randn(8, 3, size, size)) for _ in range(images // 8)])
        linear = self.router.linear
        logits = self.router.logits(tokens)
        scale = 1 / logits.std(0)
        linear.weight.mul_(scale[:, None])
        linear.bias.copy_((linear.bias - logits.mean(0)) * scale)

    def graph_module(self) -> nn.Module:
        return AllExperts(self)

    # The rest implements the protocol of mvmoe_deploy.exporters.split. Pieces share their parameters with this model.

    @property
    def experts(self) -> int:
        """Number of experts E."""
        return self.config.experts

    @property
    def k(self) -> int:
        """Experts used per image."""
        return self.config.k

    @property
    def moe_layers(self) -> int:  # type: ignore[override]
        """Number of MoE layers L."""
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

        In the last layer both hold only the class token, ``[B, 1, D]``.
        """
        return AttentionSegment(self.moe_block(layer), 1 if layer == self.moe_layers - 1 else None)

    def expert_module(self, expert: int, layer: int) -> nn.Module:
        """The experts' input ``[B, N, D]`` and gate ``[B]`` → what to add to the residual stream."""
        return GatedMlp(dense_mlp(self.moe_block(layer).mlp, expert))

    def head_module(self) -> nn.Module:
        """Tokens ``[B, N, D]`` → logits ``[B, C]``."""
        return Classifier(self.norm, self.head)


class Trunk(nn.Module):
    """The patch embedding and the dense blocks of a model: images ``[B, 3, H, W]`` → tokens ``[B, N, D]``."""

    stream: ClassVar[Stream] = Stream("images", "tokens")

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
        result: Tensor = self.mlp(x) * gate[:, None, None]
        return result


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
        result: Tensor = x + self.mlp(self.norm2(x)) * gate[:, None, None]
        return result


class Classifier(nn.Module):
    """Final norm and head on the class token: tokens ``[B, N, D]`` → logits ``[B, C]``."""

    def __init__(self, norm: nn.LayerNorm, head: nn.Linear) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, x: Tensor) -> Tensor:
        return classify(x, self.norm, self.head)


class Tail(nn.Module):
    """What follows the router for one expert: tokens ``[B, N, D]``, gate ``[B]`` → logits ``[B, C]``."""

    stream: ClassVar[Stream] = Stream("tokens", "logits")

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


register(
    Architecture(
        config=MobileVMoEConfig,
        model=MobileVMoE,
        form="mvmoe_DEPTHxWIDTH",
        examples=("mvmoe_12x192", "mvmoe_6x64"),
        derived=paper_heads,
    )
)
