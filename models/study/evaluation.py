"""A trained model's predictions for labelled images, and their summary: accuracy, router accuracy and load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mvmoe_deploy.checkpoint import Superclasses
from mvmoe_deploy.errors import CheckFailed
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models.model import ImageRoutes, Model, TokenRoutes
from mvmoe_deploy.models.train.data import Bar, ImageSet, images_per_batch, normaliser, quick
from mvmoe_deploy.runtime import RoutedBatch, Runtime


@dataclass
class Predictions:
    """A model's predictions for n labelled images.

    Attributes:
        labels: the images' classes, int64 ``[n]``.
        top: the most probable classes ``[n, 5]``, best first; there are fewer columns if there are fewer classes.
        routing: the experts that the images, or their tokens, were sent to; None for a dense model.
    """

    labels: Tensor
    top: Tensor
    routing: ImageRoutes | TokenRoutes | None

    @property
    def right(self) -> Tensor:
        """Whether the most probable class is the image's class, boolean ``[n]``."""
        return self.top[:, 0] == self.labels


@dataclass
class Evaluation:
    """Accuracy on labelled images.

    Attributes:
        accuracy: top-1 accuracy, 0…1.
        top5: top-5 accuracy, 0…1.
        router_accuracy: share of images routed to their super-class's expert; None if there are no super-classes.
        load: share of images (for a V-MoE, of tokens) sent to each expert ``[E]``; empty for a dense model.
    """

    accuracy: float
    top5: float
    router_accuracy: float | None
    load: list[float]


@torch.no_grad()
def predict(
    model: Model,
    images: ImageSet,
    preprocessing: Preprocessing,
    batch: int | None = None,
    progress: Bar | None = None,
    experts: Tensor | None = None,
    features: Tensor | None = None,
) -> Predictions:
    """Runs a model on all images and returns its predictions in their order.

    The tokens of a V-MoE's batch compete for places, so its predictions depend on ``batch``.

    Args:
        model: the model to run.
        images: labelled images.
        preprocessing: the model's preprocessing.
        batch: number of images per batch; by default, what suits the images' size.
        progress: wraps the iterator over batches in a progress bar.
        experts: experts ``[n, k]`` to use instead of the router's choice, for a per-image-routed model.
        features: what the model's trunk gives for the images, where that is known, for a model with ``keeps_features``.

    Raises:
        CheckFailed: the model's outputs are not finite.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    normalise = normaliser(preprocessing, device)
    total = len(images.labels)
    # Images come class by class. The tokens of few classes choose few experts, so that far more of a V-MoE's tokens
    # would overflow than in the mixed batches of training. The batches are therefore mixed here too.
    order = torch.arange(total)
    if model.config.routes == "tokens":
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    tops: list[Tensor] = []
    routes: list[ImageRoutes | TokenRoutes] = []
    parts = order.split(batch or images_per_batch(preprocessing.size))
    for rows in progress(iter(parts), len(parts)) if progress else parts:
        chosen = None if experts is None else experts[rows].to(device)
        if features is None:
            output = model.routed(quick(normalise(images.pixels[rows].to(device))), chosen)
        else:
            output = model.routed_after_trunk(features[rows].to(device).float(), chosen)
        if (routed := output.routes()) is not None:
            routes.append(routed)
        tops.append(_best_classes(output.logits))
    model.train(was_training)
    back = order.argsort()
    return Predictions(images.labels, torch.cat(tops)[back], _joined(routes, back))


def _joined(parts: Sequence[ImageRoutes | TokenRoutes], back: Tensor) -> ImageRoutes | TokenRoutes | None:
    """The batches' routes as one object, in the order ``back``; None if nothing is routed."""
    images = [part for part in parts if isinstance(part, ImageRoutes)]
    if images:
        return ImageRoutes(
            torch.cat([part.probabilities for part in images])[back], torch.cat([part.chosen for part in images])[back]
        )
    tokens = [part for part in parts if isinstance(part, TokenRoutes)]
    if not tokens:
        return None
    overflow = [part.overflow * (len(part.choices) / len(back)) for part in tokens]
    return TokenRoutes(
        torch.cat([part.choices for part in tokens])[back],
        torch.cat([part.used for part in tokens])[back],
        torch.stack(overflow).sum(0),
    )


def check_finite(logits: Tensor) -> None:
    """Refuses logits ``[B, C]`` that do not say which class is the most probable.

    Raises:
        CheckFailed: an image's logits are NaN or infinite.
    """
    if not bool(torch.isfinite(logits.amax(1)).all()):
        raise CheckFailed("the model's outputs are NaN or infinite for some images, so they say nothing; train again")


def _best_classes(logits: Tensor) -> Tensor:
    """The most probable classes ``[B, 5]`` of logits ``[B, C]``."""
    check_finite(logits)
    return logits.topk(min(5, logits.shape[1])).indices.cpu()


def predict_with_bundle(
    runtime: Runtime,
    images: ImageSet,
    batch: int = 32,
    progress: Bar | None = None,
    experts: Tensor | None = None,
) -> Predictions:
    """Does what :func:`predict` does, with an exported model; the other arguments are the same."""
    normalise = normaliser(runtime.bundle.manifest.preprocessing, torch.device("cpu"))
    tops: list[Tensor] = []
    routes: list[RoutedBatch] = []
    parts = torch.arange(len(images.labels)).split(batch)
    for rows in progress(iter(parts), len(parts)) if progress else parts:
        logits, routed = runtime.run(
            normalise(images.pixels[rows]).numpy(), None if experts is None else experts[rows].numpy()
        )
        tops.append(_best_classes(torch.from_numpy(logits)))
        if routed is not None:
            routes.append(routed)
    routing = None
    if routes:
        routing = ImageRoutes(
            torch.from_numpy(np.concatenate([routed.probabilities for routed in routes])),
            torch.from_numpy(np.concatenate([routed.experts for routed in routes])),
        )
    return Predictions(images.labels, torch.cat(tops), routing)


def summarise(predictions: Predictions, superclasses: Superclasses | None = None) -> Evaluation:
    """Accuracy, router accuracy and load per expert."""
    routing = predictions.routing
    load: list[float] = []
    router_accuracy = None
    if isinstance(routing, TokenRoutes):
        load = routing.choices.mean((0, 1)).tolist()
    elif routing is not None:
        load = routing.load().tolist()
        if superclasses is not None:
            wanted = torch.tensor(superclasses.of_class)[predictions.labels]
            router_accuracy = float((routing.chosen[:, 0] == wanted).double().mean())
    return Evaluation(
        float(predictions.right.double().mean()),
        float((predictions.top == predictions.labels[:, None]).any(1).double().mean()),
        router_accuracy,
        load,
    )


def evaluate(
    model: Model,
    images: ImageSet,
    preprocessing: Preprocessing,
    superclasses: Superclasses | None = None,
    batch: int | None = None,
    features: Tensor | None = None,
) -> Evaluation:
    """Accuracy, router accuracy and load per expert on labelled images; see :func:`predict`."""
    return summarise(predict(model, images, preprocessing, batch, features=features), superclasses)
