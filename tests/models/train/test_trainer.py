"""Training: models learn, a killed run resumes as if undisturbed, and data that cannot be trained on is refused."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy import models
from mvmoe_deploy.cli import train
from mvmoe_deploy.errors import ConfigError, DataError
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models.study.evaluation import evaluate
from mvmoe_deploy.models.study.superclasses import random_groups
from mvmoe_deploy.models.train.data import ImageSet
from mvmoe_deploy.models.train.folders import _empty, read_images
from mvmoe_deploy.models.train.muon import Muon
from mvmoe_deploy.models.train.recipe import Recipe
from mvmoe_deploy.models.train.teacher import Teacher
from mvmoe_deploy.models.train.trainer import Trainer

CLASSES, EXPERTS = 8, 4
SHAPE = ["--image-size", "8", "--patch", "4", "--threads", "1", "--batch", "32", "--lr", "0.005", "--crop-padding", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight classes of coloured noise, 8 × 8 pixels."""
    root = tmp_path_factory.mktemp("data")
    tiny.image_folder(root, "train", CLASSES, 12)
    tiny.image_folder(root, "val", CLASSES, 4, seed=1)
    tiny.write_superclasses(root / "superclasses.tsv", CLASSES, EXPERTS)
    return root


def moe(data: Path, out: Path, epochs: int, *more: str) -> list[str]:
    """A command line that trains a tiny Mobile V-MoE."""
    return ["--data", str(data), "--model", "mvmoe_2x32", "--moe-layers", "1", *SHAPE, "--out", str(out),
            "--superclasses", str(data / "superclasses.tsv"), "--epochs", str(epochs), *more]  # fmt: skip


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(path).weights


def same_weights(a: Path, b: Path) -> None:
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert train.main(list(argv)) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ")
    return err


# it learns


def test_a_moe_learns_classes_and_super_classes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "moe.pt"
    assert train.main(moe(data, out, 15)) == 0
    header = checkpoints.load(out).header
    assert header.training["val_accuracy"] > 4 / CLASSES
    assert header.training["router_accuracy"] > 2 / EXPERTS
    assert sum(header.training["load"]) == pytest.approx(1)
    assert header.training["epochs_done"] == 15
    assert header.superclasses is not None
    assert header.superclasses.names == [f"group {index}" for index in range(EXPERTS)]
    assert header.class_ids == [f"n{index:04d}" for index in range(CLASSES)]
    # the checkpoint is the model that was evaluated
    model = models.load_model(checkpoints.load(out))
    val = read_images(data, "val", header.preprocessing, header.class_ids)
    again = evaluate(model, val, header.preprocessing, header.superclasses)
    assert again.accuracy == header.training["val_accuracy"]
    assert again.router_accuracy == header.training["router_accuracy"]
    lines = [json.loads(line) for line in out.with_name("moe.pt.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 16))
    assert {"loss", "val_accuracy", "val_top5", "router_accuracy", "load", "images_per_second"} <= set(lines[0])
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moe.pt", "moe.pt.jsonl"]
    assert f"wrote {out}" in capsys.readouterr().out


def test_zips_give_what_folders_give(data: Path, tmp_path: Path) -> None:
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    for split in ("train", "val"):
        shutil.make_archive(str(zipped / split), "zip", data / split)
    shutil.copy(data / "superclasses.tsv", zipped)
    assert train.main(moe(data, tmp_path / "a.pt", 1)) == 0
    assert train.main(moe(zipped, tmp_path / "b.pt", 1)) == 0
    same_weights(tmp_path / "a.pt", tmp_path / "b.pt")


def test_a_dense_model_and_upcycling_it(data: Path, tmp_path: Path) -> None:
    dense, routed = tmp_path / "dense.safetensors", tmp_path / "moe.pt"
    argv = ["--data", str(data), "--model", "vit_2x32", *SHAPE, "--epochs", "12", "--out", str(dense)]
    assert train.main([*argv, "--hold-out", "4"]) == 0
    header = checkpoints.load(dense).header
    assert header.training["val_accuracy"] > 4 / CLASSES
    assert (header.training["router_accuracy"], header.training["load"]) == (None, [])
    assert header.training["training_images"] == 8 * CLASSES
    assert train.main(moe(data, routed, 1, "--from", str(dense))) == 0
    assert checkpoints.load(routed).header.training["started_from"]["file"] == dense.name
    # super-classes from what the dense model confuses on the held-out images
    tsv = tmp_path / "derived.tsv"
    argv = ["superclasses", str(dense), "--data", str(data), "--experts", "3", "--out", str(tsv)]
    assert train.main(argv) == 0
    rows = [line.split("\t") for line in tsv.read_text().splitlines()]
    assert [row[0] for row in rows] == header.class_ids
    assert len({row[1] for row in rows}) == 3
    with Image.open(tmp_path / "derived.png") as picture:
        assert picture.width > 600
    # the same again, and not over an existing picture unless told
    again = [*argv[:-1], str(tmp_path / "again.tsv")]
    assert train.main([*again, "--plot", str(tmp_path / "derived.png")]) == 2
    assert train.main([*again, "--plot", str(tmp_path / "derived.png"), "--force"]) == 0
    assert (tmp_path / "again.tsv").read_bytes() == tsv.read_bytes()


@pytest.mark.parametrize("more", [["--mixup", "0.3"], ["--precision", "bf16"], ["-k", "2"], ["--router-input", "mean"],
                                  ["--optimizer", "muon"], ["--min-crop", "0.4", "--jitter", "0.3"],
                                  ["--expert-pull", "0.01"]])  # fmt: skip
def test_every_option_trains(data: Path, tmp_path: Path, more: list[str]) -> None:
    assert train.main(moe(data, tmp_path / "moe.pt", 1, *more)) == 0
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "moe.pt").values())


