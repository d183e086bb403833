"""The Core ML backend: what it says where Core ML does not run, and what it asks of Core ML where it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

pytest.importorskip("coremltools")

from mvmoe_deploy import load
from mvmoe_deploy.backends import coreml, open_backend
from mvmoe_deploy.backends.mil import read_package
from mvmoe_deploy.bundle import Bundle, open_bundle
from mvmoe_deploy.cli.run import main as run_command
from mvmoe_deploy.errors import BackendError
from mvmoe_deploy.exporters.coreml.exporter import CoreMLOptions
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.quiet import quiet

with quiet():
    import coremltools

CONFIG = tiny.moe_config(experts=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One multifunction package whose trunk takes an image."""
    options = CoreMLOptions("fp32", "packed", minimum_deployment_target="iOS18", image_input=True)
    path = tmp_path_factory.mktemp("coreml") / "b.mvmoe"
    return export_model(tiny.lively_model(CONFIG), tiny.header_for(CONFIG), "coreml", path, options=options)


class FakeMLModel:
    """Predicts as Core ML would, by interpreting the package; takes images as PIL images only."""

    def __init__(self, path: str, function_name: str | None = None) -> None:
        self._package = read_package(Path(path))
        self._program = self._package.program(function_name)

    def get_spec(self) -> Any:
        return self._package.model

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        given = dict(inputs)
        for name in self._program.images:
            assert isinstance(given[name], Image.Image)
            assert given[name].mode == "RGB"
            given[name] = np.asarray(given[name], np.float32).transpose(2, 0, 1)[None]
        return self._program(given)


@pytest.fixture
def on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml.sys, "platform", "darwin")
    monkeypatch.setattr(coremltools.models, "MLModel", FakeMLModel)


def test_elsewhere_it_offers_the_interpreter(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml.sys, "platform", "linux")
    with pytest.raises(BackendError, match="Core ML runs on Apple devices only; use --backend reference"):
        open_backend(bundle)


def test_the_command_says_so_in_one_line(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coreml.sys, "platform", "linux")
    photo = tmp_path / "photo.png"
    Image.fromarray(tiny.images(1)[0]).save(photo)
    assert run_command([str(bundle.path), str(photo)]) == 2
    error = capsys.readouterr().err
    assert "use --backend reference" in error
    assert error.count("\n") == 1


def test_it_runs_core_ml_bundles_only(bundle: Bundle, tmp_path: Path) -> None:
    copy = tiny.copy_of(bundle.path, tmp_path)
    tiny.edit_manifest(copy, lambda manifest: manifest.update(target="onnx"))
    with pytest.raises(BackendError, match="backend 'coreml' does not run onnx bundles: expected onnxruntime"):
        open_backend(open_bundle(copy), "coreml")


@pytest.mark.usefixtures("on_a_mac")
def test_a_bundle_runs_from_image_to_prediction(bundle: Bundle) -> None:
    model = tiny.lively_model(CONFIG)
    with load(bundle.path) as runtime, torch.no_grad():
        assert runtime.backend.name == "coreml"
        logits, _ = runtime.run(tiny.inputs(5).numpy())
        np.testing.assert_allclose(logits, model(tiny.inputs(5)).numpy(), atol=1e-5)
        prediction = runtime.predict(tiny.images(1)[0])
        assert prediction.label == bundle.manifest.class_names[int(model(tiny.inputs(1)).argmax())]


@pytest.mark.usefixtures("on_a_mac")
def test_other_inputs_than_the_manifest_says(bundle: Bundle) -> None:
    backend = open_backend(bundle)
    tail, trunk = bundle.piece("tail", 0), bundle.piece("trunk")
    with pytest.raises(BackendError, match=r"takes inputs \['images'\], manifest.json says \['tokens', 'gate'\]"):
        backend.load(msgspec.structs.replace(tail, function=trunk.function))


@pytest.mark.usefixtures("on_a_mac")
def test_an_output_that_does_not_come(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_backend(bundle).load(bundle.piece("trunk"))
    monkeypatch.setattr(FakeMLModel, "predict", lambda self, inputs: {"tokens": np.zeros((1, 17, 32))})
    with pytest.raises(BackendError, match="returns no 'probabilities', only"):
        run(tiny.inputs(1).numpy())


@pytest.mark.usefixtures("on_a_mac")
def test_errors_of_core_ml_are_ours(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error in building plan.\nmore")

    run = open_backend(bundle).load(bundle.piece("tail", 0))
    monkeypatch.setattr(FakeMLModel, "predict", fail)
    with pytest.raises(BackendError, match=r"model.mlpackage: Core ML failed \(Error in building plan"):
        run(np.zeros((1, 17, 32), np.float32), np.ones(1, np.float32))
    monkeypatch.setattr(FakeMLModel, "__init__", fail)
    with pytest.raises(BackendError, match=r"cannot load it \(Error in building plan\.\)"):
        open_backend(bundle).load(bundle.piece("trunk"))
