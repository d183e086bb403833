"""Verification: the pieces that were written, run by a backend, against the PyTorch model they came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvmoe_deploy.backends import Backend
from mvmoe_deploy.bundle import Bundle
from mvmoe_deploy.errors import MvmoeError, VerificationError, first_line
from mvmoe_deploy.exporters.exporter import exporter_of
from mvmoe_deploy.exporters.precision import Tolerance
from mvmoe_deploy.exporters.split import PieceModule, Split
from mvmoe_deploy.runtime import Runtime, top_k

RANKING_ERROR = 1e-5
"""Of a probability that a graph computes from its own logits, both in fp32."""


IMAGES_PER_EXPERT = 8
"""Images that every expert is run on; end to end, all images are."""


class PieceResult(msgspec.Struct):
    """Worst errors of one piece over all its outputs."""

    piece: str
    max_abs_error: float
    max_relative_error: float


class Report(msgspec.Struct):
    """What verification saw; goes into the manifest.

    Attributes:
        images: number of images.
        image_source: where they came from.
        backend: what ran the pieces.
        pieces: errors per piece, each fed the reference's inputs.
        logits_max_abs_error: end to end, images that were routed alike.
        top1_agreement: share of images with the same top-1 class end to end.
        routing_agreement: share of images sent to the same experts; None for a dense model.
        route_flips: images routed otherwise: index, reference's and bundle's experts, and by how much the
            reference preferred its own.
        tolerance: what was allowed.
    """

    images: int
    image_source: str
    backend: str
    pieces: list[PieceResult]
    logits_max_abs_error: float
    top1_agreement: float
    routing_agreement: float | None
    route_flips: list[dict[str, Any]]
    tolerance: dict[str, float]


def verify(
    split: Split,
    bundle: Bundle,
    backend: Backend,
    images: Tensor,
    image_source: str,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Runs every piece, every expert by forced routing, and the whole, against PyTorch.

    Args:
        split: the pieces as torch modules.
        bundle: as written.
        backend: runs the bundle's pieces.
        images: preprocessed, ``[n, 3, S, S]`` float32; n ≥ 1.
        image_source: what to call them in the report.
        progress: called with each step.

    Raises:
        VerificationError: a piece or the whole is out of tolerance; the message says which and by how much.
    """
    tolerance = exporter_of(bundle.manifest.target).precision(bundle.manifest.precision).tolerance
    results = []
    for piece, inputs in _reference_inputs(split, images):
        progress(f"{piece.name}: verifying")
        results.append(check_piece(piece, inputs, bundle, backend, tolerance))
    progress("verifying end to end")
    report = _end_to_end(split, bundle, backend, images, tolerance)
    report.pieces, report.image_source = results, image_source
    return report


def check_piece(
    piece: PieceModule, inputs: list[Tensor], bundle: Bundle, backend: Backend, tolerance: Tolerance
) -> PieceResult:
    """Compares one piece with its torch module on the same inputs.

    Raises:
        VerificationError: it cannot be loaded or run, gives another shape or values that are not finite, or is out
            of tolerance.
    """
    where = f"{bundle.path.name}: {piece.name}"
    expected = [tensor.numpy() for tensor in piece(*inputs)]
    written = bundle.piece(piece.role, piece.expert, piece.layer)
    try:
        actual = backend.load(written)(*(tensor.numpy() for tensor in inputs))
    except MvmoeError:
        raise
    except Exception as error:
        raise VerificationError(f"{where}: does not run on {backend.name} ({first_line(error)})") from error
    absolute = relative = 0.0
    by_name = dict(zip([spec.name for spec in written.outputs], actual, strict=True))
    for name, b in zip(piece.outputs, expected, strict=True):
        a = by_name[name]
        worst = max_error(a, b, f"{where}: output {name!r}")
        absolute, relative = max(absolute, worst), max(relative, worst / max(float(np.abs(b).max()), 1e-12))
    if not relative <= tolerance.relative:
        raise VerificationError(
            f"{where}: differs from PyTorch by {absolute:.2e} ({relative:.2e} of its largest value), "
            f"{tolerance.relative:.0e} is allowed at {bundle.manifest.precision}; no bundle was written"
        )
    if "top_classes" in by_name:
        check_ranking(by_name["logits"], by_name["top_probabilities"], by_name["top_classes"], where)
    return PieceResult(piece.name, absolute, relative)


def check_ranking(
    logits: NDArray[np.floating], probabilities: NDArray[np.floating], classes: NDArray[np.integer], where: str
) -> None:
    """Compares the classes that a piece ranks itself with the logits it returns beside them.

    With its own, not PyTorch's: classes that are equally probable but for the last bits may come in either order.

    Args:
        logits: ``[B, C]``.
        probabilities: of the ranked classes, ``[B, n]``.
        classes: their indices ``[B, n]``.
        where: for errors.

    Raises:
        VerificationError: other probabilities than softmax gives these classes, or others are more probable.
    """
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    if classes.shape != probabilities.shape or not ((classes >= 0) & (classes < logits.shape[1])).all():
        raise VerificationError(f"{where}: ranks classes that do not exist")
    best = -np.sort(-expected, axis=1)[:, : classes.shape[1]]
    for wanted in (best, np.take_along_axis(expected, classes, axis=1)):
        error = max_error(probabilities, wanted, f"{where}: ranking")
        if error > RANKING_ERROR:
            raise VerificationError(f"{where}: ranks classes otherwise than its logits do, by {error:.2e}")


