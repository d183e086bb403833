"""The parity table: a row per target and precision, with what was measured on labelled images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from mvmoe_deploy import targets
from mvmoe_deploy.bench.selfcheck import parity
from mvmoe_deploy.errors import ConfigError, MvmoeError, VerificationError
from mvmoe_deploy.terminal import Cell

PRECISIONS = ["fp32", "fp16", "int8", "int4"]


@pytest.fixture
def measure(tmp_path: Path, moe_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[Cell]]]:
    tiny.image_folder(tmp_path, "val", tiny.CLASSES, 2)
    monkeypatch.setattr(targets, "known", lambda: ["onnx"])

    def run() -> list[list[Cell]]:
        return parity.measure(moe_checkpoint, tmp_path, 8, steps.append)

    steps: list[str] = []
    return run


def test_every_precision_is_compared_with_pytorch(measure: Callable[[], list[list[Cell]]]) -> None:
    reference, *rows = (dict(zip(parity.HEADERS, row, strict=True)) for row in measure())
    assert [(row["target"], row["precision"]) for row in rows] == [("onnx", name) for name in PRECISIONS]
    exact, half, *_ = rows
    assert (reference["target"], reference["top-1 agreement"]) == ("PyTorch", None)
    assert float(str(exact["logits, of allowed"]).rstrip("%")) <= 100
    assert exact["accuracy"] == reference["accuracy"]  # of the same images
    assert exact["top-1 agreement"] == exact["routing agreement"] == "100.0%"
    assert float(str(exact["worst abs error"])) < float(str(half["worst abs error"])) < 0.1
    assert float(str(half["MB"])) < float(str(exact["MB"]))


def test_a_precision_that_fails_says_why_and_the_others_go_on(
    measure: Callable[[], list[list[Cell]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parity.export_model

    def export_model(*args: Any, **options: Any) -> Any:
        if options["options"].precision == "fp32":
            raise VerificationError("expert_02: differs from PyTorch")
        return real(*args, **options)

    monkeypatch.setattr(parity, "export_model", export_model)
    _, failed, half, *_ = measure()
    assert failed[:4] == ["onnx", "fp32", "separate", "expert_02: differs from PyTorch"]
    assert set(failed[4:]) == {None} and len(failed) == len(half) == len(parity.HEADERS)
    assert half[1] == "fp16" and half[4] is not None


def test_every_layout_on_images_without_labels(
    tmp_path: Path, moe_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.image_folder(tmp_path, "photos", 1, 2)
    monkeypatch.setattr(targets, "known", lambda: ["onnx"])
    steps: list[str] = []
    only = ["onnx:fp16", "onnx:int8"]
    rows = parity.measure(moe_checkpoint, tmp_path, 2, steps.append, only, labelled=False, layouts=True)
    assert [row[:3] for row in rows[1:]] == [
        ["onnx", "fp16", "separate"], ["onnx", "int8", "separate"], ["onnx", "int8", "swappable"],
    ]  # fmt: skip
    assert any(step.startswith("onnx fp16 swappable: left out, the swappable layout has no fp16") for step in steps)
    assert {row[parity.HEADERS.index("accuracy")] for row in rows} == {None}


def test_a_target_whose_toolchain_is_missing_is_left_out_and_named(
    measure: Callable[[], list[list[Cell]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def converter_of(target: str) -> None:
        raise MvmoeError(f"target {target} needs a package")

    monkeypatch.setattr(parity, "converter_of", converter_of)
    assert [row[0] for row in measure()] == ["PyTorch"]


def test_single_targets_and_precisions_can_be_asked_for() -> None:
    every = parity._wanted([])
    assert list(every) == list(targets.known()) and every["onnx"] == PRECISIONS
    assert parity._wanted(["onnx:int8", "coreml"]) == {"onnx": ["int8"], "coreml": every["coreml"]}
    for unknown in ("onyx", "onnx:int9"):
        with pytest.raises(ConfigError, match=f"--only {unknown}: expected a target"):
            parity._wanted([unknown])
