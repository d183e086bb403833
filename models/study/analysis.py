"""What a router does with labelled images: where it sends each class, how surely, and with which accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvmoe_deploy.bundle import Manifest
from mvmoe_deploy.checkpoint import Superclasses
from mvmoe_deploy.errors import DataError
from mvmoe_deploy.models.model import ImageRoutes, TokenRoutes
from mvmoe_deploy.models.study.evaluation import Predictions

BINS = 20
"""Number of bins in the histograms of gates and margins, which cover 0…1."""


@dataclass(frozen=True)
class ImageAnalysis:
    """What a per-image router does; shares are 0…1.

    Attributes:
        images: number of images.
        accuracy: top-1 accuracy.
        router_accuracy: share of images sent to their super-class's expert. This and every other figure that needs
            super-classes is None if there are none.
        accuracy_routed_right: top-1 accuracy on the images sent to their super-class's expert; None if there are none.
        accuracy_routed_wrong: top-1 accuracy on the other images; None if there are none.
        accuracy_if_right: top-1 accuracy if every image goes to its super-class's expert; None if not measured.
        expert_names: what each expert is for ``[E]``.
        class_names: names of the classes ``[C]``.
        superclass_of: the super-class of each class ``[C]``.
        order: order ``[C]`` in which to show the classes: by super-class, or else by the expert that most of a class's
            images go to.
        heat: share of each class's choices that fell on each expert ``[C, E]``; a class without images has zeros.
        load: share of all choices that fell on each expert ``[E]``.
        fair_load: share of the images that belong to each expert's super-class ``[E]``.
        expert_accuracy: top-1 accuracy on the images whose first choice is this expert ``[E]``; None if it has none.
        gates: histogram of the first choice's gate: counts ``[2, BINS]`` of the images routed right and wrong, or
            ``[1, BINS]`` without super-classes.
        margins: the same histogram of the difference between the largest two router probabilities.
        margin_percentiles: 1st, 10th, 50th and 90th percentile of the margins.
    """

    images: int
    accuracy: float
    router_accuracy: float | None
    accuracy_routed_right: float | None
    accuracy_routed_wrong: float | None
    accuracy_if_right: float | None
    expert_names: list[str]
    class_names: list[str]
    superclass_of: list[int] | None
    order: list[int]
    heat: list[list[float]]
    load: list[float]
    fair_load: list[float] | None
    expert_accuracy: list[float | None]
    gates: list[list[int]]
    margins: list[list[int]]
    margin_percentiles: list[float]

    @property
    def headline(self) -> str:
        """The analysis in one line."""
        text = f"{self.images:,} images: top-1 {self.accuracy:.1%}"
        if self.router_accuracy is not None:
            text += f", router {self.router_accuracy:.1%}"
        for value, when in (
            (self.accuracy_routed_right, "routed right"),
            (self.accuracy_routed_wrong, "routed wrong"),
            (self.accuracy_if_right, "if all were routed right"),
        ):
            if value is not None:
                text += f"; top-1 {when} {value:.1%}"
        return text


@dataclass(frozen=True)
class TokenAnalysis:
    """What a V-MoE's routers do; shares are 0…1, layers are MoE layers.

    Attributes:
        images: number of images.
        accuracy: top-1 accuracy.
        class_names: names of the classes ``[C]``.
        order: order ``[C]`` in which to show the classes: by the expert of the last layer that most of a class's tokens
            choose.
        heat: share of the choices of each class's tokens that fell on each expert ``[layers, C, E]``.
        load: share of all choices that fell on each expert ``[layers, E]``.
        overflow: share of the choices that found no place ``[layers]``.
        touched: number of images whose tokens use 0, 1, … E distinct experts ``[layers, E + 1]``. In the last block
            only the class token is read; the other tokens use no experts there.
        mean_touched: mean number of distinct experts per image ``[layers]``.
    """

    images: int
    accuracy: float
    class_names: list[str]
    order: list[int]
    heat: list[list[list[float]]]
    load: list[list[float]]
    overflow: list[float]
    touched: list[list[int]]
    mean_touched: list[float]

    @property
    def headline(self) -> str:
        """The analysis in a line."""
        return (
            f"{self.images:,} images: top-1 {self.accuracy:.1%}; an image touches {sum(self.mean_touched):.2f} "
            f"of {sum(map(len, self.load))} expert MLPs in {len(self.load)} MoE layers"
        )


def analyse_images(
    predictions: Predictions,
    class_names: list[str],
    superclasses: Superclasses | None = None,
    forced: Predictions | None = None,
) -> ImageAnalysis:
    """Analyses a per-image router.

    Args:
        predictions: predictions of a Mobile V-MoE, from a checkpoint or a bundle.
        class_names: names of the C classes.
        superclasses: the super-classes, one per expert.
        forced: predictions for the same images, each sent to its super-class's expert.

    Raises:
        DataError: the numbers of super-classes and experts differ.
    """
    routing = predictions.routing
    assert isinstance(routing, ImageRoutes)
    experts, classes = routing.probabilities.shape[1], len(class_names)
    if superclasses is not None and len(superclasses.names) != experts:
        raise DataError(f"there are {len(superclasses.names)} super-classes but {experts} experts")
    right, labels, first = predictions.right, predictions.labels, routing.chosen[:, 0]
    heat = torch.zeros(classes, experts).index_put_(
        (labels[:, None].expand_as(routing.chosen), routing.chosen), torch.ones(()), accumulate=True
    )
    heat /= heat.sum(1, keepdim=True).clamp(min=1)
    wanted = None if superclasses is None else torch.tensor(superclasses.of_class)[labels]
    routed_right = None if wanted is None else first == wanted
    top2 = routing.probabilities.topk(min(2, experts)).values
    margins = top2[:, 0] - (top2[:, 1] if experts > 1 else 0)
    names = [f"expert {index}" for index in range(experts)] if superclasses is None else superclasses.names
    return ImageAnalysis(
        images=len(labels),
        accuracy=float(right.double().mean()),
        router_accuracy=None if routed_right is None else float(routed_right.double().mean()),
        accuracy_routed_right=None if routed_right is None else _mean(right[routed_right]),
        accuracy_routed_wrong=None if routed_right is None else _mean(right[~routed_right]),
        accuracy_if_right=None if forced is None else float(forced.right.double().mean()),
        expert_names=names,
        class_names=class_names,
        superclass_of=None if superclasses is None else superclasses.of_class,
        order=_order(heat, None if superclasses is None else torch.tensor(superclasses.of_class)),
        heat=heat.tolist(),
        load=routing.load().tolist(),
        fair_load=None if wanted is None else (torch.bincount(wanted, minlength=experts) / len(labels)).tolist(),
        expert_accuracy=[_mean(right[first == expert]) for expert in range(experts)],
        gates=_histogram(top2[:, 0], routed_right),
        margins=_histogram(margins, routed_right),
        margin_percentiles=np.percentile(margins.double().numpy(), [1, 10, 50, 90]).tolist(),
    )


def analyse_tokens(predictions: Predictions, class_names: list[str]) -> TokenAnalysis:
    """Analyses a V-MoE's routers."""
    routing = predictions.routing
    assert isinstance(routing, TokenRoutes)
    images, _, experts = routing.choices.shape
    heat = torch.zeros(len(class_names), *routing.choices.shape[1:]).index_add_(0, predictions.labels, routing.choices)
    heat /= torch.bincount(predictions.labels, minlength=len(class_names)).clamp(min=1)[:, None, None]
    touched = routing.used.sum(-1)  # [n, layers]
    return TokenAnalysis(
        images=images,
        accuracy=float(predictions.right.double().mean()),
        class_names=class_names,
        order=_order(heat[:, -1], None),
        heat=heat.transpose(0, 1).tolist(),
        load=routing.choices.mean(0).tolist(),
        overflow=routing.overflow.tolist(),
        touched=[torch.bincount(layer, minlength=experts + 1).tolist() for layer in touched.T],
        mean_touched=touched.double().mean(0).tolist(),
    )


