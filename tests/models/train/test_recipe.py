"""Every field of a recipe changes what is trained: a field that is ignored fails here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.models.model import Output
from mvmoe_deploy.models.train.data import ImageSet
from mvmoe_deploy.models.train.recipe import Recipe
from mvmoe_deploy.models.train.teacher import Teacher
from mvmoe_deploy.models.train.trainer import Trainer, training_loss

BASE: dict[str, Any] = {"epochs": 2, "batch": 8, "learning_rate": 0.01, "warmup_epochs": 0.5, "clip": 100.0}

OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # field: another value, and what else both runs need for the field to matter
    "epochs": ({"epochs": 3}, {}),
    "batch": ({"batch": 6}, {}),
    "optimizer": ({"optimizer": "muon"}, {}),
    "learning_rate": ({"learning_rate": 0.011}, {}),
    "weight_decay": ({"weight_decay": 0.5}, {}),
    "warmup_epochs": ({"warmup_epochs": 1.0}, {}),
    "label_smoothing": ({"label_smoothing": 0.3}, {}),
    "crop_padding": ({"crop_padding": 2}, {}),
    "min_crop": ({"min_crop": 0.5}, {}),
    "jitter": ({"jitter": 0.2}, {}),
    "flip": ({"flip": False}, {}),
    "views": ({"views": 1}, {}),
    "mixup": ({"mixup": 0.5}, {}),
    "teacher_weight": ({"teacher_weight": 0.9}, {"teacher_weight": 0.5}),
    "router": ({"router": "end-to-end"}, {"auxiliary_weight": 0.0, "router_weight": 0.0}),
    "router_weight": ({"router_weight": 0.6}, {}),
    "auxiliary_weight": ({"auxiliary_weight": 0.5}, {"router": "end-to-end"}),
    "expert_rate": ({"expert_rate": 0.5}, {}),
    "expert_pull": ({"expert_pull": 0.2}, {}),
    "learn": ({"learn": "mlp"}, {}),
    "clip": ({"clip": 0.01}, {}),
    "seed": ({"seed": 1}, {}),
    "precision": ({"precision": "bf16"}, {}),
}


def trained(tmp_path: Path, **fields: Any) -> torch.Tensor:
    """All weights of a model after two epochs, always from the same initial weights."""
    recipe = Recipe(**{**BASE, **fields})
    config = tiny.moe_config(image_size=8, patch_size=4)
    torch.manual_seed(0)
    model = tiny.lively_model(config)
    header = tiny.header_for(config)
    if recipe.router == "end-to-end":
        header.superclasses = None
    labels = torch.arange(24) % tiny.CLASSES
    images = ImageSet(torch.from_numpy(tiny.images(size=8)).permute(0, 3, 1, 2), labels, header.class_ids, [])
    teacher = None
    if recipe.teacher_weight:
        teacher = Teacher(tiny.lively_model(tiny.dense_config(image_size=8, patch_size=4), seed=5))
    trainer = Trainer(model, header, train=images, val=images, recipe=recipe, out=tmp_path / "x.pt", teacher=teacher)
    for epoch in range(2):
        trainer.epoch = epoch
        trainer.train_epoch()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_table_holds_every_field() -> None:
    assert set(OTHERWISE) == {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("field", OTHERWISE)
def test_no_field_is_ignored(field: str, tmp_path: Path) -> None:
    change, both = OTHERWISE[field]
    as_it_was = trained(tmp_path, **both)
    assert torch.equal(as_it_was, trained(tmp_path, **both))  # nothing else differs between two runs
    assert (as_it_was - trained(tmp_path, **{**both, **change})).abs().max() > 1e-5


def test_label_smoothing_is_the_share_spread_over_all_classes() -> None:
    """The loss is linear in the target: 1 - s times the label's loss plus s times the mean loss over all classes."""
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    target = torch.tensor([[1.0, 0.0, 0.0]])
    negative = -logits.log_softmax(-1)[0]
    loss = training_loss(Output(logits), target, None, Recipe(label_smoothing=0.3))
    assert float(loss) == pytest.approx(0.7 * float(negative[0]) + 0.3 * float(negative.mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [("optimizer", "sgd"), ("router", "psychic"), ("precision", "fp8"), ("epochs", 0), ("clip", float("inf")),
     ("learning_rate", float("nan")), ("expert_rate", 1.5), ("label_smoothing", 1.0)],
)  # fmt: skip
def test_a_wrong_value_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"recipe: {field} is "):
        Recipe(**{field: value})
