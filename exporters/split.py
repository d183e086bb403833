"""Splits a model into the pieces of a bundle, as torch modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn

from mvmoe_deploy.bundle import GATE, IMAGES, LOGITS, PROBABILITIES, TOKENS, Role, Routing, piece_name
from mvmoe_deploy.errors import ExportError


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


def shared_weights(modules: Sequence[nn.Module]) -> set[str]:
    """Names of the weights that all modules of a family hold in the same memory; for a single module, all names."""
    first, *others = (module.state_dict() for module in modules)
    return {
        name for name, tensor in first.items() if all(other[name].data_ptr() == tensor.data_ptr() for other in others)
    }


def split_model(model: nn.Module, image_size: int, separate_router: bool = False) -> SplitModel:
    """Splits a model into pieces; a dense model is a single piece.

    Args:
        model: a :class:`PerImageRouted` model, or any other module, which is then exported whole.
        image_size: side of its input images, in pixels.
        separate_router: make the router a piece of its own instead of the trunk's second output.

    Raises:
        ExportError: the model gives a reason why it cannot be split (``cannot_split``). A V-MoE does: it has no tails,
            and if it were exported whole, an image's logits would depend on its batch.
    """
    if reason := getattr(model, "cannot_split", ""):
        raise ExportError(reason)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, image_size, image_size, generator=generator)
    reference = model
    if not is_routed(model):
        return SplitModel(reference, None, [PieceModule("model", model, {IMAGES: images}, [LOGITS])])
    routing = Routing(model.experts, model.k, model.moe_layers, "separate" if separate_router else "fused")
    trunk, router = model.trunk_module(), model.router_module()
    with torch.no_grad():
        tokens = trunk(images)
    gate = torch.tensor([0.25, 0.75])
    if separate_router:
        pieces = [
            PieceModule("trunk", trunk, {IMAGES: images}, [TOKENS]),
            PieceModule("router", router, {TOKENS: tokens}, [PROBABILITIES]),
        ]
    else:
        pieces = [PieceModule("trunk", RoutedTrunk(trunk, router), {IMAGES: images}, [TOKENS, PROBABILITIES])]
    if model.k == 1:
        for expert in range(model.experts):
            tail = model.tail_module(expert)
            pieces.append(PieceModule("tail", tail, {TOKENS: tokens, GATE: gate}, [LOGITS], expert))
    else:
        # The chosen experts' outputs add up within each layer, so a layer cannot be part of any one expert's graph.
        for layer in range(model.moe_layers):
            attention = model.attention_module(layer)
            pieces.append(
                PieceModule("attention", attention, {TOKENS: tokens}, ["residual", "expert_input"], None, layer)
            )
            tokens, expert_input = pieces[-1](tokens)
            for expert in range(model.experts):
                module = model.expert_module(expert, layer)
                inputs = {"expert_input": expert_input, GATE: gate}
                pieces.append(PieceModule("expert_layer", module, inputs, ["addend"], expert, layer))
        pieces.append(PieceModule("head", model.head_module(), {TOKENS: tokens}, [LOGITS]))
    for piece in pieces:
        piece.module.eval()
    return SplitModel(reference, routing, pieces)
