"""The ExecuTorch target: pieces lowered to XNNPACK, as one .pte file each or all in one file."""

from __future__ import annotations

import hashlib
import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from mvmoe_deploy.bundle import Bundle, Piece
from mvmoe_deploy.errors import ExportError, root_cause
from mvmoe_deploy.exporters.attention import groups_of
from mvmoe_deploy.exporters.biases import correct_biases
from mvmoe_deploy.exporters.executorch.exporter import MAX_BATCH, ExecuTorchOptions
from mvmoe_deploy.exporters.executorch.passes import PASSES, split_diagonals, write_relus
from mvmoe_deploy.exporters.executorch.rewrite import rewrite
from mvmoe_deploy.exporters.graph import aten, check_same, flatten
from mvmoe_deploy.exporters.job import Converted, Job, count_parameters, describe_piece
from mvmoe_deploy.exporters.split import PieceModule
from mvmoe_deploy.exporters.weights import StoredWeights
from mvmoe_deploy.quiet import quiet

with quiet():
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        QuantizationConfig,
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir._serialize._named_data_store import NamedDataStore
    from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary, serialize_pte_binary
    from executorch.exir.dialects.edge._ops import EdgeOpOverload
    from executorch.exir.lowered_backend_module import LoweredBackendModule
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.schema import Program
    from executorch.exir.schema import Tensor as TensorValue
    from torch.fx.passes.infra.partitioner import Partition
    from torchao.quantization.pt2e import PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

PACKED = "model.pte"
SMALL = 1 << 14
"""int8 leaves convolutions of fewer weights alone. Each would save less than 50 kB, and their rounding adds up: with
all of them quantized, mobilenetv3_small_100 of random weights is off by 0.31 spreads of the logits."""

SMALLEST_SCALE = 2.0**-40
"""Of a quantized channel whose weights are all zero; a scale has to be a normal number above 0."""

METHOD = "forward"
"""The method in a separate file; Swift's and Kotlin's ``Module`` call this one by default."""


@dataclass(frozen=True)
class Delegation:
    """How much of a piece XNNPACK runs.

    Attributes:
        delegates: number of delegated subgraphs.
        delegated: number of operators in these subgraphs.
        undelegated: number of operators that are left to ExecuTorch's portable kernels, by name.
    """

    delegates: int
    delegated: int
    undelegated: dict[str, int]


@dataclass(frozen=True)
class Lowered:
    """One lowered piece.

    Attributes:
        data: content of its .pte file.
        tensors: the weights it was lowered with, by name.
        code: its graph before lowering, as text; pieces with equal code differ only in their weights.
        delegation: how much of it XNNPACK runs.
    """

    data: bytes
    tensors: dict[str, Tensor]
    code: str
    delegation: Delegation


def convert(job: Job[ExecuTorchOptions]) -> Converted:
    """Writes ``trunk.pte``, ``expert_00.pte`` … (layout ``separate``) or ``model.pte`` (``packed``).

    One piece of each family (the tails, say) is lowered, and the other pieces' weights are put into the result.

    Raises:
        ExportError: a piece cannot be lowered, or the rewritten piece does not compute the same outputs.
    """
    lowered: dict[str, Lowered] = {}
    left: dict[str, dict[str, int]] = {}
    for family in job.split.families():
        first: Lowered | None = None
        job.progress(f"{family[0].name}: tracing")
        modules = flat(family, job.options.precision)
        if job.options.precision == "int8" and (names := _quantized_convolutions(modules[0])):
            inputs = [job.calibration[piece.name] for piece in family]
            correct_biases(modules, inputs, dict.fromkeys(names, rounded))
        for piece, module in zip(family, modules, strict=True):
            job.progress(f"{piece.name}: lowering")
            left[piece.name] = left_in_fp32(module)
            try:
                tensors = first and weights_alike(first, modules[0], module)
                found = first and tensors and with_weights(first, tensors)
                if not found:
                    exported = export(module, piece, job.options.precision, job.options.max_batch)
                    same = first and _code(exported) == first.code
                    found = (first and same and with_weights(first, _tensors(exported))) or lower(exported)
                lowered[piece.name] = found
            except Exception as error:  # for an unknown layer, torch and executorch can raise anything
                raise ExportError(f"{piece.name}: executorch cannot lower it ({root_cause(error)})") from error
            first = first or found
    if job.options.layout == "packed":
        files = {PACKED: pack({piece.name: lowered[piece.name].data for piece in job.split.pieces})}
    else:
        files = {f"{name}.pte": piece.data for name, piece in lowered.items()}
    for name, data in files.items():
        (job.directory / name).write_bytes(data)
    packages = ("executorch", "torch", "torchao")
    return Converted(
        [_describe(piece, lowered[piece.name], job) for piece in job.split.pieces],
        {package: version(package) for package in packages},
        {
            "max_batch": job.options.max_batch,
            "delegation": {name: vars(piece.delegation) for name, piece in lowered.items()},
            **({"left_in_fp32": left} if job.options.precision == "int8" else {}),
        },
    )


