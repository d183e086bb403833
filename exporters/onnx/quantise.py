"""Weights of 8 and 4 bits: matrix products of a traced graph become onnxruntime's products of integers.

``docs/precisions.md`` says what was measured and why these operators were chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
Layout = Callable[[Floats], Floats]
"""Brings a weight into the form of its product, ``[inputs, outputs]``."""

Encode = Callable[[Floats], tuple[NDArray[np.generic], ...]]

DOMAIN = "com.microsoft"

PRECISIONS = ("int8", "int4")
"""The precisions that :func:`quantise` makes."""

SMALLEST = 1024
"""Elements of the smallest weight that is quantised; a smaller one is not worth its scale."""

BLOCK8 = 128
BLOCK4 = 32
"""Input channels that share a scale, in products of 8 and of 4 bits by blocks."""

EXACT, INTEGERS = 1, 4
"""The operator's names for arithmetic in float32, and for activations that are rounded to 8 bits in blocks of a row."""

SHARES = {4: (1.0, 0.95, 0.9, 0.85, 0.8, -1.0, -1.05, -1.15), 8: (1.0,)}
"""Shares of a block's largest weight that are tried as its largest number, with the other sign where negative. What is
larger is cut off, which pays off with few bits: all others are then rounded less."""

ACTIVATIONS = {"Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Mul", "QuickGelu", "Relu", "Swish"}
"""Operators whose results are mostly near zero with a few large values. One scale for the whole tensor would leave
most of its values a few bits; ``Mul`` is there for x · sigmoid(x)."""


