"""The ONNX target: each kind of piece is traced once, and several graphs share the weight files."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxscript
import torch
from torch import Tensor, fx, nn

from mvmoe_deploy.backends import GraphError
from mvmoe_deploy.backends.onnx_graph import check_graph
from mvmoe_deploy.bundle import LOGITS, WEIGHT_ALIGNMENT, Bundle, Piece, TensorSpec, Weight
from mvmoe_deploy.errors import ExportError, root_cause
from mvmoe_deploy.exporters.biases import correct_biases
from mvmoe_deploy.exporters.exporter import Options
from mvmoe_deploy.exporters.graph import flatten
from mvmoe_deploy.exporters.job import Converted, Job, describe_piece, refusal
from mvmoe_deploy.exporters.onnx.passes import PASSES
from mvmoe_deploy.exporters.onnx.quantise import PRECISIONS, Coding, loaded_bytes, quantise, stored_matrices
from mvmoe_deploy.exporters.rounding import narrowed
from mvmoe_deploy.exporters.split import PieceModule, computes_as, private_copy, shared_weights
from mvmoe_deploy.exporters.weights import StoredWeights
from mvmoe_deploy.models.architectures.vit import Attention
from mvmoe_deploy.quiet import quiet

OPSET = 23
"""The first ONNX version that has Attention as one operator."""

INLINE_BYTES = 1024
"""Smaller weights are stored in the graph itself: opening an external weight costs more than it saves."""

RANKED = 5
"""Number of classes that a graph ranks itself, best first, with their probabilities.

After a model's run, the processor's cache holds only the model's own code. Softmax and ranking of 1000 classes then
take 130 µs in numpy, but 30 µs as two more nodes.
"""

OPTIMISED_OPERATORS = {
    *("Add", "Attention", "Gather", "Gelu", "Gemm", "LayerNormalization"),
    *("MatMul", "Mul", "Slice", "Softmax", "TopK", "Unsqueeze"),
    *("DynamicQuantizeLinear", "MatMulIntegerToFloat", "MatMulNBits"),
}
"""A graph of only these operators runs as fast without onnxruntime's optimiser, which takes a third of loading."""


