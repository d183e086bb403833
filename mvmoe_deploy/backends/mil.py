"""Interprets Core ML packages on any operating system, using the program and ``weight.bin`` exactly as written.

Core ML itself runs on Apple devices only. This interpreter reads a package's ``model.mlmodel`` and ``weight.bin`` and
executes the MIL program op by op with numpy, computing in float32 and rounding to the declared type after each op. It
verifies exports, and as the backend ``reference`` it runs Core ML bundles on other systems. An unknown op is an error
and never passes verification. Packages are untrusted: every offset, size and shape is checked before it is used.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.backends import LoadedPiece
from mvmoe_deploy.backends.coreml import one_image_at_a_time
from mvmoe_deploy.bundle import Bundle, Piece
from mvmoe_deploy.errors import BackendError, first_line
from mvmoe_deploy.quiet import quiet

Array = NDArray[Any]


with quiet():
    from coremltools.proto import MIL_pb2, Model_pb2
    from google.protobuf.message import DecodeError

MODEL_FILE = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS_FILE = "Data/com.apple.CoreML/weights/weight.bin"
WEIGHTS_NAME = "@model_path/weights/weight.bin"
"""Name of the weights file inside a program."""

BLOB_SENTINEL = 0xDEADBEEF
BLOB_METADATA = struct.Struct("<IIQQQ")  # sentinel, type, bytes, offset of the data, padding bits
MAX_MODEL_BYTES = 64 << 20
"""Largest program, weights not included; once parsed, a program takes a multiple of its size. A trunk's has 0.1 MB."""

MAX_ELEMENTS = 1 << 28
"""Largest tensor a program may declare (1 GiB as float32)."""

# MIL type → (blob type in weight.bin, bits per element, numpy type it is held in). The blob types are those of
# coremltools' mlmodel/src/MILBlob/Blob/BlobDataType.hpp. Half-precision values are held as float32, already rounded.
_TYPES: dict[int, tuple[int | None, int, Any]] = {
    MIL_pb2.BOOL: (None, 8, np.bool_),
    MIL_pb2.STRING: (None, 0, np.object_),
    MIL_pb2.FLOAT16: (1, 16, np.float32),
    MIL_pb2.FLOAT32: (2, 32, np.float32),
    MIL_pb2.UINT8: (3, 8, np.uint8),
    MIL_pb2.INT8: (4, 8, np.int8),
    MIL_pb2.UINT4: (11, 4, np.uint8),
    MIL_pb2.UINT6: (13, 6, np.uint8),
    MIL_pb2.INT32: (14, 32, np.int32),
    MIL_pb2.UINT32: (15, 32, np.uint32),
}


@dataclass(frozen=True)
class Tensor:
    """A declared tensor type: MIL type and shape; a dimension that varies is None."""

    type: int
    shape: tuple[int | None, ...]

    @property
    def dtype(self) -> Any:
        """The numpy type that holds its values."""
        return _TYPES[self.type][2]


@dataclass(frozen=True)
class Step:
    """One op, its arguments by parameter: a value, a :class:`Name`, or a list of these (``values`` of concat)."""

    op: str
    arguments: dict[str, Any]
    outputs: list[tuple[str, Tensor | None]]


@dataclass(frozen=True)
class Name:
    """A reference to an earlier value."""

    name: str


@dataclass(frozen=True)
class Program:
    """One function of a package, with its constants decoded.

    Attributes:
        where: package and function, as named in errors.
        inputs: declared inputs by name.
        outputs: names of the outputs.
        images: inputs that Core ML takes as images, values 0…255.
        constants: values that are known before it runs.
        steps: the other ops, in order.
        weight_bytes: total size of the blobs in ``weight.bin`` that it refers to, each counted once.
    """

    where: str
    inputs: dict[str, Tensor]
    outputs: list[str]
    images: frozenset[str]
    constants: dict[str, Any]
    steps: list[Step]
    weight_bytes: int

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        """Runs the function on one set of inputs.

        Args:
            inputs: arrays of the declared shapes, by name.

        Returns:
            Every output by name; a classifier also has a label and a dictionary from label to probability.

        Raises:
            BackendError: an input does not fit, or an op cannot be executed; the message names it.
        """
        if set(inputs) != set(self.inputs):
            raise BackendError(f"{self.where}: takes inputs {sorted(self.inputs)}, was given {sorted(inputs)}")
        values: dict[str, Any] = dict(self.constants)
        for name, declared in self.inputs.items():
            values[name] = _declared(np.asarray(inputs[name]), declared, f"{self.where}: input {name}")
        for step in self.steps:
            _execute(step, values, self.where)
        return {name: _value(Name(name), values, self.where) for name in self.outputs}


