"""A training run as a library call, from a set of images or an endless source, and which runs can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy import models
from mvmoe_deploy.errors import ConfigError, DataError
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models.train.batches import Endless, batches_of
from mvmoe_deploy.models.train.data import ImageSet
from mvmoe_deploy.models.train.job import Job, train
from mvmoe_deploy.models.train.recipe import Recipe
from mvmoe_deploy.models.train.teacher import Teacher
from mvmoe_deploy.models.train.trainer import Trainer

SIZE, CLASSES = 8, 4
IDS = [f"c{index}" for index in range(CLASSES)]
CPU = torch.device("cpu")


class Drawn:
    """An endless map-style data set: sample n is noise in a shade of its class, drawn from n alone."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __getitem__(self, number: int, /) -> tuple[torch.Tensor, int]:
        self.asked.append(number)
        label = number * 7 % CLASSES
        noise = torch.randint(0, 30, (3, SIZE, SIZE), generator=torch.Generator().manual_seed(number))
        return (60 * label + noise).to(torch.uint8), label


def endless(samples: int = 64, **more: Any) -> Endless:
    return Endless(Drawn(), IDS, "drawn 1", samples, **more)


def images(count: int = 32) -> ImageSet:
    drawn = [Drawn()[1_000_000 + number] for number in range(count)]
    return ImageSet(torch.stack([image for image, _ in drawn]), torch.tensor([label for _, label in drawn]), IDS, [])


def job(out: Path, source: Any = None, **changes: Any) -> Job:
    recipe = {"epochs": 4, "batch": 16, "learning_rate": 0.005, "crop_padding": 1, "mixup": 0.2, **changes.pop("r", {})}
    dense = models.config_from_name("vit_2x16", image_size=SIZE, patch_size=4, classes=CLASSES)
    return Job(
        config=changes.pop("config", dense),
        recipe=Recipe(**recipe), train=endless() if source is None else source, val=images(), out=out,
        preprocessing=Preprocessing(size=SIZE), **changes,
    )  # fmt: skip


def same(a: Path, b: Path) -> bool:
    weights = checkpoints.load(b).weights
    return all(torch.equal(tensor, weights[name]) for name, tensor in checkpoints.load(a).weights.items())


class Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


def killed_after(epoch: int, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainer.train_epoch

    def stop(self: Trainer, progress: Any) -> float:
        if self.epoch == epoch:
            raise Killed
        return real(self, progress)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "train_epoch", stop)
        train(job)


