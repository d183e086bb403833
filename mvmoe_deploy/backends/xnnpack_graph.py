"""Reads the graphs that XNNPACK's delegate runs, and checks them before it does.

executorch hands such a graph to native code that follows every offset, identifier and size in it; a wrong one ends
the process. The tables are those of executorch's ``backends/xnnpack/serialization/schema.fbs``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

NONE = 0xFFFFFFFF
"""In place of an identifier: no bias, or not an external value."""

MAX_RANK = 6
MAX_VALUES = 100_000
MAX_BYTES = 1 << 30
"""Largest tensor; a trunk's are a few hundred kB."""

EXTERNAL_INPUT, EXTERNAL_OUTPUT = 1, 2

# By number of a value's type: bits per element.
_BITS = {1: 32, 2: 16, 3: 8, 4: 8, 5: 32, 6: 8, 7: 32, 8: 4, 9: 8, 12: 32}

_UNARY, _BINARY, _CONV = ((0,), 1), ((0, 1), 2), ((15, 16, 17), 18)
# By number of a node's type: (fields that name its inputs, field that names its output).
_NODES: dict[int, tuple[tuple[int, ...], int]] = {
    **dict.fromkeys((1, 8, 12, 15, 16, 26, 31, 37), _BINARY),
    **dict.fromkeys((3, 4, 6, 17, 18, 19, 22, 23, 24, 27, 28, 30, 40, 41, 42, 43, 44, 45, 46, 47), _UNARY),
    **dict.fromkeys((7, 13, 39), _CONV),
    2: ((0, 1, 2), 3),  # fully connected
    5: ((2,), 3),  # transpose
    9: ((2,), 3),  # resize
    10: ((3,), 4),  # pad
    **dict.fromkeys((11, 14), ((10,), 11)),  # pooling
    20: ((2,), 3),  # reshape
    **dict.fromkeys((25, 29), ((1,), 2)),  # leaky ReLU, ELU
    32: ((1, 2), 5),  # concatenations
    33: ((1, 2, 3), 5),
    34: ((1, 2, 3, 4), 5),
    38: ((1, 2, 3, 4, 7), 5),
    35: ((3,), 4),  # slice
}
_FULLY_CONNECTED, _TRANSPOSE, _DEPTHWISE, _CONVERT, _RESHAPE, _SLICE, _MATRIX_PRODUCT = 2, 5, 13, 18, 20, 35, 37
_CONVOLUTIONS, _CONCATENATIONS = (7, 13), (32, 33, 34, 38)
_WEIGHTED = (_FULLY_CONNECTED, *_CONVOLUTIONS, 39)
_ELEMENTWISE = {kind for kind, fields in _NODES.items() if fields in (_UNARY, _BINARY)} - {19, _MATRIX_PRODUCT} | {
    25,
    29,
}
"""All but global pooling, which is written like one."""


class GraphError(ValueError):
    """A graph that native code must not be given; the message says why."""


@dataclass(frozen=True)
class _Value:
    datatype: int
    shape: tuple[int, ...]
    constant: bool


