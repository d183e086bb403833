"""Any model of timm as a routed one: a trunk, a router on its pooled features, a tail per expert, and one head.

The model is cut between two of its units (blocks). What follows the cut is a tail: either every expert has copies of
all units there, or the experts share them except for the sub-modules that a pattern names. The head is always shared.

**Where the gate is.** As everywhere in this project, the gate multiplies what an expert adds:

- Sub-modules with layers inside, such as a transformer's MLPs: their output, as in Mobile V-MoE.
- Single layers, such as pointwise convolutions, or whole units: what the unit that holds them adds to its input, so
  ``y = x + gate · (unit(x) − x)``. For a residual block, this is the gate times its residual branch.
- A unit that changes the shape of the features has nothing to add to, and its output is not multiplied: the gates of
  several such units would only shrink the features. If a tail has no other units, the gate multiplies what the head
  takes; without a gate, a router would not learn from the class loss.

**BatchNorm.** Layers that the experts share see all images of a batch, also in a tail. A BatchNorm that belongs to an
expert sees that expert's images alone, and so do its running statistics. With a single image in a batch, it uses the
running statistics in training too, because the variance over one image says little. An expert without images in a
batch does not change.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from mvmoe_deploy.errors import ConfigError, first_line
from mvmoe_deploy.models.architectures import timm_library
from mvmoe_deploy.models.architectures.routing import choose
from mvmoe_deploy.models.architectures.stages import Part, Unit, bytes_of, replaced, stages_of
from mvmoe_deploy.models.architectures.tails import Dispatch, Gated, Mixed, Route, Selected, Tail
from mvmoe_deploy.models.counting import Work, count
from mvmoe_deploy.models.model import ImageRouted, Model, set_training
from mvmoe_deploy.models.registry import Architecture, ModelConfig, build, check_memory, register, shape

STAGES = "stages"
POINTWISE = "pointwise"

QUANTIFIERS = 3
"""Most repetitions in a pattern: a stranger's checkpoint may hold any, and many repetitions would search for years."""

EXAMPLES = 2

TOLERANCE = 1e-4
"""Largest difference between the composition and the model, in units of the logits' spread. Rounding gives 1e-6."""


@dataclass(frozen=True)
class BackboneConfig(ModelConfig):
    """A dense model of timm.

    Attributes:
        name: timm's name of the model.
        arguments: numbers and truth values that timm's model takes, such as ``depth=4,embed_dim=64``.
    """

    architecture: ClassVar[str] = "timm"

    name: str = ""
    arguments: str = shape("", "further arguments of the model, such as depth=4,embed_dim=64", flag="--model-arguments")

    def __post_init__(self) -> None:
        super().__post_init__()
        timm_library.check_name(self.name)
        timm_library.read_arguments(self.arguments)

    @property
    def dense(self) -> BackboneConfig:
        """The same model without experts."""
        return BackboneConfig(**_values(self, BackboneConfig))

    def create(self) -> nn.Module:
        """The timm model, freshly initialised.

        Raises:
            ConfigError: this release of timm does not have it, it does not take these arguments or this size, or it
                needs more memory than there is.
        """

        def made() -> nn.Module:
            return timm_library.create(self.name, self.arguments, classes=self.classes, image_size=self.image_size)

        if torch.get_default_device().type != "meta":
            with torch.device("meta"):
                check_memory(f"timm:{self.name}", bytes_of(made()))
        return made()

    def preparation(self) -> dict[str, Any]:
        return timm_library.preprocessing_of(self.name)

    def published_size(self) -> int:
        return timm_library.size_of(self.name)

    def classes_of(self, weights: Mapping[str, Tensor], where: str) -> int:
        return timm_library.classes_of(self.name, weights, where)

    def parameters(self) -> int | None:
        found = _parameters(self)
        return None if found is None else found[0]

    def flops(self) -> int | None:
        work = _work(self)
        return None if work is None else sum(each.flops for each in work.values())

    def macs(self) -> int | None:
        work = _work(self)
        return None if work is None else sum(each.macs for each in work.values())

    def piece_flops(self, role: str) -> int | None:
        work = _work(self)
        return work[role].flops if work and role in work else None