def stored_weights(family: list[PieceModule], bundle: Bundle) -> Iterator[StoredWeights]:
    """Reads back the weights that the delegates of pieces' methods name by their sha256.

    A file does not say which of its weights are int8, nor which scales belong to which weight. So each weight is read
    in every way that its size allows, and :func:`mvmoe_deploy.exporters.weights.whose` takes the most similar one.
    """
    for piece, module in zip(family, flat(family, bundle.manifest.precision), strict=True):
        found = _stored(bundle.piece(piece.role, piece.expert, piece.layer), bundle)
        yield StoredWeights({name: weight.numpy() for name, weight in module.state_dict().items()}, found)


def _stored(written: Piece, bundle: Bundle) -> list[NDArray[np.floating[Any]]]:
    file = deserialize_pte_binary((bundle.path / written.graph).read_bytes())
    (plan,) = (plan for plan in file.program.execution_plan if plan.name == written.function)
    used = {
        digest.decode()
        for delegate in plan.delegates
        for digest in _SHA256.findall(file.program.backend_delegate_data[delegate.processed.index].data)
    }
    assert file.named_data is not None
    stored = file.named_data.pte_data.items()
    buffers = [file.named_data.buffers[each.buffer_index] for key, each in stored if key[-64:] in used]
    floats = [np.frombuffer(buffer, np.float32) for buffer in buffers if len(buffer) % 4 == 0]
    floats = [array for array in floats if np.isfinite(array).all()]
    if bundle.manifest.precision == "int8":
        scales = [array for array in floats if (array > 0).all()]
        quantized = [np.frombuffer(buffer, np.int8) for buffer in buffers]
        floats += [
            array.reshape(len(scale), -1) * scale[:, None]
            for array in quantized
            for scale in scales
            if len(array) > len(scale) and len(array) % len(scale) == 0
        ]
    return floats


def flat(family: list[PieceModule], precision: str = "fp32") -> list[fx.GraphModule]:
    """The modules of a family as flat graphs whose operators XNNPACK runs, with the weights that are stored."""
    passes = PASSES if precision == "fp32" else [*PASSES, write_relus]  # behind which no convolution is quantized
    modules = flatten(family, [rewrite(piece, reflect=precision == "fp32") for piece in family], passes)
    if precision == "int8":
        split_diagonals(modules, is_quantized)
        for piece, module in zip(family, modules, strict=True):
            check_same(piece, module, "with diagonals apart")
    return modules


def export(
    module: nn.Module, piece: PieceModule, precision: str = "fp32", max_batch: int = MAX_BATCH
) -> ExportedProgram:
    """Traces a piece's (rewritten) module for any batch up to ``max_batch``.

    ``int8`` quantizes linear layers and convolutions: weights per output channel, activations dynamically per tensor,
    so that nothing needs calibrating. (With static ranges calibrated on 512 images, for which XNNPACK needs int8
    outputs as well, the first zoo's model gave 84 to 92 of 1,000 images another class; 30 are allowed.) Convolutions in
    groups, which XNNPACK quantizes with static ranges alone, stay fp32, as do patch embeddings, norms, attention scores
    and the router. The router takes only a few kB, and rounding it would send images to other experts.
    """
    inputs, shapes = examples(piece, max_batch)
    with quiet(), torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
        if precision == "int8" and piece.role != "router":
            quantizer = (
                XNNPACKQuantizer()
                .set_global(_quantization())
                .set_filter_function(
                    lambda node: node.op == "get_attr" or is_quantized(node)  # asked of weights and biases as well
                )
            )
            traced = program.module()
            _order_channels(traced)
            prepared = prepare_pt2e(traced, quantizer)
            prepared(*inputs)
            program = torch.export.export(convert_pt2e(prepared), inputs, dynamic_shapes=shapes, strict=False)
    _simplify(program)
    return program


