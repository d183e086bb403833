"""The commands: exit codes, one-line errors, JSON, help."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from mvmoe_deploy import targets
from mvmoe_deploy.bench.results import read_json
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.cli import bench, export, inspect, run, train
from mvmoe_deploy.exporters import split
from mvmoe_deploy.exporters.onnx import convert as onnx_target

COMMANDS = {
    "export": export,
    "run": run,
    "inspect": inspect,
    "train": train,
    "bench": bench,
}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo.png"
    Image.fromarray(tiny.images(1)[0]).save(file)
    return file


def fails(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], *argv: object, code: int = 2) -> str:
    """Runs a command that fails: one line on standard error, nothing on standard output."""
    assert main([str(argument) for argument in argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        COMMANDS[name].main(["--help"])
    assert exit_.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "superclasses", "evaluate", "analyse", "compare", "capacity"])
def test_help_of_what_belongs_to_training(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        train.main([name, "--help"])
    assert exit_.value.code == 0
    assert f" {name} [-h]" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_exits_with_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        COMMANDS[name].main(["--no-such-option"])
    assert exit_.value.code == 2


# mvmoe-export


def test_export(moe_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.mvmoe"
    assert export.main([str(moe_checkpoint), "--target", "onnx", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "expert_03" in text
    assert "  top-1 agreement 100.0%\n  routing agreement 100.0%\n" in text
    assert f"wrote {out}" in text
    open_bundle(out).check()


def test_export_as_json(moe_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.mvmoe"
    assert export.main([str(moe_checkpoint), "--target", "onnx", "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bundle"] == str(out)
    assert len(report["pieces"]) == 5


def test_a_failed_verification_exits_with_1(
    moe_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = onnx_target.convert

    def convert(job: Any) -> Any:
        converted = real(job)
        file = job.directory / "expert_02.bin"
        file.write_bytes(bytes(file.stat().st_size))
        return converted

    monkeypatch.setattr(onnx_target, "convert", convert)
    out = tmp_path / "x.mvmoe"
    error = fails(capsys, export.main, moe_checkpoint, "--target", "onnx", "--out", out, code=1)
    assert "expert_02: differs from PyTorch" in error
    assert not list(tmp_path.iterdir())


def test_export_refuses(moe_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "foreign.pt"
    foreign.write_bytes(b"not a checkpoint")
    assert "none.pt: no such file" in fails(capsys, export.main, tmp_path / "none.pt", "--target", "onnx")
    assert "foreign.pt: not a checkpoint" in fails(capsys, export.main, foreign, "--target", "onnx")
    assert "unknown target 'tflite'" in fails(capsys, export.main, moe_checkpoint, "--target", "tflite")
    error = fails(capsys, export.main, moe_checkpoint, "--target", "onnx", "--out", tmp_path)
    assert "exists already; --force replaces it" in error
    error = fails(capsys, export.main, moe_checkpoint, "--target", "onnx", "--image-input")
    assert error == "error: --image-input: target onnx has no such option, coreml has\n"
    error = fails(capsys, export.main, moe_checkpoint, "--target", "coreml", "--max-batch", "16")  # the default, too
    assert error == "error: --max-batch: target coreml has no such option, executorch has\n"
    error = fails(capsys, export.main, moe_checkpoint, "--target", "executorch", "--max-batch", "0")
    assert error == "error: --max-batch is 0; it must be at least 1\n"
    error = fails(capsys, export.main, moe_checkpoint, "--target", "onnx", "--out", tmp_path, "--force")
    assert "is not a bundle, so --force does not replace it" in error
    assert foreign.exists()


def test_a_full_disk_is_one_line(
    moe_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mvmoe_deploy.files._sync", no_space)
    error = fails(capsys, export.main, moe_checkpoint, "--target", "onnx", "--out", tmp_path / "x.mvmoe")
    assert error == f"error: {tmp_path / 'x.mvmoe'}: No space left on device\n"


# mvmoe-run


def test_run(bundle_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(bundle_path), str(photo), str(photo), "--top", "2", "--max-resident", "1"]) == 0
    text = capsys.readouterr().out
    assert text.count(str(photo)) == 2
    assert text.count("thing ") == 4
    assert "expert 2 (group 2), gate 0." in text
    assert "1 hits, 1 loads, 0 evictions" in text


def test_run_as_json(bundle_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(bundle_path), str(photo), "--json", "--memory-budget", "1MB"]) == 0
    report = json.loads(capsys.readouterr().out)
    (prediction,) = report["predictions"]
    assert prediction["image"] == str(photo)
    assert len(prediction["top"]) == 5
    assert prediction["expert"] == 2
    assert report["stats"]["resident"] == [2]


def test_run_the_dense_baseline(dense_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(dense_path), str(photo)]) == 0
    assert "weights in memory:" in capsys.readouterr().out


def test_run_refuses(bundle_path: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "notes.jpg"
    notes.write_text("no image")
    assert "none.mvmoe: no such bundle" in fails(capsys, run.main, tmp_path / "none.mvmoe", photo)
    assert "none.jpg: no such file" in fails(capsys, run.main, bundle_path, tmp_path / "none.jpg")
    assert "notes.jpg: not an image" in fails(capsys, run.main, bundle_path, notes)
    assert "cannot hold expert_00" in fails(capsys, run.main, bundle_path, photo, "--memory-budget", "1kB")
    assert "expected a size such as '8MB'" in fails(capsys, run.main, bundle_path, photo, "--memory-budget", "lots")
    assert "backend 'tpu' does not run onnx bundles: expected onnxruntime" in fails(
        capsys, run.main, bundle_path, photo, "--backend", "tpu"
    )


@pytest.mark.parametrize("option", ["--top", "--threads", "--max-resident"])
@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_numbers_are_checked(
    bundle_path: Path, photo: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run.main([str(bundle_path), str(photo), option, value])
    assert exit_.value.code == 2
    assert option in capsys.readouterr().err


def test_run_goes_on_after_an_image_that_cannot_be_read(
    bundle_path: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes, empty = tmp_path / "notes.jpg", tmp_path / "empty"
    notes.write_text("no image")
    empty.mkdir()
    bad = [str(notes), str(tmp_path / "none.jpg"), str(empty), str(tmp_path / "*.webp")]
    assert run.main([str(bundle_path), bad[0], str(photo), *bad[1:], str(photo), "--json"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert [record["image"] for record in report["predictions"]] == [bad[0], str(photo), *bad[1:], str(photo)]
    assert [record["error"].partition(": ")[0] for record in report["predictions"] if "error" in record] == bad
    assert [record["expert"] for record in report["predictions"] if "error" not in record] == [2, 2]
    lines = [f"error: {record['error']}" for record in report["predictions"] if "error" in record]
    assert err.splitlines() == [*lines, "error: 4 of 6 images cannot be read"]
    assert run.main([str(bundle_path), *bad]) == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", [*lines, "error: none of the 4 images can be read"])


def test_run_takes_folders_patterns_and_standard_input(
    bundle_path: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "photos" / "inner"
    inner.mkdir(parents=True)
    odd = tmp_path / "photos" / "a[1].png"
    for copy in (inner / "without a name", odd, inner / ".hidden.png"):
        copy.write_bytes(photo.read_bytes())
    (inner / "notes.txt").write_text("no image")

    def images(*arguments: object) -> list[str]:
        assert run.main([str(bundle_path), *map(str, arguments), "--json"]) == 0
        records = json.loads(capsys.readouterr().out)["predictions"]
        assert {record["expert"] for record in records} == {2}
        return [record["image"] for record in records]

    assert images(tmp_path / "photos") == [str(odd), str(inner / "without a name")]
    assert images(tmp_path / "photos" / "**" / "*[!t]") == [str(odd), *2 * [str(inner / "without a name")]]
    assert images(odd) == [str(odd)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(photo.read_bytes()), encoding="utf-8"))
    assert images("-") == ["-"]
    assert "standard input: not an image" in fails(capsys, run.main, bundle_path, "-")


@pytest.mark.parametrize("command", ["run", "bench", "train"])
def test_more_threads_than_make_sense_are_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        COMMANDS[command].main(["x", "--threads", "99999"])
    assert exit_.value.code == 2
    most = 4 * (os.cpu_count() or 1)
    assert f"argument --threads: must be at most {most}, 4 for each CPU here, is 99999" in capsys.readouterr().err


# mvmoe-inspect


def test_inspect(bundle_path: Path, dense_path: Path, k2: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (bundle_path, dense_path, k2.path):
        assert inspect.main([str(path), "--verify"]) == 0
        text = capsys.readouterr().out
        assert "match their sha256" in text
        assert "top-1 agreement 100.0%" in text
        for piece in open_bundle(path).manifest.pieces:
            assert piece.name in text


def test_inspect_as_json_is_the_manifest(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(bundle_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((bundle_path / "manifest.json").read_text())


def test_inspect_refuses(bundle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a bundle" in fails(capsys, inspect.main, tmp_path)
    (bundle_copy / "expert_01.bin").write_bytes(b"short")
    assert "expert_01.bin: has 5 bytes" in fails(capsys, inspect.main, bundle_copy, "--verify")
    assert inspect.main([str(bundle_copy)]) == 0  # without --verify, no file is checked


@pytest.mark.parametrize("report", [{}, {"pieces": []}, {"anything": 1}, {"pieces": 3}])
def test_inspect_shows_a_bundle_whose_report_is_another(
    bundle_copy: Path, report: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest does not fix the report's form: another release's report may lack what this release prints."""
    mine = {"architecture": "mine"}  # of somebody else, who says no more of it
    tiny.edit_manifest(bundle_copy, lambda manifest: manifest.update(verification=report, model=mine))
    assert inspect.main([str(bundle_copy)]) == 0
    text = capsys.readouterr().out
    assert "expert_03" in text and "model: mine\n" in text


