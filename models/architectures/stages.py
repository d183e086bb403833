"""timm's models as stages that run one after the other: stem, units, head.

timm's models share no interface for that. Each family of models has one entry in :data:`FAMILIES`, which says what
comes before the stages and what after. Whether an entry is right for a model, the model itself decides:
:class:`mvmoe_deploy.models.architectures.backbone.RoutedBackbone` compares the composition with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mvmoe_deploy.errors import ConfigError

Run = Callable[[Any, Tensor], Tensor]
"""Runs part of a timm model: the model, with that part's modules alone, and the part's input → the part's output."""

Wrap = Callable[[nn.Module, Tensor | None], nn.Module]
"""Wraps a unit so that it takes features alone: the unit, and the constant of :class:`Stages` → the module."""


@dataclass(frozen=True)
class Family:
    """How the models of one of timm's classes are divided.

    Attributes:
        stages: names of the modules whose children, in order, are the stages; or of the stages themselves.
        before: names of the modules and parameters that the stem uses.
        stem: images → features.
        after: names of the modules that the head uses.
        head: features → logits.
        constant: a table that every unit takes besides the features, such as rotary positions.
    """

    stages: tuple[str, ...]
    before: tuple[str, ...]
    stem: Run
    after: tuple[str, ...]
    head: Run
    constant: Callable[[Any], Tensor | None] = lambda model: None


def _embedded(model: Any, images: Tensor) -> Tensor:
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))  # type: ignore[no-any-return]


def _positions(model: Any) -> Tensor | None:
    if model.rope is None:
        return None
    sizes = {"shape": model.patch_embed.grid_size} if model.dynamic_img_size else {}
    return model.rope.get_embed(**sizes)  # type: ignore[no-any-return]


EMBEDDING = ("patch_embed", "cls_token", "reg_token", "dist_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre")
POOLING = ("norm", "fc_norm", "attn_pool", "head_drop", "head", "head_dist")

_STAGED = Family(
    stages=("stages",),
    before=("stem",),
    stem=lambda model, images: model.stem(images),
    after=("final_conv", "head"),
    head=lambda model, x: model.forward_head(model.final_conv(x)),
)
_TRANSFORMER = Family(
    stages=("blocks",),
    before=EMBEDDING,
    stem=_embedded,
    after=POOLING,
    head=lambda model, x: model.forward_head(model.norm(x)),
)

FAMILIES: Mapping[str, Family] = {
    "MobileNetV3": Family(
        stages=("blocks",),
        before=("conv_stem", "bn1"),
        stem=lambda model, images: model.bn1(model.conv_stem(images)),
        after=("global_pool", "conv_head", "norm_head", "act2", "flatten", "classifier"),
        head=lambda model, x: model.forward_head(x),
    ),
    "EfficientNet": Family(
        stages=("blocks",),
        before=("conv_stem", "bn1"),
        stem=lambda model, images: model.bn1(model.conv_stem(images)),
        after=("conv_head", "bn2", "global_pool", "classifier"),
        head=lambda model, x: model.forward_head(model.bn2(model.conv_head(x))),
    ),
    "ByobNet": _STAGED,  # MobileOne, RepVGG, MobileViT
    "FastVit": _STAGED,
    "RegNet": _STAGED,
    "ConvNeXt": Family(
        stages=("stages",),
        before=("stem",),
        stem=_STAGED.stem,
        after=("norm_pre", "head"),
        head=lambda model, x: model.forward_head(model.norm_pre(x)),
    ),
    "EfficientFormerV2": Family(
        stages=("stages",), before=("stem",), stem=_STAGED.stem, after=POOLING, head=_TRANSFORMER.head
    ),
    "TinyVit": Family(
        stages=("stages",),
        before=("patch_embed",),
        stem=lambda model, images: model.patch_embed(images),
        after=("head",),
        head=lambda model, x: model.forward_head(x),
    ),
    "ResNet": Family(
        stages=("layer1", "layer2", "layer3", "layer4"),
        before=("conv1", "bn1", "act1", "maxpool"),
        stem=lambda model, images: model.maxpool(model.act1(model.bn1(model.conv1(images)))),
        after=("global_pool", "fc"),
        head=lambda model, x: model.forward_head(x),
    ),
    "VisionTransformer": _TRANSFORMER,
    "VisionTransformerDistilled": _TRANSFORMER,
    "Eva": Family(  # DINOv3 too
        stages=("blocks",),
        before=(*EMBEDDING, "rope"),
        stem=lambda model, images: model.norm_pre(model._pos_embed(model.patch_embed(images))[0]),
        after=POOLING,
        head=_TRANSFORMER.head,
        constant=_positions,
    ),
}
"""By the name of the model's class in timm."""

