"""A model whose outputs are not finite has no accuracy, no routes and no confusions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.cli import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        tiny.image_folder(root, split, tiny.CLASSES, 2, size=tiny.SIZE)
    return root


def saved(path: Path, routed: bool, bias: float | None) -> str:
    """Writes a checkpoint in which all classes have this bias; None keeps their own."""
    checkpoint = tiny.checkpoint_of(tiny.lively_model(tiny.moe_config() if routed else tiny.dense_config()))
    if bias is not None:
        checkpoint.weights["head.bias"] = torch.full((tiny.CLASSES,), bias)
    checkpoints.save(path, checkpoint)
    return str(path)


@pytest.mark.parametrize("bias", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("command", ["evaluate", "compare", "analyse", "superclasses"])
def test_outputs_that_are_not_finite_fail(
    command: str, bias: float, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, fine = tmp_path / "broken.pt", tmp_path / "fine.pt"

    def run(path: str) -> int:
        argv = {
            "evaluate": [path],
            "compare": [path, path],
            "analyse": [path],
            "superclasses": [
                path,
                "--hold-out",
                "1",
                "--experts",
                "2",
                "--out",
                str(tmp_path / "groups.tsv"),
            ],
        }[command]
        return train.main([command, *argv, "--data", str(data)])

    routed = command == "analyse"
    assert run(saved(broken, routed, bias)) == 1
    output = capsys.readouterr()
    assert output.err.splitlines()[-1].startswith("error: the model's outputs are NaN or infinite for some images")
    assert not (tmp_path / "groups.tsv").exists()
    assert run(saved(fine, routed, None)) == 0


@pytest.mark.parametrize("file", ["trunk.bin", "tail_shared.bin"])
def test_a_bundle_whose_outputs_are_not_finite_fails_too(
    file: str, bundle_path: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tiny.copy_of(bundle_path, tmp_path)
    weights = broken / file
    np.full(weights.stat().st_size // 4, np.nan, np.float32).tofile(weights)
    tiny.rehash(broken)
    assert train.main(["analyse", str(broken), "--data", str(data)]) == 1
    message = {
        "trunk.bin": "does not return probabilities",
        "tail_shared.bin": "returned logits or classes that are NaN",
    }
    assert message[file] in capsys.readouterr().err
