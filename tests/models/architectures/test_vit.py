"""The dense ViT: timm's names and shapes, and the same logits as the form everyone writes."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from mvmoe_deploy import models
from mvmoe_deploy.bench.candidates.baselines import StockViT
from mvmoe_deploy.errors import ConfigError

WIDTH, DEPTH, PATCH, CLASSES, PATCHES = 32, 2, 8, 6, 16


def timm_state_dict() -> dict[str, Tensor]:
    """What ``timm.create_model("vit_…").state_dict()`` holds, written out."""
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


@pytest.mark.parametrize("wrapped", [False, True], ids=["timm", "deit"])
def test_timm_and_deit_state_dicts_load(model: models.ViT, wrapped: bool) -> None:
    weights = timm_state_dict()
    models.load_timm_state_dict(model, {"model": weights} if wrapped else weights)  # type: ignore[dict-item]
    assert set(model.state_dict()) == set(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_missing_weight_is_named(model: models.ViT) -> None:
    weights = timm_state_dict()
    del weights["blocks.1.attn.qkv.bias"]
    with pytest.raises(ConfigError, match=r"lacks 1 weights, first 'blocks\.1\.attn\.qkv\.bias'"):
        models.load_timm_state_dict(model, weights)


def test_an_unknown_weight_is_named(model: models.ViT) -> None:
    weights = timm_state_dict() | {"head_dist.weight": torch.zeros(6, 32)}  # a distilled DeiT's
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
    """Skipping the last block's unread tokens changes nothing."""
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
