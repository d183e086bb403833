"""The matrix of models and targets: one small export, and how results become a table."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mvmoe_deploy.bench.selfcheck import backbones
from mvmoe_deploy.bench.selfcheck.backbones import Result, Subject
from mvmoe_deploy.cli import bench
from mvmoe_deploy.errors import ConfigError, ExportError
from mvmoe_deploy.exporters.differences import channel_errors

SMALL = Subject("resnet10t", "layer4", "stages", 32)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "SUBJECTS", (SMALL, Subject("mobilenetv3_small_050", "blocks.9", "pointwise", 64)))


def test_a_model_is_exported_timed_and_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept.json"
    argv = ["backbones", "--only", "resnet", "--exports", "onnx fp32", "--experts", "2", "--results", str(kept)]
    assert bench.main([*argv, "--rounds", "0", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["reason"] == "" and 0.99 < result["bytes_ratio"] < 1.2 and result["made_with"]["timm"]
    assert result["dense_ratio"] is None
    assert bench.main([*argv, "--rounds", "2", "--latencies", "--json"]) == 0
    (timed,) = json.loads(capsys.readouterr().out)
    assert all(timed.pop(name) > 0 for name in ("dense_ratio", "bare_ratio", "stock_ratio"))
    assert timed == {name: value for name, value in result.items() if name in timed}
    assert bench.main([*argv, "--latencies"]) == 0
    printed = capsys.readouterr()
    assert "verified, " in printed.out and not printed.err  # nothing was run


def test_the_time_of_each_operator_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["backbones", "--only", "resnet", "--experts", "2", "--operators"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}
    assert rows["Conv"][0] == rows["Conv"][2] and int(rows["Conv"][0]) > 9  # as many in the pieces as in the whole
    assert [rows["Softmax"][place] for place in (0, 2)] == ["1", "2"]  # the ranking's, and the router's
    assert int(rows["all"][0]) == sum(int(row[0]) for name, row in rows.items() if name != "all")


def test_a_failure_is_named_and_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> None:
        raise ExportError(f"{arguments[2]}: cannot")

    monkeypatch.setattr(backbones, "_export", refuse)
    argv = ["backbones", "--exports", "onnx fp32,coreml fp16", "--experts", "2", "--results", str(tmp_path / "x.json")]
    assert bench.main([*argv, "--markdown"]) == 1
    printed = capsys.readouterr()
    assert "fails ¹" in printed.out and "\n1. cannot\n" in printed.out  # without the temporary folder
    assert "has no stage 'blocks.9'" in printed.out and "4 of 4 exports fail" in printed.err
    kept = backbones.read(tmp_path / "x.json")
    assert len(kept) == 4 and all(result.reason for result in kept)


def test_the_table_stands_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{backbones.START}\nold\n{backbones.END}\nafter\n", encoding="utf-8")
    backbones.write_into(page, "| new |", ["of a_b", "other"])
    text = page.read_text(encoding="utf-8")
    assert text == f"before\n{backbones.START}\n\n| new |\n\n1. of a\\_b\n2. other\n\n{backbones.END}\nafter\n"
    backbones.write_into(page, "| newer |")
    assert page.read_text(encoding="utf-8").count("new") == 1
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ConfigError, match="has no marks"):
        backbones.write_into(page, "| new |")


def test_a_row_says_what_was_found() -> None:
    common = {"model": SMALL.name, "own": "stages", "experts": 4}
    results = [
        Result(
            export="onnx fp32",
            bytes=15_300_000,
            bytes_ratio=1.0031,
            dense_ratio=1.02,
            bare_ratio=1.01,
            stock_ratio=0.99,
            **common,
        ),
        Result(export="executorch fp32", bytes=15_300_000, delegates=(1, 2), undelegated=(0, 3), **common),
        Result(export="executorch int8", reason="trunk: no", **common),
        Result(export="coreml fp16", reason="routed.mvmoe: trunk: no; no bundle was written", **common),
    ]
    ((name, cut, onnx, fp16, _, executorch, int8, coreml, dense, bare, stock),), headers, notes = backbones.table_of(
        results
    )
    assert (name, cut, fp16) == (SMALL.name, "layer4, stages", None)
    assert (onnx, coreml) == ("verified, 15.3 MB (× 1.003)", "fails ¹")
    assert int8 == coreml and notes == ["trunk: no"]
    assert executorch == "verified, 15.3 MB; trunk 1 + 0, tail 2 + 3"
    assert (dense, bare, stock) == ("1.02", "1.01", "0.99") and len(headers) == 11


@pytest.mark.parametrize("argv", [["--only", "alexnet"], ["--exports", "tflite"], ["--latencies"]])
def test_what_is_unknown_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["backbones", *argv]) == 2
    error = capsys.readouterr().err
    assert any(known in error for known in ("resnet10t", "onnx fp32", "--results FILE"))


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="not results"):
        backbones.read(tmp_path / "x.json")


def test_random_weights_do_not_amplify_rounding() -> None:
    deep = Subject("mobileone_s0", "stages.3", "stages", 64)  # 2e-4 without SHIFT
    routed, _ = backbones._models(deep, 2)
    trunk = routed.merged().trunk_module().eval()
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3, 64, 64), np.float32))
    with torch.no_grad():
        single, double = trunk(images), copy.deepcopy(trunk).double()(images.double())
    assert channel_errors(single.numpy(), double.float().numpy()).max() < 3e-5


def test_no_block_of_the_matrix_hides_behind_a_tiny_scale() -> None:
    model = torch.nn.Module()
    for name, value in {
        "gamma": torch.full((4,), 1e-6),
        "bias": torch.zeros(4),
        "row": torch.tensor([1e-6, 2e-6]),
    }.items():
        model.register_parameter(name, torch.nn.Parameter(value))
    backbones._settle(model, lambda: None)
    assert model.gamma.eq(1).all() and not model.bias.any() and model.row.max() < 1e-5