@dataclass(frozen=True)
class Package:
    """A package's model and weights, as read from disk; nothing in it has been checked."""

    path: Path
    model: Model_pb2.Model
    weights: NDArray[np.uint8]

    def program(self, function: str | None = None) -> Program:
        """Prepares a function to run: decodes its constants and checks its declarations.

        Args:
            function: the function's name; by default the package's only or default function.

        Raises:
            BackendError: there is no such function, an op is unknown, or the file is damaged.
        """
        functions = self.model.mlProgram.functions
        name = function or self.model.description.defaultFunctionName or "main"
        where = f"{self.path} ({name})"
        if name not in functions:
            raise BackendError(f"{self.path}: has no function {name!r}, only {', '.join(sorted(functions)) or 'none'}")
        if len(functions[name].block_specializations) != 1:
            raise BackendError(f"{where}: has {len(functions[name].block_specializations)} blocks, expected one")
        (block,) = functions[name].block_specializations.values()
        blobs: dict[int, int] = {}
        constants: dict[str, Any] = {}
        steps = []
        for operation in block.operations:
            step = _read_operation(operation, self.weights, blobs, where)
            if step.op == "const" or step.op.startswith("constexpr_"):
                _execute(step, constants, where)
            else:
                steps.append(step)
        inputs = {each.name: _tensor_type(each.type, f"{where}: input {each.name}") for each in functions[name].inputs}
        return Program(
            where=where,
            inputs={key: declared for key, declared in inputs.items() if declared is not None},
            outputs=list(block.outputs),
            images=self._images(name),
            constants=constants,
            steps=steps,
            weight_bytes=sum(blobs.values()),
        )

    def _images(self, function: str) -> frozenset[str]:
        description = self.model.description
        described = [each for each in description.functions if each.name == function]
        inputs = described[0].input if described else description.input
        return frozenset(feature.name for feature in inputs if feature.type.WhichOneof("Type") == "imageType")


def read_package(path: Path) -> Package:
    """Reads an ``.mlpackage`` that holds one ML Program; the weights are mapped, not loaded.

    A program whose constants are all small has no ``weight.bin``.

    Raises:
        BackendError: a file is missing, too large or of another kind.
    """
    try:
        size = (path / MODEL_FILE).stat().st_size
        if size > MAX_MODEL_BYTES:
            raise BackendError(f"{path / MODEL_FILE}: has {size} bytes, more than {MAX_MODEL_BYTES}; not a program")
        model = Model_pb2.Model.FromString((path / MODEL_FILE).read_bytes())
        file = path / WEIGHTS_FILE
        weights = np.memmap(file, np.uint8, "r") if file.exists() and file.stat().st_size else np.zeros(0, np.uint8)
    except (OSError, ValueError) as error:
        raise BackendError(f"{path}: not a readable Core ML package ({first_line(error)}); export again") from None
    except DecodeError:
        raise BackendError(f"{path / MODEL_FILE}: damaged, not a Core ML model; export again") from None
    if model.WhichOneof("Type") != "mlProgram":
        raise BackendError(f"{path}: holds a {model.WhichOneof('Type')}, not an ML Program")
    return Package(path, model, weights)


class ReferenceBackend:
    """Runs ``coreml`` bundles by interpreting their programs: for checking results, not for speed."""

    name = "reference"
    unloads = True

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._packages: dict[str, Package] = {}  # parsed once, however many functions are loaded from it

    def load(self, piece: Piece) -> LoadedPiece:
        if piece.graph not in self._packages:
            self._packages[piece.graph] = read_package(self._bundle.path / piece.graph)
        program = self._packages[piece.graph].program(piece.function)
        return one_image_at_a_time(
            predict=program, piece=piece, images=program.images, bundle=self._bundle, where=program.where
        )


