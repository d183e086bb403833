"""``mvmoe-inspect --selftest``: the verdict on a bundle's own cases, as a table or as JSON."""

from __future__ import annotations

from pathlib import Path

import msgspec

import mvmoe_deploy
from mvmoe_deploy.cli.common import progress_bar
from mvmoe_deploy.errors import BundleError, CheckFailed
from mvmoe_deploy.selftest import CaseResult, Stage, Verdict
from mvmoe_deploy.terminal import Cell, counted, folded, table

WHERE_TO_LOOK: dict[Stage, str] = {
    "pixels": "images are decoded or resampled differently here, so what follows departs as well",
    "route": "the trunk or the router computes something else here",
    "gate": "the experts chosen are right, but the trunk or the router is less exact here than the bundle allows",
    "logits": "the route is right, but the answer departs by more than the bundle allows",
}
"""What a failure means, by the first stage that fails."""


def run_selftest(path: Path, as_json: bool) -> None:
    """Runs a bundle's self-test and prints the verdict.

    Raises:
        BundleError: the bundle or its self-test is damaged, or it has none.
        CheckFailed: a stage failed; the verdict has been printed.
    """
    with mvmoe_deploy.load(path) as runtime:
        verdict = runtime.selftest(lambda items, total: progress_bar(items, total, "self-test"))
        backend = runtime.backend.name
    if verdict is None:
        raise BundleError(
            f"{path}: carries no self-test; it was exported with --selftest none, or by an old release: export again"
        )
    if as_json:
        result = {"bundle": str(path), "backend": backend, **msgspec.to_builtins(verdict)}
        print(msgspec.json.format(msgspec.json.encode(result), indent=1).decode())  # infinity becomes null
    else:
        print(describe(verdict, backend))
    if verdict.failed:
        (stage,) = [each for each in verdict.stages if each.stage == verdict.failed]
        cases = f"{stage.cases - stage.passed} of {counted(stage.cases, 'case')}"
        raise CheckFailed(f"{path}: self-test failed at {stage.stage}: {cases}; {WHERE_TO_LOOK[stage.stage]}")


def describe(verdict: Verdict, backend: str) -> str:
    """The verdict as two tables: each case, and each stage."""
    routed = any(stage.stage == "route" for stage in verdict.stages)
    cases = table(
        [_row(case, routed) for case in verdict.cases],
        ["case", "pixels", *(["route", "gate off by"] if routed else []), "logits off by", "verdict"],
    )
    stages = table(
        [
            [each.stage, f"{each.passed} of {each.cases}", _departure(each.departure), _departure(each.tolerance)]
            for each in verdict.stages
        ],
        ["stage", "passed", "largest departure", "allowed"],
    )
    said = [] if verdict.failed else ["", f"self-test passed: {backend} answers here as the bundle did when exported"]
    units = "pixels and routes have to be equal; gates are off by a probability, logits in standard deviations"
    return "\n".join([cases, "", stages, folded(units), *map(folded, said)])


def _row(case: CaseResult, routed: bool) -> list[Cell]:
    found, wanted = (", ".join(map(str, experts)) or "none" for experts in (case.experts, case.expected))
    route = found if found == wanted else f"{found}; expected {wanted}"
    verdict = f"fails at {case.failed}" if case.failed else "passes"
    pixels = "equal" if case.pixels else "differ"
    return [
        case.image,
        pixels,
        *([route, _departure(case.gate)] if routed else []),
        _departure(case.logits),
        verdict,
    ]


def _departure(value: float | None) -> str:
    if value is None or value == 0:
        return "–" if value is None else "0"
    return f"{value:.1e}" if value < float("inf") else "not a number"
