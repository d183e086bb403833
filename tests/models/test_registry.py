"""An architecture from outside this project: one file is enough for every command to accept it."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import toy_architecture

from mvmoe_deploy import models
from mvmoe_deploy.bench.candidates.prepare import of_checkpoint
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.cli import bench, export, inspect, run, train
from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.models import registry

CLASSES, EXPERTS = 6, 3


SOURCE = Path(toy_architecture.__file__)
DOCUMENT = Path(__file__).parents[2] / "docs" / "adding-an-architecture.md"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes a folder look like an installed package to this process and to those that it starts."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "toy_conv-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-conv\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\ntoy = toy_architecture:TOY\n")
    known = dict(registry._REGISTERED)
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(folder), str(SOURCE.parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.syspath_prepend(folder)
        registry._register_installed.cache_clear()
        yield
    registry._register_installed.cache_clear()
    registry._REGISTERED.clear()
    registry._REGISTERED.update(known)


def test_it_is_one_short_file() -> None:
    assert sum(1 for line in SOURCE.read_text(encoding="utf-8").splitlines() if line.strip()) < 90


def test_the_document_quotes_it() -> None:
    blocks = DOCUMENT.read_text().split("```python\n")
    # a block that is marked as tested stands on its own, and tests/docs runs it
    quoted = [
        part.split("```")[0]
        for before, part in itertools.pairwise(blocks)
        if not before.rstrip().endswith("<!-- tested: own model -->")
    ]
    assert len(quoted) >= 4
    for part in quoted:
        assert " ".join(part.split()) in " ".join(SOURCE.read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    tiny.image_folder(root, "train", CLASSES, 12, size=16)
    tiny.image_folder(root, "val", CLASSES, 4, size=16, seed=1)
    tiny.write_superclasses(root / "superclasses.tsv", CLASSES, EXPERTS)
    return root


@pytest.fixture(scope="module")
def trained(toy: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "toy.pt"
    argv = ["--data", str(data), "--model", "toyconv_8", "--bottleneck", "12", "--image-size", "16", "--threads", "1",
            "--superclasses", str(data / "superclasses.tsv"), "--batch", "24", "--lr", "0.02", "--crop-padding", "0",
            "--epochs", "12", "--out", str(out)]  # fmt: skip
    assert train.main(argv) == 0
    return out


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    out = trained.with_name("toy.mvmoe")
    assert export.main([str(trained), "--target", "onnx", "--out", str(out)]) == 0
    return out


def test_it_trains(trained: Path) -> None:
    model, header = models.load_checkpoint(trained)
    assert header.model == {"architecture": "toy_conv", "image_size": 16, "classes": CLASSES, "width": 8,
                            "experts": EXPERTS, "k": 1, "bottleneck": 12}  # fmt: skip
    assert header.training["val_accuracy"] > 2 / CLASSES
    assert model.config.flops() is None


def test_it_exports_with_counted_flops_and_runs(exported: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = open_bundle(exported).manifest.pieces
    assert [piece.name for piece in pieces] == ["trunk", "expert_00", "expert_01", "expert_02"]
    assert all(piece.flops for piece in pieces)  # counted on the traced graphs, since the config does not say
    assert pieces[0].outputs[0].shape == ["batch", 8, 4, 4]  # feature maps, not tokens
    capsys.readouterr()
    assert run.main([str(exported), str(data / "val" / "n0001" / "000.png")]) == 0
    assert "n0001" in capsys.readouterr().out
    assert inspect.main([str(exported)]) == 0
    assert f"{pieces[0].flops / 1e6:.1f}" in capsys.readouterr().out


def test_it_is_measured(exported: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    argv = [str(exported), "--rounds", "2", "--min-seconds", "0", "--cold-starts", "1", "--json", str(out)]
    assert bench.main(argv) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["kind"], row["flops"], row["macs"]) == ("mobile-vmoe", None, None)
    assert "–" in capsys.readouterr().out
    as_it_is = of_checkpoint(trained)
    assert (as_it_is.kind, as_it_is.experts, as_it_is.k, as_it_is.flops) == ("mobile-vmoe", EXPERTS, 1, None)
    check = [
        sys.executable,
        "-P",
        "-c",
        "from mvmoe_deploy.models import load_checkpoint as f; import sys; f(sys.argv[1])",
    ]
    subprocess.run([*check, str(trained)], check=True)  # the processes that measure memory find it too
    assert bench.main([str(trained), "--backends", "torch", "--baselines", "dense"]) == 2
    assert "baseline dense: a toy_conv model does not have this baseline" in capsys.readouterr().err


def test_it_is_studied(trained: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert train.main(["evaluate", str(trained), "--data", str(data), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["load"]) == EXPERTS
    assert train.main(["analyse", str(trained), "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy_if_right"] is not None
    assert train.main(["compare", str(trained), str(trained), "--data", str(data), "--json"]) == 0
    (needs, _) = (row["needs"] for row in json.loads(capsys.readouterr().out)["rows"])
    assert (needs["flops"], needs["expert_mlps"], needs["touched"]) == (None, EXPERTS, 1.0)
    assert needs["image_bytes"] == 4 * (needs["parameters"] - 2 * (9 * 8 * 8 + 8))


def test_what_it_lacks_is_said(toy: None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--data", str(data), "--model", "toyconv_8", "--image-size", "16", "--out", str(tmp_path / "x.pt")]
    for more, message in (
        ([], "toyconv_8 is a routed model: give --experts N or --superclasses FILE.tsv"),
        (["--experts", "3", "--patch", "4"], "--patch: a toy_conv (toyconv_8) has none"),
        (["--experts", "3", "--router", "random", "--optimizer", "muon"], "names no matrices between hidden layers"),
        (["--experts", "3", "--router", "random", "--expert-pull", "0.1"], "the experts of a toy_conv are not stacked"),
    ):
        assert train.main([*argv, *more]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_default_model_is_not_made_with_one_expert(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--data", str(data), "--out", str(tmp_path / "x.pt")]) == 2
    assert "mvmoe_6x64 is a routed model: give --experts N or --superclasses" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        (lambda: 3, "entry point x:Y: is a int, expected Architecture"),
        (lambda: importlib.import_module("no_such_module"), "entry point x:Y: cannot be imported (No module named"),
    ],
)
def test_what_is_announced_wrongly_is_named(
    monkeypatch: pytest.MonkeyPatch, loads: Callable[[], Any], message: str
) -> None:
    found = [SimpleNamespace(load=loads, value="x:Y")]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found)
    registry._register_installed.cache_clear()
    with pytest.raises(ConfigError, match=re.escape(message)):
        registry.config_from_dict(tiny.DENSE)
    registry._register_installed.cache_clear()


def test_a_checkpoint_s_architecture_is_not_imported() -> None:
    with pytest.raises(ConfigError, match=r"architecture 'toy_architecture' is none of .*, vit"):
        registry.config_from_dict({"architecture": "toy_architecture"})


def test_a_name_is_given_once() -> None:
    from dataclasses import dataclass
    from typing import ClassVar

    @dataclass(frozen=True)
    class Other(models.ModelConfig):
        architecture: ClassVar[str] = "vit"

    with pytest.raises(ConfigError, match=r"'vit' is registered already, by .*architectures\.vit"):
        registry.register(registry.Architecture(Other, models.ViT))


def test_what_nobody_knows_is_none() -> None:
    config = models.ModelConfig()
    unknown = (
        config.flops(),
        config.macs(),
        config.parameters(),
        config.active_parameters(),
        config.expert_parameters(),
    )
    assert unknown == (None,) * 5
    assert config.piece_flops("trunk") is None
    assert models.config_from_name("mvmoe_6x64").piece_flops("no such role") is None
