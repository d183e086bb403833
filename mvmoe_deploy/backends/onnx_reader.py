"""Reads the parts of ``.onnx`` files that the graph check needs, without the onnx or protobuf packages.

The format is the protobuf wire format of onnx/onnx.proto. The reader knows only the fields that this project's
exporter writes. A field of another number or wire type is an error, and so is a single value given twice: a parser
that accepted more could read a file differently from the engine.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import Any

import msgspec

from mvmoe_deploy.backends import GraphError

# msgspec structs take less time to create than dataclasses and named tuples, especially at a cold start.

FLOAT, UINT8, INT8, INT32, INT64, FLOAT16, UINT4, INT4 = 1, 2, 3, 6, 7, 10, 21, 22
"""The values of TensorProto.DataType that a graph may use."""

BITS = {FLOAT: 32, UINT8: 8, INT8: 8, INT32: 32, INT64: 64, FLOAT16: 16, UINT4: 4, INT4: 4}
NAMES = {FLOAT: "float32", UINT8: "uint8", INT8: "int8", INT32: "int32", INT64: "int64", FLOAT16: "float16"}
"""The names that manifests use for these types."""

MAX_GRAPH_BYTES = 8 << 20
"""Largest graph: weights of 1 kB and more lie in files of their own, and the graph of a 12-layer trunk takes 50 kB."""

MAX_NODES = 8192
MAX_RANK = 8

Attribute = int | float | bytes | tuple[int, ...]
Field = tuple[int, Any]
"""The tag (field number << 3 | wire type) and the value: a number or bytes, depending on the wire type."""

# as in Field
_MODEL_IGNORED = {0x08, 0x12, 0x1A, 0x22, 0x28, 0x32}  # versions, producer, domain, doc_string
_GRAPH_IGNORED = {0x12, 0x52}  # name, doc_string


class Node(msgspec.Struct, gc=False):
    """One operation. ``op`` is the operator, prefixed by its domain and a colon unless the domain is ONNX's own."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Attribute]


class Type(msgspec.Struct, gc=False):
    """A declared type: TensorProto.DataType and shape; a dynamic dimension is None."""

    dtype: int
    shape: tuple[int | None, ...]


