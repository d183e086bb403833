"""Modules rewritten into what XNNPACK takes whole, with the same outputs.

XNNPACK's delegate has no LayerNorm, and scaled_dot_product_attention lowers to 4-D matmuls and a safe softmax whose
comparisons it leaves outside. Either cuts a transformer into dozens of delegates, with a copy at every seam and
everything between on unoptimised kernels (the naive trunk of mvmoe_12x192 takes 103 delegates and a third as long
again). Of the naive trunk's time, matrix products alone are three fifths, which no rewrite saves; norms, softmax and
GELU take 8, 4 and 3 % of the rewritten one. Folding the norms' weights into the linear layers behind them would gain
1 %; attention head by head, which needs no transposition, would lose 3 %.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy.errors import ExportError
from mvmoe_deploy.exporters.split import PieceModule
from mvmoe_deploy.models.vit import Attention

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
        q = self._fold(self.q(x if n is None else x[:, :n]))
        k, v = self._fold(self.k(x)), self._fold(self.v(x))
        x = torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)
        _, tokens, per_head = x.shape
        x = x.view(-1, self.heads, tokens, per_head).transpose(1, 2).contiguous()
        return self.proj(x.view(-1, tokens, self.heads * per_head))

    def _fold(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` → ``[B·h, N, D/h]``; a reshape with one -1 is the only one XNNPACK takes at any batch."""
        _, tokens, width = x.shape
        x = x.view(-1, tokens, self.heads, width // self.heads).transpose(1, 2).contiguous()
        return x.view(-1, tokens, width // self.heads)


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


def rewrite(piece: PieceModule) -> nn.Module:
    """The piece's module with every Attention and LayerNorm replaced; any other layer stays as it is.

    The original is left alone; parameters that are not changed are shared with it.

    Raises:
        ExportError: the rewritten module does not compute the same (see :data:`TOLERANCE`).
    """
    shared = {id(tensor): tensor for tensor in [*piece.module.parameters(), *piece.module.buffers()]}
    module = _replace(copy.deepcopy(piece.module, shared)).eval()
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


def _replace(module: nn.Module) -> nn.Module:
    if isinstance(module, Attention):
        return FoldedAttention(module)
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and module.bias is not None:
        return LinearNorm(module)
    for name, child in module.named_children():
        setattr(module, name, _replace(child))
    return module


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return linear
