"""The dense ViT: timm's names and shapes, and the same logits as the form everyone writes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from mvmoe_deploy import models
from mvmoe_deploy.errors import CheckpointError, ConfigError
from mvmoe_deploy.models.architectures.vit import StockViT

WIDTH, DEPTH, PATCH, CLASSES, PATCHES = 32, 2, 8, 6, 16


def timm_state_dict() -> dict[str, Tensor]:
    """The names and shapes that ``timm.create_model("vit_…").state_dict()`` holds, written out."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, PATCHES + 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "head.weight": (CLASSES, WIDTH),
        "head.bias": (CLASSES,),
    }
    for block in range(DEPTH):
        shapes |= {
            f"blocks.{block}.norm1.weight": (WIDTH,),
            f"blocks.{block}.norm1.bias": (WIDTH,),
            f"blocks.{block}.attn.qkv.weight": (3 * WIDTH, WIDTH),
            f"blocks.{block}.attn.qkv.bias": (3 * WIDTH,),
            f"blocks.{block}.attn.proj.weight": (WIDTH, WIDTH),
            f"blocks.{block}.attn.proj.bias": (WIDTH,),
            f"blocks.{block}.norm2.weight": (WIDTH,),
            f"blocks.{block}.norm2.bias": (WIDTH,),
            f"blocks.{block}.mlp.fc1.weight": (4 * WIDTH, WIDTH),
            f"blocks.{block}.mlp.fc1.bias": (4 * WIDTH,),
            f"blocks.{block}.mlp.fc2.weight": (WIDTH, 4 * WIDTH),
            f"blocks.{block}.mlp.fc2.bias": (WIDTH,),
        }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def model() -> models.ViT:
    return models.build(tiny.dense_config())


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def other(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in weights.items()}


W = timm_state_dict()
TRAINED = {"epoch": 1, "arch": "vit", "optimizer": {"state": {}}, "args": argparse.Namespace(lr=0.1), "metric": 0.5}
SAVED: list[tuple[str, Any, bool, str]] = [
    ("a bare state dict", W, False, ""),
    ("DeiT", {"model": W}, False, "model"),
    ("DeiT's training", {**TRAINED, "model": W, "model_ema": other(W)}, False, "model"),
    ("DeiT's average", {**TRAINED, "model": other(W), "model_ema": W}, True, "model_ema"),
    ("timm's training", {**TRAINED, "state_dict": W, "state_dict_ema": other(W)}, False, "state_dict"),
    ("timm's average", {**TRAINED, "state_dict": other(W), "state_dict_ema": W}, True, "state_dict_ema"),
    ("nothing but the average", {**TRAINED, "state_dict_ema": W}, False, "state_dict_ema"),
    ("distributed", prefixed("module.", W), False, ""),
    ("compiled", {"state_dict": prefixed("_orig_mod.", W)}, False, "state_dict"),
    ("both", {"state_dict": prefixed("module._orig_mod.", W)}, False, "state_dict"),
    ("both, the other way", prefixed("_orig_mod.module.", W), False, ""),
    ("half precision", {name: tensor.half().float().bfloat16() for name, tensor in W.items()}, False, ""),
]


