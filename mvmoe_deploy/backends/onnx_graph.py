"""Checks an ONNX graph before onnxruntime sees it.

onnxruntime trusts what it loads. A division of integers, a convolution without groups or an attention without heads
ends the process; a loop or a large enough constant takes all its time or memory. This check follows one image through
the graph and computes every type, every shape and every integer that shapes depend on. It refuses what no export of
this project has: other operators, attributes out of bounds, control flow, weights outside the bundle's listed files,
inputs and outputs that differ from the manifest's, more work or memory than a model for a device needs.

It imports neither onnx nor torch and takes about a millisecond for a trunk (:mod:`.onnx_reader` does half of that).
A bundle that the caller trusts, or whose digest is pinned, is loaded without it.
"""

from __future__ import annotations

import math
import operator
import posixpath
import struct
from collections.abc import Callable, Mapping, Sequence

import msgspec

from mvmoe_deploy.backends import GraphError
from mvmoe_deploy.backends.onnx_reader import (
    BITS,
    FLOAT,
    FLOAT16,
    INT4,
    INT8,
    INT32,
    INT64,
    MAX_RANK,
    NAMES,
    UINT4,
    UINT8,
    Constant,
    Graph,
    Node,
    Type,
    read_graph,
)
from mvmoe_deploy.bundle import Piece, TensorSpec

OPSETS = range(17, 25)
MAX_MEMORY = 1 << 30
"""Most bytes of intermediate values at any time, for one image; a ViT of 12 layers at 224 pixels needs 10 MB."""

MAX_WORK = 1 << 38
"""Most multiply-adds and computed elements for one image; a ViT-Large at 384 pixels needs 2³⁷."""

MAX_SIDE = 4096
"""Largest height and width that a graph may resize to."""

MAX_KNOWN = 256
"""Most integers of a tensor whose values are followed, such as shapes, axes and indices."""

LIMIT = 1 << 31
"""Bound of extents and of integers that are computed: even summed over 2³¹ of them, they stay within 64 bits."""

BOOL = 9
"""TensorProto.DataType of what a comparison gives; no constant, input or output of a graph has it."""

SIZES = {**BITS, BOOL: 8}


