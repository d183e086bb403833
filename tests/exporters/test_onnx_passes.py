"""Rewrites for onnxruntime: which operators a graph has afterwards, and that it gives what the module gives."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy.exporters.onnx import convert
from mvmoe_deploy.exporters.split import PieceModule

TOKENS, WIDTH, HEADS = 5, 12, 3


def operators(module: nn.Module, *inputs: Tensor) -> Counter[str]:
    """The operators of a module's graph, whose outputs are PyTorch's for any batch."""
    given = {f"x{index}": x for index, x in enumerate(inputs)}
    piece = PieceModule("head", module.eval(), given, ["y"])
    model = convert.trace(piece, convert.flat([piece])[0])
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for batch in (1, 2, 3):
        fed = {name: torch.cat([x, x.flip(0)])[:batch] for name, x in given.items()}
        with torch.no_grad():
            expected = module(*fed.values())
        found = torch.from_numpy(session.run(None, {name: x.numpy() for name, x in fed.items()})[0])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    return Counter(node.op_type for node in model.graph)


class Attention(nn.Module):
    """Attention as timm writes it: one layer for queries, keys and values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=kind != "no bias")
        self.norm = nn.LayerNorm(WIDTH // HEADS)
        self.bias = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(-1, TOKENS, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "normed keys":
            k = self.norm(k)
        options = {"mask": {"attn_mask": self.bias}, "scale": {"scale": 0.7}, "causal": {"is_causal": True}}
        y = F.scaled_dot_product_attention(q, k, v, **options.get(self.kind, {}))  # type: ignore[arg-type]
        y = y.transpose(1, 2).reshape(-1, TOKENS, WIDTH)
        return self.proj(y) + y if self.kind == "read twice" else self.proj(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["plain", "mask", "scale", "no bias", "read twice"])
def test_attention_of_any_library_is_one_operator(kind: str) -> None:
    torch.manual_seed(0)
    found = operators(Attention(kind), torch.randn(2, TOKENS, WIDTH))
    assert found["Attention"] == 1 and not found.keys() & {"Reshape", "Transpose", "Split", "Slice", "Squeeze"}
    # the queries' bias, the projection's, and the values' where something else reads what attention gives
    assert found["Add"] == (4 if kind == "read twice" else 2)


@pytest.mark.parametrize("kind", ["normed keys", "causal"])
def test_attention_that_does_more_stays_as_it_is(kind: str) -> None:
    torch.manual_seed(0)
    assert operators(Attention(kind), torch.randn(2, TOKENS, WIDTH))["Transpose"] >= 2


class Gated(nn.Module):
    """What a routed backbone's gate lets through of a residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x + gate[:, None, None, None] * (self.conv(x) + x - x)


def test_a_gate_multiplies_what_a_block_adds_without_a_subtraction() -> None:
    found = operators(Gated(8), torch.randn(2, 8, 4, 4), torch.rand(2))
    assert (found["Sub"], found["Add"], found["Mul"], found["Conv"]) == (0, 1, 1, 1)


class Pooled(nn.Module):
    def __init__(self, axes: tuple[int, ...], keep: bool) -> None:
        super().__init__()
        self.axes, self.keep = axes, keep

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(self.axes, keepdim=self.keep)
        return x * (mean if self.keep else mean[:, :, None, None])


@pytest.mark.parametrize(
    ("axes", "keep", "pools"),
    [((2, 3), True, 1), ((-1, -2), True, 1), ((1, 2), True, 0), ((3,), True, 0), ((2, 3), False, 0)],
)
def test_a_mean_over_height_and_width_is_a_pooling(axes: tuple[int, ...], keep: bool, pools: int) -> None:
    found = operators(Pooled(axes, keep), torch.randn(2, 3, 4, 4))
    assert (found["GlobalAveragePool"], found["ReduceMean"]) == (pools, 1 - pools)
