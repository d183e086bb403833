"""What a model offers to training, evaluation, benchmarks and export: the base class of every architecture's model.

Everything has a default that says "a dense model of which nothing more is known", so that an architecture writes down
only what is true of it. What follows the router is offered to the exporters by the methods of
:class:`mvmoe_deploy.exporters.split.PerImageRouted`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.models.architectures import routing
from mvmoe_deploy.models.registry import ModelConfig


@dataclass
class ImageRoutes:
    """Where a per-image router sent n images.

    Attributes:
        probabilities: the router's ``[n, E]``.
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
        used: whether any token of the image that is read used the expert ``[n, MoE layers, E]``; overflow uses none.
        overflow: share of the choices that found no place ``[MoE layers]``.
    """

    choices: Tensor
    used: Tensor
    overflow: Tensor


@dataclass
class Output:
    """What a model says of a batch, and what training needs beside it; of a dense model only the logits.

    Attributes:
        logits: of the classes ``[B, C]``.
    """

    logits: Tensor

    def auxiliary_loss(self) -> Tensor | None:
        """The loss that balances the experts' load where no super-classes teach the router; None for a dense model."""
        return None

    def routes(self) -> ImageRoutes | TokenRoutes | None:
        """Where the images, or their tokens, went, on the CPU; None for a dense model."""
        return None


@dataclass
class ImageRouted(Output):
    """What a per-image-routed model says of a batch.

    Attributes:
        router_logits: of the experts ``[B, E]``, which the router loss is taken on.
        noisy_logits: those with noise that were routed by ``[B, E]``; the same without noise.
        gates: the router's probabilities of the chosen experts ``[B, k]``.
        chosen: expert indices ``[B, k]``.
    """

    router_logits: Tensor
    noisy_logits: Tensor
    gates: Tensor
    chosen: Tensor

    def auxiliary_loss(self) -> Tensor:
        """Importance and load loss (arXiv 2106.05974, appendix A), the images of the batch in the tokens' place."""
        return routing.auxiliary_loss(self.router_logits.float(), self.noisy_logits.float(), self.chosen.shape[1])

    def routes(self) -> ImageRoutes:
        return ImageRoutes(self.router_logits.softmax(-1).cpu(), self.chosen.cpu())


class Model(nn.Module):
    """A model of a registered architecture: images ``[B, 3, H, W]`` → logits ``[B, C]``.

    Attributes:
        config: its shape.
        moe_layers: number of MoE layers.
        cannot_split: why it cannot be split into pieces or exported; empty where it can.
    """

    config: ModelConfig
    moe_layers: int = 0
    cannot_split: ClassVar[str] = ""

    def routed(self, images: Tensor, chosen: Tensor | None = None, noisy: bool = False) -> Output:
        """Runs the model and says how it routed as well.

        Args:
            images: ``[B, 3, H, W]``.
            chosen: of a model that routes images, experts ``[B, k]`` to use instead of the router's choice.
            noisy: of a model that routes images, route by logits with noise, to train a router without super-classes.
        """
        return Output(self(images))

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weights that the optimiser Muon is for: matrices between hidden layers, not input, routers or head."""
        return []

    def expert_stacks(self) -> list[nn.Parameter]:
        """The experts' parameters, each with the experts as its first dimension ``[E, …]``."""
        return []

    def load_dense(self, dense: nn.Module) -> None:
        """Takes the weights of a trained model of the config's dense baseline.

        Raises:
            ConfigError: models of this architecture do not start from a dense one.
        """
        raise ConfigError(f"a {self.config.architecture} does not start from a dense model")

    def balance_router(self) -> None:
        """Makes a random router share random images out among its experts, as a trained one shares real ones."""

    def set_capacity(self, factor: float, order: str | None = None) -> None:
        """Changes how many places experts have, and the order in which tokens get them where given.

        Raises:
            ConfigError: places are not bounded, a factor that is not above 0, or an unknown order.
        """
        raise ConfigError(f"a {self.config.architecture} has no capacity: only tokens compete for places")

    def stock_module(self) -> nn.Module:
        """The same function as it is usually written, without what this project does for speed; shares no weights."""
        return self

    def graph_module(self) -> nn.Module:
        """The whole model as one static graph, experts chosen inside.

        Raises:
            ConfigError: there is none.
        """
        raise ConfigError(f"a {self.config.architecture} is not to be had as one graph that holds all experts")


def routed_by_tails(
    features: Tensor,
    router_logits: Tensor,
    tail: Callable[[int], nn.Module],
    k: int = 1,
    chosen: Tensor | None = None,
    noisy: bool = False,
) -> ImageRouted:
    """:meth:`Model.routed` of a per-image-routed model with k = 1, made of its tails.

    Args:
        features: what follows the trunk ``[B, …]``.
        router_logits: ``[B, E]``.
        tail: the tail of an expert: features and gate ``[B]`` → logits ``[B, C]``.
        k: must be 1.
        chosen: as in :meth:`Model.routed`.
        noisy: likewise.

    Raises:
        ConfigError: k > 1, where experts' outputs add up within each MoE layer.
    """
    if k != 1:
        raise ConfigError(f"tails are for k = 1, not k = {k}")
    choice = routing.choose(router_logits, k, chosen, noisy)
    rows = [torch.nonzero(choice.chosen[:, 0] == expert)[:, 0] for expert in range(router_logits.shape[1])]
    parts = [
        tail(expert)(features[images], choice.gates[images, 0]) for expert, images in enumerate(rows) if len(images)
    ]
    logits = torch.cat(parts)[torch.cat(rows).argsort()]
    return ImageRouted(logits, router_logits, choice.noisy_logits, choice.gates, choice.chosen)


def check_state_dict(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Raises ConfigError naming the first missing, unknown or wrongly shaped entry of ``weights``."""
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