class Value(msgspec.Struct, gc=False):
    """A tensor in the graph.

    Attributes:
        dtype: TensorProto.DataType.
        shape: for one image.
        known: its integers, where they are known before it runs: shapes may depend on them.
        span: smallest and largest that its integers can be, where only that is known: what a router chooses.
    """

    dtype: int
    shape: tuple[int, ...]
    known: tuple[int, ...] | None = None
    span: tuple[int, int] | None = None

    def moved(self, shape: tuple[int, ...], known: tuple[int, ...] | None = None) -> Value:
        """Some or all of its elements in another shape."""
        return Value(self.dtype, shape, known, self.span if self.known is None else self.bounds())

    def bounds(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        if self.known:
            return min(self.known), max(self.known)
        if self.span is None:
            raise GraphError("depends on integers without known bounds")
        return self.span


class Operation(msgspec.Struct, gc=False):
    """A node with its inputs looked up; omitted inputs are None."""

    node: Node
    inputs: list[Value | None]

    def input(self, index: int) -> Value:
        value = self.optional(index)
        if value is None:
            raise GraphError(f"lacks input {index}")
        return value

    def optional(self, index: int) -> Value | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def known(self, index: int) -> tuple[int, ...]:
        """The values of an integer input on which shapes depend."""
        value = self.input(index)
        if value.known is None:
            raise GraphError("depends on integers that are not known before it runs")
        return value.known

    def number_input(self, index: int) -> Value:
        """An input of floats, or of integers that are bounded."""
        value = self.input(index)
        if value.dtype == INT64:
            value.bounds()
            return value
        return self.float_input(index)

    def float_input(self, index: int) -> Value:
        value = self.input(index)
        if value.dtype not in (FLOAT, FLOAT16):
            raise GraphError("computes with integers")
        return value

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """An attribute within bounds, both included."""
        value = self.node.attributes.get(name, default)
        if not isinstance(value, int) or not low <= value <= high:
            raise GraphError(f"{name} is {value!r}, expected {low} to {high}")
        return value

    def integers(self, name: str, default: Sequence[int] | None, low: int, high: int) -> tuple[int, ...]:
        value = self.node.attributes.get(name, default)
        if not isinstance(value, (tuple, list)) or not all(low <= each <= high for each in value):
            raise GraphError(f"{name} is {str(value)[:40]}, expected values of {low} to {high}")
        return tuple(value)

    def number(self, name: str, default: float, low: float = -1e6, high: float = 1e6) -> float:
        value = self.node.attributes.get(name, default)
        if not isinstance(value, float) or not low <= value <= high:  # NaN is not
            raise GraphError(f"{name} is {value!r}, expected {low:g} to {high:g}")
        return value

    def word(self, name: str, *allowed: bytes) -> bytes:
        value = self.node.attributes.get(name, allowed[0])
        if value not in allowed:
            raise GraphError(f"{name} is {value!r}, expected {allowed[0].decode()}")
        return allowed[allowed.index(value)]

    def axis(self, rank: int, default: int, name: str = "axis") -> int:
        return _axis(self.integer(name, default, -rank, rank - 1), rank)


Result = tuple[list[Value], int]
"""The outputs, and the work in addition to one step per element of the outputs."""


def check_graph(data: bytes, piece: Piece, sizes: Mapping[str, int]) -> None:
    """Checks a piece's ``.onnx`` file.

    Args:
        data: the file's content.
        piece: the piece's manifest entry.
        sizes: size of each of the bundle's files in bytes, by path.

    Raises:
        GraphError: the graph is damaged, or has something that no export of this project has; the message says what.
    """
    if piece.graph.endswith(".ort"):
        raise GraphError("onnxruntime takes it for its own format, which cannot be checked")
    graph = read_graph(data)
    if graph.opset not in OPSETS:
        raise GraphError(f"operators of version {graph.opset}, expected {OPSETS[0]} to {OPSETS[-1]}")
    values = _constants(graph, piece, sizes)
    _check_inputs(graph, piece, values)
    _follow(graph, values)
    _check_outputs(graph, piece.outputs, values)


def _constants(graph: Graph, piece: Piece, sizes: Mapping[str, int]) -> dict[str, Value]:
    folder = posixpath.dirname(piece.graph)
    values: dict[str, Value] = {}
    outside = 0
    for constant in graph.constants:
        if constant.name in values or not constant.name:
            raise GraphError(f"constant {constant.name!r} appears twice, or has no name")
        if constant.location is not None:
            path = posixpath.join(folder, constant.location)
            # onnxruntime takes a location with "*" for an address in memory
            if path not in piece.files or "*" in path or path not in sizes:
                raise GraphError(f"constant {constant.name!r} lies in {path!r}, which manifest.json does not list")
            if constant.offset + constant.length > sizes[path]:
                raise GraphError(f"constant {constant.name!r} reaches beyond the end of {path}")
            outside += constant.length
        values[constant.name] = Value(constant.dtype, constant.shape, _integers(constant))
    if outside > sum(sizes[path] for path in {*piece.files} - {piece.graph}):
        raise GraphError("its constants are larger than the files they lie in")
    return values


def _integers(constant: Constant) -> tuple[int, ...] | None:
    if constant.dtype != INT64 or constant.location is not None or not 0 < constant.length <= 8 * MAX_KNOWN:
        return None
    return struct.unpack(f"<{constant.length // 8}q", constant.raw)


def _check_inputs(graph: Graph, piece: Piece, values: dict[str, Value]) -> None:
    specs = [*piece.inputs, *(TensorSpec(weight.name, list(weight.shape), weight.dtype) for weight in piece.weights)]
    names = [name for name in graph.inputs if name not in values]  # a constant among them may be replaced
    if names != [spec.name for spec in specs]:
        raise GraphError(f"takes inputs {names}, manifest.json says {[spec.name for spec in specs]}")
    for spec in specs:
        _check_declared("input", spec, graph.inputs[spec.name])
        values[spec.name] = Value(graph.inputs[spec.name].dtype, _one_image(spec))
    for name, declared in graph.inputs.items():
        if declared.dtype != values[name].dtype or not _fits(declared, values[name].shape):
            raise GraphError(f"constant {name!r} is declared otherwise than it is")


def _check_outputs(graph: Graph, specs: list[TensorSpec], values: Mapping[str, Value]) -> None:
    if list(graph.outputs) != [spec.name for spec in specs]:
        raise GraphError(f"has outputs {list(graph.outputs)}, manifest.json says {[spec.name for spec in specs]}")
    for spec in specs:
        _check_declared("output", spec, graph.outputs[spec.name])
        value = values.get(spec.name)
        if value is None:
            raise GraphError(f"output {spec.name!r} is not computed")
        if value.shape != _one_image(spec) or NAMES.get(value.dtype) != spec.dtype:
            raise GraphError(
                f"computes {spec.name} as {list(value.shape)} of {NAMES.get(value.dtype)} for one image, "
                f"manifest.json says {spec.shape} of {spec.dtype}"
            )


def _check_declared(what: str, spec: TensorSpec, declared: Type) -> None:
    shape = [None if isinstance(extent, str) else extent for extent in spec.shape]
    if NAMES.get(declared.dtype) != spec.dtype or list(declared.shape) != shape:
        raise GraphError(
            f"declares {what} {spec.name} as {list(declared.shape)} of {NAMES.get(declared.dtype)}, "
            f"manifest.json says {spec.shape} of {spec.dtype}"
        )


def _one_image(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(1 if isinstance(extent, str) else extent for extent in spec.shape)


def _fits(declared: Type, shape: tuple[int, ...]) -> bool:
    return len(declared.shape) == len(shape) and all(a in (None, b) for a, b in zip(declared.shape, shape, strict=True))


def _follow(graph: Graph, values: dict[str, Value]) -> None:
    """Computes the type and shape of every value, and the time and memory that they take."""
    last_use = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    last_use |= dict.fromkeys(graph.outputs, len(graph.nodes))
    leaving: dict[int, int] = {}  # bytes that are freed after each node
    alive = work = 0
    for index, node in enumerate(graph.nodes):
        rule = RULES.get(node.op)
        if rule is None:
            raise GraphError(f"uses the operator {node.op[:60]!r}, which graphs of bundles may not have")
        infer, least, most, attributes = rule
        try:
            if not least <= len(node.inputs) <= most or not attributes.issuperset(node.attributes):
                extra = node.attributes.keys() - attributes
                raise GraphError(f"has an attribute {min(extra)[:60]!r}" if extra else f"has {len(node.inputs)} inputs")
            inputs = [values[name] if name else None for name in node.inputs]
            outputs, more = infer(Operation(node, inputs))
        except GraphError as error:
            raise GraphError(f"{node.op} ({', '.join(node.outputs)[:80]}): {error}") from None
        except KeyError as error:
            raise GraphError(f"{node.op} reads {error.args[0]!r}, which is not computed before it") from None
        if len(node.outputs) != len(outputs):
            raise GraphError(f"{node.op} ({', '.join(node.outputs)[:80]}): has {len(node.outputs)} outputs")
        for name, value in zip(node.outputs, outputs, strict=True):
            if not name or name in values:
                raise GraphError(f"{node.op} computes {name!r}, which is there already")
            if len(value.shape) > MAX_RANK or not all(0 < extent < LIMIT for extent in value.shape):
                raise GraphError(f"{node.op} computes {name!r} of shape {list(value.shape)}")
            declared = graph.values.get(name)
            if declared is not None and (declared.dtype != value.dtype or not _fits(declared, value.shape)):
                raise GraphError(f"{name!r} is declared otherwise than it is computed")
            values[name] = value
            elements = math.prod(value.shape)
            size = elements * SIZES[value.dtype] // 8
            work += elements
            alive += size
            gone = last_use.get(name, index)
            leaving[gone] = leaving.get(gone, 0) + size
        work += more
        if work > MAX_WORK:
            raise GraphError(f"takes more than 2^{MAX_WORK.bit_length() - 1} multiply-adds for one image")
        if alive > MAX_MEMORY:
            raise GraphError(f"takes more than {MAX_MEMORY >> 20} MB for one image")
        alive -= leaving.pop(index, 0)


# Rules: the outputs that an operator computes from its inputs


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise GraphError(f"axis {axis} of a tensor of rank {rank}")
    return axis % rank


def _axes(axes: Sequence[int], rank: int) -> list[int]:
    result = [_axis(axis, rank) for axis in axes]
    if len(set(result)) != len(result) or not result:
        raise GraphError("names an axis twice, or none")
    return result


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    if len(shapes) == 2 and shapes[0] == shapes[1]:
        return shapes[0]
    rank = max(map(len, shapes))
    result = [1] * rank
    for shape in shapes:
        for place, extent in enumerate(shape, rank - len(shape)):
            if extent != 1:
                if result[place] not in (1, extent):
                    raise GraphError(f"shapes {' and '.join(str(list(each)) for each in shapes)} do not fit")
                result[place] = extent
    return tuple(result)


def _same(values: Sequence[Value]) -> int:
    """The type that all values have."""
    dtype = values[0].dtype
    for value in values:
        if value.dtype != dtype:
            raise GraphError("mixes types")
    return dtype


def _require(fits: bool, what: str = "shapes do not fit") -> None:
    if not fits:
        raise GraphError(what)


def _activation(x: Operation) -> Result:
    for name in x.node.attributes:
        if name == "approximate":
            x.word(name, b"none", b"tanh")
        else:
            x.number(name, 0.0)
    value = x.float_input(0)
    return [Value(value.dtype, value.shape)], 8 * math.prod(value.shape)


def _identity(x: Operation) -> Result:
    return [x.input(0)], 0


def _clip(x: Operation) -> Result:
    value = x.float_input(0)
    for index in (1, 2):
        bound = x.optional(index)
        _require(bound is None or (bound.shape == () and bound.dtype == value.dtype))
    return [Value(value.dtype, value.shape)], 0


def _binary(x: Operation) -> Result:
    values = [x.float_input(0), x.float_input(1)]
    return [Value(_same(values), _broadcast([value.shape for value in values]))], 0


def _arithmetic(x: Operation) -> Result:
    """Of floats, or of integers that stay within bounds."""
    a, b = x.number_input(0), x.number_input(1)
    shape, dtype = _broadcast([a.shape, b.shape]), _same([a, b])
    if dtype != INT64:
        return [Value(dtype, shape)], 0
    combine = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul}[x.node.op]
    return [_bounded(shape, [combine(one, other) for one in a.bounds() for other in b.bounds()])], 0


def _bounded(shape: tuple[int, ...], ends: Sequence[int]) -> Value:
    """Integers that lie between the least and the greatest of ``ends``."""
    low, high = min(ends), max(ends)
    _require(low > -LIMIT and high < LIMIT, "computes integers that are too large")
    return Value(INT64, shape, None, (low, high))


def _equal(x: Operation) -> Result:
    values = [x.input(0), x.input(1)]
    _require(_same(values) in (INT64, FLOAT), "compares neither integers nor floats")
    return [Value(BOOL, _broadcast([value.shape for value in values]))], 0


def _cumsum(x: Operation) -> Result:
    data, places = x.number_input(0), x.known(1)
    x.integer("exclusive", 0, 0, 1), x.integer("reverse", 0, 0, 1)
    _require(x.input(1).shape in ((), (1,)))
    extent = data.shape[_axis(places[0], len(data.shape))]
    if data.dtype != INT64:
        return [Value(data.dtype, data.shape)], 0
    return [_bounded(data.shape, [0, *data.bounds(), *(end * extent for end in data.bounds())])], 0


def _prelu(x: Operation) -> Result:
    value = x.float_input(0)
    _require(_broadcast([value.shape, x.float_input(1).shape]) == value.shape)
    return [Value(_same([value, x.float_input(1)]), value.shape)], 0


def _cast(x: Operation) -> Result:
    value, to = x.input(0), x.integer("to", 0, 1, 22)
    _require(to in BITS and to not in (INT4, UINT4) and value.dtype not in (INT4, UINT4), f"casts to type {to}")
    if to != INT64:
        return [Value(to, value.shape)], 0
    return [Value(to, value.shape, value.known, (0, 1) if value.dtype == BOOL else value.span)], 0


def _softmax(x: Operation) -> Result:
    value = x.float_input(0)
    x.axis(len(value.shape), -1)
    return [Value(value.dtype, value.shape)], 8 * math.prod(value.shape)


def _matmul(x: Operation) -> Result:
    a, b = x.float_input(0), x.float_input(1)
    shape, work = _product(a.shape, b.shape)
    return [Value(_same([a, b]), shape)], work


def _product(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    _require(len(a) >= 2 and len(b) >= 2 and a[-1] == b[-2])
    shape = (*_broadcast([a[:-2], b[:-2]]), a[-2], b[-1])
    return shape, math.prod(shape) * a[-1]


def _gemm(x: Operation) -> Result:
    a, b, c = x.float_input(0), x.float_input(1), x.optional(2)
    x.number("alpha", 1.0), x.number("beta", 1.0)
    _require(len(a.shape) == len(b.shape) == 2)
    rows, inner = a.shape[::-1] if x.integer("transA", 0, 0, 1) else a.shape
    also, columns = b.shape[::-1] if x.integer("transB", 0, 0, 1) else b.shape
    _require(inner == also and (c is None or _broadcast([(rows, columns), c.shape]) == (rows, columns)))
    return [Value(_same([a, b, *([c] if c else [])]), (rows, columns))], rows * inner * columns


def _windows(x: Operation, extents: tuple[int, ...], kernel: tuple[int, ...], ceil: bool = False) -> tuple[int, ...]:
    """Extents of a convolution's or pooling's output."""
    rank = len(extents)
    strides = x.integers("strides", [1] * rank, 1, 4096)
    dilations = x.integers("dilations", [1] * rank, 1, 4096)
    reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    pads = x.integers("pads", [0] * 2 * rank, 0, max(reach))
    x.word("auto_pad", b"NOTSET")
    _require(len(strides) == len(dilations) == rank and len(pads) == 2 * rank)
    result = []
    for i in range(rank):
        room = extents[i] + pads[i] + pads[rank + i] - reach[i]
        _require(room >= 0 and pads[i] < reach[i] + 1 and pads[rank + i] < reach[i] + 1, "pads do not fit the kernel")
        result.append((-(-room // strides[i]) if ceil else room // strides[i]) + 1)
    return tuple(result)


def _conv(x: Operation, data: Value, weight: Value) -> tuple[tuple[int, ...], int]:
    """Shape and work of a convolution."""
    _require(len(data.shape) == len(weight.shape) and 3 <= len(data.shape) <= 5)
    group = x.integer("group", 1, 1, data.shape[1])
    kernel = x.integers("kernel_shape", weight.shape[2:], 1, 4096)
    _require(kernel == weight.shape[2:] and data.shape[1] == group * weight.shape[1] and weight.shape[0] % group == 0)
    shape = (data.shape[0], weight.shape[0], *_windows(x, data.shape[2:], kernel))
    patches = 4 * data.shape[1] * math.prod(kernel) * math.prod(shape[2:])
    _require(patches <= MAX_MEMORY, "needs too much memory")
    return shape, math.prod(shape) * weight.shape[1] * math.prod(kernel)


def _convolution(x: Operation) -> Result:
    data, weight, bias = x.float_input(0), x.float_input(1), x.optional(2)
    shape, work = _conv(x, data, weight)
    _require(bias is None or bias.shape == weight.shape[:1])
    return [Value(_same([data, weight, *([bias] if bias else [])]), shape)], work


def _pool(x: Operation) -> Result:
    data = x.float_input(0)
    _require(3 <= len(data.shape) <= 5)
    kernel = x.integers("kernel_shape", None, 1, 4096)
    _require(len(kernel) == len(data.shape) - 2)
    x.integer("count_include_pad", 0, 0, 1), x.integer("storage_order", 0, 0, 0)
    shape = (*data.shape[:2], *_windows(x, data.shape[2:], kernel, bool(x.integer("ceil_mode", 0, 0, 1))))
    return [Value(data.dtype, shape)], math.prod(shape) * math.prod(kernel)


def _global_pool(x: Operation) -> Result:
    data = x.float_input(0)
    _require(len(data.shape) >= 3)
    return [Value(data.dtype, (*data.shape[:2], *(1 for _ in data.shape[2:])))], math.prod(data.shape)


def _channel_norm(x: Operation) -> Result:
    """Batch, instance and group normalisation: every further input has one value per channel."""
    data = x.float_input(0)
    x.number("epsilon", 1e-5, 0, 1), x.number("momentum", 0.9, 0, 1), x.integer("training_mode", 0, 0, 0)
    x.integer("stash_type", 1, 1, 1)
    _require(len(data.shape) >= 2)
    if x.node.op == "GroupNormalization":
        _require(data.shape[1] % x.integer("num_groups", 0, 1, data.shape[1]) == 0, "groups do not divide the channels")
    rest = [x.float_input(index) for index in range(1, len(x.inputs))]
    _require(all(value.shape == data.shape[1:2] for value in rest))
    return [Value(_same([data, *rest]), data.shape)], 8 * math.prod(data.shape)


def _layer_norm(x: Operation) -> Result:
    data = x.float_input(0)
    axis = x.axis(len(data.shape), -1)
    x.number("epsilon", 1e-5, 0, 1), x.integer("stash_type", 1, 1, 1)
    rest = [x.float_input(index) for index in range(1, len(x.inputs)) if x.optional(index) is not None]
    _require(all(value.shape == data.shape[axis:] for value in rest))
    return [Value(_same([data, *rest]), data.shape)], 8 * math.prod(data.shape)


def _reduce(x: Operation) -> Result:
    data = x.number_input(0) if x.node.op == "ReduceSum" else x.float_input(0)
    x.integer("noop_with_empty_axes", 0, 0, 0)
    rank = len(data.shape)
    if "axes" in x.node.attributes:
        axes = _axes(x.integers("axes", None, -rank, rank - 1), rank)
    else:
        axes = _axes(x.known(1), rank) if x.optional(1) is not None else list(range(rank))
    keep = x.integer("keepdims", 1, 0, 1)
    shape = tuple(1 if i in axes else n for i, n in enumerate(data.shape) if keep or i not in axes)
    if data.dtype == INT64:
        count = math.prod(data.shape[axis] for axis in axes)
        return [_bounded(shape, [end * count for end in data.bounds()])], math.prod(data.shape)
    return [Value(data.dtype, shape)], math.prod(data.shape)


def _argmax(x: Operation) -> Result:
    data = x.float_input(0)
    axis = x.axis(len(data.shape), 0)
    x.integer("select_last_index", 0, 0, 1)
    keep = (1,) if x.integer("keepdims", 1, 0, 1) else ()
    shape = (*data.shape[:axis], *keep, *data.shape[axis + 1 :])
    return [_bounded(shape, [0, data.shape[axis] - 1])], math.prod(data.shape)


def _shape(x: Operation) -> Result:
    shape = x.input(0).shape
    start, end = x.integer("start", 0, -LIMIT, LIMIT), x.integer("end", len(shape), -LIMIT, LIMIT)
    return [_known(shape[start:end])], 0


def _known(integers: Sequence[int], shape: tuple[int, ...] | None = None) -> Value:
    """A tensor of known integers, one-dimensional unless ``shape`` says otherwise."""
    _require(0 < len(integers) <= MAX_KNOWN, f"has {len(integers)} integers")
    return Value(INT64, (len(integers),) if shape is None else shape, tuple(integers))


def _gather(x: Operation) -> Result:
    data, places = x.input(0), x.input(1)
    axis = x.axis(len(data.shape), 0)
    low, high = places.bounds()
    extent = data.shape[axis]
    _require(low >= -extent and high < extent, f"reads beyond the {extent} places of axis {axis}")
    shape = (*data.shape[:axis], *places.shape, *data.shape[axis + 1 :])
    if data.known is not None and len(data.shape) == 1 and places.known is not None:
        return [_known([data.known[index] for index in places.known], shape)], 0
    return [data.moved(shape)], 0


def _concat(x: Operation) -> Result:
    values = [x.input(index) for index in range(len(x.inputs))]
    rank = len(values[0].shape)
    axis = x.axis(rank, rank)  # it must be given
    rest = {value.shape[:axis] + value.shape[axis + 1 :] for value in values if len(value.shape) == rank}
    _require(len(rest) == 1 and all(len(value.shape) == rank for value in values))
    shape = list(values[0].shape)
    shape[axis] = sum(value.shape[axis] for value in values)
    if rank == 1 and all(value.known is not None for value in values):
        return [_known([integer for value in values for integer in value.known or ()])], 0
    return [Value(_same(values), tuple(shape))], 0  # integers of several origins are followed no further


def _split(x: Operation) -> Result:
    data = x.input(0)
    axis = x.axis(len(data.shape), 0)
    count = len(x.node.outputs)
    if x.optional(1) is not None:
        parts = list(x.known(1))
    else:
        size = -(-data.shape[axis] // x.integer("num_outputs", count, count, count))
        parts = [min(size, data.shape[axis] - i * size) for i in range(count)]
    _require(len(parts) == count and min(parts) > 0 and sum(parts) == data.shape[axis])
    return [data.moved((*data.shape[:axis], part, *data.shape[axis + 1 :])) for part in parts], 0


def _slice(x: Operation) -> Result:
    data = x.input(0)
    rank = len(data.shape)
    starts, ends = x.known(1), x.known(2)
    axes = _axes(x.known(3), rank) if x.optional(3) is not None else list(range(len(starts)))
    steps = x.known(4) if x.optional(4) is not None else (1,) * len(starts)
    _require(len(starts) == len(ends) == len(axes) == len(steps) <= rank)
    _require(all(step and abs(step) < LIMIT for step in steps), "has a step of 0, or one that is too large")
    shape = list(data.shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        shape[axis] = len(range(*slice(start, end, step).indices(data.shape[axis])))
    if data.known is not None and rank == 1:
        return [_known(data.known[slice(starts[0], ends[0], steps[0])])], 0
    return [data.moved(tuple(shape))], 0


def _reshape(x: Operation) -> Result:
    data, wanted = x.input(0), list(x.known(1))
    if not x.integer("allowzero", 0, 0, 1):
        _require(all(n or i < len(data.shape) for i, n in enumerate(wanted)))
        wanted = [n or data.shape[i] for i, n in enumerate(wanted)]
    total, rest = math.prod(data.shape), math.prod(n for n in wanted if n != -1)
    _require(all(n > 0 or n == -1 for n in wanted) and wanted.count(-1) <= 1 and rest <= LIMIT)
    if -1 in wanted:
        wanted[wanted.index(-1)] = total // rest
    _require(math.prod(wanted) == total)
    return [data.moved(tuple(wanted), data.known)], 0


def _transpose(x: Operation) -> Result:
    data = x.input(0)
    order = (
        x.integers("perm", range(len(data.shape))[::-1], 0, MAX_RANK)
        if "perm" in x.node.attributes
        else tuple(reversed(range(len(data.shape))))
    )
    _require(sorted(order) == list(range(len(data.shape))), "perm is not a permutation")
    return [data.moved(tuple(data.shape[axis] for axis in order))], 0


def _flatten(x: Operation) -> Result:
    data = x.input(0)
    axis = x.integer("axis", 1, 0, len(data.shape))
    return [data.moved((math.prod(data.shape[:axis]), math.prod(data.shape[axis:])))], 0


def _squeeze(x: Operation) -> Result:
    data = x.input(0)
    if x.optional(1) is None:  # one integer; of another tensor, a batch of one image would be squeezed as well
        _require(data.known is not None and data.shape == (1,), "names no axes")
        return [data.moved((), data.known)], 0
    axes = _axes(x.known(1), len(data.shape))
    _require(all(data.shape[axis] == 1 for axis in axes))
    return [data.moved(tuple(n for i, n in enumerate(data.shape) if i not in axes), data.known)], 0


def _unsqueeze(x: Operation) -> Result:
    data = x.input(0)
    rank = len(data.shape) + len(x.known(1))
    axes, rest = _axes(x.known(1), rank), iter(data.shape)
    return [data.moved(tuple(1 if i in axes else next(rest) for i in range(rank)), data.known)], 0


def _expand(x: Operation) -> Result:
    data, wanted = x.input(0), x.known(1)
    _require(all(0 < n < LIMIT for n in wanted))
    return [data.moved(_broadcast([data.shape, wanted]))], 0


def _pad(x: Operation) -> Result:
    data, pads = x.float_input(0), x.known(1)
    x.word("mode", b"constant")
    fill = x.optional(2)
    _require(fill is None or (fill.dtype == data.dtype and fill.shape in ((), (1,))))
    axes = _axes(x.known(3), len(data.shape)) if x.optional(3) is not None else list(range(len(data.shape)))
    _require(len(pads) == 2 * len(axes) and all(0 <= pad <= 4096 for pad in pads), "has pads that are too large")
    shape = list(data.shape)
    for index, axis in enumerate(axes):
        shape[axis] += pads[index] + pads[len(axes) + index]
    return [Value(data.dtype, tuple(shape))], 0


def _resize(x: Operation) -> Result:
    """Enlarges or shrinks images to a size that is written down; scales, which are floats, are not followed."""
    data = x.float_input(0)
    _require(x.optional(1) is None and x.optional(2) is None, "has a region or scales, expected sizes")
    sizes = x.known(3)
    mode = x.word("mode", b"nearest", b"linear")
    x.word("nearest_mode", b"round_prefer_floor", b"floor")
    x.word("coordinate_transformation_mode", b"half_pixel", b"align_corners", b"asymmetric", b"pytorch_half_pixel")
    x.word("keep_aspect_ratio_policy", b"stretch")
    x.integer("antialias", 0, 0, 0), x.integer("exclude_outside", 0, 0, 0)
    x.number("cubic_coeff_a", -0.75), x.number("extrapolation_value", 0.0)
    _require(len(data.shape) == len(sizes) == 4 and sizes[:2] == data.shape[:2])
    _require(all(1 <= size <= MAX_SIDE for size in sizes[2:]), f"makes an image of {list(sizes[2:])}")
    return [Value(data.dtype, sizes)], (8 if mode == b"linear" else 1) * math.prod(sizes)


def _topk(x: Operation) -> Result:
    data, count = x.float_input(0), x.known(1)
    axis = x.axis(len(data.shape), -1)
    x.integer("largest", 1, 0, 1), x.integer("sorted", 1, 0, 1)
    _require(x.input(1).shape == (1,) and 1 <= count[0] <= data.shape[axis])
    shape = (*data.shape[:axis], count[0], *data.shape[axis + 1 :])
    places = _bounded(shape, [0, data.shape[axis] - 1])
    return [Value(data.dtype, shape), places], 8 * math.prod(data.shape)


def _attention(x: Operation) -> Result:
    q, k, v, mask = x.float_input(0), x.float_input(1), x.float_input(2), x.optional(3)
    x.integer("is_causal", 0, 0, 1), x.integer("qk_matmul_output_mode", 0, 0, 0)
    x.number("scale", 1.0, 0), x.number("softcap", 0.0, 0), x.integer("softmax_precision", FLOAT, FLOAT, FLOAT)
    _require(len(q.shape) == len(k.shape) == len(v.shape) and q.shape[0] == k.shape[0] == v.shape[0])
    if len(q.shape) == 3:
        heads = x.integer("q_num_heads", 0, 1, q.shape[2])
        groups = x.integer("kv_num_heads", 0, 1, k.shape[2])
        _require(q.shape[2] % heads == 0 and k.shape[2] % groups == 0 and v.shape[2] % groups == 0)
        size, key, width = q.shape[2] // heads, k.shape[2] // groups, v.shape[2] // groups
    else:
        _require(len(q.shape) == 4 and not {"q_num_heads", "kv_num_heads"} & x.node.attributes.keys())
        heads, groups, size, key, width = q.shape[1], k.shape[1], q.shape[3], k.shape[3], v.shape[3]
    rows, columns = q.shape[-2], k.shape[-2]
    if len(q.shape) == 4:
        _require(v.shape[1] == groups)
    _require(size == key and heads % groups == 0 and v.shape[-2] == columns)
    scores = (q.shape[0], heads, rows, columns)
    _require(4 * math.prod(scores) <= MAX_MEMORY, "needs too much memory")
    _require(
        mask is None or (mask.dtype == q.dtype and len(mask.shape) >= 2 and _broadcast([scores, mask.shape]) == scores)
    )
    shape = (q.shape[0], heads, rows, width) if len(q.shape) == 4 else (q.shape[0], rows, heads * width)
    return [Value(_same([q, k, v]), shape)], math.prod(scores) * (size + width + 8)


# Quantised arithmetic


def _scales(x: Operation, data: Value, scale: Value, zero: Value | None) -> None:
    """Checks that there is one scale for the tensor, one per index of an axis, or one per block of indices."""
    block = x.integer("block_size", 0, 0, 65536)
    _require(zero is None or zero.shape == scale.shape)
    if scale.shape in ((), (1,)) and not block:
        return
    axis = x.axis(len(data.shape), 1)
    if not block:
        _require(scale.shape == data.shape[axis : axis + 1], "has not one scale per channel")
        return
    blocks = (*data.shape[:axis], -(-data.shape[axis] // block), *data.shape[axis + 1 :])
    _require(scale.shape == blocks, "has not one scale per block")


_WHOLE = (UINT8, INT8, UINT4, INT4)


def _quantise(x: Operation) -> Result:
    data, scale, zero = x.float_input(0), x.float_input(1), x.optional(2)
    x.integer("saturate", 1, 1, 1)
    _scales(x, data, scale, zero)
    to = x.integer("output_dtype", 0, 0, 22) or (zero.dtype if zero else UINT8)
    _require(to in _WHOLE and (zero is None or zero.dtype == to), f"quantises to type {to}")
    return [Value(to, data.shape)], 0


def _dequantise(x: Operation) -> Result:
    data, scale, zero = x.input(0), x.float_input(1), x.optional(2)
    _require(data.dtype in (*_WHOLE, INT32) and (zero is None or zero.dtype == data.dtype), "mixes types")
    x.integer("output_dtype", scale.dtype, scale.dtype, scale.dtype)
    _scales(x, data, scale, zero)
    return [Value(scale.dtype, data.shape)], 0


def _dynamic_quantise(x: Operation) -> Result:
    data = x.float_input(0)
    return [Value(UINT8, data.shape), Value(FLOAT, ()), Value(UINT8, ())], math.prod(data.shape)


def _matmul_integer(x: Operation) -> Result:
    a, b, a_zero, b_zero = x.input(0), x.input(1), x.optional(2), x.optional(3)
    _require(a.dtype in (UINT8, INT8) and b.dtype in (UINT8, INT8), "mixes types")
    _require(a_zero is None or (a_zero.dtype == a.dtype and a_zero.shape in ((), (1,))))
    _require(b_zero is None or (b_zero.dtype == b.dtype and b_zero.shape in ((), (1,), b.shape[-1:])))
    shape, work = _product(a.shape, b.shape)
    return [Value(INT32, shape)], work


def _conv_integer(x: Operation) -> Result:
    data, weight = x.input(0), x.input(1)
    _require(data.dtype in (UINT8, INT8) and weight.dtype in (UINT8, INT8), "mixes types")
    for index, of in ((2, data), (3, weight)):
        zero = x.optional(index)
        _require(zero is None or (zero.dtype == of.dtype and zero.shape in ((), (1,))))
    shape, work = _conv(x, data, weight)
    return [Value(INT32, shape)], work


def _matmul_to_float(x: Operation) -> Result:
    """onnxruntime's product of integers, which are scaled, and to which a bias is added, in the same step."""
    a, b, a_scale, b_scale = x.input(0), x.input(1), x.float_input(2), x.float_input(3)
    a_zero, b_zero, bias = x.optional(4), x.optional(5), x.optional(6)
    _require(a.dtype in (UINT8, INT8) and b.dtype in (UINT8, INT8), "mixes types")
    _require(a_scale.dtype == b_scale.dtype == FLOAT and len(b.shape) == 2 and a_scale.shape in ((), (1,)))
    columns = b.shape[1:]
    _require(b_scale.shape in ((), (1,), columns), "has not one scale per column")
    _require(a_zero is None or (a_zero.dtype == a.dtype and a_zero.shape in ((), (1,))))
    _require(b_zero is None or (b_zero.dtype == b.dtype and b_zero.shape in ((), (1,), columns)))
    _require(bias is None or (bias.dtype == FLOAT and bias.shape == columns))
    shape, work = _product(a.shape, b.shape)
    return [Value(FLOAT, shape)], work


def _matmul_nbits(x: Operation) -> Result:
    """onnxruntime's product with a weight of 4 or 8 bits, ``[columns, blocks, bytes of a block]``."""
    data, weight, scales, zero = x.float_input(0), x.input(1), x.float_input(2), x.optional(3)
    inner, columns = x.integer("K", 0, 1, 1 << 20), x.integer("N", 0, 1, 1 << 20)
    bits, block = x.integer("bits", 4, 4, 8), x.integer("block_size", 0, 16, 256)
    x.integer("accuracy_level", 0, 0, 4)
    _require(bits in (4, 8), f"has {bits} bits")
    _require(block & (block - 1) == 0, "block_size is no power of two")
    bias = x.optional(5)
    _require(x.optional(4) is None, "names an order of its inputs")
    _require(bias is None or (bias.dtype == FLOAT and bias.shape == (columns,)))
    blocks = -(-inner // block)
    _require(data.shape[-1:] == (inner,) and weight.dtype == UINT8 and data.dtype == scales.dtype == FLOAT)
    _require(weight.shape == (columns, blocks, block * bits // 8))
    _require(math.prod(scales.shape) == columns * blocks)
    zeros = columns * ((blocks * bits + 7) // 8)
    _require(zero is None or (zero.dtype == UINT8 and math.prod(zero.shape) == zeros))
    shape = (*data.shape[:-1], columns)
    return [Value(FLOAT, shape)], math.prod(shape) * inner


Rule = tuple[Callable[[Operation], Result], int, int, frozenset[str]]
"""The function that infers the outputs, the fewest and most inputs, and the allowed attributes."""


def _rule(infer: Callable[[Operation], Result], least: int, most: int, attributes: str = "") -> Rule:
    return infer, least, most, frozenset(attributes.split())


_CONV = "auto_pad dilations group kernel_shape pads strides"
_POOL = "auto_pad ceil_mode count_include_pad dilations kernel_shape pads storage_order strides"

RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "Abs",
            "Erf",
            "Exp",
            "HardSwish",
            "Log",
            "Mish",
            "Neg",
            "Reciprocal",
            "Relu",
            "Sigmoid",
            "Softplus",
            "Sqrt",
            "Tanh",
        ),
        _rule(_activation, 1, 1),
    ),
    **dict.fromkeys(("Elu", "LeakyRelu", "Swish", "com.microsoft:QuickGelu"), _rule(_activation, 1, 1, "alpha")),
    **dict.fromkeys(("Add", "Sub", "Mul"), _rule(_arithmetic, 2, 2)),
    **dict.fromkeys(("Div", "Pow", "Max", "Min"), _rule(_binary, 2, 2)),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _rule(_softmax, 1, 1, "axis")),
    **dict.fromkeys(("MaxPool", "AveragePool"), _rule(_pool, 1, 1, _POOL)),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _rule(_global_pool, 1, 1)),
    **dict.fromkeys(
        ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2"),
        _rule(_reduce, 1, 2, "axes keepdims noop_with_empty_axes"),
    ),
    "ArgMax": _rule(_argmax, 1, 1, "axis keepdims select_last_index"),
    "Attention": _rule(
        _attention, 3, 4, "is_causal kv_num_heads q_num_heads qk_matmul_output_mode scale softcap softmax_precision"
    ),
    "BatchNormalization": _rule(_channel_norm, 5, 5, "epsilon momentum training_mode"),
    "Cast": _rule(_cast, 1, 1, "to"),
    "Clip": _rule(_clip, 1, 3),
    "Concat": _rule(_concat, 1, 256, "axis"),
    "Conv": _rule(_convolution, 2, 3, _CONV),
    "ConvInteger": _rule(_conv_integer, 2, 4, _CONV),
    "CumSum": _rule(_cumsum, 2, 2, "exclusive reverse"),
    "DequantizeLinear": _rule(_dequantise, 2, 3, "axis block_size output_dtype"),
    "DynamicQuantizeLinear": _rule(_dynamic_quantise, 1, 1),
    "Equal": _rule(_equal, 2, 2),
    "Expand": _rule(_expand, 2, 2),
    "Flatten": _rule(_flatten, 1, 1, "axis"),
    "Gather": _rule(_gather, 2, 2, "axis"),
    "Gelu": _rule(_activation, 1, 1, "approximate"),
    "Gemm": _rule(_gemm, 2, 3, "alpha beta transA transB"),
    "GroupNormalization": _rule(_channel_norm, 3, 3, "epsilon num_groups stash_type"),
    "HardSigmoid": _rule(_activation, 1, 1, "alpha beta"),
    "Identity": _rule(_identity, 1, 1),
    "InstanceNormalization": _rule(_channel_norm, 3, 3, "epsilon"),
    "LayerNormalization": _rule(_layer_norm, 2, 3, "axis epsilon stash_type"),
    "MatMul": _rule(_matmul, 2, 2),
    "MatMulInteger": _rule(_matmul_integer, 2, 4),
    "PRelu": _rule(_prelu, 2, 2),
    "Pad": _rule(_pad, 2, 4, "mode"),
    "QuantizeLinear": _rule(_quantise, 2, 3, "axis block_size output_dtype saturate"),
    "RMSNormalization": _rule(_layer_norm, 2, 2, "axis epsilon stash_type"),
    "Reshape": _rule(_reshape, 2, 2, "allowzero"),
    "Resize": _rule(
        _resize,
        4,
        4,
        "antialias coordinate_transformation_mode cubic_coeff_a exclude_outside extrapolation_value "
        "keep_aspect_ratio_policy mode nearest_mode",
    ),
    "Shape": _rule(_shape, 1, 1, "end start"),
    "Slice": _rule(_slice, 3, 5),
    "Split": _rule(_split, 1, 2, "axis num_outputs"),
    "Squeeze": _rule(_squeeze, 1, 2),
    "TopK": _rule(_topk, 2, 2, "axis largest sorted"),
    "Transpose": _rule(_transpose, 1, 1, "perm"),
    "Unsqueeze": _rule(_unsqueeze, 2, 2),
    "com.microsoft:MatMulIntegerToFloat": _rule(_matmul_to_float, 4, 7),
    "com.microsoft:MatMulNBits": _rule(_matmul_nbits, 3, 6, "K N accuracy_level bits block_size"),
}