# mvmoe-bench


def test_bench(bundle_path: Path, dense_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "results.json", tmp_path / "results.md"
    argv = [str(dense_path), str(bundle_path), "--rounds", "12", "--min-seconds", "0", "--cold-starts", "1"]
    assert bench.main([*argv, "--json", str(file), "--markdown", str(page)]) == 0
    assert "dense" in capsys.readouterr().out
    assert "| moe" in page.read_text()
    results = read_json(file)
    dense, moe = results.rows
    assert dense.ratio is not None
    assert (dense.ratio.value, len(moe.warm.samples)) == (1.0, 12)
    for row, config in ((dense, tiny.dense_config()), (moe, tiny.moe_config())):
        assert row.parameters == config.parameters()
        assert (row.flops, row.macs) == (config.flops(), config.macs())
    assert moe.bytes_first_image < moe.bytes_on_disk
    assert np.percentile(moe.warm.samples, 50) == pytest.approx(moe.warm.p50.value)
    assert {"processor", "cores", "onnxruntime", "commit"} <= set(results.machine)
    assert results.method["rounds"] == 12


def test_bench_refuses(bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no images" in fails(capsys, bench.main, bundle_path, "--images", tmp_path / "empty")
    assert "not a bundle" in fails(capsys, bench.main, tmp_path)
    assert "give it no models" in fails(capsys, bench.main, bundle_path, "--suite", "paper")
    assert "--scales is for --suite" in fails(capsys, bench.main, bundle_path, "--scales", "6x64")
    assert "'x' is not of the form" in fails(capsys, bench.main, "--suite", "paper", "--scales", "x")
    assert "are made from a routed checkpoint" in fails(capsys, bench.main, bundle_path, "--baselines", "stock")
    assert "unknown baseline 'fast'" in fails(capsys, bench.main, "--baselines", "fast")
    assert "unknown backend 'tpu'" in fails(capsys, bench.main, "--backends", "tpu")


# as processes


def process(*argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, argv)], capture_output=True, text=True, timeout=120, check=False, **options
    )