def open_backend(bundle: Bundle, threads: int | None = 1) -> ReferenceBackend:
    """See :func:`mvmoe_deploy.backends.open_backend`; numpy chooses the number of threads itself."""
    return ReferenceBackend(bundle)


def blob_at(weights: NDArray[np.uint8], offset: int, where: str) -> tuple[int, int, int, int]:
    """Reads and checks a blob's metadata in ``weight.bin``: (type, bytes, offset of the data, padding bits).

    Args:
        weights: the whole file.
        offset: offset of the metadata, which is how a program refers to a blob.
        where: what to call the blob in errors.

    Raises:
        BackendError: the metadata or the data lies outside the file, or the sentinel is missing.
    """
    if offset + BLOB_METADATA.size > len(weights):
        raise BackendError(f"{where}: refers to offset {offset} of a weight.bin of {len(weights)} bytes; export again")
    sentinel, kind, size, start, padding = BLOB_METADATA.unpack(weights[offset : offset + BLOB_METADATA.size].tobytes())
    if sentinel != BLOB_SENTINEL:
        raise BackendError(f"{where}: there is no blob at offset {offset} of weight.bin; the file is damaged")
    if start + size > len(weights):
        raise BackendError(
            f"{where}: its weights lie at bytes {start} to {start + size} of a weight.bin of {len(weights)} bytes; "
            "the file is damaged"
        )
    return kind, size, start, padding


def round_to(values: Array, kind: int) -> Array:
    """Rounds values to a MIL type; half-precision values are returned as float32."""
    if kind == MIL_pb2.FLOAT16:
        with np.errstate(over="ignore"):  # beyond 65504, half precision is infinite on a device too
            return values.astype(np.float16).astype(np.float32)
    return values.astype(_TYPES[kind][2], copy=False)


# Reading the protobuf


def _tensor_type(type_: MIL_pb2.ValueType, where: str) -> Tensor | None:
    """The declared tensor; None for a type that is not a tensor (a classifier's dictionary)."""
    if type_.WhichOneof("type") != "tensorType":
        return None
    tensor = type_.tensorType
    if tensor.dataType not in _TYPES:
        name = MIL_pb2.DataType.Name(tensor.dataType) if tensor.dataType in MIL_pb2.DataType.values() else "unknown"
        raise BackendError(f"{where}: is of type {name}, which the interpreter does not support")
    shape = tuple(
        each.constant.size if each.WhichOneof("dimension") == "constant" else None for each in tensor.dimensions
    )
    if math.prod(size for size in shape if size is not None) > MAX_ELEMENTS:
        raise BackendError(f"{where}: is declared as {list(shape)}, more than {MAX_ELEMENTS} elements")
    return Tensor(tensor.dataType, shape)


def _read_operation(
    operation: MIL_pb2.Operation, weights: NDArray[np.uint8], blobs: dict[int, int], where: str
) -> Step:
    outputs = [(each.name, _tensor_type(each.type, f"{where}: {each.name}")) for each in operation.outputs]
    where = f"{where}: {operation.type} {outputs[0][0] if outputs else ''}".rstrip()
    if operation.type not in OPS:
        raise BackendError(f"{where}: the interpreter does not know the op {operation.type!r}")
    if operation.blocks:
        raise BackendError(f"{where}: has nested blocks, which the interpreter does not support")
    arguments: dict[str, Any] = {}
    for parameter, argument in operation.inputs.items():
        read = [
            Name(each.name) if each.WhichOneof("binding") == "name" else _read_value(each.value, weights, blobs, where)
            for each in argument.arguments
        ]
        arguments[parameter] = read if parameter == "values" else read[0] if len(read) == 1 else read
    # constants and compressed weights have their parameters among the attributes
    for parameter, value in operation.attributes.items():
        if parameter != "name":
            arguments[parameter] = _read_value(value, weights, blobs, where)
    return Step(operation.type, arguments, outputs)


