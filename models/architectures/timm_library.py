"""The library timm: how it is imported where torchvision is missing or broken, and how its models are built by name."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mvmoe_deploy.errors import ConfigError, first_line

NAME = re.compile(r"[a-z0-9_]{1,80}(\.[a-z0-9_]{1,80})?")
"""A model's name, with or without the tag of its weights. Addresses (``hf-hub:…``) and paths do not fit."""

ARGUMENT = re.compile(r"([a-z][a-z_]{0,39})=(true|false|-?[0-9]{1,9}(?:\.[0-9]{1,9})?)")
"""One argument of a model. There are no strings among the values, so that none can be a path or an address."""

LARGEST_ARGUMENT = 8192

FIXED = ("pretrained", "num_classes", "img_size", "in_chans", "features_only", "out_indices", "device", "dtype")
"""Arguments that are not a user's to set: this module sets them, or they make another kind of model."""


@functools.cache
def library() -> Any:
    """The module ``timm``, imported at first use.

    timm needs torchvision for its data pipelines, which nothing here uses. PyPI's torchvision does not import beside a
    CPU build of torch (``operator torchvision::nms does not exist``). Where torchvision is missing or broken, an empty
    stand-in takes its place while timm is imported, and no longer.

    Raises:
        ConfigError: timm is not installed, or cannot be imported.
    """
    if importlib.util.find_spec("timm") is None:
        raise ConfigError("timm is not installed: pip install 'mvmoe-deploy[backbones]'")
    try:
        with contextlib.nullcontext() if _torchvision_works() else _without_torchvision():
            return importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(f"timm cannot be imported ({first_line(error)})") from None


def _torchvision_works() -> bool:
    try:
        importlib.import_module("torchvision")
    except Exception:  # a broken build raises a RuntimeError
        return False
    return True


class _Name(type):
    """A class that has every attribute: its name, as a member of an enumeration would do in a table."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(types.ModuleType):
    """A module in which every name is a class of its own."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Name(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Finder:
    """Finds a stand-in for torchvision and for each of its modules."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """See :class:`importlib.abc.MetaPathFinder`."""
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, _Finder, is_package=True)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """See :class:`importlib.abc.Loader`."""
        return _StandIn(spec.name)

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        """See :class:`importlib.abc.Loader`."""


@contextlib.contextmanager
def _without_torchvision() -> Iterator[None]:
    def parts() -> dict[str, types.ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torchvision"}

    before = parts()  # what a failed import leaves behind
    for name in before:
        del sys.modules[name]
    sys.meta_path.insert(0, _Finder)
    try:
        yield
    finally:
        sys.meta_path.remove(_Finder)
        for name in parts():
            del sys.modules[name]
        sys.modules.update(before)


def check_name(name: str) -> None:
    """Refuses what cannot be the name of one of timm's models, without importing timm.

    Raises:
        ConfigError: the name has another form; an address on a hub or a path has.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"timm:{name[:80]}: not a model's name; models are named as timm registers them, such as "
            "timm:mobilenetv3_small_100 (no hub address, no path)"
        )


def read_arguments(text: str) -> dict[str, bool | int | float]:
    """Reads a model's arguments, such as ``depth=4,embed_dim=64``: numbers, ``true`` and ``false``.

    Raises:
        ConfigError: the text has another form, a number is too large, or the argument is not a user's to set.
    """
    arguments: dict[str, bool | int | float] = {}
    for part in text.split(",") if text else []:
        match = ARGUMENT.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"model arguments: {part.strip()[:60]!r}, expected NAME=NUMBER, NAME=true or NAME=false")
        name, value = match.groups()
        if name in FIXED or name.startswith("pretrained"):
            raise ConfigError(f"model arguments: {name} cannot be set here")
        arguments[name] = (
            (value == "true") if value in ("true", "false") else float(value) if "." in value else int(value)
        )
        if abs(arguments[name]) > LARGEST_ARGUMENT:
            raise ConfigError(f"model arguments: {name} is {value}, more than {LARGEST_ARGUMENT}")
    return arguments


def create(name: str, arguments: str, *, classes: int, image_size: int) -> nn.Module:
    """A freshly initialised model of timm's registry, for images of this size; nothing is downloaded.

    Args:
        name: the model's name, with or without the tag of its weights.
        arguments: further arguments, see :func:`read_arguments`.
        classes: number of classes C.
        image_size: side of the square images, in pixels.

    Raises:
        ConfigError: there is no such model in this release of timm, or it does not take these arguments.
    """
    given = read_arguments(arguments)
    timm = _having(name)
    own = inspect.signature(timm.create_model).parameters
    for argument in given:
        if argument in own:
            raise ConfigError(f"model arguments: {argument} cannot be set here")
    try:
        try:
            made: nn.Module = timm.create_model(name, num_classes=classes, img_size=image_size, **given)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            made = timm.create_model(name, num_classes=classes, **given)  # a convolutional network takes any size
    except Exception as error:  # timm's models raise what they like
        raise ConfigError(
            f"timm:{name}: cannot be built for images of {image_size} px"
            f"{f' with {arguments}' if arguments else ''} ({first_line(error)})"
        ) from None
    if image_size != size_of(name):  # some are published for a size of which they leave out a border
        _check_size(made, name, image_size)
    return made