def test_commands_as_processes(bundle_path: Path, photo: Path) -> None:
    done = process("mvmoe_deploy.cli.run", bundle_path, photo, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["predictions"][0]["expert"] == 2
    assert done.stderr == ""
    done = process("mvmoe_deploy.cli.run", bundle_path, "none.jpg")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: none.jpg: no such file\n")


def test_a_reader_that_has_read_enough_is_no_error(bundle_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)  # closed at once, so that the write fails for certain, as it may with head
    argv = [sys.executable, "-m", "mvmoe_deploy.cli.inspect", str(bundle_path), "--json"]
    result = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


def test_running_needs_no_toolchain(bundle_path: Path, photo: Path, tmp_path: Path) -> None:
    """On a device, torch, onnx and the other toolchains are not installed."""
    for name in ("torch", "onnx", "onnxscript", "executorch", "coremltools", "safetensors", "sklearn", "scipy"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on this device')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for argv in (("run", bundle_path, photo), ("inspect", bundle_path, "--verify")):
        done = process(f"mvmoe_deploy.cli.{argv[0]}", *argv[1:], env=environment)
        assert done.returncode == 0, done.stderr


def test_export_to_all_targets_goes_on_after_one_failed(
    moe_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first target fails. The second is still exported, from the same split; the exit code shows the failure."""
    splits: list[object] = []
    real = split.split_model
    monkeypatch.setattr(split, "split_model", lambda *args: splits.append(args) or real(*args))
    two = {name: targets.get(name) for name in ("coreml", "onnx")}
    monkeypatch.setattr(targets, "known", lambda: two)
    monkeypatch.delitem(sys.modules, "mvmoe_deploy.exporters.coreml.convert", raising=False)
    monkeypatch.setitem(sys.modules, "coremltools", None)
    assert export.main([str(moe_checkpoint), "--target", "all", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "wrote" in out
    assert "coreml: target coreml needs the package coremltools: pip install 'mvmoe-deploy[coreml]'" in err
    assert err.endswith("error: 1 of 2 targets failed, see above\n")
    assert open_bundle(tmp_path / "moe-onnx.mvmoe").manifest.target == "onnx"
    assert not (tmp_path / "moe-coreml.mvmoe").exists()
    assert len(splits) == 1


def test_inspect_prints_a_snippet(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(bundle_path), "--snippet", "kotlin"]) == 0
    assert "Runtime.load" in capsys.readouterr().out
