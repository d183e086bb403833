"""The ExecuTorch target: what is lowered, how much of it XNNPACK takes, and that wrong weights are noticed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("executorch")

import executorch_bundles
import tiny
import torch
from executorch_bundles import altered, bundle, foreign_model, pieces, routed_model
from torch import Tensor, nn

from mvmoe_deploy.backends import open_backend
from mvmoe_deploy.errors import ExportError, VerificationError
from mvmoe_deploy.exporters.executorch import convert as target
from mvmoe_deploy.exporters.executorch import rewrite as xnnpack
from mvmoe_deploy.exporters.executorch.exporter import ExecuTorchOptions
from mvmoe_deploy.exporters.job import Job
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.exporters.precision import FP32
from mvmoe_deploy.exporters.split import PieceModule, split_model
from mvmoe_deploy.exporters.verify import check_piece
from mvmoe_deploy.models.architectures.vit import Attention


def lowered(piece: PieceModule, precision: str = "fp32") -> target.Lowered:
    return target.lower(target.export(target.flat([piece], precision)[0], piece, precision))


@pytest.mark.parametrize(("name", "piece"), [("separate", "trunk"), ("packed", "trunk"), ("int8", "trunk")])
def test_trunk_is_at_most_three_delegates_with_the_class_token_outside(name: str, piece: str) -> None:
    delegation = bundle(name).manifest.options["delegation"][piece]
    assert delegation["delegates"] <= 3
    assert delegation["delegated"] > 20
    # the router, which reads the class token, is a piece of its own in the int8 bundle
    assert set(delegation["undelegated"]) - {"aten.select_copy.int"} == {"aten.expand_copy.default"}


def test_tails_leave_nothing_but_the_class_token_outside() -> None:
    for name, delegation in bundle("separate").manifest.options["delegation"].items():
        if name.startswith("expert"):
            assert delegation["delegates"] <= 3
            assert set(delegation["undelegated"]) == {"aten.slice_copy.Tensor", "aten.select_copy.int"}


def test_naive_lowering_leaves_norms_outside() -> None:
    """Otherwise the rewrite, and what is checked above, would be worth nothing."""
    norm = nn.LayerNorm(8).eval()
    naive = target.lower(target.export(norm, PieceModule("head", norm, {"x": torch.randn(2, 8)}, ["y"])))
    assert naive.delegation == target.Delegation(0, 0, {"aten.native_layer_norm.default": 1})


@pytest.mark.parametrize("width", [1, 2, 3, 192])
def test_reflection_is_its_own_inverse_and_has_the_mean_first(width: int) -> None:
    reflection = xnnpack.Reflection(width)
    x = torch.randn(2, 5, width) + 3
    reflected = reflection(x)
    error = 1e-6 * float(reflected.abs().max())
    torch.testing.assert_close(reflection(reflected), x, atol=error, rtol=0)
    torch.testing.assert_close(reflected, (x.double() @ reflection.matrix).float(), atol=error, rtol=0)
    torch.testing.assert_close(reflected[..., 0], x.mean(-1) * width**0.5, atol=error, rtol=0)
    norm = nn.LayerNorm(width, elementwise_affine=False)
    seen = xnnpack.ReflectedNorm(norm)(reflected) * (torch.arange(width) > 0)
    torch.testing.assert_close((seen.double() @ reflection.matrix).float(), norm(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_rewrite_computes_the_same_and_leaves_the_original_alone(k: int, reflect: bool) -> None:
    for piece in pieces(k).pieces:
        before = {name: value.clone() for name, value in piece.module.state_dict().items()}
        module = xnnpack.rewrite(piece, reflect)
        kinds = {type(layer) for layer in module.modules()}
        assert not kinds & {Attention, nn.LayerNorm}
        # what reads whole tokens does so in the basis that makes norms cheap
        assert (xnnpack.ReflectedNorm in kinds) == (reflect and piece.role in ("model", "trunk", "tail"))
        result = module(*piece.inputs.values())
        for found, expected in zip(
            result if isinstance(result, tuple) else [result], piece(*piece.inputs.values()), strict=True
        ):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert all(torch.equal(value, before[name]) for name, value in piece.module.state_dict().items())


class OwnAttention(Attention):
    """An Attention that computes something else, and so is none."""

    def forward(self, x: Tensor, n: int | None = None) -> Tensor:
        return super().forward(x.flip(1), n)


def test_a_sub_class_is_rewritten_only_if_it_computes_the_same() -> None:
    piece = PieceModule("trunk", OwnAttention(32, 2).eval(), {"x": torch.randn(2, 5, 32)}, ["tokens"])
    assert type(xnnpack.rewrite(piece)) is OwnAttention


def test_wrong_rewrite_is_an_error_that_names_the_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xnnpack, "computes_as", isinstance)
    piece = PieceModule("trunk", OwnAttention(32, 2).eval(), {"x": torch.randn(2, 5, 32)}, ["tokens"])
    with pytest.raises(ExportError, match=r"trunk: rewritten for XNNPACK, its output tokens differs by"):
        xnnpack.rewrite(piece)


class NoNumber(nn.Module):
    """Returns no number for any number."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float("nan")