@dataclass(frozen=True)
class RoutedBackboneConfig(BackboneConfig):
    """A model of timm that routes each image to one of E experts.

    Attributes:
        experts: number of experts E.
        cut: the first unit of the tails, or a stage that begins with it; by default the last stage.
        own: what every expert has for itself: ``stages`` (all units of the tail), ``pointwise`` (its 1 × 1
            convolutions) or a regular expression that is searched for in the names of the tail's sub-modules, such as
            ``mlp``.
    """

    architecture: ClassVar[str] = "timm_routed"
    routes: ClassVar[Literal["images", "tokens"] | None] = "images"

    experts: int = shape(10, "number of experts E (default: one per super-class)")
    cut: str = shape("", "the stage or block that the tails begin with (default: the last stage)")
    own: str = shape(
        STAGES,
        "what each expert has for itself: stages (all from the cut to the head), pointwise (1 x 1 convolutions), or a "
        "regular expression that finds names of sub-modules, such as mlp",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9_.]{0,100}", self.cut):
            raise ConfigError(f"model config: cut is {self.cut[:60]!r}, which is not the name of a stage")
        _check_pattern(self.own)

    @property
    def k(self) -> int:
        return 1

    @property
    def wide(self) -> ModelConfig | None:
        """The dense model that runs all experts on every image and adds up what they give."""
        return WideBackboneConfig(**_values(self))

    def fewest_weights(self) -> int:
        return self.experts

    def expert_parameters(self) -> int | None:
        found = _parameters(self)
        return None if found is None else found[1]

    def active_parameters(self) -> int | None:
        found = _parameters(self)
        return None if found is None else found[0] - (self.experts - 1) * found[1]


@dataclass(frozen=True)
class WideBackboneConfig(RoutedBackboneConfig):
    """A dense model that has the weights of all experts of a :class:`RoutedBackboneConfig`, and uses all of them."""

    architecture: ClassVar[str] = "timm_wide"
    routes = None

    @property
    def wide(self) -> None:
        return None

    def active_parameters(self) -> int | None:
        return self.parameters()


def _values(config: ModelConfig, kind: type[ModelConfig] | None = None) -> dict[str, Any]:
    """A config's values for the fields of another class."""
    return {field.name: getattr(config, field.name) for field in fields(kind or config)}


def _check_pattern(own: str) -> None:
    if own in (STAGES, POINTWISE):
        return
    if not 0 < len(own) <= 200 or sum(map(own.count, "*+?{")) > QUANTIFIERS or re.search(r"\)[*+?{]|\\\d", own):
        raise ConfigError(
            f"model config: own is {own[:60]!r}; a pattern has at most 200 characters and {QUANTIFIERS} repetitions, "
            "and repeats no group"
        )
    try:
        re.compile(own)
    except re.error as error:
        raise ConfigError(f"model config: own is {own[:60]!r}, not a regular expression ({error})") from None


@functools.lru_cache(maxsize=32)
def _parameters(config: BackboneConfig) -> tuple[int, int] | None:
    """Number of weights of the whole model and of one expert; None where timm does not build the model."""
    if isinstance(config, RoutedBackboneConfig) and config.experts > 2:
        # every further expert adds as many, and a stranger's config may ask for tens of thousands
        one, two = (_parameters(replace(config, experts=number)) for number in (1, 2))
        return one and two and (one[0] + (config.experts - 1) * (two[0] - one[0]), one[1])
    try:
        with torch.device("meta"):
            model = build(config)
    except ConfigError:
        return None
    experts = model.experts_of if isinstance(model, RoutedBackbone) else ()
    own = sum(parameter.numel() for parameter in experts[0].parameters()) if experts else 0
    return sum(parameter.numel() for parameter in model.parameters()), own


