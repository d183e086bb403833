"""Counted work: equal to the closed form for the paper's models, unknown where an operator is not known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy.models import build, config_from_name
from mvmoe_deploy.models.architectures.vit import ViT, embed
from mvmoe_deploy.models.counting import Work, count


class AllTokens(nn.Module):
    """A ViT that computes every token to the end, as the closed form describes it."""

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        x = embed(images, self.vit.patch_embed, self.vit.cls_token, self.vit.pos_embed)
        for block in self.vit.blocks:
            x = block(x)
        return self.vit.head(self.vit.norm(x)[:, 0])


@pytest.mark.parametrize("name", ["vit_6x64", "vit_12x192", "vit_9x96"])
def test_the_count_is_the_closed_form(name: str) -> None:
    with torch.device("meta"):
        model = build(config_from_name(name))
        images = torch.empty(1, 3, model.config.image_size, model.config.image_size)
    assert count(AllTokens(model), [images]) == Work(model.config.flops(), model.config.macs())


def test_attention_counts_the_same_however_it_is_written() -> None:
    class Written(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    class Fused(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    inputs = [torch.randn(1, 2, 7, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 6)]
    assert count(Written(), inputs) == count(Fused(), inputs) == Work(2 * 126 * 10 + 5 * 126, 126 * 10)


def test_layers_by_hand() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    assert count(conv, [torch.randn(1, 3, 6, 6)]) == Work(2 * 64 * 27 + 64, 64 * 27)
    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Hardswish())
    assert count(depthwise, [torch.randn(1, 4, 5, 5)]) == Work(2 * 100 * 9 + 100 + 400, 100 * 9)
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    assert count(pooled, [torch.randn(1, 4, 5, 5)]) == Work(100 + 24 + 3, 12)
    assert count(nn.GroupNorm(2, 4), [torch.randn(1, 4, 5, 5)]) == Work(9 * 100 + 3 * 2, 0)


def test_what_is_not_known_is_unknown() -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(-1)[0]

    class Untraceable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    assert count(Sorted(), [torch.randn(2, 3)]) is None
    assert count(Untraceable(), [torch.randn(2, 3)]) is None
