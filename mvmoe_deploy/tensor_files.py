"""Reads untrusted ``.pt`` and ``.safetensors`` files: no code in them is run, and everything they say is checked.

Neither torch's nor safetensors' reader is used. Torch executes a file's instructions for all tensors before it can
report what they are, ignores the zip archive's checksums, and lets a tensor of stride 0 stand for terabytes.
This module first reads names, types, shapes and places (:class:`Stored`). It reads the values only after these were
found to be valid, and never more of them than a few times the file's size.

Any damage to a ``.pt`` file is detected, by the archive's CRC-32. Any damage to a ``.safetensors`` file is detected if
it carries the ``sha256`` that :func:`seal` puts in its header, as this project's checkpoints do. In other
``.safetensors`` files only the header is checked: a flipped bit in their weights changes a weight unnoticed.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.errors import CheckpointError, first_line

MAX_HEADER_BYTES = 4 << 20
"""Largest description of the weights; that of a ViT-Large with its optimizer's state takes 0.4 MB."""

MAX_TENSORS = 16384
MAX_GROWTH = 4
"""Largest size of a file's weights as float32, as a multiple of the file's size; float16 weights take 2."""

PLACEHOLDER = "0" * 64

_KINDS = {
    **{"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64"},
    **{"LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8"},
    **{"BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128"},
}
"""Torch's storage types and the names that safetensors has for them."""

_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = ("F32", "F16", "BF16", "F64")


class Stored(NamedTuple):
    """A tensor as its file describes it.

    Attributes:
        kind: element type, as safetensors names it.
        shape: the tensor's shape.
        strides: the tensor's strides, in elements.
        offset: position of its first element in the storage, in elements.
        storage: the storage's key; tensors may share a storage.
    """

    kind: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: str


class Foreign:
    """Stands for any object that a pickle builds with a class or function unrelated to tensors; it does nothing.

    Attributes:
        of: the class's or function's name.
    """

    of = ""

    def __new__(cls, *_: object, **__: object) -> Foreign:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def _ignore(self, *_: object) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = update = _ignore


class _Dict(dict[Any, Any]):
    """Stands for an OrderedDict; attributes that are set on it are dropped."""

    def __setstate__(self, state: object) -> None:
        pass


class _Storage(NamedTuple):
    kind: str
    key: str


class Contents:
    """A file's contents and a reader of its tensors' values; valid only within :func:`open_file`.

    Attributes:
        path: the file.
        values: the object in a ``.pt`` file with :class:`Stored` in place of tensors, or a ``.safetensors`` file's
            tensors by name.
        metadata: the metadata of a ``.safetensors`` file; empty for a ``.pt`` file.
    """

    def __init__(
        self, path: Path, size: int, values: Any, metadata: dict[str, str], read: Callable[[str], NDArray[np.uint8]]
    ) -> None:
        self.path, self.values, self.metadata = path, values, metadata
        self._size, self._read = size, read

    def arrays(self, tensors: Mapping[str, Any], where: str = "weights") -> dict[str, NDArray[np.float32]]:
        """Reads tensors as float32 arrays that the caller owns; every description is checked before any value is read.

        Args:
            tensors: the tensors' descriptions from :attr:`values`, by name.
            where: what to call the tensors in errors.

        Raises:
            CheckpointError: something is not a tensor of floating-point numbers, reaches beyond its storage, or is
                larger than its file can be.
        """
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"{self.path}: has {len(tensors)} weights, more than the limit of {MAX_TENSORS}")
        storages: dict[str, NDArray[np.uint8]] = {}
        total = 0
        for name, tensor in tensors.items():
            problem = _problem(tensor)
            if problem:
                raise CheckpointError(f"{self.path}: {where}[{str(name)[:80]!r}] {problem}")
            total += 4 * math.prod(tensor.shape)
        if total > MAX_GROWTH * self._size + (1 << 20):
            raise CheckpointError(f"{self.path}: its {where} are larger than the file can hold")
        result = {}
        for name, tensor in tensors.items():
            if tensor.storage not in storages:
                storages[tensor.storage] = self._read(tensor.storage)
            data = storages[tensor.storage]
            last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
            if math.prod(tensor.shape) and (last + 1) * _BYTES[tensor.kind] > data.nbytes:
                raise CheckpointError(f"{self.path}: {where}[{name!r}] reaches beyond the end of its stored data")
            result[name] = _floats(tensor, data)
        return result