class _Table:
    """A flatbuffer table whose every field lies within the buffer."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position
        vtable = position - _number(data, "<i", position)
        size, self.size = _number(data, "<H", vtable), _number(data, "<H", vtable + 2)
        if size < 4 or size % 2 or self.size < 4 or position + self.size > len(data):
            raise GraphError("a table reaches beyond the graph")
        self.fields = [_number(data, "<H", vtable + place) for place in range(4, size, 2)]

    def number(self, field: int, kind: str = "<I") -> int:
        """A scalar field; 0 where it is left out."""
        place = self._place(field, struct.calcsize(kind))
        return _number(self.data, kind, place) if place else 0

    def table(self, field: int) -> _Table:
        """A field that is a table."""
        place = self._place(field, 4)
        if not place:
            raise GraphError("a table is missing")
        return _Table(self.data, place + _number(self.data, "<I", place))

    def vector(self, field: int, width: int) -> tuple[int, int]:
        """(position of the first element, number of elements) of a vector of elements of so many bytes."""
        place = self._place(field, 4)
        if not place:
            return 0, 0
        start = place + _number(self.data, "<I", place)
        count = _number(self.data, "<I", start)
        if start + 4 + count * width > len(self.data):
            raise GraphError("a list reaches beyond the graph")
        return start + 4, count

    def numbers(self, field: int) -> list[int]:
        """A vector of unsigned integers."""
        start, count = self.vector(field, 4)
        return list(struct.unpack_from(f"<{count}I", self.data, start))

    def tables(self, field: int) -> list[_Table]:
        """A vector of tables."""
        start, count = self.vector(field, 4)
        if count > MAX_VALUES:
            raise GraphError(f"it has more than {MAX_VALUES} nodes or values")
        places = range(start, start + 4 * count, 4)
        return [_Table(self.data, place + _number(self.data, "<I", place)) for place in places]

    def text(self, field: int) -> str:
        """A string, which in native code ends at its zero byte."""
        start, count = self.vector(field, 1)
        if start and self.data[start + count : start + count + 1] != b"\0":
            raise GraphError("a name does not end")
        return self.data[start : start + count].decode()

    def _place(self, field: int, width: int) -> int:
        offset = self.fields[field] if field < len(self.fields) else 0
        if offset and (offset < 4 or offset + width > self.size):
            raise GraphError("a field lies outside its table")
        return self.position + offset if offset else 0


def check_graph(blob: bytes, weights: Mapping[str, int]) -> int:
    """Checks a delegate's graph and returns its number of inputs and outputs.

    Every table lies in the file, every node names values that exist and were computed before it, every weight is as
    long as its shape, and the shapes of layers fit their weights.

    Args:
        blob: what executorch calls processed data: a header, then the graph.
        weights: bytes of every stored weight by name.

    Raises:
        GraphError: or struct.error, UnicodeDecodeError, IndexError: it is damaged or unsafe.
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
    graph.text(0)
    inputs, outputs = graph.numbers(4), graph.numbers(5)
    values = _values(graph, inputs, outputs, _constants(graph, weights))
    known = {number for number, value in values.items() if value.constant} | set(inputs)
    for node in graph.tables(1):
        _check_node(node, values, known)
    if not known.issuperset(outputs):
        raise GraphError("an output is not computed")
    return len(inputs) + len(outputs)


def _constants(graph: _Table, weights: Mapping[str, int]) -> list[int]:
    """Bytes of each constant; the first stands for "none"."""
    if graph.vector(6, 4)[1]:
        raise GraphError("it has inline constants, which no export of this project has")
    sizes = []
    for index, constant in enumerate(graph.tables(8)):
        name = constant.text(2)
        if index and (name not in weights or constant.number(0, "<Q") != (1 << 64) - 1):
            raise GraphError(f"weight {name!r} is not stored")
        sizes.append(weights.get(name, 0))
    return sizes


def _values(graph: _Table, inputs: list[int], outputs: list[int], constants: list[int]) -> dict[int, _Value]:
    """Every value by its identifier."""
    externals = graph.number(3)
    if len({*inputs, *outputs}) != len(inputs) + len(outputs) or externals != len(inputs) + len(outputs):
        raise GraphError("an input or output is named twice")
    values: dict[int, _Value] = {}
    taken: set[int] = set()  # places among inputs and outputs
    for entry in graph.tables(2):
        kind, table = entry.number(0, "<B"), entry.table(1)
        if kind not in (1, 2):
            raise GraphError("a value is of an unknown kind")
        tensor = table.table(0) if kind == 2 else table
        datatype, shape, constant = tensor.number(0, "<h"), tuple(tensor.numbers(2)), tensor.number(3)
        external, flags, number = tensor.number(4), tensor.number(5), tensor.number(6)
        if datatype not in _BITS or tensor.number(1) != len(shape) or len(shape) > MAX_RANK or tensor.number(7, "<h"):
            raise GraphError(f"value {number} has an unknown type or shape")
        size = math.prod(shape) * _BITS[datatype] // 8
        if size > MAX_BYTES or (constant and (constant >= len(constants) or size > constants[constant])):
            raise GraphError(f"value {number} is larger than what is stored of it")
        wanted = (number in inputs) * EXTERNAL_INPUT + (number in outputs) * EXTERNAL_OUTPUT
        if flags != wanted or (external in taken or external >= externals if wanted else external != NONE):
            raise GraphError(f"value {number} is an input or output that others do not take it for")
        taken.add(external)
        if number in values or (constant and wanted):
            raise GraphError(f"value {number} is defined twice")
        if kind == 2:
            _check_quantization(table, shape, constants)
        values[number] = _Value(datatype, shape, bool(constant))
    if not values.keys() >= {*inputs, *outputs}:
        raise GraphError("an input or output is not defined")
    return values


