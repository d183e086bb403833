"""Passes for XNNPACK: any library's layers in few delegates, with the same outputs, computed by XNNPACK itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("executorch")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy.backends.executorch import check_program
from mvmoe_deploy.exporters.executorch import convert as target
from mvmoe_deploy.exporters.split import PieceModule


class FusedAttention(nn.Module):
    """Queries, keys and values of one layer, as timm writes it."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class WrittenAttention(FusedAttention):
    """Softmax and products written out, with a bias per pair of tokens; heads come before the three parts."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        size = width // self.heads
        q, k, v = self.qkv(x).view(batch, tokens, self.heads, -1).split([size, size, size], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        scores = (q @ k) * size**-0.5 + self.bias
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))


class Rotary(FusedAttention):
    """Rotary positions of all tokens but the first, interleaved or in halves."""

    def __init__(self, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        angles = torch.rand(4, 8)
        self.register_buffer("rope", torch.cat([angles.sin(), angles.cos()], -1))

    def turned(self, x: Tensor) -> Tensor:
        if self.halves:
            one, two = x.chunk(2, -1)
            return torch.cat([-two, one], -1)
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)

    def placed(self, x: Tensor) -> Tensor:
        sin, cos = self.rope.chunk(2, -1)
        rest = x[:, :, 1:]
        return torch.cat([x[:, :, :1], rest * cos + self.turned(rest) * sin], 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.placed(q), self.placed(k), v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class ConvolvedSoftmax(nn.Module):
    """The case in which XNNPACK's softmax runs over the wrong axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).softmax(-1)


class ChannelsFirstNorm(nn.LayerNorm):
    """LayerNorm over channels that come first, as ConvNeXt's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Separable(nn.Module):
    """Self-attention of MobileViT v2: a convolution's output split in three, sums over the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(1, 6), nn.Conv2d(6, 1 + 2 * 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).split([1, 6, 6], dim=1)
        context = (k * q.softmax(-1)).sum(-1, keepdim=True)
        return v.relu() * context.expand_as(v)


