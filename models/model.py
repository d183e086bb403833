"""The base class of every architecture's model: what it offers to training, evaluation, benchmarks and export.

Every method has a default, which suits a dense model about which nothing more is known. An architecture overrides only
what differs. A per-image-routed model offers its pieces to the exporters by the methods of
:class:`mvmoe_deploy.exporters.split.PerImageRouted`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.models.architectures import routing
from mvmoe_deploy.models.registry import ModelConfig


@dataclass
class ImageRoutes:
    """Where a per-image router sent n images.

    Attributes:
        probabilities: the router's probabilities ``[n, E]``.
        chosen: experts ``[n, k]``, best first.
    """

    probabilities: Tensor
    chosen: Tensor

    def load(self) -> Tensor:
        """Share of the images' choices that fell on each expert ``[E]``."""
        return torch.bincount(self.chosen.flatten(), minlength=self.probabilities.shape[1]) / self.chosen.numel()


@dataclass
class TokenRoutes:
    """Where the tokens of n images were sent.

    Attributes:
        choices: share of each image's choices that fell on each expert ``[n, MoE layers, E]``, overflow included.
        used: whether a token of the image whose output is read used the expert ``[n, MoE layers, E]``; overflow uses
            none.
        overflow: share of the choices that found no place ``[MoE layers]``.
    """

    choices: Tensor
    used: Tensor
    overflow: Tensor


@dataclass
class Output:
    """A model's output for a batch, with what training needs besides. For a dense model it is only the logits.

    Attributes:
        logits: logits of the classes ``[B, C]``.
    """

    logits: Tensor

    def auxiliary_loss(self) -> Tensor | None:
        """The loss that balances the experts' load where no super-classes teach the router; None for a dense model."""
        return None

    def routes(self) -> ImageRoutes | TokenRoutes | None:
        """Which experts the images or their tokens were sent to, on the CPU; None for a dense model."""
        return None


@dataclass
class ImageRouted(Output):
    """A per-image-routed model's output for a batch.

    Attributes:
        router_logits: the router's logits ``[B, E]``, from which the router loss is computed.
        noisy_logits: the logits, with noise, that decided the routes ``[B, E]``; without noise, the same as
            ``router_logits``.
        gates: the router's probabilities of the chosen experts ``[B, k]``.
        chosen: expert indices ``[B, k]``.
    """

    router_logits: Tensor
    noisy_logits: Tensor
    gates: Tensor
    chosen: Tensor

    @classmethod
    def by(cls, choice: routing.Choice, logits: Tensor, router_logits: Tensor) -> ImageRouted:
        """The output for images that were routed by a choice, which was made from ``router_logits``."""
        return cls(
            logits,
            router_logits=router_logits,
            noisy_logits=choice.noisy_logits,
            gates=choice.gates,
            chosen=choice.chosen,
        )

    def auxiliary_loss(self) -> Tensor:
        """Importance and load loss (arXiv 2106.05974, appendix A), with the images of the batch in place of tokens."""
        return routing.auxiliary_loss(self.router_logits.float(), self.noisy_logits.float(), self.chosen.shape[1])

    def routes(self) -> ImageRoutes:
        return ImageRoutes(self.router_logits.softmax(-1).cpu(), self.chosen.cpu())


