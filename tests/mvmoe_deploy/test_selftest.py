"""The self-test that a bundle carries: what is judged at which stage, what is refused, and what the command says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conformance import DEPARTURES, IMAGES, REFUSED_SELFTESTS, edit_selftest, flip, swap_experts
from PIL import Image

import mvmoe_deploy
from mvmoe_deploy import decoding, selftest
from mvmoe_deploy.cli import inspect
from mvmoe_deploy.errors import BundleError
from mvmoe_deploy.selftest import Answer, Case, Selftest, Tolerance, Verdict, judge, logits_departure


def run(bundle: Path) -> Verdict:
    """The verdict on a bundle that has a self-test."""
    with mvmoe_deploy.load(bundle) as runtime:
        verdict = runtime.selftest()
    assert verdict is not None
    return verdict


def test_every_precision_has_its_own_expected_values(conformance: Path) -> None:
    wanted = {}
    for name in ("moe-standalone-fp32", "moe-standalone-fp16"):
        bundle = conformance.parent / "bundles" / f"{name}.mvmoe"
        verdict = run(bundle)
        assert verdict.passed and verdict.failed is None
        assert [stage.stage for stage in verdict.stages] == ["pixels", "route", "gate", "logits"]
        assert all(stage.passed == stage.cases == len(verdict.cases) for stage in verdict.stages)
        assert sorted({expert for case in verdict.cases for expert in case.experts}) == list(range(tiny.EXPERTS))
        content = json.loads((bundle / selftest.FILE).read_text())
        wanted[name] = {case["image"]: case["logits"] for case in content["cases"]}
    first, second = wanted.values()
    assert first.keys() == second.keys() and all(first[image] != second[image] for image in first)


def test_a_dense_bundle_has_neither_route_nor_gate(dense_path: Path) -> None:
    verdict = run(dense_path)
    assert verdict.passed and [stage.stage for stage in verdict.stages] == ["pixels", "logits"]


@pytest.mark.parametrize("name", DEPARTURES)
def test_a_departure_is_judged_at_its_stage(name: str, bundle_copy: Path) -> None:
    edit, stage = DEPARTURES[name]
    edit_selftest(bundle_copy, edit)
    verdict = run(bundle_copy)
    assert (verdict.failed, verdict.passed) == (stage, stage is None)
    count = 2 if edit is swap_experts else 1
    assert [case.failed for case in verdict.cases] == [stage] * count + [None] * (len(verdict.cases) - count)
    for each in verdict.stages:
        assert each.passed == each.cases - (count if each.stage == stage else 0)


@pytest.mark.parametrize(("file", "stage"), [("expert_02.bin", "logits"), ("trunk.bin", "route")])
def test_nan_from_the_engine_is_judged_and_raises_nothing(file: str, stage: str, bundle_copy: Path) -> None:
    weights = bundle_copy / file
    weights.write_bytes(np.full(weights.stat().st_size // 4, np.nan, "<f4").tobytes())
    tiny.rehash(bundle_copy)
    verdict = run(bundle_copy)
    assert verdict.failed == stage
    failed = [case for case in verdict.cases if case.failed]
    assert all(case.failed == stage and case.logits == float("inf") for case in failed)
    assert len(failed) == (1 if stage == "logits" else len(verdict.cases))
    assert all(case.pixels for case in verdict.cases)
    assert [case.experts for case in failed] == ([[2]] if stage == "logits" else [[]] * len(failed))


@pytest.mark.parametrize("change", ["resampling", "channels", "one level"])
def test_other_pixels_are_seen_in_every_case(change: str, bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that decodes or resamples in another way fails at the first stage, whichever picture it gets."""
    if change == "resampling":
        monkeypatch.setitem(decoding._RESAMPLING, "bicubic", (Image.Resampling.BILINEAR, 1))
    else:
        right = decoding.decode

        def wrong(source: decoding.ImageSource, name: str = "image") -> Image.Image:
            pixels = np.asarray(right(source, name))
            return Image.fromarray(pixels[..., ::-1].copy() if change == "channels" else pixels ^ 1)

        monkeypatch.setattr(decoding, "decode", wrong)
    verdict = run(bundle_path)
    assert verdict.failed == "pixels" and not any(case.pixels for case in verdict.cases)


def judged(found: list[float], expected: list[float]) -> float:
    return logits_departure(np.array(found, np.float32), np.array(expected, np.float32))


def test_logits_are_compared_by_what_decides() -> None:
    assert judged([3, 2, 1], [3, 2, 1]) == 0
    assert judged([13, 12, 11], [3, 2, 1]) == 0  # a shift of all changes no answer
    assert judged([3, 2, 1, -9e9], [3, 2, 1, -1e4]) == 0  # a masked class is left out, on both sides
    assert judged([3, 2, 1.03], [3, 2, 1]) == pytest.approx(0.02 / np.sqrt(2 / 3), rel=1e-4)
    assert judged([3, 2, 1.03, 5], [3, 2, 1, -1e4]) == pytest.approx(0.02 / np.sqrt(2 / 3), rel=1e-4)
    assert judged([0, 0], [0, 0]) == 0 and judged([0, 1e-6], [0, 0]) == float("inf")
    for wrong in (float("nan"), float("inf"), float("-inf")):
        assert judged([3, 2, wrong], [3, 2, 1]) == float("inf")


def test_an_answer_without_a_route_fails_there() -> None:
    logits = np.array([1, 2], np.float32)
    test = Selftest(Tolerance(1e-4, 1e-4), [Case("a.png", "0" * 64, [1], [0.5], logits.tobytes())])
    verdict = judge(test, [Answer("0" * 64, [], [], np.full(2, np.nan, np.float32))])
    assert verdict.failed == "route"
    assert [(stage.stage, stage.passed, stage.departure) for stage in verdict.stages] == [
        ("pixels", 1, None),
        ("route", 0, None),
        ("gate", 0, float("inf")),
        ("logits", 0, float("inf")),
    ]


