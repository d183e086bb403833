"""The models: registered architectures, and how a model is built from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.checkpoint import Checkpoint, Header
from mvmoe_deploy.errors import CheckpointError, ConfigError
from mvmoe_deploy.models.architectures.backbone import Backbone, BackboneConfig, RoutedBackbone, RoutedBackboneConfig
from mvmoe_deploy.models.architectures.mobile_vmoe import MobileVMoE, MobileVMoEConfig
from mvmoe_deploy.models.architectures.resnet import ResNet, ResNetConfig
from mvmoe_deploy.models.architectures.vit import SCALES, ViT, ViTConfig, load_timm_state_dict
from mvmoe_deploy.models.architectures.vmoe import VMoE, VMoEConfig
from mvmoe_deploy.models.model import Model, check_state_dict
from mvmoe_deploy.models.registry import ModelConfig, build, config_from_dict, config_from_name, from_dense

__all__ = [
    "SCALES",
    "Backbone",
    "BackboneConfig",
    "MobileVMoE",
    "MobileVMoEConfig",
    "Model",
    "ModelConfig",
    "ResNet",
    "ResNetConfig",
    "RoutedBackbone",
    "RoutedBackboneConfig",
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

AnyModule = TypeVar("AnyModule", bound=nn.Module)

ZOO = Path(__file__).parent / "zoo"
"""Folder of the trained checkpoints and their cards."""


def load_checkpoint(path: str | Path) -> tuple[Model, Header]:
    """The model of a checkpoint file, in evaluation mode, and the file's header.

    Raises:
        CheckpointError: the file cannot be read, or its weights do not fit its config.
    """
    checkpoint = checkpoints.load(path)
    return load_model(checkpoint, str(path)), checkpoint.header


def load_model(checkpoint: Checkpoint, where: str = "checkpoint") -> Model:
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
        if (fewest := config.fewest_weights()) > len(checkpoint.weights):
            raise ConfigError(
                f"the config needs at least {fewest} weights, but there are only {len(checkpoint.weights)}"
            )
        return with_weights(lambda: build(config), checkpoint.weights)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def with_weights(make: Callable[[], AnyModule], weights: dict[str, Tensor]) -> AnyModule:
    """Builds a model with ``make`` and gives it these weights, in evaluation mode.

    Raises:
        ConfigError: weights are missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model = make()  # shapes without memory: a config cannot ask for memory that the file does not fill
    check_state_dict(model, weights, "weights")
    if any(buffer.is_meta for name, buffer in model.named_buffers() if name not in weights):
        model = make()  # tables that are computed, not stored: only now that the weights fit the config
        model.load_state_dict(weights)
    else:
        model.load_state_dict(weights, assign=True)
    return model.eval()
