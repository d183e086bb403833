"""Reads the graphs that XNNPACK's delegate runs, and checks them before the delegate gets them.

executorch passes such a graph to native code that trusts every offset, identifier and size in it; a wrong one ends
the process. The tables are those of executorch's ``backends/xnnpack/serialization/schema.fbs``.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum

from mvmoe_deploy.backends import GraphError

NONE = 0xFFFFFFFF
"""Stands in place of an identifier for "no bias" or "not an external value"."""

MAX_RANK = 6
MAX_VALUES = 100_000
MAX_BYTES = 1 << 30
"""Largest tensor in bytes; a trunk's tensors take a few hundred kB."""

EXTERNAL_INPUT, EXTERNAL_OUTPUT = 1, 2


class DataType(IntEnum):
    """The data types that exports of this project use; ``enum XNNDatatype``."""

    FP32 = 1
    FP16 = 2
    QINT8 = 3
    QUINT8 = 4
    QINT32 = 5
    QCINT8 = 6
    QCINT32 = 7
    QCINT4 = 8
    QDINT8 = 9
    INT32 = 12


_BITS = {
    DataType.FP32: 32,
    DataType.FP16: 16,
    DataType.QINT8: 8,
    DataType.QUINT8: 8,
    DataType.QINT32: 32,
    DataType.QCINT8: 8,
    DataType.QCINT32: 32,
    DataType.QCINT4: 4,
    DataType.QDINT8: 8,
    DataType.INT32: 32,
}


class ValueKind(IntEnum):
    """``union XValueUnion``."""

    PLAIN = 1
    QUANTIZED = 2


class Quantization(IntEnum):
    """How a value is quantized; ``union XNNQuantParams``."""

    PER_CHANNEL = 1
    PER_TENSOR = 2
    PER_TOKEN = 3


class Node(IntEnum):
    """Kinds of nodes; ``union XNodeUnion``."""

    ADD = 1
    FULLY_CONNECTED = 2
    SOFTMAX = 3
    SIGMOID = 4
    TRANSPOSE = 5
    CLAMP = 6
    CONV = 7
    DIVIDE = 8
    RESIZE = 9
    PAD = 10
    AVERAGE_POOLING = 11
    MINIMUM = 12
    DEPTHWISE_CONV = 13
    MAX_POOLING = 14
    MULTIPLY = 15
    SUBTRACT = 16
    FLOOR = 17
    CONVERT = 18
    GLOBAL_AVERAGE_POOLING = 19
    RESHAPE = 20
    SQUARE_ROOT = 22
    CEILING = 23
    HARDSWISH = 24
    LEAKY_RELU = 25
    MAXIMUM = 26
    NEGATE = 27
    SQUARE = 28
    ELU = 29
    ABSOLUTE = 30
    PRELU = 31
    CONCATENATE_2 = 32
    CONCATENATE_3 = 33
    CONCATENATE_4 = 34
    SLICE = 35
    MATRIX_PRODUCT = 37
    CONCATENATE_5 = 38
    TRANSPOSED_CONV = 39
    RECIPROCAL_SQUARE_ROOT = 40
    LOGARITHM = 41
    GELU = 42
    TANH = 43
    EXPONENTIAL = 44
    SINE = 45
    COPY = 46
    COSINE = 47


class GraphField(IntEnum):
    """Fields of ``XNNGraph``."""

    VERSION = 0
    NODES = 1
    VALUES = 2
    EXTERNALS = 3
    INPUTS = 4
    OUTPUTS = 5
    INLINE_CONSTANTS = 6
    CONSTANTS = 8


class TensorField(IntEnum):
    """Fields of ``XNNTensorValue``."""

    DATATYPE = 0
    RANK = 1
    SHAPE = 2
    CONSTANT = 3
    EXTERNAL = 4
    FLAGS = 5
    NUMBER = 6
    BEYOND = 7  # a field that this version of the schema does not have


class ConvField(IntEnum):
    """The fields of ``_XNNNodeConv`` that determine shapes."""

    KERNEL_HEIGHT = 4
    KERNEL_WIDTH = 5
    GROUP_INPUT_CHANNELS = 10
    GROUP_OUTPUT_CHANNELS = 11
    GROUPS = 12