@functools.lru_cache(maxsize=32)
def _work(config: BackboneConfig) -> dict[str, Work] | None:
    """What one image takes in every piece, counted on the pieces as they are exported; None where it is not known."""
    try:
        with torch.device("meta"), torch.no_grad():
            # one tail is as good as another, but a model without routes uses all experts
            alone = isinstance(config, RoutedBackboneConfig) and config.routes is not None
            model: Any = build(replace(config, experts=1) if alone else config)  # type: ignore[call-arg]
            model = model.merged() if isinstance(model, TimmModel) else model.eval()
            images = _example(config)[:1]
            if not isinstance(model, RoutedBackbone):
                counted = {"model": count(model, [images])}
            else:
                trunk, gate = model.trunk_module().eval(), torch.ones(1)
                features = trunk(images).contiguous()
                counted = {
                    "trunk": count(trunk, [images]),
                    "router": count(Router(model.router.linear.in_features, config.experts), [features]),
                    "tail": count(model.tail_module(0), [features, gate]),
                }
    except (ConfigError, NotImplementedError, RuntimeError):  # timm's own code runs without memory here
        return None
    return {role: work for role, work in counted.items() if work} if all(counted.values()) else None


class TimmModel(Model):
    """What the dense and the routed model share: weights go by timm's names.

    Attributes:
        backbone: the timm model, without what the experts have for themselves.
        experts_of: for each expert its own modules, under timm's names; empty for a dense model.
    """

    config: BackboneConfig
    backbone: nn.Module
    experts_of: nn.ModuleList

    @property
    def library(self) -> str:  # type: ignore[override]
        """The library that builds the model, with its release."""
        return f"timm {timm_library.library().__version__}"

    @property
    def classifier(self) -> tuple[str, ...]:
        """Names of the model's classifiers, of which distilled models have two."""
        return timm_library.classifiers_of(self.config.name)

    def dense_state(self) -> dict[str, Tensor]:
        """The weights by timm's names; where experts have their own, the first expert's."""
        state = dict(self.backbone.state_dict())
        if self.experts_of:
            state |= self.experts_of[0].state_dict()
        return state

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Gives weights values, by their names in timm's model; all experts that have their own get the same."""
        held, own = self.backbone.state_dict(), [expert.state_dict() for expert in self.experts_of]
        for name, value in values.items():
            for place in [held[name]] if name in held else [each[name] for each in own]:
                place.copy_(value)

    def merged(self) -> Self:
        """A copy in evaluation mode that computes the same with fewer layers: branches for training only are merged.

        Blocks of which an expert has a part for itself stay as they are.
        """
        made = copy.deepcopy(self).eval()
        for expert in made.experts_of:
            timm_library.merge_branches(expert)
        timm_library.merge_branches(made.backbone, made.holds_expert)
        return made

    def holds_expert(self, name: str) -> bool:
        """Whether experts have the module of this name in timm's model, or a part of it, for themselves."""
        return False

    def load_foreign(self, weights: Mapping[str, Tensor], where: str) -> list[str]:
        """Takes weights of the dense timm model, such as those that timm publishes.

        Args:
            weights: tensors by timm's names. All must be there and fit, except for a classifier of other classes.
            where: where they come from, for errors.

        Returns:
            Names of the classifier's weights that keep their random values, because they are for other classes.

        Raises:
            ConfigError: weights are missing, unknown or of another shape; the message names the first.
        """
        found = timm_library.converted(self.backbone, dict(weights))
        expected = self.dense_state()
        heads = [name for name in expected if name.rpartition(".")[0] in self.classifier]
        fresh = [name for name in heads if name in found and found[name].shape != expected[name].shape]
        counts = [name for name in expected if name.endswith("num_batches_tracked")]
        kept = {name: value for name, value in found.items() if name not in fresh and name not in counts}
        _check_fit(kept, {n: t for n, t in expected.items() if n not in fresh and n not in counts}, where, self.config)
        self.put(kept)
        return fresh

    def load_dense(self, dense: nn.Module) -> None:
        """Takes a dense model's weights; every expert gets copies."""
        assert isinstance(dense, Backbone)
        self.put(dense.backbone.state_dict())