def _problem(tensor: Any) -> str | None:
    """What is wrong with the description of a tensor; None if it is fine."""
    if isinstance(tensor, Foreign):
        if "qtensor" in tensor.of:
            return "is quantised, and float weights are needed: dequantize() it"
        if "sparse" in tensor.of:
            return "is sparse, and dense weights are needed: to_dense() it"
        return f"is a {tensor.of}, not a tensor"
    if not isinstance(tensor, Stored):
        return f"is a {type(tensor).__name__}, not a tensor"
    # a counter, such as BatchNorm's, is the only integer that a model has of its own
    if tensor.kind not in _FLOATS and not (tensor.kind == "I64" and not tensor.shape):
        return f"is of type {tensor.kind}, expected {', '.join(_FLOATS)}; other types mean nothing without their scale"
    if len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > 8 or tensor.offset < 0:
        return "has no valid shape"
    if not all(0 <= extent < 1 << 32 for extent in tensor.shape) or not all(0 <= s < 1 << 40 for s in tensor.strides):
        return "has no valid shape"
    room = 1
    for stride, extent in sorted((s, n) for n, s in zip(tensor.shape, tensor.strides, strict=True) if n > 1):
        if stride < room:
            return "has elements that overlap in memory"
        room = stride * extent
    return None


def _floats(tensor: Stored, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The tensor's values as float32; ``data`` holds whole elements."""
    if not math.prod(tensor.shape):
        return np.zeros(tensor.shape, np.float32)
    stored: Any = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "I64": "<i8"}[tensor.kind]
    size = _BYTES[tensor.kind]
    elements = data[: data.nbytes // size * size].view(stored)[tensor.offset :]
    values = np.lib.stride_tricks.as_strided(elements, tensor.shape, [size * stride for stride in tensor.strides])
    if tensor.kind == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return np.array(values, np.float32, order="C")


@contextmanager
def open_file(path: Path) -> Iterator[Contents]:
    """Opens a ``.pt`` or ``.safetensors`` file, by its suffix.

    Raises:
        CheckpointError: the file is missing, not a regular file, not readable, damaged, or of another format.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        if os.name == "nt" and os.path.isdir(path):  # on Windows a folder cannot be opened
            raise CheckpointError(f"{path}: is a directory, expected a .pt or .safetensors checkpoint") from None
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise CheckpointError(f"{path}: is {what}, expected a .pt or .safetensors checkpoint")
    with open(handle, "rb") as file:
        try:
            reader = _open_safetensors if path.suffix == ".safetensors" else _open_pt
            yield reader(path, file, status.st_size)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None
        except MemoryError:
            raise CheckpointError(f"{path}: needs more memory than there is") from None


# .safetensors: 8 bytes of length, a JSON header, the values


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]], msgspec.Meta(max_length=8)]
    data_offsets: tuple[int, int]


def _open_safetensors(path: Path, file: IO[bytes], size: int) -> Contents:
    foreign = CheckpointError(f"{path}: damaged, or not a safetensors file")
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise foreign
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: its header is larger than {MAX_HEADER_BYTES >> 20} MB")
    header = file.read(length)
    try:
        entries = msgspec.json.decode(header, type=dict[str, Any])
        metadata = msgspec.convert(entries.pop("__metadata__", {}), dict[str, str])
        described = {name: msgspec.convert(entry, _Entry) for name, entry in entries.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, or not a safetensors file ({first_line(error)})") from None
    data, end = 8 + length, 0
    for entry in sorted(described.values(), key=lambda entry: entry.data_offsets):
        start, stop = entry.data_offsets
        expected = math.prod(entry.shape) * _BYTES.get(entry.dtype, 0)
        if start != end or stop < start or (entry.dtype in _BYTES and stop - start != expected):
            raise CheckpointError(f"{path}: damaged: its weights are not stored one after the other")
        end = stop
    if data + end != size:
        raise CheckpointError(f"{path}: damaged: has {size} bytes, its header says {data + end}")
    if "sha256" in metadata:
        _check_seal(path, file, header, metadata["sha256"])

    def read(name: str) -> NDArray[np.uint8]:
        start, stop = described[name].data_offsets
        file.seek(data + start)
        values = file.read(stop - start)
        if len(values) != stop - start:
            raise CheckpointError(f"{path}: was changed while it was read")
        return np.frombuffer(values, np.uint8)

    tensors = {
        name: Stored(
            kind=entry.dtype, shape=tuple(entry.shape), strides=_contiguous(entry.shape), offset=0, storage=name
        )
        for name, entry in described.items()
    }
    return Contents(path=path, size=size, values=tensors, metadata=metadata, read=read)


def _contiguous(shape: list[int]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(1, shape[axis + 1])
    return tuple(min(stride, (1 << 40) - 1) for stride in strides)


def seal(data: bytes) -> bytes:
    """Replaces the 64 zeros that a safetensors file has as ``sha256`` in its metadata with its sha256.

    The digest is that of the file with the zeros in it.
    """
    place = _seal_place(data[8 : 8 + int.from_bytes(data[:8], "little")], PLACEHOLDER)
    assert place is not None
    return data[: 8 + place] + hashlib.sha256(data).hexdigest().encode() + data[8 + place + 64 :]


def _seal_place(header: bytes, digits: str) -> int | None:
    """Where in the header the sha256 stands."""
    found = [match.start(1) for match in re.finditer(rb'"sha256"\s*:\s*"([^"\\]{64})"', header)]
    return found[0] if len(found) == 1 and header[found[0] : found[0] + 64] == digits.encode() else None


def _check_seal(path: Path, file: IO[bytes], header: bytes, digits: str) -> None:
    place = _seal_place(header, digits)
    found = hashlib.sha256(len(header).to_bytes(8, "little"))
    if place is not None:
        found.update(header[:place] + PLACEHOLDER.encode() + header[place + 64 :])
        file.seek(8 + len(header))
        while chunk := file.read(1 << 20):
            found.update(chunk)
    if place is None or found.hexdigest() != digits:
        raise CheckpointError(f"{path}: damaged: its sha256 is not the one in its header; copy it again")


# .pt: a zip archive of data.pkl and the storages


def _open_pt(path: Path, file: IO[bytes], size: int) -> Contents:
    try:
        archive = zipfile.ZipFile(file)
        entries = {entry.filename: entry for entry in archive.infolist()}
        inside = next(
            (name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)), None
        )
        if len(entries) != len(archive.infolist()) or sum(entry.file_size for entry in entries.values()) > size:
            raise CheckpointError(f"{path}: damaged: its entries are larger than the file")
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries.values()):
            raise CheckpointError(f"{path}: damaged, or not written by torch.save: it has compressed entries")
        if inside is None:
            raise CheckpointError(f"{path}: damaged, or not a checkpoint: a zip archive without data.pkl")
        if entries[f"{inside}data.pkl"].file_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: its data.pkl is larger than {MAX_HEADER_BYTES >> 20} MB")
        if f"{inside}byteorder" in entries and _entry(path, archive, f"{inside}byteorder") != b"little":
            raise CheckpointError(f"{path}: its values are not in little-endian order")
        values = _unpickle(path, _entry(path, archive, f"{inside}data.pkl"))
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, KeyError) as error:
        reason = "" if isinstance(error, zipfile.BadZipFile) else f" ({first_line(error)})"
        raise CheckpointError(
            f"{path}: not a checkpoint, or a truncated one (torch.save writes a zip archive){reason}"
        ) from None

    def read(key: str) -> NDArray[np.uint8]:
        name = f"{inside}data/{key}"
        if name not in entries:
            raise CheckpointError(f"{path}: damaged: the values {name[:80]!r} are missing")
        return np.frombuffer(_entry(path, archive, name), np.uint8)

    return Contents(path=path, size=size, values=values, metadata={}, read=read)


def _entry(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    """An entry's bytes, which zipfile compares with their CRC-32."""
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged ({first_line(error)}); copy it again") from None


def _unpickle(path: Path, data: bytes) -> Any:
    try:
        return _Unpickler(data).load()
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{path}: damaged: its data.pkl is nested too deeply") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {first_line(error)})") from None