class Constant(msgspec.Struct, gc=False):
    """An initialiser, stored in the graph (``raw``) or as ``length`` bytes of a file from ``offset`` on."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    raw: bytes
    location: str | None
    offset: int
    length: int


class Graph(msgspec.Struct, gc=False):
    """A file's graph; everything is in the file's order.

    Attributes:
        opset: version of ONNX's own operators.
        nodes: the operations.
        constants: the initialisers.
        inputs: declared type of each input by name, including initialisers that may be replaced.
        outputs: declared type of each output by name.
        values: declared type of each other value by name, where the file declares it.
    """

    opset: int
    nodes: list[Node]
    constants: list[Constant]
    inputs: dict[str, Type]
    outputs: dict[str, Type]
    values: dict[str, Type]


def read_graph(data: bytes) -> Graph:
    """Reads a file's graph.

    Raises:
        GraphError: the file is not an ONNX file, is damaged, or has something that no export of this project has.
    """
    if len(data) > MAX_GRAPH_BYTES:
        raise GraphError(f"is larger than {MAX_GRAPH_BYTES >> 20} MB")
    try:
        return _model(data)
    except (IndexError, struct.error, UnicodeDecodeError):
        raise GraphError("not an ONNX file, or damaged") from None


def _model(data: bytes) -> Graph:
    graph: bytes | None = None
    opsets: dict[str, int] = {}
    for tag, value in _fields(data):
        if tag == 0x3A:
            if graph is not None:
                raise GraphError("it holds two graphs")
            graph = value
        elif tag == 0x42:
            domain, version = _opset(value)
            if domain in opsets:
                raise GraphError("it asks for two versions of the same operators")
            opsets[domain] = version
        elif tag not in _MODEL_IGNORED:
            raise _unknown("the file", tag)
    if graph is None or "" not in opsets:
        raise GraphError("not an ONNX file, or damaged")
    return _graph(graph, opsets[""])


def _graph(data: bytes, opset: int) -> Graph:
    result = Graph(opset=opset, nodes=[], constants=[], inputs={}, outputs={}, values={})
    declared = {0x5A: result.inputs, 0x62: result.outputs, 0x6A: result.values}
    for tag, value in _fields(data):
        if tag == 0x0A:
            result.nodes.append(_node(value))
        elif tag == 0x2A:
            result.constants.append(_constant(value))
        elif tag in declared:
            name, kind = _value(value)
            if name in declared[tag]:
                raise GraphError(f"value {name!r} is declared twice")
            declared[tag][name] = kind
        elif tag not in _GRAPH_IGNORED:
            raise _unknown("the graph", tag)
        if len(result.nodes) > MAX_NODES or len(result.constants) > MAX_NODES:
            raise GraphError(f"it has more than {MAX_NODES} operations or constants")
    return result


def _node(data: bytes) -> Node:
    inputs: list[str] = []
    outputs: list[str] = []
    attributes: dict[str, Attribute] = {}
    op = domain = ""
    for tag, value in _fields(data):
        if tag == 0x0A:
            inputs.append(value.decode())
        elif tag == 0x12:
            outputs.append(value.decode())
        elif tag == 0x2A:
            name, attribute = _attribute(value)
            if name in attributes:
                raise GraphError(f"{op or 'an operation'} has two attributes {name!r}")
            attributes[name] = attribute
        elif tag == 0x22 and not op:
            op = value.decode()
        elif tag == 0x3A and not domain:
            domain = value.decode()
        elif tag not in (0x1A, 0x32):  # name, doc_string
            raise _unknown(op or "an operation", tag)
    return Node(f"{domain}:{op}" if domain not in ("", "ai.onnx") else op, inputs, outputs, attributes)


@functools.lru_cache(1024)
def _attribute(data: bytes) -> tuple[str, Attribute]:
    """Reads an attribute's name and value; cached, since a graph repeats a few attributes many times."""
    name, kind = "", 0
    single: Attribute | None = None
    integers: list[int] = []
    for tag, value in _fields(data):
        if tag == 0x0A and not name:
            name = value.decode()
        elif tag == 0xA0 and not kind:  # type, field 20
            kind = value
        elif tag in (0x15, 0x18, 0x22) and single is None:
            single = struct.unpack("<f", value)[0] if tag == 0x15 else value
        elif tag == 0x40:
            integers.append(_signed(value))
        elif tag == 0x42:
            integers += _packed(value)
        elif tag != 0x6A:  # doc_string
            raise _unknown(f"attribute {name!r}", tag)
    # AttributeProto.AttributeType: 1 float, 2 integer, 3 string, 7 integers
    if kind == 7 and single is None:
        return name, tuple(integers)
    expected: type[float] | type[bytes] | None = {1: float, 2: int, 3: bytes}.get(kind)
    if integers or expected is None or (single is not None and type(single) is not expected):
        raise GraphError(f"attribute {name!r} is of a type that no export of this project has")
    if single is None:  # protobuf omits values that are zero
        return name, expected()
    return name, _signed(single) if isinstance(single, int) else single


def _constant(data: bytes) -> Constant:
    shape: list[int] = []
    name, dtype, raw, external = "", 0, None, False
    entries: dict[str, str] = {}
    for tag, value in _fields(data):
        if tag == 0x08:
            shape.append(value)
        elif tag == 0x0A:
            shape += _packed(value)
        elif tag == 0x10 and not dtype:
            dtype = value
        elif tag == 0x42 and not name:
            name = value.decode()
        elif tag == 0x4A and raw is None:
            raw = value
        elif tag == 0x6A:
            key, text = _entry(value)
            if key in entries:
                raise GraphError(f"constant {name!r} has two {key}s")
            entries[key] = text
        elif tag == 0x70 and value in (0, 1):
            external = value == 1
        elif tag != 0x62:  # doc_string
            raise _unknown(f"constant {name!r}", tag)
    if dtype not in BITS or len(shape) > MAX_RANK or not all(0 < extent < 1 << 31 for extent in shape):
        raise GraphError(f"constant {name!r} has a type or shape that no export of this project has")
    size = (math.prod(shape) * BITS[dtype] + 7) // 8
    if not external:
        if entries or raw is None or len(raw) != size:
            raise GraphError(f"constant {name!r} has not as many bytes as its shape says")
        return Constant(name=name, dtype=dtype, shape=tuple(shape), raw=raw, location=None, offset=0, length=size)
    if raw is not None or entries.keys() != {"location", "offset", "length"}:
        raise GraphError(f"constant {name!r} does not say where it lies")
    offset, length = (int(n) if n.isascii() and n.isdigit() else -1 for n in (entries["offset"], entries["length"]))
    if offset < 0 or length != size:
        raise GraphError(f"constant {name!r} has not as many bytes as its shape says")
    return Constant(
        name=name, dtype=dtype, shape=tuple(shape), raw=b"", location=entries["location"], offset=offset, length=length
    )


