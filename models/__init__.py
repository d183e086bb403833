"""The models: the dense ViT, Mobile V-MoE, V-MoE, and how they are built from a checkpoint."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.checkpoint import Checkpoint, Header
from mvmoe_deploy.errors import CheckpointError, ConfigError
from mvmoe_deploy.models.architectures.mobile_vmoe import MobileVMoE, MobileVMoEConfig
from mvmoe_deploy.models.architectures.vit import ViT, ViTConfig, check_state_dict, load_timm_state_dict
from mvmoe_deploy.models.architectures.vmoe import VMoE, VMoEConfig

__all__ = [
    "SCALES",
    "MobileVMoE",
    "MobileVMoEConfig",
    "VMoE",
    "VMoEConfig",
    "ViT",
    "ViTConfig",
    "build",
    "config_from_dict",
    "config_from_name",
    "from_dense",
    "load_checkpoint",
    "load_model",
    "load_timm_state_dict",
    "with_weights",
]

Model = TypeVar("Model", bound=nn.Module)

ARCHITECTURES: dict[str, tuple[type[ViTConfig], type[ViT]]] = {
    "vit": (ViTConfig, ViT),
    "mobile_vmoe": (MobileVMoEConfig, MobileVMoE),
    "vmoe": (VMoEConfig, VMoE),
}

NAMES = {"vit": "vit", "mvmoe": "mobile_vmoe", "vmoe": "vmoe"}
"""Architecture by the first part of a model's name."""

SCALES = {(depth, width): heads for width, heads in ((384, 6), (192, 3), (96, 3), (64, 2)) for depth in (12, 9, 6)}
"""Heads of the 12 scales of Mobile V-MoE's figure 3a, by (depth, width)."""

ZOO = Path(__file__).parent / "zoo"
"""Trained checkpoints and their cards."""

LARGEST = 65536
"""No value of a model config may exceed this: a config from a stranger must not make us allocate without end."""


def config_from_name(name: str, **overrides: Any) -> ViTConfig:
    """The config of a scale by name: ``vit_12x192``, ``mvmoe_12x192`` or ``vmoe_12x192`` (depth × width).

    Args:
        name: ``vit_``, ``mvmoe_`` or ``vmoe_``, depth, ``x``, width. Heads are the paper's at its 12 scales, else
            width / 64 (at least 1).
        **overrides: any field of the config; None keeps the default.

    Raises:
        ConfigError: the name is not of that form, or a field does not fit.
    """
    match = re.fullmatch(r"(vit|mvmoe|vmoe)_(\d{1,4})x(\d{1,5})", name)
    if match is None:
        scales = ", ".join(f"mvmoe_{depth}x{width}" for depth, width in SCALES)
        raise ConfigError(
            f"unknown model {name!r}: expected vit_DEPTHxWIDTH, mvmoe_DEPTHxWIDTH or vmoe_DEPTHxWIDTH, such as {scales}"
        )
    depth, width = int(match[2]), int(match[3])
    heads = SCALES.get((depth, width), max(1, width // 64))
    given = {key: value for key, value in overrides.items() if value is not None}
    return config_from_dict({"architecture": NAMES[match[1]], "depth": depth, "width": width, "heads": heads, **given})


def config_from_dict(values: dict[str, Any]) -> ViTConfig:
    """Reads a config written by ``to_dict``, checking every field.

    Raises:
        ConfigError: an unknown architecture or field, a missing or absurd value.
    """
    values = dict(values)
    architecture = values.pop("architecture", None)
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"model config: architecture {architecture!r} is none of {', '.join(ARCHITECTURES)}")
    config_class = ARCHITECTURES[architecture][0]
    types = {field.name: type(field.default) for field in dataclasses.fields(config_class)}
    for name, value in values.items():
        if name not in types:
            raise ConfigError(f"model config: {architecture} has no field {name!r}")
        if type(value) is not types[name]:
            raise ConfigError(f"model config: {name} is {value!r}, must be of type {types[name].__name__}")
        if isinstance(value, (int, float)) and value > LARGEST:
            raise ConfigError(f"model config: {name} is {value}, more than {LARGEST}")
    return config_class(**values)


def build(config: ViTConfig) -> ViT:
    """A freshly initialised model of this config."""
    return ARCHITECTURES[config.architecture][1](config)


def from_dense(dense: ViT, config: ViTConfig) -> ViT:
    """Upcycles a trained dense ViT: every expert starts as a copy of the dense block's MLP, routers at random.

    Args:
        dense: the trained dense model.
        config: shape of the Mobile V-MoE or V-MoE; its dense baseline must equal ``dense.config``.

    Raises:
        ConfigError: the shapes differ.
    """
    if config.dense != dense.config:
        raise ConfigError(f"cannot upcycle: the dense model is {dense.config}, the MoE needs {config.dense}")
    model = build(config)
    weights = model.state_dict()
    for name, tensor in dense.state_dict().items():
        # expand adds the leading expert dimension to stacked MLP weights and is the identity on all others
        weights[name].copy_(tensor.expand_as(weights[name]))
    return model


def load_checkpoint(path: str | Path) -> tuple[ViT, Header]:
    """The model of a checkpoint file, in evaluation mode, and the file's header.

    Raises:
        CheckpointError: the file cannot be read, or its weights do not fit its config.
    """
    checkpoint = checkpoints.load(path)
    return load_model(checkpoint, str(path)), checkpoint.header


def load_model(checkpoint: Checkpoint, where: str = "checkpoint") -> ViT:
    """The model of a checkpoint, in evaluation mode.

    Args:
        checkpoint: as read by :func:`mvmoe_deploy.checkpoint.load`.
        where: the file's name, for errors.

    Raises:
        CheckpointError: the config is not valid, or weights are missing, unknown or of another shape.
    """
    try:
        config = config_from_dict(checkpoint.header.model)
        # Cheap, and before the first build: a config far larger than its weights would take minutes to build.
        if config.depth > len(checkpoint.weights):
            raise ConfigError(f"depth is {config.depth}, but there are only {len(checkpoint.weights)} weights")
        return with_weights(lambda: build(config), checkpoint.weights)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def with_weights(make: Callable[[], Model], weights: dict[str, Tensor]) -> Model:
    """The model that ``make`` gives with these weights, in evaluation mode.

    Raises:
        ConfigError: weights are missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model = make()  # shapes without memory: a config cannot make us allocate what the file lacks
    check_state_dict(model, weights, "weights")
    model.load_state_dict(weights, assign=True)
    return model.eval()
