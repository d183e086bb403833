"""Core ML can only be measured on a Mac; what can be checked elsewhere is checked here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mvmoe_deploy.bench.devices import coreml as coreml_device
from mvmoe_deploy.cli import bench
from mvmoe_deploy.errors import ConfigError


@pytest.mark.skipif(sys.platform == "darwin", reason="here it can be measured")
def test_elsewhere_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "coreml", str(tmp_path / "birds.mvmoe")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --device coreml: Core ML runs on Apple devices only") and error.count("\n") == 1


def test_bundles_of_other_targets_are_refused(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml_device.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"moe\.mvmoe: is an onnx bundle"):
        coreml_device.measure([bundle_path], None, 1, 10)


class MLNeuralEngineComputeDevice: ...


class MLCPUComputeDevice: ...


def test_operations_are_counted_by_their_preferred_device() -> None:
    """The shape of coremltools' MLComputePlan; a constant has no device."""
    devices = [MLNeuralEngineComputeDevice(), None, MLCPUComputeDevice(), MLNeuralEngineComputeDevice()]
    block = SimpleNamespace(operations=list(range(4)))
    structure = SimpleNamespace(program=SimpleNamespace(functions={"trunk": SimpleNamespace(block=block)}))

    def usage(operation: int) -> SimpleNamespace | None:
        device = devices[operation]
        return None if device is None else SimpleNamespace(preferred_compute_device=device)

    plan = SimpleNamespace(model_structure=structure, get_compute_device_usage_for_mlprogram_operation=usage)
    assert coreml_device.count_devices(plan, "trunk") == {"NeuralEngine": 2, "CPU": 1}