_INSTRUCTIONS = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINSTRING, pickle.SHORT_BINSTRING),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_TUPLE),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GLOBAL),
    *(pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.NEWOBJ, pickle.BINPERSID),
)
"""The pickle instructions that torch.save writes; it never writes sets, text forms and the rest."""


_PYTHONS: dict[int, Any] = {**pickle._Unpickler.dispatch}


class _Unpickler(pickle._Unpickler):
    """Python's unpickler written in Python; the one in C uses a memo number as an index, so 2³⁰ makes it take 8 GB.

    No class or function is looked up. Keys are strings or small integers, since other keys can be made to collide.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._foreign: dict[str, type[Foreign]] = {}

    if TYPE_CHECKING:
        stack: list[Any]

        def pop_mark(self) -> list[Any]: ...

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _MEANINGS:
            return _MEANINGS[full]
        if module == "torch" and name.endswith("Storage"):
            return _KINDS.get(name, name)
        return self._foreign.setdefault(full, type("Foreign", (Foreign,), {"of": full[:120]}))

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[2], str):
            raise pickle.UnpicklingError("a tensor's values are stored in an unknown way")
        return _Storage(pid[1] if isinstance(pid[1], str) else "unknown", pid[2])

    def _set_items(self, items: list[Any]) -> None:
        for key in items[::2]:
            if type(key) is not str and not (type(key) is int and abs(key) < 1 << 53):
                raise pickle.UnpicklingError(f"a key is a {type(key).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][key] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    dispatch: ClassVar[dict[int, Any]] = {
        **{code[0]: _PYTHONS[code[0]] for code in _INSTRUCTIONS},
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: object) -> Stored:
    numbers = [offset, *shape, *strides]
    if not isinstance(storage, _Storage) or not all(type(number) is int for number in numbers):
        raise pickle.UnpicklingError("a tensor is described in an unknown way")
    return Stored(kind=storage.kind, shape=tuple(shape), strides=tuple(strides), offset=offset, storage=storage.key)


def _ordered_dict(*items: object) -> _Dict:
    if items:
        raise pickle.UnpicklingError("a dictionary is stored in an unknown way")
    return _Dict()


def _rebuild_parameter(data: Any, *_: object) -> Any:
    return data


_MEANINGS: dict[str, Any] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}


def plain(value: Any) -> str | None:
    """What is not a plain value in an object, or makes it no tree of reasonable size; None if the object is fine."""
    left, seen = [(value, 0)], 0
    while left:
        item, depth = left.pop()
        seen += 1
        if seen > 1 << 20 or depth > 64:
            return "more or deeper values than any checkpoint has"
        if isinstance(item, dict):
            if not all(type(key) is str for key in item):
                return "a key that is not a string"
            left += [(each, depth + 1) for pair in item.items() for each in pair]
        elif isinstance(item, (list, tuple)) and not isinstance(item, Stored):
            left += [(each, depth + 1) for each in item]
        elif isinstance(item, str):
            if not item.isascii() and re.search("[\ud800-\udfff]", item):
                return "a string that is not valid Unicode"
        elif isinstance(item, Foreign):
            return item.of
        elif item is not None and type(item) not in (int, float, bool):
            return "a tensor" if isinstance(item, Stored) else f"a {getattr(item, '__name__', type(item).__name__)}"
    return None