def test_outputs_that_are_no_numbers_are_an_error_unless_the_models_own_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Verification says of the model's own that they are, where a user can do something about it."""
    norm = nn.LayerNorm(8)
    nn.init.constant_(norm.weight, float("nan"))
    xnnpack.rewrite(PieceModule("head", norm.eval(), {"x": torch.randn(2, 8)}, ["y"]))
    monkeypatch.setattr(xnnpack, "_supported", lambda layer: NoNumber() if isinstance(layer, nn.Identity) else None)
    with pytest.raises(ExportError, match=r"trunk: rewritten for XNNPACK, its output tokens differs by nan"):
        xnnpack.rewrite(PieceModule("trunk", nn.Sequential(nn.Identity()), {"x": torch.randn(2, 5, 32)}, ["tokens"]))


def exported(first: Tensor, second: Tensor, precision: str = "fp32", bias: bool = True) -> torch.export.ExportedProgram:
    """Two linear layers of these weights, traced."""
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=bias)).eval()
    module[0].weight, module[1].weight = nn.Parameter(first), nn.Parameter(second)
    if bias:
        nn.init.ones_(module[1].bias)
    return target.export(module, PieceModule("head", module, {"x": torch.ones(2, 4)}, ["y"]), precision)


def weights(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The weights of the program of :func:`exported`, by its names."""
    return target._tensors(exported(*args, **kwargs))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_exchanging_weights_gives_what_lowering_gives(precision: str) -> None:
    a, b, c, d = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0))
    exchanged = target.with_weights(target.lower(exported(a, b, precision)), weights(c, d, precision))
    assert exchanged is not None
    assert exchanged.data == target.lower(exported(c, d, precision)).data


def test_weights_are_not_exchanged_between_other_graphs_or_patterns() -> None:
    a, b, c, d = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0))
    different, equal = target.lower(exported(a, b)), target.lower(exported(a, a))
    assert target.with_weights(different, weights(c, c)) is None  # would be stored once
    assert target.with_weights(equal, weights(c, d)) is None  # stored once, needed twice
    assert target.with_weights(different, weights(a, b, bias=False)) is None


def tail(number: int, wide: bool = False) -> tuple[PieceModule, torch.fx.GraphModule]:
    """An expert of random weights, as a piece and as a flat graph."""
    torch.manual_seed(number)
    module = nn.Sequential(nn.Linear(4, 4), nn.GELU("none" if wide else "tanh"), nn.Linear(4, 4)).eval()
    piece = PieceModule(f"expert_{number:02d}", module, {"x": torch.ones(2, 4)}, ["y"])
    return piece, target.flat([piece])[0]


def test_weights_that_tracing_would_give_are_taken_from_the_module() -> None:
    (piece, first), (other, second) = tail(0), tail(1)
    lowered = target.lower(target.export(first, piece))
    taken = target.weights_alike(lowered, first, second)
    traced = target._tensors(target.export(second, other))
    assert taken is not None and taken.keys() == traced.keys()
    assert all(torch.equal(taken[name], traced[name]) for name in traced)


def test_weights_are_not_taken_from_a_module_that_would_be_another_program() -> None:
    piece, first = tail(0)
    lowered = target.lower(target.export(first, piece))
    assert target.weights_alike(lowered, first, tail(1, wide=True)[1]) is None
    double = tail(1)[1].double()
    assert target.weights_alike(lowered, first, double) is None
    int8 = target.lower(target.export(first, piece, "int8"))
    assert target.weights_alike(int8, first, tail(1)[1]) is None  # its weights are others than the module's


def test_one_expert_is_traced_and_lowered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    traced, export = [], target.export

    def noted(module: nn.Module, piece: PieceModule, *how: Any) -> torch.export.ExportedProgram:
        traced.append(piece.name)
        return export(module, piece, *how)

    monkeypatch.setattr(target, "export", noted)
    header = tiny.header_for(routed_model().config)
    export_model(routed_model(), header, "executorch", tmp_path / "moe.mvmoe")  # as the bundle that is kept
    assert traced == ["trunk", "expert_00"]


def test_wrong_expert_is_noticed(tmp_path: Path) -> None:
    original = bundle("separate")
    swap = {"expert_00.pte": "expert_01.pte", "expert_01.pte": "expert_00.pte"}
    wrong = altered(original, tmp_path, {name: (original.path / other).read_bytes() for name, other in swap.items()})
    backend = open_backend(wrong)
    tails = pieces().of("tail")
    inputs = [value.contiguous() for value in tails[0].inputs.values()]
    expected = [[output.numpy() for output in tail(*inputs)] for tail in tails]
    with pytest.raises(VerificationError, match="expert_00: differs from PyTorch"):
        check_piece(tails[0], inputs, expected=expected[0], bundle=wrong, backend=backend, tolerance=FP32.tolerance)
    check_piece(tails[2], inputs, expected=expected[2], bundle=wrong, backend=backend, tolerance=FP32.tolerance)


def test_packed_file_holds_every_method_and_shared_weights_once() -> None:
    opened = bundle("packed")
    assert [file.path for file in opened.manifest.files if not file.path.startswith("selftest")] == ["model.pte"]
    assert [piece.function for piece in opened.manifest.pieces] == [piece.name for piece in pieces(2).pieces]
    tails = {f"expert_{i:02d}": (bundle("separate").path / f"expert_{i:02d}.pte").read_bytes() for i in range(3)}
    shared = 4 * sum(
        p.numel() for layer in ("attn", "norm1") for p in getattr(routed_model().blocks[1], layer).parameters()
    )
    assert len(target.pack(tails)) < sum(map(len, tails.values())) - 2 * shared * 0.9


def test_int8_is_smaller_and_keeps_the_router_fp32() -> None:
    sizes = {
        name: {piece.name: piece.weight_bytes for piece in bundle(name).manifest.pieces}
        for name in ("separate", "int8")
    }
    assert sizes["int8"]["expert_00"] < 0.6 * sizes["separate"]["expert_00"]
    (router,) = (piece for piece in bundle("int8").manifest.pieces if piece.role == "router")
    assert router.weight_bytes >= 4 * router.parameters


def test_foreign_layers_lower_as_they_are() -> None:
    module = xnnpack.rewrite(PieceModule("model", foreign_model(), {"images": torch.randn(2, 3, 16, 16)}, ["logits"]))
    assert [type(layer) for layer in module.children()] == [nn.Conv2d, nn.Linear, xnnpack.LinearNorm, nn.Linear]
    assert bundle("foreign").manifest.verification["top1_agreement"] == 1


def test_layer_that_cannot_be_lowered_is_an_error_that_names_the_piece(tmp_path: Path) -> None:
    class DataDependent(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))

    manifest = bundle("foreign").manifest
    job = Job(
        split_model(DataDependent(), 16),
        tmp_path,
        options=ExecuTorchOptions("fp32", "separate"),
        manifest=manifest,
        images=torch.empty(0),
        piece_flops=lambda role: 0,
        progress=lambda what: None,
    )
    with pytest.raises(ExportError, match="model: torch cannot trace it"):
        target.convert(job)


SAME_AGAIN = """
import hashlib
from executorch_bundles import pieces
from mvmoe_deploy.exporters.executorch import convert as executorch
trunk = pieces().of("trunk")[0]
print(hashlib.sha256(executorch.lower(executorch.export(executorch.flat([trunk])[0], trunk)).data).hexdigest())
"""


def test_exporting_twice_gives_the_same_bytes() -> None:
    """The trunk is exported again in another process, whose sets of strings have another order."""
    paths = [str(Path(executorch_bundles.__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    output = subprocess.run(
        [sys.executable, "-c", SAME_AGAIN], env=environment, check=True, capture_output=True, text=True
    ).stdout
    trunk = (bundle("separate").path / "trunk.pte").read_bytes()
    assert hashlib.sha256(trunk).hexdigest() == output.split()[-1]