class SplitAttention(nn.Module):
    """Attention for ONNX: separate projections and the Attention operator on 3-D inputs.

    It needs none of the Reshape, Transpose and Split nodes of the stock form, which cost a fifth of the time on
    onnxruntime's CPU provider. It also drops two of the biases. The key's bias adds the same to all of a query's
    scores, and softmax removes that again. The value's bias passes through attention unchanged, because attention is a
    weighted mean, so it becomes part of the output projection's bias.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        q, k, v = attention.qkv.weight.chunk(3)
        q_bias, _, v_bias = attention.qkv.bias.detach().chunk(3)
        proj = attention.proj
        self.q, self.k, self.v = _linear(q, q_bias), _linear(k, None), _linear(v, None)
        self.proj = _linear(proj.weight, proj.bias.detach() + proj.weight.detach() @ v_bias)

    def forward(self, x: Tensor, n: int | None = None) -> Tensor:
        q, k, v = self.q(x[:, :n]), self.k(x), self.v(x)
        result = torch.onnx.ops.attention(q, k, v, q_num_heads=self.heads, kv_num_heads=self.heads)
        projected: Tensor = self.proj(result[0])
        return projected


def rewrite(module: nn.Module, done: dict[int, object]) -> nn.Module:
    """Builds an equivalent module for tracing; its weights are the original's, or computed from them.

    Args:
        module: the original, which is not changed.
        done: what was rewritten before, by the original's id, so that a module shared by several pieces stays shared.
    """
    for part in module.modules():
        if id(part) not in done and computes_as(part, Attention):
            done[id(part)] = SplitAttention(part)
    return private_copy(module, done)


def flat(family: list[PieceModule]) -> list[fx.GraphModule]:
    """The modules of a family as flat graphs whose weights are those that the written graphs hold, by name."""
    done: dict[int, object] = {}
    return flatten(family, [rewrite(piece.module, done) for piece in family], PASSES)


def convert(job: Job[Options]) -> Converted:
    """Writes one ``.onnx`` file per piece and the weight files that these refer to.

    Raises:
        ExportError: a module cannot be traced, runtimes would refuse its graph, or the layout does not fit the model
            or precision.
    """
    pieces: list[Piece] = []
    half, swappable = job.options.precision == "fp16", job.options.layout == "swappable"
    if swappable and half:
        raise ExportError("the swappable layout has no fp16: use --precision fp32, int8 or int4")
    if swappable and job.split.routing is None:
        raise ExportError("the swappable layout is for experts, and a dense model has none: use --layout separate")
    for family in job.split.families():
        job.progress(f"{family[0].name}: tracing")
        modules = flat(family)
        weights = set(modules[0].state_dict())
        store = _WeightFile(job.directory, f"{_shared_name(family[0])}.bin")
        graph = trace(family[0], _with_distinct_weights(modules[0]))
        by_name = weights <= set(graph.graph.initializers)
        graph, codings = _quantised(graph, weights, job)
        if widened := {coding.weight: coding.rounded for coding in codings if coding.widened}:
            correct_biases(modules, [job.calibration[piece.name] for piece in family], widened)
        states = [dict(module.state_dict()) for module in modules]
        shared = shared_weights(modules)
        states, shared = [_coded(state, codings) for state in states], _coded_names(shared, codings)
        if swappable and set(states[0]) != shared:
            if not by_name:
                raise ExportError(
                    f"{family[0].name}: tracing folds its weights, so they cannot be swapped: use --layout separate"
                )
            pieces += _write_swappable(graph, family, states=states, shared=shared, store=store, job=job)
            continue
        for piece, module, state in zip(family, modules, states, strict=True):
            common = shared
            if not by_name:
                # The exporter folded weights into constants (a BatchNorm into its convolution, say), so another
                # expert's weights cannot replace them, and each piece is traced with its own. A folded weight may keep
                # its old name, so the values in the graph decide.
                job.progress(f"{piece.name}: tracing")
                graph = trace(piece, module)
                graph, codings = _quantised(graph, weights, job)
                held = {n: _constant(value) for n, value in graph.graph.initializers.items()}
                stored = _coded(dict(module.state_dict()), codings)
                common = {n for n in shared & held.keys() if torch.equal(held[n], stored[n])}
                state = {n: value for n, value in held.items() if n in stored}
            own = _WeightFile(job.directory, f"{piece.name}.bin")
            stores = {name: store if name in common else own for name in graph.graph.initializers}
            path = job.directory / f"{piece.name}.onnx"
            narrow = narrowed(module) & set(state) if half else set()
            files = _write_graph(graph.clone(), path, state=state, stores=stores, narrow=narrow)
            pieces.append(_describe(piece, graph, name=path.name, files=files, job=job))
    _check_graphs(pieces, job.directory)
    versions = {m.__name__: m.__version__ for m in (onnx, onnxruntime, onnxscript)}
    return Converted(pieces, {**versions, "opset": str(OPSET)})


def _quantised(graph: ir.Model, weights: set[str], job: Job[Options]) -> tuple[ir.Model, list[Coding]]:
    """The graph with products of integers, if the precision asks for them, and how its weights are then stored."""
    if job.options.precision not in PRECISIONS:
        return graph, []
    graph = graph.clone()
    return graph, quantise(graph, weights, job.options.precision)


def _coded(state: dict[str, Tensor], codings: list[Coding]) -> dict[str, Tensor]:
    """A piece's weights as its graph names them: those that were quantised are replaced by their constants."""
    coded = {name: value for coding in codings for name, value in coding.coded(state).items()}
    gone = {coding.weight for coding in codings}
    return {**{name: value for name, value in state.items() if name not in gone}, **coded}


def _coded_names(names: set[str], codings: list[Coding]) -> set[str]:
    parts = {part for coding in codings if coding.weight in names for part in coding.parts}
    return (names - {coding.weight for coding in codings}) | parts


