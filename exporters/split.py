"""Splits a model into the pieces of a bundle, as torch modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from mvmoe_deploy.bundle import GATE, IMAGES, LOGITS, PROBABILITIES, TOKENS, Role, Routing, piece_name
from mvmoe_deploy.errors import ExportError, first_line, root_cause
from mvmoe_deploy.models.model import Model


class PerImageRouted(Protocol):
    """The protocol of a routed model that can be exported, such as :class:`mvmoe_deploy.models.MobileVMoE`.

    The model is also callable: images ``[B, 3, H, W]`` → logits ``[B, C]``, the reference that an export is checked
    against. Modules may share parameters with the model and with each other. Weights that all tails hold in the same
    memory are recognised as shared and stored once.

    Attributes:
        experts: number of experts E.
        k: experts per image.
        moe_layers: number of MoE layers L.
    """

    experts: int
    k: int
    moe_layers: int

    def trunk_module(self) -> nn.Module:
        """Images ``[B, 3, H, W]`` → tokens ``[B, N, D]``."""
        ...

    def router_module(self) -> nn.Module:
        """Tokens ``[B, N, D]`` → probabilities ``[B, E]``."""
        ...

    def tail_module(self, expert: int) -> nn.Module:
        """Tokens ``[B, N, D]`` and gate ``[B]`` → logits ``[B, C]``; needed only for k = 1."""
        ...

    def attention_module(self, layer: int) -> nn.Module:
        """Tokens → (residual stream, the experts' input); needed only for k > 1."""
        ...

    def expert_module(self, expert: int, layer: int) -> nn.Module:
        """The experts' input and gate ``[B]`` → what to add to the residual stream; needed only for k > 1."""
        ...

    def head_module(self) -> nn.Module:
        """Tokens → logits ``[B, C]``; needed only for k > 1."""
        ...


def is_routed(model: nn.Module) -> TypeGuard[PerImageRouted]:
    """Whether a model implements the protocol; not an isinstance check: k = 1 and k > 1 need different methods."""
    return hasattr(model, "trunk_module") and hasattr(model, "router_module")


@dataclass
class PieceModule:
    """One piece before conversion.

    Attributes:
        role: the piece's role in the manifest.
        module: torch module that takes the inputs in order and returns the outputs in order.
        inputs: an example of each input by name, with a batch of 2; the first dimension is dynamic.
        outputs: names of the outputs.
        expert: index of the expert, for a tail or an expert layer.
        layer: index of the MoE layer, for an attention segment or an expert layer.
    """

    role: Role
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]
    expert: int | None = None
    layer: int | None = None

    @property
    def name(self) -> str:
        """The piece's name in the manifest."""
        return piece_name(self.role, self.expert, self.layer)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Runs the module and returns a list of outputs, even of one."""
        result = self.module(*inputs)
        return list(result) if isinstance(result, tuple) else [result]


class RoutedTrunk(nn.Module):
    """Trunk and router in one piece: images → (tokens, probabilities)."""

    def __init__(self, trunk: nn.Module, router: nn.Module) -> None:
        super().__init__()
        self.trunk, self.router = trunk, router

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.trunk(images)
        return tokens, self.router(tokens)


@dataclass
class SplitModel:
    """All pieces of a model, in the order of :func:`mvmoe_deploy.bundle.expected_pieces`.

    Attributes:
        model: the whole model, which is the reference.
        routing: the model's routing; None for a dense model.
        pieces: the pieces to convert.
    """

    model: nn.Module
    routing: Routing | None
    pieces: list[PieceModule]

    def of(self, role: Role) -> list[PieceModule]:
        """The pieces of one role."""
        return [piece for piece in self.pieces if piece.role == role]

    def families(self) -> Iterator[list[PieceModule]]:
        """Yields groups of pieces that share a graph and differ in weights: the tails, or one layer's experts."""
        groups: dict[tuple[str, int | None], list[PieceModule]] = {}
        for piece in self.pieces:
            groups.setdefault((piece.role, piece.layer), []).append(piece)
        yield from groups.values()

    @torch.no_grad()
    def reference_inputs(
        self, images: Tensor, few: int, gates: tuple[float, float] | None = None
    ) -> list[tuple[PieceModule, list[Tensor]]]:
        """Each piece with the inputs that the pieces before it give it.

        Args:
            images: preprocessed images ``[n, 3, S, S]``; the trunk and a dense model take all.
            few: how many of them each expert takes.
            gates: range of evenly spaced gates that experts take; by default those of the router's own choices.
        """
        if self.routing is None:
            return [(self.pieces[0], [images])]
        (trunk,) = self.of("trunk")
        tokens, *probabilities = trunk(images)
        pairs = [(trunk, [images])]
        for router in self.of("router"):
            pairs.append((router, [tokens]))
            probabilities = router(tokens)
        x = tokens[:few]
        gate = probabilities[0][:few].amax(1) if gates is None else torch.linspace(*gates, len(x))
        for tail in self.of("tail"):
            pairs.append((tail, [x, gate]))
        for attention in self.of("attention"):
            residual, expert_input = attention(x)
            pairs.append((attention, [x]))
            for segment in self.of("expert_layer"):
                if segment.layer == attention.layer:
                    pairs.append((segment, [expert_input, gate]))
                    residual = residual + segment(expert_input, gate)[0]
            x = residual
        return pairs + [(head, [x]) for head in self.of("head")]