_CONVOLUTIONS = (Node.CONV, Node.DEPTHWISE_CONV)
_WEIGHTED = (Node.FULLY_CONNECTED, *_CONVOLUTIONS, Node.TRANSPOSED_CONV)
_CONCATENATIONS = (Node.CONCATENATE_2, Node.CONCATENATE_3, Node.CONCATENATE_4, Node.CONCATENATE_5)
_ONE_INPUT = (
    *(Node.SOFTMAX, Node.SIGMOID, Node.CLAMP, Node.FLOOR, Node.CONVERT, Node.SQUARE_ROOT, Node.CEILING, Node.HARDSWISH),
    *(Node.NEGATE, Node.SQUARE, Node.ABSOLUTE, Node.RECIPROCAL_SQUARE_ROOT, Node.LOGARITHM, Node.GELU, Node.TANH),
    *(Node.EXPONENTIAL, Node.SINE, Node.COPY, Node.COSINE),
)
_TWO_INPUTS = (*(Node.ADD, Node.DIVIDE, Node.MINIMUM, Node.MULTIPLY, Node.SUBTRACT, Node.MAXIMUM, Node.PRELU),)
_WITH_PARAMETER = (Node.LEAKY_RELU, Node.ELU)
_ELEMENTWISE = (*_ONE_INPUT, *_TWO_INPUTS, *_WITH_PARAMETER)

_OPERANDS: dict[int, tuple[tuple[int, ...], int]] = {
    **dict.fromkeys((*_ONE_INPUT, Node.GLOBAL_AVERAGE_POOLING), ((0,), 1)),
    **dict.fromkeys((*_TWO_INPUTS, Node.MATRIX_PRODUCT), ((0, 1), 2)),
    **dict.fromkeys(_WITH_PARAMETER, ((1,), 2)),
    **dict.fromkeys((*_CONVOLUTIONS, Node.TRANSPOSED_CONV), ((15, 16, 17), 18)),
    **dict.fromkeys((Node.AVERAGE_POOLING, Node.MAX_POOLING), ((10,), 11)),
    **dict.fromkeys((Node.TRANSPOSE, Node.RESIZE, Node.RESHAPE), ((2,), 3)),
    **dict.fromkeys((Node.PAD, Node.SLICE), ((3,), 4)),
    Node.FULLY_CONNECTED: ((0, 1, 2), 3),
    Node.CONCATENATE_2: ((1, 2), 5),
    Node.CONCATENATE_3: ((1, 2, 3), 5),
    Node.CONCATENATE_4: ((1, 2, 3, 4), 5),
    Node.CONCATENATE_5: ((1, 2, 3, 4, 7), 5),
}
"""For each kind of node, the fields that name its inputs and the field that names its output."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Value:
    datatype: int
    shape: tuple[int, ...]
    constant: bool


class _Table:
    """A flatbuffer table; every access checks that the field lies within the buffer."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position
        vtable = position - _number(data, "<i", position)
        size, self.size = _number(data, "<H", vtable), _number(data, "<H", vtable + 2)
        if size < 4 or size % 2 or self.size < 4 or position + self.size > len(data):
            raise GraphError("a table reaches beyond the graph")
        self.fields = [_number(data, "<H", vtable + place) for place in range(4, size, 2)]

    def number(self, field: int, kind: str = "<I") -> int:
        """Reads a scalar field; 0 if the field is absent."""
        place = self._place(field, struct.calcsize(kind))
        return _number(self.data, kind, place) if place else 0

    def table(self, field: int) -> _Table:
        """Reads a field that is a table."""
        place = self._place(field, 4)
        if not place:
            raise GraphError("a table is missing")
        return _Table(self.data, place + _number(self.data, "<I", place))

    def vector(self, field: int, width: int) -> tuple[int, int]:
        """(position of the first element, number of elements) of a vector whose elements have ``width`` bytes."""
        place = self._place(field, 4)
        if not place:
            return 0, 0
        start = place + _number(self.data, "<I", place)
        count = _number(self.data, "<I", start)
        if start + 4 + count * width > len(self.data):
            raise GraphError("a list reaches beyond the graph")
        return start + 4, count

    def numbers(self, field: int) -> list[int]:
        """Reads a vector of unsigned integers."""
        start, count = self.vector(field, 4)
        return list(struct.unpack_from(f"<{count}I", self.data, start))

    def tables(self, field: int) -> list[_Table]:
        """Reads a vector of tables."""
        start, count = self.vector(field, 4)
        if count > MAX_VALUES:
            raise GraphError(f"it has more than {MAX_VALUES} nodes or values")
        places = range(start, start + 4 * count, 4)
        return [_Table(self.data, place + _number(self.data, "<I", place)) for place in places]

    def text(self, field: int) -> str:
        """Reads a string, which native code ends at its zero byte."""
        start, count = self.vector(field, 1)
        if start and self.data[start + count : start + count + 1] != b"\0":
            raise GraphError("a name lacks its zero byte at the end")
        return self.data[start : start + count].decode()

    def _place(self, field: int, width: int) -> int:
        offset = self.fields[field] if field < len(self.fields) else 0
        if offset and (offset < 4 or offset + width > self.size):
            raise GraphError("a field lies outside its table")
        return self.position + offset if offset else 0


