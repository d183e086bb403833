"""Verification: compares the written pieces, run by a backend, with the PyTorch model that they came from.

``docs/verification.md`` says what is compared, in which units, and what cannot be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvmoe_deploy.backends import Backend
from mvmoe_deploy.bundle import LOGITS, Bundle
from mvmoe_deploy.errors import BackendError, MvmoeError, VerificationError, first_line
from mvmoe_deploy.exporters import differences
from mvmoe_deploy.exporters.exporter import exporter_of, weights_reader_of
from mvmoe_deploy.exporters.job import refusal
from mvmoe_deploy.exporters.precision import Tolerance
from mvmoe_deploy.exporters.rounding import RoundedBackend
from mvmoe_deploy.exporters.split import PieceModule, SplitModel
from mvmoe_deploy.exporters.weights import same_weights, whose
from mvmoe_deploy.images import Preprocessing, nearest_image
from mvmoe_deploy.runtime import RoutedBatch, Runtime, top_k

Array = NDArray[np.floating[Any]]

RANKING_ERROR = 1e-5
"""Largest error of a probability that a graph computes from its own logits, both in fp32."""

IMAGES_PER_EXPERT = 8
"""Number of images that every expert is run on; the end-to-end check runs all images."""

BATCH = 32

GATES = (0.3, 0.9)
"""Range of the evenly spaced gates that tails are run with. It stays away from 1, where a missing gate would not show,
and from 0, where the expert itself would not show. A trained router gives experts that it does not choose a probability
near 0, and a wrong expert multiplied by 1e-6 agrees with any other."""

FEW = 32
"""Up to this many experts, each is compared with every other; beyond, the pairs would take longer than all the rest."""

NEAREST = 3
"""Of more experts than :data:`FEW`, each is compared with this many whose outputs are nearest to its own."""

SEEN = 2.0
"""Experts count as told apart if their outputs differ by at least this many tolerances. A correct bundle may already be
off by one tolerance, so a wrong expert is then still off by another."""


ROOM = 2.0
"""How many times the effect of rounding on PyTorch itself a bundle may show. Engines round at other places than the
simulation, which makes another draw of the same errors; 1.0 and 1.07 times it was seen, with two models."""

MOST = 4.0
"""How many times a precision's tolerance a model that is sensitive to rounding may be allowed."""


class PieceResult(msgspec.Struct):
    """Worst errors of one piece over all its outputs.

    Attributes:
        piece: the piece's name.
        max_abs_error: largest absolute difference of any value.
        max_error: largest difference in the units in which the output is judged.
        tolerances: largest difference as a share of what is allowed, over everything that is judged; 1 still passes.
    """

    piece: str
    max_abs_error: float
    max_error: float
    tolerances: float


class Change(msgspec.Struct):
    """An image for which the bundle and PyTorch differ in the route or in the top-1 class.

    Attributes:
        image: the image's index.
        reference: PyTorch's experts or class.
        bundle: the bundle's experts or class.
        margin: by how many spreads PyTorch preferred its own choice.
        tie: whether the margin is so small that either choice is right.
    """

    image: int
    reference: list[int]
    bundle: list[int]
    margin: float
    tie: bool


class Eyesight(msgspec.Struct):
    """Whether verification could have noticed that two experts are swapped.

    Attributes:
        tolerances: how many tolerances apart the outputs of the two most similar experts are in PyTorch.
        experts: these two experts.
        told_apart_by: ``outputs``; ``weights`` if outputs are too similar and the weights in the bundle were compared
            with the checkpoint's instead; ``nothing`` if neither was possible.
        copies: number of compared pairs of experts with equal weights, which nothing can tell apart.
    """

    tolerances: float
    experts: list[int]
    told_apart_by: str
    copies: int


