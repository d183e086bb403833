"""The convolutional teacher: it learns, students learn its answers, and it is asked once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import tiny
import torch
import torch.nn.functional as F
from killed import kill_after
from safetensors.torch import save

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy import models
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.cli import export, train
from mvmoe_deploy.errors import CheckpointError, ConfigError, DataError
from mvmoe_deploy.models import ResNet, ResNetConfig
from mvmoe_deploy.models.train.data import ImageSet
from mvmoe_deploy.models.train.recipe import Recipe
from mvmoe_deploy.models.train.teacher import Teacher
from mvmoe_deploy.models.train.trainer import Trainer

CLASSES = 6
RUN = ["--image-size", "16", "--threads", "1", "--batch", "24", "--crop-padding", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    tiny.image_folder(root, "train", CLASSES, 12)
    tiny.image_folder(root, "val", CLASSES, 4, seed=1)
    tiny.write_superclasses(root / "superclasses.tsv", CLASSES, 3)
    return root


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    argv = ["--data", str(data), "--model", "resnet_1x8", *RUN, "--optimizer", "muon", "--lr", "0.01",
            "--precision", "bf16", "--epochs", "15", "--out", str(out)]  # fmt: skip
    assert train.main(argv) == 0
    return out


def student(data: Path, teacher: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--model", "mvmoe_2x32", "--moe-layers", "1", "--patch", "4", *RUN, "--lr", "0.005",
            "--superclasses", str(data / "superclasses.tsv"), "--epochs", "3", "--out", str(out),
            "--teacher", str(teacher), "--teacher-weight", "1", "--views", "2", *more]  # fmt: skip


def fails(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    capsys.readouterr()
    assert train.main(argv) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_it_learns_and_is_read_back(teacher: Path) -> None:
    model, header = models.load_checkpoint(teacher)
    assert isinstance(model, ResNet) and not model.training
    assert header.training["val_accuracy"] > 3 / CLASSES
    weights = checkpoints.load(teacher).weights
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_each_stage_halves_the_resolution_and_doubles_the_channels() -> None:
    model = ResNet(ResNetConfig(image_size=32, width=8, blocks=2, classes=5))
    shapes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert shapes == [(8, 16, 16)] * 2 + [(16, 8, 8)] * 2 + [(32, 4, 4)] * 2
    assert models.config_from_name("resnet_2x8", image_size=32, classes=5) == model.config


def test_a_student_learns_from_it_and_goes_on_after_a_kill(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, killed = tmp_path / "undisturbed.pt", tmp_path / "killed.pt"
    assert train.main(student(data, teacher, undisturbed)) == 0
    header = checkpoints.load(undisturbed).header
    assert header.training["teacher"]["file"] == "teacher.pt"
    assert header.training["recipe"]["views"] == 2
    kill_after(2, student(data, teacher, killed), monkeypatch)  # the epoch after it sees the first view again
    assert train.main([*student(data, teacher, killed), "--resume"]) == 0
    weights = checkpoints.load(killed).weights
    assert all(torch.equal(tensor, weights[name]) for name, tensor in checkpoints.load(undisturbed).weights.items())


def test_a_run_is_not_resumed_with_another_teacher(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "moe.pt", tmp_path / "other.pt"
    kill_after(1, student(data, teacher, out), monkeypatch)
    checkpoint = checkpoints.load(teacher)
    checkpoint.weights["head.bias"] += 1
    checkpoints.save(other, checkpoint)
    assert "was started with another teacher" in fails(capsys, [*student(data, other, out), "--resume"])


def test_the_target_is_label_and_answer_in_the_asked_shares_and_the_router_s_is_its_sum(tmp_path: Path) -> None:
    """The loss is linear in the target, so the loss of a mixture is the mixture of the losses."""
    config = tiny.moe_config()
    model, header = tiny.lively_model(config).train(), tiny.header_for(config)
    labels = torch.arange(24) % tiny.CLASSES
    images = ImageSet(torch.from_numpy(tiny.images()).permute(0, 3, 1, 2), labels, header.class_ids, [])
    trainer = Trainer(
        model,
        header,
        train=images,
        val=images,
        recipe=Recipe(label_smoothing=0, router_weight=0.3),
        out=tmp_path / "m.pt",
    )
    x = tiny.inputs()
    hard, soft = F.one_hot(labels, tiny.CLASSES).float(), torch.rand(24, tiny.CLASSES).softmax(-1)
    losses = [float(trainer._loss(x, target).detach()) for target in (hard, soft, hard.lerp(soft, 0.25))]
    assert losses[2] == pytest.approx(0.75 * losses[0] + 0.25 * losses[1], rel=1e-5)
    routed = model.routed(x)
    assert header.superclasses is not None
    groups = torch.tensor(header.superclasses.of_class)
    router = -(torch.stack([soft[:, groups == e].sum(1) for e in range(config.experts)], 1)
               * routed.router_logits.log_softmax(-1)).sum(1).mean()  # fmt: skip
    classes = -(soft * routed.logits.log_softmax(-1)).sum(1).mean()
    assert losses[1] == pytest.approx(float((classes + 0.3 * router).detach()), rel=1e-5)


@pytest.mark.parametrize("keep_in_files", [False, True])
def test_each_view_is_asked_about_once(keep_in_files: bool, tmp_path: Path) -> None:
    asked = []

    def batches(view: str) -> Iterator[torch.Tensor]:
        asked.append(view)
        yield from torch.randn(3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(len(view)))

    model = ResNet(ResNetConfig(image_size=16, width=8, blocks=1, classes=5))
    folder = tmp_path / "answers" if keep_in_files else None
    teacher = Teacher(model, folder=folder)
    first = teacher.answers("a", (12, 5), lambda: batches("a"))
    assert (first.shape, first.dtype) == ((12, 5), torch.float16)
    assert torch.allclose(first.float().sum(1), torch.ones(12), atol=1e-2)
    other = teacher.answers("bb", (12, 5), lambda: batches("bb"))
    assert not torch.equal(first, other)
    assert torch.equal(teacher.answers("a", (12, 5), lambda: batches("a")), first)
    for _ in range(2):
        teacher.answers(None, (12, 5), lambda: batches("none"))
    assert asked == ["a", "bb", "none", "none"]
    if folder:  # another run need not ask
        assert torch.equal(Teacher(model, folder=folder).answers("bb", (12, 5), lambda: batches("bb")), other)
        assert asked == ["a", "bb", "none", "none"]
        assert {file.name for file in folder.iterdir()} == {"a.safetensors", "bb.safetensors"}


def test_kept_answers_teach_the_same_and_only_the_same(data: Path, teacher: Path, tmp_path: Path) -> None:
    def trained(name: str, *more: str) -> dict[str, torch.Tensor]:
        out = tmp_path / name
        assert train.main(student(data, teacher, out, "--epochs", "3", "--views", "2", *more)) == 0
        return checkpoints.load(out).weights

    kept = tmp_path / "answers"
    expected = trained("memory.pt")
    for name in ("first.pt", "second.pt"):
        weights = trained(name, "--answers", str(kept))
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
        assert len(list(kept.iterdir())) == 2
    trained("other.pt", "--answers", str(kept), "--seed", "1")  # shows other views
    assert len(list(kept.iterdir())) == 4


def test_damaged_answers_are_named(
    data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, argv = tmp_path / "answers", ["--epochs", "1", "--views", "1", "--answers", str(tmp_path / "answers")]
    assert train.main(student(data, teacher, tmp_path / "a.pt", *argv)) == 0
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    other = {"answers": torch.zeros(3, 3, dtype=torch.float16)}
    for damaged in (whole[:-1], b"", save({"other": torch.zeros(1)}), save(other)):
        file.write_bytes(damaged)
        capsys.readouterr()
        assert train.main(student(data, teacher, tmp_path / "b.pt", *argv, "--force")) == 2
        assert str(file) in capsys.readouterr().err


def test_a_teacher_goes_on_from_itself(data: Path, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "on.pt"
    argv = ["--data", str(data), "--model", "resnet_1x8", *RUN, "--lr", "1e-9", "--epochs", "1", "--out", str(out)]
    assert train.main([*argv, "--from", str(teacher)]) == 0
    before, after = checkpoints.load(teacher).weights, checkpoints.load(out)
    assert torch.allclose(after.weights["head.weight"], before["head.weight"], atol=1e-6)
    assert after.header.training["started_from"]["file"] == teacher.name


def test_a_teacher_exports_as_any_dense_model(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.mvmoe"
    assert export.main([str(teacher), "--target", "onnx", "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["top1_agreement"] == 1.0
    (piece,) = open_bundle(out).manifest.pieces
    config = models.load_checkpoint(teacher)[0].config
    assert (piece.role, piece.flops) == ("model", config.flops())


def test_super_classes_from_what_a_teacher_confuses(data: Path, teacher: Path, tmp_path: Path) -> None:
    tsv = tmp_path / "groups.tsv"
    argv = ["superclasses", str(teacher), "--data", str(data), "--experts", "3", "--out", str(tsv)]
    assert train.main([*argv, "--hold-out", "4"]) == 0
    assert len({line.split("\t")[1] for line in tsv.read_text().splitlines()}) == 3


def test_a_deployable_model_can_teach(data: Path, teacher: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.pt"
    assert train.main(student(data, teacher, small, "--epochs", "1")) == 0
    assert train.main(student(data, small, tmp_path / "next.pt", "--epochs", "1", "--mixup", "0.2")) == 0


def test_what_does_not_fit_is_refused(
    data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "moe.pt"
    other = tmp_path / "other.pt"
    good = checkpoints.load(teacher)

    def save(**changes: object) -> None:
        checkpoints.save(other, msgspec.structs.replace(good, header=msgspec.structs.replace(good.header, **changes)))

    save(class_ids=["x", *good.header.class_ids[1:]])
    assert "other.pt: was trained on other classes" in fails(capsys, student(data, other, out))
    save(preprocessing=msgspec.structs.replace(good.header.preprocessing, mean=(0.1, 0.1, 0.1)))
    assert "teacher and student must take the same view of an image" in fails(capsys, student(data, other, out))
    for change, message in (
        ({"width": 9}, "'stem.weight' has shape [8, 3, 3, 3], the config asks for [9, 3, 3, 3]"),
        ({"blocks": 60000}, "the config needs at least 180000 weights, but there are only"),
        ({"width": 10**9}, "width is 1000000000, more than 65536"),
        ({"width": "8"}, "width is '8', must be of type int"),
        ({"depth": 8}, "resnet has no field 'depth'"),
    ):
        save(model={**good.header.model, **change})
        with pytest.raises(CheckpointError, match=r"other\.pt: ") as error:
            models.load_checkpoint(other)
        assert message in str(error.value)
    with pytest.raises(ConfigError, match=r"expected .* resnet_BLOCKSxWIDTH"):
        models.config_from_name("resnet_18")
    config = tiny.dense_config()
    images = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4).long(), ["a"], [])
    with pytest.raises(DataError, match="or neither"):
        Trainer(
            models.build(config),
            tiny.header_for(config),
            train=images,
            val=images,
            recipe=Recipe(),
            out=out,
            teacher=Teacher(ResNet(ResNetConfig())),
        )
    capsys.readouterr()
    assert "is a ResNetConfig" in fails(capsys, student(data, teacher, out, "--from", str(teacher)))
