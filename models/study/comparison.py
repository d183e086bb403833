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
        points: accuracy less the base's, in percentage points.
        low: lower end of the 95 % interval.
        high: its upper end.
        p_value: of McNemar's exact test that both are right equally often.
        gained: images that this model alone gets right.
        lost: images that the base alone gets right.
    """

    points: float
    low: float
    high: float
    p_value: float
    gained: int
    lost: int


@dataclass(frozen=True)
class Needs:
    """What a model needs on a device; experts of different MoE layers are different weights, and count separately.

    What the architecture does not know (the size of an expert, FLOPs) leaves None.

    Attributes:
        flops: of one image, by the paper's convention.
        parameters: all weights.
        active_parameters: weights that one image uses, mean over the images as measured.
        expert_mlps: experts there are, over all MoE layers.
        touched: experts that one image uses, mean over the images as measured.
        most_touched: the most experts that any image uses.
        image_bytes: bytes of the fp32 weights that one image needs in memory, mean over the images.
        most_image_bytes: the same for the image that needs most.
        all_bytes: bytes of fp32 weights in memory with which none is loaded twice for all the images.
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
        name: the checkpoint's.
        routing: ``dense``, ``super-class``, ``random``, ``end-to-end`` (all three per image) or ``per token``.
        accuracy: top-1, 0…1.
        top5: top-5, 0…1.
        router_accuracy: share of images sent to their super-class's expert; None where there are no super-classes.
        difference: to the first model; None for that.
        paper_points: the same difference in figure 3e, between models of these routings.
        training_images: images seen in training, those of the models it started from included; None if not recorded.
        recipe: how it was trained, and the sha256 of what taught it; empty if not recorded.
        needs: on a device.
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
    """A row per model; differences are to the first.

    Args:
        candidates: name, checkpoint header, model, and its predictions for the same images in the same order.
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
                result.accuracy,
                result.top5,
                result.router_accuracy,
                None if first else paired_difference(predictions.right, base.right),
                None if first else PAPER[routing] - PAPER[rows[0].routing],
                training_images(header.training),
                _recipe(header.training),
                needs(model, predictions),
            )
        )
    return rows


def paired_difference(right: Tensor, base: Tensor, resamples: int = 100_000, seed: int = 0) -> Difference:
    """Difference of two accuracies with its paired bootstrap interval over the images, and McNemar's exact test.

    What a resample of the images holds of those that one model alone gets right is multinomial, so drawing these
    counts is the paired bootstrap itself, not an approximation. The interval says how the images' choice may have
    favoured a model, not how another training run would have turned out.

    Args:
        right: whether the model is right, boolean ``[n]``.
        base: likewise for the other.
        resamples: of the images.
        seed: of the resampling.
    """
    from scipy.stats import binomtest

    total = len(right)
    gained, lost = int((right & ~base).sum()), int((~right & base).sum())
    counts = np.random.default_rng(seed).multinomial(
        total, [gained / total, lost / total, (total - gained - lost) / total], resamples
    )
    low, high = np.percentile(100 * (counts[:, 0] - counts[:, 1]) / total, [2.5, 97.5])
    p_value = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return Difference(100 * (gained - lost) / total, float(low), float(high), float(p_value), gained, lost)


def routing_of(header: Header, model: Model) -> str:
    """Which row of figure 3e a model belongs to."""
    if model.config.routes == "tokens":
        return "per token"
    if model.config.routes is None:
        return "dense"
    taught = "end-to-end" if header.superclasses is None else "super-class"
    return str(header.training.get("recipe", {}).get("router", taught))


def training_images(training: dict[str, Any]) -> int | None:
    """Images seen in training, repetitions counted, those of the models that it started from included.

    Args:
        training: a checkpoint's training summary.

    Returns:
        None where the summary, or that of a model it started from, does not say.
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
    """What a model needs on a device for the images it was asked about."""
    flops, expert = model.config.flops(), model.config.expert_parameters()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    used = experts_used(model, predictions)
    if used is None:
        everything = BYTES * parameters
        return Needs(flops, parameters, parameters, 0, 0.0, 0, everything, everything, everything)
    count = used[0].numel()
    touched = used.sum((1, 2))
    mean, most = float(touched.double().mean()), int(touched.max())
    if expert is None:
        return Needs(flops, parameters, None, count, mean, most, None, None, None)
    shared = parameters - count * expert
    return Needs(
        flops,
        parameters,
        shared + mean * expert,
        count,
        mean,
        most,
        BYTES * (shared + mean * expert),
        BYTES * (shared + most * expert),
        BYTES * (shared + int(used.any(0).sum()) * expert),
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
