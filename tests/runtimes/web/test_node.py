"""The runtime for browsers in node, beside Python's: what both must answer alike."""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny
from exported import Exported, export_tiny
from PIL import Image
from web_runtime import ROOT, Node

import mvmoe_deploy
from mvmoe_deploy import web_engine
from mvmoe_deploy.bundle import MANIFEST
from mvmoe_deploy.errors import MvmoeError
from mvmoe_deploy.images import Preprocessing, preprocess, to_pixels

PACKAGE = ROOT / "runtimes" / "web"


@pytest.fixture(scope="session")
def swappable(folder: Path) -> Exported:
    """One graph for all experts, which takes their weights as inputs."""
    return export_tiny(tiny.moe_config(experts=2), folder / "web-swappable.mvmoe", layout="swappable")


def test_its_own_tests_pass(node: Node) -> None:
    done = node.run("--test", "test/")
    assert done.returncode == 0, done.stdout[-5000:]
    assert "# skipped 0" in done.stdout and "# fail 0" in done.stdout


def test_its_types_fit(node: Node) -> None:
    done = node.run("node_modules/typescript/bin/tsc", "--project", ".")
    assert done.returncode == 0, done.stdout[-5000:]


def test_what_is_published_is_small() -> None:
    """40 kB, packed as npm does it; the engine is not part of it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in ["package.json", "README.md", *json.loads((PACKAGE / "package.json").read_text())["files"]]:
            archive.add(PACKAGE / name, f"package/{name}")
    assert len(gzip.compress(packed.getvalue())) <= 40_000


def test_one_version_of_everything() -> None:
    package = json.loads((PACKAGE / "package.json").read_text())
    assert package["version"] == mvmoe_deploy.__version__
    assert package["devDependencies"]["onnxruntime-web"] == web_engine.VERSION


def test_the_lockfile_names_no_registry() -> None:
    packages = json.loads((PACKAGE / "package-lock.json").read_text())["packages"]
    assert all("resolved" not in package for package in packages.values())
    assert all("integrity" in package for name, package in packages.items() if name)


def random_images(folder: Path) -> Iterator[Path]:
    """Noise of many shapes, in which no two pixels can be mistaken for each other."""
    generator = np.random.default_rng(7)
    shapes = [(1, 1), (2, 3), (31, 32), (32, 32), (33, 40), (7, 200), (300, 211), (640, 480), (64, 65)]
    for number, (height, width) in enumerate(shapes):
        path = folder / f"{number}.png"
        Image.fromarray(generator.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
        yield path


def test_resampling_is_exact_to_the_bit(node: Node, tmp_path: Path) -> None:
    settings = [
        Preprocessing(size=32),
        Preprocessing(size=32, interpolation="bilinear"),
        Preprocessing(size=17, crop=0.875),
        Preprocessing(size=50, crop=0.333, interpolation="bilinear"),
    ]
    cases = [(image, setting) for image in random_images(tmp_path) for setting in settings]
    requests = [
        {"ask": "pixels", "image": str(image), "preprocessing": msgspec.to_builtins(setting)}
        for image, setting in cases
    ]
    for (image, setting), found in zip(cases, node.ask(requests), strict=True):
        assert found.get("sha256") == hashlib.sha256(to_pixels(image, setting).tobytes()).hexdigest(), (image, setting)


@pytest.mark.parametrize("kind", ["routed", "dense", "k2", "swappable"])
def test_predictions_are_those_of_python(
    node: Node, kind: str, bundle_path: Path, dense_path: Path, k2: Exported, swappable: Exported, tmp_path: Path
) -> None:
    path = {"routed": bundle_path, "dense": dense_path, "k2": k2.path, "swappable": swappable.path}[kind]
    images = list(random_images(tmp_path))
    request = {"ask": "predict", "bundle": str(path), "options": {"maxResident": 1}, "images": [*map(str, images)]}
    (found,) = node.ask([request])
    with mvmoe_deploy.load(path, max_resident=1) as runtime:
        for image, answer in zip(images, found["answers"], strict=True):
            expected = runtime.predict(image)
            batch = preprocess(image, runtime.bundle.manifest.preprocessing)[None]
            logits = runtime.run(batch)[0][0]
            assert "error" not in answer, answer
            assert (answer["label"], answer["experts"]) == (expected.label, expected.experts)
            assert np.abs(np.array(answer["gates"]) - expected.gates).max(initial=0) < 1e-5
            assert np.abs(np.array(answer["logits"]) - logits).max() < 1e-4
        assert len(found["stats"]["resident"]) == len(runtime.stats().resident)
        assert found["stats"]["fixedBytes"] == runtime.stats().fixed_bytes


def test_selftests_fail_at_their_stage_or_are_refused(node: Node, conformance: Path) -> None:
    cases = json.loads(conformance.read_text(encoding="utf-8"))["selftests"]
    paths = [str(conformance.parent / case["path"]) for case in cases]
    answers = node.ask([{"ask": "selftest", "bundle": path, "options": {}} for path in paths])
    for case, found in zip(cases, answers, strict=True):
        if case["error"]:
            assert case["error"] in found.get("error", ""), f"{case['name']}: {found}"
        else:
            assert found.get("failed", "no verdict") == case["failed"], f"{case['name']}: {found}"


REPLACEMENTS: list[Any] = [None, -1, 0, 1.5, 1e30, "x", "", [], {}, True, "../x", "a" * 300]
"""What each field of a manifest is replaced by."""


def mutations(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Paths into a JSON value, of lists only the first and last entry, each with replacements of what is there."""
    if at:
        yield from ((at, replacement) for replacement in REPLACEMENTS)
    if isinstance(value, dict):
        for key, each in value.items():
            yield from mutations(each, (*at, key))
    elif isinstance(value, list) and value:
        for index in sorted({0, len(value) - 1}):
            yield from mutations(value[index], (*at, index))


