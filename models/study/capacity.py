"""Adaptive compute of a trained V-MoE: its accuracy as a function of its capacity (arXiv 2106.05974, section 4)."""

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
        factor: capacity factor: places in all experts together, per choice of a token.
        order: order in which tokens get places: ``vanilla`` or ``bpr``.
        accuracy: top-1 accuracy, 0…1.
        overflow: share of the choices that found no place, mean over the MoE layers.
        flops: upper bound of the FLOPs of one image (see
            :meth:`mvmoe_deploy.models.architectures.vmoe.VMoEConfig.token_mlps`).
        gain: difference of ``bpr`` to ``vanilla`` at this factor, paired by image; None for ``vanilla``.
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
        images: number of images.
        batch: number of images that share the experts' places.
        trained_factor: the capacity factor of training.
        points: the points by factor, ``vanilla`` before ``bpr``.
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
        model: a trained V-MoE; its own capacity is restored at the end.
        images: labelled images.
        preprocessing: the model's preprocessing.
        factors: capacity factors.
        batch: number of images whose tokens share the experts' places.
        progress: called with the number of evaluations that are done, of 2 · len(factors).

    Raises:
        ConfigError: the model has no capacity, or a factor is not above 0.
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
                points.append(
                    CapacityPoint(
                        factor=factor,
                        order=order,
                        accuracy=accuracy,
                        overflow=overflow,
                        flops=model.config.flops(),
                        gain=gain,
                    )
                )
                progress(len(points))
    finally:
        model.config = was
    return CapacityCurve(len(images.labels), batch, trained_factor, points)
