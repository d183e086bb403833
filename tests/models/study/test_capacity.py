"""A V-MoE's accuracy as a function of its capacity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy import models
from mvmoe_deploy.cli import train
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models.study.capacity import capacity_curve
from mvmoe_deploy.models.study.evaluation import evaluate
from mvmoe_deploy.models.train.data import ImageSet


def test_the_curve_is_that_of_evaluating_at_each_capacity() -> None:
    model = tiny.lively_model(tiny.vmoe_config(depth=4, placement="last-2", capacity_factor=1.5))
    assert isinstance(model, models.VMoE)
    pixels = torch.from_numpy(tiny.images(60)).permute(0, 3, 1, 2)
    with torch.no_grad():
        labels = model(tiny.inputs(60)).argmax(1)  # so that less capacity can only lower accuracy
    images, preprocessing = ImageSet(pixels, labels, [], []), Preprocessing(size=32)
    curve = capacity_curve(model, images, preprocessing, [0.1, 0.4, 4.0], batch=30)
    assert (curve.images, curve.batch, curve.trained_factor, model.config.order) == (60, 30, 1.5, "vanilla")
    assert [(p.factor, p.order) for p in curve.points] == [(f, o) for f in (0.1, 0.4, 4.0) for o in ("vanilla", "bpr")]
    for point in curve.points:
        model.set_capacity(point.factor, point.order)
        assert point.accuracy == evaluate(model, images, preprocessing, batch=30).accuracy
    vanilla, bpr = curve.points[::2], curve.points[1::2]
    assert vanilla[0].overflow > 0.5 > vanilla[2].overflow == 0
    assert vanilla[0].flops < vanilla[1].flops < vanilla[2].flops
    assert vanilla[0].accuracy < vanilla[2].accuracy == bpr[2].accuracy
    assert bpr[0].gain is not None
    assert bpr[0].gain.points == pytest.approx(100 * (bpr[0].accuracy - vanilla[0].accuracy))


def test_the_command(tmp_path: Path, moe_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.image_folder(tmp_path, "val", tiny.CLASSES, 4, size=tiny.SIZE)
    checkpoints.save(tmp_path / "vmoe.pt", tiny.checkpoint_of(tiny.lively_model(tiny.vmoe_config())))
    argv = ["capacity", str(tmp_path / "vmoe.pt"), "--data", str(tmp_path)]
    assert train.main([*argv, "--json", "--plot", str(tmp_path / "curve.png"), "--factors", "1", "0.5"]) == 0
    curve = json.loads(capsys.readouterr().out)
    assert [point["factor"] for point in curve["points"]] == [0.5, 0.5, 1, 1]
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width > 600
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    assert "24 images in mixed batches of 500, trained at 1.05" in out
    assert train.main([*argv, "--factors", "0"]) == 2
    assert "capacity_factor is 0.0, must be above 0" in capsys.readouterr().err
    assert train.main(["capacity", str(moe_checkpoint), "--data", str(tmp_path)]) == 2
    assert "has no capacity" in capsys.readouterr().err