def _read_value(value: MIL_pb2.Value, weights: NDArray[np.uint8], blobs: dict[int, int], where: str) -> Array:
    if value.type.WhichOneof("type") == "listType":  # a classifier's labels
        return np.array([_read_value(each, weights, blobs, where).item() for each in value.immediateValue.list.values])
    declared = _tensor_type(value.type, where)
    if declared is None or None in declared.shape:
        raise BackendError(f"{where}: has a constant that is not a tensor of fixed shape")
    if value.WhichOneof("value") == "blobFileValue":
        data = _read_blob(reference=value.blobFileValue, declared=declared, weights=weights, blobs=blobs, where=where)
    else:
        data = _read_immediate(value.immediateValue.tensor, declared)
    count = math.prod(size or 0 for size in declared.shape)
    if data.size != count:
        raise BackendError(f"{where}: a constant declared as {list(declared.shape)} holds {data.size} values")
    return data.reshape(declared.shape)  # type: ignore[arg-type]


def _read_blob(
    reference: MIL_pb2.Value.BlobFileValue,
    declared: Tensor,
    weights: NDArray[np.uint8],
    blobs: dict[int, int],
    where: str,
) -> Array:
    if reference.fileName != WEIGHTS_NAME:
        raise BackendError(f"{where}: takes weights from {reference.fileName!r}, expected {WEIGHTS_NAME!r}")
    kind, size, start, _ = blob_at(weights, reference.offset, where)
    expected, bits, _ = _TYPES[declared.type]
    if kind != expected:
        raise BackendError(f"{where}: its blob in weight.bin is of type {kind}, the program declares {expected}")
    count = math.prod(each or 0 for each in declared.shape)
    needed = (count * bits + 7) // 8
    if size != needed:
        raise BackendError(f"{where}: {list(declared.shape)} needs {needed} bytes, its blob has {size}")
    blobs[start] = size
    return _from_bytes(weights[start : start + size], declared.type, count)