@pytest.mark.parametrize("name", REFUSED_SELFTESTS)
def test_a_selftest_that_cannot_be_one_is_refused(name: str, bundle_copy: Path) -> None:
    edit, message = REFUSED_SELFTESTS[name]
    edit_selftest(bundle_copy, edit)
    with pytest.raises(BundleError, match=message) as refused:
        run(bundle_copy)
    assert "selftest.json" in str(refused.value) and "export again" in str(refused.value)


FILES = {
    "no JSON": (b"{", "selftest.json"),
    "other text": ("{\xe4}".encode("latin-1"), "selftest.json"),
    "nested too deeply": (b"[" * 100_000, "selftest.json"),
    "empty": (b"", "selftest.json"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_selftest(name: str, bundle_copy: Path) -> None:
    content, message = FILES[name]
    (bundle_copy / selftest.FILE).write_bytes(content)
    tiny.rehash(bundle_copy)
    with pytest.raises(BundleError, match=message):
        run(bundle_copy)


def test_a_selftest_of_33_mib_is_not_read(bundle_copy: Path) -> None:
    with (bundle_copy / selftest.FILE).open("r+b") as file:
        file.truncate(33 << 20)
    tiny.rehash(bundle_copy)
    with pytest.raises(BundleError, match="larger than 32 MiB; not a self-test"):
        run(bundle_copy)


@pytest.mark.parametrize("file", [selftest.FILE, "selftest_02.png"])
@pytest.mark.parametrize(("damage", "message"), [(flip, "sha256 differs"), (Path.unlink, "missing|no such file")])
def test_damaged_files_are_named(file: str, damage: Callable[[Path], None], message: str, bundle_copy: Path) -> None:
    damage(bundle_copy / file)
    with pytest.raises(BundleError, match=message) as refused:
        run(bundle_copy)
    assert file in str(refused.value)


@pytest.mark.parametrize("image", sorted(path.name for path in IMAGES.glob("refused_*")))
def test_pictures_that_no_device_should_decode(image: str, bundle_copy: Path) -> None:
    """Cut short, empty, no image, or a bomb of 60,000 by 60,000 pixels: refused from its header, with little memory."""
    shutil.copy(IMAGES / image, bundle_copy / "selftest_01.png")
    tiny.rehash(bundle_copy)
    with pytest.raises(BundleError, match=r"selftest_01\.png: .*export again"):
        run(bundle_copy)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_old_bundles_open_and_say_that_they_carry_none(
    version: int, bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["version"] = version
        del manifest["selftest"]
        manifest["files"] = [file for file in manifest["files"] if not file["path"].startswith("selftest")]
        for piece in manifest["pieces"] if version == 1 else []:
            for added in ("optimised", "weights", "shared_bytes"):
                piece.pop(added, None)

    tiny.edit_manifest(bundle_copy, edit)
    if version < 3:
        (bundle_copy / "manifest.sha256").unlink()
    with mvmoe_deploy.load(bundle_copy) as runtime:
        assert runtime.selftest() is None
        assert runtime.predict(tiny.images(1)[0]).expert is not None
    assert inspect.main([str(bundle_copy)]) == 0
    assert "\nself-test: none" in capsys.readouterr().out
    assert inspect.main([str(bundle_copy), "--selftest"]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert "carries no self-test" in said.err and "export again" in said.err


def test_the_command_prints_each_case_and_stage(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(bundle_path), "--selftest", "--verify"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    cases = [line.split() for line in lines if line.startswith("selftest_")]
    assert [(case[0], *case[1:3], case[-1]) for case in cases] == [
        (f"selftest_{expert:02d}.png", "equal", str(expert), "passes") for expert in range(tiny.EXPERTS)
    ]
    stages = [line.split()[:4] for line in lines if line.startswith(("pixels  ", "route  ", "gate  ", "logits  "))]
    assert stages == [[stage, "4", "of", "4"] for stage in selftest.STAGES]
    assert lines[-1] == "self-test passed: onnxruntime answers here as the bundle did when exported"
    assert not said.err


def test_the_command_fails_with_1_and_says_where_to_look(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_selftest(bundle_copy, swap_experts)
    assert inspect.main([str(bundle_copy), "--selftest"]) == 1
    said = capsys.readouterr()
    assert "0; expected 1" in said.out and "1; expected 0" in said.out and said.out.count("fails at route") == 2
    assert "passed:" not in said.out
    assert said.err.startswith(
        f"error: {bundle_copy}: self-test failed at route: 2 of 4 cases; the trunk or the router"
    )
    assert said.err.count("\n") == 1


def test_the_commands_json(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = bundle_copy / "expert_02.bin"
    weights.write_bytes(np.full(weights.stat().st_size // 4, np.nan, "<f4").tobytes())
    tiny.rehash(bundle_copy)
    assert inspect.main([str(bundle_copy), "--selftest", "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    assert (found["bundle"], found["backend"]) == (str(bundle_copy), "onnxruntime")
    assert (found["passed"], found["failed"]) == (False, "logits")
    (wrong,) = [case for case in found["cases"] if case["failed"]]
    assert (wrong["experts"], wrong["logits"]) == ([2], None)
    assert found["stages"][-1] == {"stage": "logits", "cases": 4, "passed": 3, "departure": None, "tolerance": 1e-4}


def test_the_command_refuses_a_damaged_selftest_with_2(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_selftest(bundle_copy, REFUSED_SELFTESTS["base64-cut-short"][0])
    assert inspect.main([str(bundle_copy), "--selftest"]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("error: ") and said.err.count("\n") == 1