def _quantization() -> QuantizationConfig:
    """Weights per output channel, activations dynamically per tensor.

    ExecuTorch's own configuration lets no scale be smaller than 2⁻¹². A channel whose largest weight is 0.003 then has
    25 steps instead of 255, and the head with which timm's EVA and DINOv3 start, of weights below 1e-4, has none.
    """
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    observer: Any = PerChannelMinMaxObserver.with_args(eps=SMALLEST_SCALE)
    assert config.weight is not None
    weight = replace(config.weight, observer_or_fake_quant_ctr=observer)
    return replace(config, weight=weight)


def _order_channels(traced: fx.GraphModule) -> None:
    """Puts a copy with the channels last before every quantized convolution, and one with them first before outputs.

    XNNPACK's convolutions take channels last. Where the input of a dynamically quantized one is not, ExecuTorch 1.4.1
    puts the copy at the beginning of the graph, and the convolution reads width as channels
    (https://github.com/pytorch/executorch/pull/21637). It drops copies that change nothing.
    """
    graph = traced.graph
    convolutions = [node for node in graph.nodes if node.target is aten.conv2d.default and is_quantized(node)]
    for node in convolutions:
        _copy_before(node, node.args[0], torch.channels_last)
    for value in graph.output_node().all_input_nodes if convolutions else ():
        if value.meta["val"].ndim == 4:
            _copy_before(graph.output_node(), value, torch.contiguous_format)
    traced.recompile()


def _copy_before(reader: fx.Node, value: fx.Node, order: torch.memory_format) -> None:
    with reader.graph.inserting_before(reader):
        copied = reader.graph.call_function(aten._to_copy.default, (value,), {"memory_format": order})
    copied.meta["val"] = value.meta["val"].contiguous(memory_format=order)
    reader.replace_input_with(value, copied)


def examples(piece: PieceModule, max_batch: int) -> tuple[tuple[Tensor, ...], tuple[dict[int, Dim], ...] | None]:
    """Inputs to trace a piece with, and their dynamic shapes for any batch up to ``max_batch``."""
    # the examples hold two images; a piece with a fixed batch is traced with one image
    inputs = tuple(example[:max_batch] for example in piece.inputs.values())
    return inputs, None if max_batch == 1 else tuple({0: Dim("batch", min=1, max=max_batch)} for _ in inputs)


def lower(program: ExportedProgram) -> Lowered:
    """Lowers a traced piece to XNNPACK; takes seconds to a minute."""
    # The graph's text is taken first, because lowering changes the program in place.
    tensors, code = _tensors(program), _code(program)
    # With gradients on, constants are marked as requiring them, and the bytes would depend on the caller's setting.
    with quiet(), torch.no_grad():
        edge = to_edge_transform_and_lower({METHOD: program}, partitioner=[WholePartitioner()])
        delegated = delegation(edge)
        # Memory for inputs is not planned: the runtime then reads the caller's memory instead of copying it.
        planning = MemoryPlanningPass(alloc_graph_input=False)
        data = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)).buffer
    return Lowered(bytes(data), tensors, code, delegated)


class WholePartitioner(XnnpackPartitioner):
    """XNNPACK's partitioner, which also merges partitions if nothing has to run between them.

    XNNPACK's own merging cuts a graph after every quantized input that several layers read, as q, k and v do.
    """

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        partitions = super().generate_partitions(ep)
        delegated = {node: number for number, partition in enumerate(partitions) for node in partition.nodes}
        # The count says how often a value has left the delegates and come back; partitions with the same count do not
        # depend on each other.
        counts: dict[int | torch.fx.Node, int] = {}
        before: dict[int | torch.fx.Node, int] | None = None
        while counts != before:
            before = dict(counts)
            for node in ep.graph.nodes:
                key = delegated.get(node, node)
                for other in node.all_input_nodes:
                    leaves = other in delegated and node not in delegated
                    count = counts.get(delegated.get(other, other), 0) + leaves
                    counts[key] = max(counts.get(key, 0), count)
        merged: dict[int, Partition] = {}
        for number, partition in enumerate(partitions):
            whole = merged.setdefault(counts.get(number, 0), Partition(id=counts.get(number, 0)))
            for node in partition.nodes:
                whole.add_node(node)
        return list(merged.values())