def _read_immediate(tensor: MIL_pb2.TensorValue, declared: Tensor) -> Array:
    kind = tensor.WhichOneof("value")
    if kind is None:
        return np.zeros(0, declared.dtype)
    held = getattr(tensor, kind).values
    if kind == "bytes":
        raw = np.frombuffer(held, np.uint8)
        return _from_bytes(raw, declared.type, raw.size * 8 // max(_TYPES[declared.type][1], 1))
    return np.array(list(held), declared.dtype)


def _from_bytes(raw: NDArray[np.uint8], kind: int, count: int) -> Array:
    """Decodes ``count`` little-endian elements of any number of bits."""
    bits = _TYPES[kind][1]
    if kind == MIL_pb2.FLOAT16:
        return raw.view(np.dtype("<f2")).astype(np.float32)
    if bits % 8:
        return unpack_bits(raw, bits, count)
    return raw.view(np.dtype(_TYPES[kind][2]).newbyteorder("<"))


def unpack_bits(raw: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Unpacks unsigned numbers of fewer than 8 bits; the first is in the lowest bits of the first byte."""
    each = np.unpackbits(raw, count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(each, axis=1, bitorder="little")[:, 0]


# Executing


def _execute(step: Step, values: dict[str, Any], where: str) -> None:
    """Executes one op and adds its outputs to ``values``."""
    where = f"{where}: {step.op} {step.outputs[0][0] if step.outputs else ''}".rstrip()
    arguments = {parameter: _value(argument, values, where) for parameter, argument in step.arguments.items()}
    try:
        result = OPS[step.op](**arguments)
    except (TypeError, ValueError, IndexError, KeyError, ZeroDivisionError, MemoryError) as error:
        raise BackendError(f"{where}: cannot be executed ({first_line(error)})") from None
    results = result if isinstance(result, tuple) else (result,)
    if len(results) != len(step.outputs):
        raise BackendError(f"{where}: declares {len(step.outputs)} outputs, the op has {len(results)}")
    for (name, declared), each in zip(step.outputs, results, strict=True):
        if declared is None or declared.type == MIL_pb2.STRING:
            values[name] = each
        else:
            values[name] = _declared(np.asarray(each), declared, where)


def _value(argument: Any, values: dict[str, Any], where: str) -> Any:
    if isinstance(argument, list):
        return [_value(each, values, where) for each in argument]
    if not isinstance(argument, Name):
        return argument
    if argument.name not in values:
        raise BackendError(f"{where}: uses {argument.name!r}, which nothing has computed")
    return values[argument.name]


def _declared(value: Array, declared: Tensor, where: str) -> Array:
    """The value rounded to its declared type.

    Raises:
        BackendError: its shape differs from the declared one.
    """
    fits = value.ndim == len(declared.shape) and all(
        expected is None or size == expected for size, expected in zip(value.shape, declared.shape, strict=True)
    )
    if not fits:
        raise BackendError(f"{where}: has shape {list(value.shape)}, the program declares {list(declared.shape)}")
    return round_to(value, declared.type)


# The ops. Their parameters are named as in coremltools' converters/mil/mil/ops/defs.


def erf(x: Array) -> Array:
    """The error function in float32, within 4e-7: the rational approximation that Eigen and XLA use."""
    x = np.clip(x, -4, 4)
    square = x * x
    above = np.full_like(x, -2.72614225801306e-10)
    for coefficient in (
        2.77068142495902e-08,
        -2.10102402082508e-06,
        -5.69250639462346e-05,
        -7.34990630326855e-04,
        -2.95459980854025e-03,
        -1.60960333262415e-02,
    ):
        above = above * square + np.float32(coefficient)
    below = np.full_like(x, -1.45660718464996e-05)
    for coefficient in (-2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02):
        below = below * square + np.float32(coefficient)
    return x * above / below


def _check_room(*shapes: tuple[int, ...]) -> None:
    """Refuses a result of more than :data:`MAX_ELEMENTS` elements; small inputs can be broadcast to one."""
    if math.prod(np.broadcast_shapes(*shapes)) > MAX_ELEMENTS:
        raise ValueError(f"its result would have more than {MAX_ELEMENTS} elements")


def _elementwise(operator: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    def run(x: Array, y: Array) -> Array:
        _check_room(x.shape, y.shape)
        return operator(x, y)

    return run


def _unary(operator: Callable[[Array], Array]) -> Callable[..., Array]:
    def run(x: Array) -> Array:
        return operator(x)

    return run


def _const(val: Array) -> Array:
    return val


def _affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    along = [1] * quantized_data.ndim
    along[int(axis)] = -1
    centred = quantized_data.astype(np.float32) - zero_point.astype(np.float32).reshape(along)
    return centred * scale.reshape(along)


def _blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    for axis, (size, scales) in enumerate(zip(data.shape, scale.shape, strict=True)):
        scale = np.repeat(scale, size // scales, axis)
        offset = None if offset is None else np.repeat(offset, size // scales, axis)
    centred = data.astype(np.float32)
    return (centred if offset is None else centred - offset.astype(np.float32)) * scale


def _lut_to_dense(indices: Array, lut: Array, shape: Array | None = None) -> Array:
    if lut.size != (lut.shape[-2] if lut.ndim > 1 else lut.shape[0]):
        raise ValueError(f"lookup tables of shape {list(lut.shape)} are not supported, only one for the whole tensor")
    if shape is not None:  # iOS 16: indices are packed, a table of 2^bits entries
        sizes = [int(size) for size in shape]
        bits = int(lut.size).bit_length() - 1
        if indices.size != (math.prod(sizes) * bits + 7) // 8:
            raise ValueError(f"{indices.size} bytes of indices do not make {sizes}")
        indices = unpack_bits(indices, bits, math.prod(sizes)).reshape(sizes)
    return lut.reshape(-1)[indices]


def _cast(x: Array, dtype: Array) -> Array:
    if dtype.item() not in ("fp16", "fp32", "int32", "int8", "uint8", "bool"):
        raise ValueError(f"casts to {dtype.item()!r}, which the interpreter does not support")
    return x  # the caller rounds it to the declared type


def _conv(
    x: Array,
    weight: Array,
    strides: Array,
    pad_type: Array,
    pad: Array,
    dilations: Array,
    groups: Array,
    bias: Array | None = None,
) -> Array:
    if pad_type.item() not in ("valid", "custom"):
        raise ValueError(f"pad_type {pad_type.item()!r} is not supported")
    if np.any(dilations != 1):
        raise ValueError(f"dilations {dilations.tolist()} are not supported")
    if pad_type.item() == "custom":
        around = pad.reshape(-1, 2).astype(int)
        _check_room(tuple(x.shape[2:] + around.sum(1)))
        x = np.pad(x, [(0, 0), (0, 0), *around.tolist()])
    kernel = weight.shape[2:]
    spatial = tuple(range(2, x.ndim))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel, spatial)  # [B, C, *out, *kernel]
    windows = windows[(slice(None), slice(None), *(slice(None, None, int(stride)) for stride in strides))]
    if weight.shape[1] == 1 and int(groups) == x.shape[1]:
        y = _depthwise(windows, weight)
    else:
        _check_room(windows.shape)  # tensordot copies it
        summed = tuple(range(windows.ndim - len(kernel), windows.ndim))
        outputs = [
            np.tensordot(part, filters, ((1, *summed), tuple(range(1, filters.ndim))))  # [B, *out, C']
            for part, filters in zip(np.split(windows, int(groups), 1), np.split(weight, int(groups)), strict=True)
        ]
        y = np.moveaxis(np.concatenate(outputs, -1), -1, 1)
    return y if bias is None else y + bias.reshape(-1, *[1] * len(kernel))


def _depthwise(windows: Array, weight: Array) -> Array:
    """A convolution whose every output channel reads one channel: a sum over the kernel's places."""
    kernel = weight.shape[2:]
    times, rest = divmod(weight.shape[0], windows.shape[1])
    if rest:
        raise ValueError(f"{weight.shape[0]} filters for {windows.shape[1]} channels")
    shape = (windows.shape[0], weight.shape[0], *windows.shape[2 : 2 + len(kernel)])
    _check_room(shape)
    y = np.zeros(shape, np.float32)
    for place in np.ndindex(*kernel):
        y += np.repeat(windows[(..., *place)], times, 1) * weight[(slice(None), 0, *place)].reshape(
            -1, *[1] * len(kernel)
        )
    return y


def _pooling(combine: Callable[..., Array], outside: float) -> Callable[..., Array]:
    """A pooling; ``outside`` is the value of the padding."""

    def run(
        x: Array,
        kernel_sizes: Array,
        strides: Array,
        pad_type: Array,
        pad: Array,
        ceil_mode: Any = False,
        exclude_padding_from_average: Any = False,
    ) -> Array:
        if pad_type.item() not in ("valid", "custom") or ceil_mode:
            raise ValueError(f"pad_type {pad_type.item()!r} with ceil_mode {bool(ceil_mode)} is not supported")
        spatial = tuple(range(2, x.ndim))
        kernel = tuple(int(size) for size in kernel_sizes)
        steps = (slice(None), slice(None), *(slice(None, None, int(stride)) for stride in strides))

        def windows(values: Array) -> Array:
            if pad_type.item() == "custom":
                around = pad.reshape(-1, 2).astype(int)
                _check_room(tuple(values.shape[2:] + around.sum(1)))
                values = np.pad(values, [(0, 0), (0, 0), *around.tolist()], constant_values=outside)
            return np.lib.stride_tricks.sliding_window_view(values, kernel, spatial)[steps]

        inner = tuple(range(-len(kernel), 0))
        y: Array = combine(windows(x), axis=inner)
        if exclude_padding_from_average:
            y = y / windows(np.ones_like(x)).mean(inner)
        return y

    return run


def _upsample_bilinear(
    x: Array, scale_factor_height: Any = 1, scale_factor_width: Any = 1, align_corners: Any = True
) -> Array:
    sizes = [
        math.floor(float(scale) * extent)
        for scale, extent in zip((scale_factor_height, scale_factor_width), x.shape[-2:], strict=True)
    ]
    _check_room((*x.shape[:-2], *sizes))
    rows, columns = (
        _interpolation(before, after, bool(align_corners)) for before, after in zip(x.shape[-2:], sizes, strict=True)
    )
    result: Array = rows @ x @ columns.T
    return result


def _interpolation(before: int, after: int, align_corners: bool) -> Array:
    """A matrix ``[after, before]`` that interpolates linearly."""
    _check_room((before, after))
    places = np.arange(after, dtype=np.float64)
    if align_corners:
        places *= (before - 1) / max(after - 1, 1)
    else:
        places = (places + 0.5) * before / after - 0.5
    places = places.clip(0, before - 1)
    matrix: Array = np.maximum(1 - np.abs(places[:, None] - np.arange(before)), 0).astype(np.float32)
    return matrix


def _batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Any = 1e-5,
) -> Array:
    along = (-1, *[1] * (x.ndim - 2))
    y = (x - mean.reshape(along)) / np.sqrt(variance.reshape(along) + np.float32(epsilon))
    y = y if gamma is None else y * gamma.reshape(along)
    result: Array = y if beta is None else y + beta.reshape(along)
    return result


def _linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    y = x @ weight.T
    return y if bias is None else y + bias


def _matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:
    x = x.swapaxes(-1, -2) if transpose_x else x
    y = y.swapaxes(-1, -2) if transpose_y else y
    _check_room((*x.shape[:-1], 1), (*y.shape[:-2], 1, y.shape[-1]))
    return x @ y


def _layer_norm(
    x: Array,
    axes: Array,
    epsilon: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
) -> Array:
    over = tuple(int(axis) % x.ndim for axis in axes)
    centred = x - x.mean(over, keepdims=True)
    y: Array = centred / np.sqrt((centred * centred).mean(over, keepdims=True) + epsilon)
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def _softmax(x: Array, axis: Any = -1) -> Array:
    powers = np.exp(x - x.max(int(axis), keepdims=True))
    result: Array = powers / powers.sum(int(axis), keepdims=True)
    return result


def _gelu(x: Array, mode: Array) -> Array:
    half = np.float32(0.5)
    if mode.item() == "EXACT":
        inner = erf(x * np.float32(math.sqrt(0.5)))
    elif mode.item() == "TANH_APPROXIMATION":
        inner = np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3))
    else:
        raise ValueError(f"mode {mode.item()!r} is not supported")
    result: Array = half * x * (1 + inner)
    return result