def shared_weights(modules: Sequence[nn.Module]) -> set[str]:
    """Names of the weights that all modules of a family hold in the same memory; for a single module, all names."""
    first, *others = (module.state_dict() for module in modules)
    return {
        name for name, tensor in first.items() if all(other[name].data_ptr() == tensor.data_ptr() for other in others)
    }


def private_copy(module: nn.Module, replaced: dict[int, object] | None = None) -> nn.Module:
    """A copy in evaluation mode that shares the module's weights and persistent buffers, and nothing else.

    Tracing leaves traced values in whatever caches a module has, such as a dict of attention biases. They stay in the
    copy.

    Args:
        module: the original, which is not changed.
        replaced: what takes the place of parts of it, by the part's id; the copies are added.

    Raises:
        ExportError: the module holds something that cannot be copied.
    """
    replaced = {} if replaced is None else replaced
    for tensor in module.state_dict(keep_vars=True).values():
        replaced.setdefault(id(tensor), tensor)
    try:
        copied: nn.Module = copy.deepcopy(module, replaced).eval()
    except Exception as error:  # the model is anybody's
        raise ExportError(f"{type(module).__name__}: cannot be copied for tracing ({root_cause(error)})") from error
    return copied


def computes_as(module: nn.Module, kind: type[nn.Module]) -> TypeGuard[Any]:
    """Whether a module computes what ``kind`` computes: a sub-class may, but not with a ``forward`` of its own."""
    own = "forward" in vars(module) or type(module).forward is not kind.forward
    return isinstance(module, kind) and not own and not module._forward_hooks and not module._forward_pre_hooks


def split_model(model: nn.Module, image_size: int, separate_router: bool = False) -> SplitModel:
    """Splits a model into pieces; a dense model is a single piece.

    Args:
        model: a :class:`PerImageRouted` model, or any other module, which is then exported whole.
        image_size: side of its input images, in pixels.
        separate_router: make the router a piece of its own instead of the trunk's second output.

    Raises:
        ExportError: the model gives a reason why it cannot be split (``cannot_split``). A V-MoE does: it has no tails,
            and if it were exported whole, an image's logits would depend on its batch. Or the model lacks something
            that :class:`PerImageRouted` asks for, or a piece fails or returns something else than it should.
    """
    if not isinstance(model, nn.Module):
        raise ExportError(f"a {type(model).__name__} is no model: a torch.nn.Module is exported")
    if reason := getattr(model, "cannot_split", ""):
        raise ExportError(reason)
    _check_weights(model)
    model = private_copy(model)  # the caller's stays as it is, caches and training mode included
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, image_size, image_size, generator=generator)
    logits = _tried("model", model, [images], [LOGITS])[0]
    whole = model  # below, ``model`` is what offers the protocol
    if isinstance(model, Model):
        model = model.merged()
    if not is_routed(model):
        return SplitModel(model, None, [PieceModule("model", model, {IMAGES: images}, [LOGITS])])
    _check_protocol(model)
    routing = Routing(model.experts, model.k, model.moe_layers, "separate" if separate_router else "fused")
    trunk, router = _made(model, "trunk_module"), _made(model, "router_module")
    (tokens,) = _tried("trunk", trunk, [images], [TOKENS])
    _tried("router", router, inputs=[tokens], outputs=[PROBABILITIES], shapes={PROBABILITIES: (2, model.experts)})
    gate = torch.tensor([0.25, 0.75])
    shapes = {LOGITS: tuple(logits.shape)}
    if separate_router:
        pieces = [
            PieceModule("trunk", trunk, {IMAGES: images}, [TOKENS]),
            PieceModule("router", router, {TOKENS: tokens}, [PROBABILITIES]),
        ]
    else:
        pieces = [PieceModule("trunk", RoutedTrunk(trunk, router), {IMAGES: images}, [TOKENS, PROBABILITIES])]
    if model.k == 1:
        for expert in range(model.experts):
            tail = _made(model, "tail_module", expert)
            pieces.append(
                PieceModule("tail", tail, inputs={TOKENS: tokens, GATE: gate}, outputs=[LOGITS], expert=expert)
            )
            _tried(pieces[-1].name, tail, inputs=[tokens, gate], outputs=[LOGITS], shapes=shapes)
    else:
        # The chosen experts' outputs add up within each layer, so a layer cannot be part of any one expert's graph.
        for layer in range(model.moe_layers):
            attention = _made(model, "attention_module", layer)
            outputs = ["residual", "expert_input"]
            pieces.append(
                PieceModule("attention", attention, inputs={TOKENS: tokens}, outputs=outputs, expert=None, layer=layer)
            )
            tokens, expert_input = _tried(pieces[-1].name, attention, [tokens], outputs)
            for expert in range(model.experts):
                module = _made(model, "expert_module", expert, layer)
                inputs = {"expert_input": expert_input, GATE: gate}
                pieces.append(
                    PieceModule("expert_layer", module, inputs=inputs, outputs=["addend"], expert=expert, layer=layer)
                )
                added = {"addend": tuple(tokens.shape)}
                _tried(pieces[-1].name, module, inputs=[expert_input, gate], outputs=["addend"], shapes=added)
        head = _made(model, "head_module")
        pieces.append(PieceModule("head", head, {TOKENS: tokens}, [LOGITS]))
        _tried("head", head, inputs=[tokens], outputs=[LOGITS], shapes=shapes)
    return SplitModel(whole, routing, pieces)