class Model(nn.Module):
    """A model of a registered architecture: images ``[B, 3, H, W]`` → logits ``[B, C]``.

    Attributes:
        config: the model's shape.
        moe_layers: number of MoE layers.
        cannot_split: why the model cannot be split into pieces and exported; empty if it can.
        library: the library that builds the model, with its release; empty if this project alone does.
        keeps_features: whether training can keep what the trunk gives: the model has :meth:`routed_after_trunk`, and
            ``trunk_module()`` of :class:`mvmoe_deploy.exporters.split.PerImageRouted`.
    """

    config: ModelConfig
    moe_layers: int = 0
    cannot_split: ClassVar[str] = ""
    library: str = ""
    keeps_features: ClassVar[bool] = False

    def routed(self, images: Tensor, chosen: Tensor | None = None, noisy: bool = False) -> Output:
        """Runs the model, and returns its routes beside the logits.

        Args:
            images: ``[B, 3, H, W]``.
            chosen: experts ``[B, k]`` to use instead of the router's choice, for a model that routes images.
            noisy: whether to route by logits with noise, which trains a router without super-classes, for a model that
                routes images.
        """
        return Output(self(images))

    def routed_after_trunk(self, features: Tensor, chosen: Tensor | None = None, noisy: bool = False) -> Output:
        """Runs what follows the trunk, for a model with ``keeps_features``.

        Args:
            features: the trunk's output ``[B, …]``.
            chosen: as in :meth:`routed`.
            noisy: as in :meth:`routed`.

        Raises:
            ConfigError: the model cannot.
        """
        raise ConfigError(f"a {self.config.architecture} does not run from its trunk's features on")

    def expert_parameters(self) -> list[nn.Parameter]:
        """The weights that belong to a single expert, or hold one part per expert."""
        return self.expert_stacks()

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weights that Muon can train: matrices between hidden layers, without input layer, routers and head."""
        return []

    def expert_stacks(self) -> list[nn.Parameter]:
        """The experts' parameters as stacked tensors, whose first dimension is the expert: ``[E, …]``."""
        return []

    def load_dense(self, dense: nn.Module) -> None:
        """Takes the weights of a trained model of the config's dense baseline.

        Raises:
            ConfigError: models of this architecture cannot start from a dense one.
        """
        raise ConfigError(f"a {self.config.architecture} does not start from a dense model")

    def load_foreign(self, weights: Mapping[str, Tensor], where: str) -> list[str]:
        """Takes weights that another program saved, by the names of the program's own dense model.

        Args:
            weights: tensors by name.
            where: what the error calls their origin.

        Returns:
            Names of weights that keep their random values: those of a classifier of other classes.

        Raises:
            ConfigError: the weights do not fit, or models of this architecture take none.
        """
        raise ConfigError(f"{where}: not a checkpoint of this project, and a {self.config.architecture} takes no other")

    def balance_router(self) -> None:
        """Makes a random router spread random images over all experts, as a trained router spreads real images."""

    def set_capacity(self, factor: float, order: str | None = None) -> None:
        """Changes how many places experts have and, if ``order`` is given, the order in which tokens get them.

        Raises:
            ConfigError: places are not bounded, the factor is not above 0, or the order is unknown.
        """
        raise ConfigError(f"a {self.config.architecture} has no capacity: only tokens compete for places")

    def merged(self) -> Self:
        """A model that computes the same with fewer layers, from which pieces are made; it may be this one."""
        return self

    def stock_module(self) -> nn.Module:
        """The same model as it is usually written, without this project's optimisations; it shares no weights."""
        return self

    def graph_module(self) -> nn.Module:
        """The whole model as one static graph, which chooses the experts itself.

        Raises:
            ConfigError: the model has no such graph.
        """
        raise ConfigError(f"a {self.config.architecture} cannot be built as one graph that holds all experts")


def routed_by_tails(
    features: Tensor,
    router_logits: Tensor,
    tail: Callable[[int], nn.Module],
    k: int = 1,
    chosen: Tensor | None = None,
    noisy: bool = False,
) -> ImageRouted:
    """Implements :meth:`Model.routed` with a model's tails, for a per-image-routed model with k = 1.

    Args:
        features: the trunk's output ``[B, …]``.
        router_logits: the router's logits ``[B, E]``.
        tail: returns the tail of an expert: features and gate ``[B]`` → logits ``[B, C]``.
        k: experts per image; must be 1.
        chosen: as in :meth:`Model.routed`.
        noisy: as in :meth:`Model.routed`.

    Raises:
        ConfigError: k > 1, for which the experts' outputs add up within each MoE layer.
    """
    if k != 1:
        raise ConfigError(f"tails are for k = 1, not k = {k}")
    choice = routing.choose(router_logits, k, chosen, noisy)
    rows = [torch.nonzero(choice.chosen[:, 0] == expert)[:, 0] for expert in range(router_logits.shape[1])]
    parts = [
        tail(expert)(features[images], choice.gates[images, 0]) for expert, images in enumerate(rows) if len(images)
    ]
    logits = torch.cat(parts)[torch.cat(rows).argsort()]
    return ImageRouted.by(choice, logits, router_logits)


def set_training(module: nn.Module, training: bool = True) -> None:
    """Puts a module into training mode, except for batch norms whose weights do not learn: they keep their statistics.

    Args:
        module: the module, whose sub-modules change too.
        training: False puts all of it into evaluation mode.
    """
    module.train(training)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine:
            norm.training = training and any(weight.requires_grad for weight in norm.parameters())


def check_state_dict(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Checks that weights fit a model: none is missing, unknown or of another shape.

    Args:
        model: the model that is to get them.
        weights: tensors by name.
        where: what the error calls their origin.

    Raises:
        ConfigError: they do not fit; the message names the first weight that does not.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected]
    if missing:
        raise ConfigError(f"{where}: lacks {len(missing)} weights, first {missing[0]!r}")
    if unknown:
        raise ConfigError(f"{where}: holds {len(unknown)} weights this model does not have, first {unknown[0]!r}")
    for name, tensor in expected.items():
        if tuple(weights[name].shape) != tuple(tensor.shape):
            raise ConfigError(
                f"{where}: {name!r} has shape {list(weights[name].shape)}, the config asks for {list(tensor.shape)}"
            )