@pytest.mark.parametrize("stored", [False, True], ids=["object", "file"])
@pytest.mark.parametrize(("saved", "ema", "entry"), [case[1:] for case in SAVED], ids=[case[0] for case in SAVED])
def test_what_timm_and_deit_save_loads(
    model: models.ViT, saved: Any, ema: bool, entry: str, stored: bool, tmp_path: Path
) -> None:
    weights = timm_state_dict()
    if saved is SAVED[-1][1]:
        weights = {name: tensor.half().bfloat16().float() for name, tensor in weights.items()}
    if stored:
        torch.save(saved, tmp_path / "last.pth.tar")
        saved = tmp_path / "last.pth.tar"
    assert models.load_timm_state_dict(model, saved, ema) == entry
    assert set(model.state_dict()) == set(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_pickled_module_loads(model: models.ViT, dense_model: models.ViT) -> None:
    assert models.load_timm_state_dict(model, {"model": dense_model}) == "model"
    assert torch.equal(model.head.weight, dense_model.head.weight)


@pytest.mark.parametrize(
    ("saved", "ema", "message"),
    [
        ({}, False, "no weights recognised, it is empty"),
        (TRAINED, False, "no weights recognised, only epoch, arch, optimizer, args, metric"),
        ({"model": 3, "epoch": 1}, False, "no weights recognised, only model, epoch"),
        ({**TRAINED, "state_dict": W}, True, "no moving average .*state_dict_ema or model_ema.*, only epoch, arch"),
        ([W], False, "is a list, expected a state dict"),
        (W | {"head.weight": None}, False, r"'head\.weight' is a NoneType, not a tensor"),
        (W | {"head.weight": W["head.weight"].numpy()}, False, r"'head\.weight' is a ndarray, not a tensor"),
        (W | {"head.weight": W["head.weight"].to(torch.int8)}, False, "is of type int8, which means nothing without"),
        (W | {"head.weight": W["head.weight"].to(torch.float8_e4m3fn)}, False, "is of type float8_e4m3fn"),
        (W | {"head.weight": W["head.weight"].to(torch.complex64)}, False, "is of type complex64"),
        (W | {"head.weight": W["head.weight"].to_sparse()}, False, "is sparse, and dense weights are needed"),
        (W | {"head.weight": torch.quantize_per_tensor(W["head.weight"], 0.1, 0, torch.qint8)}, False, "is quantised"),
        (W | {"head.weight": W["head.weight"].to("meta")}, False, "has no values"),
        (W | {"head.weight": W["head.weight"] * float("nan")}, False, "'head.weight' has values that are NaN"),
        (
            {"state_dict": W | {"head.bias": W["head.bias"] / 0}},
            False,
            "state_dict: 'head.bias' has values that are NaN",
        ),
    ],
)
def test_what_cannot_be_loaded_says_what_was_found(model: models.ViT, saved: Any, ema: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.load_timm_state_dict(model, saved, ema)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (W["head.weight"].to(torch.int8), r"weights\['head\.weight'\] is of type I8, expected F32"),
        (W["head.weight"].to(torch.complex64), "is of type C64"),
        (W["head.weight"].to_sparse(), "is sparse"),
        (torch.quantize_per_tensor(W["head.weight"], 0.1, 0, torch.qint8), "is quantised"),
        (W["head.weight"].to(torch.float8_e4m3fn), "is a torch._utils._rebuild_tensor_v3|is of type"),
        (None, "is a NoneType"),
    ],
)
def test_a_file_s_weights_of_other_types_are_named(
    model: models.ViT, weight: Any, message: str, tmp_path: Path
) -> None:
    torch.save(W | {"head.weight": weight}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        models.load_timm_state_dict(model, tmp_path / "x.pt")


def test_a_missing_weight_is_named(model: models.ViT) -> None:
    weights = timm_state_dict()
    del weights["blocks.1.attn.qkv.bias"]
    with pytest.raises(ConfigError, match=r"lacks 1 weights, first 'blocks\.1\.attn\.qkv\.bias'"):
        models.load_timm_state_dict(model, weights)


def test_an_unknown_weight_is_named(model: models.ViT) -> None:
    weights = timm_state_dict() | {"head_dist.weight": torch.zeros(6, 32)}  # a weight of a distilled DeiT
    with pytest.raises(ConfigError, match=r"head_dist\.weight"):
        models.load_timm_state_dict(model, weights)


def test_a_wrong_shape_is_named_with_both_shapes(model: models.ViT) -> None:
    weights = timm_state_dict() | {"head.weight": torch.zeros(1000, 32)}
    with pytest.raises(ConfigError, match=r"'head\.weight' has shape \[1000, 32\], the config asks for \[6, 32\]"):
        models.load_timm_state_dict(model, weights)


def test_a_refused_state_dict_changes_nothing(model: models.ViT) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError):
        models.load_timm_state_dict(model, timm_state_dict() | {"head.weight": torch.zeros(1, 1)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_logits_equal_the_form_everyone_writes(dense_model: models.ViT) -> None:
    """Skipping the tokens of the last block that are not read does not change the logits."""
    stock = StockViT(dense_model.config).eval()
    stock.load_state_dict(dense_model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(dense_model(tiny.inputs()), stock(tiny.inputs()), rtol=1e-5, atol=1e-6)


def test_against_attention_written_out(dense_model: models.ViT) -> None:
    """The whole model once more in plain arithmetic: LayerNorm eps 1e-6, erf GELU, head by head attention."""
    w = dense_model.state_dict()
    d, heads = WIDTH, 2

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    images = tiny.inputs(4)
    patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).reshape(4, PATCHES, -1)
    x = patches @ w["patch_embed.proj.weight"].reshape(d, -1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(4, 1, d), x], 1) + w["pos_embed"]
    for index in range(DEPTH):
        block = f"blocks.{index}"
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").split(d, -1)
        out = []
        for part in torch.arange(d).split(d // heads):
            scores = (q[..., part] @ k[..., part].transpose(1, 2)) / (d / heads) ** 0.5
            out.append(scores.softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(out, -1), f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), f"{block}.mlp.fc2")
    with torch.no_grad():
        torch.testing.assert_close(dense_model(images), linear(norm(x, "norm")[:, 0], "head"), rtol=1e-4, atol=1e-5)