def _check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str, config: BackboneConfig) -> None:
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    reason = ""
    if missing or unknown:
        parts = [f"lacks {len(missing)}, first {missing[0]!r}"] if missing else []
        parts += [f"has {len(unknown)} that are unknown, first {unknown[0]!r}"] if unknown else []
        reason = f"of {len(expected)} weights it {' and '.join(parts)}"
    else:
        other = next((name for name in expected if found[name].shape != expected[name].shape), None)
        if other is not None:
            shapes = f"{list(found[other].shape)}, expected {list(expected[other].shape)}"
            reason = f"{other!r} has shape {shapes}"
    if reason:
        raise ConfigError(
            f"{where}: not the weights of timm:{config.name} for {config.image_size} px with timm "
            f"{timm_library.library().__version__} ({reason})"
        )


class Backbone(TimmModel):
    """A dense model of timm: images ``[B, 3, H, W]`` → logits ``[B, C]``."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = config.create()
        self.experts_of = nn.ModuleList()
        _run(self.backbone, _example(config), config)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.backbone(images)
        return result

    def stock_module(self) -> nn.Module:
        return self.merged().backbone


def pooled(features: Tensor) -> Tensor:
    """Features ``[B, C, H, W]`` or ``[B, N, D]``, averaged over their places: ``[B, C]``."""
    return features.mean((2, 3)) if features.ndim == 4 else features.mean(1)


class Router(nn.Module):
    """Features ``[B, C, H, W]`` or ``[B, N, D]``, averaged over their places → probabilities ``[B, E]``."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, experts)

    def logits(self, features: Tensor) -> Tensor:
        """The router's logits ``[B, E]``, from which the router loss is computed."""
        result: Tensor = self.linear(pooled(features))
        return result

    def forward(self, features: Tensor) -> Tensor:
        return self.logits(features).softmax(-1)


Fill = Callable[[str, Route], nn.Module]
"""What stands in a tail for a module that each expert has for itself: the module's name and the route → a module."""


