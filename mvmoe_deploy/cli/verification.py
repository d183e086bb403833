"""How a bundle was verified, as text that both ``mvmoe-export`` and ``mvmoe-inspect`` print."""

from __future__ import annotations

from typing import Any

from mvmoe_deploy.bundle import Bundle
from mvmoe_deploy.terminal import counted, number

SHOWN = 5
"""Most images that are listed of those with another route, or another class, than PyTorch gives."""


def verification_lines(bundle: Bundle) -> list[str]:
    """The manifest's verification report as text, one sentence per line; empty if there is no report."""
    report = bundle.manifest.verification
    if not report:
        return []
    try:
        return _lines(report, bundle.manifest.precision)
    except (KeyError, TypeError, ValueError, AttributeError):  # the manifest does not fix its form
        return ["verified: the report has another form than this release prints; --json shows it"]


def selftest_line(bundle: Bundle) -> str:
    """What a bundle carries to prove itself on a device."""
    manifest = bundle.manifest
    if manifest.selftest is None:
        return "self-test: none, so no device can tell whether it runs this bundle as it should"
    of_pieces = {path for piece in manifest.pieces for path in piece.files}
    own = [file for file in manifest.files if file.path not in of_pieces]
    pictures = counted(len(own) - 1, "picture")
    return f"self-test: {pictures}, {sum(file.bytes for file in own) / 1e3:.1f} kB; mvmoe-inspect --selftest runs it"


def _lines(report: dict[str, Any], precision: str) -> list[str]:
    backends = " and ".join([report["backend"], *report.get("verified_as_well_with", [])])
    lines = [f"verified with {backends} on {report['images']} images ({report['image_source']}):"]
    worst = max(report["pieces"], key=lambda piece: piece["tolerances"])
    lines += [
        f"  {worst['piece']} differs most from PyTorch, by {worst['tolerances']:.1%} of what {precision} allows",
        f"  end to end, logits differ by at most {report['logits_max_error']:.1e} spreads, "
        f"probabilities by at most {report['probability_max_error']:.1e}",
        f"  top-1 agreement {report['top1_agreement']:.1%}",
    ]
    if report.get("sensitivity", 1) > 1:
        lines.append(
            f"  {precision} changes this model more than others: going by what its rounding does to PyTorch itself, "
            f"{number(report['sensitivity'])} times the usual tolerance was allowed"
        )
    lines += _changes(report["class_changes"], "given class", report["tolerance"]["margin"])
    if report["routing_agreement"] is not None:
        lines.append(f"  routing agreement {report['routing_agreement']:.1%}")
        lines += _changes(report["route_flips"], "routed to", report["tolerance"]["margin"])
    if report["gates_apart"] is not None:
        off = f"{number(report['gates_apart'])} tolerances off"
        lines.append(f"  if gates were left out or renormalised, logits would be {off} on these images")
    if report["eyesight"] is not None:
        lines += _eyesight(report["eyesight"])
    return lines


def _changes(changes: list[dict[str, Any]], what: str, margin: float) -> list[str]:
    lines = []
    for change in changes[:SHOWN]:
        mine, reference = (", ".join(map(str, change[side])) for side in ("bundle", "reference"))
        tie = f"a tie, being within {margin:g}" if change["tie"] else "not a tie"
        lines.append(
            f"    image {change['image']} is {what} {mine}; PyTorch prefers {reference} "
            f"by {change['margin']:.1e} spreads ({tie})"
        )
    if len(changes) > SHOWN:
        lines.append(f"    and {len(changes) - SHOWN} more, see --json")
    return lines


def _eyesight(eyesight: dict[str, Any]) -> list[str]:
    a, b = eyesight["experts"]
    apart = f"{number(eyesight['tolerances'])} tolerances apart"
    lines = [f"  experts {a} and {b} are the most alike: their outputs are {apart}"]
    by = eyesight["told_apart_by"]
    if by == "outputs":
        lines.append("  so a wrong expert would have shown")
    else:
        lines.append("  so a wrong expert need not have shown: this does not verify which expert is which")
    if by == "weights":
        lines.append("  their weights in the bundle were compared with the checkpoint's instead, and are their own")
    if eyesight["copies"]:
        lines.append(f"  pairs of experts with equal weights, which nothing tells apart: {eyesight['copies']}")
    return lines