def _check_size(model: nn.Module, name: str, size: int) -> None:
    """Refuses sizes that timm takes without a word, although the model has no use for part of the image or all of it.

    Raises:
        ConfigError: patches leave a border over, or all of the image lies within one place of the last features.
    """
    embedding = getattr(model, "patch_embed", None)
    patch = getattr(embedding, "patch_size", None)
    sides = patch if isinstance(patch, tuple) else ()
    padded = getattr(embedding, "dynamic_img_pad", False)
    if (side := next((side for side in sides if size % side), None)) and not padded:
        raise ConfigError(
            f"timm:{name}: cannot take images of {size} px: its patches of {side} px would leave out {size % side} px"
        )
    reductions = [stage.get("reduction", 1) for stage in getattr(model, "feature_info", ()) if isinstance(stage, dict)]
    if (place := max(reductions, default=1)) > size:
        raise ConfigError(
            f"timm:{name}: cannot take images of {size} px: one place of its last features stands for {place} px"
        )


def _having(name: str) -> Any:
    """The module ``timm``, if this is the name of a model in its registry."""
    check_name(name)
    timm = library()
    if not timm.is_model(name):
        raise ConfigError(f"timm:{name}: timm {timm.__version__} has no such model{_similar(name, timm.list_models())}")
    return timm


def _similar(name: str, known: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name.partition(".")[0], known, n=3, cutoff=0.6)
    return f"; similar: {', '.join(close)}" if close else ""


def size_of(name: str) -> int:
    """Side of the images for which timm publishes weights under this name, in pixels."""
    return int(getattr(_having(name).get_pretrained_cfg(name), "input_size", (3, 224, 224))[1])


def preprocessing_of(name: str) -> dict[str, Any]:
    """How timm prepares images for the weights that it publishes under this name: crop, interpolation, mean and std."""
    config = _having(name).get_pretrained_cfg(name)
    interpolation = getattr(config, "interpolation", "bicubic")
    return {
        "crop": float(getattr(config, "crop_pct", 1.0) or 1.0),
        "interpolation": interpolation if interpolation in ("bilinear", "bicubic") else "bicubic",
        "mean": tuple(getattr(config, "mean", (0.485, 0.456, 0.406))),
        "std": tuple(getattr(config, "std", (0.229, 0.224, 0.225))),
    }


def imagenet_ids() -> list[str]:
    """WordNet ids of ImageNet's 1,000 classes, in the order of published classifiers."""
    library()
    found: list[str] = importlib.import_module("timm.data").ImageNetInfo().label_names()
    return found


def classifiers_of(name: str) -> tuple[str, ...]:
    """Names of the layers that give a model's logits; a distilled model has two."""
    found = getattr(_having(name).get_pretrained_cfg(name), "classifier", None) or ()
    return (found,) if isinstance(found, str) else tuple(found)


def classes_of(name: str, weights: Mapping[str, torch.Tensor], where: str) -> int:
    """Number of classes that weights of a model are for.

    Raises:
        ConfigError: the weights have no such classifier.
    """
    for classifier in classifiers_of(name):
        if (weight := weights.get(f"{classifier}.weight")) is not None and weight.ndim > 1:
            return len(weight)
    wanted = " or ".join(classifiers_of(name))
    raise ConfigError(f"{where}: holds no classifier of timm:{name} ({wanted}), so its number of classes is not known")


def merge_branches(root: nn.Module, skip: Callable[[str], bool] = lambda name: False, name: str = "") -> None:
    """Turns blocks that have parallel branches for training only (MobileOne, RepVGG, FastViT) into single layers.

    Args:
        root: the module whose blocks change.
        skip: whether a module, by its name within the outermost one, is to stay; the modules within it may change.
        name: the root's own name there.
    """
    for child, module in list(root.named_children()):
        inner = f"{name}.{child}" if name else child
        if skip(inner):
            merge_branches(module, skip, inner)
        else:
            holder = nn.Sequential(module)
            library().utils.reparameterize_model(holder, inplace=True)
            setattr(root, child, holder[0])


def converted(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the names and in the shapes of today's release, as timm itself converts what it published earlier.

    Raises:
        ConfigError: timm cannot convert them; they are probably those of another model.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return weights
    try:
        return dict(convert(dict(weights), model))
    except Exception as error:  # written for weights of this very model
        raise ConfigError(f"the weights are not those of a {type(model).__name__} ({first_line(error)})") from None
