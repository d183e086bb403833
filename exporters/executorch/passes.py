"""Passes over flat graphs after which XNNPACK can run them in few delegates, with the same outputs.

What XNNPACK's partitioner takes is narrow: products of three-dimensional tensors, softmax over the last axis, means
over height and width, reshapes with a single -1, slices of fixed shapes. LayerNorm, means of tokens, rotations of
queries by rotary positions, and resizing at any batch are written as small linear layers, which it takes all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mvmoe_deploy.exporters.attention import (
    arguments,
    call,
    fold_numbers,
    merge_permutes,
    nodes_of,
    permuted,
    reshaped,
    shape_of,
    split_projections,
    write_attention,
)
from mvmoe_deploy.exporters.graph import MADE, NAME, Pass, aten, is_constant


def write_rotations(graph: fx.Graph) -> None:
    """Writes what only moves and negates the last axis' elements, as rotary positions do, as a small linear layer."""
    for node in list(graph.nodes):
        if node.target not in (aten.cat.default, aten.reshape.default):
            continue
        found = _rotation(node)
        if found is None:
            continue
        source, matrix = found
        with graph.inserting_before(node):
            weight = _made(graph, _matrix, (tuple(map(tuple, matrix.int().tolist())),), f"{node.name}.rotation")
            result = call(graph, aten.linear.default, (source, weight), node, shape_of(node))
        node.replace_all_uses_with(result)


_MOVES = (
    *(aten.cat.default, aten.stack.default, aten.neg.default, aten.slice.Tensor, aten.chunk.default),
    *(aten.reshape.default, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem),
)