def _check_quantization(table: _Table, shape: tuple[int, ...], constants: list[int]) -> None:
    kind, parameters = table.number(1, "<B"), table.table(2)
    if kind == 1:  # per channel
        count = parameters.number(3) or parameters.vector(0, 4)[1]
        stored, axis = parameters.number(2), parameters.number(1, "<i")
        if not 0 <= axis < len(shape) or shape[axis] != count:
            raise GraphError("a weight has not one scale per channel")
        if stored and (stored >= len(constants) or 4 * count > constants[stored]):
            raise GraphError("scales are longer than what is stored of them")
        if not stored and parameters.vector(0, 4)[1] != count:
            raise GraphError("a weight has not one scale per channel")
    elif kind == 3:  # per token, as they come
        if not 0 < parameters.number(0, "<i") <= len(shape):
            raise GraphError("a value is quantized over dimensions it does not have")
    elif kind != 2:  # per tensor
        raise GraphError("a value is quantized in an unknown way")


def _check_node(entry: _Table, values: Mapping[int, _Value], known: set[int]) -> None:
    """Checks one node and adds its output to the values known after it."""
    kind, node = entry.number(0, "<B"), entry.table(1)
    if kind not in _NODES:
        raise GraphError("a node is of an unknown kind")
    if entry.number(3):
        entry.table(3).number(0), entry.table(3).number(1)
    fields, output_field = _NODES[kind]
    inputs, output = [node.number(field) for field in fields], node.number(output_field)
    if kind in _WEIGHTED and inputs[2] == NONE:
        inputs.pop()  # no bias
    if output not in values or output in known or not known.issuperset(inputs):
        raise GraphError("a node reads a value before it is there, or writes one twice")
    known.add(output)
    if (
        kind != _CONVERT
        and kind not in _WEIGHTED
        and len({values[number].datatype for number in (*inputs, output)}) > 1
    ):
        raise GraphError("a node mixes types")
    problem = _shape_problem(kind, node, [values[number].shape for number in inputs], values[output].shape)
    if problem:
        raise GraphError(problem)


def _shape_problem(kind: int, node: _Table, given: list[tuple[int, ...]], result: tuple[int, ...]) -> str | None:
    """What is wrong with the shapes of a node's inputs and output; they are XNNPACK's to check for pooling and such."""
    first = given[0]
    if kind in _ELEMENTWISE:
        if _broadcast(given) != result:
            return "an element-wise operation is of other shapes than its output"
    elif kind == _MATRIX_PRODUCT:
        second = given[1]
        if len(first) < 2 or len(second) != len(first) or first[-1] != second[-2]:
            return "the shapes of a matrix product do not fit"
        if first[:-2] != second[:-2] or result != (*first[:-1], second[-1]):
            return "the shapes of a matrix product do not fit"
    elif kind == _TRANSPOSE:
        order = node.numbers(1)
        if node.number(0) != len(first) or sorted(order) != list(range(len(first))):
            return "a transpose is not a permutation"
        if result != tuple(first[axis] for axis in order):
            return "a transpose is of another shape than its output"
    elif kind == _RESHAPE:
        shape = node.numbers(1)  # 0 stands for whatever is left
        fits = len(shape) == len(result) and all(a in (0, b) for a, b in zip(shape, result, strict=True))
        if node.number(0) != len(shape) or not fits or shape.count(0) > 1 or math.prod(first) != math.prod(result):
            return "a reshape is to another shape than its output"
    elif kind in _CONCATENATIONS:
        axis = node.number(0)
        if any(len(shape) != len(result) for shape in given) or axis >= len(result):
            return "the shapes of a concatenation do not fit"
        along = sum(shape[axis] for shape in given)
        if any((*shape[:axis], along, *shape[axis + 1 :]) != result for shape in given):
            return "the shapes of a concatenation do not fit"
    elif kind == _SLICE:
        offsets, sizes = node.numbers(1), node.numbers(2)
        if not node.number(0) == len(offsets) == len(sizes) == len(first) == len(result):
            return "a slice reaches beyond its input"
        if any(offset + size > extent for offset, size, extent in zip(offsets, sizes, first, strict=True)):
            return "a slice reaches beyond its input"
    elif kind == _FULLY_CONNECTED:
        weight, *bias = given[1:]
        if len(weight) != 2 or first[-1:] != weight[1:] or result != (*first[:-1], weight[0]):
            return "a layer's weights do not fit its input or output"
        if any(shape != weight[:1] for shape in bias):
            return "a layer's bias does not fit its weights"
    elif kind in _CONVOLUTIONS:
        height, width, channels, per_group, groups = (node.number(field) for field in (4, 5, 10, 11, 12))
        depthwise = (1, height, width, channels * per_group * groups) if kind == _DEPTHWISE else None
        if given[1] not in ((groups * per_group, height, width, channels), depthwise):
            return "a convolution's weights do not fit its kernel"
        if (
            len(first) != 4
            or first[3] != groups * channels
            or any(shape != (groups * per_group,) for shape in given[2:])
        ):
            return "a convolution's weights do not fit its input"
    return None


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
