"""Models side by side: the paired interval, the training samples, and what each needs on a device."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny
import torch

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy import models
from mvmoe_deploy.cli import train
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models.model import ImageRoutes, TokenRoutes
from mvmoe_deploy.models.study.comparison import (
    PAPER,
    compare,
    needs,
    paired_difference,
    recipe_differences,
    training_images,
)
from mvmoe_deploy.models.study.evaluation import Predictions, predict
from mvmoe_deploy.models.train.data import ImageSet


def outcomes(both: int, gained: int, lost: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the shuffled images two models get right: (right, base)."""
    right = torch.tensor([True] * both + [True] * gained + [False] * lost + [False] * neither)
    base = torch.tensor([True] * both + [False] * gained + [True] * lost + [False] * neither)
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(0))
    return right[order], base[order]


def test_the_interval_is_that_of_resampling_the_images() -> None:
    right, base = outcomes(100, 60, 35, 205)
    found = paired_difference(right, base)
    assert (found.gained, found.lost, found.points) == (60, 35, pytest.approx(6.25))
    generator = np.random.default_rng(1)
    each = right.numpy().astype(int) - base.numpy().astype(int)
    drawn = [100 * each[generator.integers(0, len(each), len(each))].mean() for _ in range(20_000)]
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.26)  # 1 image
    assert found.p_value == pytest.approx(0.0135, abs=5e-4)  # R: binom.test(60, 95)
    assert found == paired_difference(right, base)


def test_pairing_counts() -> None:
    """The same accuracies, but the models disagree more often: the interval is wider."""
    alike = paired_difference(*outcomes(200, 20, 5, 175))
    unlike = paired_difference(*outcomes(100, 120, 105, 75))
    assert alike.points == unlike.points == pytest.approx(3.75)
    assert alike.low > 0 > unlike.low
    assert alike.p_value < 0.05 < unlike.p_value