def check_graph(blob: bytes, weights: Mapping[str, int]) -> int:
    """Checks a delegate's graph and returns its number of inputs and outputs.

    The check requires that every table lies in the file, that every node names values that exist and were computed
    before it, that every weight is as long as its shape says, and that the shapes of layers fit their weights.

    Args:
        blob: what executorch calls processed data: a header, then the graph.
        weights: number of bytes of every stored weight, by name.

    Raises:
        GraphError: the graph is damaged or unsafe.
        struct.error, UnicodeDecodeError, IndexError: the graph is damaged.
    """
    if blob[4:8] != b"XH00" or _number(blob, "<H", 8) != 30:
        raise GraphError("no XNNPACK header")
    start, size = _number(blob, "<I", 10), _number(blob, "<I", 14)
    if start + size > len(blob):
        raise GraphError("the graph reaches beyond its file")
    data = blob[start : start + size]
    if data[4:8] not in (b"XN00", b"XN01"):
        raise GraphError("no XNNPACK graph")
    graph = _Table(data, _number(data, "<I", 0))
    graph.text(GraphField.VERSION)
    inputs, outputs = graph.numbers(GraphField.INPUTS), graph.numbers(GraphField.OUTPUTS)
    values = _values(graph, inputs, outputs, _constants(graph, weights))
    known = {number for number, value in values.items() if value.constant} | set(inputs)
    for node in graph.tables(GraphField.NODES):
        _check_node(node, values, known)
    if not known.issuperset(outputs):
        raise GraphError("an output is not computed")
    return len(inputs) + len(outputs)


def _constants(graph: _Table, weights: Mapping[str, int]) -> list[int]:
    """The size of each constant in bytes; the first entry stands for "none"."""
    if graph.vector(GraphField.INLINE_CONSTANTS, 4)[1]:
        raise GraphError("it has inline constants, which no export of this project has")
    sizes = []
    for index, constant in enumerate(graph.tables(GraphField.CONSTANTS)):
        name = constant.text(2)
        if index and (name not in weights or constant.number(0, "<Q") != (1 << 64) - 1):
            raise GraphError(f"weight {name!r} is not stored")
        sizes.append(weights.get(name, 0))
    return sizes


