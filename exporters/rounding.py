"""What rounding at a precision does to PyTorch itself: the yardstick for models that are sensitive to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from mvmoe_deploy.bundle import Piece
from mvmoe_deploy.exporters.graph import flatten
from mvmoe_deploy.exporters.split import PieceModule, SplitModel, private_copy

SMALL_FILTERS = 2048
"""Convolutions of at most this many weights, and the biases of all, keep fp32 where weights are rounded.

A BatchNorm that is folded into its convolution gives some channels weights that are large beside what they vary by, and
what comes before a ReLU is large beside what comes through it. Such a rounding error is not averaged out in a layer of
few weights, and every later layer sees it. Of EfficientNet-Lite0, the 288 weights of the first depthwise convolution
alone move the logits by 0.015 spreads, all weights by 0.022, and what is left by 0.009. The exceptions add 0.7 % to its
bytes, and 384 bytes to a ViT's.
"""


def narrowed(graph: fx.GraphModule) -> set[str]:
    """Names of the weights of a flat graph that are stored in half precision: all but :data:`SMALL_FILTERS`."""
    named = graph.state_dict()
    filters = {
        str(weight.target)
        for node in graph.graph.nodes
        if node.op == "call_function" and str(node.target).startswith("aten.conv")
        for weight in node.args[1:3]
        if isinstance(weight, fx.Node)
    }
    exact = {name for name in filters & set(named) if named[name].ndim == 1 or named[name].numel() <= SMALL_FILTERS}
    return set(named) - exact


class RoundedBackend:
    """A backend that runs a model's pieces in PyTorch with weights, or all results as well, in half precision.

    Graphs are flat, as converters see them: a BatchNorm is folded into its convolution before that is rounded. The
    original modules' weights may be exact in half precision, and the folded ones are not.
    """

    name = "rounded"
    unloads = True

    def __init__(self, split: SplitModel, rounds: Literal["weights", "results"]) -> None:
        self._rounds = rounds
        self._families = {piece.name: family for family in split.families() for piece in family}
        self._flat: dict[str, fx.GraphModule] = {}

    def load(self, piece: Piece | PieceModule) -> Callable[..., list[NDArray[Any]]]:
        """Makes a piece ready to run; its outputs are those of its torch module."""
        if piece.name not in self._flat:
            family = self._families[piece.name]
            modules = flatten(family, [private_copy(other.module) for other in family])
            self._flat.update((other.name, module) for other, module in zip(family, modules, strict=True))
        module = copy.deepcopy(self._flat[piece.name])  # whose weights are the model's own
        rounded = narrowed(module) if self._rounds == "weights" else set(module.state_dict())
        for name, weight in module.named_parameters():
            weight.data = _half(weight.data) if name in rounded else weight.data
        run = _Results(module).run if self._rounds == "results" else module

        @torch.no_grad()
        def outputs(*inputs: NDArray[np.float32]) -> list[NDArray[Any]]:
            results = run(*map(torch.from_numpy, inputs))
            return [result.numpy() for result in (results if isinstance(results, (tuple, list)) else [results])]

        return outputs


class _Results(fx.Interpreter):
    """Rounds the inputs and every operator's result to half precision."""

    def run_node(self, n: fx.Node) -> Any:
        return fx.node.map_aggregate(
            super().run_node(n), lambda each: _half(each) if isinstance(each, Tensor) else each
        )


def _half(value: Tensor) -> Tensor:
    return value.half().float() if value.dtype == torch.float32 else value