def _check_graphs(pieces: list[Piece], directory: Path) -> None:
    """Asks of every graph what a runtime will ask before it runs it.

    Raises:
        ExportError: a model of somebody else with an operator, say, that runtimes refuse.
    """
    for piece in pieces:
        sizes = {path: (directory / path).stat().st_size for path in piece.files}
        try:
            check_graph((directory / piece.graph).read_bytes(), piece, sizes)
        except GraphError as error:
            raise refusal(piece.name, "onnxruntime's backend", error) from None


def stored_weights(family: list[PieceModule], bundle: Bundle) -> Iterator[StoredWeights]:
    """Reads weights back from pieces' graphs and, for weights that a graph takes as inputs, from their files."""
    for piece, module in zip(family, flat(family), strict=True):
        written = bundle.piece(piece.role, piece.expert, piece.layer)
        graph = onnx.load(bundle.path / written.graph).graph
        constants = {initializer.name: onnx.numpy_helper.to_array(initializer) for initializer in graph.initializer}
        constants |= {weight.name: weight.read(bundle.path) for weight in written.weights}
        found = [*constants.values(), *stored_matrices(graph, constants)]
        expected = {name: weight.numpy() for name, weight in module.state_dict().items()}
        yield StoredWeights(expected, [array.astype(np.float32) for array in found if array.dtype.kind == "f"])