def max_error(actual: NDArray[np.floating], expected: NDArray[np.floating], where: str) -> float:
    """Largest absolute difference.

    Raises:
        VerificationError: another shape, or values that are not finite where the reference's are.
    """
    if actual.shape != expected.shape:
        raise VerificationError(f"{where}: has shape {list(actual.shape)}, PyTorch's has {list(expected.shape)}")
    if not np.isfinite(actual).all():
        raise VerificationError(f"{where}: holds values that are NaN or infinite")
    return float(np.abs(actual.astype(np.float64) - expected).max(initial=0.0))


def _reference_inputs(split: Split, images: Tensor) -> list[tuple[PieceModule, list[Tensor]]]:
    """Each piece with inputs that the reference gives it: all images, or a few for the E copies of one graph."""
    if split.routing is None:
        return [(split.pieces[0], [images])]
    (trunk,) = split.of("trunk")
    tokens = trunk(images)[0]
    pairs = [(trunk, [images])]
    for router in split.of("router"):
        pairs.append((router, [tokens]))
    few = tokens[:IMAGES_PER_EXPERT]
    # Not the router's own gates: a trained router gives the experts it does not choose next to nothing, and a wrong
    # expert multiplied by 1e-6 agrees with any other.
    gate = torch.linspace(0.5, 1.0, len(few))
    for tail in split.of("tail"):
        pairs.append((tail, [few, gate]))
    for attention in split.of("attention"):
        residual, expert_input = attention(few)
        pairs.append((attention, [few]))
        for segment in split.of("expert_layer"):
            if segment.layer == attention.layer:
                pairs.append((segment, [expert_input, gate]))
                residual = residual + segment(expert_input, gate)[0]
        few = residual
    return pairs + [(head, [few]) for head in split.of("head")]


def _end_to_end(
    split: Split, bundle: Bundle, backend: Backend, images: Tensor, tolerance: Tolerance, batch: int = 32
) -> Report:
    runtime = Runtime(bundle, backend, max_resident=1 if split.routing else None)
    logits, reference, experts, preferred = [], [], [], []
    with torch.no_grad():
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            ours, routed = runtime.run(part.numpy())
            logits.append(ours)
            reference.append(split.model(part).numpy())
            if routed is not None:
                experts.append(routed.experts)
                preferred.append(_reference_probabilities(split, part))
    ours, theirs = np.concatenate(logits), np.concatenate(reference)
    same_route = np.ones(len(ours), bool)
    flips: list[dict[str, Any]] = []
    if split.routing is not None:
        chosen, probabilities = np.concatenate(experts), np.concatenate(preferred)
        wanted = top_k(probabilities, split.routing.k)
        same_route = (np.sort(chosen) == np.sort(wanted)).all(axis=1)
        for row in np.flatnonzero(~same_route).tolist():
            least = probabilities[row, wanted[row]].min()
            margin = float(least - probabilities[row, np.setdiff1d(chosen[row], wanted[row])].min())
            flips.append(
                {"image": row, "reference": wanted[row].tolist(), "bundle": chosen[row].tolist(), "margin": margin}
            )
    worst = max_error(ours[same_route], theirs[same_route], f"{bundle.path.name}: logits")
    scale = max(float(np.abs(theirs).max(initial=0)), 1e-12)
    top, right = ours.argmax(1), theirs.argmax(1)
    rows = np.arange(len(ours))
    # equal within the error that is allowed: then either class is right
    tied = np.abs(theirs[rows, right] - theirs[rows, top]) <= 2 * tolerance.margin * scale
    top1 = float((top == right).mean())
    excused = np.array([flip["image"] for flip in flips if flip["margin"] < tolerance.margin], dtype=int)
    wrong_route = len(flips) - len(excused)
    wrong_top = ~((top == right) | (tied & same_route))
    wrong_top[excused] = False
    report = Report(
        len(images),
        "",
        backend.name,
        [],
        worst,
        top1,
        None if split.routing is None else float(same_route.mean()),
        flips,
        {"relative": tolerance.relative, "agreement": tolerance.agreement, "margin": tolerance.margin},
    )
    allowed = (1 - tolerance.agreement) * len(images)
    where = f"{bundle.path.name}: end to end"
    if worst > tolerance.relative * scale:
        raise VerificationError(
            f"{where}: logits differ from PyTorch by {worst:.2e} ({worst / scale:.2e} of the largest), "
            f"{tolerance.relative:.0e} is allowed at {bundle.manifest.precision}; no bundle was written"
        )
    for what, wrong in (("routed otherwise", wrong_route), ("given another top-1 class", int(wrong_top.sum()))):
        if wrong > allowed:
            raise VerificationError(
                f"{where}: {wrong} of {len(images)} images are {what} than by PyTorch, "
                f"{int(allowed)} are allowed at {bundle.manifest.precision}; no bundle was written"
            )
    return report


def _reference_probabilities(split: Split, images: Tensor) -> NDArray[np.float32]:
    outputs = split.of("trunk")[0](images)
    for router in split.of("router"):
        outputs = [*outputs, router(outputs[0])[0]]
    return outputs[1].numpy()
