"""Rewrites modules so that XNNPACK can run them in one delegate, with the same outputs.

XNNPACK's delegate has no LayerNorm, and scaled_dot_product_attention lowers to 4-D matmuls and a safe softmax whose
comparisons the delegate leaves out. Either cuts a transformer into dozens of delegates, with a copy at every boundary
and unoptimised kernels in between: the naive trunk of mvmoe_12x192 has 103 delegates and takes 1.4 times as long as
the rewritten one.
Matrix products are three fifths of the naive trunk's time, which no rewrite can save. The rest is passes over a
tensor, each of which takes as long as copying the tensor, so the rewrite aims for fewer passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy.exporters.graph import check_same
from mvmoe_deploy.exporters.split import PieceModule, computes_as, private_copy
from mvmoe_deploy.models.architectures.vit import Attention, Stream


class FoldedAttention(nn.Module):
    """:class:`Attention` with three projections, the scale folded into the query's, and heads folded into the batch."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        width = attention.proj.in_features
        weights, biases = attention.qkv.weight.detach().chunk(3), attention.qkv.bias.detach().chunk(3)
        scale = (width // self.heads) ** -0.5
        self.q = _linear(weights[0] * scale, biases[0] * scale)
        self.k = _linear(weights[1], biases[1])
        self.v = _linear(weights[2], biases[2])
        self.proj = attention.proj

    def forward(self, x: Tensor, n: int | None = None) -> Tensor:
        q = self._fold(self.q(x if n is None else x[:, :n]), (0, 2, 1, 3))
        k, v = self._fold(self.k(x), (0, 2, 3, 1)), self._fold(self.v(x), (0, 2, 1, 3))
        x = torch.bmm(F.softmax(torch.bmm(q, k), -1), v)
        _, tokens, per_head = x.shape
        x = x.view(-1, self.heads, tokens, per_head).transpose(1, 2).contiguous()
        result: Tensor = self.proj(x.view(-1, tokens, self.heads * per_head))
        return result

    def _fold(self, x: Tensor, order: tuple[int, int, int, int]) -> Tensor:
        """``[B, N, D]`` → ``[B·h, N, D/h]`` or, for keys, its transpose, in one pass.

        XNNPACK accepts a reshape at any batch only if it has exactly one -1.
        """
        _, tokens, width = x.shape
        x = x.view(-1, tokens, self.heads, width // self.heads).permute(order).contiguous()
        return x.view(-1, *x.shape[2:])


class LinearNorm(nn.Module):
    """LayerNorm over the last dimension, with its means written as a linear layer of weights 1/D.

    Epsilon is that layer's bias, which saves an operator; each operator takes as long as copying its tensor.
    """

    mean: Tensor
    eps: Tensor

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        width = norm.normalized_shape[0]
        # This is a buffer with F.linear, not an nn.Linear: int8 quantizes nn.Linear, and a mean must not be rounded.
        self.register_buffer("mean", torch.full((1, width), 1 / width))
        self.register_buffer("eps", torch.full((1,), norm.eps))
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        x = x - F.linear(x, self.mean)
        return x * torch.rsqrt(F.linear(x * x, self.mean, self.eps)) * self.weight + self.bias


class Reflection(nn.Module):
    """Maps tokens ``[B, N, D]`` to an orthonormal basis whose first axis is the direction of their mean, and back.

    The map is the Householder reflection that exchanges that direction and the first axis. A transformer's residual
    stream can be kept in this basis at no cost, because the layers that write and read it absorb the reflection into
    their weights. LayerNorm's centring then amounts to dropping the first coordinate (:class:`ReflectedNorm`).
    """

    row: Tensor
    column: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        axis = torch.full((width,), width**-0.5, dtype=torch.float64)
        axis[0] -= 1
        scaled = -2 * axis / (axis @ axis).clamp(min=1e-9)  # at width 1 the mean already is the first axis
        self.matrix = torch.eye(width, dtype=torch.float64) + torch.outer(axis, scaled)  # the matrix is its own inverse
        self.register_buffer("row", scaled.float()[None])
        self.register_buffer("column", axis.float())

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(x, self.row) * self.column

    def write(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Changes a layer that adds to the residual stream so that it adds to the reflected stream."""
        _set(layer, self.matrix @ layer.weight.double().flatten(1), self.matrix @ _double(layer.bias))

    def read(self, norm: nn.LayerNorm, layer: nn.Linear) -> ReflectedNorm:
        """Changes a layer that reads a norm of the stream so that it reads the reflected stream's norm.

        The layer also absorbs the norm's weight and bias.

        Returns:
            The norm of the reflected stream.
        """
        weight = layer.weight.double()
        reflected = (weight * norm.weight.double()) @ self.matrix
        reflected[:, 0] = 0  # the mean
        _set(layer, reflected, _double(layer.bias) + weight @ norm.bias.double())
        return ReflectedNorm(norm)


class ReflectedNorm(nn.Module):
    """LayerNorm of reflected tokens without weight and bias; the first coordinate is wrong, but nothing reads it."""

    mean: Tensor
    eps: Tensor

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        (width,) = norm.normalized_shape
        # buffers with F.linear, as in LinearNorm
        mean = torch.full((1, width), 1 / width)
        mean[0, 0] = 0
        self.register_buffer("mean", mean)
        self.register_buffer("eps", torch.full((1,), norm.eps))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(F.linear(x * x, self.mean, self.eps))


class ReflectedTail(nn.Module):
    """A tail whose blocks run on reflected tokens."""

    def __init__(self, tail: nn.Module, reflection: Reflection) -> None:
        super().__init__()
        self.tail, self.reflection = tail, reflection

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        logits: Tensor = self.tail(self.reflection(x), gate)
        return logits


def rewrite(piece: PieceModule, reflect: bool = True) -> nn.Module:
    """The piece's module with every Attention and LayerNorm replaced; any other layer stays as it is.

    The original is not changed; the rewritten module shares the unchanged parameters with it.

    Args:
        piece: the piece to rewrite.
        reflect: whether norms may be folded into the layers that read them (:class:`Reflection`). This makes the
            trunk of mvmoe_12x192 a twentieth faster, but its layers harder to quantize: in int8, the first zoo's dense
            model then gave 31 of 1,000 images another class instead of 21.

    Raises:
        ExportError: see :func:`~mvmoe_deploy.exporters.graph.check_same`.
    """
    module = private_copy(piece.module)
    if reflect:
        module = _replaced(module, _reflected)
    module = _replaced(module, _supported).eval()
    check_same(piece, module, "rewritten for XNNPACK")
    return module


def _replaced(module: nn.Module, by: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The module with every layer (itself included) replaced for which ``by`` returns a replacement."""
    replacement = by(module)
    if replacement is not None:
        return replacement
    for name, child in module.named_children():
        setattr(module, name, _replaced(child, by))
    return module


def _supported(layer: nn.Module) -> nn.Module | None:
    if computes_as(layer, Attention):
        return FoldedAttention(layer)
    if computes_as(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1 and layer.bias is not None:
        return LinearNorm(layer)
    return None


def _reflected(module: nn.Module) -> nn.Module | None:
    """The module with its residual stream reflected; its layers get new parameters, the old ones stay unchanged."""
    stream: Stream | None = getattr(module, "stream", None)
    if stream is None:
        return None
    part: Any = module  # its layers have the names that Stream gives
    first: nn.LayerNorm = part.blocks[0].norm1
    reflection = Reflection(first.normalized_shape[0])
    if stream.takes == "images":
        reflection.write(part.patch_embed.proj)
        for name in ("cls_token", "pos_embed"):
            reflected = getattr(part, name).double() @ reflection.matrix
            setattr(part, name, nn.Parameter(reflected.float(), requires_grad=False))
    for block in part.blocks:
        block.norm1 = reflection.read(block.norm1, block.attn.qkv)
        block.norm2 = reflection.read(block.norm2, block.mlp.fc1)
        reflection.write(block.attn.proj)
        reflection.write(block.mlp.fc2)
    if stream.gives == "logits":
        part.norm = reflection.read(part.norm, part.head)
    if stream.gives == "tokens":
        return nn.Sequential(module, reflection)
    return ReflectedTail(module, reflection) if stream.takes == "tokens" else module


def _set(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    layer.weight = nn.Parameter(weight.view(layer.weight.shape).float(), requires_grad=False)
    layer.bias = nn.Parameter(bias.float(), requires_grad=False)


def _double(bias: Tensor | None) -> Tensor:
    assert bias is not None  # every layer of these models has one
    return bias.double()


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return linear