# it goes on


def test_a_run_killed_and_resumed_gives_what_an_undisturbed_one_gives(data: Path, tmp_path: Path) -> None:
    out, undisturbed = tmp_path / "killed.pt", tmp_path / "undisturbed.pt"
    argv = moe(data, out, 25, "--mixup", "0.2")
    log = out.with_name("killed.pt.jsonl")
    process = subprocess.Popen([sys.executable, "-m", "mvmoe_deploy.cli.train", *argv], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = checkpoints.load(out).header.training["epochs_done"]
    assert 2 <= done < 25
    assert train.main([*argv, "--resume"]) == 0
    assert train.main(moe(data, undisturbed, 25, "--mixup", "0.2")) == 0
    same_weights(out, undisturbed)
    assert len(log.read_text().splitlines()) == 25


class Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


@pytest.mark.parametrize("moment", range(9))
def test_a_kill_between_any_two_files_loses_nothing(
    data: Path, tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three files are put in place after each of three epochs."""
    out, undisturbed = tmp_path / "killed.pt", tmp_path / "undisturbed.pt"
    assert train.main(moe(data, undisturbed, 3)) == 0
    real, count = Path.replace, 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count - 1 == moment:
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", replace)
        train.main(moe(data, out, 3))
    assert train.main(moe(data, out, 3, "--resume")) == 0
    same_weights(out, undisturbed)
    assert not out.with_name("killed.pt.state").exists()


def test_resuming_a_finished_run_does_not_start_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "moe.pt"
    assert train.main(moe(data, out, 1)) == 0
    before = out.read_bytes()
    assert train.main(moe(data, out, 1, "--resume")) == 0
    assert "has all 1 epochs already" in capsys.readouterr().out
    assert out.read_bytes() == before


@pytest.fixture
def interrupted(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that stopped after the first of three epochs."""
    out = tmp_path / "moe.pt"
    real = Trainer.train_epoch

    def stop(self: Trainer, progress: Any) -> float:
        if self.epoch == 1:
            raise Killed
        return real(self, progress)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "train_epoch", stop)
        train.main(moe(data, out, 3))
    return out


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (["--lr", "0.1"], "learning_rate"),
        (["--epochs", "4"], "epochs"),
        (["--seed", "1"], "seed"),
        (["--mixup", "0.5"], "mixup"),
        (["--hold-out", "1"], "set of training images"),
        (["--model", "mvmoe_2x16"], "model"),
    ],
)
def test_resuming_with_another_configuration_is_refused_and_names_it(
    data: Path, interrupted: Path, change: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = interrupted.read_bytes()
    error = fails(capsys, *moe(data, interrupted, 3, *change, "--resume"))
    assert f"was started with another {field} (" in error
    assert interrupted.read_bytes() == before


def test_resuming_on_other_images_or_from_another_checkpoint_is_refused(
    data: Path, interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The number of images and the options are the same, but one pixel, or the checkpoint, differs."""
    changed = tmp_path / "changed"
    shutil.copytree(data, changed)
    file = changed / "train" / "n0001" / "000.png"
    with Image.open(file) as image:
        image.putpixel((0, 0), (1, 2, 3))
        image.save(file)
    error = fails(capsys, *moe(changed, interrupted, 3, "--resume"))
    assert "was started with another set of training images (96 images, sha256 " in error
    start = tmp_path / "start.pt"
    config = models.config_from_name("vit_2x32", image_size=8, patch_size=4, classes=CLASSES)
    checkpoints.save(start, tiny.checkpoint_of(tiny.lively_model(config)))
    error = fails(capsys, *moe(data, interrupted, 3, "--resume", "--from", str(start)))
    assert "was started with another checkpoint to start from (None, now " in error


def test_a_damaged_state_is_refused(data: Path, interrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = interrupted.with_name("moe.pt.state")
    state.write_bytes(state.read_bytes()[:100])
    assert "moe.pt.state: damaged" in fails(capsys, *moe(data, interrupted, 3, "--resume"))


def test_an_existing_checkpoint_is_kept_unless_told(
    data: Path, interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "moe.pt: exists already; --resume goes on, --force starts again" in fails(capsys, *moe(data, interrupted, 3))
    assert train.main(moe(data, interrupted, 1, "--force")) == 0
    assert checkpoints.load(interrupted).header.training["epochs_done"] == 1


# it stops


def test_a_loss_of_nan_stops_and_keeps_the_last_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Trainer._loss
    monkeypatch.setattr(Trainer, "_loss", lambda self, *a: real(self, *a) * (math.nan if self.epoch == 1 else 1))
    out = tmp_path / "moe.pt"
    error = fails(capsys, *moe(data, out, 3))
    assert "the loss became nan in epoch 2, step 1" in error
    assert "keeps epoch 1" in error
    assert checkpoints.load(out).header.training["epochs_done"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


def test_an_update_that_spoils_the_weights_is_not_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights become NaN in the last step of an epoch. Its loss is finite, and no loss is checked after it."""
    real = Trainer._learning_rate
    last = 2 * (CLASSES * 12 // 32) - 1
    monkeypatch.setattr(Trainer, "_learning_rate", lambda self, step: math.inf if step == last else real(self, step))
    out = tmp_path / "moe.pt"
    assert "the weights became NaN or infinite in epoch 2" in fails(capsys, *moe(data, out, 3))
    assert checkpoints.load(out).header.training["epochs_done"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


def _each_matrix(weight: torch.Tensor) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(m.detach().clone()) for m in (weight if weight.ndim == 3 else [weight])]


def test_muon_updates_each_expert_as_a_matrix_of_its_own(tmp_path: Path) -> None:
    model = tiny.lively_model(tiny.moe_config()).train()
    alone = copy.deepcopy(model)
    images = ImageSet(torch.from_numpy(tiny.images()).permute(0, 3, 1, 2), torch.zeros(24).long(), ["a"], [])
    recipe = Recipe(optimizer="muon", router="end-to-end", learning_rate=0.01)
    header = tiny.header_for(tiny.moe_config())
    header.superclasses = None
    trainer = Trainer(model, header, train=images, val=images, recipe=recipe, out=tmp_path / "moe.pt")
    updated, before = dict(model.named_parameters()), dict(alone.named_parameters())
    names = [name for name in updated if name.startswith("blocks.") and name.endswith("weight") and "norm" not in name]
    assert any(updated[name].ndim == 3 for name in names)
    matrices = {name: _each_matrix(before[name]) for name in names}
    reference = torch.optim.Muon(
        [m for stack in matrices.values() for m in stack], 0.01, recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):  # several steps, so that momentum matters
        torch.manual_seed(step)
        for name in updated:
            updated[name].grad = torch.randn_like(updated[name])
        for name in names:
            for matrix, grad in zip(matrices[name], _each_matrix(updated[name].grad), strict=True):
                matrix.grad = grad
        for optimizer in trainer.optimizers:
            optimizer.step()
        reference.step()
    for name in names:
        for index, (now, was, want) in enumerate(
            zip(_each_matrix(updated[name]), _each_matrix(before[name]), matrices[name], strict=True)
        ):
            wrong = ((now - want).norm() / (want - was).norm()).item()
            assert wrong < 0.02, (name, index, wrong)  # torch's own is in bfloat16
    others = sum(p.numel() for g in trainer.optimizers[0].param_groups for p in g["params"])
    assert others + sum(updated[name].numel() for name in names) == sum(p.numel() for p in model.parameters())


def test_pulled_experts_stay_as_close_to_their_mean_as_asked(data: Path, tmp_path: Path) -> None:
    def spread(pull: str) -> float:
        out = tmp_path / f"{pull}.pt"
        assert train.main(moe(data, out, 3, "--expert-pull", pull)) == 0
        weight = weights(out)["blocks.1.mlp.fc1.weight"]
        return float((weight - weight.mean(0)).abs().max())

    free, pulled, alike = spread("0"), spread("0.3"), spread("0.999")
    assert alike < pulled / 2 < free / 4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_experts_learn_each_for_itself_as_fast_as_asked(data: Path, tmp_path: Path, optimizer: str) -> None:
    apart, together = {}, {}
    for rate in ("1", "0.1", "0"):
        out = tmp_path / f"{rate}.pt"
        assert train.main(moe(data, out, 2, "--expert-rate", rate, "--optimizer", optimizer)) == 0
        torch.manual_seed(0)
        start = models.build(models.config_from_dict(checkpoints.load(out).header.model)).state_dict()
        moved = {name: now - start[name] for name, now in weights(out).items()}
        assert moved["blocks.0.mlp.fc1.weight"].abs().mean() > 1e-4
        experts = moved["blocks.1.mlp.fc1.weight"]
        apart[rate], together[rate] = float((experts - experts.mean(0)).norm()), float(experts.mean(0).norm())
    # AdamW's weight decay scales with the experts' rate; Muon decays experts alike, whatever their rate is
    assert apart["0"] < apart["0.1"] / (2 if optimizer == "muon" else 1e6)
    assert apart["0.1"] < apart["1"] / 5
    assert together["0"] > together["1"] / 2 if optimizer == "muon" else together["0"] == 0


def test_what_muon_does_not_leave_to_each_expert_is_learnt_in_common() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(4, 6, 3), torch.randn(4, 6, 3)
    mean = gradient.mean(0, keepdim=True).expand(4, 6, 3)

    def step(gradient: torch.Tensor, own: float) -> torch.Tensor:
        experts, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(6, 3))
        experts.grad, other.grad = gradient.clone(), torch.ones(6, 3)  # same shape: orthogonalised together
        Muon([experts, other], 0.1, 0.0, own=own).step()
        return experts.detach() - start

    alone, common = step(gradient, 1), step(mean, 1)
    assert (alone - common).norm() > 0.5 * common.norm()
    torch.testing.assert_close(step(gradient, 0), common)
    torch.testing.assert_close(step(gradient, 0.3), 0.3 * alone + 0.7 * common)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "0"], "epochs is 0, must be at least 1"),
        (["--batch", "0"], "batch is 0, must be at least 1"),
        (["--lr", "nan"], "learning_rate is nan, must be above 0"),
        (["--lr", "-1"], "learning_rate is -1.0, must be above 0"),
        (["--label-smoothing", "1"], "label_smoothing is 1.0, must be at least 0 and below 1"),
        (["--mixup", "-1"], "mixup is -1.0, must be at least 0"),
        (["--clip", "0"], "clip is 0.0, must be above 0"),
        (["--experts", "3"], "there are 4 super-classes but 3 experts"),
        (["--moe-layers", "3"], "moe_layers is 3, but depth is only 2"),
        (["--patch", "3"], "image_size 8 is not a multiple of patch_size 3"),
        (["--model", "resnet18"], "unknown model 'resnet18': expected one of the forms"),
        (["--model", "alexnet"], "unknown model 'alexnet'"),
        (["--views", "-1"], "views is -1, must be at least 0"),
        (["--expert-rate", "1.5"], "expert_rate is 1.5, must be between 0 and 1"),
        (["--teacher-weight", "1.5"], "teacher_weight is 1.5, must be between 0 and 1"),
        (["--teacher-weight", "0.5"], "give --teacher and --teacher-weight, or neither"),
        (["--teacher", "none.pt", "--teacher-weight", "1"], "none.pt: no such file"),
        (["--device", "abacus"], "--device abacus: torch cannot use it"),
        (["--hold-out", "12"], "would leave none to train on"),
        (["--out", "model.bin"], "a checkpoint's name ends in .pt or .safetensors"),
        (["--superclasses", "none.tsv"], "none.tsv: no such file"),
        (["--from", "none.pt"], "none.pt: no such file"),
        (["--data", "nowhere"], "nowhere: has neither a folder val/ nor a file val.zip"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    data: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, *moe(data, tmp_path / "moe.pt", 1, *more))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_architecture_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"image_size": 8, "patch_size": 4, "classes": CLASSES}
    ids = [f"n{index:04d}" for index in range(CLASSES)]
    for name, message in (
        ("vit_3x32", "cannot upcycle: the dense model is ViTConfig("),
        ("vmoe_2x32", "start.pt: is a VMoEConfig("),
    ):
        config = models.config_from_name(name, **shape, **({"placement": "last-1"} if name[1] == "m" else {}))
        checkpoint = tiny.checkpoint_of(models.build(config))
        assert checkpoint.header.class_ids == ids
        checkpoints.save(tmp_path / "start.pt", checkpoint)
        error = fails(capsys, *moe(data, tmp_path / "moe.pt", 1, "--from", str(tmp_path / "start.pt")))
        assert message in error
    checkpoint.header = msgspec.structs.replace(checkpoint.header, class_ids=["x", *ids[1:]])
    checkpoints.save(tmp_path / "start.pt", checkpoint)
    error = fails(capsys, *moe(data, tmp_path / "moe.pt", 1, "--from", str(tmp_path / "start.pt")))
    assert "start.pt: was trained on other classes" in error
    assert not (tmp_path / "moe.pt").exists()