@dataclass(frozen=True)
class Coding:
    """How a weight is stored.

    Attributes:
        weight: the weight's name.
        parts: names of the constants that stand for it in the graph.
        encode: computes these constants from the weight.
        widened: whether the graph multiplies the two constants, and computes with the result.
    """

    weight: str
    parts: tuple[str, ...]
    encode: Encode
    widened: bool = False

    def coded(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The constants for the weight in ``state``, by name."""
        arrays = self.encode(state[self.weight].detach().cpu().numpy())
        return {name: torch.from_numpy(array) for name, array in zip(self.parts, arrays, strict=True)}

    def rounded(self, weight: Tensor) -> Tensor:
        """A widened weight as the graph computes with it."""
        numbers, scale = (array.astype(np.float32) for array in self.encode(weight.detach().cpu().numpy()))
        return torch.from_numpy(numbers * scale)


def quantise(model: ir.Model, weights: Collection[str], precision: str) -> list[Coding]:
    """Replaces a graph's products with large weights by products of integers, in place.

    The router stays as it is: it takes a few kB, and rounding it would send images to other experts.

    Args:
        model: a traced piece.
        weights: names of its constants that are weights.
        precision: one of :data:`PRECISIONS`.

    Returns:
        How each replaced weight is stored.
    """
    work = _Work(model, set(weights), precision)
    for node in list(model.graph):
        work.visit(node)
    if work.integers:  # a range of activations must not depend on the other images of a batch
        for value in (*model.graph.inputs, *model.graph.outputs):
            assert value.shape is not None
            value.shape = ir.Shape([1, *value.shape[1:]])
    if work.codings:
        model.graph.opset_imports[DOMAIN] = 1
        model.opset_imports[DOMAIN] = 1
    return work.codings


class _Work:
    """The replacement of one graph's products."""

    def __init__(self, model: ir.Model, weights: set[str], precision: str) -> None:
        self._graph = model.graph
        self._weights = weights
        self._precision = precision
        self._quantised: dict[ir.Value, list[ir.Value]] = {}  # what DynamicQuantizeLinear gives of a value
        self._numbers = itertools.count()
        self.codings: list[Coding] = []
        self.integers = False  # whether there is a product that quantises activations over the whole tensor

    def visit(self, node: ir.Node) -> None:
        """Replaces a node if it multiplies with a large weight."""
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if weight is None or weight.name not in self._weights or len(weight.uses()) != 1 or weight.const_value is None:
            return
        if weight.const_value.size < SMALLEST or str(weight.name).split(".")[0] == "router":
            return
        if node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes):
            if len(weight.const_value.shape) == 2:
                self._replace_product(node, weight)
        elif node.op_type == "Conv":
            if _is_of_patches(node):
                self._replace_patches(node, weight)
            else:
                self._narrow(node, weight)

    def _replace_product(self, node: ir.Node, weight: ir.Value) -> None:
        data, bias, last = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None, node
        assert data is not None
        if bias is None:
            found = self._bias_after(node)
            if found is not None:
                last, bias = found
        result = self._product(node, data, weight, bias)
        self._take_over(last, result)
        for gone in dict.fromkeys((last, node)):
            self._graph.remove(gone, safe=True)
        self._forget(weight)

    def _bias_after(self, node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
        """The addition of a constant per column that follows a product, and that constant."""
        product, matrix = node.outputs[0], node.inputs[1]
        uses = product.uses()
        if len(uses) != 1 or product.is_graph_output() or matrix is None:
            return None
        add = next(iter(uses)).node
        others = [value for value in add.inputs if value is not product]
        if add.op_type != "Add" or len(others) != 1 or others[0] is None or others[0].name not in self._weights:
            return None
        return (add, others[0]) if _extents(others[0]) == _extents(matrix)[1:] else None

    def _replace_patches(self, node: ir.Node, weight: ir.Value) -> None:
        """Writes a convolution whose windows neither overlap nor leave gaps as a product with each window's pixels."""
        data, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        assert data is not None
        columns, channels, high, wide = _extents(weight)
        rows, across = _extents(data)[2] // high, _extents(data)[3] // wide
        pixels = self._reshaped(node, data, [-1, channels, rows, high, across, wide])
        pixels = self._transposed(node, pixels, [0, 2, 4, 1, 3, 5])
        pixels = self._reshaped(node, pixels, [-1, rows * across, channels * high * wide])
        product = self._product(node, pixels, weight, bias, patches=True)
        result = self._transposed(node, self._reshaped(node, product, [-1, rows, across, columns]), [0, 3, 1, 2])
        self._take_over(node, result)
        self._graph.remove(node, safe=True)
        self._forget(weight)

    def _product(
        self, node: ir.Node, data: ir.Value, weight: ir.Value, bias: ir.Value | None, *, patches: bool = False
    ) -> ir.Value:
        """The product of ``data`` and a weight, that of a convolution with ``patches``."""
        before = data.producer()
        layout = _columns if patches else np.asarray
        inputs = layout(weight.const_value.numpy()).shape[0]  # type: ignore[union-attr]
        if self._precision == "int4":  # patches are where all errors begin: they keep 8 bits
            return self._by_blocks(node, data, weight, bias, layout, 8 if patches else 4, BLOCK4, EXACT)
        if before is not None and before.op_type in ACTIVATIONS and inputs >= BLOCK8:
            return self._by_blocks(node, data, weight, bias, layout, 8, BLOCK8, INTEGERS)
        self.integers = True
        matrix, scale = self._coded(weight, ("int8", "scale"), lambda given: by_column(layout(given)))
        if data not in self._quantised:
            self._quantised[data] = self._insert(node, "DynamicQuantizeLinear", [data], outputs=3)
        numbers, step, zero = self._quantised[data]
        given = [numbers, matrix, step, scale, zero, None, bias]
        return self._insert(node, "MatMulIntegerToFloat", given[: 5 if bias is None else 7], domain=DOMAIN)[0]

    def _by_blocks(
        self,
        node: ir.Node,
        data: ir.Value,
        weight: ir.Value,
        bias: ir.Value | None,
        layout: Layout,
        bits: int,
        block: int,
        arithmetic: int,
    ) -> ir.Value:
        """A product whose weight has a scale for every ``block`` inputs of a column."""
        inputs, columns = layout(weight.const_value.numpy()).shape  # type: ignore[union-attr]
        kinds = f"int{bits}", "scale"
        matrix, scale = self._coded(weight, kinds, lambda given: by_block(layout(given), bits, block))
        shape = {"K": inputs, "N": columns, "bits": bits, "block_size": block, "accuracy_level": arithmetic}
        given = [data, matrix, scale, None, None, bias]
        return self._insert(node, "MatMulNBits", given[: 3 if bias is None else 6], shape, domain=DOMAIN)[0]

    def _narrow(self, node: ir.Node, weight: ir.Value) -> None:
        """Stores a convolution's weight in 8 bits. onnxruntime widens it once, when it loads the graph."""

        def encode(values: Floats) -> tuple[NDArray[np.generic], ...]:
            numbers, scale = by_column(_columns(values), multiplied=False)
            return numbers.T.reshape(values.shape).copy(), scale.reshape(-1, *[1] * (values.ndim - 1))

        narrow, scale = self._coded(weight, ("int8", "scale"), encode, widened=True)
        (wide,) = self._insert(node, "Cast", [narrow], {"to": int(ir.DataType.FLOAT)})
        (scaled,) = self._insert(node, "Mul", [wide, scale])
        node.replace_input_with(1, scaled)
        self._forget(weight)

    def _coded(
        self, weight: ir.Value, kinds: tuple[str, ...], encode: Encode, *, widened: bool = False
    ) -> list[ir.Value]:
        """Adds the constants that stand for a weight."""
        name = str(weight.name)
        coding = Coding(name, tuple(f"{name}.{kind}" for kind in kinds), encode, widened)
        self.codings.append(coding)
        assert weight.const_value is not None
        return [
            self._constant(part, array)
            for part, array in zip(coding.parts, encode(weight.const_value.numpy()), strict=True)
        ]

    def _constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _reshaped(self, node: ir.Node, data: ir.Value, shape: list[int]) -> ir.Value:
        wanted = self._constant(f"shape_{next(self._numbers)}", np.array(shape))
        return self._insert(node, "Reshape", [data, wanted])[0]

    def _transposed(self, node: ir.Node, data: ir.Value, order: list[int]) -> ir.Value:
        return self._insert(node, "Transpose", [data], {"perm": order})[0]

    def _insert(
        self,
        before: ir.Node,
        operator: str,
        inputs: list[ir.Value | None],
        attributes: dict[str, int | list[int]] | None = None,
        *,
        outputs: int = 1,
        domain: str = "",
    ) -> list[ir.Value]:
        """Adds a node before another one; returns its outputs."""
        node = ir.node(operator, inputs, attributes or {}, domain=domain, num_outputs=outputs)
        for value in node.outputs:
            value.name = f"quantised_{next(self._numbers)}"
        self._graph.insert_before(before, node)
        return list(node.outputs)

    def _take_over(self, node: ir.Node, result: ir.Value) -> None:
        """Puts a value in the place of a node's output, with its name, shape and type."""
        old = node.outputs[0]
        result.shape, result.type = old.shape, old.type
        name, old.name = old.name, f"{old.name}.before"
        result.name = name
        old.replace_all_uses_with(result, replace_graph_outputs=True)

    def _forget(self, weight: ir.Value) -> None:
        del self._graph.initializers[str(weight.name)]


def _is_of_patches(node: ir.Node) -> bool:
    """Whether a convolution's windows cover a plane without gaps, overlaps and padding, as patches do."""
    data, weight = node.inputs[:2]
    if data is None or weight is None:
        return False
    kernel, plane = _extents(weight)[2:], _extents(data)[2:]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return (
        len(kernel) == 2
        and min(kernel) > 1
        and list(attributes.get("strides", [1, 1])) == kernel
        and not any(attributes.get("pads", [0]))
        and set(attributes.get("dilations", [1])) == {1}
        and attributes.get("group", 1) == 1
        and attributes.get("auto_pad", "NOTSET") == "NOTSET"
        and all(extent > 0 and extent % size == 0 for extent, size in zip(plane, kernel, strict=True))
    )


def _extents(value: ir.Value) -> list[int]:
    """A value's shape; dynamic extents are 0."""
    shape = value.shape if value.const_value is None else value.const_value.shape
    return [extent if isinstance(extent, int) else 0 for extent in shape or ()]


def _columns(weight: Floats) -> Floats:
    """A convolution's weight ``[outputs, …]`` as a matrix ``[inputs, outputs]``."""
    return weight.reshape(len(weight), -1).T


def by_column(matrix: Floats, *, multiplied: bool = True) -> tuple[NDArray[np.int8], Floats]:
    """Rounds ``[inputs, outputs]`` to -127…127 with one scale per output: the numbers and the scales ``[outputs]``.

    x86 processors without VNNI add two products of a number and an activation of 0…255 in 16 bits, and cut off what
    these do not hold; onnxruntime's answers would be wrong there. So the sum of two neighbours of the same sign sets
    the scale, not the largest number. That makes it about a third larger, where keeping to 7 bits would double it.

    Args:
        matrix: the weight.
        multiplied: whether the numbers are multiplied as they are; otherwise the largest one sets the scale.
    """
    extent = np.abs(matrix).max(axis=0)
    if multiplied:
        pairs = np.pad(matrix, ((0, len(matrix) % 2), (0, 0))).reshape(-1, 2, matrix.shape[1])
        extent = np.maximum(np.maximum(pairs, 0).sum(axis=1), np.maximum(-pairs, 0).sum(axis=1)).max(axis=0)
    # rounding leaves the sum of two at 128 at most, and 255 * 128 < 2^15
    scale = np.maximum(extent / 127, np.finfo(np.float32).tiny).astype(np.float32)
    return np.ascontiguousarray(np.rint(matrix / scale), np.int8), scale


def by_block(matrix: Floats, bits: int, block: int) -> tuple[NDArray[np.uint8], Floats]:
    """Rounds ``[inputs, outputs]`` with one scale for every ``block`` inputs of an output.

    Returns:
        Numbers around 2^(bits-1) as MatMulNBits reads them, ``[outputs, blocks, block * bits / 8]`` with the first of
        two numbers in a byte's lower half; and the scales ``[outputs, blocks]``.
    """
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    padded = np.pad(matrix.T, ((0, 0), (0, -len(matrix) % block)))
    blocks = padded.reshape(len(padded), -1, block)
    place = np.abs(blocks).argmax(axis=2, keepdims=True)
    largest = np.take_along_axis(blocks, place, axis=2)
    best = np.full(largest.shape, np.inf, np.float32)
    scale, numbers = np.ones_like(best), np.zeros_like(blocks)
    for share in SHARES[bits]:
        # of either sign: the largest weight may be the smallest number, of which there is one more
        step = largest * np.float32(share) / least
        step[step == 0] = 1
        tried = np.clip(np.rint(blocks / step), least, most)
        error = np.square(tried * step - blocks).sum(axis=2, keepdims=True)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, step, scale)
        numbers = np.where(better, tried, numbers)
    numbers = (numbers - least).astype(np.uint8)
    if bits == 4:
        numbers = numbers[..., ::2] | (numbers[..., 1::2] << 4)
    return np.ascontiguousarray(numbers), np.ascontiguousarray(scale[..., 0])


