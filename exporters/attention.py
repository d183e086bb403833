"""Passes over flat graphs that simplify attention, whatever module of whatever library it was traced from.

Each pass recognises what operators compute. What it does not recognise stays as it is, and
:func:`mvmoe_deploy.exporters.graph.flatten` compares the result with the module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mvmoe_deploy.exporters.graph import NAME, aten, is_constant, original_name

PERMUTES = (aten.permute.default, aten.transpose.int)


def nodes_of(graph: fx.Graph, *targets: Any) -> list[Any]:
    """The nodes of these operators, in order; their arguments may be anything."""
    return [node for node in graph.nodes if node.target in targets]


def shape_of(node: Any) -> torch.Size:
    """The shape of a node's value; the batch is symbolic."""
    shape: torch.Size = node.meta["val"].shape
    return shape


def arguments(node: fx.Node, *defaults: Any) -> tuple[Any, ...]:
    """A node's arguments by place, completed with the defaults of the last ones."""
    return (*node.args, *defaults[len(node.args) :])


def call(graph: fx.Graph, target: Any, args: Sequence[Any], like: fx.Node, shape: Sequence[Any]) -> fx.Node:
    """A new node whose value has this shape, and the type of another node's."""
    node = graph.call_function(target, tuple(args))
    node.meta["val"] = like.meta["val"].new_empty(tuple(shape))
    return node


def reshaped(graph: fx.Graph, node: fx.Node, shape: Sequence[Any]) -> fx.Node:
    """The node in another shape, of which only the first extent may be symbolic."""
    wanted = [extent if isinstance(extent, int) else -1 for extent in shape]
    return call(graph, aten.reshape.default, (node, wanted), node, shape)


def permuted(graph: fx.Graph, node: fx.Node, order: Sequence[int]) -> fx.Node:
    """The node with its axes in another order."""
    shape = shape_of(node)
    return call(graph, aten.permute.default, (node, list(order)), node, [shape[axis] for axis in order])


def order_of(node: Any) -> list[int]:
    """The axes of the input that a permutation or transposition puts first, second …"""
    rank = len(shape_of(node))
    if node.target is aten.permute.default:
        return [axis % rank for axis in node.args[1]]
    order = list(range(rank))
    first, second = (axis % rank for axis in node.args[1:])
    order[first], order[second] = second, first
    return order


def merge_permutes(graph: fx.Graph) -> None:
    """Makes one permutation of several in a row, and drops those that change nothing."""
    for node in list(graph.nodes):
        if node.target not in PERMUTES:
            continue
        order, source = order_of(node), node.args[0]
        if source.target in PERMUTES:
            order, source = [order_of(source)[axis] for axis in order], source.args[0]
        if order == list(range(len(order))):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        else:
            node.target, node.args, node.kwargs = aten.permute.default, (source, order), {}


