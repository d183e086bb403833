"""Modules rewritten into what XNNPACK takes whole, with the same outputs.

XNNPACK's delegate has no LayerNorm, and scaled_dot_product_attention lowers to 4-D matmuls and a safe softmax whose
comparisons it leaves outside. Either cuts a transformer into dozens of delegates, with a copy at every seam and
everything between on unoptimised kernels (the naive trunk of mvmoe_12x192 takes 103 delegates and two fifths as long
again). Of the naive trunk's time, matrix products alone are three fifths, which no rewrite saves; the rest is passes
over a tensor, each as long as a copy of it, so the rewrite is about having fewer of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy.errors import ExportError
from mvmoe_deploy.exporters.split import PieceModule
from mvmoe_deploy.models.architectures.vit import Attention, Stream

TOLERANCE = 1e-5
"""Largest difference between a rewritten piece and the original, as a share of the output's largest magnitude (or of
1 where that is smaller): some hundred roundings of float32; a wrong rewrite is off by 1e-2 and more."""


class FoldedAttention(nn.Module):
    """:class:`Attention` with three projections, the scale folded into q's, and heads folded into the batch."""

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
        """``[B, N, D]`` → ``[B·h, N, D/h]``, or its transpose, which keys are multiplied as, in the same single pass.

        A reshape with one -1 is the only one XNNPACK takes at any batch.
        """
        _, tokens, width = x.shape
        x = x.view(-1, tokens, self.heads, width // self.heads).permute(order).contiguous()
        return x.view(-1, *x.shape[2:])


class LinearNorm(nn.Module):
    """LayerNorm over the last dimension, its means written as a linear layer of weights 1/D.

    Epsilon is that layer's bias: an operator fewer, of which each takes as long as its tensor takes to be copied.
    """

    mean: Tensor
    eps: Tensor

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        width = norm.normalized_shape[0]
        # A buffer and F.linear, not nn.Linear: int8 covers nn.Linear, and a mean must not be rounded to it.
        self.register_buffer("mean", torch.full((1, width), 1 / width))
        self.register_buffer("eps", torch.full((1,), norm.eps))
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        x = x - F.linear(x, self.mean)
        return x * torch.rsqrt(F.linear(x * x, self.mean, self.eps)) * self.weight + self.bias


class Reflection(nn.Module):
    """Tokens in an orthonormal basis whose first axis is the direction of their mean, and back: ``[B, N, D]``.

    It is Householder's reflection that exchanges that direction and the first axis. A transformer's residual stream
    can be kept in this basis at no cost, since the layers that write and read it take the reflection into their
    weights; LayerNorm's centring then means to leave the first coordinate out (:class:`ReflectedNorm`).
    """

    row: Tensor
    column: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        axis = torch.full((width,), width**-0.5, dtype=torch.float64)
        axis[0] -= 1
        scaled = -2 * axis / (axis @ axis).clamp(min=1e-9)  # of width 1 the mean is the first axis already
        self.matrix = torch.eye(width, dtype=torch.float64) + torch.outer(axis, scaled)  # its own inverse
        self.register_buffer("row", scaled.float()[None])
        self.register_buffer("column", axis.float())

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(x, self.row) * self.column

    def write(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Makes a layer that adds to the residual stream add to the reflected one."""
        _set(layer, self.matrix @ layer.weight.double().flatten(1), self.matrix @ _double(layer.bias))

    def read(self, norm: nn.LayerNorm, layer: nn.Linear) -> ReflectedNorm:
        """Makes a layer that reads a norm of the stream read that of the reflected one, which is returned.

        It takes in the norm's weight and bias as well.
        """
        weight = layer.weight.double()
        reflected = (weight * norm.weight.double()) @ self.matrix
        reflected[:, 0] = 0  # the mean
        _set(layer, reflected, _double(layer.bias) + weight @ norm.bias.double())
        return ReflectedNorm(norm)


class ReflectedNorm(nn.Module):
    """LayerNorm of reflected tokens, but for its weight and bias and for the first coordinate, which nobody reads."""

    mean: Tensor
    eps: Tensor

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        (width,) = norm.normalized_shape
        # buffers and F.linear, as in LinearNorm
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

    The original is left alone; parameters that are not changed are shared with it.

    Args:
        piece: what is to be rewritten.
        reflect: whether norms may go into the layers that read them (:class:`Reflection`). It makes a trunk of
            mvmoe_12x192 a twentieth faster, and its layers harder to quantize: in int8 the first zoo's dense model
            then gave 31 of 1,000 images another class instead of 21.

    Raises:
        ExportError: the rewritten module does not compute the same (see :data:`TOLERANCE`).
    """
    shared = {id(tensor): tensor for tensor in [*piece.module.parameters(), *piece.module.buffers()]}
    module = copy.deepcopy(piece.module, shared)
    if reflect:
        module = _replaced(module, _reflected)
    module = _replaced(module, _supported).eval()
    rewritten = PieceModule(piece.role, module, piece.inputs, piece.outputs, piece.expert, piece.layer)
    _compare(piece, rewritten)
    return module


def _compare(piece: PieceModule, rewritten: PieceModule) -> None:
    inputs = piece.inputs.values()
    for name, expected, found in zip(piece.outputs, piece(*inputs), rewritten(*inputs), strict=True):
        error = (found - expected).abs().max().item()
        allowed = TOLERANCE * max(1.0, expected.abs().max().item())
        if not error <= allowed:  # also where it is not a number
            raise ExportError(
                f"{piece.name}: rewritten for XNNPACK, its output {name} differs by {error:.2e} (allowed "
                f"{allowed:.0e}); please report this model, its layers are not what the rewrite takes them for"
            )


def _replaced(module: nn.Module, by: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The module with every layer, itself included, that ``by`` has a replacement for replaced."""
    replacement = by(module)
    if replacement is not None:
        return replacement
    for name, child in module.named_children():
        setattr(module, name, _replaced(child, by))
    return module


def _supported(layer: nn.Module) -> nn.Module | None:
    if isinstance(layer, Attention):
        return FoldedAttention(layer)
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1 and layer.bias is not None:
        return LinearNorm(layer)
    return None


def _reflected(module: nn.Module) -> nn.Module | None:
    """The same with the residual stream reflected; layers change in place, their old parameters do not."""
    stream: Stream | None = getattr(module, "stream", None)
    if stream is None:
        return None
    part: Any = module  # whose layers have the names that Stream says
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
