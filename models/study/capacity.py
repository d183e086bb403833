"""Adaptive compute of a trained V-MoE: accuracy against the capacity it is given (arXiv 2106.05974, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models.architectures.routing import ORDERS
from mvmoe_deploy.models.model import Model, TokenRoutes
from mvmoe_deploy.models.study.comparison import Difference, paired_difference
from mvmoe_deploy.models.study.evaluation import Predictions, predict
from mvmoe_deploy.models.train.data import ImageSet


@dataclass(frozen=True)
class CapacityPoint:
    """A V-MoE at one capacity factor and order of dispatch.

    Attributes:
        factor: places of all experts for each choice of a token.
        order: who gets the places: ``vanilla`` or ``bpr``.
        accuracy: top-1, 0…1.
        overflow: share of the choices that found no place, mean over the MoE layers.
        flops: of one image, at most (see :meth:`mvmoe_deploy.models.architectures.vmoe.VMoEConfig.token_mlps`).
        gain: ``bpr`` over ``vanilla`` at this factor, paired by image; None for ``vanilla``.
    """

    factor: float
    order: str
    accuracy: float
    overflow: float
    flops: int | None
    gain: Difference | None


@dataclass(frozen=True)
class CapacityCurve:
    """Accuracy against capacity.

    Attributes:
        images: how many there were.
        batch: images that share the experts' places.
        trained_factor: the capacity factor of training.
        points: by factor, ``vanilla`` before ``bpr``.
    """

    images: int
    batch: int
    trained_factor: float
    points: list[CapacityPoint]


def capacity_curve(
    model: Model,
    images: ImageSet,
    preprocessing: Preprocessing,
    factors: Sequence[float],
    batch: int = 500,
    progress: Callable[[int], None] = lambda done: None,
) -> CapacityCurve:
    """Evaluates a V-MoE at each capacity factor, without and with Batch Priority Routing.

    Args:
        model: a trained V-MoE; it is left as it was.
        images: labelled.
        preprocessing: the model's.
        factors: capacity factors.
        batch: images whose tokens share the experts' places.
        progress: called with how many of the 2 · len(factors) evaluations are done.

    Raises:
        ConfigError: a model without a capacity, or a factor that is not above 0.
    """
    was, trained_factor = model.config, model.config.capacity_factor
    if trained_factor is None:
        raise ConfigError(f"a {was.architecture} has no capacity: only tokens compete for places")
    points: list[CapacityPoint] = []
    try:
        for factor in factors:
            by_order: dict[str, Predictions] = {}
            for order in ORDERS:
                model.set_capacity(factor, order)
                found = by_order[order] = predict(model, images, preprocessing, batch)
                assert isinstance(found.routing, TokenRoutes)
                gain = None if order == "vanilla" else paired_difference(found.right, by_order["vanilla"].right)
                accuracy, overflow = float(found.right.double().mean()), float(found.routing.overflow.mean())
                points.append(CapacityPoint(factor, order, accuracy, overflow, model.config.flops(), gain))
                progress(len(points))
    finally:
        model.config = was
    return CapacityCurve(len(images.labels), batch, trained_factor, points)
