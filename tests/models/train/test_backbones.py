"""A model of timm through every command: trained dense and routed, from published weights, studied and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from killed import kill_after
from safetensors.torch import save_file

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy import models
from mvmoe_deploy.bench.candidates.prepare import of_checkpoint, prepare
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.cli import export, run, train
from mvmoe_deploy.models.architectures import timm_library
from mvmoe_deploy.models.architectures.backbone import RoutedBackbone
from mvmoe_deploy.models.registry import build, config_from_name
from mvmoe_deploy.models.train import trainer
from mvmoe_deploy.models.train.recipe import Recipe
from mvmoe_deploy.models.train.trainer import optimizers

CLASSES, EXPERTS = 6, 3
NAME = "timm:test_efficientnet"  # timm's smallest of this kind: of five blocks, with squeeze and excitation
ROUTED = ["--model", NAME, "--cut", "blocks.3", "--own", "pointwise"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    tiny.image_folder(root, "train", CLASSES, 6, size=16)
    tiny.image_folder(root, "val", CLASSES, 2, size=16, seed=1)
    tiny.write_superclasses(root / "superclasses.tsv", CLASSES, EXPERTS)
    return root


@pytest.fixture(scope="module")
def published(data: Path) -> Path:
    """Weights as timm publishes them: by its own names, with batch norms' counters, for ten classes."""
    torch.manual_seed(3)
    model = timm_library.create(NAME[5:], "", classes=10, image_size=32)
    save_file(model.state_dict(), data / "published.safetensors")
    return data / "published.safetensors"


def training(data: Path, out: Path, *options: str) -> list[str]:
    sizes = ["--image-size", "32", "--epochs", "1", "--batch", "12", "--lr", "0.001", "--threads", "1"]
    return ["--data", str(data), "--out", str(out), *sizes, *options]


@pytest.fixture(scope="module")
def dense(data: Path, published: Path) -> Path:
    options = ["--model", NAME, "--from", str(published), "--hold-out", "2"]
    assert train.main(training(data, data / "dense.pt", *options)) == 0
    return data / "dense.pt"


@pytest.fixture(scope="module")
def routed(data: Path, dense: Path) -> Path:
    options = [*ROUTED, "--from", str(dense), "--superclasses", str(data / "superclasses.tsv")]
    assert train.main(training(data, data / "routed.safetensors", *options)) == 0
    return data / "routed.safetensors"


def test_published_weights_start_a_dense_model_whose_head_is_new(dense: Path, published: Path) -> None:
    checkpoint = checkpoints.load(dense)
    header = checkpoint.header
    assert header.model["architecture"] == "timm" and header.model["name"] == NAME[5:]
    assert header.training["started_from"]["fresh"] == ["classifier.weight", "classifier.bias"]
    assert header.training["library"] == f"timm {timm_library.library().__version__}"
    assert header.preprocessing.crop == 1.0 and header.preprocessing.interpolation == "bicubic"
    loaded, _ = models.load_checkpoint(dense)
    assert loaded.config.classes == CLASSES


def test_published_weights_start_a_routed_model(data: Path, published: Path, tmp_path: Path) -> None:
    options = [*ROUTED, "--from", str(published), "--router", "end-to-end", "--experts", "2"]
    assert train.main(training(data, tmp_path / "routed.pt", *options)) == 0
    model, header = models.load_checkpoint(tmp_path / "routed.pt")
    assert model.config.experts == 2 and header.training["started_from"]["file"] == "published.safetensors"