def test_a_router_needs_super_classes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--data", str(data), "--model", "mvmoe_2x32", "--moe-layers", "1", *SHAPE, "--experts", "3",
            "--out", str(tmp_path / "moe.pt")]  # fmt: skip
    assert "router is trained on super-classes: give --superclasses FILE.tsv" in fails(capsys, *argv)


# its parts


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = tiny.dense_config(image_size=8, patch_size=4)
    images = ImageSet(torch.zeros(40, 3, 8, 8, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64), ["a"], [])
    trainer = Trainer(
        models.build(config), tiny.header_for(config), train=images, val=images,
        recipe=Recipe(epochs=10, batch=4, warmup_epochs=2, learning_rate=1.0), out=Path("x.pt"),
    )  # fmt: skip
    rates = [trainer._learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[19] == rates[20] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[20:]))
    assert rates[60] == pytest.approx(0.5)
    assert 0 <= rates[99] < 0.001


def test_router_accuracy_and_load_are_what_the_routes_are() -> None:
    model = tiny.lively_model(tiny.moe_config())
    assert isinstance(model, models.MobileVMoE)
    header = tiny.header_for(model.config)
    pixels = torch.from_numpy(tiny.images()).permute(0, 3, 1, 2).contiguous()
    labels = torch.arange(24) % tiny.CLASSES
    result = evaluate(model, ImageSet(pixels, labels, header.class_ids, []), header.preprocessing, header.superclasses)
    with torch.no_grad():
        routed = model.routed(tiny.inputs())
    assert result.accuracy == (routed.logits.argmax(1) == labels).double().mean()
    assert result.load == pytest.approx((torch.bincount(routed.chosen[:, 0], minlength=4) / 24).tolist())
    assert result.router_accuracy == pytest.approx(float((routed.chosen[:, 0] == labels % 4).float().mean()))
    assert not model.training


