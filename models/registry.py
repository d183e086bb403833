"""Architectures by name: each one's name in checkpoints, its names for ``--model``, its config and its model.

An architecture is one entry, made by :func:`register` in the architecture's own file. Nothing else in this project
knows which architectures there are. Packages outside it announce theirs as entry points of the group
:data:`GROUP`; a checkpoint can name an architecture, but never cause one to be imported.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.plugins import announced

if TYPE_CHECKING:
    from mvmoe_deploy.models.model import Model

GROUP = "mvmoe_deploy.architectures"
"""Entry points of this group name an :class:`Architecture`, such as ``my_package.my_model:ARCHITECTURE``."""

LARGEST = 65536
"""Largest value of any field of a model config, so that a stranger's config cannot ask for unlimited memory."""


def shape(default: Any, text: str = "", *, flag: str = "", choices: Sequence[str] = ()) -> Any:
    """Declares a field of a config that ``mvmoe-train`` offers as an option.

    Args:
        default: the field's default, whose type is the field's.
        text: the option's help; without it there is no option.
        flag: the option's name; by default ``--`` and the field's name with hyphens.
        choices: the allowed values, if they can be listed.
    """
    return dataclasses.field(default=default, metadata={"help": text, "flag": flag, "choices": tuple(choices)})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The base class of all model configs. An architecture's config is a sub-class with defaults for all its fields.

    A figure that an architecture does not know about itself is None, never 0.

    Attributes:
        architecture: the architecture's name in checkpoints.
        routes: what the model's routers send to experts; None for a dense model.
        image_size: side of the square input image, in pixels.
        classes: number of output classes C.
    """

    architecture: ClassVar[str] = ""
    routes: ClassVar[Literal["images", "tokens"] | None] = None

    image_size: int = 224
    classes: int = 1000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ConfigError(f"model config: {field.name} is {value}, must be at least 1")

    @property
    def experts(self) -> int:
        """Number of experts E; 0 for a dense model."""
        return 0

    @property
    def k(self) -> int:
        """Experts used per image, or per token; 0 for a dense model."""
        return 0

    @property
    def capacity_factor(self) -> float | None:
        """Number of places in all experts together per choice of a token; None if places are not bounded."""
        return None

    @property
    def dense(self) -> ModelConfig | None:
        """The dense baseline of a routed model: the same model without experts."""
        return None

    @property
    def wide(self) -> ModelConfig | None:
        """The dense model whose MLPs are as wide as all experts of this routed model together."""
        return None

    @property
    def token_routed(self) -> ModelConfig | None:
        """A model of the shape of this per-image-routed one that routes tokens instead of images."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values, with its ``architecture``; :func:`config_from_dict` reads it back."""
        return {"architecture": self.architecture, **dataclasses.asdict(self)}

    def preparation(self) -> dict[str, Any]:
        """How the model's published weights expect images: fields of ``Preprocessing`` other than the size."""
        return {}

    def published_size(self) -> int:
        """Side of the images that the model's published weights are for, in pixels."""
        return self.image_size

    def classes_of(self, weights: Mapping[str, Tensor], where: str) -> int:
        """Number of classes that weights of this model, as another program saved them, are for.

        Args:
            weights: tensors by name.
            where: what the error calls their origin.

        Raises:
            ConfigError: the weights do not say, or models of this architecture take none of other programs.
        """
        raise ConfigError(f"{where}: a {self.architecture} takes no weights of other programs")

    def fewest_weights(self) -> int:
        """A lower bound, found without building anything, of how many weights (tensors) a checkpoint must hold."""
        return 1

    def flops(self) -> int | None:
        """FLOPs of one image through the whole model (:mod:`mvmoe_deploy.models.flops` has the convention)."""
        return None

    def macs(self) -> int | None:
        """Multiply-accumulates of the matrix products alone for one image, as counters of MACs report them."""
        return None

    def piece_flops(self, role: str) -> int | None:
        """FLOPs of one piece (a bundle's ``role``) for one image."""
        return self.flops() if role == "model" else None

    def parameters(self) -> int | None:
        """Number of weights (scalars) of the whole model."""
        return None

    def active_parameters(self) -> int | None:
        """Number of weights used for one image: all except those of the experts that were not chosen."""
        return None if self.experts else self.parameters()

    def expert_parameters(self) -> int | None:
        """Number of weights of one expert in one MoE layer."""
        return None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One entry of the registry.

    Attributes:
        config: the config's class, which holds the architecture's name in checkpoints.
        model: builds a freshly initialised model from a config.
        form: how ``--model`` names a shape, such as ``mvmoe_DEPTHxWIDTH``; a word in capitals stands for the value of
            the config's field of that name, an integer or (without spaces) a string. Empty if no name selects this
            architecture.
        examples: names of that form, for help and errors.
        derived: computes further fields from those in the name; a field that is given takes precedence.
    """

    config: type[ModelConfig]
    model: Callable[[Any], Model]
    form: str = ""
    examples: tuple[str, ...] = ()
    derived: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: {}

    @property
    def name(self) -> str:
        """The architecture's name in checkpoints."""
        return self.config.architecture

    @property
    def fields(self) -> dict[str, dataclasses.Field[Any]]:
        """The config's fields by name."""
        return {field.name: field for field in dataclasses.fields(self.config)}

    def read(self, name: str) -> dict[str, int | str] | None:
        """The fields that a name of this architecture's form gives; None for another name."""

        def value(word: re.Match[str]) -> str:
            field = word[0].lower()
            return rf"(?P<{field}>\S*)" if self._is_text(field) else rf"(?P<{field}>\d{{1,5}})"

        match = re.fullmatch(re.sub(r"[A-Z]+", value, self.form), name) if self.form else None
        if match is None:
            return None
        return {field: text if self._is_text(field) else int(text) for field, text in match.groupdict().items()}

    def _is_text(self, field: str) -> bool:
        return isinstance(self.fields[field].default, str)