def weights_alike(lowered: Lowered, first: fx.GraphModule, module: fx.GraphModule) -> dict[str, Tensor] | None:
    """The weights that a module's program would have, without tracing it, which takes longer than everything else.

    A module that has the graph of ``first``, whose program was ``lowered``, has its program too but for the weights. So
    that is the case where the program has the module's own weights under the module's own names; int8 makes new ones.

    Returns:
        The weights by the program's names, or None if they are to be had by tracing alone.
    """
    before, after = first.state_dict(), module.state_dict()
    if str(first.graph) != str(module.graph) or _kinds(before) != _kinds(after):
        return None
    if not all(name in before and torch.equal(weight, before[name]) for name, weight in lowered.tensors.items()):
        return None
    return {name: after[name] for name in lowered.tensors}


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def with_weights(lowered: Lowered, tensors: dict[str, Tensor]) -> Lowered | None:
    """Builds what lowering the same program with other weights would give, byte for byte, from a ``lowered`` piece.

    XNNPACK's weights are stored beside its graph under the sha256 of their bytes, so both weights and names are
    replaced in place.

    Args:
        lowered: the piece that was lowered.
        tensors: the other weights, by the names in ``lowered.tensors``.

    Returns:
        The lowered piece, or None if that is impossible: a weight is not stored unchanged, or two weights are equal in
        one piece and not in the other.
    """
    if tensors.keys() != lowered.tensors.keys():
        return None
    contents: dict[str, bytes] = {}  # new contents by the sha256 of the old ones
    for name, old in lowered.tensors.items():
        content = _bytes(tensors[name])
        if contents.setdefault(_sha256(_bytes(old)), content) != content:
            return None
    if len(set(contents.values())) != len(contents):
        return None
    renamed = {old: _sha256(content) for old, content in contents.items() if _sha256(content) != old}

    def rename(key: bytes) -> bytes:
        return _SHA256.sub(lambda match: renamed.get(match[0].decode(), match[0].decode()).encode(), key)

    file = deserialize_pte_binary(lowered.data)
    assert file.named_data is not None
    stored = {key.removeprefix("scale_"): entry for key, entry in file.named_data.pte_data.items()}
    buffers = file.named_data.buffers
    for digest in renamed:
        if digest not in stored or len(buffers[stored[digest].buffer_index]) != len(contents[digest]):
            return None
        buffers[stored[digest].buffer_index] = contents[digest]
    file.named_data.pte_data = {rename(key.encode()).decode(): entry for key, entry in file.named_data.pte_data.items()}
    for delegate in file.program.backend_delegate_data:
        delegate.data = rename(delegate.data)
    return Lowered(_serialize(file), tensors, lowered.code, lowered.delegation)


def pack(files: Mapping[str, bytes]) -> bytes:
    """Packs files of one method each into one file of many methods.

    Lowering all methods together gives the same result, but takes minutes instead of a second. Weights are stored
    under their sha256, so weights that several methods use are stored once.

    Args:
        files: content of each .pte file, by the name that its method gets.
    """
    packed: Program | None = None
    store = NamedDataStore()
    for name, data in files.items():
        file = deserialize_pte_binary(data)
        program = file.program
        if file.named_data is not None:
            store.merge_named_data_store(file.named_data)
        (plan,) = program.execution_plan
        plan.name = name
        if packed is None:
            packed = program
            continue
        # A method refers to delegates and constants by their index in its file. Constant 0 stands for "none".
        for delegate in plan.delegates:
            delegate.processed.index += len(packed.backend_delegate_data)
        for value in plan.values:
            if isinstance(value.val, TensorValue) and value.val.data_buffer_idx > 0:
                value.val.data_buffer_idx += len(packed.constant_buffer) - 1
        packed.backend_delegate_data += program.backend_delegate_data
        packed.constant_buffer += program.constant_buffer[1:]
        packed.execution_plan.append(plan)
    assert packed is not None
    return _serialize(PTEFile(packed, named_data=store.get_named_data_store_output()))


_SHA256 = re.compile(rb"[0-9a-f]{64}")


def is_quantized(node: Any) -> bool:
    """Whether int8 quantizes an operator's weight: that of a linear layer or convolution outside the router.

    A weight that a pass made, such as the row of a mean, has a name that does not end in ``weight``.
    """
    return _has_weight(node) and not _why_fp32(node)


def _quantized_convolutions(module: fx.GraphModule) -> list[str]:
    """Names of the weights of the convolutions that int8 quantizes."""
    found = [node for node in module.graph.nodes if is_quantized(node) and node.target is aten.conv2d.default]
    return [str(node.args[1].target) for node in found]


def rounded(weight: Tensor) -> Tensor:
    """A weight as int8 stores it, widened again: with a scale for each output channel."""
    scale = (weight.flatten(1).abs().amax(1) / 127).clamp(min=SMALLEST_SCALE)
    scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
    return torch.round(weight / scale).clamp(-127, 127) * scale