def _values(graph: _Table, inputs: list[int], outputs: list[int], constants: list[int]) -> dict[int, _Value]:
    """All values by identifier."""
    externals = graph.number(GraphField.EXTERNALS)
    if len({*inputs, *outputs}) != len(inputs) + len(outputs) or externals != len(inputs) + len(outputs):
        raise GraphError("an input or output is named twice")
    values: dict[int, _Value] = {}
    taken: set[int] = set()  # places among inputs and outputs
    for entry in graph.tables(GraphField.VALUES):
        kind, table = entry.number(0, "<B"), entry.table(1)
        if kind not in tuple(ValueKind):
            raise GraphError("a value is of an unknown kind")
        tensor = table.table(0) if kind == ValueKind.QUANTIZED else table
        datatype, shape = tensor.number(TensorField.DATATYPE, "<h"), tuple(tensor.numbers(TensorField.SHAPE))
        constant, external = tensor.number(TensorField.CONSTANT), tensor.number(TensorField.EXTERNAL)
        flags, number = tensor.number(TensorField.FLAGS), tensor.number(TensorField.NUMBER)
        ranked = tensor.number(TensorField.RANK) == len(shape) <= MAX_RANK
        if datatype not in _BITS or not ranked or tensor.number(TensorField.BEYOND, "<h"):
            raise GraphError(f"value {number} has an unknown type or shape")
        size = math.prod(shape) * _BITS[DataType(datatype)] // 8
        if size > MAX_BYTES or (constant and (constant >= len(constants) or size > constants[constant])):
            raise GraphError(f"value {number} is larger than its stored data")
        wanted = (number in inputs) * EXTERNAL_INPUT + (number in outputs) * EXTERNAL_OUTPUT
        if flags != wanted or (external in taken or external >= externals if wanted else external != NONE):
            raise GraphError(f"value {number} disagrees with the graph's list of inputs and outputs")
        taken.add(external)
        if number in values or (constant and wanted):
            raise GraphError(f"value {number} is defined twice")
        if kind == ValueKind.QUANTIZED:
            _check_quantization(table, shape, constants)
        values[number] = _Value(datatype, shape, bool(constant))
    if not values.keys() >= {*inputs, *outputs}:
        raise GraphError("an input or output is not defined")
    return values


def _check_quantization(table: _Table, shape: tuple[int, ...], constants: list[int]) -> None:
    kind, parameters = table.number(1, "<B"), table.table(2)
    if kind == Quantization.PER_CHANNEL:
        count = parameters.number(3) or parameters.vector(0, 4)[1]
        stored, axis = parameters.number(2), parameters.number(1, "<i")
        if not 0 <= axis < len(shape) or shape[axis] != count:
            raise GraphError("a weight has not one scale per channel")
        if stored and (stored >= len(constants) or 4 * count > constants[stored]):
            raise GraphError("scales are longer than their stored data")
        if not stored and parameters.vector(0, 4)[1] != count:
            raise GraphError("a weight has not one scale per channel")
    elif kind == Quantization.PER_TOKEN:  # the scales are computed at run time
        if not 0 < parameters.number(0, "<i") <= len(shape):
            raise GraphError("a value is quantized over dimensions it does not have")
    elif kind != Quantization.PER_TENSOR:
        raise GraphError("a value is quantized in an unknown way")


def _check_node(entry: _Table, values: Mapping[int, _Value], known: set[int]) -> None:
    """Checks one node and adds its output to the values known after it."""
    kind, node = entry.number(0, "<B"), entry.table(1)
    if kind not in _OPERANDS:
        raise GraphError("a node is of an unknown kind")
    if entry.number(3):
        entry.table(3).number(0), entry.table(3).number(1)
    fields, output_field = _OPERANDS[kind]
    inputs, output = [node.number(field) for field in fields], node.number(output_field)
    if kind in _WEIGHTED and inputs[2] == NONE:
        inputs.pop()  # no bias
    if output not in values or output in known or not known.issuperset(inputs):
        raise GraphError("a node reads a value before it is computed, or writes a value twice")
    known.add(output)
    mixes = len({values[number].datatype for number in (*inputs, output)}) > 1
    if mixes and kind != Node.CONVERT and kind not in _WEIGHTED:
        raise GraphError("a node mixes types")
    rule = _RULES.get(kind)  # XNNPACK itself checks the shapes of other nodes, such as pooling
    if rule is not None:
        rule(node, [values[number].shape for number in inputs], values[output].shape)


def _check_elementwise(_: _Table, given: list[Shape], result: Shape) -> None:
    if _broadcast(given) != result:
        raise GraphError("the inputs of an element-wise operation do not broadcast to its output's shape")


def _check_matrix_product(_: _Table, given: list[Shape], result: Shape) -> None:
    first, second = given
    fits = len(first) >= 2 and len(second) == len(first) and first[-1] == second[-2] and first[:-2] == second[:-2]
    if not fits or result != (*first[:-1], second[-1]):
        raise GraphError("the shapes of a matrix product do not fit")


