"""The ExecuTorch backend: one program per piece, run by executorch's Python runtime.

Importing this module imports neither executorch nor torch (which executorch's Python runtime needs). Opening the
backend imports both, which takes some seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.backends import LoadedPiece, OutputCheck, native_path
from mvmoe_deploy.backends.xnnpack_graph import check_graph
from mvmoe_deploy.bundle import Bundle, Piece, TensorSpec
from mvmoe_deploy.errors import BackendError, first_line
from mvmoe_deploy.quiet import quiet

FLOAT = 6
"""The number that executorch uses for float32."""

SEGMENT = 1
"""The number that executorch uses for data outside the program's flatbuffer."""

XNNPACK = "XnnpackBackend"
"""executorch's name for the delegate that exports are lowered to, the only one whose graphs can be checked here."""

MAX_PROGRAM_BYTES = 64 << 20
"""Largest program, weights not included; once parsed, a program takes a multiple of its size."""

MAX_PLANNED_BYTES = 1 << 30
"""Largest activation memory a method may ask for; a trunk asks for a few MB."""

VIEW_NAME, VIEW = "executorch_prim::et_view", ("Tensor", "List[int]", "Tensor")
"""executorch's own operator, of which torch has no schema: another shape for a tensor's memory."""

ITEM_BYTES = {"BYTE": 1, "CHAR": 1, "BOOL": 1, "INT": 4, "LONG": 8, "FLOAT": 4, "DOUBLE": 8}
"""Size of an element in bytes, by executorch's name for its type."""

_lock = threading.Lock()
_pool_threads: int | None = None  # size of the process-wide thread pool, once it has been set


class ExecuTorchBackend:
    """Runs ``executorch`` bundles on the CPU.

    Every loaded piece has a program of its own, in the packed layout too, so dropping the piece frees its packed
    weights and activations. The file is mapped, and weights that XNNPACK has packed are not kept twice.
    """

    name = "executorch"
    unloads = True

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self._bundle = bundle
        self._runtime = _runtime(threads)
        self._sound: set[str] = set()  # files that have passed check_program

    def load(self, piece: Piece) -> LoadedPiece:
        path = self._bundle.path / piece.graph
        method = piece.function or "forward"
        if piece.graph not in self._sound:
            check_program(path)
            self._sound.add(piece.graph)
        try:
            # Loading by path maps the file; a program loaded from bytes would read them after Python has freed them.
            program = self._runtime.load_program(native_path(path))
            if method not in program.method_names:
                raise BackendError(f"{path}: has no method {method!r}, which manifest.json names; export again")
            _check_signature(program.metadata(method), piece, path)
            return _LoadedPiece(piece, path, program, program.load_method(method))
        except RuntimeError as error:
            raise BackendError(f"{path}: executorch cannot load it ({first_line(error)}); export again") from None