class Report(msgspec.Struct):
    """The results of verification, as they go into the manifest.

    Attributes:
        images: number of images.
        image_source: where the images came from.
        backend: the backend that ran the pieces.
        pieces: errors per piece; each piece was given the reference's inputs.
        logits_max_abs_error: largest absolute error of a logit end to end; an image that the bundle routed differently
            is run again with PyTorch's route.
        logits_max_error: largest error of a logit end to end, in spreads, after subtracting the mean over the classes.
        probability_max_error: largest error of a class's probability end to end.
        top1_agreement: share of images with the same top-1 class end to end.
        routing_agreement: share of images sent to the same experts; None for a dense model.
        route_flips: images that were routed differently.
        class_changes: images with PyTorch's route but another top-1 class.
        gates_apart: by how many tolerances the logits of these images would be off if gates were renormalised (for
            k = 1: left out); None for a dense model.
        eyesight: whether swapped experts would have been noticed; None if there is only one expert.
        tolerance: the tolerance that was applied.
        sensitivity: how many times the precision's own tolerance that is, for the quantity where it is most.
    """

    images: int
    image_source: str
    backend: str
    pieces: list[PieceResult]
    logits_max_abs_error: float
    logits_max_error: float
    probability_max_error: float
    top1_agreement: float
    routing_agreement: float | None
    route_flips: list[Change]
    class_changes: list[Change]
    gates_apart: float | None
    eyesight: Eyesight | None
    tolerance: dict[str, float]
    sensitivity: float = 1.0


class OutOfToleranceError(VerificationError):
    """A difference that is larger than allowed, but would be none at a wider tolerance.

    Attributes:
        tolerances: the difference as a multiple of what is allowed.
    """

    def __init__(self, message: str, tolerances: float) -> None:
        super().__init__(message)
        self.tolerances = tolerances


@dataclass(frozen=True)
class Measure:
    """One way in which two outputs differ.

    Attributes:
        field: the tolerance's field that decides.
        what: what differs, in words and with its unit.
        error: the difference.
        allowed: the largest difference that is allowed.
    """

    field: Literal["logits", "probabilities", "channels"]
    what: str
    error: float
    allowed: float

    @property
    def tolerances(self) -> float:
        """The error as a share of what is allowed."""
        return self.error / self.allowed


