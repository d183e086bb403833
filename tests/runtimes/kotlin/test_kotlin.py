"""The Kotlin runtime, compiled and run on a JDK: the shared cases, its own rules, threads, and what it refuses.

The engine is the runtime's own ``OnnxRuntimeBackend``. Where Maven Central cannot be reached, the Java package that it
calls is the tests' own, over the library of the Python wheel (tests/runtimes/kotlin/standins).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kotlin as toolchain
import msgspec
import numpy as np
import pytest

from mvmoe_deploy.bundle import Bundle, open_bundle
from mvmoe_deploy.selftest import logits_departure
from mvmoe_deploy.snippets import snippet

pytestmark = toolchain.needs_kotlin


@pytest.fixture(scope="module")
def kotlin() -> toolchain.Kotlin:
    """The compiled runtime."""
    return toolchain.kotlin()


@pytest.fixture(scope="module")
def cases(conformance: Path) -> dict[str, Any]:
    """The content of ``conformance.json``."""
    return json.loads(conformance.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def raw(cases: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images' decoded pixels: the platform's decoder is the app's, and a JVM's own is not exact."""
    folder = tmp_path_factory.mktemp("raw")
    for name in {case["image"] for bundle in cases["bundles"] for case in bundle["cases"]}:
        toolchain.write_raw(Path(cases["images"]) / name, folder / f"{name}.raw")
    return folder


def routed_to(cases: dict[str, Any], name: str) -> dict[int, str]:
    """For each expert of a bundle the first image that is routed to it."""
    (bundle,) = [each for each in cases["bundles"] if each["name"] == name]
    return {case["experts"][0]: case["image"] for case in reversed(bundle["cases"])}