_REGISTERED: dict[str, Architecture] = {}


def register(architecture: Architecture) -> None:
    """Adds an architecture.

    Raises:
        ConfigError: another one has that name.
    """
    known = _REGISTERED.get(architecture.name)
    if known is not None and known.config is not architecture.config:
        raise ConfigError(f"architecture {architecture.name!r} is registered already, by {known.config.__module__}")
    _REGISTERED[architecture.name] = architecture


def architectures() -> dict[str, Architecture]:
    """All architectures by name, including those of installed packages.

    Raises:
        ConfigError: an installed package announces something that cannot be imported or is not an architecture.
    """
    _register_installed()
    return dict(_REGISTERED)


@functools.cache
def _register_installed() -> None:
    for architecture in announced(GROUP, Architecture):
        register(architecture)


def by_name(name: str, wanted: Iterable[str] = ()) -> tuple[Architecture, dict[str, int | str]]:
    """The architecture that a model's name selects, and the fields that the name gives.

    Args:
        name: a name that fits one of the registered forms.
        wanted: fields that are to be set. Among several architectures of the same form, the first that has all of them
            is selected: a dense model and its routed one may share their names.

    Raises:
        ConfigError: the name fits the form of no architecture.
    """
    named = [each for each in architectures().values() if each.form]
    fitting = [(each, given) for each in named if (given := each.read(name)) is not None]
    if fitting:
        wanted = set(wanted)
        return next((pair for pair in fitting if wanted <= pair[0].fields.keys()), fitting[0])
    forms = ", ".join(dict.fromkeys(each.form for each in named))
    examples = ", ".join(dict.fromkeys(example for each in named for example in each.examples))
    raise ConfigError(f"unknown model {name!r}: expected one of the forms {forms}, such as {examples}")


def config_from_name(name: str, /, **overrides: Any) -> ModelConfig:
    """The config of a shape by name, such as ``vit_12x192`` or ``mvmoe_12x192`` (depth × width).

    Args:
        name: a name that fits one of the registered forms.
        **overrides: values for fields of the config; None keeps the default.

    Raises:
        ConfigError: the name fits no known form, or a field's value is not valid.
    """
    chosen = {key: value for key, value in overrides.items() if value is not None}
    architecture, given = by_name(name, chosen)
    return config_from_dict({"architecture": architecture.name, **given, **architecture.derived(given), **chosen})


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Reads a config written by ``to_dict``, checking every field.

    Raises:
        ConfigError: the architecture or a field is unknown, or a value is missing or absurd.
    """
    values = dict(values)
    name = values.pop("architecture", None)
    known = architectures()
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"model config: architecture {name!r} is none of {', '.join(known)}")
    fields = known[name].fields
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"model config: {name} has no field {key!r}")
        if type(value) is not type(fields[key].default):
            raise ConfigError(f"model config: {key} is {value!r}, must be of type {type(fields[key].default).__name__}")
        if isinstance(value, (int, float)) and value > LARGEST:
            raise ConfigError(f"model config: {key} is {value}, more than {LARGEST}")
    return known[name].config(**values)


def build(config: ModelConfig) -> Model:
    """A freshly initialised model of this config."""
    return architectures()[config.architecture].model(config)


def check_memory(what: str, needed: int) -> None:
    """Refuses what does not fit into this machine's memory, before it is built.

    Args:
        what: what needs the memory, for the error.
        needed: bytes.

    Raises:
        ConfigError: it does not fit.
    """
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not known on this system
        return
    if needed > there:
        raise ConfigError(f"{what}: the weights take {needed / 1e9:.1f} GB, this machine has {there / 1e9:.1f} GB")


def from_dense(dense: Model, config: ModelConfig) -> Model:
    """Upcycles a trained dense model: every expert starts as a copy of the dense MLP, and routers start at random.

    Args:
        dense: the trained dense model.
        config: shape of the routed model; its dense baseline must equal ``dense.config``.

    Raises:
        ConfigError: the shapes differ, or models of this architecture cannot start from dense ones.
    """
    if config.dense is None or config.dense != dense.config:
        raise ConfigError(f"cannot upcycle: the dense model is {dense.config}, the MoE needs {config.dense}")
    model = build(config)
    with torch.no_grad():
        model.load_dense(dense)
    return model
