"""Counts the work of any module on its traced graph, by the convention of :mod:`mvmoe_deploy.models.flops`.

One multiply-add is two. Biases, residuals and other element-wise operators count one per element, softmax five per
score, norms nine per element and three per mean, smooth activations four per element as GELU does, others one.
A BatchNorm behind a convolution or linear layer counts nothing, because every export folds it into that layer. Moving
data counts nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mvmoe_deploy.quiet import quiet

aten = torch.ops.aten


@dataclass(frozen=True)
class Work:
    """What one run of a module takes.

    Attributes:
        flops: floating point operations, by the convention.
        macs: multiply-accumulates of matrix products and convolutions alone.
    """

    flops: int
    macs: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.macs + other.macs)


def count(module: nn.Module, inputs: Sequence[Tensor]) -> Work | None:
    """The work of one run, or None if the module cannot be traced or has an operator whose work is not known.

    Args:
        module: the module, on any device, ``meta`` included.
        inputs: its inputs, for one image.
    """
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(module.eval(), tuple(inputs), strict=False)
    except Exception:  # the module is anybody's
        return None
    total = Work(0, 0)
    for node in program.graph.nodes:
        if node.op == "call_function":
            work = _work_of(node)
            if work is None:
                return None
            total += work
    return total


_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding)
_NORMS = (aten.layer_norm.default, aten.group_norm.default)
_SMOOTH = {"gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "softplus", "mish", "exp", "elu", "erf"}
_SIMPLE = {
    *("add", "sub", "mul", "div", "neg", "relu", "relu6", "clamp", "hardtanh", "leaky_relu", "sqrt", "rsqrt", "pow"),
    *("abs", "maximum", "minimum", "reciprocal", "square", "rsub", "prelu"),
}
_REDUCTIONS = {"mean", "sum", "amax", "max", "adaptive_avg_pool2d", "var"}
_MOVES = {
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand", "cat"),
    *("expand_as", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "stack", "contiguous", "clone"),
    *("alias", "detach", "dropout", "to", "type_as", "_to_copy", "repeat", "pad", "constant_pad_nd", "index", "roll"),
    *("arange", "zeros", "ones", "full", "meshgrid", "index_select", "_assert_tensor_metadata", "lift_fresh_copy"),
    *(
        "eq",
        "ge",
        "le",
        "gt",
        "lt",
        "ones_like",
        "zeros_like",
        "new_ones",
        "new_zeros",
        "movedim",
        "narrow",
        "sym_size",
    ),
}


def _work_of(node: fx.Node) -> Work | None:
    """The work of an operator; None if it is not known."""
    target: Any = node.target
    if target is operator.getitem:
        return Work(0, 0)
    name = getattr(target, "__name__", str(target)).partition(".")[0].rstrip("_")
    arguments: Any = node.args
    if target is aten.linear.default or target in _CONVOLUTIONS:
        return _layer(node)
    if target in _PRODUCTS:
        return _product(_size(node), _shape(arguments[0])[-1])
    if target is aten.addmm.default:
        return _product(_size(node), _shape(arguments[1])[-1]) + Work(_size(node), 0)
    if target is aten.scaled_dot_product_attention.default:
        query, key, value = (_shape(each) for each in arguments[:3])
        scores = math.prod(query[:-1]) * key[-2]
        masked = scores if len(arguments) > 3 and arguments[3] is not None else 0
        return _product(scores, query[-1] + value[-1]) + Work(5 * scores + masked, 0)
    if target in _NORMS:
        return Work(9 * _size(node) + 3 * _means(node), 0)
    if target is aten.batch_norm.default:
        source = arguments[0]
        folded = len(source.users) == 1 and (source.target is aten.linear.default or source.target in _CONVOLUTIONS)
        return Work(0 if folded else 2 * _size(node), 0)
    if name in ("avg_pool2d", "max_pool2d"):
        kernel = [arguments[1]] * 2 if isinstance(arguments[1], int) else arguments[1]
        return Work(_size(node) * math.prod(kernel), 0)
    if name in ("upsample_bilinear2d", "upsample_nearest2d"):
        return Work(8 * _size(node) if "bilinear" in name else 0, 0)
    if name == "softmax":
        return Work(5 * _size(node), 0)
    per_element = 4 if name in _SMOOTH else 1 if name in _SIMPLE else 0
    if name in _REDUCTIONS:
        return Work(math.prod(_shape(arguments[0])), 0)
    return Work(per_element * _size(node), 0) if per_element or name in _MOVES else None


def _layer(node: fx.Node) -> Work:
    arguments: Any = node.args
    biased = len(arguments) > 2 and arguments[2] is not None
    return _product(_size(node), math.prod(_shape(arguments[1])[1:])) + Work(_size(node) if biased else 0, 0)


def _product(size: int, inner: int) -> Work:
    return Work(2 * size * inner, size * inner)


def _means(node: fx.Node) -> int:
    """How many means a norm takes."""
    arguments: Any = node.args
    if node.target is aten.layer_norm.default:
        return _size(node) // int(math.prod(arguments[1]))
    return _shape(node)[0] * int(arguments[1])


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _size(node: fx.Node) -> int:
    value = node.meta["val"]
    return math.prod(value.shape) if isinstance(value, Tensor) else 0
