"""Counts multiply-accumulates in an exported ONNX graph: a check of the closed form that knows nothing about models.

It counts matrix products in all operators that contain them: MatMul, Gemm, Conv and Attention. The closed form
(:mod:`mvmoe_deploy.models.flops`) describes the model as defined. The exported graphs compute only the class token in
the last block, so the count is smaller by what that saves.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import onnx

from mvmoe_deploy.bundle import Bundle, Piece
from mvmoe_deploy.errors import ConfigError


def count_bundle(bundle: Bundle) -> int | None:
    """MACs of one image in all pieces of a bundle that it runs through; None if the pieces are not ONNX graphs."""
    manifest = bundle.manifest
    k = manifest.routing.k if manifest.routing else 0
    pieces: list[Piece] = [piece for piece in manifest.pieces if piece.expert is None or piece.expert < k]
    if not all(piece.graph.endswith(".onnx") for piece in pieces):
        return None
    return sum(count_graph(bundle.path / piece.graph) for piece in pieces)


def count_graph(path: Path) -> int:
    """MACs of a graph for a batch of one.

    Raises:
        ConfigError: the shapes of a product cannot be inferred.
    """
    model = onnx.load(str(path), load_external_data=False)
    for value in model.graph.input:
        shape = value.type.tensor_type.shape.dim
        if shape and not shape[0].dim_value:
            shape[0].dim_value = 1
    del model.graph.value_info[:]  # they have a symbolic batch
    _as_plain_products(model.graph)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv", "Attention"):
            continue
        ins = [shapes.get(name, []) for name in node.input]
        out = shapes.get(node.output[0], [])
        if not out or not all(out) or any(not shape or not all(shape) for shape in ins[:2]):
            raise ConfigError(f"{path}: the shapes of {node.op_type} {node.name!r} are not known; it cannot be counted")
        total += _products(node, ins, out)
    return total


def _as_plain_products(graph: onnx.GraphProto) -> None:
    """Writes onnxruntime's products of quantised matrices as MatMul, whose shapes can be inferred."""
    for node in graph.node:
        if node.op_type not in ("MatMulIntegerToFloat", "MatMulNBits"):
            continue
        weight = node.input[1]
        if node.op_type == "MatMulNBits":  # its weights lie in blocks, so their extents are attributes
            extents = {a.name: a.i for a in node.attribute}
            weight = f"{node.name or node.output[0]}.matrix"
            graph.initializer.add(name=weight, dims=[extents["K"], extents["N"]], data_type=onnx.TensorProto.FLOAT)
        data = node.input[0]
        node.ClearField("attribute")
        node.op_type, node.domain, node.input[:] = "MatMul", "", [data, weight]


def _products(node: onnx.NodeProto, ins: list[list[int]], out: list[int]) -> int:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "MatMul":
        return prod(out) * ins[0][-1]
    if node.op_type == "Gemm":
        return prod(out) * ins[0][0 if attributes.get("transA") else 1]
    if node.op_type == "Conv":
        return prod(out) * prod(ins[1][1:])  # [out, in / groups, kernel …]
    query, key, value = ins[:3]
    if len(query) == 4:  # [B, heads, N, width / heads]
        heads, n, m, width, value_width = query[1], query[2], key[2], query[3], value[3]
    else:  # [B, N, D]
        heads = int(attributes["q_num_heads"])
        n, m, width = query[1], key[1], query[2] // heads
        value_width = value[2] // int(attributes["kv_num_heads"])
    return query[0] * heads * n * m * (width + value_width)