def left_in_fp32(graph: fx.GraphModule) -> dict[str, int]:
    """The layers with weights that int8 leaves as they are: how many of each kind."""
    left = Counter(_why_fp32(node) for node in graph.graph.nodes if _has_weight(node))
    return {kind: count for kind, count in sorted(left.items()) if kind}


def _has_weight(node: Any) -> bool:
    if node.target not in (aten.linear.default, aten.conv2d.default, aten.conv2d.padding, aten.conv1d.default):
        return False
    weight = node.args[1]
    return weight.op == "get_attr" and str(weight.target).split(".")[-1] == "weight"


def _why_fp32(node: Any) -> str:
    """The kind of layer that int8 does not quantize; empty if it does."""
    if str(node.args[1].target).split(".")[0] == "router":
        return "linear of the router"
    if node.target is aten.linear.default:
        return ""
    if node.target is not aten.conv2d.default:
        return str(node.target.__name__).partition(".")[0]
    if node.args[0].op == "placeholder":
        return "first conv2d"
    if groups_of(node) != 1:
        return "conv2d in groups"
    weight: Tensor = operator.attrgetter(str(node.args[1].target))(node.graph.owning_module)
    return "small conv2d" if weight.numel() < SMALL else ""


def _serialize(file: PTEFile) -> bytes:
    return bytes(serialize_pte_binary(file, extract_delegate_segments=True))


def _simplify(program: ExportedProgram) -> None:
    """Removes, in place, operators that would cut a delegate in two.

    ``x[:, :None]`` leaves a copy that XNNPACK does not accept, and XNNPACK accepts a reshape only if its batch is
    written as -1.
    """
    graph = program.graph_module.graph
    outputs = set(graph.output_node().all_input_nodes)  # the program's signature has their names
    for node in list(graph.nodes):
        if node.op != "call_function" or node in outputs:
            continue
        if node.target in (aten.slice.Tensor, aten.alias.default) and _shape(node) == _shape(node.args[0]):
            node.replace_all_uses_with(node.args[0])
        elif node.target in (aten.flatten.using_ints, aten.view.default, aten.reshape.default):
            shape = [extent if isinstance(extent, int) else -1 for extent in _shape(node)]
            source = node.args[0]
            if shape.count(-1) != 1:
                continue
            if not source.meta["val"].is_contiguous():
                with graph.inserting_before(node):
                    kept = {"memory_format": torch.contiguous_format}
                    copied = graph.call_function(aten.clone.default, (source,), kept)
                copied.meta["val"] = source.meta["val"].contiguous()
                source = copied
            node.target, node.args, node.kwargs = aten.view.default, (source, shape), {}
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _shape(node: torch.fx.Node) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape


def delegation(edge: EdgeProgramManager) -> Delegation:
    """How much of a lowered program XNNPACK runs."""
    module = edge.exported_program(METHOD).graph_module
    delegates = delegated = 0
    undelegated: Counter[str] = Counter()
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(module, node.target), LoweredBackendModule):
            delegates += 1
            graph = getattr(module, node.target).original_module.graph
            delegated += sum(inner.op == "call_function" for inner in graph.nodes)
        elif isinstance(node.target, EdgeOpOverload):
            undelegated[node.target.__name__] += 1
    return Delegation(delegates, delegated, dict(sorted(undelegated.items())))


def _tensors(program: ExportedProgram) -> dict[str, Tensor]:
    """The weights that a program uses, without the original weights that quantizing leaves in it unused."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    values = {**program.constants, **program.state_dict}
    used = [node.name for node in program.graph_module.graph.nodes if node.op == "placeholder" and node.users]
    return {names[name]: values[names[name]].detach() for name in used if name in names}


def _code(program: ExportedProgram) -> str:
    return f"{program.graph_module.graph}\n{program.graph_signature}"


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _sha256(content: bytes) -> str:
    """The name that XNNPACK's lowering gives a weight."""
    return hashlib.sha256(content).hexdigest()


def _describe(piece: PieceModule, lowered: Lowered, job: Job[ExecuTorchOptions]) -> Piece:
    packed = job.options.layout == "packed"
    graph = PACKED if packed else f"{piece.name}.pte"
    # The size of the weights as stored; with int8, only some of them are quantized. The rest of the file is a few kB.
    per_weight = len(lowered.data) / max(1, count_parameters(piece.module))
    flops = job.piece_flops(piece.role)
    function = piece.name if packed else METHOD
    return describe_piece(piece, graph, [graph], flops, function=function, bytes_per_weight=per_weight)