def test_the_routed_model_is_studied_like_any_other(
    data: Path, dense: Path, routed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def output(*argv: str) -> Any:
        capsys.readouterr()
        assert train.main([*argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    compared = output("compare", str(dense), str(routed), "--data", str(data))
    needs = compared["rows"][1]["needs"]
    config = models.load_checkpoint(routed)[0].config
    assert needs["expert_mlps"] == EXPERTS and needs["active_parameters"] == config.active_parameters()
    assert len(output("analyse", str(routed), "--data", str(data))["load"]) == EXPERTS
    assert 0 <= output("evaluate", str(routed), "--data", str(data))["accuracy"] <= 1
    groups = ["superclasses", str(dense), "--data", str(data), "--experts", "2", "--out", str(tmp_path / "groups.tsv")]
    assert train.main(groups) == 0
    assert len((tmp_path / "groups.tsv").read_text(encoding="utf-8").splitlines()) == CLASSES


def test_the_routed_model_is_exported_and_run(
    routed: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "routed.mvmoe"
    assert export.main([str(routed), "--target", "onnx", "--out", str(out)]) == 0
    bundle = open_bundle(out)
    assert bundle.manifest.routing is not None and bundle.manifest.routing.experts == EXPERTS
    image = next((data / "val").rglob("*.png"))
    assert run.main([str(out), str(image), "--max-resident", "1"]) == 0
    assert "group" in capsys.readouterr().out


def test_a_dense_model_is_exported_from_published_weights_without_training(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense.mvmoe"
    names = tmp_path / "classes.tsv"
    names.write_text("".join(f"n{index}\tthing {index}\n" for index in range(10)), encoding="utf-8")
    argv = ["--model", NAME, "--weights", str(published), "--target", "onnx", "--out", str(out), "--image-size", "64"]
    assert export.main([*argv, "--classes", str(names)]) == 0
    manifest = open_bundle(out).manifest
    assert manifest.preprocessing.size == 64 and manifest.preprocessing.crop == 0.95  # as timm evaluates it
    assert manifest.class_names[9] == "thing 9" and manifest.source.checkpoint == published.name


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "give a checkpoint, or --model NAME --weights FILE"),
        (["x.pt", "--image-size", "32"], "--image-size is for --model"),
        (["--model", NAME], "give its weights"),
        (["--model", "timm:resnet18", "--weights", "PUBLISHED"], "holds no classifier of timm:resnet18 (fc)"),
        (["--model", "timm:mobilenetv3_small_075", "--weights", "PUBLISHED"], "not the weights of timm:mobilenetv3_small_075"),
        (["--model", "timm:hf-hub:x/y", "--weights", "PUBLISHED"], "no hub address"),
        (["--model", "mvmoe_2x64", "--weights", "PUBLISHED"], "holds no head.weight"),
        (["--model", NAME, "--weights", "PUBLISHED", "--classes", "TWO"], "names 2 classes, the weights are for 10"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_named(
    argv: list[str], reason: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two.tsv").write_text("a\tA\nb\tB\n", encoding="utf-8")
    files = {"PUBLISHED": str(published), "TWO": str(tmp_path / "two.tsv")}
    assert (
        export.main([files.get(word, word) for word in argv] + ["--target", "onnx", "--out", str(tmp_path / "x")]) == 2
    )
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", NAME, "--cut", "blocks.3"], "give --experts N or --superclasses"),
        (["--model", "vit_2x32", "--own", "mlp"], "--own: a vit (vit_2x32) has none"),
        ([*ROUTED, "--experts", "2", "--router", "end-to-end", "--optimizer", "muon"], "names no matrices"),
        ([*ROUTED, "--experts", "2", "--router", "end-to-end", "--expert-pull", "0.1"], "are not stacked"),
        ([*ROUTED[:3], "blocks.9", "--experts", "2", "--router", "end-to-end"], "has no stage 'blocks.9'"),
        (["--model", NAME, "--from", "superclasses.tsv"], "superclasses.tsv"),
        (["--model", NAME, "--learn", "expert"], "learn is 'expert', which no weight's name matches"),
        (["--model", NAME, "--learn", "("], "learn is '(', not a regular expression"),
    ],
)
def test_what_cannot_be_trained_is_named(
    options: list[str], reason: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"superclasses.tsv": str(data / "superclasses.tsv")}
    argv = training(data, tmp_path / "x.pt", *(files.get(word, word) for word in options))
    assert train.main(argv) == 2
    assert reason in capsys.readouterr().err


def test_a_checkpoint_of_another_release_says_which(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoints.load(dense)
    checkpoint.header.training["library"] = "timm 0.9.9"
    checkpoint.weights["backbone.conv_stem.kernel"] = checkpoint.weights.pop("backbone.conv_stem.weight")
    checkpoints.save(tmp_path / "old.pt", checkpoint)
    assert export.main([str(tmp_path / "old.pt"), "--target", "onnx"]) == 2
    assert "first 'backbone.conv_stem.weight'; it was made with timm 0.9.9" in capsys.readouterr().err


def test_norms_and_biases_do_not_decay() -> None:
    model = build(config_from_name(NAME, image_size=32, classes=3, experts=2))
    plain, decaying = optimizers(model, Recipe())[0].param_groups
    assert plain["weight_decay"] == 0 and decaying["weight_decay"] > 0
    assert all(parameter.ndim <= 1 for parameter in plain["params"])
    assert all(parameter.ndim > 1 for parameter in decaying["params"])
    assert len(plain["params"]) + len(decaying["params"]) == len(list(model.parameters()))


def test_benchmarks_make_its_baselines(routed: Path, tmp_path: Path) -> None:
    made = prepare([routed], tmp_path, baselines=["dense-wide", "all-experts"])
    of = {each.kind: each for each in made}
    config = models.load_checkpoint(routed)[0].config
    assert of["mobile-vmoe"].parameters == config.parameters() == of_checkpoint(routed).parameters
    assert of["mobile-vmoe"].active_parameters == config.active_parameters()
    assert config.dense is not None and config.wide is not None
    assert of["dense-wide"].parameters == config.wide.parameters()
    assert of["all-experts"].parameters == config.parameters()
    assert isinstance(build(config.dense).stock_module(), type(build(config.dense).backbone))


def test_only_what_is_named_learns_and_the_trunk_runs_once_per_view(
    data: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept features change nothing but the time: without ``--views`` and its features, the result is the same."""
    options = [*ROUTED, "--from", str(dense), "--superclasses", str(data / "superclasses.tsv"), "--hold-out", "2"]
    options += ["--learn", "router|experts_of", "--crop-padding", "0", "--expert-rate", "0.5"]
    seen: list[int] = []
    whole = RoutedBackbone.routed

    def watched(model: RoutedBackbone, images: torch.Tensor, *others: Any, **named: Any) -> Any:
        seen.append(len(images))
        return whole(model, images, *others, **named)

    monkeypatch.setattr(RoutedBackbone, "routed", watched)
    assert train.main([*training(data, tmp_path / "kept.pt", *options, "--views", "1"), "--epochs", "3"]) == 0
    assert not seen, "images went through the trunk again"
    start, kept = (checkpoints.load(path).weights for path in (dense, tmp_path / "kept.pt"))
    changed = {name for name in kept if name in start and not torch.equal(kept[name], start[name])}
    assert not changed, "weights or statistics of batch norms that were not named"
    own = [name for name in kept if name.startswith("experts_of.") and name.endswith("weight")]
    assert any(not torch.equal(kept[name], start["backbone." + name.split(".", 2)[2]]) for name in own)

    monkeypatch.setattr(trainer, "frozen_trunk", lambda model: None)
    assert train.main([*training(data, tmp_path / "anew.pt", *options, "--views", "1"), "--epochs", "3"]) == 0
    assert seen
    anew = checkpoints.load(tmp_path / "anew.pt").weights
    assert all(torch.allclose(anew[name], kept[name], atol=2e-3) for name in kept)


def test_a_run_in_which_only_some_weights_learn_goes_on_after_a_kill(
    data: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed, killed = tmp_path / "undisturbed.pt", tmp_path / "killed.pt"
    options = [*ROUTED, "--from", str(dense), "--superclasses", str(data / "superclasses.tsv"), "--epochs", "3"]
    options += ["--crop-padding", "0", "--views", "1", "--learn"]
    assert train.main(training(data, undisturbed, *options, "router|experts_of")) == 0
    kill_after(2, training(data, killed, *options, "router|experts_of"), monkeypatch)
    assert train.main(training(data, killed, *options, "router", "--resume")) == 2
    assert "learn" in capsys.readouterr().err
    assert train.main(training(data, killed, *options, "router|experts_of", "--resume")) == 0
    weights = checkpoints.load(killed).weights
    assert all(torch.equal(tensor, weights[name]) for name, tensor in checkpoints.load(undisturbed).weights.items())


def test_experts_learn_at_their_own_rate() -> None:
    model = build(config_from_name(NAME, image_size=32, classes=3, experts=2))
    adamw = optimizers(model, Recipe(expert_rate=0.1))[0]
    own = {id(parameter) for parameter in model.expert_parameters()}
    shares = {id(each): group["share"] for group in adamw.param_groups for each in group["params"]}
    assert len(shares) == len(list(model.parameters()))
    assert {share for each, share in shares.items() if each in own} == {0.1}
    assert {share for each, share in shares.items() if each not in own} == {1.0}