def superclasses_of(manifest: Manifest) -> Superclasses | None:
    """The super-classes that a bundle's experts are for; None if a class has no expert, or more than one."""
    experts_of: list[list[int]] = [[] for _ in manifest.class_names]
    for index, expert in enumerate(manifest.experts):
        for label in expert.classes:
            if label < len(experts_of):
                experts_of[label].append(index)
    if any(len(experts) != 1 for experts in experts_of):
        return None
    return Superclasses([expert.name for expert in manifest.experts], [experts[0] for experts in experts_of])


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None


def _order(heat: Tensor, superclass_of: Tensor | None) -> list[int]:
    """Classes by group; within a group, those with the largest share sent to its expert come first."""
    group = heat.argmax(1) if superclass_of is None else superclass_of
    share = heat.gather(1, group[:, None])[:, 0]
    return [int(index) for index in np.lexsort((-share.numpy(), group.numpy()))]


def _histogram(values: Tensor, routed_right: Tensor | None) -> list[list[int]]:
    parts = [values] if routed_right is None else [values[routed_right], values[~routed_right]]
    return [_counts(part.numpy()) for part in parts]


def _counts(values: NDArray[np.float32]) -> list[int]:
    return [int(count) for count in np.histogram(values, BINS, (0, 1))[0]]
