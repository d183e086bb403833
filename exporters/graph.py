"""Pieces as flat graphs of ATen operators, in which modules are recognised by what they compute and not by their class.

A graph is traced once for a whole family of pieces. Passes rewrite it; whatever they compute from weights alone
(a BatchNorm folded into its convolution, a transposed matrix) becomes a weight of the graph, and is computed anew for
every piece of the family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from mvmoe_deploy.errors import ExportError, root_cause
from mvmoe_deploy.exporters.split import PieceModule, private_copy
from mvmoe_deploy.quiet import quiet

aten = torch.ops.aten

Pass = Callable[[fx.Graph], None]
"""A function that rewrites a graph in place."""

TOLERANCE = 1e-5
"""Largest difference between a rewritten module's outputs and the original's, as a share of the output's largest
magnitude (or of 1 if that is smaller). It allows about a hundred float32 roundings; a wrong rewrite is off by 1e-2 or
more."""


def flatten(
    pieces: Sequence[PieceModule], modules: Sequence[nn.Module], passes: Iterable[Pass] = ()
) -> list[fx.GraphModule]:
    """Makes flat graphs of a family's modules; they compute the same, and share what the modules share.

    What does nothing is dropped, BatchNorms and scales are folded into the layers before them, and shapes are written
    as numbers; the passes run after that.

    Args:
        pieces: the family, whose first piece gives example inputs.
        modules: the pieces' modules, which may be rewritten ones; they have the same structure and are not changed.
        passes: what else to rewrite.

    Raises:
        ExportError: a module cannot be traced, or its graph does not compute what the module computes.
    """
    first = pieces[0]
    passes = [drop_identities, fold_batch_norms, fold_scales, write_shapes, write_global_pools, *passes]
    graph = _Flat.of(first, modules[0], passes)
    computed: dict[tuple[Any, ...], Tensor] = {}
    flat = []
    for piece, module in zip(pieces, modules, strict=True):
        if module is not modules[0] and graph.has_constants:
            # what the trace found outside the weights (a module's cache, say) may differ between the pieces
            graph = _Flat.of(piece, module, passes)
        flat.append(graph.bound(module, computed))
        check_same(piece, flat[-1])
    return flat


def check_same(piece: PieceModule, rewritten: nn.Module, how: str = "traced") -> None:
    """Compares a rewritten module with the piece that it was made from, on the piece's example.

    Values that are not finite before the rewrite are left to verification, which says that they are the model's own.

    Raises:
        ExportError: they differ by more than :data:`TOLERANCE`.
    """
    # A flat graph keeps nothing of a run; copying one compiles it anew, a quarter of what an expert takes to export.
    found = replace(piece, module=rewritten if isinstance(rewritten, fx.GraphModule) else private_copy(rewritten))
    original = replace(piece, module=private_copy(piece.module))
    inputs = piece.inputs.values()
    for name, expected, value in zip(piece.outputs, original(*inputs), found(*inputs), strict=True):
        finite = expected.isfinite()
        if not finite.any():
            continue
        error = (value - expected)[finite].abs().max().item()
        allowed = TOLERANCE * max(1.0, expected[finite].abs().max().item())
        if not error <= allowed:  # true for NaN as well
            raise ExportError(
                f"{piece.name}: {how}, its output {name} differs by {error:.2e} (allowed {allowed:.0e}); the rewrite "
                "does not fit this model's layers, please report the model"
            )


def trace(piece: PieceModule, module: nn.Module) -> fx.GraphModule:
    """Traces a module with a dynamic batch, without changing it: not even its caches, which would keep traced values.

    Raises:
        ExportError: the module cannot be traced.
    """
    batch = Dim("batch", min=1)
    inputs = tuple(piece.inputs.values())
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                private_copy(module), inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False
            )
            flat = program.module(check_guards=False)
    except Exception as error:  # the model is anybody's
        raise ExportError(f"{piece.name}: torch cannot trace it ({root_cause(error)})") from error
    assert isinstance(flat, fx.GraphModule)
    return flat


@dataclass
class _Flat:
    """A traced and rewritten graph, to which the weights of any module of the same structure can be bound.

    Attributes:
        traced: the graph with the weights it was traced with.
        weights: the nodes whose values become the graph's weights, by name.
        has_constants: whether it holds tensors that are no weights or buffers of the module.
    """

    traced: fx.GraphModule
    weights: dict[str, fx.Node]
    has_constants: bool

    @classmethod
    def of(cls, piece: PieceModule, module: nn.Module, passes: Iterable[Pass]) -> _Flat:
        traced = trace(piece, module)
        for rewrite in passes:
            rewrite(traced.graph)
            traced.graph.eliminate_dead_code()
        named = _tensors(module)
        constants = [node for node in traced.graph.nodes if node.op == "get_attr" and node.target not in named]
        return cls(traced, _weights(traced.graph), bool(constants))

    def bound(self, module: nn.Module, computed: dict[tuple[Any, ...], Tensor]) -> fx.GraphModule:
        """The graph with a module's weights.

        Args:
            module: the module.
            computed: what was computed from weights before, so that what modules share their graphs share as well.
        """
        given = _tensors(module)
        constant = _constant_nodes(self.traced.graph)
        values: dict[fx.Node, Any] = {}
        origins: dict[fx.Node, tuple[int, ...]] = {}
        for node in self.traced.graph.nodes:
            if node.op == "get_attr":
                value = given.get(str(node.target))
                values[node] = _attribute(self.traced, str(node.target)) if value is None else value.detach()
                origins[node] = (values[node].data_ptr(),)
            elif node in constant:
                origins[node] = sum((origins[other] for other in node.all_input_nodes), ())
                key = (node.name, *origins[node])
                if key not in computed:
                    arguments = fx.node.map_arg((node.args, node.kwargs), lambda other: values[other])
                    with torch.no_grad():
                        computed[key] = node.target(*arguments[0], **arguments[1])
                values[node] = computed[key]
        graph = fx.Graph()
        copies = {node: graph.get_attr(name) for name, node in self.weights.items()}
        for node in self.traced.graph.nodes:
            if node not in copies and node not in values:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        results = graph.output_node().args[0]
        if isinstance(results, (tuple, list)) and len(results) == 1:
            graph.output_node().args = (results[0],)
        root = {name: _as_weight(values[node]) for name, node in self.weights.items()}
        return fx.GraphModule(root, graph).eval()


def _weights(graph: fx.Graph) -> dict[str, fx.Node]:
    """The constant nodes that others than constant nodes read, by the name that each gets as a weight."""
    constant = _constant_nodes(graph)
    read = [node for node in graph.nodes if node in constant and any(user not in constant for user in node.users)]
    taken = {str(node.target) for node in read if node.op == "get_attr"}
    names: dict[str, fx.Node] = {}
    for node in read:
        name = str(node.target)
        if node.op != "get_attr":
            wanted = original_name(node)
            name, count = wanted, 1
            while name in names or name in taken:
                count += 1
                name = f"{wanted}_{count}"
        names[name] = node
    return names


NAME = "weight_name"
"""Key of a node's ``meta``: how to call the weight that it becomes."""