PROTOCOL = "what a routed model offers is PerImageRouted in mvmoe_deploy.exporters.split"


def _check_weights(model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            kind = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
            raise ExportError(f"weight {name!r} is {kind}; a model is exported as float32 on cpu: model.float().cpu()")


def _check_protocol(model: PerImageRouted) -> None:
    """Numbers and methods that the pieces are made from are there."""
    for name in ("experts", "k", "moe_layers"):
        value = getattr(model, name, None)
        if type(value) is not int or value < 1:
            found = f"{name} is {value!r}" if hasattr(model, name) else f"has no attribute {name!r}"
            raise ExportError(f"{type(model).__name__}: {found}, expected a positive integer; {PROTOCOL}")
    if model.k > model.experts:
        raise ExportError(f"{type(model).__name__}: k is {model.k}, but there are only {model.experts} experts")
    needed = ("tail_module",) if model.k == 1 else ("attention_module", "expert_module", "head_module")
    for name in needed:
        if not callable(getattr(model, name, None)):
            raise ExportError(f"{type(model).__name__}: has no {name}, which k = {model.k} needs; {PROTOCOL}")


def _made(model: PerImageRouted, method: str, *arguments: int) -> nn.Module:
    """What a model's method makes, ready to be traced."""
    call = f"{type(model).__name__}.{method}({', '.join(map(str, arguments))})"
    try:
        module = getattr(model, method)(*arguments)
    except Exception as error:  # the model is anybody's
        raise ExportError(f"{call} failed ({type(error).__name__}: {first_line(error)})") from error
    if not isinstance(module, nn.Module):
        raise ExportError(f"{call} returns a {type(module).__name__}, expected a torch.nn.Module; {PROTOCOL}")
    return module.eval()


def _tried(
    where: str,
    module: nn.Module,
    inputs: Sequence[Tensor],
    outputs: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Tensor]:
    """Runs a module once: what cannot run, or returns something else, is refused before anything is converted.

    Args:
        where: the piece, for errors.
        module: a model or a piece of it.
        inputs: a batch of 2.
        outputs: what it returns, by name.
        shapes: of those that are known.

    Raises:
        ExportError: it fails, or returns something else than float32 tensors, or of other shapes.
    """
    try:
        with torch.no_grad():
            result = private_copy(module)(*inputs)
    except Exception as error:  # the model is anybody's
        raise ExportError(f"{where}: fails in PyTorch ({type(error).__name__}: {first_line(error)})") from error
    tensors = list(result) if isinstance(result, tuple) else [result]
    if len(tensors) != len(outputs) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        found = ", ".join(type(value).__name__ for value in tensors)
        raise ExportError(f"{where}: returns {found}, expected {len(outputs)} tensor(s): {', '.join(outputs)}")
    for name, tensor in zip(outputs, tensors, strict=True):
        shape = list(tensor.shape)
        kind = f"{str(tensor.dtype).removeprefix('torch.')} of shape {shape}"
        if tensor.dtype != torch.float32 or not shape or shape[0] != 2 or (name == LOGITS and len(shape) != 2):
            wanted = "[2, classes]" if name == LOGITS else "[2, …]"
            raise ExportError(f"{where}: returns {name} as {kind} for 2 images, expected float32 {wanted}")
        if shapes and tuple(shape) != shapes.get(name, tuple(shape)):
            raise ExportError(f"{where}: returns {name} of shape {shape}, the rest of the model {list(shapes[name])}")
    # engines give pieces arrays in the usual order, so none is traced for channels that come last in memory
    return [tensor.contiguous() for tensor in tensors]
