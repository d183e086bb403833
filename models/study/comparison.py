"""Trained models side by side on the same images: accuracy with paired intervals, and what each needs on a device.

The rows of Mobile V-MoE's figure 3e (arXiv 2309.04354) are five such models, which differ in their routing alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from mvmoe_deploy.checkpoint import Header
from mvmoe_deploy.models.model import Model, TokenRoutes
from mvmoe_deploy.models.study.evaluation import Predictions, summarise

PAPER = {"dense": 71.70, "super-class": 74.42, "random": 69.22, "end-to-end": 73.57, "per token": 74.85}
"""Top-1 accuracy by routing in figure 3e, percent, on ImageNet."""

BYTES = 4
"""Bytes of a weight in fp32."""


@dataclass(frozen=True)
class Difference:
    """How two models' top-1 accuracies differ on the same n images.

    Attributes:
        points: this model's accuracy minus the base's, in percentage points.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
        p_value: p-value of McNemar's exact test, whose hypothesis is that both are right equally often.
        gained: number of images that only this model gets right.
        lost: number of images that only the base gets right.
    """

    points: float
    low: float
    high: float
    p_value: float
    gained: int
    lost: int


@dataclass(frozen=True)
class Needs:
    """What a model needs on a device. Experts of different MoE layers have different weights and count separately.

    Figures that the architecture does not know (the size of an expert, FLOPs) are None.

    Attributes:
        flops: FLOPs of one image, by the paper's convention.
        parameters: number of all weights.
        active_parameters: number of weights that one image uses, measured, mean over the images.
        expert_mlps: number of experts over all MoE layers.
        touched: number of experts that one image uses, measured, mean over the images.
        most_touched: largest number of experts that an image uses.
        image_bytes: bytes of the fp32 weights that one image needs in memory, mean over the images.
        most_image_bytes: bytes of the fp32 weights for the image that needs most.
        all_bytes: bytes of the fp32 weights that all images together use, so that nothing is loaded twice.
    """

    flops: int | None
    parameters: int
    active_parameters: float | None
    expert_mlps: int
    touched: float
    most_touched: int
    image_bytes: float | None
    most_image_bytes: int | None
    all_bytes: int | None


@dataclass(frozen=True)
class Row:
    """One model of a comparison.

    Attributes:
        name: the checkpoint's name.
        routing: ``dense``, ``super-class``, ``random``, ``end-to-end`` (all three per image) or ``per token``.
        accuracy: top-1 accuracy, 0…1.
        top5: top-5 accuracy, 0…1.
        router_accuracy: share of images sent to their super-class's expert; None if there are no super-classes.
        difference: difference to the first model; None for the first model itself.
        paper_points: the same difference in figure 3e, between models with these routings.
        training_images: images seen in training, including by the models it started from; None if not recorded.
        recipe: the recipe, and the sha256 of the teacher; empty if not recorded.
        needs: what the model needs on a device.
    """

    name: str
    routing: str
    accuracy: float
    top5: float
    router_accuracy: float | None
    difference: Difference | None
    paper_points: float | None
    training_images: int | None
    recipe: dict[str, Any]
    needs: Needs


def compare(candidates: Sequence[tuple[str, Header, Model, Predictions]]) -> list[Row]:
    """Compares models with the first of them, and returns one row per model.

    Args:
        candidates: for each model its name, checkpoint header, the model itself, and its predictions. The images of the
            predictions are the same for all models, in the same order.
    """
    rows: list[Row] = []
    base = candidates[0][3]
    for name, header, model, predictions in candidates:
        result = summarise(predictions, header.superclasses)
        routing = routing_of(header, model)
        first = not rows
        rows.append(
            Row(
                name,
                routing,
                accuracy=result.accuracy,
                top5=result.top5,
                router_accuracy=result.router_accuracy,
                difference=None if first else paired_difference(predictions.right, base.right),
                paper_points=None if first else PAPER[routing] - PAPER[rows[0].routing],
                training_images=training_images(header.training),
                recipe=_recipe(header.training),
                needs=needs(model, predictions),
            )
        )
    return rows


def paired_difference(right: Tensor, base: Tensor, resamples: int = 100_000, seed: int = 0) -> Difference:
    """The difference of two accuracies with its paired bootstrap interval over the images, and McNemar's exact test.

    In a resample of the images, the numbers of images that only one of the models gets right follow a multinomial
    distribution. Drawing these numbers is therefore the paired bootstrap itself, not an approximation. The interval
    says how much the choice of images may have favoured a model, not how another training run would have turned out.

    Args:
        right: whether the model is right, boolean ``[n]``.
        base: whether the base is right, boolean ``[n]``.
        resamples: number of resamples of the images.
        seed: seed of the resampling.
    """
    from scipy.stats import binomtest

    total = len(right)
    gained, lost = int((right & ~base).sum()), int((~right & base).sum())
    counts = np.random.default_rng(seed).multinomial(
        total, [gained / total, lost / total, (total - gained - lost) / total], resamples
    )
    low, high = np.percentile(100 * (counts[:, 0] - counts[:, 1]) / total, [2.5, 97.5])
    p_value = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return Difference(
        points=100 * (gained - lost) / total,
        low=float(low),
        high=float(high),
        p_value=float(p_value),
        gained=gained,
        lost=lost,
    )


def routing_of(header: Header, model: Model) -> str:
    """Which row of figure 3e a model belongs to."""
    if model.config.routes == "tokens":
        return "per token"
    if model.config.routes is None:
        return "dense"
    taught = "end-to-end" if header.superclasses is None else "super-class"
    return str(header.training.get("recipe", {}).get("router", taught))


def training_images(training: dict[str, Any]) -> int | None:
    """Number of images seen in training, counting repetitions and the training of models that it started from.

    Args:
        training: a checkpoint's training summary.

    Returns:
        The number; None if the summary, or that of a model it started from, does not say.
    """
    epochs, images = training.get("epochs_done"), training.get("training_images")
    if not isinstance(epochs, int) or not isinstance(images, int):
        return None
    if "started_from" not in training:
        return epochs * images
    before = training_images(training["started_from"].get("training", {}))
    return None if before is None else before + epochs * images


def _recipe(training: dict[str, Any]) -> dict[str, Any]:
    teacher = {"teacher": training["teacher"].get("sha256")} if "teacher" in training else {}
    recipe: dict[str, Any] = training.get("recipe", {})
    return recipe | teacher


def needs(model: Model, predictions: Predictions) -> Needs:
    """What a model needs on a device for the images of the predictions."""
    flops, expert = model.config.flops(), model.config.expert_parameters()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    used = experts_used(model, predictions)
    if used is None:
        everything = BYTES * parameters
        return Needs(
            flops=flops,
            parameters=parameters,
            active_parameters=parameters,
            expert_mlps=0,
            touched=0.0,
            most_touched=0,
            image_bytes=everything,
            most_image_bytes=everything,
            all_bytes=everything,
        )
    count = used[0].numel()
    touched = used.sum((1, 2))
    mean, most = float(touched.double().mean()), int(touched.max())
    if expert is None:
        return Needs(
            flops=flops,
            parameters=parameters,
            active_parameters=None,
            expert_mlps=count,
            touched=mean,
            most_touched=most,
            image_bytes=None,
            most_image_bytes=None,
            all_bytes=None,
        )
    shared = parameters - count * expert
    return Needs(
        flops=flops,
        parameters=parameters,
        active_parameters=shared + mean * expert,
        expert_mlps=count,
        touched=mean,
        most_touched=most,
        image_bytes=BYTES * (shared + mean * expert),
        most_image_bytes=BYTES * (shared + most * expert),
        all_bytes=BYTES * (shared + int(used.any(0).sum()) * expert),
    )


def experts_used(model: Model, predictions: Predictions) -> Tensor | None:
    """Which experts each image used, boolean ``[n, MoE layers, E]``; None for a dense model."""
    routing = predictions.routing
    if routing is None:
        return None
    if isinstance(routing, TokenRoutes):
        return routing.used
    chosen = F.one_hot(routing.chosen, routing.probabilities.shape[1]).bool().any(1)
    return chosen[:, None].expand(-1, model.moe_layers, -1)


def recipe_differences(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The fields in which the recorded recipes differ, with the value of each model that has it."""
    known = [row for row in rows if row.recipe]
    fields = dict.fromkeys(field for row in known for field in row.recipe)
    values = {field: {row.name: row.recipe[field] for row in known if field in row.recipe} for field in fields}
    return {
        field: each
        for field, each in values.items()
        if len(each) < len(known) or any(value != known[0].recipe.get(field) for value in each.values())
    }