class _LoadedPiece:
    def __init__(self, piece: Piece, path: Path, program: Any, method: Any) -> None:
        import torch

        self._piece, self._path, self._program, self._method = piece, path, program, method
        shapes = [method.metadata.input_tensor_meta(i).sizes() for i in range(len(piece.inputs))]
        self._max_batch = min(shape[0] for shape in shapes)
        self._expected = [tuple(spec.shape[1:]) for spec in piece.inputs]  # shapes for one image
        self._check = OutputCheck(piece, path)
        self._tensor = torch.from_numpy

    def __del__(self) -> None:
        # Dropping program and method frees them, but glibc keeps freed memory for the process unless told otherwise.
        # Without this call, eight dropped trunks of 18 MB each gave back nothing; with it, all of their memory.
        vars(self).clear()
        with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)

    def __call__(self, *inputs: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        arrays = self._checked(inputs)
        batch = len(arrays[0])
        if batch <= self._max_batch:
            return self._execute(arrays)
        parts = [
            self._execute([array[start : start + self._max_batch] for array in arrays])
            for start in range(0, batch, self._max_batch)
        ]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def _checked(self, inputs: tuple[NDArray[Any], ...]) -> list[NDArray[np.float32]]:
        """The inputs as contiguous float32; executorch would read a transposed array as if it were contiguous."""
        specs = self._piece.inputs
        if len(inputs) != len(specs):
            raise BackendError(f"{self._where}: takes {len(specs)} inputs, was given {len(inputs)}")
        # np.require takes 15 µs after a model's run, because the model's data has displaced its code from the cache
        arrays = [array if _usable(array) else np.require(array, np.float32, ["C", "W"]) for array in inputs]
        for spec, expected, array in zip(specs, self._expected, arrays, strict=True):
            if not array.ndim or array.shape[1:] != expected or not len(array):
                raise BackendError(
                    f"{self._where}: input {spec.name!r} has shape {list(array.shape)}, should have {spec.shape}"
                )
        if len({len(array) for array in arrays}) > 1:
            raise BackendError(f"{self._where}: inputs differ in batch: {[len(array) for array in arrays]}")
        return arrays

    def _execute(self, arrays: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        try:
            outputs = self._method.execute([self._tensor(array) for array in arrays])
        except RuntimeError as error:
            raise BackendError(f"{self._where}: executorch failed ({first_line(error)})") from None
        arrays_out = [output.numpy() for output in outputs]
        self._check(arrays_out, len(arrays[0]))
        return arrays_out

    @property
    def _where(self) -> str:
        return f"{self._path}: {self._piece.name}"


def open_backend(bundle: Bundle, threads: int | None = 1) -> ExecuTorchBackend:
    """See :func:`mvmoe_deploy.backends.open_backend`."""
    return ExecuTorchBackend(bundle, threads)


def check_program(path: Path) -> None:
    """Reads a .pte file's program in Python and checks every size and index in it before native code uses them.

    executorch verifies the flatbuffer and that segments lie in the file, but then trusts indices and shapes. Without
    this check, 6 of 400 files with random bits of the program flipped ended the process, as did 14 of 500 with bits of
    XNNPACK's graphs flipped (with manifest.json's hashes altered to match). With this check, none of 2,500 and none of
    3,000 did. That is no proof: it is best to run an untrusted bundle in a process of its own.

    Raises:
        BackendError: the file is not a .pte file, or is damaged or unsafe; the message says what is wrong.
    """
    with quiet():
        from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
        from executorch.exir._serialize._program import _get_extended_header

    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _get_extended_header(data[:64])
            if data[4:8] != b"ET12" or header is None or not 64 <= header.program_size <= len(data):
                raise ValueError("no ExecuTorch header")
            if header.program_size > MAX_PROGRAM_BYTES:
                raise ValueError(f"its program is larger than {MAX_PROGRAM_BYTES >> 20} MB")
            program = _flatbuffer_to_program(data[: header.program_size])
            delegates = {delegate.id for plan in program.execution_plan for delegate in plan.delegates}
            others = sorted(delegates - {XNNPACK})
            problem = None if others else _problem(program, header.segment_base_offset, data)
    except OSError as error:
        raise BackendError(f"{path}: {error.strerror}") from None
    except Exception as error:  # damaged bytes can make the flatbuffer reader raise anything
        raise BackendError(f"{path}: not a .pte file, or damaged ({first_line(error)}); export again") from None
    if others:
        raise BackendError(
            f"{path}: is lowered to {', '.join(others)}; this backend runs what mvmoe-export lowers to, {XNNPACK}"
        )
    if problem:
        raise BackendError(f"{path}: damaged or unsafe: {problem}; export again")


def _problem(program: Any, base: int, data: mmap.mmap) -> str | None:
    """What is wrong with a program that is a valid flatbuffer; None if it is fine.

    Args:
        program: the program as read.
        base: position in the file at which its segments start.
        data: the file's bytes.
    """
    if any(base + segment.offset + segment.size > len(data) for segment in program.segments):
        return "a segment reaches beyond the end of the file"
    segments = [slice(base + segment.offset, base + segment.offset + segment.size) for segment in program.segments]
    for weight in program.named_data or []:
        # XNNPACK's lowering names a weight after its sha256, and then reads as many bytes of it as the graph says.
        digest = weight.key.removeprefix("scale_")
        if weight.segment_index >= len(segments) or sha256(data[segments[weight.segment_index]]).hexdigest() != digest:
            return f"weight {weight.key} does not match its name, which is its sha256"
    weights = {weight.key: program.segments[weight.segment_index].size for weight in program.named_data or []}
    if program.mutable_data_segments or program.constant_buffer:
        return "it has state or inline constants, which no export of this project has"
    constants: list[int] = []  # bytes from each constant's offset to the end of their segment
    if program.constant_segment and program.constant_segment.offsets:
        if program.constant_segment.segment_index >= len(segments):
            return "constants refer to a segment that does not exist"
        end = program.segments[program.constant_segment.segment_index].size
        constants = [end - offset for offset in program.constant_segment.offsets]
    for plan in program.execution_plan:
        for delegate in plan.delegates:
            place = delegate.processed
            if place.location != SEGMENT or place.index >= len(segments):
                return f"delegate {delegate.id!r} refers to a segment that does not exist"
        arguments = [check_graph(data[segments[delegate.processed.index]], weights) for delegate in plan.delegates]
        problem = _plan_problem(plan, constants, arguments)
        if problem:
            return f"method {plan.name!r}: {problem}"
    return None


def _plan_problem(plan: Any, constants: list[int], arguments: list[int]) -> str | None:
    if plan.non_const_buffer_device or sum(plan.non_const_buffer_sizes) > MAX_PLANNED_BYTES:
        return f"asks for a device or for more than {MAX_PLANNED_BYTES >> 20} MB of activation memory"
    values = [value.val for value in plan.values]
    kinds = [type(value).__name__ for value in values]
    tensors = {index for index, kind in enumerate(kinds) if kind == "Tensor"}
    if not tensors.issuperset([*plan.inputs, *plan.outputs]):
        return "an input or output is not a tensor"
    instructions = [instruction for chain in plan.chains for instruction in chain.instructions]
    views = _views(plan, instructions, tensors)
    for index, (value, kind) in enumerate(zip(values, kinds, strict=True)):
        if kind == "Tensor":
            elsewhere = index in plan.inputs or index in views
            problem = _tensor_problem(value, elsewhere, constants, plan.non_const_buffer_sizes)
            if problem:
                return f"tensor {index} {problem}"
        elif kind == "IntList" and any(i >= len(values) or kinds[i] != "Int" for i in value.items):
            return f"list {index} refers to something that is not a number"
        elif kind == "TensorList" and not tensors.issuperset(value.items):
            return f"list {index} refers to something that is not a tensor"
        elif kind not in ("Int", "Double", "Bool", "Null", "IntList", "TensorList"):
            return f"value {index} is a {kind}, which no export of this project has"
    waiting = set(views)  # views have no memory until they are made
    for instruction in instructions:
        call = instruction.instr_args
        if not hasattr(call, "args") or any(index >= len(values) for index in call.args):
            return "an instruction is of another kind or refers to a value that does not exist"
        given = [kinds[index] for index in call.args]
        made = views.get(call.args[-1]) if call.args else None
        if made is not None and made is call:
            waiting.discard(call.args[-1])
        lists = [index for place in call.args if kinds[place] == "TensorList" for index in values[place].items]
        if waiting.intersection([*call.args, *lists]):
            return "a view is used before it is made"
        if hasattr(call, "delegate_index"):
            count = len(given) if set(given) == {"Tensor"} else -1
            if call.delegate_index >= len(arguments) or count != arguments[call.delegate_index]:
                return "a delegate does not exist or is called with the wrong arguments"
        elif call.op_index >= len(plan.operators) or not _fits(plan.operators[call.op_index], given):
            return "an operator does not exist or is called with the wrong kinds of arguments"
    return None


def _views(plan: Any, instructions: list[Any], tensors: set[int]) -> dict[int, Any]:
    """The calls that make another view of a tensor's memory, by the view: a tensor as large, without memory of its own.

    Only views of tensors that have memory are here; all others are tensors without memory, which are refused.
    """
    values = [value.val for value in plan.values]
    views: dict[int, Any] = {}
    for instruction in instructions:
        call = instruction.instr_args
        if not hasattr(call, "op_index") or call.op_index >= len(plan.operators) or len(call.args) != len(VIEW):
            continue
        operator, (source, _, result) = plan.operators[call.op_index], call.args
        if operator.name != VIEW_NAME or result in views or not tensors.issuperset([source, result]):
            continue
        before, after = values[source], values[result]
        size = [int(np.prod(each.sizes, dtype=object)) for each in (before, after)]
        has_memory = before.allocation_info or before.data_buffer_idx or source in plan.inputs or source in views
        fits = size[0] == size[1] and before.scalar_type == after.scalar_type and not after.allocation_info
        if has_memory and fits and not after.data_buffer_idx and result not in plan.inputs:
            views[result] = call
    return views


def _tensor_problem(tensor: Any, elsewhere: bool, constants: list[int], planned: list[int]) -> str | None:
    if tensor.scalar_type.name not in ITEM_BYTES or min(tensor.sizes, default=1) < 0 or len(tensor.sizes) > 8:
        return "has an unknown type or shape"
    if sorted(tensor.dim_order) != list(range(len(tensor.sizes))) or tensor.storage_offset or tensor.extra_tensor_info:
        return "has an unknown layout"
    size = int(np.prod(tensor.sizes, dtype=object)) * ITEM_BYTES[tensor.scalar_type.name]
    place = tensor.allocation_info
    if tensor.data_buffer_idx:
        if place or tensor.data_buffer_idx >= len(constants) or size > constants[tensor.data_buffer_idx]:
            return "reaches beyond the constants"
    elif place:
        if not 0 < place.memory_id < len(planned) or place.memory_offset + size > planned[place.memory_id]:
            return "reaches beyond the activation memory"
    elif not elsewhere or size > MAX_PLANNED_BYTES:
        return "has no memory"
    return None


def _fits(operator: Any, given: list[str]) -> bool:
    """Whether an operator accepts values of these kinds, according to its torch schema."""
    import torch

    if operator.name == VIEW_NAME:
        wanted = list(VIEW)
    else:
        schema = torch._C._get_schema(operator.name, operator.overload)
        wanted = [str(argument.type) for argument in [*schema.arguments, *schema.returns]]
    allowed = {
        "Tensor": {"Tensor"},
        "int": {"Int"},
        "number": {"Int", "Double"},
        "bool": {"Bool"},
        "float": {"Double"},
        "List[int]": {"IntList"},
        "List[Tensor]": {"TensorList"},
    }
    if len(wanted) != len(given):
        return False
    for kind, type_ in zip(given, wanted, strict=True):
        inner = type_.removeprefix("Optional[").removesuffix("]") if type_.startswith("Optional[") else type_
        if kind not in allowed.get(inner, set()) | ({"Null"} if inner != type_ else set()):
            return False
    return True


def _check_signature(found: Any, piece: Piece, path: Path) -> None:
    """Compares a method's inputs and outputs with the manifest's."""
    for what, specs, count, meta in (
        ("inputs", piece.inputs, found.num_inputs(), found.input_tensor_meta),
        ("outputs", piece.outputs, found.num_outputs(), found.output_tensor_meta),
    ):
        tensors = [meta(i) for i in range(count)]
        if count != len(specs) or not all(map(_agrees, specs, tensors)):
            shapes = [list(tensor.sizes()) for tensor in tensors]
            raise BackendError(
                f"{path}: has {what} {shapes}, manifest.json says {[spec.shape for spec in specs]} of float32"
            )


def _usable(array: Any) -> bool:
    """Whether executorch can read an array in place."""
    return (
        type(array) is np.ndarray
        and array.dtype == np.float32
        and array.flags.c_contiguous
        and array.flags.writeable  # else torch warns
    )


def _agrees(spec: TensorSpec, tensor: Any) -> bool:
    sizes = tensor.sizes()
    if len(sizes) != len(spec.shape) or tensor.dtype() != FLOAT or spec.dtype != "float32":
        return False
    return all(isinstance(wanted, str) or size == wanted for size, wanted in zip(sizes, spec.shape, strict=True))


def _runtime(threads: int | None) -> Any:
    """Returns executorch's runtime with its thread pool set to ``threads``.

    Raises:
        BackendError: executorch or torch is not installed, or the process already uses another number of threads.
    """
    global _pool_threads
    try:
        with quiet():
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
    except ImportError as error:
        raise BackendError(
            f"the executorch backend cannot be imported ({first_line(error)}): pip install 'mvmoe-deploy[executorch]'"
        ) from None
    with _lock:
        threads = threads or _pool_threads or 1
        if _pool_threads is None:
            # The pool can be set only before the first method is loaded: methods keep the pool they were loaded with.
            with quiet():
                portable_lib._unsafe_reset_threadpool(threads)
            _pool_threads = threads
        elif _pool_threads != threads:
            raise BackendError(
                f"threads={threads}: this process already runs executorch with {_pool_threads} threads; "
                "use that number, or another process"
            )
    return Runtime.get()
