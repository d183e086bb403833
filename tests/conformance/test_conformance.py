"""The cases that all languages share, run by the Python runtime; and that they can tell right from wrong."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import conformance as conformance_cases
import msgspec
import numpy as np
import pytest
import tiny
from PIL import Image

import mvmoe_deploy
from mvmoe_deploy import decoding, images
from mvmoe_deploy.backends import LoadedPiece
from mvmoe_deploy.bundle import Piece, open_bundle
from mvmoe_deploy.errors import MvmoeError
from mvmoe_deploy.exporters.exporter import exporter_of
from mvmoe_deploy.selftest import digest, logits_departure


@pytest.fixture(scope="module")
def cases(conformance: Path) -> dict[str, Any]:
    """The content of ``conformance.json``."""
    return json.loads(conformance.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", conformance_cases.BUNDLES)
def test_every_bundle_answers_as_expected(name: str, cases: dict[str, Any], conformance: Path) -> None:
    (bundle,) = [each for each in cases["bundles"] if each["name"] == name]
    folder = Path(cases["images"])
    assert len(bundle["cases"]) >= 28
    with mvmoe_deploy.load(conformance.parent / bundle["path"], check="lazy") as runtime:
        verdict = runtime.selftest()
        assert verdict is not None and verdict.passed
        for case in bundle["cases"]:
            answer = runtime.answer(folder / case["image"])
            assert (answer.pixels, answer.experts) == (case["pixels"], case["experts"]), case["image"]
            assert answer.gates == pytest.approx(case["gates"], abs=bundle["tolerance"]["gate"])
            departure = logits_departure(answer.logits, np.array(case["logits"], np.float32))
            assert departure <= bundle["tolerance"]["logits"], case["image"]


@pytest.mark.parametrize("name", [name for name in conformance_cases.BUNDLES if not name.startswith("dense")])
def test_an_evicted_expert_is_gone_before_the_next_one_comes(
    name: str, cases: dict[str, Any], conformance: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the garbage collector, which comes when many experts have piled up: a cycle in a piece would wait for it."""
    path = conformance.parent / next(each["path"] for each in cases["bundles"] if each["name"] == name)
    with mvmoe_deploy.load(path, max_resident=1) as runtime:
        batch = images.preprocess(tiny.images(1)[0], runtime.bundle.manifest.preprocessing)[None]
        load, loaded = runtime.backend.load, list[tuple[int | None, weakref.ref[LoadedPiece]]]()

        def watched(piece: Piece) -> LoadedPiece:
            assert not [other for other, alive in loaded if other != piece.expert and alive() is not None]
            result = load(piece)
            loaded.append((piece.expert, weakref.ref(result)))
            return result

        monkeypatch.setattr(runtime.backend, "load", watched)
        routing = runtime.bundle.manifest.routing
        assert routing is not None
        k, experts = routing.k, routing.experts
        gc.disable()
        try:
            for first in range(experts):
                runtime.run(batch, np.array([[(first + i) % experts for i in range(k)]]))
        finally:
            gc.enable()
        assert {expert for expert, _ in loaded} == set(range(experts))


def test_the_cases_reach_every_expert_and_tell_images_apart(cases: dict[str, Any]) -> None:
    for bundle in cases["bundles"]:
        used = {expert for case in bundle["cases"] for expert in case["experts"]}
        assert used == set(range({"moe": 4, "k2": 3, "dense": 0}[bundle["name"].split("-")[0]]))
        assert len({case["pixels"] for case in bundle["cases"]}) == len(bundle["cases"])
        exact = [case["image"] for case in bundle["cases"] if case["exact"]]
        assert len(exact) >= 18 and not any(name.endswith(".jpg") for name in exact)


def test_refused_images(cases: dict[str, Any], conformance: Path) -> None:
    with mvmoe_deploy.load(conformance.parent / cases["bundles"][0]["path"]) as runtime:
        for case in cases["refused_images"]:
            with pytest.raises(MvmoeError, match=case["error"]):
                runtime.predict(Path(cases["images"]) / case["image"])


def test_damaged_bundles(cases: dict[str, Any], conformance: Path) -> None:
    assert {case["when"] for case in cases["damaged"]} == {"open", "load", "predict"}
    for case in cases["damaged"]:
        folder = conformance.parent / case["path"]
        if case["when"] != "predict":
            with pytest.raises(MvmoeError) as refused:
                mvmoe_deploy.load(folder, check="lazy")
        else:
            with mvmoe_deploy.load(folder, check="lazy") as runtime, pytest.raises(MvmoeError) as refused:
                runtime.predict(Path(cases["images"]) / case["image"])
        assert case["error"] in str(refused.value), case["name"]


def test_selftests_fail_at_their_stage_or_are_refused(cases: dict[str, Any], conformance: Path) -> None:
    assert {case["failed"] for case in cases["selftests"]} == {None, "pixels", "route", "gate", "logits"}
    for case in cases["selftests"]:
        with mvmoe_deploy.load(conformance.parent / case["path"], check="lazy") as runtime:
            if case["error"]:
                with pytest.raises(MvmoeError) as refused:
                    runtime.selftest()
                assert case["error"] in str(refused.value), case["name"]
            else:
                verdict = runtime.selftest()
                assert verdict is not None and verdict.failed == case["failed"], case["name"]


def test_every_layout_and_precision_is_there(cases: dict[str, Any]) -> None:
    found = {(bundle["layout"], bundle["precision"]) for bundle in cases["bundles"]}
    onnx = exporter_of("onnx")
    assert {layout for layout, _ in found} == set(onnx.layouts)
    assert {precision for _, precision in found} == {precision.name for precision in onnx.precisions}


def test_a_runtime_that_keeps_to_no_rule_is_noticed(cases: dict[str, Any], conformance: Path) -> None:
    """Red and blue exchanged, another filter, orientation and transparency ignored: each changes some image's pixels."""
    (bundle,) = [each for each in cases["bundles"] if each["name"] == "moe-standalone-fp32"]
    expected = {case["image"]: case["pixels"] for case in bundle["cases"]}
    preprocessing = open_bundle(conformance.parent / bundle["path"]).manifest.preprocessing
    folder = Path(cases["images"])

    def differs(name: str, image: Image.Image) -> bool:
        return digest(images.to_pixels(image, preprocessing)) != expected[name]

    assert not differs("png_rgb_trns.png", decoding.decode(folder / "png_rgb_trns.png"))
    assert differs("png_profile.png", Image.merge("RGB", Image.open(folder / "png_profile.png").split()[::-1]))
    assert differs("png_exif6.png", Image.fromarray(np.asarray(Image.open(folder / "png_exif6.png"))))
    for name in ("png_rgba.png", "png_palette_trns.png", "webp_alpha.webp", "png_rgb_trns.png"):
        opened = Image.open(folder / name).convert("RGBA")
        assert differs(name, Image.fromarray(np.asarray(opened)[..., :3])), name
    other = msgspec.structs.replace(preprocessing, interpolation="bilinear")
    assert digest(images.to_pixels(folder / "bmp.bmp", other)) != expected["bmp.bmp"]
