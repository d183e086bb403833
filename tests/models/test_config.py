"""Model configs: names, fields, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from mvmoe_deploy import models
from mvmoe_deploy.checkpoint import Checkpoint
from mvmoe_deploy.errors import CheckpointError, ConfigError


@pytest.mark.parametrize(("shape", "heads"), models.SCALES.items())
@pytest.mark.parametrize("kind", ["vit", "mvmoe"])
def test_scales_by_name(kind: str, shape: tuple[int, int], heads: int) -> None:
    config = models.config_from_name(f"{kind}_{shape[0]}x{shape[1]}")
    assert (config.depth, config.width, config.heads) == (*shape, heads)
    assert config.architecture == {"vit": "vit", "mvmoe": "mobile_vmoe"}[kind]


def test_every_field_is_free() -> None:
    config = models.config_from_name(
        "mvmoe_6x64", experts=7, moe_layers=3, k=2, patch_size=4, image_size=36, heads=8, classes=5, router_input="mean"
    )
    assert isinstance(config, models.MobileVMoEConfig)
    assert (config.experts, config.moe_layers, config.k, config.heads, config.tokens) == (7, 3, 2, 8, 82)


def test_none_keeps_the_default() -> None:
    assert models.config_from_name("vit_6x64", heads=None) == models.config_from_name("vit_6x64")


def test_a_config_reads_back() -> None:
    for config in (tiny.dense_config(), tiny.moe_config(k=2)):
        assert models.config_from_dict(config.to_dict()) == config


def test_the_dense_baseline_of_a_config() -> None:
    assert tiny.moe_config(k=2, classes=9).dense == tiny.dense_config(classes=9)


@pytest.mark.parametrize(
    "name", ["resnet50", "mvmoe_6", "mvmoe_6x", "vit_x64", "mvmoe_6x64x2", "VIT_6x64", "vit_-1x64"]
)
def test_an_unknown_name_is_refused_with_examples(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown model .*mvmoe_12x192"):
        models.config_from_name(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "alexnet"}, "architecture 'alexnet' is none of .*, vit, vit_wide, mobile_vmoe"),
        ({"architecture": ["vit"]}, "architecture .* is none of .*, vit"),
        ({"architecture": None}, "architecture None"),
        ({"colour": 3}, "mobile_vmoe has no field 'colour'"),
        ({"width": "32"}, "width is '32', must be of type int"),
        ({"width": 32.0}, "width is 32.0, must be of type int"),
        ({"width": True}, "width is True, must be of type int"),
        ({"router_input": 1}, "router_input is 1, must be of type str"),
        ({"router_input": "max"}, "router_input is 'max'"),
        ({"depth": 0}, "depth is 0, must be at least 1"),
        ({"k": -1}, "k is -1, must be at least 1"),
        ({"k": 5}, "k is 5, but there are only 4 experts"),
        ({"moe_layers": 3}, "moe_layers is 3, but depth is only 2"),
        ({"patch_size": 7}, "image_size 32 is not a multiple of patch_size 7"),
        ({"heads": 3}, "width 32 is not a multiple of heads 3"),
        ({"experts": 65537}, "experts is 65537, more than 65536"),
        ({"depth": 10**12}, "more than 65536"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        models.config_from_dict({**tiny.MOE, **change})


def test_a_config_far_larger_than_its_weights_is_refused_before_anything_is_built() -> None:
    """The config's fields are within bounds, but building the model would take minutes and terabytes."""
    checkpoint = tiny.checkpoint_of(tiny.lively_model(tiny.moe_config()))
    huge = {**checkpoint.header.model, "width": 65536, "depth": 65536, "experts": 65536}
    checkpoint.header.model = huge
    with pytest.raises(
        CheckpointError, match=r"birds\.pt: the config needs at least 65536 weights, but there are only"
    ):
        models.load_model(checkpoint, "birds.pt")
    checkpoint.header.model = {**huge, "depth": 2}
    with pytest.raises(CheckpointError, match=r"birds\.pt: weights: '.*' has shape"):
        models.load_model(checkpoint, "birds.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("blocks.1.mlp.fc1.weight"),
            r"moe\.pt: weights: lacks 1 weights, first 'blocks\.1\.mlp\.fc1\.weight'",
        ),
        (lambda w: w.update(extra=torch.zeros(1)), r"moe\.pt: weights: holds 1 weights .* first 'extra'"),
        (
            lambda w: w.update({"norm.bias": torch.zeros(7)}),
            r"'norm\.bias' has shape \[7\], the config asks for \[32\]",
        ),
    ],
    ids=["lacking", "unknown", "misshaped"],
)
def test_a_checkpoint_whose_weights_do_not_fit_is_refused(change: Any, message: str) -> None:
    checkpoint: Checkpoint = tiny.checkpoint_of(tiny.lively_model(tiny.moe_config()))
    change(checkpoint.weights)
    with pytest.raises(CheckpointError, match=message):
        models.load_model(checkpoint, "moe.pt")
