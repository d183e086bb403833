"""Flat graphs: the same outputs from shared weights, whatever classes a model's modules have."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy.errors import ExportError
from mvmoe_deploy.exporters.graph import check_same, flatten
from mvmoe_deploy.exporters.split import PieceModule, computes_as, private_copy, shared_weights, split_model


def piece(module: nn.Module, *inputs: Tensor) -> PieceModule:
    names = [f"x{index}" for index in range(len(inputs))]
    return PieceModule("head", module.eval(), dict(zip(names, inputs, strict=True)), ["y"])


def flat(module: nn.Module, *inputs: Tensor) -> nn.Module:
    """The module's flat graph, which computes the same for another batch too."""
    given = piece(module, *inputs)
    (graph,) = flatten([given], [given.module])
    more = [torch.cat([x, x.flip(0), x]) for x in inputs]
    with torch.no_grad():
        torch.testing.assert_close(graph(*more), module(*more), atol=1e-5, rtol=1e-5)
    return graph


def operators(module: nn.Module) -> Counter[str]:
    nodes = module.graph.nodes  # type: ignore[union-attr]
    return Counter(node.target.__name__ for node in nodes if node.op == "call_function")  # type: ignore[union-attr]


def lively(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return module


class Cached(nn.Module):
    """Keeps a table in a plain dict, as timm's attention biases do, and a buffer that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))
        self.cache: dict[str, Tensor] = {}
        self.places: Tensor
        self.register_buffer("places", torch.tensor([2, 0, 1, 1]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if "table" not in self.cache:
            self.cache["table"] = self.table[self.places]
        return x @ self.cache["table"]


def test_the_callers_model_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), Cached()).train()
    split = split_model(model, tiny.SIZE)
    (graph,) = flatten(split.pieces, [split.pieces[0].module])
    assert model.training and not model[4].cache
    assert not split.model.training
    assert {tensor.data_ptr() for tensor in split.model.parameters()} == {t.data_ptr() for t in model.parameters()}
    model.eval()
    images = tiny.inputs(3)
    with torch.no_grad():
        torch.testing.assert_close(graph(images), model(images))


def test_caches_that_differ_between_experts_are_not_mixed_up() -> None:
    tails = [Cached().eval(), Cached().eval()]
    x = torch.randn(2, 4)
    with torch.no_grad():
        expected = [tail(x) for tail in tails]  # which fills the caches
    pieces = [piece(tail, x) for tail in tails]
    for graph, wanted in zip(flatten(pieces, tails), expected, strict=True):
        torch.testing.assert_close(graph(x), wanted)


def test_what_cannot_be_copied_is_said_in_one_line() -> None:
    model = nn.Flatten()
    model.lock = (_ for _ in ())  # type: ignore[assignment]
    with pytest.raises(
        ExportError, match=r"Flatten: cannot be copied for tracing \(cannot pickle 'generator' object\)"
    ):
        private_copy(model)


class Scaled(nn.Module):
    """LayerScale after a convolution and after a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 5)
        self.one, self.two = nn.Parameter(torch.rand(4, 1, 1)), nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.conv(x) * self.one).mean((2, 3))) * self.two


class Unfoldable(nn.Module):
    """BatchNorm of an output that something else reads as well, scales of rows, and BatchNorm of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.norm = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.rows = nn.Parameter(torch.rand(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.first(x))
        return (self.norm(y) + y) * self.rows


class ActivatedNorm(nn.BatchNorm2d):
    """A sub-class with a forward of its own, as timm's: it does more than a BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


FOLDED = {
    "conv": (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), {"conv2d.default": 1}),
    "same": (nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)), {"conv2d.padding": 1}),
    "depthwise": (nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6, affine=False)), {"conv2d.default": 1}),
    "sub-class": (nn.Sequential(nn.Conv2d(3, 4, 3), ActivatedNorm(4)), {"conv2d.default": 1, "relu.default": 1}),
    "linear": (
        nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4)),
        {"reshape.default": 1, "linear.default": 1},
    ),
    "scales": (Scaled(), {"conv2d.default": 1, "mean.dim": 1, "linear.default": 1}),
    "unfoldable": (Unfoldable(), {"batch_norm.default": 2, "conv2d.default": 1, "add.Tensor": 1, "mul.Tensor": 1}),
}


@pytest.mark.parametrize(("module", "left"), FOLDED.values(), ids=FOLDED)
def test_norms_and_scales_are_folded(module: nn.Module, left: dict[str, int]) -> None:
    graph = flat(lively(module), torch.randn(2, 3, 6, 6))
    assert operators(graph) == left


def test_pools_shapes_and_what_does_nothing() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Identity())
    assert operators(flat(module, torch.randn(2, 3, 4, 4))) == {"mean.dim": 1, "reshape.default": 1}


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_the_size_of_a_resized_image_is_written_down(mode: str) -> None:
    graph = flat(nn.Upsample(scale_factor=2, mode=mode), torch.randn(2, 3, 4, 5))
    (node,) = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert list(node.args[1]) == [8, 10] and node.args[-1] is None
    odd = flat(nn.Upsample(scale_factor=1.3, mode=mode), torch.randn(2, 3, 4, 5))  # 5.2 rows: another grid than 5
    (node,) = [node for node in odd.graph.nodes if node.op == "call_function"]
    assert node.args[1] is None


def test_what_pieces_share_their_graphs_share() -> None:
    """The folded head too, which is computed once."""
    head = lively(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    tails = [nn.Sequential(lively(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4), head).eval() for _ in range(3)]
    with torch.no_grad():
        for index, tail in enumerate(tails):
            tail[0].weight.mul_(index + 1)
    x = torch.randn(2, 3, 2, 2)
    graphs = flatten([piece(tail, x) for tail in tails], tails)
    assert shared_weights(graphs) == {"2.0.weight", "2.0.bias"}
    for graph, tail in zip(graphs, tails, strict=True):
        torch.testing.assert_close(graph(x), tail(x))


def test_a_graph_that_computes_something_else_is_refused() -> None:
    layer = nn.Linear(3, 3)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.bias.add_(1e-4)
    with pytest.raises(ExportError, match="head: traced, its output y differs by"):
        check_same(piece(layer, torch.randn(2, 3)), other)


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Renamed(nn.Linear):
    pass


def test_sub_classes_are_recognised_by_what_they_compute() -> None:
    assert computes_as(nn.Linear(2, 2), nn.Linear) and computes_as(Renamed(2, 2), nn.Linear)
    assert not computes_as(OwnForward(2, 2), nn.Linear) and not computes_as(nn.Flatten(), nn.Linear)
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda module, x, y: y + 1)
    assert not computes_as(hooked, nn.Linear)