@pytest.mark.parametrize("field", ["epochs", "batch"])
def test_a_recipe_is_checked_where_it_is_made(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Recipe(**{field: 0})


# the data


def test_unreadable_images_are_counted_and_left_out_only_when_asked(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = Path(shutil.copytree(data, tmp_path / "spoilt"))
    (spoilt / "train" / "n0002" / "000.png").write_bytes(b"no image")
    (spoilt / "train" / "n0003" / "001.png").unlink()
    (spoilt / "train" / "n0003" / "001.png").symlink_to("nowhere")
    out = tmp_path / "moe.pt"
    error = fails(capsys, *moe(spoilt, out, 1))
    assert "000.png: not an image" in error
    assert "(2 unreadable images in " in error
    assert train.main(moe(spoilt, out, 1, "--skip-unreadable")) == 0
    out_lines = capsys.readouterr().out.splitlines()
    assert out_lines[0].startswith(
        f"train: {12 * CLASSES - 2} images of {CLASSES} classes; left out: 2 unreadable images (first: "
    )
    assert out_lines[1] == f"val: {4 * CLASSES} images of {CLASSES} classes"
    assert checkpoints.load(out).header.training["training_images"] == 12 * CLASSES - 2


def test_a_data_set_without_a_validation_split_is_divided_alike_by_all_commands(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat, out = Path(shutil.copytree(data / "train", tmp_path / "flat")), tmp_path / "dense.pt"
    argv = ["--data", str(flat), "--model", "vit_2x32", *SHAPE, "--epochs", "2", "--out", str(out)]
    assert "has neither a folder val/ nor a file val.zip" in fails(capsys, *argv)
    assert train.main([*argv, "--val-share", "0.25", "--seed", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"train: {9 * CLASSES} images of {CLASSES} classes",
        f"val: {3 * CLASSES} images of {CLASSES} classes",
    ]
    training = checkpoints.load(out).header.training
    assert (training["val_share"], training["training_images"]) == (0.25, 9 * CLASSES)
    assert train.main(["evaluate", str(out), "--data", str(flat), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["images"], result["accuracy"]) == (3 * CLASSES, training["val_accuracy"])
    shutil.make_archive(str(tmp_path / "zipped" / "train"), "zip", flat)
    argv = ["compare", str(out), str(out), "--data", str(tmp_path / "zipped"), "--json"]
    assert train.main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["images"], result["recipes_differ_in"]) == (3 * CLASSES, {})
    assert [row["name"] for row in result["rows"]] == [f"{out} #1", f"{out} #2"]
    argv = ["--data", str(data), "--model", "vit_2x32", "--out", str(tmp_path / "x.pt"), "--val-share"]
    assert "has a val split of its own" in fails(capsys, *argv, "0.1")
    with pytest.raises(SystemExit):
        train.main([*argv, "1"])
    assert "must be a number of at least 0 and below 1" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["bytes", "encrypted", "truncated", "none"])
def test_a_damaged_zip_is_named(data: Path, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "val.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for image in sorted((data / "val").rglob("*.png")):
            archive.write(image, image.relative_to(data / "val"))
    content = bytearray(file.read_bytes())
    if damage == "bytes":
        content[60:200] = bytes(140)
    elif damage == "encrypted":
        directory = content.index(b"PK\x01\x02")
        content[6] |= 1
        content[directory + 8] |= 1
    elif damage == "truncated":
        content = content[:1000]
    elif damage == "none":
        content = bytearray(b"not a zip")
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"val\.zip: not a readable zip|n0000/000\.png: damaged in the zip file"):
        read_images(tmp_path, "val", Preprocessing(size=8))
    if damage in ("bytes", "encrypted"):
        assert len(read_images(tmp_path, "val", Preprocessing(size=8), skip_unreadable=True).skipped) == 1


def test_images_and_labels(data: Path) -> None:
    images = read_images(data, "val", Preprocessing(size=8))
    assert images.class_ids == [f"n{index:04d}" for index in range(CLASSES)]
    assert (images.pixels.shape, images.pixels.dtype) == ((4 * CLASSES, 3, 8, 8), torch.uint8)
    assert images.labels.tolist() == [index for index in range(CLASSES) for _ in range(4)]
    assert images.pixels[4:8, 0].float().mean() > 150 > images.pixels[4:8, 2].float().mean()  # class 1 is red
    rest = read_images(data, "val", Preprocessing(size=8), hold_out=1)
    held_out = read_images(data, "val", Preprocessing(size=8), hold_out=1, held_out_only=True)
    assert (len(rest.labels), len(held_out.labels)) == (3 * CLASSES, CLASSES)
    assert torch.equal(held_out.pixels, images.pixels[3::4])
    assert torch.equal(rest.pixels, images.pixels[torch.arange(4 * CLASSES) % 4 != 3])


def test_above_the_memory_limit_images_are_mapped_from_a_file(data: Path, tmp_path: Path) -> None:
    assert isinstance(_empty((10, 10), 99), np.memmap)
    assert not isinstance(_empty((10, 10), 100), np.memmap)
    spoilt = Path(shutil.copytree(data, tmp_path / "spoilt"))
    (spoilt / "val" / "n0002" / "000.png").write_bytes(b"no image")
    for folder in (data, spoilt):
        kept = read_images(folder, "val", Preprocessing(size=8), skip_unreadable=True)
        mapped = read_images(folder, "val", Preprocessing(size=8), skip_unreadable=True, memory_limit=1000)
        assert torch.equal(mapped.pixels, kept.pixels)
        assert torch.equal(mapped.labels, kept.labels)
        assert mapped.sha256() == kept.sha256()
    assert train.main(moe(data, tmp_path / "a.pt", 1)) == 0
    assert train.main(moe(data, tmp_path / "b.pt", 1, "--memory-limit", "1e-9")) == 0
    same_weights(tmp_path / "a.pt", tmp_path / "b.pt")


def test_no_room_for_the_temporary_file(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.truncate", full)
    error = fails(capsys, *moe(data, tmp_path / "moe.pt", 1, "--memory-limit", "1e-9"))
    assert "has no room for them (No space left on device); raise --memory-limit, or name a larger place" in error


def test_splits_with_other_classes_are_refused(data: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(data, tmp_path / "other"))
    (other / "val" / "n0007").rename(other / "val" / "n0009")
    classes = [f"n{index:04d}" for index in range(CLASSES)]
    for every_class in (True, False):
        with pytest.raises(DataError, match=rf"class 'n0009' is none of the {CLASSES} that are expected$"):
            read_images(other, "val", Preprocessing(size=8), classes, every_class=every_class)
    with pytest.raises(DataError, match=r"class 'n0009' is one of the .* and has no images here \(2 such classes\)$"):
        read_images(data, "val", Preprocessing(size=8), [*classes, "n0009", "n0010"])
    (other / "val" / "n0009" / "x").mkdir()
    shutil.rmtree(other / "val" / "n0001")
    (other / "val" / "n0001").mkdir()
    with pytest.raises(DataError, match="n0001: class folder without images"):
        read_images(other, "val", Preprocessing(size=8))
    (tmp_path / "empty" / "val").mkdir(parents=True)
    with pytest.raises(DataError, match="no images found"):
        read_images(tmp_path / "empty", "val", Preprocessing(size=8))


# the other routers, and V-MoE


def tokens(data: Path, out: Path, epochs: int, *more: str) -> list[str]:
    """A command line that trains a tiny V-MoE."""
    return ["--data", str(data), "--model", "vmoe_2x32", "--placement", "last-1", "--experts", str(EXPERTS), *SHAPE,
            "--out", str(out), "--epochs", str(epochs), *more]  # fmt: skip


def routed_by(router: str, data: Path, out: Path, epochs: int, *more: str) -> list[str]:
    """A command line that trains a tiny Mobile V-MoE's router without given super-classes."""
    return ["--data", str(data), "--model", "mvmoe_2x32", "--moe-layers", "1", *SHAPE, "--out", str(out),
            "--router", router, "--experts", str(EXPERTS), "--epochs", str(epochs), *more]  # fmt: skip


def test_an_end_to_end_router_learns_without_super_classes(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe.pt"
    assert train.main(routed_by("end-to-end", data, out, 15, "--auxiliary-weight", "0.5")) == 0
    header = checkpoints.load(out).header
    assert header.superclasses is None
    assert header.training["val_accuracy"] > 4 / CLASSES
    assert header.training["router_accuracy"] is None
    assert len(header.training["load"]) == EXPERTS
    assert sum(header.training["load"]) == pytest.approx(1)
    assert max(header.training["load"]) < 0.9  # not collapsed
    assert header.training["recipe"]["router"] == "end-to-end"
    assert header.training["recipe"]["auxiliary_weight"] == 0.5


def test_random_super_classes_are_of_equal_size_and_seeded(data: Path, tmp_path: Path) -> None:
    drawn = []
    for seed in ("0", "0", "1"):
        out = tmp_path / "moe.pt"
        assert train.main(routed_by("random", data, out, 1, "--seed", seed, "--force")) == 0
        superclasses = checkpoints.load(out).header.superclasses
        assert superclasses is not None
        assert superclasses.names == [f"random {index}" for index in range(EXPERTS)]
        assert sorted(superclasses.of_class) == sorted([*range(EXPERTS)] * (CLASSES // EXPERTS))
        drawn.append(superclasses.of_class)
    assert drawn[0] == drawn[1] != drawn[2]


def test_random_groups_differ_by_one_at_most() -> None:
    sizes = np.bincount(random_groups(200, 7, seed=3), minlength=7)
    assert sorted(set(sizes.tolist())) == [28, 29]
    with pytest.raises(DataError, match="7 super-classes asked for, but there are only 6 classes"):
        random_groups(6, 7)


def test_a_v_moe_learns(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "vmoe.pt"
    assert train.main(tokens(data, out, 15, "-k", "2", "--order", "bpr", "--capacity-factor", "1.5")) == 0
    header = checkpoints.load(out).header
    assert header.training["val_accuracy"] > 4 / CLASSES
    assert len(header.training["load"]) == EXPERTS
    assert sum(header.training["load"]) == pytest.approx(1)
    assert {"k": 2, "order": "bpr", "capacity_factor": 1.5, "placement": "last-1"}.items() <= header.model.items()
    assert header.training["recipe"]["auxiliary_weight"] == 0.01


def test_a_v_moe_from_a_dense_model(data: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense.pt"
    assert train.main(["--data", str(data), "--model", "vit_2x32", *SHAPE, "--epochs", "1", "--out", str(dense)]) == 0
    assert train.main(tokens(data, tmp_path / "vmoe.pt", 1, "--from", str(dense), "--precision", "bf16")) == 0
    assert checkpoints.load(tmp_path / "vmoe.pt").header.training["started_from"]["file"] == "dense.pt"


@pytest.mark.parametrize("kind", ["tokens", "end-to-end", "muon"])
def test_noise_does_not_depend_on_where_a_run_was_stopped(
    data: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def argv(out: Path) -> list[str]:
        if kind == "muon":
            return moe(data, out, 3, "--optimizer", "muon")
        return tokens(data, out, 3) if kind == "tokens" else routed_by(kind, data, out, 3)

    real = Trainer.train_epoch

    def stop(self: Trainer, progress: Any) -> float:
        if self.epoch == 1:
            raise Killed
        return real(self, progress)

    killed, undisturbed = tmp_path / "killed.pt", tmp_path / "undisturbed.pt"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "train_epoch", stop)
        train.main(argv(killed))
    torch.manual_seed(99)
    assert train.main([*argv(killed), "--resume"]) == 0
    assert train.main(argv(undisturbed)) == 0
    same_weights(killed, undisturbed)


@pytest.mark.parametrize("config", [tiny.vmoe_config(k=2), tiny.moe_config()], ids=["tokens", "end-to-end"])
def test_the_auxiliary_losses_are_added_with_their_weight(config: models.ViTConfig, tmp_path: Path) -> None:
    model = tiny.lively_model(config).train()
    header = tiny.header_for(config)
    header.superclasses = None
    labels = torch.arange(24) % tiny.CLASSES
    images = ImageSet(torch.from_numpy(tiny.images()).permute(0, 3, 1, 2), labels, header.class_ids, [])

    def loss(weight: float) -> float:
        recipe = Recipe(auxiliary_weight=weight, router="end-to-end")
        trainer = Trainer(model, header, train=images, val=images, recipe=recipe, out=tmp_path / "moe.pt")
        torch.manual_seed(0)
        return float(trainer._loss(tiny.inputs(), F.one_hot(labels, tiny.CLASSES).float()).detach())

    torch.manual_seed(0)
    auxiliary = model.routed(tiny.inputs(), noisy=True).auxiliary_loss()
    assert auxiliary is not None
    assert float(auxiliary.detach()) > 0.01
    assert loss(2.0) - loss(0.0) == pytest.approx(2 * float(auxiliary.detach()), rel=1e-3)


def test_a_v_moe_is_evaluated_on_mixed_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images come class by class, and the tokens of one class compete for the same experts."""
    model = tiny.lively_model(tiny.vmoe_config())
    pixels = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(60, 3, 32, 32).contiguous()
    images = ImageSet(pixels, torch.arange(60) // 10, [f"n{index}" for index in range(6)], [])
    seen = []
    real = models.VMoE.routed

    def routed(self: models.VMoE, x: torch.Tensor, *more: Any) -> Any:
        seen.append(x[:, 0, 0, 0].argsort().argsort().tolist())
        return real(self, x, *more)

    monkeypatch.setattr(models.VMoE, "routed", routed)
    first = evaluate(model, images, Preprocessing(size=32), batch=60)
    again = evaluate(model, images, Preprocessing(size=32), batch=60)
    assert sorted(seen[0]) == list(range(60)) != seen[0]
    assert seen[0] == seen[1]
    assert first == again


def test_evaluating_with_another_capacity(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "vmoe.pt"
    assert train.main(tokens(data, out, 1, "--capacity-factor", "4")) == 0
    capsys.readouterr()
    seen = []

    def spy(model: models.VMoE, *arguments: Any) -> Any:
        seen.append((model.config.capacity_factor, model.config.order))
        return evaluate(model, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr("mvmoe_deploy.models.study.evaluation.evaluate", spy)
        for more in ([], ["--order", "bpr"], ["--capacity-factor", "0.01"]):
            assert train.main(["evaluate", str(out), "--data", str(data), "--json", *more]) == 0
            assert len(json.loads(capsys.readouterr().out)["load"]) == EXPERTS
    assert seen == [(4.0, "vanilla"), (4.0, "bpr"), (0.01, "vanilla")]
    argv = ["evaluate", str(out), "--data", str(data)]
    assert "capacity_factor is 0.0, must be above 0" in fails(capsys, *argv, "--capacity-factor", "0")
    routed = tmp_path / "moe.pt"
    assert train.main(moe(data, routed, 1)) == 0
    argv = ["evaluate", str(routed), "--data", str(data), "--order", "bpr"]
    assert "has no capacity" in fails(capsys, *argv)
    few = Path(shutil.copytree(data, tmp_path / "few"))
    shutil.rmtree(few / "val" / "n0001")
    for command in (["evaluate", str(routed)], ["analyse", str(routed)], ["compare", str(routed), str(routed)]):
        assert train.main([*command, "--data", str(few)]) == 0
        assert f"has images of {CLASSES - 1} of the {CLASSES} classes" in capsys.readouterr().err
    argv = ["superclasses", str(out), "--data", str(data), "--experts", "2"]
    assert "is already routed" in fails(capsys, *argv, "--out", str(tmp_path / "s.tsv"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--model", "mvmoe_2x32", "--router", "random"],
            "--router random is for a model that routes images, with --experts",
        ),
        (
            ["--model", "mvmoe_2x32", "--router", "end-to-end"],
            "--router end-to-end is for a model that routes images, with",
        ),
        (
            ["--model", "vmoe_2x32", "--router", "random", "--experts", "2"],
            "--router random is for a model that routes images",
        ),
        (["--model", "vit_2x32", "--router", "end-to-end"], "--router end-to-end is for a model that routes images"),
        (["--model", "mvmoe_2x32", "--router", "random", "--experts", "9"], "9 super-classes asked for, but there"),
        (
            ["--model", "vmoe_2x32", "--experts", "2", "--placement", "last-2"],
            "placement is 'last-2', but depth is only 2",
        ),
        (
            ["--model", "vmoe_2x32", "--experts", "2", "--placement", "last-1", "--capacity-factor", "0"],
            "capacity_factor is 0.0",
        ),
        (["--model", "vmoe_2x32", "--placement", "last-1", "--experts", "2", "-k", "3"], "k is 3, but there are only"),
        (["--model", "vmoe_2x32", "--auxiliary-weight", "-1"], "auxiliary_weight is -1.0, must be at least 0"),
    ],
)
def test_routers_that_do_not_fit_are_refused(
    data: Path, tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "--data", str(data), *SHAPE, "--out", str(tmp_path / "moe.pt"), *argv)
    assert not list(tmp_path.iterdir())


def test_super_classes_and_an_end_to_end_router_exclude_each_other(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = moe(data, tmp_path / "moe.pt", 1, "--router", "end-to-end", "--experts", str(EXPERTS))
    assert "with --experts and without --superclasses" in fails(capsys, *argv)
    with pytest.raises(ConfigError, match="router is 'psychic', must be one of super-class, random, end-to-end"):
        Recipe(router="psychic")


class Asked(torch.nn.Module):
    """A teacher that records the inputs that it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.clone())
        return torch.zeros(len(x), tiny.CLASSES)


@pytest.mark.parametrize("teacher", [False, True])
def test_mixup_mixes_images_and_labels_alike_and_a_teacher_sees_the_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: bool
) -> None:
    """All pixels of an image are 40 times its label, so that a mixture's value gives the mean of its target."""
    config = tiny.dense_config(image_size=8, patch_size=4)
    labels = torch.arange(24) % tiny.CLASSES
    pixels = (40 * labels).to(torch.uint8)[:, None, None, None].expand(24, 3, 8, 8).contiguous()
    images = ImageSet(pixels, labels, [str(index) for index in range(tiny.CLASSES)], [])
    weight = 0.5 if teacher else 0.0
    recipe = Recipe(batch=8, crop_padding=0, flip=False, mixup=1.0, views=1, teacher_weight=weight)
    asked = Asked()
    trainer = Trainer(
        models.build(config), tiny.header_for(config), train=images, val=images, recipe=recipe, out=tmp_path / "x.pt",
        teacher=Teacher(asked) if teacher else None,
    )  # fmt: skip
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = Trainer._loss

    def spy(self: Trainer, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append((x.clone(), target.clone()))
        return real(self, x, target)

    monkeypatch.setattr(Trainer, "_loss", spy)
    trainer.train_epoch()
    trainer.epoch = 1
    trainer.train_epoch()
    x, target = (torch.cat(parts) for parts in zip(*seen[:3], strict=True))
    scale = trainer.header.preprocessing
    values = (x[:, 0, 0, 0] - float(scale.bias[0])) / float(scale.scale[0])
    if teacher:
        target = (target - weight / tiny.CLASSES) / (1 - weight)
        assert len(torch.cat(asked.seen)) == 24  # the teacher is asked about one view, once
        assert torch.equal(torch.cat(asked.seen).flatten(1).sort(0).values, x.flatten(1).sort(0).values)
    assert torch.allclose(target.sum(1), torch.ones(24), atol=1e-3)
    assert torch.allclose(values, 40 * (target * torch.arange(tiny.CLASSES)).sum(1), atol=0.1)
    assert ((target > 0.05).sum(1) == 2).any()
    again = torch.cat([batch for batch, _ in seen[3:]])  # the same view in another order
    assert not torch.equal(again, x)
    assert torch.equal(again.flatten(1).sort(0).values, x.flatten(1).sort(0).values)