@functools.lru_cache(1024)
def _entry(data: bytes) -> tuple[str, str]:
    """A StringStringEntryProto."""
    texts = {0x0A: "", 0x12: ""}
    for tag, value in _fields(data):
        if tag not in texts or texts[tag]:
            raise _unknown("an entry", tag)
        texts[tag] = value.decode()
    if len(texts[0x12]) > 1024:
        raise GraphError("an entry is longer than any that an export has")
    return texts[0x0A], texts[0x12]


def _opset(data: bytes) -> tuple[str, int]:
    domain, version = "", 0
    for tag, value in _fields(data):
        if tag == 0x0A and not domain:
            domain = value.decode()
        elif tag == 0x10 and not version:
            version = value
        else:
            raise _unknown("the operators' version", tag)
    return "" if domain == "ai.onnx" else domain, version


def _value(data: bytes) -> tuple[str, Type]:
    name, kind = "", None
    for tag, value in _fields(data):
        if tag == 0x0A and not name:
            name = value.decode()
        elif tag == 0x12 and kind is None:
            kind = _type(value)
        elif tag != 0x1A:  # doc_string
            raise _unknown(f"value {name!r}", tag)
    if kind is None:
        raise GraphError(f"value {name!r} is declared without a type")
    return name, kind


@functools.lru_cache(1024)
def _type(data: bytes) -> Type:
    """Reads a TypeProto, which must be that of a tensor."""
    dtype, shape = 0, None
    for tag, tensor in _fields(data):
        if tag != 0x0A or dtype:
            raise GraphError("a value is not a tensor")
        for inner, value in _fields(tensor):
            if inner == 0x08 and not dtype:
                dtype = value
            elif inner == 0x12 and shape is None:
                shape = [_dimension(field, extent) for field, extent in _fields(value)]
            else:
                raise _unknown("a type", inner)
    if dtype not in BITS or shape is None or len(shape) > MAX_RANK:
        raise GraphError("a value has a type or shape that no export of this project has")
    return Type(dtype, tuple(shape))


def _dimension(tag: int, data: bytes) -> int | None:
    """Reads a dimension: a number, or None for a dynamic one."""
    if tag != 0x0A:
        raise _unknown("a shape", tag)
    fields = _fields(data)
    if len(fields) > 1 or not {0x08, 0x12}.issuperset(field for field, _ in fields):  # a number or a name
        raise _unknown("a shape", tag)
    return int(fields[0][1]) if fields and fields[0][0] == 0x08 else None


def _fields(data: bytes) -> list[Field]:
    """Splits a message into its fields."""
    result: list[Field] = []
    append = result.append
    place, end = 0, len(data)
    while place < end:
        tag = data[place]
        place += 1
        kind = tag & 7
        if tag >= 0x80:  # the only known field above 15: an attribute's type, number 20, whose tag is A0 01
            if tag != 0xA0 or data[place] != 1:
                raise GraphError("it has a field that no export of this project has")
            place += 1
        if kind == 2 or kind == 0:
            number = data[place]
            place += 1
            if number >= 0x80:
                number, place = _varint(data, place - 1)
            if kind == 0:
                append((tag, number))
                continue
        elif kind == 5:
            number = 4
        else:
            raise GraphError("not an ONNX file, or damaged")
        stop = place + number
        if stop > end:
            raise GraphError("not an ONNX file, or damaged")
        append((tag, data[place:stop]))
        place = stop
    return result


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Reads an unsigned 64-bit number of several bytes; returns it and the position behind it."""
    number = shift = 0
    while True:
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    if number >= 1 << 64 or shift > 70:
        raise GraphError("not an ONNX file, or damaged")
    return number, place


def _packed(data: bytes) -> list[int]:
    """Reads packed integers, which follow one another without tags."""
    result, place = [], 0
    while place < len(data):
        number, place = _varint(data, place)
        result.append(_signed(number))
    return result


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _unknown(where: str, tag: int) -> GraphError:
    return GraphError(f"{where[:80]} has a field ({tag >> 3}) that no export of this project has")
