"""The self-test: a few images that a bundle carries with the answers expected, and the verdict on a device's answers.

``docs/bundle-format.md`` has the format and the rules, which runtimes in other languages follow as well.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.bundle import Bundle, Index
from mvmoe_deploy.errors import BundleError, first_line

FILE = "selftest.json"
MAX_BYTES = 32 << 20
"""Largest self-test that is read."""

FAR_BELOW = 100.0
"""A class whose expected logit lies further below the best one is not compared: its probability, exp(-100), is 0 in
float32, and a class that a model masks, by a bias of -10,000 say, would make the spread of the others unseeably small.
"""

Floats = NDArray[np.float32]
Stage = Literal["pixels", "route", "gate", "logits"]
STAGES: tuple[Stage, ...] = ("pixels", "route", "gate", "logits")
Bound = Annotated[float, msgspec.Meta(gt=0.0, le=10.0)]


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far an answer may depart from the expected one.

    Attributes:
        gate: of a gate, absolute.
        logits: of a logit, in spreads; see :func:`logits_departure`.
    """

    gate: Bound
    logits: Bound


class Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image, and what the bundle answered where it was exported.

    Attributes:
        image: the image's file in the bundle, a lossless PNG.
        pixels: sha256 of the uint8 RGB pixels ``[S, S, 3]``, after cropping and resampling, before normalising.
        experts: the experts that the image is routed to, best first; empty for a dense model.
        gates: their gates.
        logits: little-endian float32 ``[C]``; in JSON as base64.
    """

    image: str
    pixels: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    experts: list[Index]
    gates: list[float]
    logits: bytes

    @property
    def values(self) -> Floats:
        """The logits as an array ``[C]``."""
        return np.frombuffer(self.logits, "<f4")


class Selftest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of ``selftest.json``."""

    tolerance: Tolerance
    cases: Annotated[list[Case], msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class Answer:
    """What a runtime answers for a case's image; the fields are those of :class:`Case`."""

    pixels: str
    experts: list[int]
    gates: list[float]
    logits: Floats


class CaseResult(msgspec.Struct, frozen=True):
    """A case's answer beside the expected one.

    Attributes:
        image: the case's file.
        failed: the first stage that failed; None if all passed.
        pixels: whether the pixels are equal.
        experts: the experts that the image was routed to.
        expected: the experts that it should be routed to.
        gate: largest departure of a gate.
        logits: largest departure of a logit, in spreads.
    """

    image: str
    failed: Stage | None
    pixels: bool
    experts: list[int]
    expected: list[int]
    gate: float
    logits: float


class StageResult(msgspec.Struct, frozen=True):
    """What one stage says of all cases.

    Attributes:
        stage: the stage.
        cases: number of cases.
        passed: how many of them passed.
        departure: the largest departure; None for the stages that ask for equality.
        tolerance: the largest departure allowed.
    """

    stage: Stage
    cases: int
    passed: int
    departure: float | None
    tolerance: float | None


class Verdict(msgspec.Struct, frozen=True):
    """Whether a device answers as the bundle did where it was exported.

    Attributes:
        passed: whether all cases passed every stage.
        failed: the first stage at which a case failed; None if none did. What follows from it fails as well, so this
            is where to look.
        stages: each stage; a dense model has no ``route`` and no ``gate``.
        cases: each case.
    """

    passed: bool
    failed: Stage | None
    stages: list[StageResult]
    cases: list[CaseResult]


def digest(pixels: NDArray[np.uint8]) -> str:
    """The sha256 of pixels ``[S, S, 3]``, uint8 RGB, in C order."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def read(bundle: Bundle) -> Selftest | None:
    """Reads a bundle's self-test and compares its files with the manifest; None if the bundle has none.

    Raises:
        BundleError: the self-test is damaged, or does not fit the bundle.
    """
    name = bundle.manifest.selftest
    if name is None:
        return None
    sizes = {file.path: file.bytes for file in bundle.manifest.files}
    file = bundle.path / name
    if sizes[name] > MAX_BYTES:
        raise BundleError(f"{file}: is larger than {MAX_BYTES >> 20} MiB; not a self-test")
    bundle.check([name])
    try:
        selftest = msgspec.json.decode(file.read_bytes(), type=Selftest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise BundleError(f"{file}: {first_line(error)}; export again") from None
    for number, case in enumerate(selftest.cases):
        problem = _problem(case, bundle)
        if problem:
            raise BundleError(f"{file}: case {number}: {problem}; export again")
    bundle.check([case.image for case in selftest.cases])
    return selftest


def _problem(case: Case, bundle: Bundle) -> str | None:
    """Why a case cannot be of this bundle; None if it can."""
    routing, classes = bundle.manifest.routing, len(bundle.manifest.class_names)
    experts, k = (routing.experts, routing.k) if routing else (0, 0)
    if case.image not in {file.path for file in bundle.manifest.files}:
        return f"its image {case.image[:200]!r} is not among the bundle's files"
    if len(case.experts) != k or len(case.gates) != k or any(expert >= experts for expert in case.experts):
        return f"it names experts {case.experts[:8]} with {len(case.gates)} gates; an image has {k} of {experts}"
    if len(case.logits) != 4 * classes:
        return f"it has {len(case.logits)} bytes of logits for {classes} classes"
    if not all(0 <= gate <= 1.001 for gate in case.gates) or not np.isfinite(case.values.max(initial=-np.inf)):
        return "a gate or a logit in it is not a number that a model can answer"
    return None


def write(folder: Path, selftest: Selftest) -> None:
    """Writes ``selftest.json``; the images are written by who makes them."""
    (folder / FILE).write_bytes(msgspec.json.format(msgspec.json.encode(selftest), indent=1) + b"\n")


def judge(selftest: Selftest, answers: list[Answer]) -> Verdict:
    """Compares a runtime's answers with the expected ones, case by case."""
    tolerance = selftest.tolerance
    allowed: dict[Stage, float] = {"gate": tolerance.gate, "logits": tolerance.logits}
    cases = [_judge_case(case, answer, allowed) for case, answer in zip(selftest.cases, answers, strict=True)]
    routed = any(case.expected for case in cases)
    stages = []
    for stage in STAGES if routed else ("pixels", "logits"):
        departures = [_departure(case, stage) for case in cases]
        most = allowed.get(stage, 0.0)
        stages.append(
            StageResult(
                stage=stage,
                cases=len(cases),
                passed=sum(departure <= most for departure in departures),
                departure=max(departures) if stage in allowed else None,
                tolerance=allowed.get(stage),
            )
        )
    failed = next((stage.stage for stage in stages if stage.passed < stage.cases), None)
    return Verdict(failed is None, failed, stages, cases)


def _judge_case(case: Case, answer: Answer, allowed: dict[Stage, float]) -> CaseResult:
    gates = [float("inf")]  # where there is no route
    if len(answer.gates) == len(case.gates):
        gates = [abs(found - wanted) for found, wanted in zip(answer.gates, case.gates, strict=True)]
    result = CaseResult(
        image=case.image,
        failed=None,
        pixels=answer.pixels == case.pixels,
        experts=answer.experts,
        expected=case.experts,
        gate=float(np.max(gates, initial=0.0)),
        logits=logits_departure(answer.logits, case.values),
    )
    failed = next((stage for stage in STAGES if not _departure(result, stage) <= allowed.get(stage, 0.0)), None)
    return msgspec.structs.replace(result, failed=failed)


def _departure(case: CaseResult, stage: Stage) -> float:
    """How far a case departs at a stage; 0 or 1 for the stages that ask for equality."""
    if stage == "pixels":
        return float(not case.pixels)
    if stage == "route":
        return float(case.experts != case.expected)
    return case.gate if stage == "gate" else case.logits


def logits_departure(found: Floats, expected: Floats) -> float:
    """The largest departure of a logit, in spreads; infinity if it cannot be told.

    Classes whose expected logit lies more than :data:`FAR_BELOW` below the best are left out, unless fewer than two
    remain. From both sides their own mean is taken, since a shift of all logits changes no answer. The spread is the
    standard deviation of the expected logits.

    Args:
        found: logits ``[C]`` of the device.
        expected: logits ``[C]`` where the bundle was exported.
    """
    compared = expected >= expected.max() - FAR_BELOW
    if compared.sum() < 2:
        compared = np.isfinite(expected)
    wanted, got = expected[compared].astype(np.float64), found[compared].astype(np.float64)
    if not np.isfinite(got).all():
        return float("inf")
    wanted, got = wanted - wanted.mean(), got - got.mean()
    largest, spread = float(np.abs(got - wanted).max()), float(wanted.std())
    return largest / spread if spread > 0 else float("inf") if largest else 0.0