def _rotation(node: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """The node whose last axis a node permutes and negates, and the matrix that does the same; None if it does more."""
    inner: set[fx.Node] = {node}
    sources: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for other in waiting.pop().all_input_nodes:
            value = other.meta.get("val")
            whole = isinstance(value, Tensor) and value.shape == shape_of(node)
            if whole or other.target not in _MOVES:
                sources.add(other)
            elif other not in inner:
                inner.add(other)
                waiting.append(other)
    if len(sources) != 1 or not any(each.target is aten.neg.default for each in inner):
        return None
    (source,) = sources
    if shape_of(source) != shape_of(node):
        return None
    shape = torch.Size([extent if isinstance(extent, int) else 1 for extent in shape_of(source)])
    numbers = torch.arange(1, shape.numel() + 1).reshape(shape)
    width = shape[-1]
    moved, still = (value.reshape(-1, width) for value in (_run(inner, source, numbers, node), numbers))
    signs, places = moved.sign(), (moved.abs() - 1) % width
    same_rows = torch.equal((moved.abs() - 1) // width, (still - 1) // width)
    if not same_rows or not (places == places[0]).all() or not (signs == signs[0]).all():
        return None
    matrix = torch.zeros(width, width)
    matrix[torch.arange(width), places[0]] = signs[0].float()
    return source, matrix


def _run(inner: set[fx.Node], source: fx.Node, value: Tensor, result: fx.Node) -> Tensor:
    values: dict[fx.Node, Any] = {source: value}
    for node in result.graph.nodes:
        if node in inner:
            arguments = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*arguments[0], **arguments[1])
    moved: Tensor = values[result]
    return moved


def write_rotary_positions(graph: fx.Graph) -> None:
    """Writes rotary positions of all tokens but the first few as if these had an angle of 0, so that none is cut off.

    ``cat(q[:n], q[n:] · cos + rotated(q[n:]) · sin)`` becomes ``q · cos + rotated(q) · sin``.
    """
    for cat in nodes_of(graph, aten.cat.default):
        if len(cat.args[0]) != 2:
            continue
        head, total = cat.args[0]
        rank = len(shape_of(cat))
        axis = (cat.args[1] if len(cat.args) > 1 else 0) % rank
        if axis != rank - 2 or head.target is not aten.slice.Tensor or total.target is not aten.add.Tensor:
            continue
        terms = [found for term in total.args[:2] if (found := _rotary_term(term)) is not None]
        if len(terms) != 2:
            continue
        # the term without a layer first
        (first, turn, cos), (second, other, sin) = sorted(terms, key=lambda term: term[1] is not None)
        count = shape_of(head)[axis]
        if turn is not None or other is None or first is not second or first.target is not aten.slice.Tensor:
            continue
        whole = head.args[0]
        if first.args[0] is not whole or shape_of(whole) != shape_of(cat) or not isinstance(count, int):
            continue
        if tuple(head.args[1:4]) != (axis, 0, count) or tuple(first.args[1:3]) != (axis, count):
            continue
        with graph.inserting_before(cat):
            cosines, sines = (
                graph.call_function(_padded, (table, count, value)) for table, value in ((cos, 1.0), (sin, 0.0))
            )
            for made, name in ((cosines, "cos"), (sines, "sin")):
                made.meta[NAME] = f"{cat.name}.{name}"
            turned = call(graph, aten.linear.default, (whole, other), whole, shape_of(whole))
            straight = call(graph, aten.mul.Tensor, (whole, cosines), whole, shape_of(whole))
            crossed = call(graph, aten.mul.Tensor, (turned, sines), whole, shape_of(whole))
            result = call(graph, aten.add.Tensor, (straight, crossed), whole, shape_of(whole))
        cat.replace_all_uses_with(result)


def _rotary_term(term: Any) -> tuple[Any, Any, Any] | None:
    """Of ``x · table`` or ``linear(x) · table``: x, the linear layer's weight or None, and the table."""
    if not isinstance(term, fx.Node) or term.target is not aten.mul.Tensor or not is_constant(term.args[1]):
        return None
    factor: Any = term.args[0]
    table = term.args[1]
    if factor.target is aten.linear.default and len(factor.args) == 2 and factor.args[1].meta.get(MADE):
        return factor.args[0], factor.args[1], table
    return factor, None, table


def _padded(table: Tensor, count: int, value: float) -> Tensor:
    head = torch.full((*table.shape[:-2], count, table.shape[-1]), value)
    return torch.cat([head, table], -2)


def _matrix(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def _row(width: int, value: float) -> Tensor:
    return torch.full((1, width), value)


def _single(value: float) -> Tensor:
    return torch.full((1,), value)


def _interpolation(before: int, after: int, align: bool) -> Tensor:
    """A matrix ``[after, before]`` that resizes one axis as torch does."""
    eye = torch.eye(before)[None]
    resized = F.interpolate(eye.double(), after, mode="linear", align_corners=align)
    return resized[0].T.float().contiguous()


def _made(graph: fx.Graph, target: Callable[..., Tensor], args: tuple[Any, ...], name: str) -> fx.Node:
    """A weight that is computed from nothing. Its name does not end in ``weight``: int8 leaves it alone."""
    node = graph.call_function(target, args)
    node.meta |= {MADE: True, NAME: name}
    return node


def write_norms(graph: fx.Graph) -> None:
    """Writes LayerNorm over the last axis with its means as linear layers of weights 1/D; epsilon is one's bias."""
    for node in nodes_of(graph, aten.layer_norm.default):
        x, (width, *more), weight, bias, epsilon = arguments(node, None, None, None, None, 1e-5)[:5]
        if more:
            continue
        shape, narrow = shape_of(x), (*shape_of(x)[:-1], 1)
        with graph.inserting_before(node):
            mean = _made(graph, _row, (width, 1 / width), f"{node.name}.mean")
            offset = _made(graph, _single, (epsilon,), f"{node.name}.eps")
            average = call(graph, aten.linear.default, (x, mean), x, narrow)
            centred = call(graph, aten.sub.Tensor, (x, average), x, shape)
            square = call(graph, aten.mul.Tensor, (centred, centred), x, shape)
            variance = call(graph, aten.linear.default, (square, mean, offset), x, narrow)
            inverse = call(graph, aten.rsqrt.default, (variance,), x, narrow)
            result = call(graph, aten.mul.Tensor, (centred, inverse), x, shape)
            if weight is not None:
                result = call(graph, aten.mul.Tensor, (result, weight), x, shape)
            if bias is not None:
                result = call(graph, aten.add.Tensor, (result, bias), x, shape)
        node.replace_all_uses_with(result)


def write_group_norms(graph: fx.Graph) -> None:
    """Writes GroupNorm of a single group as means over height and width, then over channels."""
    for node in nodes_of(graph, aten.group_norm.default):
        x, groups, weight, bias, epsilon = arguments(node, None, None, None, None, 1e-5)[:5]
        if groups != 1 or len(shape_of(x)) != 4:
            continue
        channels = shape_of(x)[1]
        with graph.inserting_before(node):
            mean = _made(graph, _row, (channels, 1 / channels), f"{node.name}.mean")
            offset = _made(graph, _single, (epsilon,), f"{node.name}.eps")
            centred = call(graph, aten.sub.Tensor, (x, _average(graph, x, mean, None)), x, shape_of(x))
            square = call(graph, aten.mul.Tensor, (centred, centred), x, shape_of(x))
            variance = _average(graph, square, mean, offset)
            inverse = call(graph, aten.rsqrt.default, (variance,), x, shape_of(variance))
            result = call(graph, aten.mul.Tensor, (centred, inverse), x, shape_of(x))
            for target, value in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
                if value is not None:
                    column = graph.call_function(_column, (value,))
                    result = call(graph, target, (result, column), x, shape_of(x))
        node.replace_all_uses_with(result)


def _average(graph: fx.Graph, value: fx.Node, mean: fx.Node, offset: fx.Node | None) -> fx.Node:
    """The mean of every image's features, plus an offset: ``[B, C, H, W]`` → ``[B, 1, 1, 1]``."""
    batch, channels = shape_of(value)[:2]
    rows = reshaped(graph, _pool(graph, value), (batch, channels))
    return reshaped(graph, call(graph, aten.linear.default, (rows, mean, offset), value, (batch, 1)), (batch, 1, 1, 1))


def _pool(graph: fx.Graph, value: fx.Node) -> fx.Node:
    return call(graph, aten.mean.dim, (value, [2, 3], True), value, (*shape_of(value)[:2], 1, 1))


def _column(weight: Tensor) -> Tensor:
    return weight[:, None, None]


def write_products(graph: fx.Graph) -> None:
    """Writes products of four-dimensional tensors as batched ones of three dimensions, the only ones XNNPACK has."""
    for node in nodes_of(graph, aten.matmul.default):
        a, b = node.args
        if is_constant(b) and len(b.meta["val"].shape) == 2:
            continue
        left, right, shape = shape_of(a), shape_of(b), shape_of(node)
        if len(left) != 4 or left[:2] != right[:2] or not isinstance(left[1], int):
            continue
        rows = left[0] * left[1]
        with graph.inserting_before(node):
            a, b = (reshaped(graph, each, (rows, *shape_of(each)[2:])) for each in (a, b))
            product = call(graph, aten.bmm.default, (a, b), a, (rows, *shape[2:]))
            result = reshaped(graph, product, shape)
        node.replace_all_uses_with(result)


def write_softmax(graph: fx.Graph) -> None:
    """Writes softmax over the last of four axes as softmax of three-dimensional tensors.

    Behind a convolution, XNNPACK (ExecuTorch 1.4.1) keeps the channels last in memory, and its softmax then runs over
    the channels: ``Conv2d(8, 8, 1)`` followed by ``softmax(-1)`` is wrong by 3.3 of the result's size.
    """
    for node in nodes_of(graph, aten.softmax.int):
        shape = shape_of(node)
        if len(shape) != 4 or node.args[1] % 4 != 3 or not isinstance(shape[1], int):
            continue
        rows = shape[0] * shape[1]
        with graph.inserting_before(node):
            flat = reshaped(graph, node.args[0], (rows, *shape[2:]))
            result = call(graph, aten.softmax.int, (flat, -1), flat, shape_of(flat))
            result = reshaped(graph, result, shape)
        node.replace_all_uses_with(result)


def write_means(graph: fx.Graph) -> None:
    """Writes means over height and width as pools, and means over tokens and sums over the last axis as layers."""
    for node in nodes_of(graph, aten.mean.dim, aten.sum.dim_IntList):
        x, axes = node.args[:2]
        rank, shape = len(shape_of(x)), shape_of(x)
        axes = sorted(axis % rank for axis in axes)
        if node.kwargs or not isinstance(shape[axes[0]], int):
            continue
        with graph.inserting_before(node):
            if node.target is aten.mean.dim and rank == 4 and axes == [2, 3]:
                result = _pool(graph, x)
            elif len(axes) == 1 and axes[0] and (node.target is aten.sum.dim_IntList or rank == 3):
                order = [axis for axis in range(rank) if axis != axes[0]] + axes
                last = x if order == list(range(rank)) else permuted(graph, x, order)
                share = 1.0 if node.target is aten.sum.dim_IntList else 1 / shape[axes[0]]
                row = _made(graph, _row, (shape[axes[0]], share), f"{node.name}.mean")
                result = call(graph, aten.linear.default, (last, row), x, (*shape_of(last)[:-1], 1))
            else:
                continue
            if shape_of(result) != shape_of(node):
                result = reshaped(graph, result, shape_of(node))
        node.replace_all_uses_with(result)


def write_resizing(graph: fx.Graph) -> None:
    """Writes bilinear resizing as two linear layers: XNNPACK resizes only at a fixed batch."""
    for node in nodes_of(graph, aten.upsample_bilinear2d.vec):
        x, sizes, align = node.args[:3]
        if sizes is None:
            continue
        (batch, channels, height, width), (rows, columns) = shape_of(x), sizes
        with graph.inserting_before(node):
            names = (f"{node.name}.columns", f"{node.name}.rows")
            across = _made(graph, _interpolation, (width, columns, bool(align)), names[0])
            down = _made(graph, _interpolation, (height, rows, bool(align)), names[1])
            result = call(graph, aten.linear.default, (x, across), x, (batch, channels, height, columns))
            result = permuted(graph, result, [0, 1, 3, 2])
            result = call(graph, aten.linear.default, (result, down), x, (batch, channels, columns, rows))
            result = permuted(graph, result, [0, 1, 3, 2])
        node.replace_all_uses_with(result)


def write_hard_sigmoids(graph: fx.Graph) -> None:
    """Writes hardsigmoid as a product, a sum and a bound; torch's own form changes types back and forth."""
    hard = (aten.hardsigmoid.default, aten.hardsigmoid_.default)
    for node in nodes_of(graph, *hard):
        x, shape = node.args[0], shape_of(node)
        with graph.inserting_before(node):
            sixth = call(graph, aten.mul.Tensor, (x, 1 / 6), x, shape)
            result = call(graph, aten.add.Tensor, (sixth, 0.5), x, shape)
            result = call(graph, aten.clamp.default, (result, 0.0, 1.0), x, shape)
        node.replace_all_uses_with(result)


_BROADCASTING = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)


def drop_expansions(graph: fx.Graph) -> None:
    """Drops expansions that only operators read which expand their inputs themselves; marks pools without padding."""
    for node in list(graph.nodes):
        if node.target in (aten.expand.default, aten.expand_as.default):
            others = [each for user in node.users for each in user.all_input_nodes if each is not node]
            fits = all(user.target in _BROADCASTING for user in node.users) and others
            if fits and all("val" in each.meta and shape_of(each) == shape_of(node) for each in others):
                node.replace_all_uses_with(node.args[0])
        elif node.target is aten.avg_pool2d.default:
            x, kernel, strides, padding, ceil, _, divisor = arguments(node, None, None, [], [0, 0], False, True, None)
            if not any(padding) and divisor is None:
                node.args = (x, kernel, strides, padding, ceil, False)


def merge_reshapes(graph: fx.Graph) -> None:
    """Makes one reshape of several in a row, and drops those that change nothing."""
    for node in list(graph.nodes):
        if node.target is not aten.reshape.default:
            continue
        source, shape = node.args
        while source.target is aten.reshape.default:
            source = source.args[0]
        node.args = (source, shape)
        if shape_of(source) == shape_of(node):
            node.replace_all_uses_with(source)


def write_relus(graph: fx.Graph) -> None:
    """Writes ReLU as a bound. ExecuTorch's quantizer takes a convolution before a ReLU for one of static ranges."""
    for node in nodes_of(graph, aten.relu.default, aten.relu_.default):
        node.target, node.args = aten.clamp.default, (node.args[0], 0.0)


OUTLIER = 2.0
"""How many times the largest other weight of its channel a diagonal has to be before it is split off."""


def split_diagonals(modules: Sequence[fx.GraphModule], wanted: Callable[[fx.Node], bool]) -> None:
    """Takes the weight with which each channel reads itself out of convolutions, if it is much larger than the others.

    Such weights come from a skip connection that was merged into the convolution, as in RepVGG and MobileOne. With one
    scale per channel, int8 would round all other weights by a share of them: features of repvgg_a0 were then off by 2.6
    of their scale, and 0.7 with the diagonals apart.

    Args:
        modules: graphs with the same nodes; they are changed alike and in place.
        wanted: whether a convolution is to be considered.
    """
    for nodes in zip(*(list(module.graph.nodes) for module in modules), strict=True):
        if nodes[0].target is not aten.conv2d.default or not wanted(nodes[0]):
            continue
        weights = [operator.attrgetter(str(node.args[1].target))(node.graph.owning_module) for node in nodes]
        if not _same_places(nodes[0], weights[0]) or not any(map(_outlying, weights)):
            continue
        for node, weight in zip(nodes, weights, strict=True):
            diagonal = _diagonal(weight)
            _set_weight(node.graph.owning_module, name := str(node.args[1].target), weight - diagonal)
            _set_weight(node.graph.owning_module, f"{name}_diagonal", diagonal.sum((1, 2, 3))[None, :, None, None])
            with node.graph.inserting_after(node):
                total = node.graph.call_function(aten.add.Tensor)
            node.replace_all_uses_with(total)
            with node.graph.inserting_before(total):
                row = node.graph.get_attr(f"{name}_diagonal")
                total.args = (node, node.graph.call_function(aten.mul.Tensor, (node.args[0], row)))
    for module in modules:
        module.recompile()


def _same_places(node: fx.Node, weight: Tensor) -> bool:
    """Whether a convolution's middle weight reads the place that the convolution writes, and as many channels."""
    _, _, _, stride, padding, dilation, groups = arguments(node, None, None, None, [1, 1], [0, 0], [1, 1], 1)
    reaches = [side * (size - 1) for side, size in zip(_pair(dilation), weight.shape[2:], strict=True)]
    middle = all(size % 2 for size in weight.shape[2:]) and [2 * side for side in _pair(padding)] == reaches
    return middle and _pair(stride) == [1, 1] and groups == 1 and weight.shape[0] == weight.shape[1]


def _pair(value: Sequence[int]) -> list[int]:
    return list(value) * (2 // len(value))


def _diagonal(weight: Tensor) -> Tensor:
    """A convolution's weight that keeps only the weights with which each channel reads itself, at the middle."""
    channels, (rows, columns) = torch.arange(len(weight)), (size // 2 for size in weight.shape[2:])
    kept = torch.zeros_like(weight)
    kept[channels, channels, rows, columns] = weight[channels, channels, rows, columns].detach()
    return kept


def _outlying(weight: Tensor) -> bool:
    diagonal = _diagonal(weight)
    largest, others = (value.abs().amax((1, 2, 3)) for value in (diagonal, weight - diagonal))
    return bool((largest > OUTLIER * others).float().mean() > 0.5)


def _set_weight(module: Any, name: str, value: Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, torch.nn.Parameter(value.detach(), requires_grad=False))


PASSES: list[Pass] = [
    split_projections,
    write_rotations,
    write_rotary_positions,
    write_attention,
    fold_numbers,
    write_norms,
    write_group_norms,
    drop_expansions,
    write_means,
    write_resizing,
    write_hard_sigmoids,
    merge_permutes,
    write_products,
    write_softmax,
    merge_reshapes,
]
"""In this order."""
