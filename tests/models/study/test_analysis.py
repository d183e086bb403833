"""Router analysis: every figure computed by hand, the same figures from checkpoint and bundle, and its pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.checkpoint import Superclasses
from mvmoe_deploy.cli import train
from mvmoe_deploy.errors import DataError
from mvmoe_deploy.models.model import ImageRoutes, TokenRoutes
from mvmoe_deploy.models.study.analysis import BINS, analyse_images, analyse_tokens, superclasses_of
from mvmoe_deploy.models.study.evaluation import Predictions
from mvmoe_deploy.models.study.pictures import draw_confusion, draw_routing

NAMES = ["ant", "bee", "cat"]
GROUPS = Superclasses(["insects", "others"], [0, 0, 1])


def three_classes() -> Predictions:
    """Five images; the second is sent to the wrong expert, the third and the fourth get the wrong class."""
    probabilities = torch.tensor([[0.92, 0.08], [0.47, 0.53], [0.71, 0.29], [0.18, 0.82], [0.01, 0.99]])
    top = torch.tensor([[0, 1], [0, 1], [2, 1], [0, 2], [2, 0]])
    return Predictions(torch.tensor([0, 0, 1, 2, 2]), top, ImageRoutes(probabilities, probabilities.argmax(1)[:, None]))


def histogram(*bins: int) -> list[int]:
    return [bins.count(place) for place in range(BINS)]


def test_every_figure_of_a_per_image_router() -> None:
    predictions = three_classes()
    forced = Predictions(predictions.labels, torch.tensor([[0], [0], [1], [2], [2]]), predictions.routing)
    a = analyse_images(predictions, NAMES, GROUPS, forced)
    assert (a.images, a.accuracy, a.router_accuracy) == (5, pytest.approx(0.6), pytest.approx(0.8))
    assert (a.accuracy_routed_right, a.accuracy_routed_wrong, a.accuracy_if_right) == (0.5, 1.0, 1.0)
    assert a.heat == [[0.5, 0.5], [1, 0], [0, 1]]
    assert a.order == [1, 0, 2]  # within insects, the more surely routed first
    assert a.load == pytest.approx([0.4, 0.6])
    assert a.fair_load == pytest.approx([0.6, 0.4])
    assert a.expert_accuracy == [0.5, pytest.approx(2 / 3)]
    assert a.gates == [histogram(18, 14, 16, 19), histogram(10)]
    assert a.margins == [histogram(16, 8, 12, 19), histogram(1)]
    assert a.margin_percentiles[2] == pytest.approx(0.64)
    assert "5 images: top-1 60.0%, router 80.0%; top-1 routed right 50.0%" in a.headline


def test_without_super_classes_what_can_be_said_is_said() -> None:
    a = analyse_images(three_classes(), NAMES)
    assert (a.router_accuracy, a.accuracy_routed_right, a.fair_load, a.superclass_of) == (None, None, None, None)
    assert a.expert_names == ["expert 0", "expert 1"]
    assert a.gates == [histogram(18, 10, 14, 16, 19)]
    assert a.headline == "5 images: top-1 60.0%"


def test_an_idle_expert_and_an_absent_class() -> None:
    predictions = three_classes()
    routing = ImageRoutes(torch.tensor([[1.0, 0.0]]).expand(5, 2), torch.zeros(5, 1, dtype=torch.long))
    a = analyse_images(Predictions(predictions.labels, predictions.top, routing), [*NAMES, "dog"])
    assert a.expert_accuracy == [pytest.approx(0.6), None]
    assert a.heat[3] == [0, 0]
    assert a.margins == [histogram(19, 19, 19, 19, 19)]


def test_two_experts_per_image() -> None:
    predictions = three_classes()
    assert isinstance(predictions.routing, ImageRoutes)
    predictions.routing.chosen = predictions.routing.probabilities.argsort(descending=True)
    a = analyse_images(predictions, NAMES, GROUPS)
    assert a.heat == [[0.5, 0.5]] * 3
    assert a.load == [0.5, 0.5]
    assert a.router_accuracy == pytest.approx(0.8)  # the first choice counts


def test_other_super_classes_than_experts_are_refused() -> None:
    with pytest.raises(DataError, match="there are 3 super-classes but 2 experts"):
        analyse_images(three_classes(), NAMES, Superclasses(["a", "b", "c"], [0, 1, 2]))


def tokens() -> Predictions:
    """Two images of two classes, two MoE layers, three experts."""
    choices = torch.tensor([[[0.5, 0.5, 0], [1, 0, 0]], [[0, 0.25, 0.75], [0, 0, 1]]])
    used = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 0, 0]]]).bool()
    routing = TokenRoutes(choices, used, torch.tensor([0.125, 0.5]))
    return Predictions(torch.tensor([1, 0]), torch.tensor([[1], [1]]), routing)


def test_every_figure_of_a_per_token_router() -> None:
    a = analyse_tokens(tokens(), ["ant", "bee", "cat"])
    assert (a.images, a.accuracy) == (2, 0.5)
    assert a.heat == [[[0, 0.25, 0.75], [0.5, 0.5, 0], [0, 0, 0]], [[0, 0, 1], [1, 0, 0], [0, 0, 0]]]
    assert a.order == [1, 2, 0]
    assert a.load == [[0.25, 0.375, 0.375], [0.5, 0, 0.5]]
    assert a.overflow == [0.125, 0.5]
    assert a.touched == [[0, 1, 1, 0], [1, 1, 0, 0]]
    assert a.mean_touched == [1.5, 0.5]
    assert "an image touches 2.00 of 6 expert MLPs in 2 MoE layers" in a.headline


@pytest.mark.parametrize("kind", ["super-classes", "none", "tokens"])
def test_pictures(kind: str, tmp_path: Path) -> None:
    groups = GROUPS if kind == "super-classes" else None
    analysis = analyse_tokens(tokens(), NAMES) if kind == "tokens" else analyse_images(three_classes(), NAMES, groups)
    draw_routing(analysis, tmp_path / "routing.png", "moe.pt")
    with Image.open(tmp_path / "routing.png") as picture:
        assert picture.width > 600
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    assert len(list(tmp_path.iterdir())) == 1


def test_pictures_of_many_and_oddly_named_classes(tmp_path: Path) -> None:
    """Beyond ten columns of names, rows become thinner; dollar signs and line ends are ordinary characters."""
    classes, experts = 1010, 12
    labels = torch.arange(classes)
    probabilities = torch.eye(experts)[labels % experts]
    predictions = Predictions(labels, labels[:, None], ImageRoutes(probabilities, probabilities.argmax(1)[:, None]))
    names = ["$\\frac{$", "a\nb", "x" * 500, *map(str, range(3, classes))]
    groups = Superclasses([f"${index}" for index in range(experts)], (labels % experts).tolist())
    draw_routing(analyse_images(predictions, names, groups), tmp_path / "many.png", "$$.pt")
    with Image.open(tmp_path / "many.png") as picture:
        assert max(picture.size) < 15_000
    draw_confusion(np.full((3, 3), 1 / 3), np.array([0, 1, 1]), ["$x$", "y / z"], names[:3], tmp_path / "odd.png")
    with Image.open(tmp_path / "odd.png") as picture:
        assert max(picture.size) < 3_000


# from files


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    tiny.image_folder(root, "val", tiny.CLASSES, 6, size=tiny.SIZE)
    return root


def analysed(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert train.main(["analyse", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert train.main(["analyse", *argv]) == 2
    return capsys.readouterr().err


def test_checkpoint_and_bundle_agree(
    data: Path, moe_checkpoint: Path, bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "routing.png"
    of_checkpoint = analysed(capsys, str(moe_checkpoint), "--data", str(data), "--plot", str(picture))
    assert picture.is_file()
    of_bundle = analysed(capsys, str(bundle_path), "--data", str(data), "--threads", "1")
    assert of_checkpoint.keys() == of_bundle.keys()
    for key, value in of_checkpoint.items():
        if key == "margin_percentiles":
            assert of_bundle[key] == pytest.approx(value, abs=1e-5)
        else:
            assert of_bundle[key] == value, key
    assert of_checkpoint["images"] == 36
    assert of_checkpoint["accuracy_if_right"] is not None
    assert max(of_checkpoint["load"]) < 1  # otherwise little could differ
    flat = str(data / "val")  # without a val of its own: a checkpoint knows the share, a bundle has to be told
    assert "--val-share 0.1 takes a tenth" in refused(capsys, str(bundle_path), "--data", flat)
    assert analysed(capsys, str(bundle_path), "--data", flat, "--val-share", "0.5")["images"] == 18
    few = analysed(capsys, str(bundle_path), "--data", str(data), "--count", "12")
    assert few["images"] == 12
    assert all(sum(row) == pytest.approx(1) for row in few["heat"])  # images of every class


def test_tables(data: Path, moe_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["analyse", str(moe_checkpoint), "--data", str(data)]) == 0
    out = capsys.readouterr().out
    assert "36 images: top-1" in out
    assert "group 3" in out
    checkpoints.save(
        tmp_path / "vmoe.pt", tiny.checkpoint_of(tiny.lively_model(tiny.vmoe_config(depth=4, placement="last-2")))
    )
    assert train.main(["analyse", str(tmp_path / "vmoe.pt"), "--data", str(data)]) == 0
    out = capsys.readouterr().out
    assert "expert MLPs in 2 MoE layers" in out
    assert "touched" in out


def test_what_cannot_be_analysed_is_refused(
    data: Path, dense_checkpoint: Path, dense_path: Path, moe_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dense in (dense_checkpoint, dense_path):
        assert "is a dense model, which routes nothing" in refused(capsys, str(dense), "--data", str(data))
    assert "no such file" in refused(capsys, str(data / "none.pt"), "--data", str(data))
    error = refused(capsys, str(moe_checkpoint), "--data", str(data), "--backend", "onnxruntime")
    assert "is a checkpoint, which PyTorch runs" in error


def test_super_classes_of_a_bundle(bundle_path: Path) -> None:
    manifest = open_bundle(bundle_path).manifest
    found = superclasses_of(manifest)
    assert found is not None
    assert found.of_class == [c % tiny.EXPERTS for c in range(tiny.CLASSES)]
    assert found.names == [f"group {index}" for index in range(tiny.EXPERTS)]
    unknown = [msgspec.structs.replace(expert, classes=[]) for expert in manifest.experts]
    assert superclasses_of(msgspec.structs.replace(manifest, experts=unknown)) is None
    twice = [msgspec.structs.replace(expert, classes=list(range(tiny.CLASSES))) for expert in manifest.experts]
    assert superclasses_of(msgspec.structs.replace(manifest, experts=twice)) is None