MADE = "made_by_a_pass"
"""Key of a node's ``meta``: whether a pass adds it as a weight that is computed from nothing, such as a row of 1/D."""


def original_name(node: fx.Node) -> str:
    """The name of a constant node: its own, or that of the first weight that it is computed from."""
    while node.op != "get_attr" and NAME not in node.meta:
        node = node.all_input_nodes[0]
    return str(node.meta.get(NAME, node.target))


def _constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Weights, and what is computed from weights alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        others = node.all_input_nodes
        made = others or node.meta.get(MADE)
        if node.op == "get_attr" or (node.op == "call_function" and made and found.issuperset(others)):
            found.add(node)
    return found


def is_constant(node: Any) -> bool:
    """Whether an argument is a weight, or computed from weights alone."""
    if not isinstance(node, fx.Node):
        return False
    others = node.all_input_nodes
    made = bool(others or node.meta.get(MADE))
    return node.op == "get_attr" or (node.op == "call_function" and made and all(map(is_constant, others)))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _attribute(module: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    value = getattr(module.get_submodule(path), last)
    assert isinstance(value, Tensor)
    return value.detach()


def _as_weight(value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if value.is_floating_point() else value


# Passes


_IDENTITIES = (
    *(aten.dropout.default, aten.alias.default, aten.contiguous.default, aten.clone.default, aten.detach.default),
    *(aten.slice.Tensor, aten.expand.default, aten.to.dtype, aten.repeat.default, aten.type_as.default),
)


def drop_identities(graph: fx.Graph) -> None:
    """Drops what returns its input (dropout, copies, slices and expansions that take all), and checks of types."""
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        if node.target not in _IDENTITIES:
            continue
        before, after = node.args[0].meta.get("val"), node.meta["val"]
        same = before is not None and before.shape == after.shape and before.dtype == after.dtype
        if same and not (node.target is aten.dropout.default and node.args[2]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def fold_scales(graph: fx.Graph) -> None:
    """Folds a constant scale per channel, such as LayerScale's, into the layer whose output only it reads."""
    for product in [node for node in graph.nodes if node.target is aten.mul.Tensor]:
        layer, scale = product.args if is_constant(product.args[1]) else product.args[::-1]
        if not isinstance(layer, fx.Node) or len(layer.users) != 1 or not is_constant(scale):
            continue
        channels = -1 if layer.target is aten.linear.default else 1
        if layer.target not in (aten.linear.default, *CONVOLUTIONS) or not is_constant(layer.args[1]):
            continue
        value, result = scale.meta.get("val"), layer.meta["val"]
        if value is None or value.ndim > result.ndim or product.meta["val"].shape != result.shape:
            continue
        shape = [1] * (result.ndim - value.ndim) + list(value.shape)
        wanted = [1] * result.ndim
        wanted[channels] = result.shape[channels]
        if shape != wanted:
            continue
        x, weight, bias, *rest = [*layer.args, None][: max(3, len(layer.args))]
        with graph.inserting_before(product):
            folded = graph.call_function(_scaled, (weight, scale))
            offset = None if bias is None else graph.call_function(_scaled, (bias, scale))
            _name_folded(folded, offset, weight)
            result = graph.call_function(layer.target, (x, folded, offset, *rest), layer.kwargs)
            result.meta = dict(product.meta)
        product.replace_all_uses_with(result)
        graph.erase_node(product)
        graph.erase_node(layer)


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.double() * scale.double().reshape(-1, *[1] * (weight.ndim - 1))).float()


def _name_folded(weight: fx.Node, bias: fx.Node | None, original: Any) -> None:
    prefix = original_name(original).rpartition(".")[0]
    weight.meta[NAME] = f"{prefix}.weight"
    if bias is not None:
        bias.meta[NAME] = f"{prefix}.bias"


def write_global_pools(graph: fx.Graph) -> None:
    """Writes an adaptive average pooling to one value as a mean.

    Torch's own decomposition adds a view by strides where the input's channels come last in memory, which targets
    turn into a gather or refuse.
    """
    for node in [node for node in graph.nodes if node.target is aten.adaptive_avg_pool2d.default]:
        if tuple(node.meta["val"].shape[-2:]) == (1, 1):
            node.target, node.args = aten.mean.dim, (node.args[0], [-2, -1], True)


def fold_batch_norms(graph: fx.Graph) -> None:
    """Folds every BatchNorm into the convolution or linear layer whose output only it reads."""
    for norm in list(graph.nodes):
        if norm.target is not aten.batch_norm.default or norm.args[5]:
            continue
        layer, scale, shift, mean, variance, *_, epsilon, _ = norm.args
        if not _takes_batch_norm(layer) or not (is_constant(mean) and is_constant(variance)):
            continue
        x, weight, bias, *rest = [*layer.args, None][: max(3, len(layer.args))]
        with graph.inserting_before(norm):
            folded = graph.call_function(_folded_weight, (weight, scale, variance, epsilon))
            offset = graph.call_function(_folded_bias, (bias, scale, shift, mean, variance, epsilon))
            _name_folded(folded, offset, weight)
            result = graph.call_function(layer.target, (x, folded, offset, *rest), layer.kwargs)
            result.meta = dict(norm.meta)
        norm.replace_all_uses_with(result)
        graph.erase_node(norm)
        graph.erase_node(layer)


CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding)


def _takes_batch_norm(layer: Any) -> bool:
    if not isinstance(layer, fx.Node) or len(layer.users) != 1:
        return False
    rows = layer.target is aten.linear.default and layer.meta["val"].ndim == 2
    return (rows or layer.target in CONVOLUTIONS) and is_constant(layer.args[1])


def _folded_weight(weight: Tensor, scale: Tensor | None, variance: Tensor, epsilon: float) -> Tensor:
    factor = _factor(scale, variance, epsilon)
    return (weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))).float()


