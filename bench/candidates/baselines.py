"""What a Mobile V-MoE is compared with, and random weights to measure scales that nobody trained.

Every baseline is exported by the code that exports the Mobile V-MoE itself (the same attention, the same linear
layers), so that a row differs from another in what is named and in nothing else; only ``stock`` is what
``torch.onnx.export`` makes of a plain ViT.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.checkpoint import Checkpoint
from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models import MobileVMoE, MobileVMoEConfig, ViT, ViTConfig, VMoE, VMoEConfig, build
from mvmoe_deploy.models.architectures.mobile_vmoe import Experts, MoEBlock
from mvmoe_deploy.models.architectures.routing import capacity
from mvmoe_deploy.models.architectures.vit import Block, Mlp, classify, embed
from mvmoe_deploy.models.architectures.vmoe import TokenMoEBlock
from mvmoe_deploy.models.flops import mlp_flops, model_flops, model_macs

RANDOM = "random"
"""What a checkpoint's training summary says of weights that nobody trained: their accuracy is not worth measuring."""


class StockViT(ViT):
    """The dense ViT as everyone writes it: every block computes every token, as timm's does."""

    def forward(self, images: Tensor) -> Tensor:
        x = embed(images, self.patch_embed, self.cls_token, self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def random_checkpoint(config: ViTConfig, path: Path, seed: int = 0) -> Path:
    """Writes a checkpoint with random weights: FLOPs, bytes, memory and latency need no training."""
    torch.manual_seed(seed)
    model = build(config)
    if isinstance(model, MobileVMoE):
        _balance(model)
    names = [f"class {index}" for index in range(config.classes)]
    header = checkpoints.new_header(
        config.to_dict(), names, names, Preprocessing(size=config.image_size), training={"weights": RANDOM}
    )
    checkpoints.save(path, Checkpoint(header, dict(model.state_dict())))
    return path


@torch.no_grad()
def _balance(model: MobileVMoE, images: int = 64) -> None:
    """Shifts and scales a random router so that its experts share random images, as a trained one's share real ones.

    As initialised it sends them all to the same expert, and a graph of all experts would never touch the others.
    """
    size = model.config.image_size
    tokens = torch.cat([model.trunk(torch.randn(8, 3, size, size)) for _ in range(images // 8)])
    linear = model.router.linear
    logits = model.router.logits(tokens)
    scale = 1 / logits.std(0)
    linear.weight.mul_(scale[:, None])
    linear.bias.copy_((linear.bias - logits.mean(0)) * scale)


def export_stock(model: ViT, path: Path) -> Path:
    """``torch.onnx.export`` of the stock dense ViT with its defaults: what a user gets without this toolkit."""
    stock = StockViT(model.config).eval()
    stock.load_state_dict(model.state_dict())
    size = model.config.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter itself
        torch.onnx.export(stock, (torch.randn(1, 3, size, size),), path, dynamo=True, verbose=False)
    return path


def dense_wide(config: MobileVMoEConfig) -> ViT:
    """The dense model as wide as all experts together, at random: its last ``moe_layers`` MLPs have E times the hidden.

    Its parameters are the Mobile V-MoE's but for the router and E - 1 output biases per layer; every image uses all.
    """
    model = ViT(config.dense)
    for block in model.blocks[config.depth - config.moe_layers :]:
        assert isinstance(block, Block)
        block.mlp = Mlp(config.width, config.experts * config.mlp_ratio * config.width)
    return model.eval()


def dense_wide_flops(config: MobileVMoEConfig) -> int:
    """FLOPs of one image through :func:`dense_wide`, by the convention of :mod:`mvmoe_deploy.models.flops`."""
    wide = dataclasses.replace(config.dense, mlp_ratio=config.experts * config.mlp_ratio)
    return model_flops(config.dense) + config.moe_layers * (mlp_flops(wide) - mlp_flops(config.dense))


def dense_wide_macs(config: MobileVMoEConfig) -> int:
    """Multiply-accumulates likewise."""
    mlp = 2 * config.mlp_ratio * config.tokens * config.width**2
    return model_macs(config.dense) + (config.experts - 1) * config.moe_layers * mlp


class AllExperts(nn.Module):
    """A Mobile V-MoE (k = 1) as one graph: images ``[B, 3, H, W]`` → logits ``[B, C]``, the experts chosen inside.

    The chosen expert's weights are taken by index from tensors that hold all experts': the one way to write it that
    torch.onnx exports, that takes any batch, and that computes one expert per image. ``torch.cond`` around the
    experts' MLPs would spare the copy of the weights (a quarter of a tail's run), but nested as ten experts need it,
    torch 2.13 does not export it, and it takes one image at a time; computing all experts and adding what the gate
    leaves costs E times the MLPs.

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
        # index_select becomes one Gather; of an index in brackets the exporter makes more
        w1, b1, w2, b2 = (tensor.index_select(0, chosen) for tensor in (all_.w1, all_.b1, all_.w2, all_.b2))
        return x + (F.gelu(self.norm2(x) @ w1 + b1) @ w2 + b2) * gate[:, None, None]


class StackedMlp(nn.Module):
    """The E MLPs of a layer as tensors that a batched product reads as they lie: ``[E, in, out]``, ``[E, 1, out]``."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.w1, self.w2 = (_constant(layer.weight.transpose(1, 2)) for layer in (experts.fc1, experts.fc2))
        self.b1, self.b2 = (_constant(layer.bias[:, None]) for layer in (experts.fc1, experts.fc2))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, E, c, D]`` → ``[B, E, c, D]``, each expert's rows through its own MLP."""
        return F.gelu(x @ self.w1 + self.b1) @ self.w2 + self.b2


class VMoEGraph(nn.Module):
    """A V-MoE as one static graph: images ``[B, 3, H, W]`` → logits ``[B, C]``, each image a group of its own.

    Tokens are sent to the experts' places and back by products with one-hot matrices, as in the authors' code: shapes
    then depend on nothing but the batch, which a graph needs. All E experts run, on C rows each, whether they were
    chosen or not. It gives what :class:`VMoE` gives for images one at a time.

    Raises:
        ConfigError: Batch Priority Routing, whose sorting this graph lacks.
    """

    def __init__(self, model: VMoE) -> None:
        super().__init__()
        config = model.config
        if config.order != "vanilla":
            raise ConfigError(f"the V-MoE's graph is for the order 'vanilla', not {config.order!r}")
        self.patch_embed, self.cls_token, self.pos_embed = model.patch_embed, model.cls_token, model.pos_embed
        self.blocks = nn.ModuleList(
            block if isinstance(block, Block) else DispatchingBlock(block, config)
            for block in model.blocks
            if isinstance(block, (Block, TokenMoEBlock))
        )
        self.norm, self.head = model.norm, model.head

    def forward(self, images: Tensor) -> Tensor:
        x = embed(images, self.patch_embed, self.cls_token, self.pos_embed)
        for block in self.blocks[:-1]:
            x = block(x)
        return classify(self.blocks[-1](x, n=1), self.norm, self.head)


class DispatchingBlock(nn.Module):
    """A V-MoE layer whose tokens go to places ``[E, C]`` and back by products with one-hot matrices."""

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
        # topk, since sorting does not export: which of two equal gates comes first is left to the engine
        gates, chosen = self.router(normed).softmax(-1).topk(self.k)  # [B, N, k]
        # all first choices queue up before any second, tokens as they stand
        queue = F.one_hot(chosen.transpose(1, 2).flatten(1), self.experts)  # [B, k·N, E]
        place = (queue.cumsum(1) * queue).sum(-1) - 1
        seats = place[..., None] == torch.arange(self.places)  # [B, k·N, C]; none where the expert is full
        sent = queue.to(x.dtype)[..., None] * seats.to(x.dtype)[:, :, None]  # [B, k·N, E, C]
        sent = sent.flatten(2).unflatten(1, (self.k, -1))  # [B, k, N, E·C]
        rows = sent.sum(1).transpose(1, 2) @ normed  # [B, E·C, D]
        outputs = self.mlps(rows.unflatten(1, (self.experts, self.places))).flatten(1, 2)
        back = (sent * gates.transpose(1, 2)[..., None]).sum(1)
        return x[:, :n] + back[:, :n] @ outputs


def vmoe_config(config: MobileVMoEConfig) -> VMoEConfig:
    """The V-MoE of a Mobile V-MoE's shape, with as many MoE layers (at most every second block) and k experts."""
    layers = min(config.moe_layers, config.depth // 2)
    shape = dataclasses.asdict(config.dense)
    return VMoEConfig(**shape, experts=config.experts, k=config.k, placement=f"last-{layers}")


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().contiguous(), requires_grad=False)
