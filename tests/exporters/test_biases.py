"""Biases take back what rounding a convolution's weights does to its outputs on average."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.backends import open_backend
from mvmoe_deploy.exporters.biases import correct_biases
from mvmoe_deploy.exporters.exporter import Options
from mvmoe_deploy.exporters.graph import flatten
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.exporters.split import PieceModule, shared_weights, split_model
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.runtime import Runtime
from tests.support import tiny

WIDTH = 128  # ExecuTorch's int8 leaves convolutions of fewer than 128 x 128 weights alone


def coarse(weight: Tensor) -> Tensor:
    """Three bits per weight, one scale per output channel."""
    scale = weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (weight.ndim - 1)) / 3
    return torch.round(weight / scale) * scale


def flat(module: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    piece = PieceModule("head", module.eval(), {"x": x}, ["y"])
    return flatten([piece], [piece.module])[0]


@pytest.mark.parametrize(
    "convolution",
    [nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(8, 6, 3, padding="same")],
    ids=["strided", "depthwise", "same"],
)
def test_rounded_weights_keep_the_mean_of_each_channel(convolution: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 8, 9, 9) + 0.5
    right, module = convolution(x).detach(), flat(convolution, x)
    before = module.state_dict()["weight"].clone()
    correct_biases([module], [[x]], {"weight": coarse})
    assert torch.equal(module.state_dict()["weight"], before)  # a target rounds it, when it stores it
    assert torch.equal(convolution(x), right)  # the model itself is as it was
    module.weight = nn.Parameter(coarse(before))
    error = (module(x) - right).mean((0, 2, 3))
    module.bias = convolution.bias
    assert error.abs().max() < 1e-5 < 0.01 < (module(x) - right).mean((0, 2, 3)).abs().max()


def test_what_tails_share_stays_shared_and_experts_get_biases_of_their_own() -> None:
    split = split_model(tiny.ConvRouted().eval(), tiny.SIZE)
    tails = split.of("tail")
    modules = flatten(tails, [tail.module for tail in tails])
    before, shared = [dict(module.state_dict()) for module in modules], shared_weights(modules)
    inputs = {piece.name: given for piece, given in split.reference_inputs(tiny.inputs(8), few=8)}
    correct_biases(modules, [inputs[tail.name] for tail in tails], dict.fromkeys(before[0], coarse))
    after = [dict(module.state_dict()) for module in modules]
    assert shared_weights(modules) == shared
    changed = {name for name in shared | set(after[0]) if not torch.equal(before[0][name], after[0][name])}
    assert changed == {"branch.0.bias", "mix.bias"}  # of convolutions alone
    shifts = [now["branch.0.bias"] - old["branch.0.bias"] for old, now in zip(before, after, strict=True)]
    assert not torch.allclose(shifts[0], shifts[1])


def test_a_bias_that_something_else_reads_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 6, 3), nn.Conv2d(8, 6, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + nn.functional.conv2d(x, self.two.weight, self.one.bias)

    x = torch.rand(2, 8, 5, 5)
    module = flat(Twice(), x)
    before = dict(module.state_dict())
    correct_biases([module], [[x]], dict.fromkeys(before, coarse))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


class Pooled(nn.Module):
    """A convolution that reads ReLUs, and logits that are the means of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.stem(x).relu()).mean((2, 3))


@pytest.mark.parametrize(
    ("target", "precision"),
    [("onnx", "int8"), ("onnx", "int4"), ("executorch", "int8"), ("coreml", "int8"), ("coreml", "palette6")],
)
def test_exported_convolutions_have_the_mean_of_pytorchs(target: str, precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, names = Pooled().eval(), [f"c{index}" for index in range(WIDTH)]
    with torch.no_grad():
        model.wide.weight[:, 0] = 3  # what sets the scale of every channel
    header = checkpoints.new_header({"architecture": "pooled"}, names, names, Preprocessing(size=8))
    images = tiny.inputs(16, 8)
    bundle = export_model(
        model, header, target, tmp_path / "x.mvmoe", options=Options(precision), images=images, selftest="none"
    )
    backend = open_backend(bundle, bundle.manifest.verification["backend"])
    with Runtime(bundle, backend) as runtime, torch.no_grad():
        found = np.concatenate([runtime.run(image[None].numpy())[0] for image in images])
        error = found - model(images).numpy()
        features = model.stem(images).relu().mean((0, 2, 3))
        weight = model.wide.weight[:, :, 0, 0]
        scale = weight.abs().amax(1, keepdim=True) / 127
        rounding = ((torch.round(weight / scale) * scale - weight) @ features).numpy()
    assert np.sqrt(np.square(error.mean(0)).mean()) < 0.1 * np.sqrt(np.square(rounding).mean())