def _attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
) -> Array:
    scores = _matmul(query * np.float32(1 / math.sqrt(query.shape[-1])), key, transpose_y=True)
    if attn_mask is not None:
        if attn_mask.dtype == np.bool_:
            raise ValueError("a boolean mask is not supported")
        scores = scores + attn_mask
    return _matmul(_softmax(scores), value)


def _concat(values: list[Array], axis: Any, interleave: Any = False) -> Array:
    if interleave:
        raise ValueError("interleave is not supported")
    if sum(each.size for each in values) > MAX_ELEMENTS:
        raise ValueError(f"more than {MAX_ELEMENTS} elements")
    return np.concatenate(values, int(axis))


def _split(x: Array, axis: Any, split_sizes: Array | None = None, num_splits: Any = None) -> tuple[Array, ...]:
    sections: Any = int(num_splits) if split_sizes is None else np.cumsum(split_sizes)[:-1]
    return tuple(np.split(x, sections, int(axis)))


def _slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    no = np.zeros(x.ndim, bool)
    begin_mask, end_mask, squeeze_mask = (no if m is None else m for m in (begin_mask, end_mask, squeeze_mask))
    strides = np.ones(x.ndim, int) if stride is None else stride
    index: list[int | slice] = []
    for axis in range(x.ndim):
        if squeeze_mask[axis]:
            index.append(0 if begin_mask[axis] else int(begin[axis]))
        else:
            first = None if begin_mask[axis] else int(begin[axis])
            last = None if end_mask[axis] else int(end[axis])
            index.append(slice(first, last, int(strides[axis])))
    return x[tuple(index)]


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