def mutated(manifest: dict[str, Any]) -> Iterator[str]:
    """Manifests that are wrong in one place, and some that are not."""
    yield json.dumps(manifest)
    for path, replacement in mutations(manifest):
        if path[0] in ("verification", "model", "tools", "options") and len(path) > 2:
            continue  # free form
        changed = copy.deepcopy(manifest)
        *parents, last = path
        place: Any = changed
        for key in parents:
            place = place[key]
        place[last] = replacement
        yield json.dumps(changed)
        if replacement is None:
            del place[last]
            yield json.dumps(changed)
        if isinstance(last, str) and replacement == 0:
            place[last + "s"] = 0
            yield json.dumps(changed)


@pytest.mark.parametrize("kind", ["swappable", "k2"])
def test_the_same_manifests_are_refused(
    node: Node, kind: str, swappable: Exported, k2: Exported, tmp_path: Path
) -> None:
    manifest = json.loads(((swappable if kind == "swappable" else k2).path / MANIFEST).read_text())
    texts = list(mutated(manifest))
    answers = node.ask([{"ask": "manifest", "text": text} for text in texts])
    wrong = []
    for text, answer in zip(texts, answers, strict=True):
        (tmp_path / MANIFEST).write_text(text)
        (tmp_path / "manifest.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST}\n")
        try:
            mvmoe_deploy.bundle.open_bundle(tmp_path)
            accepted = True
        except MvmoeError:
            accepted = False
        # Python opens bundles of other targets, which a browser cannot run
        if accepted != ("accepted" in answer) and json.loads(text)["target"] == "onnx":
            wrong.append((text, answer))
    assert len(texts) > 1000
    assert 10 < sum("accepted" in answer for answer in answers) < len(texts) / 2
    assert not wrong, [difference(manifest, json.loads(text)) + f": {answer}" for text, answer in wrong[:20]]


def difference(before: Any, after: Any, at: str = "$") -> str:
    """Where two JSON values differ first."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            if before.get(key, "absent") != after.get(key, "absent"):
                return difference(before.get(key, "absent"), after.get(key, "absent"), f"{at}.{key}")
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            if one != other:
                return difference(one, other, f"{at}[{index}]")
    return f"{at} = {json.dumps(after)[:80]}"


def test_a_damaged_bundle_is_refused(node: Node, bundle_copy: Path) -> None:
    expert = bundle_copy / "expert_00.bin"
    content = bytearray(expert.read_bytes())
    content[100] ^= 1
    expert.write_bytes(content)
    options = {"preload": "all"}
    (found,) = node.ask([{"ask": "predict", "bundle": str(bundle_copy), "options": options, "images": []}])
    assert found["error"] == (
        "BundleError: expert_00.bin: sha256 differs from manifest.json; the file is damaged, copy it again or export again"
    )
    expert.unlink()
    (found,) = node.ask([{"ask": "predict", "bundle": str(bundle_copy), "options": options, "images": []}])
    assert "expert_00.bin: missing from the bundle" in found["error"]
    tiny.edit_manifest(bundle_copy, lambda manifest: manifest.update(version=9))
    (found,) = node.ask([{"ask": "predict", "bundle": str(bundle_copy), "options": options, "images": []}])
    assert "format version 9" in found["error"]