def verify(
    split: SplitModel,
    bundle: Bundle,
    backend: Backend,
    images: Tensor,
    image_source: str,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Compares every piece, every expert (by forced routing) and the whole bundle with PyTorch.

    A bundle that is out of its precision's tolerance may be right all the same, if the model is sensitive to rounding.
    So what rounding does to PyTorch itself is measured then, and :data:`ROOM` times as much is allowed, up to
    :data:`MOST` times the tolerance.

    Args:
        split: the pieces as torch modules.
        bundle: the bundle as written.
        backend: runs the bundle's pieces.
        images: preprocessed images ``[n, 3, S, S]`` float32; n ≥ 1.
        image_source: where the images came from, for the report.
        progress: called with each step.

    Raises:
        VerificationError: a piece or the whole bundle is out of tolerance; the message says which and by how much.
    """
    precision = exporter_of(bundle.manifest.target).precision(bundle.manifest.precision)
    try:
        return _verify(split, bundle, backend, images, image_source, precision.tolerance, progress)
    except OutOfToleranceError as error:
        if precision.rounds is None or error.tolerances > MOST:
            raise
        progress("measuring what rounding does to PyTorch itself")
        rounded = RoundedBackend(split, precision.rounds)
        tolerance = _widened(
            precision.tolerance, rounding_measures(split, bundle, rounded, images, precision.tolerance)
        )
        if tolerance == precision.tolerance:
            raise
    report = _verify(split, bundle, backend, images, image_source, tolerance, progress)
    report.sensitivity = tolerance.margin / precision.tolerance.margin
    return report


def rounding_measures(
    split: SplitModel, bundle: Bundle, rounded: RoundedBackend, images: Tensor, tolerance: Tolerance
) -> list[Measure]:
    """By how much PyTorch with rounding differs from PyTorch, everywhere that a bundle is compared with it."""
    measures = []
    for piece, inputs in split.reference_inputs(images, IMAGES_PER_EXPERT, GATES):
        found = rounded.load(piece)(*(tensor.numpy() for tensor in inputs))
        for name, value, right in zip(piece.outputs, found, piece(*inputs), strict=True):
            measures += measure(name, value, right.numpy(), tolerance)
    if split.routing is not None:
        images = torch.cat([images, images_between_experts(split, images, bundle.manifest.preprocessing)])
    parts = images.split(BATCH)
    theirs = np.concatenate([split.model(part).detach().numpy() for part in parts])
    runtime, wanted = Runtime(bundle, rounded), None
    if split.routing is not None:
        wanted = top_k(np.concatenate([reference_probabilities(split, part) for part in parts]), split.routing.k)
    return measures + measure(LOGITS, _run(runtime, images.numpy(), wanted)[0], theirs, tolerance)


def _widened(tolerance: Tolerance, rounding: list[Measure]) -> Tolerance:
    """The tolerance for a model that rounding changes as measured; the margin of ties grows with the largest factor."""
    factors = {"logits": 1.0, "probabilities": 1.0, "channels": 1.0}
    for each in rounding:
        factors[each.field] = max(factors[each.field], min(ROOM * each.tolerances, MOST))
    factors["margin"] = max(factors.values())
    return replace(tolerance, **{field: getattr(tolerance, field) * factor for field, factor in factors.items()})


def _verify(
    split: SplitModel,
    bundle: Bundle,
    backend: Backend,
    images: Tensor,
    image_source: str,
    tolerance: Tolerance,
    progress: Callable[[str], None],
) -> Report:
    results = []
    families: dict[tuple[str, int | None], list[tuple[PieceModule, Array]]] = {}
    for piece, inputs in split.reference_inputs(images, IMAGES_PER_EXPERT, GATES):
        progress(f"{piece.name}: verifying")
        expected = [tensor.numpy() for tensor in piece(*inputs)]
        results.append(
            check_piece(piece, inputs, expected=expected, bundle=bundle, backend=backend, tolerance=tolerance)
        )
        if piece.expert is not None:
            families.setdefault((piece.role, piece.layer), []).append((piece, expected[0]))
    progress("verifying end to end")
    report = _end_to_end(split, bundle, backend=backend, images=images, tolerance=tolerance)
    report.pieces, report.image_source = results, image_source
    report.eyesight = _eyesight(list(families.values()), bundle, tolerance)
    return report


def check_piece(
    piece: PieceModule,
    inputs: list[Tensor],
    expected: list[Array],
    bundle: Bundle,
    backend: Backend,
    tolerance: Tolerance,
) -> PieceResult:
    """Compares one piece with its torch module's outputs for the same inputs.

    Raises:
        ExportError: the backend refuses to load or run the piece.
        VerificationError: the piece fails, returns another shape or values that are not finite, or is out of tolerance.
    """
    where = f"{bundle.path.name}: {piece.name}"
    written = bundle.piece(piece.role, piece.expert, piece.layer)
    try:
        actual = backend.load(written)(*(tensor.numpy() for tensor in inputs))
    except BackendError as error:
        raise refusal(piece.name, backend.name, error) from error
    except MvmoeError:
        raise
    except Exception as error:
        raise VerificationError(f"{where}: does not run on {backend.name} ({first_line(error)})") from error
    by_name = dict(zip([spec.name for spec in written.outputs], actual, strict=True))
    measures = []
    absolute = 0.0
    for name, right in zip(piece.outputs, expected, strict=True):
        check_output(name, by_name[name], right, f"{where}: output {name!r}")
        measures += measure(name, by_name[name], right, tolerance)
        absolute = max(absolute, _max_abs(by_name[name], right))
    check_measures(measures, where, bundle)
    if "top_classes" in by_name:
        check_ranking(by_name[LOGITS], by_name["top_probabilities"], by_name["top_classes"], where)
    return PieceResult(
        piece.name, absolute, max(each.error for each in measures), max(each.tolerances for each in measures)
    )


def check_output(name: str, actual: Array, expected: Array, where: str) -> None:
    """Refuses an output that is wrong at any tolerance.

    Raises:
        VerificationError: the shapes differ, values on either side are not finite, probabilities are impossible, or a
            class is masked on one side only.
    """
    differences.check_comparable(actual, expected, where)
    if name == "probabilities":
        differences.check_probabilities(expected, where, "PyTorch's")
        differences.check_probabilities(actual, where, "the bundle's")
    elif name == LOGITS:
        differences.check_masks(actual, differences.logit_scale(expected), where)


def measure(name: str, actual: Array, expected: Array, tolerance: Tolerance) -> list[Measure]:
    """Measures how much an output of a piece differs, in the units in which such an output is judged."""
    if name == LOGITS:
        scale = differences.logit_scale(expected)
        errors = differences.logit_errors(actual, expected, scale)
        probabilities = differences.class_errors(actual, expected, scale)
        return [
            Measure("logits", "spreads of the logits", float(errors.max()), tolerance.logits),
            Measure(
                "probabilities",
                "of a class's probability",
                float(probabilities.max()),
                tolerance.probabilities * differences.sharpness(scale),
            ),
        ]
    if name == "probabilities":
        worst = float(differences.router_errors(actual, expected).max())
        what = "of the router's margin, in logarithms of its probabilities"
        return [Measure("channels", what, worst, tolerance.channels)]
    worst = float(differences.channel_errors(actual, expected).max(initial=0.0))
    return [Measure("channels", f"of a channel's scale in {name}", worst, tolerance.channels)]


def check_measures(measures: list[Measure], where: str, bundle: Bundle) -> None:
    """Refuses measures that are out of tolerance.

    Raises:
        OutOfToleranceError: the worst measure is out of tolerance; the message has its unit.
    """
    worst = max(measures, key=lambda each: each.tolerances)
    if not worst.tolerances <= 1:
        raise OutOfToleranceError(
            f"{where}: differs from PyTorch by {worst.error:.2g} {worst.what}, {worst.allowed:.2g} is allowed at "
            f"{bundle.manifest.precision}; no bundle was written",
            worst.tolerances,
        )


def check_ranking(
    logits: NDArray[np.floating[Any]],
    probabilities: NDArray[np.floating[Any]],
    classes: NDArray[np.integer[Any]],
    where: str,
) -> None:
    """Compares the classes that a piece ranks itself with the logits that it returns beside them.

    The piece's own logits are used, not PyTorch's, because classes whose probabilities differ only in the last bits may
    come in either order.

    Args:
        logits: the piece's logits, ``[B, C]``.
        probabilities: probabilities of the ranked classes, ``[B, n]``.
        classes: indices of the ranked classes, ``[B, n]``.
        where: what to call the piece in errors.

    Raises:
        VerificationError: the probabilities are not those of softmax, or other classes are more probable.
    """
    expected = differences.softmax(logits)
    if classes.shape != probabilities.shape or not ((classes >= 0) & (classes < logits.shape[1])).all():
        raise VerificationError(f"{where}: ranks classes that do not exist")
    best = -np.sort(-expected, axis=1)[:, : classes.shape[1]]
    for wanted in (best, np.take_along_axis(expected, classes, axis=1)):
        differences.check_comparable(probabilities, wanted, f"{where}: ranking")
        error = _max_abs(probabilities, wanted)
        if error > RANKING_ERROR:
            raise VerificationError(f"{where}: ranks classes otherwise than its logits do, by {error:.2e}")


def _max_abs(actual: Array, expected: Array) -> float:
    return float(np.abs(actual.astype(np.float64) - expected).max(initial=0.0))


def _end_to_end(split: SplitModel, bundle: Bundle, backend: Backend, images: Tensor, tolerance: Tolerance) -> Report:
    where = f"{bundle.path.name}: end to end"
    runtime = Runtime(bundle, backend, max_resident=1 if split.routing else None)
    ours, routed = _run(runtime, images.numpy())
    with torch.no_grad():
        parts = images.split(BATCH)
        theirs = np.concatenate([split.model(part).numpy() for part in parts])
    top = ours.argmax(axis=1)
    flips: list[Change] = []
    if split.routing is not None and routed is not None:
        probabilities = np.concatenate([reference_probabilities(split, part) for part in parts])
        wanted = top_k(probabilities, split.routing.k)
        flips = route_flips(probabilities, wanted, routed.experts, tolerance)
        rows = np.array([flip.image for flip in flips], int)
        if len(rows):  # their logits must be right as well, and PyTorch's are known only for its own route
            ours[rows] = _run(runtime, images.numpy()[rows], wanted[rows])[0]
    check_output(LOGITS, ours, theirs, f"{where}: logits")
    measures = measure(LOGITS, ours, theirs, tolerance)
    changes = class_changes(theirs, ours.argmax(axis=1), tolerance)
    report = Report(
        images=len(images),
        image_source="",
        backend=backend.name,
        pieces=[],
        logits_max_abs_error=_max_abs(ours, theirs),
        logits_max_error=measures[0].error,
        probability_max_error=measures[1].error,
        top1_agreement=float((top == theirs.argmax(axis=1)).mean()),
        routing_agreement=None if split.routing is None else 1 - len(flips) / len(images),
        route_flips=flips,
        class_changes=changes,
        gates_apart=None,
        eyesight=None,
        tolerance=asdict(tolerance),
    )
    check_measures(measures, where, bundle)
    allowed = int((1 - tolerance.agreement) * len(images))
    for what, found in (("routed otherwise", flips), ("given another top-1 class", changes)):
        wrong = [change for change in found if not change.tie]
        if len(wrong) > allowed:
            worst = max(wrong, key=lambda change: change.margin)
            raise OutOfToleranceError(
                f"{where}: {len(wrong)} of {len(images)} images are {what} than by PyTorch, {allowed} are allowed at "
                f"{bundle.manifest.precision}; PyTorch prefers {worst.reference} to {worst.bundle} by "
                f"{worst.margin:.2g} spreads for image {worst.image}; no bundle was written",
                worst.margin / tolerance.margin,
            )
    if split.routing is not None:
        report.gates_apart = _check_gates(split, runtime, images, tolerance)
    return report


def _check_gates(split: SplitModel, runtime: Runtime, images: Tensor, tolerance: Tolerance) -> float:
    """Runs images whose gates are far from 1, and measures how well they show whether gates are applied correctly.

    With a confident router, every image has a gate of about 1, and then multiplying by the gate and renormalising it
    give the same result. Blends of two images that are routed differently include one at which both routes are equally
    probable.

    Returns:
        The number of tolerances by which the logits would differ if gates were renormalised.

    Raises:
        VerificationError: logits are out of tolerance.
    """
    bundle = runtime.bundle
    assert split.routing is not None
    few = images[:IMAGES_PER_EXPERT]
    between = images_between_experts(split, images, bundle.manifest.preprocessing)
    if len(between):
        right = split.model(between).detach().numpy()
        wanted = top_k(reference_probabilities(split, between), split.routing.k)
        found, _ = _run(runtime, between.numpy(), wanted)  # the route is forced, because here it is a tie
        where = f"{bundle.path.name}: end to end, images between two experts"
        check_output(LOGITS, found, right, f"{where}: logits")
        check_measures(measure(LOGITS, found, right, tolerance), where, bundle)
        few = torch.cat([few, between])
    right = split.model(few).detach().numpy()
    wrong = torch.cat([_with_renormalised_gates(split, image[None]) for image in few]).numpy()
    return max(each.tolerances for each in measure(LOGITS, wrong, right, tolerance))


def images_between_experts(
    split: SplitModel, images: Tensor, preprocessing: Preprocessing, count: int = 4, halvings: int = 6
) -> Tensor:
    """Blends of two images each, near the point where the router changes its mind; none if all are routed alike.

    Blends are rounded to 8 bits per channel, as images are: some bundles take pixels.

    Args:
        split: the reference.
        images: preprocessed images, ``[n, 3, S, S]``.
        preprocessing: how these images were preprocessed.
        count: number of blends.
        halvings: how near to that point: within 2^-halvings of the way from one image to the other.
    """
    assert split.routing is not None
    k = split.routing.k

    def routes(batch: Tensor) -> NDArray[np.int64]:
        return np.sort(top_k(reference_probabilities(split, batch), k))

    some = images[: 4 * IMAGES_PER_EXPERT]
    found = routes(some)
    others = np.flatnonzero((found != found[0]).any(axis=1))[:count].tolist()
    near, far = some[:1].expand(len(others), -1, -1, -1), some[others]
    for _ in range(halvings if others else 0):
        middle = torch.from_numpy(nearest_image(((near + far) / 2).numpy(), preprocessing))
        alike = torch.from_numpy((routes(middle) == found[0]).all(axis=1))[:, None, None, None]
        near, far = torch.where(alike, middle, near), torch.where(alike, far, middle)
    return near


def _with_renormalised_gates(split: SplitModel, image: Tensor) -> Tensor:
    """The model's logits as they would be if an image's gates were renormalised to sum to 1."""
    assert split.routing is not None
    probabilities = reference_probabilities(split, image)
    chosen = top_k(probabilities, split.routing.k)[0].tolist()
    gates = torch.from_numpy(probabilities[0, chosen] / probabilities[0, chosen].sum())[:, None]
    x = split.of("trunk")[0](image)[0]
    if split.routing.k == 1:
        result: Tensor = split.of("tail")[chosen[0]](x, gates[0])[0]
        return result
    segments = {(piece.expert, piece.layer): piece for piece in split.of("expert_layer")}
    for attention in split.of("attention"):
        x, expert_input = attention(x)
        addends = [
            segments[expert, attention.layer](expert_input, gate)[0] for expert, gate in zip(chosen, gates, strict=True)
        ]
        x = x + sum(addends)
    return split.of("head")[0](x)[0]


def _run(
    runtime: Runtime, images: NDArray[np.float32], experts: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float32], RoutedBatch | None]:
    """Runs any number of images, in batches."""
    parts = []
    for start in range(0, len(images), BATCH):
        rows = slice(start, start + BATCH)
        parts.append(runtime.run(images[rows], None if experts is None else experts[rows]))
    routes = [routed for _, routed in parts if routed is not None]
    logits = np.concatenate([logits for logits, _ in parts])
    if not routes:
        return logits, None
    together = (
        np.concatenate([getattr(routed, name) for routed in routes]) for name in ("probabilities", "experts", "gates")
    )
    return logits, RoutedBatch(*together)


def route_flips(
    probabilities: Array, wanted: NDArray[np.int64], found: NDArray[np.int64], tolerance: Tolerance
) -> list[Change]:
    """Images that the bundle sends to other experts than PyTorch does; the order of an image's experts does not count.

    Args:
        probabilities: the probabilities of PyTorch's router, ``[B, E]``.
        wanted: experts that PyTorch chose, ``[B, k]``.
        found: experts that the bundle chose, ``[B, k]``.
        tolerance: its margin says what is a tie.
    """
    likely = differences.likely_scores(probabilities)
    scores = np.log(np.maximum(probabilities.astype(np.float64), differences.LEAST_PROBABILITY))
    # a router that hardly decides is judged as if its scores differed by a tenth
    spread = np.maximum(differences.logit_scale(scores).spread[:, 0], differences.UNDECIDED)
    flips = []
    for image in range(len(scores)):
        lost, gained = set(wanted[image].tolist()), set(found[image].tolist())
        if lost != gained:
            best = max(lost - gained, key=lambda expert: scores[image, expert])
            least = min(gained - lost, key=lambda expert: scores[image, expert])
            margin = float(likely[image, best] - likely[image, least]) / float(spread[image])
            chosen = wanted[image].tolist(), found[image].tolist()
            flips.append(Change(image, *chosen, margin, margin <= tolerance.margin))
    return flips


def class_changes(logits: Array, found: NDArray[np.int64], tolerance: Tolerance) -> list[Change]:
    """Images whose top-1 class differs in the bundle.

    Args:
        logits: PyTorch's logits, ``[B, C]``.
        found: the bundle's top-1 classes, ``[B]``.
        tolerance: its margin says what is a tie.
    """
    spread = differences.logit_scale(logits).spread[:, 0]
    changes = []
    for image in np.flatnonzero(logits.argmax(axis=1) != found).tolist():
        right, wrong = int(logits[image].argmax()), int(found[image])
        margin = float(logits[image, right].astype(np.float64) - logits[image, wrong]) / float(spread[image])
        changes.append(Change(image, [right], bundle=[wrong], margin=margin, tie=margin <= tolerance.margin))
    return changes


def _eyesight(families: list[list[tuple[PieceModule, Array]]], bundle: Bundle, tolerance: Tolerance) -> Eyesight | None:
    """Tells experts apart: by PyTorch's outputs for the same inputs, or else by the weights in the bundle.

    Args:
        families: the experts of each layer, in order, with their outputs.
        bundle: the bundle as written.
        tolerance: the differences that outputs may show.

    Raises:
        VerificationError: a piece holds another expert's weights.
    """
    closest = Eyesight(np.inf, [], "outputs", 0)
    for family in families:
        alike = []
        for a, b in neighbours([outputs for _, outputs in family]):
            apart = distance(family[a][0].outputs[0], family[a][1], family[b][1], tolerance)
            if apart < SEEN:
                alike.append((family[a][0], family[b][0]))
            if apart < closest.tolerances:
                closest.tolerances, closest.experts = apart, [a, b]
        if alike:
            by, copies = _by_weights(alike, bundle)
            closest.copies += copies
            if closest.told_apart_by != "nothing":
                closest.told_apart_by = by
    return closest if closest.experts else None


def neighbours(outputs: list[Array]) -> list[tuple[int, int]]:
    """Pairs of experts to compare: all pairs of few experts, and of many each expert with those nearest to it.

    The nearest are found by Euclidean distance, which one product of matrices gives for all pairs.
    """
    if len(outputs) <= FEW:
        return list(combinations(range(len(outputs)), 2))
    points = np.stack([output.astype(np.float64).ravel() for output in outputs])
    points -= points.mean(axis=0)
    squares = (points**2).sum(axis=1)
    apart = squares[:, None] + squares - 2 * points @ points.T
    np.fill_diagonal(apart, np.inf)
    nearest = np.argsort(apart, axis=1, kind="stable")[:, :NEAREST].tolist()
    return sorted({(min(a, b), max(a, b)) for a, row in enumerate(nearest) for b in row})


def _by_weights(alike: list[tuple[PieceModule, PieceModule]], bundle: Bundle) -> tuple[str, int]:
    """Tells similar experts of one layer apart by their stored weights.

    Returns:
        ``weights``, or ``nothing`` if some weights cannot be read, and the number of pairs of experts with equal
        weights.
    """
    read = weights_reader_of(bundle.manifest.target)
    if read is None:
        return "nothing", 0
    pieces = {piece.name: piece for pair in alike for piece in pair}
    stored = dict(zip(pieces, read(list(pieces.values()), bundle), strict=True))
    by, copies, held = "weights", 0, set()
    for pair in alike:
        a, b = (stored[piece.name] for piece in pair)
        if same_weights(a, b):
            copies += 1
            if pair[0].name in held and pair[1].name in held:
                continue
        for piece, own, other in ((pair[0], a, b), (pair[1], b, a)):
            verdict = whose(own, other)
            if verdict == "other":
                wrong = pair[0] if piece is pair[1] else pair[1]
                raise VerificationError(
                    f"{bundle.path.name}: {piece.name}: holds the weights of {wrong.name}; no bundle was written"
                )
            if verdict == "unknown":
                by = "nothing"
            elif verdict == "equal":
                held.add(piece.name)
    return by, copies


def distance(name: str, a: Array, b: Array, tolerance: Tolerance) -> float:
    """How many tolerances apart two experts' outputs are; the result is the same with the two exchanged."""
    return min(max(each.tolerances for each in measure(name, x, y, tolerance)) for x, y in ((a, b), (b, a)))


def reference_probabilities(split: SplitModel, images: Tensor) -> NDArray[np.float32]:
    """The probabilities ``[B, E]`` that PyTorch's router gives to preprocessed images ``[B, 3, S, S]``."""
    outputs = split.of("trunk")[0](images)
    for router in split.of("router"):
        outputs = [*outputs, router(outputs[0])[0]]
    probabilities: NDArray[np.float32] = outputs[1].numpy()
    return probabilities