def from_blocks(numbers: NDArray[np.uint8], scale: Floats, bits: int, inputs: int) -> Floats:
    """The matrix ``[inputs, outputs]`` that :func:`by_block` made numbers of."""
    if bits == 4:
        numbers = np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(*numbers.shape[:2], -1)
    values: Floats = (numbers.astype(np.float32) - 2 ** (bits - 1)) * scale[..., None]
    return values.reshape(len(values), -1)[:, :inputs].T


def loaded_bytes(graph: ir.Graph) -> int:
    """Size of a graph's constants once onnxruntime has loaded it, in bytes."""
    wide = {value.name for node in graph if node.op_type == "Cast" for value in node.inputs if value is not None}
    sizes = ((value.name, value.const_value) for value in graph.initializers.values())
    return sum(tensor.size * 4 if name in wide else tensor.nbytes for name, tensor in sizes if tensor is not None)


def stored_matrices(graph: onnx.GraphProto, constants: Mapping[str, NDArray[np.generic]]) -> list[Floats]:
    """The weights of a written graph that are stored as integers, widened.

    Args:
        graph: the graph.
        constants: the values of its constants, and of the weights that it takes as inputs, by name.
    """
    found: list[Floats] = []
    for node in graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            found.append(constants[node.input[1]].astype(np.float32) * constants[node.input[3]].astype(np.float32))
        elif node.op_type == "MatMulNBits":
            numbers, scale = (constants[name] for name in node.input[1:3])
            attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            given = (numbers.astype(np.uint8), scale.astype(np.float32), attributes["bits"], attributes["K"])
            found.append(from_blocks(*given))
        elif node.op_type == "Mul" and node.input[1] in constants:
            for cast in graph.node:
                if cast.op_type == "Cast" and cast.output[0] == node.input[0] and cast.input[0] in constants:
                    numbers, scale = constants[cast.input[0]], constants[node.input[1]]
                    found.append(numbers.astype(np.float32) * scale.astype(np.float32))
    return found
