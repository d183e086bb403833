"""The models: registered architectures, and how a model is built from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.checkpoint import Checkpoint, Header
from mvmoe_deploy.errors import CheckpointError, ConfigError, DataError, first_line
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models.architectures.backbone import Backbone, BackboneConfig, RoutedBackbone, RoutedBackboneConfig
from mvmoe_deploy.models.architectures.mobile_vmoe import MobileVMoE, MobileVMoEConfig
from mvmoe_deploy.models.architectures.resnet import ResNet, ResNetConfig
from mvmoe_deploy.models.architectures.vit import SCALES, ViT, ViTConfig, load_timm_state_dict
from mvmoe_deploy.models.architectures.vmoe import VMoE, VMoEConfig
from mvmoe_deploy.models.foreign import read_weights
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
    "foreign_model",
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
        made_with = checkpoint.header.training.get("library")
        release = f"; it was made with {made_with[:60]}" if isinstance(made_with, str) else ""
        raise CheckpointError(f"{where}: {error}{release}") from None


def foreign_model(
    name: str, weights: Path, image_size: int | None = None, classes: Path | None = None
) -> tuple[Model, Header]:
    """A dense model with weights that another program saved, and a header that describes it.

    Args:
        name: the model's name, such as ``timm:mobilenetv3_small_100`` or ``vit_12x192``.
        weights: a ``.pt`` or ``.safetensors`` file with the weights.
        image_size: side of its images, in pixels; by default that which the weights are published for.
        classes: a file with the id and the name of each class on a line of its own, in the order of the logits; without
            it, classes are called by their numbers.

    Raises:
        ConfigError: there is no such model, or the weights are another's.
        CheckpointError: the weights cannot be read.
        DataError: the file of classes cannot be read, or names another number of classes.
    """
    tensors, _ = read_weights(weights)
    config = config_from_name(name)
    count = config.classes_of(tensors, str(weights))
    config = dataclasses.replace(config, classes=count, image_size=image_size or config.published_size())
    model = build(config)
    if fresh := model.load_foreign(tensors, str(weights)):
        raise ConfigError(f"{weights}: its classifiers are of different numbers of classes ({', '.join(fresh)})")
    ids, names = read_classes(classes, count) if classes else ([str(index) for index in range(count)],) * 2
    preprocessing = Preprocessing(size=config.image_size, **config.preparation())
    notes = {"weights": weights.name, **({"library": model.library} if model.library else {})}
    return model.eval(), checkpoints.new_header(config.to_dict(), ids, names, preprocessing, training=notes)


def read_classes(path: Path, count: int) -> tuple[list[str], list[str]]:
    """Ids and names of classes from a file with an id and a name, separated by a tab, on each line.

    Raises:
        DataError: the file cannot be read, or holds another number of classes.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from None
    if len(lines) != count:
        raise DataError(f"{path}: names {len(lines)} classes, the weights are for {count}")
    parts = [line.split("\t") for line in lines]
    return [part[0] for part in parts], [part[-1] for part in parts]


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