CHAINS = ("ConvNeXtStage", "EfficientFormerV2Stage", "FastVitStage", "RegStage")
"""Classes whose modules run one after the other, although they are no ``nn.Sequential``."""


class Part(nn.Module):
    """Part of a timm model as a module of its own; it shares its parameters with the model.

    Args:
        model: the model.
        names: the modules and parameters that the part uses.
        run: the part's computation.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], run: Run) -> None:
        super().__init__()
        shell = copy.copy(model)
        for kind in ("_modules", "_parameters", "_buffers"):
            held = getattr(model, kind)
            shell.__dict__[kind] = {name: held[name] for name in names if name in held}
        self.model, self.run = shell, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.model, x)


class WithConstant(nn.Module):
    """A transformer block that takes rotary positions besides the tokens."""

    def __init__(self, block: nn.Module, constant: Tensor) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("rope", constant)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x, rope=self.rope)
        return result


class ChannelsLast(nn.Module):
    """A block that takes ``[B, H, W, C]``, for features ``[B, C, H, W]``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return result


def _plain(block: nn.Module, constant: Tensor | None) -> nn.Module:
    return block if constant is None else WithConstant(block, constant)


def _channels_last(block: nn.Module, constant: Tensor | None) -> nn.Module:
    return ChannelsLast(block)


@dataclass(frozen=True)
class Unit:
    """The smallest part at which a model can be cut: a block, or a layer between blocks.

    Attributes:
        name: the module's name in the timm model, such as ``blocks.4.0``.
        stage: the name of its stage, such as ``blocks.4``.
        wrap: makes it a module that takes features alone.
    """

    name: str
    stage: str
    wrap: Wrap


@dataclass(frozen=True)
class Stages:
    """A model's units in order, and what surrounds them.

    Attributes:
        family: what comes before and after.
        units: the units.
        constant: a table that every unit takes besides the features; None for most models.
    """

    family: Family
    units: list[Unit]
    constant: Tensor | None


def stages_of(model: nn.Module, name: str) -> Stages:
    """Divides a timm model into its stages.

    Args:
        model: the model.
        name: its name, for errors.

    Raises:
        ConfigError: the model is of a family that is not known.
    """
    kind = type(model).__name__
    if kind not in FAMILIES:
        raise ConfigError(f"timm:{name}: a {kind}, whose stages are not known; known are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    stages = [stage for part in family.stages for stage in _stages(part, model.get_submodule(part), len(family.stages))]
    units = [Unit(unit, stage, wrap) for stage in stages for unit, wrap in _units(stage, model.get_submodule(stage))]
    return Stages(family, units, family.constant(model))


def _stages(name: str, module: nn.Module, parts: int) -> list[str]:
    """Names of the stages: the module itself if it is one of several, otherwise the modules in it."""
    return [name] if parts > 1 else [f"{name}.{child}" for child, _ in module.named_children()]


def _units(name: str, module: nn.Module, wrap: Wrap = _plain) -> Iterator[tuple[str, Wrap]]:
    kind = type(module).__name__
    if kind == "TinyVitStage":  # its blocks take [B, H, W, C], all else [B, C, H, W]
        yield from _units(f"{name}.downsample", module.get_submodule("downsample"))
        yield from _units(f"{name}.blocks", module.get_submodule("blocks"), _channels_last)
    elif name.endswith(".downsample"):  # often a norm and a convolution, of which neither is a block
        yield name, wrap
    elif kind in CHAINS or type(module).forward is nn.Sequential.forward:
        for child, part in module.named_children():
            yield from _units(f"{name}.{child}", part, wrap)
    elif not isinstance(module, nn.Identity):
        yield name, wrap


def replaced(module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A module in which some parts are others. All else is shared with it, and the module itself does not change.

    Args:
        module: the module.
        parts: the new parts by their names within the module; the empty name stands for the module itself.
    """
    if "" in parts:
        return parts[""]
    inner: dict[str, dict[str, nn.Module]] = {}
    for name, part in parts.items():
        first, _, rest = name.partition(".")
        inner.setdefault(first, {})[rest] = part
    result = copy.copy(module)
    result.__dict__["_modules"] = {
        name: replaced(child, inner[name]) if child is not None and name in inner else child
        for name, child in module._modules.items()
    }
    return result


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's weights."""
    tensors: list[torch.Tensor] = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
