"""A target of another package: announced, exported, verified, inspected, run and measured, by one file of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny
import toy_target
from PIL import Image

import mvmoe_deploy
from mvmoe_deploy import targets
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.cli import bench, export, inspect, run
from mvmoe_deploy.errors import BackendError, BundleError, ConfigError
from mvmoe_deploy.models import ViT
from mvmoe_deploy.snippets import snippet

SOURCE = Path(toy_target.__file__)
DOCUMENT = Path(__file__).parents[2] / "docs" / "adding-a-target.md"


def announce(folder: Path, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    """Makes ``folder`` what an installed package looks like to Python, to this process and to those it starts."""
    info = folder / "toy_target-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-target\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{targets.GROUP}]\ntoy = {entry}\n")
    paths = [str(folder), str(SOURCE.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.syspath_prepend(folder)
    targets.installed.cache_clear()


@pytest.fixture
def installed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forget = targets.installed.cache_clear
    announce(tmp_path_factory.mktemp("site"), monkeypatch, "toy_target:TARGET")
    yield
    forget()


@pytest.fixture
def bundle(installed: None, moe_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The bundle of the tiny routed checkpoint, exported by ``mvmoe-export``."""
    path = tmp_path / "toy.mvmoe"
    assert export.main([str(moe_checkpoint), "--target", "toy", "--out", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backend"] == "numpy"
    assert [piece["piece"] for piece in report["pieces"]] == ["trunk", *(f"expert_{e:02d}" for e in range(4))]
    assert report["routing_agreement"] == report["top1_agreement"] == 1
    return path


def test_it_takes_less_than_80_lines() -> None:
    assert sum(1 for line in SOURCE.read_text(encoding="utf-8").splitlines() if line.strip()) < 80


def test_the_document_quotes_it() -> None:
    quoted = [part.split("```")[0] for part in DOCUMENT.read_text().split("```python\n")[1:]]
    assert len(quoted) >= 4
    for part in quoted:
        assert part in SOURCE.read_text(encoding="utf-8")


def test_inspect(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(bundle), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "toy, fp32, separate layout, 10 files" in out  # five pieces; a self-test, with a picture for each expert
    assert "expert_03.npz" in out
    with pytest.raises(BundleError, match=r"no kotlin snippet for toy bundles$"):
        snippet(open_bundle(bundle), "kotlin")


def test_run(bundle: Path, moe_model: ViT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(tiny.images(1)[0]).save(photo)
    assert run.main([str(bundle), str(photo), "--max-resident", "1", "--json"]) == 0
    (prediction,) = json.loads(capsys.readouterr().out)["predictions"]
    with mvmoe_deploy.load(bundle) as runtime:
        logits, _ = runtime.run(tiny.inputs(5).numpy())
        label = runtime.predict(photo).label
    np.testing.assert_allclose(logits, moe_model(tiny.inputs(5)).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert prediction["top"][0]["label"] == label


def test_bench(bundle: Path, tmp_path: Path) -> None:
    """Memory and cold starts are measured in processes of their own, which find the target as this one does."""
    out = tmp_path / "results.json"
    assert (
        bench.main([str(bundle), "--rounds", "2", "--min-seconds", "0", "--cold-starts", "1", "--json", str(out)]) == 0
    )
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["backend"], row["precision"]) == ("numpy", "fp32")
    assert row["warm"]["p50"]["value"] > 0
    assert len(row["cold_start"]["load"]) == 1
    assert row["counted_macs"] is None


def test_a_checkpoint_is_measured_on_its_backend(installed: None) -> None:
    from mvmoe_deploy.bench.candidates.configuration import backend_names

    assert "numpy" in backend_names()


def test_its_options(installed: None, moe_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(moe_checkpoint), "--target", "onnx", "--compress"]) == 2
    assert capsys.readouterr().err == "error: --compress: target onnx has no such option, toy has\n"
    sizes = {}
    for flags in ([], ["--compress"], ["--precision", "fp16"]):
        out = tmp_path / f"{len(sizes)}.mvmoe"
        assert export.main([str(moe_checkpoint), "--target", "toy", "--out", str(out), *flags]) == 0
        sizes[" ".join(flags)] = sum(file.stat().st_size for file in out.glob("*.npz"))
    assert sizes["--compress"] < 0.95 * sizes[""]
    assert sizes["--precision fp16"] < 0.75 * sizes[""]
    with pytest.raises(SystemExit):
        export.main(["--help"])
    out_text = capsys.readouterr().out
    assert "NumPy (--target toy):\n  precisions: fp32, fp16\n  layouts: separate\n" in out_text
    assert "--compress" in out_text


def test_without_its_package_the_bundle_is_refused_in_one_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targets, "installed", dict)
    assert run.main([str(bundle), "photo.png"]) == 2
    expected = "unknown target 'toy': expected one of onnx, executorch, coreml"
    assert capsys.readouterr().err == f"error: {bundle}/manifest.json: {expected}\n"


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_registered", dict(targets.known()))
    with pytest.raises(ConfigError, match="unknown target 'toy'"):
        targets.get("toy")
    targets.register(toy_target.TARGET)
    assert targets.get("toy") is targets.of_backend("numpy") is toy_target.TARGET
    assert list(targets.known()) == ["onnx", "executorch", "coreml", "toy"]
    with pytest.raises(ConfigError, match="target 'toy' is registered twice"):
        targets.register(toy_target.TARGET)
    with pytest.raises(BackendError, match="unknown backend 'tpu': expected one of onnxruntime, executorch, coreml"):
        targets.of_backend("tpu")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("toy_target:NO_SUCH", "entry point toy_target:NO_SUCH: cannot be imported"),
        ("no_such_module:TARGET", r"entry point no_such_module:TARGET: cannot be imported \(No module named"),
        ("toy_target:BACKEND", "entry point toy_target:BACKEND: is a Engine, expected Target"),
    ],
)
def test_an_entry_point_that_is_no_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, message: str
) -> None:
    announce(tmp_path, monkeypatch, entry)
    try:
        with pytest.raises(ConfigError, match=message):
            targets.known()
        assert targets.get("onnx").name == "onnx"  # which needs no other package
    finally:
        monkeypatch.undo()
        targets.installed.cache_clear()


def test_two_targets_of_one_name_or_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_registered", dict(targets.known()))
    with pytest.raises(ConfigError, match="target 'onnx' is registered twice"):
        targets.register(msgspec.structs.replace(toy_target.TARGET, name="onnx"))
    clash = msgspec.structs.replace(toy_target.TARGET, backends=(targets.Engine("coreml", "toy_target:NumpyBackend"),))
    with pytest.raises(ConfigError, match="another target already has a backend called 'coreml'"):
        targets.register(clash)