def test_equal_models_do_not_differ() -> None:
    same = paired_difference(*outcomes(10, 0, 0, 5))
    assert (same.points, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_samples_of_the_models_it_started_from_count() -> None:
    dense = {"epochs_done": 14, "training_images": 1000}
    longer = {"epochs_done": 7, "training_images": 900, "started_from": {"file": "dense.pt", "training": dense}}
    moe = {"epochs_done": 1, "training_images": 500, "started_from": {"file": "longer.pt", "training": longer}}
    assert training_images(moe) == 14 * 1000 + 7 * 900 + 500
    assert training_images({"note": "random weights"}) is None
    assert training_images({**moe, "started_from": {"file": "foreign.pt"}}) is None


def answers(config: models.ViTConfig, count: int = 12) -> tuple[models.ViT, Predictions]:
    model = tiny.lively_model(config)
    images = ImageSet(torch.from_numpy(tiny.images(count)).permute(0, 3, 1, 2), torch.arange(count) % 6, [], [])
    return model, predict(model, images, Preprocessing(size=32), batch=5)


def test_needs_of_a_dense_and_of_a_routed_model() -> None:
    dense = needs(*answers(tiny.dense_config()))
    assert dense.image_bytes == dense.most_image_bytes == dense.all_bytes == 4 * tiny.dense_config().parameters()
    config = tiny.moe_config(depth=3, moe_layers=2, k=2)
    model, predictions = answers(config)
    routed = needs(model, predictions)
    assert (routed.touched, routed.most_touched, routed.expert_mlps) == (4, 4, 8)
    assert routed.active_parameters == config.active_parameters()
    assert routed.image_bytes == routed.most_image_bytes == 4 * config.active_parameters()
    assert isinstance(predictions.routing, ImageRoutes)
    ever = len(set(predictions.routing.chosen.flatten().tolist()))
    unused = 2 * (config.experts - ever) * config.expert_parameters()
    assert routed.all_bytes == 4 * (config.parameters() - unused)


def test_needs_of_a_token_routed_model_are_measured() -> None:
    config = tiny.vmoe_config(depth=4, placement="last-2", capacity_factor=2.0)
    model, predictions = answers(config)
    assert isinstance(predictions.routing, TokenRoutes)
    predictions.routing.used = torch.zeros(3, 2, 4, dtype=torch.bool)
    predictions.routing.used[0, 0, [0, 1, 2]] = True
    predictions.routing.used[1, 0, 0] = predictions.routing.used[1, 1, 0] = True
    predictions.routing.used[2, 1, 0] = True
    found = needs(model, predictions)
    mlp, shared = config.expert_parameters(), config.parameters() - 8 * config.expert_parameters()
    assert (found.touched, found.most_touched, found.expert_mlps) == (2, 3, 8)
    assert found.image_bytes == 4 * (shared + 2 * mlp)
    assert found.most_image_bytes == 4 * (shared + 3 * mlp)
    assert found.all_bytes == 4 * (shared + 4 * mlp)


def test_predictions_come_back_in_the_images_order() -> None:
    """A V-MoE's images are shuffled before they are run."""
    config = tiny.vmoe_config(depth=4, placement="last-2", capacity_factor=8.0)  # ample: images do not interact
    model, predictions = answers(config)
    with torch.no_grad():
        alone = [model.routed(image[None]) for image in tiny.inputs(12)]
    assert predictions.top[:, 0].tolist() == [int(routed.logits.argmax()) for routed in alone]
    assert isinstance(predictions.routing, TokenRoutes)
    assert torch.equal(predictions.routing.used, torch.cat([routed.used() for routed in alone]))
    assert torch.allclose(predictions.routing.choices, torch.cat([routed.choices() for routed in alone]))
    assert len(set(map(str, predictions.routing.choices.tolist()))) > 6  # otherwise the test could not see the order


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The five routings of figure 3e, untrained, and images for them."""
    root = tmp_path_factory.mktemp("five")
    tiny.image_folder(root, "val", tiny.CLASSES, 4, size=tiny.SIZE)
    shapes: list[tuple[models.ViTConfig, dict[str, Any]]] = [
        (tiny.dense_config(), {"epochs": 2}),
        (tiny.moe_config(), {"epochs": 2, "router": "super-class"}),
        (tiny.moe_config(), {"epochs": 3, "router": "random"}),
        (tiny.moe_config(), {"epochs": 2, "router": "end-to-end"}),
        (tiny.vmoe_config(), {"epochs": 2}),
    ]
    paths = []
    for number, (config, recipe) in enumerate(shapes):
        checkpoint = tiny.checkpoint_of(tiny.lively_model(config, seed=number))
        checkpoint.header.training = {"recipe": recipe, "epochs_done": recipe["epochs"], "training_images": 100}
        if recipe.get("router") == "end-to-end":
            checkpoint.header.superclasses = None
        paths.append(str(root / f"model{number}.pt"))
        checkpoints.save(paths[-1], checkpoint)
    return root, paths


def test_the_rows_of_figure_3e(five: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    root, paths = five
    assert train.main(["compare", *paths, "--data", str(root), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = result["rows"]
    assert [row["routing"] for row in rows] == list(PAPER)
    assert [row["paper_points"] for row in rows] == [None, *(pytest.approx(p) for p in (2.72, -2.48, 1.87, 3.15))]
    assert (result["images"], rows[0]["difference"]) == (24, None)
    assert [row["training_images"] for row in rows] == [200, 200, 300, 200, 200]
    for row in rows[1:]:
        assert row["difference"]["points"] == pytest.approx(100 * (row["accuracy"] - rows[0]["accuracy"]))
    assert rows[3]["router_accuracy"] is None
    assert result["recipes_differ_in"]["epochs"] == {f"model{i}": 3 if i == 2 else 2 for i in range(5)}
    assert list(result["recipes_differ_in"]) == ["epochs", "router"]
    assert list(result["verdicts"]) == ["model1", "model2"]  # those with super-classes
    for form in ([], ["--markdown"]):
        assert train.main(["compare", *paths, "--data", str(root), *form]) == 0
        out = capsys.readouterr().out
        assert "paper delta" not in out  # the paper's deltas are for ImageNet; this data has six classes
        assert "samples" in out and " 200" in out and " 300" in out
        assert "\nmodel1: " in out and result["verdicts"]["model1"][0] in out
        assert "recipes differ in epochs: model0 2, model1 2, model2 3, model3 2, model4 2" in out
        assert out.startswith("| model" if form else "model")


def test_the_papers_differences_stand_beside_a_task_like_its_own(
    five: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, paths = five
    monkeypatch.setattr("mvmoe_deploy.cli.train.compare.LEAST_CLASSES", tiny.CLASSES)
    assert train.main(["compare", *paths, "--data", str(root)]) == 0
    out = capsys.readouterr().out
    assert "paper delta" in out and "+2.72" in out and "-2.48" in out


def test_equal_recipes_have_no_differences() -> None:
    config = tiny.dense_config()
    model, predictions = answers(config)
    header = tiny.header_for(config)
    header.training = {"recipe": {"epochs": 1, "schedule": {"warm": [1, 2]}}}
    rows = compare([(name, header, model, predictions) for name in "ab"])
    assert recipe_differences(rows) == {}
    assert rows[1].difference is not None
    assert rows[1].difference.points == 0
    changed = dataclasses.replace(rows[1], recipe={"epochs": 1})
    assert recipe_differences([rows[0], changed]) == {"schedule": {"a": {"warm": [1, 2]}}}
    unrecorded = dataclasses.replace(rows[1], recipe={})
    assert recipe_differences([rows[0], unrecorded]) == {}
    taught = tiny.header_for(config)
    taught.training = header.training | {"teacher": {"sha256": "5e"}}
    rows = compare([("a", header, model, predictions), ("b", taught, model, predictions)])
    assert recipe_differences(rows) == {"teacher": {"b": "5e"}}


def test_models_of_other_classes_are_refused(
    five: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, paths = five
    other = checkpoints.load(paths[0])
    other.header = msgspec.structs.replace(other.header, class_ids=["x", *other.header.class_ids[1:]])
    checkpoints.save(tmp_path / "other.pt", other)
    assert train.main(["compare", paths[0], str(tmp_path / "other.pt"), "--data", str(root)]) == 2
    assert "other.pt: knows other classes than" in capsys.readouterr().err
    assert train.main(["compare", paths[0], "--data", str(root), "--split", "test"]) == 2
    assert "has neither a folder test/ nor a file test.zip" in capsys.readouterr().err
