"""Measures a configuration's accuracy on labelled images, run by its own engine, and where its router sends them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.bench.candidates.configuration import Configuration, Opened
from mvmoe_deploy.bench.results import Accuracy
from mvmoe_deploy.errors import AnswerError, DataError
from mvmoe_deploy.images import Preprocessing, evenly_spaced, normalise

BATCH = 32


@dataclass(frozen=True)
class Labelled:
    """Decoded images ``[n, H, W, 3]``, their class indices ``[n]`` and the identifiers of all classes."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_ids: list[str]


def read_labelled(data: Path, preprocessing: Preprocessing, count: int, val_share: float = 0.0) -> Labelled:
    """Reads evenly spaced images of the validation split of a folder that ``mvmoe-train --data`` accepts.

    Raises:
        DataError: there is no such data, or an image cannot be read.
    """
    from mvmoe_deploy.models.train.folders import read_images

    val = read_images(data, "val", preprocessing, val_share=val_share)
    rows = evenly_spaced(len(val.labels), count)
    return Labelled(val.pixels[rows].permute(0, 2, 3, 1).numpy(), val.labels[rows].numpy(), val.class_ids)


def labels_for(c: Configuration, labelled: Labelled) -> NDArray[np.int64]:
    """The images' classes in this configuration's numbering; errors are those of :func:`numbered`."""
    return numbered(labelled, c.class_ids, c.name)


def numbered(labelled: Labelled, class_ids: list[str], model: str) -> NDArray[np.int64]:
    """The images' classes in a model's numbering; the images need not be of all its classes.

    Args:
        labelled: the images.
        class_ids: the model's classes.
        model: its name, for errors.

    Raises:
        DataError: the model does not know an image's class.
    """
    number = {class_id: n for n, class_id in enumerate(class_ids)}
    unknown = sorted(set(labelled.class_ids) - set(number))
    if unknown:
        raise DataError(f"{model}: knows no class {unknown[0]!r} ({len(unknown)} such classes); is --data its data?")
    return np.array([number[class_id] for class_id in labelled.class_ids])[labelled.labels]


def measure_accuracy(
    c: Configuration,
    model: Opened,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Measures accuracy by running labelled images.

    Args:
        c: the configuration.
        model: the opened configuration.
        pixels: decoded images, ``[n, H, W, 3]``.
        labels: their classes ``[n]``, from :func:`labels_for`.
        progress: called with the number of finished images and their total number.

    Raises:
        AnswerError: logits are not finite.
    """
    top1 = top5 = routed_well = 0
    heat = np.zeros((len(c.class_ids), c.experts), int)
    for start in range(0, len(pixels), BATCH):
        truth = labels[start : start + BATCH]
        logits, routed = model.run(np.ascontiguousarray(normalise(pixels[start : start + BATCH], c.preprocessing)))
        if not np.isfinite(logits.max(axis=1)).all():  # the runtime refuses them itself; other engines do not
            raise AnswerError(f"{c.name}: logits are NaN or infinite for some images, so that it has no accuracy")
        best = logits.argsort(axis=1)[:, ::-1]
        top1 += int((best[:, 0] == truth).sum())
        top5 += int((best[:, :5] == truth[:, None]).any(axis=1).sum())
        if routed is not None:
            np.add.at(heat, (truth[:, None], routed.experts), 1)
            if c.class_experts:
                routed_well += int((routed.experts[:, 0] == np.array(c.class_experts)[truth]).sum())
        progress(min(start + BATCH, len(pixels)), len(pixels))
    count = len(pixels)
    router = routed_well / count if c.class_experts and c.experts else None
    return Accuracy(
        images=count,
        top1=top1 / count,
        top5=top5 / count,
        router=router,
        heat_map=heat.tolist() if c.experts else [],
    )