def _folded_bias(
    bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, mean: Tensor, variance: Tensor, epsilon: float
) -> Tensor:
    centred = (0 if bias is None else bias.double()) - mean.double()
    return (centred * _factor(scale, variance, epsilon) + (0 if shift is None else shift.double())).float()


def _factor(scale: Tensor | None, variance: Tensor, epsilon: float) -> Tensor:
    inverse = (variance.double() + epsilon).rsqrt()
    return inverse if scale is None else scale.double() * inverse


_RESHAPES = (
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten._unsafe_view.default),
)


_RESIZES = (aten.upsample_bilinear2d.vec, aten.upsample_nearest2d.vec)


def write_shapes(graph: fx.Graph) -> None:
    """Writes the shapes of reshapes and the sizes of resized images as numbers; -1 stands for the batch."""
    for node in [node for node in graph.nodes if node.target in _RESIZES]:
        before, after = (other.meta["val"].shape[2:] for other in (node.args[0], node))
        scales = node.args[-1] if node.args[1] is None else None
        fits = scales and all(a == b * scale for a, b, scale in zip(after, before, scales, strict=True))
        if fits and all(isinstance(extent, int) for extent in after):
            node.args = (node.args[0], list(after), *node.args[2:-1], None)
    for node in [node for node in graph.nodes if node.target in _RESHAPES]:
        shape = [extent if isinstance(extent, int) else -1 for extent in node.meta["val"].shape]
        if shape.count(-1) <= 1:
            node.target, node.args, node.kwargs = aten.reshape.default, (node.args[0], shape), {}
