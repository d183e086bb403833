"""Architectures by name: what a checkpoint calls them, how ``--model`` names their shapes, their config and model.

An architecture is one entry, made by :func:`register` in the architecture's own file. Nothing else in this project
knows which architectures there are. Packages outside it announce theirs as entry points of the group
:data:`GROUP`; a checkpoint can name an architecture, but never cause one to be imported.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from mvmoe_deploy.errors import ConfigError, first_line

if TYPE_CHECKING:
    from mvmoe_deploy.models.model import Model

GROUP = "mvmoe_deploy.architectures"
"""Entry points of this group name an :class:`Architecture`, such as ``my_package.my_model:ARCHITECTURE``."""

LARGEST = 65536
"""No value of a model config may exceed this: a config from a stranger must not make us allocate without end."""


def shape(default: Any, text: str = "", *, flag: str = "", choices: Sequence[str] = ()) -> Any:
    """A config's field that ``mvmoe-train`` offers as an option.

    Args:
        default: the field's default, whose type is the field's.
        text: the option's help.
        flag: the option; by default ``--`` and the field's name with hyphens.
        choices: the values that there are, where they can be listed.
    """
    return dataclasses.field(default=default, metadata={"help": text, "flag": flag, "choices": tuple(choices)})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What every model config has; an architecture's is a sub-class with defaults for all its fields.

    What an architecture does not know of itself is None, never 0.

    Attributes:
        architecture: the name in checkpoints.
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
        """Places of all experts for each choice of a token; None where places are not bounded."""
        return None

    @property
    def dense(self) -> ModelConfig | None:
        """The dense baseline of a routed model: the same without experts."""
        return None

    @property
    def wide(self) -> ModelConfig | None:
        """The dense model that is as large as all experts of a routed one together."""
        return None

    @property
    def token_routed(self) -> ModelConfig | None:
        """The model of a per-image-routed one's shape that routes tokens instead."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values, with its ``architecture``; :func:`config_from_dict` reads it back."""
        return {"architecture": self.architecture, **dataclasses.asdict(self)}

    def fewest_weights(self) -> int:
        """A lower bound, found without building anything, of how many weights (tensors) a checkpoint must hold."""
        return 1

    def flops(self) -> int | None:
        """FLOPs of one image through the whole model (:mod:`mvmoe_deploy.models.flops` has the convention)."""
        return None

    def macs(self) -> int | None:
        """Multiply-accumulates of its matrix products alone, as counters that report MACs give them."""
        return None

    def piece_flops(self, role: str) -> int | None:
        """FLOPs of one piece (a bundle's ``role``) for one image."""
        return self.flops() if role == "model" else None

    def parameters(self) -> int | None:
        """Weights of the whole model."""
        return None

    def active_parameters(self) -> int | None:
        """Weights used for one image: all but those of the experts not chosen."""
        return None if self.experts else self.parameters()

    def expert_parameters(self) -> int | None:
        """Weights of one expert in one MoE layer."""
        return None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One entry of the registry.

    Attributes:
        config: the config's class, which holds the name in checkpoints.
        model: builds a freshly initialised model of a config.
        form: how ``--model`` names a shape, such as ``mvmoe_DEPTHxWIDTH``; a capital word stands for the whole number
            of the config's field of that name. Empty where no name makes one.
        examples: names of that form, for help and errors.
        derived: further fields that follow from those in the name, unless they are given.
    """

    config: type[ModelConfig]
    model: Callable[[Any], Model]
    form: str = ""
    examples: tuple[str, ...] = ()
    derived: Callable[[dict[str, int]], dict[str, Any]] = lambda given: {}

    @property
    def name(self) -> str:
        """The name in checkpoints."""
        return self.config.architecture

    @property
    def fields(self) -> dict[str, dataclasses.Field[Any]]:
        """The config's fields by name."""
        return {field.name: field for field in dataclasses.fields(self.config)}

    def read(self, name: str) -> dict[str, int] | None:
        """The fields that a name of this architecture's form gives; None for another name."""
        pattern = re.sub(r"[A-Z]+", lambda word: rf"(?P<{word[0].lower()}>\d{{1,5}})", self.form)
        match = re.fullmatch(pattern, name) if self.form else None
        return None if match is None else {field: int(value) for field, value in match.groupdict().items()}


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
    """All of them by name, those of installed packages included.

    Raises:
        ConfigError: an installed package announces what cannot be imported, or is not an architecture.
    """
    _register_installed()
    return dict(_REGISTERED)


@functools.cache
def _register_installed() -> None:
    for entry in entry_points(group=GROUP):
        try:
            architecture = entry.load()
        except Exception as error:
            raise ConfigError(f"entry point {entry.value}: cannot be imported ({first_line(error)})") from None
        if not isinstance(architecture, Architecture):
            raise ConfigError(f"entry point {entry.value}: is a {type(architecture).__name__}, not an Architecture")
        register(architecture)


def by_name(name: str) -> tuple[Architecture, dict[str, int]]:
    """The architecture that a model's name is of, and the fields that the name gives.

    Raises:
        ConfigError: the name has no architecture's form.
    """
    named = [each for each in architectures().values() if each.form]
    for architecture in named:
        if (given := architecture.read(name)) is not None:
            return architecture, given
    forms = ", ".join(each.form for each in named)
    examples = ", ".join(example for each in named for example in each.examples)
    raise ConfigError(f"unknown model {name!r}: expected one of the forms {forms}, such as {examples}")


def config_from_name(name: str, **overrides: Any) -> ModelConfig:
    """The config of a shape by name, such as ``vit_12x192`` or ``mvmoe_12x192`` (depth × width).

    Args:
        name: of one of the registered forms.
        **overrides: any field of the config; None keeps the default.

    Raises:
        ConfigError: the name is of no known form, or a field does not fit.
    """
    architecture, given = by_name(name)
    chosen = {key: value for key, value in overrides.items() if value is not None}
    return config_from_dict({"architecture": architecture.name, **given, **architecture.derived(given), **chosen})


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Reads a config written by ``to_dict``, checking every field.

    Raises:
        ConfigError: an unknown architecture or field, a missing or absurd value.
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


def from_dense(dense: Model, config: ModelConfig) -> Model:
    """Upcycles a trained dense model: every expert starts as a copy of the dense layer, routers at random.

    Args:
        dense: the trained dense model.
        config: shape of the routed model; its dense baseline must equal ``dense.config``.

    Raises:
        ConfigError: the shapes differ, or models of this architecture do not start from dense ones.
    """
    if config.dense is None or config.dense != dense.config:
        raise ConfigError(f"cannot upcycle: the dense model is {dense.config}, the MoE needs {config.dense}")
    model = build(config)
    with torch.no_grad():
        model.load_dense(dense)
    return model