def _check_transpose(node: _Table, given: list[Shape], result: Shape) -> None:
    (first,) = given
    order = node.numbers(1)
    if node.number(0) != len(first) or sorted(order) != list(range(len(first))):
        raise GraphError("a transpose is not a permutation")
    if result != tuple(first[axis] for axis in order):
        raise GraphError("the shape of a transpose differs from that of its output")


def _check_reshape(node: _Table, given: list[Shape], result: Shape) -> None:
    (first,) = given
    shape = node.numbers(1)  # 0 stands for the remaining elements
    fits = len(shape) == len(result) and all(a in (0, b) for a, b in zip(shape, result, strict=True))
    if node.number(0) != len(shape) or not fits or shape.count(0) > 1 or math.prod(first) != math.prod(result):
        raise GraphError("the shape of a reshape differs from that of its output")


def _check_concatenation(node: _Table, given: list[Shape], result: Shape) -> None:
    axis = node.number(0)
    if any(len(shape) != len(result) for shape in given) or axis >= len(result):
        raise GraphError("the shapes of a concatenation do not fit")
    along = sum(shape[axis] for shape in given)
    if any((*shape[:axis], along, *shape[axis + 1 :]) != result for shape in given):
        raise GraphError("the shapes of a concatenation do not fit")


def _check_slice(node: _Table, given: list[Shape], result: Shape) -> None:
    (first,) = given
    offsets, sizes = node.numbers(1), node.numbers(2)
    if not node.number(0) == len(offsets) == len(sizes) == len(first) == len(result):
        raise GraphError("a slice reaches beyond its input")
    if any(offset + size > extent for offset, size, extent in zip(offsets, sizes, first, strict=True)):
        raise GraphError("a slice reaches beyond its input")


def _check_fully_connected(_: _Table, given: list[Shape], result: Shape) -> None:
    first, weight, *bias = given
    if len(weight) != 2 or first[-1:] != weight[1:] or result != (*first[:-1], weight[0]):
        raise GraphError("a layer's weights do not fit its input or output")
    if any(shape != weight[:1] for shape in bias):
        raise GraphError("a layer's bias does not fit its weights")


def _check_convolution(node: _Table, given: list[Shape], result: Shape, *, depthwise: bool = False) -> None:
    first, weight, *bias = given
    channels, per_group, groups = (
        node.number(field)
        for field in (ConvField.GROUP_INPUT_CHANNELS, ConvField.GROUP_OUTPUT_CHANNELS, ConvField.GROUPS)
    )
    kernel = (node.number(ConvField.KERNEL_HEIGHT), node.number(ConvField.KERNEL_WIDTH))
    allowed = [(groups * per_group, *kernel, channels)]
    if depthwise:
        allowed.append((1, *kernel, channels * per_group * groups))
    if weight not in allowed:
        raise GraphError("a convolution's weights do not fit its kernel")
    if len(first) != 4 or first[3] != groups * channels or any(shape != (groups * per_group,) for shape in bias):
        raise GraphError("a convolution's weights do not fit its input")


_RULES: dict[int, Callable[[_Table, list[Shape], Shape], None]] = {
    **dict.fromkeys(_ELEMENTWISE, _check_elementwise),
    **dict.fromkeys(_CONCATENATIONS, _check_concatenation),
    Node.MATRIX_PRODUCT: _check_matrix_product,
    Node.TRANSPOSE: _check_transpose,
    Node.RESHAPE: _check_reshape,
    Node.SLICE: _check_slice,
    Node.FULLY_CONNECTED: _check_fully_connected,
    Node.CONV: _check_convolution,
    Node.DEPTHWISE_CONV: functools.partial(_check_convolution, depthwise=True),
}
"""For each kind of node, the check of its shapes; each raises :class:`GraphError`."""


def _broadcast(shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    result = tuple(map(max, *padded)) if len(padded) > 1 else padded[0]
    fits = all(extent in (1, wanted) for shape in padded for extent, wanted in zip(shape, result, strict=True))
    return result if fits else None


def _number(data: bytes, kind: str, position: int) -> int:
    if position < 0:
        raise GraphError("an offset points before the graph")
    (value,) = struct.unpack_from(kind, data, position)
    return int(value)
