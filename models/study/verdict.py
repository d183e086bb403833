"""Whether routing pays, in words, with the figures behind it.

A routed model can be behind its dense baseline for three reasons, and each leaves a trace: the router errs (images that
it sent right gain, the others lose), the experts hardly differ (images that it sent right gain nothing either), or
there are too few images for more weights (training showed each of them many times).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

WORTH = 1.5
"""Points ahead from which routing is called worth its bytes. Seeds alone moved a difference by about as much."""

TELLING = 1.0
"""Points from which a difference between groups of images is put into words."""

ROUTER = 0.8
"""Share of images sent to the right expert below which the paper's gain vanishes (arXiv 2309.04354, figure 3c)."""


@dataclass(frozen=True)
class Traces:
    """What the predictions of a routed and a dense model say of each other; accuracies and shares are 0…1.

    Attributes:
        images: how many there are.
        points: accuracy less the dense model's, in percentage points.
        low: lower end of the 95 % interval, over images.
        high: its upper end.
        router: share of images sent to their super-class's expert.
        dense_knows: share of images whose super-class the dense model's own answer names.
        points_sent_right: difference in points on the images that were sent right; None where there are none.
        points_sent_wrong: likewise on the others.
        points_forced: accuracy with all images sent right, less the router's own, in points; None if not measured.
    """

    images: int
    points: float
    low: float
    high: float
    router: float
    dense_knows: float
    points_sent_right: float | None
    points_sent_wrong: float | None
    points_forced: float | None


def traces(
    labels: Tensor,
    answers: Tensor,
    dense_answers: Tensor,
    sent: Tensor,
    groups: Tensor,
    interval: tuple[float, float],
    forced_answers: Tensor | None = None,
) -> Traces:
    """Compares two models' answers to the same images.

    Args:
        labels: the images' classes, int64 ``[n]``.
        answers: the routed model's ``[n]``.
        dense_answers: the dense model's ``[n]``.
        sent: the expert of each image ``[n]``.
        groups: super-class of each class ``[C]``.
        interval: of the difference in points, as :func:`.comparison.paired_difference` gives it.
        forced_answers: the routed model's with every image sent to its super-class's expert.
    """
    right, dense_right = answers == labels, dense_answers == labels
    sent_right = sent == groups[labels]
    gain = 100 * (right.double() - dense_right.double())

    def mean(values: Tensor) -> float | None:
        return float(values.mean()) if len(values) else None

    forced = None
    if forced_answers is not None:
        forced = 100 * float(((forced_answers == labels).double() - right.double()).mean())
    return Traces(
        images=len(labels),
        points=float(gain.mean()),
        low=interval[0],
        high=interval[1],
        router=float(sent_right.double().mean()),
        dense_knows=float((groups[dense_answers] == groups[labels]).double().mean()),
        points_sent_right=mean(gain[sent_right]),
        points_sent_wrong=mean(gain[~sent_right]),
        points_forced=forced,
    )


def verdict(found: Traces, times_seen: float | None = None) -> list[str]:
    """Sentences: whether routing pays, then what to try, most promising first.

    Args:
        found: of a routed and a dense model of equal FLOPs, recipe and samples.
        times_seen: how often training showed each image; None where it never showed one twice.
    """
    figures = f"{found.points:+.2f} points (95 % {found.low:+.2f} … {found.high:+.2f}, {found.images:,} images)"
    if found.low > 0 and found.points >= WORTH:
        said = [f"Routing pays: {figures}. Train two more seeds of both before you rely on it."]
    elif found.low > 0:
        said = [f"Routing is ahead, but by less than another seed may change: {figures}."]
    elif found.high < 0:
        said = [f"Dense is better: {figures}."]
    else:
        said = [f"No difference that these images could show: {figures}."]
    if found.points < WORTH or found.low <= 0:
        said += _reasons(found, times_seen)
    return said


def _reasons(found: Traces, times_seen: float | None) -> list[str]:
    reasons = []
    right, wrong, forced = found.points_sent_right, found.points_sent_wrong, found.points_forced
    sent = f"{100 * found.router:.1f} % of the images were sent to their super-class's expert"
    gains = (
        ""
        if right is None or wrong is None
        else f"; these gain {right:+.2f} points over dense, the others {wrong:+.2f}"
    )
    all_right = (
        "" if forced is None else f", and all sent right, with the gates the router gives, {forced:+.2f} over now"
    )
    if forced is None:
        router_costs = right is not None and wrong is not None and right >= TELLING and right - wrong >= TELLING
        alike = right is not None and right < TELLING
    else:  # it counts for more: images that are sent right may be the easy ones
        router_costs, alike = forced >= TELLING, forced < TELLING
    if router_costs:
        reasons.append(
            f"The router costs most: {sent}{gains}{all_right}. Try a better router (--router-input mean, "
            "--router-weight 1, a deeper trunk) or super-classes from a stronger model's confusions."
        )
    elif alike:
        reasons.append(
            f"The experts hardly differ: {sent}{gains}{all_right}. A better router would add little. Train a dense "
            "model whose last MLPs are as wide as all experts together: if that gains nothing, experts have nothing to "
            "add, and the model is limited elsewhere (a wider or deeper trunk, or dense)."
        )
    if found.router < ROUTER and found.dense_knows - found.router >= 0.05:
        reasons.append(
            f"The router knows less than the model: {sent}, the dense model's answer is of the right one for "
            f"{100 * found.dense_knows:.1f} %."
        )
    if times_seen is not None and times_seen > 3:
        reasons.append(
            f"Training showed each image {times_seen:.0f} times, and experts see a fraction of them each: they "
            "memorise. More data comes first, or a teacher (--teacher, --mixup)."
        )
    if not reasons:
        reasons.append("Nothing in the predictions says what to change; dense needs less to be delivered.")
    return reasons


def times_seen(training: dict[str, Any], distinct: int | None = None) -> float | None:
    """How often a checkpoint's training showed each image, from its summary; None if that is endless or not recorded.

    Args:
        training: a checkpoint's training summary.
        distinct: how many different images there were, where that is not the number of an epoch.
    """
    epochs, images = training.get("epochs_done"), training.get("training_images")
    if training.get("endless") or not isinstance(epochs, int) or not isinstance(images, int):
        return None
    return epochs * images / (distinct or images)