class RoutedBackbone(TimmModel):
    """A model of timm that routes each image to one of E experts: images ``[B, 3, H, W]`` → logits ``[B, C]``.

    At first, all experts compute what the dense model does, apart from the gate.

    Raises:
        ConfigError: the model cannot be built, it has no such cut, or the pattern finds nothing; the experts need more
            memory than there is; or trunk, one expert and head do not compute what the model itself computes.
    """

    config: RoutedBackboneConfig
    constant: Tensor | None
    moe_layers = 1
    keeps_features = True

    def __init__(self, config: RoutedBackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = config.create().eval()
        stages = stages_of(self.backbone, config.name)
        self._family, self._units = stages.family, stages.units
        self.register_buffer("constant", stages.constant, persistent=False)
        self._start = _position(config, self._units)
        self._own = _own_modules(config, self.backbone, self._units[self._start :])
        real = not next(self.backbone.parameters()).is_meta
        if real:
            size = sum(bytes_of(self.backbone.get_submodule(name)) for name in self._own)
            # whoever loads or exports the model holds all weights twice for a moment
            check_memory(f"{config.experts} experts of {size / 1e6:.1f} MB, held twice", 2 * config.experts * size)
        images = _example(config)
        hidden = _woken(self.backbone, images, config) if real else {}
        logits = _run(self.backbone, images, config)
        self.experts_of = nn.ModuleList(nn.Module() for _ in range(config.experts))
        for name in self._own:
            module = self.backbone.get_submodule(name)
            for expert in self.experts_of:
                _place(expert, name, copy.deepcopy(module))
            self.backbone.set_submodule(name, nn.Identity())
        features = self._place_gates(images)
        self.router = Router(features.shape[1 if features.ndim == 4 else -1], config.experts)
        if real:
            self._check_composition(features, logits)
        self.put(hidden)
        self._vary_experts()
        self.train()  # which also drops what some models cache while they evaluate

    def _place_gates(self, images: Tensor) -> Tensor:
        """Decides where the gate multiplies, from the shapes of an example; returns the trunk's features of it."""
        self._times: dict[str, int] = {}
        self._gated_modules: set[str] = set()
        with torch.no_grad():
            features: Tensor = self.trunk_module().eval()(images)
            route, x = Route(), features
            self._gated_units = []
            for unit in self._units[self._start :]:
                y = self._unit(unit, self._watched, route).eval()(x)
                names = [name for name in self._own if _within(name, unit.name)]
                alone = [name for name in names if not self._has_layers(name)]
                inside = bool(names) and not alone and unit.name not in names
                if inside:
                    self._gated_modules |= set(names)
                self._gated_units.append(bool(names) and not inside and x.shape == y.shape)
                x = y
        return features

    def _watched(self, name: str, route: Route) -> nn.Module:
        """The first expert's part, which notes how many rows it takes per image."""
        return Watched(self._part(0, name), lambda rows: self._times.update({name: rows // EXAMPLES}))

    def expert_parameters(self) -> list[nn.Parameter]:
        return list(self.experts_of.parameters())

    def holds_expert(self, name: str) -> bool:
        return any(_within(own, name) for own in self._own)

    def _has_layers(self, name: str) -> bool:
        return any(True for _ in self.experts_of[0].get_submodule(name).children())

    def _check_composition(self, features: Tensor, logits: Tensor) -> None:
        with torch.no_grad():
            composed = self.tail_module(self.config.experts - 1).eval()(features, torch.ones(EXAMPLES))
        spread = float((logits - logits.mean(0)).abs().max())
        error = float((composed - logits).abs().max())
        if not error <= TOLERANCE * spread:
            raise ConfigError(
                f"timm:{self.config.name}: trunk, expert and head do not compute what the model does (logits differ by "
                f"{error:.1e}, of images by {spread:.1e}); its family's entry in FAMILIES does not fit timm "
                f"{timm_library.library().__version__}"
            )

    @torch.no_grad()
    def _vary_experts(self) -> None:
        """Gives every expert but the first random matrices of its own, of the same mean and spread."""
        for expert in list(self.experts_of)[1:]:
            for parameter in expert.parameters():
                if parameter.ndim > 1 and not parameter.is_meta:
                    parameter.copy_(torch.randn_like(parameter) * parameter.std() + parameter.mean())

    def _tail(self, fill: Fill) -> Tail:
        route = Route()
        made = Tail(
            [self._unit(unit, fill, route) for unit in self._units[self._start :]],
            self._gated_units,
            at_head=not any(self._gated_units) and not self._gated_modules,
            head=Part(self.backbone, self._family.after, self._family.head),
            route=route,
        )
        set_training(made, self.training)
        return made

    def _unit(self, unit: Unit, fill: Fill, route: Route) -> nn.Module:
        if unit.name in self._own:
            return fill(unit.name, route)
        parts = {name[len(unit.name) + 1 :]: fill(name, route) for name in self._own if _within(name, unit.name)}
        return unit.wrap(replaced(self.backbone.get_submodule(unit.name), parts), self.constant)

    def _part(self, expert: int, name: str) -> nn.Module:
        """What an expert has in the place of a unit or sub-module."""
        wrap = next((unit.wrap for unit in self._units if unit.name == name), None)
        part = self.experts_of[expert].get_submodule(name)
        return part if wrap is None else wrap(part, self.constant)

    def _parts(self, name: str) -> list[nn.Module]:
        return [self._part(expert, name) for expert in range(self.config.experts)]

    def _gate(self, name: str, module: nn.Module, route: Route) -> nn.Module:
        return Gated(module, route, self._times[name]) if name in self._gated_modules else module

    def routed(self, images: Tensor, chosen: Tensor | None = None, noisy: bool = False) -> ImageRouted:
        return self.routed_after_trunk(self.trunk_module()(images), chosen, noisy)

    def routed_after_trunk(self, features: Tensor, chosen: Tensor | None = None, noisy: bool = False) -> ImageRouted:
        router_logits = self.router.logits(features)
        choice = choose(router_logits, 1, chosen, noisy)

        def dispatched(name: str, route: Route) -> nn.Module:
            return self._gate(name, Dispatch(self._parts(name), route, self._times[name]), route)

        logits = self._tail(dispatched)(features, choice.gates[:, 0], choice.chosen[:, 0])
        return ImageRouted.by(choice, logits, router_logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.routed(images).logits

    @torch.no_grad()
    def balance_router(self, images: int = 64) -> None:
        trunk, size = self.trunk_module(), self.config.image_size
        was = self.training
        self.eval()
        logits = torch.cat([self.router.logits(trunk(torch.randn(8, 3, size, size))) for _ in range(images // 8)])
        self.train(was)
        linear, scale = self.router.linear, 1 / logits.std(0)
        linear.weight.mul_(scale[:, None])
        linear.bias.copy_((linear.bias - logits.mean(0)) * scale)

    def wide_tail(self) -> Tail:
        """A tail that runs all experts and takes the mean of what they give, without gates."""
        tail = self._tail(lambda name, route: Mixed(self._parts(name)))
        tail.gated, tail.at_head = tuple(False for _ in tail.gated), False
        return tail

    def graph_module(self) -> nn.Module:
        """All experts in one graph. It runs all of them and keeps the chosen one's output."""

        def selected(name: str, route: Route) -> nn.Module:
            return self._gate(name, Selected(self._parts(name), route, self._times[name]), route)

        return AllExperts(self.trunk_module(), self.router, self._tail(selected))

    # The rest implements the protocol of mvmoe_deploy.exporters.split. Pieces share their parameters with this model.

    @property
    def experts(self) -> int:
        """Number of experts E."""
        return self.config.experts

    @property
    def k(self) -> int:
        """Experts used per image."""
        return 1

    def trunk_module(self) -> nn.Module:
        """Images ``[B, 3, H, W]`` → features ``[B, C, h, w]`` or tokens ``[B, N, D]``."""
        units = [
            unit.wrap(self.backbone.get_submodule(unit.name), self.constant) for unit in self._units[: self._start]
        ]
        stem = Part(self.backbone, self._family.before, self._family.stem)
        made = nn.Sequential(stem, *units)
        set_training(made, self.training)
        return made

    def router_module(self) -> nn.Module:
        """Features → probabilities ``[B, E]``."""
        return self.router

    def tail_module(self, expert: int) -> nn.Module:
        """Features and gate ``[B]`` → logits ``[B, C]``."""
        return self._tail(lambda name, route: self._gate(name, self._part(expert, name), route))


class Watched(nn.Module):
    """A module that tells a function how many rows it takes."""

    def __init__(self, part: nn.Module, tell: Callable[[int], None]) -> None:
        super().__init__()
        self.part, self.tell = part, tell

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Any:
        self.tell(x.shape[0])
        return self.part(x, *others, **named)


class AllExperts(nn.Module):
    """A routed model as one static graph that chooses the expert itself: images → logits."""

    def __init__(self, trunk: nn.Module, router: Router, tail: Tail) -> None:
        super().__init__()
        self.trunk, self.router, self.tail = trunk, router, tail

    def forward(self, images: Tensor) -> Tensor:
        features = self.trunk(images)
        probabilities = self.router(features)
        gate, expert = probabilities.max(-1)
        chosen = (torch.arange(probabilities.shape[1]) == expert[:, None]).to(gate.dtype)
        result: Tensor = self.tail(features, gate, chosen)
        return result


class WideBackbone(Model):
    """All experts on every image, without router or gate: as many weights as routed, E times the experts' work."""

    config: WideBackboneConfig

    def __init__(self, config: WideBackboneConfig) -> None:
        super().__init__()
        self.config = config
        routed = RoutedBackbone(RoutedBackboneConfig(**_values(config)))
        self.trunk = routed.trunk_module()
        self.tail = routed.wide_tail()

    def forward(self, images: Tensor) -> Tensor:
        features = self.trunk(images)
        result: Tensor = self.tail(features, features.new_ones(features.shape[0]))
        return result


def _example(config: BackboneConfig) -> Tensor:
    """Two random images; meta tensors while a model without memory is built."""
    generator = torch.Generator("cpu").manual_seed(0)
    size = config.image_size
    return torch.randn(EXAMPLES, 3, size, size, generator=generator, device="cpu").to(torch.get_default_device())


def _forward(model: nn.Module, images: Tensor, config: BackboneConfig) -> Any:
    try:
        return model(images)
    except Exception as error:  # timm's models raise what they like
        raise ConfigError(
            f"timm:{config.name}: cannot take images of {config.image_size} px ({first_line(error)})"
        ) from None


@torch.no_grad()
def _run(model: nn.Module, images: Tensor, config: BackboneConfig) -> Tensor:
    """The logits of an example.

    Raises:
        ConfigError: the model cannot take images of this size, or returns something else than logits.
    """
    logits = _forward(model.eval(), images, config)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (EXAMPLES, config.classes):
        raise ConfigError(
            f"timm:{config.name}: is no classifier, it does not return logits of {config.classes} classes"
        )
    model.train()
    return logits


def _position(config: RoutedBackboneConfig, units: Sequence[Unit]) -> int:
    """Index of the first unit of the tails."""
    stages = list(dict.fromkeys(unit.stage for unit in units))
    cut = config.cut or stages[-1]
    found = next((index for index, unit in enumerate(units) if _within(unit.name, cut)), None)
    if found is None:
        near = [unit.name for unit in units if _within(cut, unit.stage) or _within(cut, unit.name)]
        blocks = f", or at the blocks {', '.join(near)}" if near else ""
        raise ConfigError(f"timm:{config.name}: has no stage {cut!r}; it can be cut at {', '.join(stages)}{blocks}")
    return found


def _own_modules(config: RoutedBackboneConfig, model: nn.Module, tail: Sequence[Unit]) -> list[str]:
    """Names of the modules that each expert has for itself, none within another."""
    modules = [
        (f"{unit.name}.{name}" if name else unit.name, module)
        for unit in tail
        for name, module in model.get_submodule(unit.name).named_modules()
        if any(True for _ in module.parameters())
    ]
    if config.own == STAGES:
        names = [unit.name for unit in tail]
    elif config.own == POINTWISE:
        names = [name for name, module in modules if _is_pointwise(module)]
    else:
        names = [name for name, _ in modules if re.search(config.own, name)]
    names = [name for name, _ in modules if name in set(names)]  # without what has no weights
    own: list[str] = []
    for name in names:
        if not own or not _within(name, own[-1]):
            own.append(name)
    if not own:
        there = ", ".join(name for name, _ in modules[:12])
        raise ConfigError(
            f"timm:{config.name}: own {config.own!r} finds no weights behind the cut; there is {there}, …"
        )
    return own


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Registers a module under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)


@torch.no_grad()
def _woken(model: nn.Module, images: Tensor, config: BackboneConfig) -> dict[str, Tensor]:
    """Lets an example's logits show all that a new model computes, and returns the original values by name.

    Some models start with branches whose last weights are zero, which get random values. In others (TinyViT) features
    shrink in every layer until logits no longer depend on the image, unless batch norms have the example's statistics.
    """
    asleep = {name: weight for name, weight in model.named_parameters() if float(weight.abs().max()) < 1e-3}
    statistics = {name: value for name, value in model.named_buffers() if name.rpartition(".")[2] in _STATISTICS}
    originals = {name: value.clone() for name, value in (asleep | statistics).items()}
    generator = torch.Generator().manual_seed(0)
    for weight in asleep.values():
        weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.random.fork_rng(devices=[]):  # dropout must not change what a seed gives
            _forward(model.train(), images, config)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return originals


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


for _entry in (
    Architecture(BackboneConfig, Backbone, "timm:NAME", ("timm:mobilenetv3_small_100",)),
    Architecture(RoutedBackboneConfig, RoutedBackbone, "timm:NAME", ("timm:mobilenetv3_small_100",)),
    Architecture(WideBackboneConfig, WideBackbone),
):
    register(_entry)
