"""When routing pays: routed models against the dense ones of the same samples, as rows of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mvmoe_deploy.errors import DataError
from mvmoe_deploy.models import load_checkpoint
from mvmoe_deploy.models.model import ImageRoutes
from mvmoe_deploy.models.study.comparison import paired_difference, training_images
from mvmoe_deploy.models.study.evaluation import predict
from mvmoe_deploy.models.study.verdict import traces
from mvmoe_deploy.models.train.data import ImageSet
from mvmoe_deploy.models.zoo.scripts.cache import Glyphs
from mvmoe_deploy.models.zoo.scripts.dataset import Characters
from mvmoe_deploy.models.zoo.scripts.train import epochs_of, without_gates

SHOWN = {"fresh": ("train", 991), "unseen": ("test", 993)}
"""Splits and seeds of the images that models are compared on, which no training sees."""


@dataclass(frozen=True)
class Point:
    """A routed and a dense model on the same images; accuracies and shares in percent, differences in points.

    Attributes:
        dense: the dense model's file.
        routed: the routed model's.
        gates: ``router's``, as on a device, or ``one``, as in training without gates.
        samples: how many each was trained on.
        shown: ``fresh`` or ``unseen``.
        images: how many images.
        dense_accuracy: top-1 accuracy of the dense model.
        accuracy: of the routed one.
        points: the difference.
        low: lower end of its paired 95 % interval, over the images.
        high: its upper end.
        router: share of images that were sent to their super-class's expert.
        dense_knows: share of images whose super-class the dense model's answer names.
        points_sent_right: difference on the images that were sent right.
        points_sent_wrong: on the others.
        points_forced: what sending all images right would add; None if not measured.
    """

    dense: str
    routed: str
    gates: str
    samples: int | None
    shown: str
    images: int
    dense_accuracy: float
    accuracy: float
    points: float
    low: float
    high: float
    router: float
    dense_knows: float
    points_sent_right: float | None
    points_sent_wrong: float | None
    points_forced: float | None

    def line(self) -> str:
        """The point as a line of a table, values apart by tabs."""
        values = asdict(self).values()
        return "\t".join("" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in values)


HEADER = "\t".join(Point.__dataclass_fields__)


def images(glyphs: Glyphs, count: int) -> dict[str, ImageSet]:
    """The first ``count`` fresh and unseen images."""
    ids = [each.id for each in glyphs.classes]
    return {
        shown: ImageSet(*Characters(glyphs, split, seed).batch(torch.arange(count)), ids, [])
        for shown, (split, seed) in SHOWN.items()
    }


def compared(
    dense: Path, others: Sequence[Path], shown: dict[str, ImageSet], forced: bool = True, gates: bool = True
) -> Iterator[Point]:
    """Compares routed models with a dense one.

    Args:
        dense: a dense model's checkpoint.
        others: routed models' checkpoints.
        shown: images by what they are called.
        forced: whether to measure what sending all images right would add.
        gates: multiply experts by their gates. An image sent against the router's choice has a small one, so that what
            its expert knows shows only without.

    Raises:
        DataError: a model is not routed per image by super-classes.
    """
    base, about = load_checkpoint(dense)
    answers = {name: predict(base, each, about.preprocessing) for name, each in shown.items()}
    for path in others:
        model, header = load_checkpoint(path)
        if header.superclasses is None:
            raise DataError(f"{path}: not a model whose router learned super-classes")
        if not gates:
            without_gates(model)
        groups = torch.tensor(header.superclasses.of_class)
        for name, each in shown.items():
            found, was = predict(model, each, header.preprocessing), answers[name]
            assert isinstance(found.routing, ImageRoutes)
            sent_right = None
            if forced:
                sent_right = predict(model, each, header.preprocessing, experts=groups[each.labels][:, None]).top[:, 0]
            difference = paired_difference(found.right, was.right)
            t = traces(
                labels=each.labels,
                answers=found.top[:, 0],
                dense_answers=was.top[:, 0],
                sent=found.routing.chosen[:, 0],
                groups=groups,
                interval=(difference.low, difference.high),
                forced_answers=sent_right,
            )
            yield Point(
                dense=_name(dense),
                routed=_name(path),
                gates="router's" if gates else "one",
                samples=training_images(header.training),
                shown=name,
                images=len(each.labels),
                dense_accuracy=100 * float(was.right.double().mean()),
                accuracy=100 * float(found.right.double().mean()),
                points=t.points,
                low=t.low,
                high=t.high,
                router=100 * t.router,
                dense_knows=100 * t.dense_knows,
                points_sent_right=t.points_sent_right,
                points_sent_wrong=t.points_sent_wrong,
                points_forced=t.points_forced,
            )


def snapshots(dense: Path, others: Sequence[Path]) -> Iterator[tuple[Path, list[Path]]]:
    """The checkpoints that training kept of all of these models, by epoch."""
    for kept in sorted(epochs_of(dense).iterdir()):
        same = [epochs_of(other) / kept.name for other in others]
        if all(path.exists() for path in same):
            yield kept, same


def _name(path: Path) -> str:
    return path.parent.name.split(".")[0] if path.parent.suffix == ".epochs" else path.stem