def split_projections(graph: fx.Graph) -> None:
    """Makes one linear layer of a queries-keys-values layer into several, so that nothing takes its output apart."""
    for parts in list(graph.nodes):
        pieces = _pieces(parts)
        if not pieces or parts.args[0].op != "call_function":
            continue
        permutation = parts.args[0] if parts.args[0].target in PERMUTES else None
        before = permutation.args[0] if permutation else parts.args[0]
        reshape = before if before.target is aten.reshape.default else None
        linear = reshape.args[0] if reshape else before
        chain = [node for node in (permutation, reshape, linear) if node is not None]
        convolves = linear.target is aten.conv2d.default and linear is parts.args[0] and groups_of(linear) == 1
        if not (linear.target is aten.linear.default or convolves) or not is_constant(linear.args[1]):
            continue
        if any(len(node.users) != 1 for node in chain):
            continue
        shape = shape_of(before)
        order = order_of(permutation) if permutation else list(range(len(shape)))
        axis = order[_axis(parts) % len(shape)]
        x, weight, bias, *rest = arguments(linear, None, None, None)
        dropped = parts.target is aten.unbind.int
        # axes before the channels, and the shape that the channels take
        kept = 1 if convolves else len(shape_of(linear)) - 1
        channels = tuple(shape[1:2] if convolves else shape[kept:])
        if axis < kept or axis >= kept + len(channels) or (convolves and dropped):
            continue
        if not convolves and shape[:kept] != shape_of(linear)[:-1]:
            continue
        with graph.inserting_before(parts):
            for part, start, size in pieces:
                narrowed = [
                    each and graph.call_function(_rows, (each, channels, axis - kept, start, size))
                    for each in (weight, bias)
                ]
                for original, made in zip((weight, bias), narrowed, strict=True):
                    if made is not None:
                        name, _, last = original_name(original).rpartition(".")
                        made.meta[NAME] = f"{name}.part{start}.{last}"
                width = size * (math.prod(channels) // shape[axis])
                given = (*shape[:1], width, *shape[2:]) if convolves else (*shape[:kept], width)
                result = call(graph, linear.target, (x, *narrowed, *rest), linear, given)
                sizes = [size if index == axis else extent for index, extent in enumerate(shape)]
                axes = list(order)
                if dropped:
                    del sizes[axis]
                    axes = [index - (index > axis) for index in order if index != axis]
                if reshape:
                    result = reshaped(graph, result, sizes)
                if permutation:
                    result = permuted(graph, result, axes)
                part.replace_all_uses_with(result)


def groups_of(convolution: Any) -> int:
    """In how many groups a convolution's channels are."""
    return int(arguments(convolution, None, None, None, 1, 0, 1, 1)[6])


def _axis(parts: Any) -> int:
    """The axis along which a node splits its input."""
    *_, axis = arguments(parts, None, 0) if parts.target is aten.unbind.int else arguments(parts, None, None, 0)
    return int(axis)


def _pieces(parts: Any) -> list[tuple[Any, int, int]]:
    """Each used piece of what a node splits, with the first index that it takes and their number."""
    if parts.target not in (aten.unbind.int, aten.chunk.default, aten.split_with_sizes.default, aten.split.Tensor):
        return []
    extents = [1 if parts.target is aten.unbind.int else value.shape[_axis(parts)] for value in parts.meta["val"]]
    if not all(isinstance(extent, int) for extent in extents):
        return []
    return [(user, sum(extents[: user.args[1]]), extents[user.args[1]]) for user in list(parts.users)]


def _rows(weight: Tensor, shape: tuple[int, ...], axis: int, start: int, size: int) -> Tensor:
    """The rows of a weight or bias that compute a part of the output, whose channels have this shape."""
    rest = weight.shape[1:]
    return weight.reshape(*shape, *rest).narrow(axis, start, size).reshape(-1, *rest)


def write_attention(graph: fx.Graph) -> None:
    """Writes scaled_dot_product_attention as products and a softmax, with the scale at the queries."""
    for node in nodes_of(graph, aten.scaled_dot_product_attention.default):
        q, k, v = node.args[:3]
        mask, dropout, causal = (
            node.kwargs.get(name, node.args[place] if len(node.args) > place else default)
            for name, place, default in (("attn_mask", 3, None), ("dropout_p", 4, 0.0), ("is_causal", 5, False))
        )
        plain = set(node.kwargs) <= {"attn_mask", "dropout_p", "is_causal", "scale"}
        if dropout or causal or not plain or (mask is not None and mask.meta["val"].dtype == torch.bool):
            continue
        width = shape_of(q)[-1]
        scale = node.kwargs.get("scale") or width**-0.5
        sizes = (*shape_of(q)[:-1], shape_of(k)[-2])
        last = list(range(len(sizes)))
        last[-2:] = last[:-3:-1]
        with graph.inserting_before(node):
            scaled = call(graph, aten.mul.Tensor, (q, scale), q, shape_of(q))
            scores = call(graph, aten.matmul.default, (scaled, permuted(graph, k, last)), q, sizes)
            if mask is not None:
                scores = call(graph, aten.add.Tensor, (scores, mask), q, sizes)
            weights = call(graph, aten.softmax.int, (scores, -1), q, sizes)
            result = call(graph, aten.matmul.default, (weights, v), q, shape_of(node))
        node.replace_all_uses_with(result)
        graph.erase_node(node)  # no dead code to fx, which takes it for random


def fold_numbers(graph: fx.Graph) -> None:
    """Folds a product with a number, such as attention's scale, into the layer that computes the other factor."""
    moving = (aten.reshape.default, *PERMUTES)
    for product in nodes_of(graph, aten.mul.Tensor, aten.div.Tensor):
        source, number = product.args[:2]
        if not isinstance(source, fx.Node) or not isinstance(number, (int, float)) or product.kwargs:
            continue
        layer: Any = source
        while layer.target in moving and len(layer.users) == 1:
            layer = layer.args[0]
        if layer.target not in (aten.linear.default, aten.conv2d.default) or len(layer.users) != 1:
            continue
        factor = number if product.target is aten.mul.Tensor else 1 / number
        arguments = list(layer.args)
        if not all(is_constant(each) for each in arguments[1:3] if each is not None):
            continue
        with graph.inserting_before(layer):
            for place in (1, 2):
                original: Any = arguments[place] if len(arguments) > place else None
                if original is not None:
                    arguments[place] = graph.call_function(_times, (original, factor))
                    arguments[place].meta[NAME] = original_name(original)
        layer.args = tuple(arguments)
        product.replace_all_uses_with(source)
        graph.erase_node(product)


def _times(weight: Tensor, factor: float) -> Tensor:
    return (weight.double() * factor).float()