def _clip(x: Array, alpha: Array, beta: Array) -> Array:
    return np.minimum(np.maximum(x, alpha), beta)


def _pad(x: Array, pad: Array, mode: Any = "constant", constant_val: Any = 0.0) -> Array:
    if str(mode) != "constant":
        raise ValueError(f"mode {mode} is not supported")
    widths = np.asarray(pad).reshape(-1, 2).tolist()  # before and after, of the last dimensions
    if len(widths) > x.ndim or min(map(min, widths)) < 0:
        raise ValueError(f"widths {widths} do not fit {list(x.shape)}")
    widths = [[0, 0]] * (x.ndim - len(widths)) + widths
    _check_room(tuple(size + before + after for size, (before, after) in zip(x.shape, widths, strict=True)))
    return np.pad(x, widths, constant_values=float(constant_val))


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp of a large number is infinite, and its inverse 0
        return 1 / (1 + np.exp(-x))


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _sigmoid_hard(x: Array, alpha: Array, beta: Array) -> Array:
    result: Array = np.minimum(np.maximum(alpha * x + beta, 0), 1)
    return result


def _thresholded_relu(x: Array, alpha: Array) -> Array:
    return np.where(x < alpha, np.float32(0), x)


def _rsqrt(x: Array, epsilon: Any = 1e-12) -> Array:
    result: Array = 1 / np.sqrt(x + np.float32(epsilon))
    return result