def test_a_library_call_trains_and_returns_the_checkpoint(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    out = tmp_path / "dense.pt"
    checkpoint = train(job(out, images, r={"epochs": 2}), report=lines.append)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert checkpoint.header.class_ids == checkpoint.header.class_names == IDS
    assert all(torch.equal(tensor, checkpoint.weights[name]) for name, tensor in checkpoints.load(out).weights.items())


def test_an_endless_source_shows_every_sample_once_and_the_model_learns(tmp_path: Path) -> None:
    source = endless(100)  # six batches of 16; the last four samples do not fill one
    checkpoint = train(job(tmp_path / "x.pt", source, r={"epochs": 12, "mixup": 0.0}))
    asked = source.samples.asked  # type: ignore[attr-defined]
    assert asked == [number for epoch in range(12) for number in range(100 * epoch, 100 * epoch + 96)]
    assert checkpoint.header.training["training_images"] == 100
    assert checkpoint.header.training["val_accuracy"] > 2 / CLASSES


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_an_endless_source_killed_and_resumed_sees_the_same_images(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, killed = tmp_path / "undisturbed.pt", tmp_path / "killed.pt"
    train(job(undisturbed))
    killed_after(2, job(killed), monkeypatch)
    torch.manual_seed(99)
    train(job(killed, endless(workers=workers), resume=True))
    assert same(killed, undisturbed)


def test_it_is_not_resumed_on_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x.pt"
    killed_after(2, job(out), monkeypatch)
    for other in (endless(65), Endless(Drawn(), IDS, "drawn 2", 64), images(64)):
        with pytest.raises(Exception, match="was started with another set of training images"):
            train(job(out, other, resume=True))


def test_batches_are_of_the_recipe_and_their_numbers_alone() -> None:
    def second_epoch(recipe: Recipe, teacher: Teacher | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(batches_of(endless(), recipe, Preprocessing(size=SIZE), CPU, teacher).epoch(1))

    recipe = Recipe(batch=16, mixup=0.3, jitter=0.2)
    first, again = second_epoch(recipe), second_epoch(recipe)
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(first[0][0], second_epoch(Recipe(batch=16, mixup=0.3, jitter=0.2, seed=1))[0][0])
    assert all(torch.allclose(target.sum(1), torch.ones(16)) for _, target in first)
    assert any((target > 0.05).sum(1).max() == 2 for _, target in first)  # mixed with another image of the batch
    teacher = Teacher(models.build(models.config_from_name("vit_2x16", image_size=SIZE, patch_size=4, classes=CLASSES)))
    taught = second_epoch(Recipe(batch=16, mixup=0.3, jitter=0.2, teacher_weight=1.0), teacher)
    assert torch.equal(taught[0][0], first[0][0])
    assert torch.allclose(taught[0][1], teacher.ask(first[0][0]).float())


def test_what_an_endless_source_cannot_be_is_refused() -> None:
    preprocessing = Preprocessing(size=SIZE)
    with pytest.raises(ConfigError, match="views is 2, but an endless source shows no image twice"):
        batches_of(endless(), Recipe(views=2), preprocessing, CPU)
    with pytest.raises(ConfigError, match="samples_per_epoch is 0"):
        endless(0)
    with pytest.raises(DataError, match=r"sample 0: is torch.uint8 \[3, 8, 8\], expected uint8 \[3, 16, 16\]"):
        next(iter(batches_of(endless(), Recipe(batch=8), Preprocessing(size=16), CPU).epoch(0)))


def test_a_finished_run_is_never_started_again_by_resuming(tmp_path: Path) -> None:
    out = tmp_path / "x.pt"
    train(job(out))
    before = out.read_bytes()
    said: list[str] = []
    train(job(out, resume=True), say=said.append)
    assert said == [f"{out}: has all 4 epochs already; --force without --resume starts again"]
    with pytest.raises(
        DataError, match=r"is finished after 4 epochs, .* --from .*x\.pt --out ANOTHER trains it further"
    ):
        train(job(out, resume=True, r={"epochs": 6}))
    with pytest.raises(DataError, match="exists already; --resume goes on, --force starts again"):
        train(job(out))
    assert out.read_bytes() == before
    further = tmp_path / "further.pt"
    train(job(further, start_from=out, r={"epochs": 1}))
    assert checkpoints.load(further).header.training["started_from"]["file"] == "x.pt"


def test_training_images_are_read_after_everything_else_was_checked(tmp_path: Path) -> None:
    def read() -> ImageSet:
        raise AssertionError("read too early")

    reader: Callable[[], ImageSet] = read
    routed = models.config_from_name("mvmoe_2x16", image_size=SIZE, patch_size=4, classes=CLASSES, experts=2)
    for wrong, message in (
        ({"start_from": tmp_path / "none.pt"}, "none.pt: no such file"),
        ({"teacher": tmp_path / "none.pt", "r": {"teacher_weight": 1.0}}, "none.pt: no such file"),
        ({"answers": tmp_path}, "--answers keeps a --teacher's answers to"),
        ({"r": {"teacher_weight": 1.0}}, "a teacher needs a share of the target"),
        ({"config": routed}, "a per-image router is trained on super-classes"),
    ):
        with pytest.raises(Exception, match=message):
            train(job(tmp_path / "x.pt", reader, **wrong))


def test_what_cannot_be_trained_is_refused_before_a_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60,000 experts of a timm model took five minutes to build before a message about the router's super-classes."""

    def built(config: models.ModelConfig) -> models.Model:
        raise AssertionError("built too early")

    monkeypatch.setattr("mvmoe_deploy.models.train.job.build", built)
    many = models.config_from_name("mvmoe_2x16", image_size=SIZE, patch_size=4, classes=CLASSES, experts=60000)
    with pytest.raises(DataError, match="a per-image router is trained on super-classes"):
        train(job(tmp_path / "x.pt", config=many))
    monkeypatch.setattr("os.sysconf", lambda name: 16000)  # 256 MB
    with pytest.raises(
        ConfigError, match=r"training [\d,]+ weights with gradients and moments: the weights take .* GB"
    ):
        train(job(tmp_path / "x.pt", config=many, r={"router": "end-to-end"}))
    timm = models.config_from_name("timm:mobilenetv3_small_050", image_size=32, experts=60000)
    with pytest.raises(ConfigError, match=r"training 868,[\d,]{7} weights"):
        train(job(tmp_path / "x.pt", config=timm, r={"router": "end-to-end"}))


def test_images_of_other_classes_are_refused(tmp_path: Path) -> None:
    other = ImageSet(torch.zeros(8, 3, SIZE, SIZE, dtype=torch.uint8), torch.zeros(8).long(), ["a"], [])
    with pytest.raises(DataError, match="training and validation images are of different classes"):
        train(job(tmp_path / "x.pt", other))
