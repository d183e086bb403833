"""Passes over flat graphs that make them faster on onnxruntime, with the same outputs."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from mvmoe_deploy.exporters.attention import PERMUTES, call, nodes_of, order_of, shape_of, split_projections
from mvmoe_deploy.exporters.graph import NAME, Pass, aten, is_constant, original_name


def write_attention_operators(graph: fx.Graph) -> None:
    """Writes attention whose queries, keys and values linear layers give as one operator on these layers' outputs.

    ``[B, N, D]`` goes in and comes out, which saves every Reshape, Transpose and Split around it. Two of the biases go:
    the key's adds the same to all of a query's scores, and softmax removes that again; the value's passes through
    unchanged, because attention is a weighted mean, and becomes part of the output projection's.
    """
    for node in nodes_of(graph, aten.scaled_dot_product_attention.default):
        mask, plain = _mask(node)
        layers = [_before_heads(each) for each in node.args[:3]]
        result = _after_heads(node)
        if not plain or result is None or None in layers:
            continue
        q, k, v = layers
        heads = int(shape_of(node)[1])
        with graph.inserting_before(node):
            k, value_bias = _without_bias(graph, k), None
            projection: Any = next(iter(result.users)) if len(result.users) == 1 else None
            if projection is not None and _is_linear(projection) and projection.args[0] is result:
                value_bias = v.args[2] if len(v.args) > 2 else None
                v = _without_bias(graph, v)
            options: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": heads}
            if node.kwargs.get("scale") is not None:
                options["scale"] = float(node.kwargs["scale"])
            given = (q, k, v) if mask is None else (q, k, v, mask)
            attention = graph.call_function(torch.ops.onnx.Attention.opset23, given, options)
            found = call(graph, operator.getitem, (attention, 0), result, shape_of(result))
        result.replace_all_uses_with(found)
        if value_bias is not None:
            with graph.inserting_before(projection):
                x, weight, bias = (*projection.args, None)[:3]
                moved = graph.call_function(_moved_bias, (weight, bias, value_bias))
                moved.meta[NAME] = f"{original_name(weight).rpartition('.')[0]}.bias"
                projection.args = (x, weight, moved)
        for each in (result, result.args[0], node):
            graph.erase_node(each)  # no dead code to fx, which takes attention for random


def _mask(node: Any) -> tuple[Any, bool]:
    """What attention adds to its scores, and whether it does nothing that ONNX's operator does otherwise."""
    mask, dropout, causal = (
        node.kwargs.get(name, node.args[place] if len(node.args) > place else default)
        for name, place, default in (("attn_mask", 3, None), ("dropout_p", 4, 0.0), ("is_causal", 5, False))
    )
    plain = set(node.kwargs) <= {"attn_mask", "dropout_p", "is_causal", "scale"} and not dropout and not causal
    return mask, plain and (mask is None or mask.meta["val"].dtype == torch.float32)


def _is_linear(node: Any) -> bool:
    return node.target is aten.linear.default and all(is_constant(each) for each in node.args[1:3] if each is not None)


def _before_heads(value: Any) -> Any:
    """The linear layer whose output's heads a value ``[B, h, N, d]`` takes apart; None if there is more to it."""
    split = value.args[0] if value.target in PERMUTES and order_of(value) == [0, 2, 1, 3] else None
    if split is None or split.target is not aten.reshape.default or not _is_linear(split.args[0]):
        return None
    layer = split.args[0]
    rows, width = shape_of(layer)[:-1], shape_of(layer)[-1]
    same = len(shape_of(layer)) == 3 and tuple(shape_of(split)[:2]) == tuple(rows)
    return layer if same and shape_of(split)[2] * shape_of(split)[3] == width else None


def _after_heads(node: Any) -> Any:
    """The ``[B, N, D]`` that attention's ``[B, h, N, d]`` is put together to; None if there is more to it."""
    for target in (PERMUTES, (aten.reshape.default,)):
        if len(node.users) != 1:
            return None
        (node,) = node.users
        if node.target not in target or (target is PERMUTES and order_of(node) != [0, 2, 1, 3]):
            return None
    before = shape_of(node.args[0])
    return node if tuple(shape_of(node)) == (*before[:2], before[2] * before[3]) else None


def _without_bias(graph: fx.Graph, layer: Any) -> Any:
    return call(graph, layer.target, layer.args[:2], layer, shape_of(layer))


def _moved_bias(weight: Tensor, bias: Tensor | None, value_bias: Tensor) -> Tensor:
    """The bias of a projection behind attention whose values have lost theirs."""
    moved = weight.double() @ value_bias.double()
    return (moved if bias is None else moved + bias.double()).float()


def write_gates(graph: fx.Graph) -> None:
    """Writes what a gate lets through of a residual block, ``x + gate · ((f + x) − x)``, as ``x + gate · f``."""
    for difference in nodes_of(graph, aten.sub.Tensor):
        y, x = difference.args
        if difference.kwargs or not isinstance(y, fx.Node) or y.target is not aten.add.Tensor or y.kwargs:
            continue
        others = [each for each in y.args if each is not x]
        if len(others) == 1 and isinstance(others[0], fx.Node) and shape_of(others[0]) == shape_of(difference):
            difference.replace_all_uses_with(others[0])


def linear_to_matmul(graph: fx.Graph) -> None:
    """Writes linear layers as products with weights stored as the MatMul operator reads them, ``[in, out]``.

    Otherwise the exporter would fold the transposition into a new constant and lose the weight's name, which is needed
    to put another expert's weights in.
    """
    for node in [node for node in graph.nodes if node.target is aten.linear.default and is_constant(node.args[1])]:
        x, weight, bias = (*node.args, None)[:3]
        with graph.inserting_before(node):
            transposed = graph.call_function(aten.t.default, (weight,))
            if bias is not None and node.meta["val"].ndim == 2:  # one node
                result = graph.call_function(aten.addmm.default, (bias, x, transposed))
            else:
                result = graph.call_function(aten.matmul.default, (x, transposed))
                result.meta = dict(node.meta)
                result = result if bias is None else graph.call_function(aten.add.Tensor, (result, bias))
            result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


PASSES: list[Pass] = [split_projections, write_attention_operators, write_gates, linear_to_matmul]