def lively(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return module.eval()


TOKENS, IMAGES = (2, 5, 16), (2, 6, 4, 5)
CASES: dict[str, tuple[nn.Module, tuple[int, ...], set[str]]] = {
    "fused attention": (FusedAttention(), TOKENS, set()),
    "written attention": (WrittenAttention(), TOKENS, set()),
    "rotary positions in halves": (Rotary(halves=True), TOKENS, set()),
    "rotary positions interleaved": (Rotary(halves=False), TOKENS, set()),
    "softmax behind a convolution": (ConvolvedSoftmax(), (2, 8, 7, 7), set()),
    "layer norm": (nn.LayerNorm(16), TOKENS, set()),
    "layer norm without weights": (nn.LayerNorm(16, elementwise_affine=False), TOKENS, set()),
    "layer norm of channels": (ChannelsFirstNorm(6), IMAGES, set()),
    "separable attention": (Separable(), IMAGES, set()),
    "resizing": (nn.Upsample(scale_factor=2, mode="bilinear"), IMAGES, set()),
    "pools": (nn.Sequential(nn.AvgPool2d(2), nn.Hardsigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), IMAGES, set()),
}


def run(module: nn.Module, x: Tensor, lowered: target.Lowered, path: Path) -> Tensor:
    from executorch.runtime import Runtime

    path.write_bytes(lowered.data)
    check_program(path)
    (y,) = Runtime.get().load_program(str(path)).load_method("forward").execute([x.contiguous()])
    return y


@pytest.mark.parametrize(("module", "shape", "left"), CASES.values(), ids=CASES)
def test_xnnpack_computes_the_same_in_one_delegate(
    module: nn.Module, shape: tuple[int, ...], left: set[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    piece = PieceModule("head", lively(module), {"x": x}, ["y"])
    lowered = target.lower(target.export(target.flat([piece])[0], piece))
    assert (lowered.delegation.delegates, set(lowered.delegation.undelegated)) == (1, left)
    with torch.no_grad():
        for given in (x, torch.cat([x, x.flip(0), x])[:5]):
            expected = module(given)
            found = run(module, given, lowered, tmp_path / "model.pte")
            torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_xnnpack_is_still_wrong_where_the_graph_avoids_it(tmp_path: Path) -> None:
    """If this fails, ExecuTorch has been repaired, and ``write_softmax`` can go."""
    torch.manual_seed(0)
    module, x = lively(ConvolvedSoftmax()), torch.randn(2, 8, 7, 7)
    piece = PieceModule("head", module, {"x": x}, ["y"])
    lowered = target.lower(target.export(module, piece, max_batch=2))
    with torch.no_grad():
        assert (run(module, x, lowered, tmp_path / "model.pte") - module(x)).abs().max() > 0.1


def test_what_is_left_to_executorch_runs_and_is_checked(tmp_path: Path) -> None:
    """Views and lists of tensors, which executorch's own operators take, and a class token."""

    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = FusedAttention()

        def forward(self, x: Tensor) -> Tensor:
            places = torch.cat([x.argmax(-1), x.argmin(-1)], 1)
            return self.attention(x)[:, 0] + places.to(x.dtype).mean(1, keepdim=True)

    torch.manual_seed(0)
    x = torch.randn(TOKENS)
    piece = PieceModule("head", Left().eval(), {"x": x}, ["y"])
    lowered = target.lower(target.export(piece.module, piece))  # without passes
    assert b"executorch_prim::et_view" in lowered.data and b"aten::cat" in lowered.data
    for given in (x, x[:1]):
        found = run(piece.module, given, lowered, tmp_path / "model.pte")
        torch.testing.assert_close(found, piece.module(given), atol=1e-5, rtol=1e-5)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.small, self.wide = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 1024, 1)
        self.deep, self.router = nn.Conv2d(1024, 1024, 3, groups=1024), nn.Linear(1024, 4)
        self.norm, self.fc = nn.LayerNorm(1024), ScaledLinear(1024, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.deep(self.wide(self.small(self.stem(x))).relu()).mean((2, 3)))
        return self.fc(y) + self.router(y)


class ScaledLinear(nn.Linear):
    """A sub-class, as timm's."""


def test_int8_says_what_it_quantizes_and_what_it_leaves() -> None:
    piece = PieceModule("head", Mixed().eval(), {"x": torch.randn(2, 3, 8, 8)}, ["y"])
    (graph,) = target.flat([piece], "int8")
    kept = target.left_in_fp32(graph)
    assert kept == {"conv2d in groups": 1, "first conv2d": 1, "linear of the router": 1, "small conv2d": 1}
    program = target.export(graph, piece, "int8")
    names = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert names["quantized_decomposed.dequantize_per_channel.default"] == 2  # the 1 x 1 convolution and the sub-class


def quantized(module: nn.Module, x: Tensor, path: Path) -> Tensor:
    """What an int8 program of a module gives, in units of the right output's deviation from it."""
    piece = PieceModule("head", module, {"x": x}, ["y"])
    lowered = target.lower(target.export(target.flat([piece], "int8")[0], piece, "int8"))
    assert (lowered.delegation.delegates, lowered.delegation.undelegated) == (1, {})
    found = run(module, x, lowered, path)
    assert found.is_contiguous()  # a runtime reads its memory as channels, rows, columns
    with torch.no_grad():
        expected = module(x)
    return (found - expected).abs() / expected.std()


def test_a_quantized_convolution_reads_channels_wherever_its_input_comes_from(tmp_path: Path) -> None:
    """ExecuTorch 1.4.1 by itself lets the last convolution read width as channels: 128 of both, so that it fits."""
    torch.manual_seed(0)
    norm = ChannelsFirstNorm(128)
    module = nn.Sequential(nn.Conv2d(8, 128, 1), norm, nn.Conv2d(128, 128, 1), nn.Hardswish(), nn.Conv2d(128, 128, 1))
    assert quantized(lively(module), torch.randn(2, 8, 3, 128), tmp_path / "model.pte").max() < 0.1


def test_a_skip_connection_in_a_convolution_does_not_coarsen_its_other_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Conv2d(3, 48, 1), nn.Conv2d(48, 48, 3, padding=1)).eval(), torch.randn(2, 3, 6, 7)
    with torch.no_grad():
        others = module(x)
        module[1].weight += 20 * nn.init.dirac_(torch.empty(48, 48, 3, 3))
        found = quantized(module, x, tmp_path / "model.pte") * module(x).std()
    assert found.max() < 0.1 * others.std()


def test_small_weights_are_rounded_no_more_coarsely_than_large_ones(tmp_path: Path) -> None:
    """ExecuTorch's own configuration has no scale below 2⁻¹²: of this layer, it leaves nothing but zeros."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)).eval()
    with torch.no_grad():
        module[1].weight *= 1e-4 / module[1].weight.abs().max()
        module[1].bias.zero_()
    assert quantized(module, torch.randn(2, 64), tmp_path / "model.pte").max() < 0.1