def _stack(values: list[Array], axis: Any) -> Array:
    if sum(each.size for each in values) > MAX_ELEMENTS:
        raise ValueError(f"more than {MAX_ELEMENTS} elements")
    return np.stack(values, int(axis))


def _tile(x: Array, reps: Array) -> Array:
    times = [int(each) for each in reps]
    if len(times) != x.ndim or min(times, default=1) < 1:
        raise ValueError(f"repeats {list(x.shape)} {times} times")
    _check_room(tuple(size * each for size, each in zip(x.shape, times, strict=True)))
    return np.tile(x, times)


def _reshape(x: Array, shape: Array) -> Array:
    return x.reshape([int(size) for size in shape])


def _transpose(x: Array, perm: Array) -> Array:
    return x.transpose([int(axis) for axis in perm])


def _squeeze(x: Array, axes: Array | None = None) -> Array:
    return np.squeeze(x, None if axes is None else tuple(int(axis) for axis in axes))


def _expand_dims(x: Array, axes: Array) -> Array:
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


def _reduction(combine: Callable[..., Array]) -> Callable[..., Array]:
    def run(x: Array, axes: Array | None = None, keep_dims: Any = False) -> Array:
        over = None if axes is None else tuple(int(axis) for axis in axes)
        result: Array = combine(x, axis=over, keepdims=bool(keep_dims))
        return result

    return run


def _classify(probabilities: Array, classes: Array) -> tuple[str, dict[str, float]]:
    labels = [str(label) for label in classes]
    if probabilities.size != len(labels):
        raise ValueError(f"{probabilities.size} probabilities for {len(labels)} classes")
    flat = probabilities.reshape(-1)
    return labels[int(flat.argmax())], dict(zip(labels, flat.tolist(), strict=True))


OPS: dict[str, Callable[..., Any]] = {
    "add": _elementwise(np.add),
    "avg_pool": _pooling(np.mean, 0.0),
    "batch_norm": _batch_norm,
    "cast": _cast,
    "classify": _classify,
    "clip": _clip,
    "concat": _concat,
    "const": _const,
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_lut_to_dense": _lut_to_dense,
    "conv": _conv,
    "expand_dims": _expand_dims,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "max_pool": _pooling(np.max, -np.inf),
    "maximum": _elementwise(np.maximum),
    "minimum": _elementwise(np.minimum),
    "mul": _elementwise(np.multiply),
    "pad": _pad,
    "real_div": _elementwise(np.true_divide),
    "reduce_max": _reduction(np.max),
    "reduce_mean": _reduction(np.mean),
    "reduce_sum": _reduction(np.sum),
    "relu": _relu,
    "reshape": _reshape,
    "rsqrt": _rsqrt,
    "scaled_dot_product_attention": _attention,
    "sigmoid": _sigmoid,
    "sigmoid_hard": _sigmoid_hard,
    "silu": _silu,
    "slice_by_index": _slice_by_index,
    "softmax": _softmax,
    "split": _split,
    "sqrt": _unary(np.sqrt),
    "square": _unary(np.square),
    "squeeze": _squeeze,
    "stack": _stack,
    "sub": _elementwise(np.subtract),
    "tanh": _unary(np.tanh),
    "thresholded_relu": _thresholded_relu,
    "tile": _tile,
    "transpose": _transpose,
    "upsample_bilinear": _upsample_bilinear,
}
"""Every op that the interpreter knows."""