def trace(piece: PieceModule, module: nn.Module) -> ir.Model:
    """Traces a module with a dynamic batch.

    Raises:
        ExportError: the module cannot be traced.
    """
    list_operators_once()
    batch = torch.export.Dim("batch", min=1)
    try:
        with quiet(), torch.no_grad():  # of deprecations inside the exporter itself; what goes wrong it raises
            program = torch.onnx.export(
                module,
                tuple(piece.inputs.values()),
                input_names=list(piece.inputs),
                output_names=piece.outputs,
                dynamic_shapes=tuple({0: batch} for _ in piece.inputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(f"{piece.name}: torch.onnx cannot convert it ({root_cause(error)})") from error
    assert program is not None
    model: ir.Model = program.model
    # Stack traces of the exporting machine take ten times the graph's size and reveal private paths.
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    _write_pools(model.graph)
    if piece.outputs == [LOGITS]:
        _rank(model.graph)
    return model


def _write_pools(graph: ir.Graph) -> None:
    """Writes means over height and width as poolings, which onnxruntime computes in its own order of channels.

    Behind a mean, it copies channels back and forth, as often as a model has squeeze and excitation: 2 % of the time of
    mobilenetv3_small_100.
    """
    for node in graph:
        axes = node.inputs[1] if node.op_type == "ReduceMean" and len(node.inputs) == 2 else None
        image = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
        if axes is None or axes.const_value is None or image is None or len(image) != 4:
            continue
        places = sorted(axis % 4 for axis in axes.const_value.numpy().reshape(-1).tolist())
        if places == [2, 3] and node.attributes.get_int("keepdims", 1) == 1:
            node.op_type = "GlobalAveragePool"
            node.resize_inputs(1)
            node.attributes.clear()


@functools.cache
def list_operators_once() -> None:
    """Has torch list the operators that onnxscript converts for the first trace alone, and not again for every trace.

    For the list, onnxscript parses the source of its 500 functions, which takes a fifth of an export's time. The list
    is a private part of torch; a torch that makes it otherwise makes it for every trace.
    """
    with contextlib.suppress(ImportError, KeyError, AttributeError):
        from torch.onnx._internal import _lazy_import

        onnxscript_apis: Any = vars(_lazy_import)["onnxscript_apis"]
        onnxscript_apis.get_torchlib_ops = functools.cache(onnxscript_apis.get_torchlib_ops)


def _rank(graph: ir.Graph) -> None:
    """Gives a graph that returns logits two more outputs: its most probable classes, best first."""
    (logits,) = graph.outputs
    assert logits.shape is not None
    batch, classes = logits.shape
    assert isinstance(classes, int)
    softmax = ir.node("Softmax", [logits], {"axis": -1})
    count = ir.Value(name="ranked", const_value=ir.tensor(np.array([min(RANKED, classes)]), name="ranked"))
    graph.register_initializer(count)
    ranking = ir.node("TopK", [softmax.outputs[0], count], num_outputs=2)
    graph.extend([softmax, ranking])
    for value, spec in zip(ranking.outputs, _ranking_specs(classes), strict=True):
        value.name, value.shape = spec.name, ir.Shape([batch, min(RANKED, classes)])
        value.type = ir.TensorType(ir.DataType[spec.dtype.replace("float32", "float").upper()])
        graph.outputs.append(value)


def _ranking_specs(classes: int) -> list[TensorSpec]:
    """The outputs that :func:`_rank` adds; in a tie, the class with the lower index comes first."""
    shape: list[int | str] = ["batch", min(RANKED, classes)]
    return [TensorSpec("top_probabilities", shape, "float32"), TensorSpec("top_classes", shape, "int64")]


@dataclass
class _WeightFile:
    """A file of weights, each appended when a graph first needs it; the file exists once it holds a weight."""

    directory: Path
    name: str
    places: dict[str, int] = field(default_factory=dict)

    def place(self, name: str, value: np.ndarray) -> int:
        """Returns the offset of a weight, which is written at its first use."""
        if name not in self.places:
            with open(self.directory / self.name, "ab") as file:
                file.write(bytes(-file.tell() % WEIGHT_ALIGNMENT))
                self.places[name] = file.tell()
                file.write(value.tobytes())
        return self.places[name]


_DTYPES: dict[str, Literal["float32", "int8", "uint8"]] = {"float32": "float32", "int8": "int8", "uint8": "uint8"}


def _write_swappable(
    graph: ir.Model,
    family: list[PieceModule],
    states: list[dict[str, Tensor]],
    shared: set[str],
    store: _WeightFile,
    job: Job[Options],
) -> list[Piece]:
    """Saves one graph for a whole family; the weights that differ between its pieces are inputs of the graph."""
    model = graph.clone()
    own = [name for name in model.graph.initializers if name in states[0] and name not in shared]
    for name in own:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    path = job.directory / f"{_family_name(family[0])}.onnx"
    files = _write_graph(model, path, states[0], dict.fromkeys(model.graph.initializers, store), narrow=set())
    pieces = []
    for piece, state in zip(family, states, strict=True):
        file = _WeightFile(job.directory, f"{piece.name}.bin")
        arrays = {name: state[name].detach().cpu().contiguous().numpy() for name in own}
        weights = [
            Weight(n, list(array.shape), file.name, file.place(n, array), _DTYPES[array.dtype.name])
            for n, array in arrays.items()
        ]
        described = _describe(piece, graph, name=path.name, files=[*files, file.name], job=job)
        mine = sum(weight.bytes for weight in weights)
        pieces.append(
            msgspec.structs.replace(
                described, weights=weights, weight_bytes=mine, shared_bytes=described.weight_bytes - mine
            )
        )
    return pieces


def _describe(piece: PieceModule, graph: ir.Model, name: str, files: list[str], job: Job[Options]) -> Piece:
    described = describe_piece(piece, name, [name, *files], job.piece_flops(piece.role))
    outputs = described.outputs
    if outputs[-1].name == LOGITS:
        classes = outputs[-1].shape[-1]
        assert isinstance(classes, int)
        outputs = [*outputs, *_ranking_specs(classes)]
    optimised = job.options.precision != "fp16" and {node.op_type for node in graph.graph} <= OPTIMISED_OPERATORS
    if job.options.precision in PRECISIONS:
        described = msgspec.structs.replace(described, weight_bytes=loaded_bytes(graph.graph))
    inputs, outputs = ([_with_batch_of(graph, spec) for spec in specs] for specs in (described.inputs, outputs))
    return msgspec.structs.replace(described, inputs=inputs, outputs=outputs, optimised=optimised)


def _with_batch_of(graph: ir.Model, spec: TensorSpec) -> TensorSpec:
    """A specification with the batch of the graph, which is 1 where one image's answer would depend on others."""
    first = graph.graph.inputs[0].shape
    assert first is not None
    return TensorSpec(spec.name, [1, *spec.shape[1:]], spec.dtype) if first[0] == 1 else spec


def _write_graph(
    model: ir.Model, path: Path, state: dict[str, Tensor], stores: dict[str, _WeightFile], narrow: set[str]
) -> list[str]:
    """Saves ``model`` with the weights of ``state``, some in fp16; returns the weight files that it refers to."""
    used: dict[str, None] = {}
    for name, value in list(model.graph.initializers.items()):
        weight = state[name] if name in state else _constant(value)
        array = weight.detach().cpu().contiguous().numpy()
        halved = name in narrow and array.dtype == np.float32
        with np.errstate(over="ignore"):  # a weight that overflows is refused below, by name
            stored = array.astype(np.float16 if halved else array.dtype)
        if halved and not np.isfinite(stored).all():
            raise ExportError(f"{path.stem}: weight {name!r} is too large for fp16; use --precision fp32")
        tensor: ir.TensorProtocol = ir.tensor(stored, name=name)
        if stored.nbytes >= INLINE_BYTES:
            file = stores[name]
            offset = file.place(name, stored)
            used[file.name] = None
            tensor = ir.ExternalTensor(
                file.name,
                offset,
                stored.nbytes,
                tensor.dtype,
                shape=ir.Shape(stored.shape),
                name=name,
                base_dir=path.parent,
            )
        if halved:
            _widen(model, name, tensor)
        else:
            value.const_value = tensor
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm"):
            rows, factor = node.inputs[:2]
            if rows is not None and factor is not None and _better_unpacked(rows, factor):
                model.graph.inputs.append(factor)
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():  # shapes between nodes, which every engine infers again
                value.type = value.shape = None
    ir.save(model, path)
    return list(used)


def _better_unpacked(rows: ir.Value, weight: ir.Value) -> bool:
    """Whether a large weight is multiplied by one row per image, for example if only the class token is computed.

    When onnxruntime loads a graph, it copies the weights of matrix products into an order of its own, which takes half
    of the load time. That pays off for a weight that is used for many rows, but not for one row. onnxruntime does not
    copy weights that may be replaced at run time; in ONNX, these are initialisers that are inputs as well.
    """
    if rows.shape is None or not weight.is_initializer() or weight.const_value is None:
        return False
    return weight.const_value.nbytes >= INLINE_BYTES and all(extent == 1 for extent in rows.shape[1:-1])


def _widen(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> None:
    """Stores an initialiser as fp16, followed by a Cast to fp32: half the bytes, with the arithmetic unchanged.

    onnxruntime runs the Cast once, when the session is created. Its CPU provider has few fp16 kernels, so a graph with
    fp16 arithmetic would cast back and forth around most operators in every run.
    """
    value = model.graph.initializers.pop(name)
    narrow = ir.Value(name=name, shape=ir.Shape(list(tensor.shape.numpy())), type=ir.TensorType(ir.DataType.FLOAT16))
    narrow.const_value = tensor
    model.graph.initializers[name] = narrow
    cast = ir.Node("", "Cast", [narrow], [ir.AttrInt64("to", ir.DataType.FLOAT)], num_outputs=1)
    cast.outputs[0].name = f"{name}.fp32"
    cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    cast.outputs[0].shape = ir.Shape(list(tensor.shape.numpy()))
    model.graph.insert_before(model.graph[0], cast)
    value.replace_all_uses_with(cast.outputs[0])


def _constant(value: ir.Value) -> Tensor:
    """An initialiser's traced value."""
    assert value.const_value is not None
    return torch.from_numpy(np.array(value.const_value.numpy()))


def _with_distinct_weights(module: nn.Module) -> nn.Module:
    """A copy with random weights; otherwise the exporter would merge equal weights (such as all zero biases)."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return module


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _family_name(piece: PieceModule) -> str:
    return {"tail": "tail", "expert_layer": f"experts_layer_{piece.layer}"}.get(piece.role, piece.name)


def _shared_name(piece: PieceModule) -> str:
    return _family_name(piece) + ("_shared" if piece.expert is not None else "")