def test_every_bundle_answers_as_in_python(
    kotlin: toolchain.Kotlin,
    cases: dict[str, Any],
    conformance: Path,
    raw: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    tasks = []
    expected = {}
    for bundle in cases["bundles"]:
        for case in bundle["cases"]:
            path = str(conformance.parent / bundle["path"])
            tasks.append((path, case["image"], raw / f"{case['image']}.raw"))
            expected[path, case["image"]] = bundle, case
    record_property("ran with", f"Kotlin: {kotlin.engine}")
    answers = kotlin.run("answers", tasks, tmp_path)
    assert len(answers) == len(expected) >= 8 * 28
    for path, image, pixels, experts, gates, logits in answers:
        bundle, case = expected[path, image]
        where = f"{bundle['name']}, {image}"
        # exact for all images, since Python has decoded them
        assert pixels == case["pixels"], where
        assert [int(expert) for expert in experts.split(",") if expert] == case["experts"], where
        found = [float(gate) for gate in gates.split(",") if gate]
        assert found == pytest.approx(case["gates"], abs=bundle["tolerance"]["gate"]), where
        values = np.frombuffer(base64.b64decode(logits), "<f4")
        assert logits_departure(values, np.array(case["logits"], np.float32)) <= bundle["tolerance"]["logits"], where


def test_self_tests_pass_and_name_the_stage_that_fails(
    kotlin: toolchain.Kotlin, cases: dict[str, Any], conformance: Path, tmp_path: Path
) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.mkdir()
    wrong.mkdir()
    bundles = [conformance.parent / bundle["path"] for bundle in cases["bundles"]]
    for bundle in bundles:
        for image in bundle.glob("*.png"):
            name = f"{hashlib.sha256(image.read_bytes()).hexdigest()}.raw"
            toolchain.write_raw(image, right / name)
            content = bytearray((right / name).read_bytes())
            content[8::2] = bytes(255 - value for value in content[8::2])
            (wrong / name).write_bytes(content)
    found = kotlin.run("selftests", [(bundle, folder) for folder in (right, wrong) for bundle in bundles], tmp_path)
    for _, failed, verdict, _ in found[: len(bundles)]:
        assert failed == "null" and verdict.startswith("self-test passed: pixels"), verdict
    for _, failed, verdict, stages in found[len(bundles) :]:
        assert failed == "PIXELS" and verdict.startswith("self-test failed at pixels"), verdict
        assert "pixels 0/" in stages
    tasks = [(conformance.parent / case["path"], right) for case in cases["selftests"]]
    for case, (_, failed, verdict, _) in zip(cases["selftests"], kotlin.run("selftests", tasks, tmp_path), strict=True):
        if case["error"]:
            assert failed == "refused" and case["error"] in verdict, f"{case['name']}: {failed}: {verdict}"
        else:
            assert failed == str(case["failed"] or "null").upper().replace("NULL", "null"), f"{case['name']}: {verdict}"


def test_damaged_bundles_are_refused_by_name(
    kotlin: toolchain.Kotlin, cases: dict[str, Any], conformance: Path, raw: Path, tmp_path: Path
) -> None:
    image = next(raw.glob("*.raw"))
    tasks = [
        (conformance.parent / case["path"], raw / f"{case['image']}.raw" if "image" in case else image)
        for case in cases["damaged"]
    ]
    found = kotlin.run("refusals", tasks, tmp_path)
    for case, (_, when, message) in zip(cases["damaged"], found, strict=True):
        assert when == case["when"], f"{case['name']}: {when}: {message}"
        assert case["error"] in message, f"{case['name']}: {message}"


def test_many_threads_with_one_resident_expert_answer_as_one_thread(
    kotlin: toolchain.Kotlin, cases: dict[str, Any], conformance: Path, raw: Path, tmp_path: Path
) -> None:
    images = routed_to(cases, "moe-standalone-fp32")
    bundle = conformance.parent / "bundles" / "moe-standalone-fp32.mvmoe"
    answers = kotlin.run("threads", [(bundle, raw / f"{image}.raw") for image in images.values()], tmp_path)
    found = {name: int(value) for name, value in answers}
    assert (found["wrong"], found["routes"], found["uses"]) == (0, 4, 8000)
    assert 0 < found["most bytes"] <= found["budget"] and found["most pieces"] == 1
    assert found["loads"] == found["misses"] > 4
    assert found["bytes after closing"] == 0


def test_the_runtimes_own_rules(
    kotlin: toolchain.Kotlin, cases: dict[str, Any], conformance: Path, raw: Path, tmp_path: Path
) -> None:
    images = routed_to(cases, "moe-standalone-fp32")
    bundle = conformance.parent / "bundles" / "moe-standalone-fp32.mvmoe"
    empty = tmp_path / "empty"
    empty.mkdir()
    given = [(bundle,), (empty,), *((raw / f"{images[expert]}.raw",) for expert in (0, 1, 2))]
    results = dict(kotlin.run("checks", given, tmp_path))
    assert len(results) >= 18
    assert {name: result for name, result in results.items() if result != "ok"} == {}


ANDROID = """
import java.io.File
import java.io.InputStream
import mvmoe.Image
import mvmoe.Runtime
import mvmoe.onnxruntime.OnnxRuntimeBackend

class Assets { fun open(path: String): InputStream = path.byteInputStream() }
class Context(val filesDir: File, val assets: Assets)
class Bitmap(val width: Int, val height: Int) {
    fun getPixels(pixels: IntArray, offset: Int, stride: Int, x: Int, y: Int, width: Int, height: Int) = pixels.fill(offset + stride + x + y + width + height)
}

fun app(context: Context, bitmap: Bitmap) {
"""
"""What the lines in docs/on-device.md find in an app."""


def test_snippets_compile(kotlin: toolchain.Kotlin, cases: dict[str, Any], conformance: Path, tmp_path: Path) -> None:
    bundle = open_bundle(conformance.parent / cases["bundles"][0]["path"])
    other = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, target="executorch"), bundle.digest)
    page = (toolchain.ROOT / "docs" / "on-device.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"<!-- tested: kotlin -->\n```kotlin\n(.*?)```", page, re.DOTALL)
    assert len(lines.splitlines()) <= 10
    sources = [snippet(bundle, "kotlin"), snippet(other, "kotlin"), f"{ANDROID}{lines}}}\n"]
    wrong = sources[0].replace("maxResident", "mostResident")
    complaints = kotlin.compile([*sources, wrong], tmp_path)  # which stops at the first module with an error
    assert "Source3.kt" in complaints and "mostResident" in complaints, complaints
    assert not re.search("Source[012]", complaints), complaints
