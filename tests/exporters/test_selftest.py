"""The self-test's pictures: where they come from, that they lead to every expert, and what they do not give away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import mvmoe_deploy
from mvmoe_deploy.bundle import VERSION, Bundle, open_bundle
from mvmoe_deploy.cli import export, inspect
from mvmoe_deploy.errors import ExportError
from mvmoe_deploy.exporters import selftest
from mvmoe_deploy.exporters.exporter import exporter_of
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.exporters.selftest import LEAST_MARGIN, Picture, Pictures
from mvmoe_deploy.exporters.split import split_model
from mvmoe_deploy.images import Preprocessing, preprocess
from mvmoe_deploy.models import ViTConfig


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve photos with a place in their metadata."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, pixels in enumerate(tiny.images(12, 80, seed=3)):
        data = Image.Exif()
        data.get_ifd(0x8825)[2] = (52.0, 30.0, 59.0)  # the latitude, of GPS
        Image.fromarray(pixels).save(folder / f"{number:02d}.jpg", exif=data, quality=95, comment=b"secret")
    return folder


def exported(out: Path, config: ViTConfig | None = None, **options: Any) -> Bundle:
    config = config or tiny.moe_config()
    return export_model(tiny.lively_model(config), tiny.header_for(config), "onnx", out, **options)


def pictures(bundle: Bundle) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(bundle.path.glob("selftest_*.png"))}


def test_photos_do_not_get_into_a_bundle_unless_asked_for(photos: Path, tmp_path: Path) -> None:
    without = exported(tmp_path / "without.mvmoe")
    drawn = exported(tmp_path / "drawn.mvmoe", images=photos)
    cut = exported(tmp_path / "cut.mvmoe", images=photos, selftest="images")
    assert pictures(without) == pictures(drawn)  # the photos leave no trace in them
    assert not set(pictures(cut).values()) & set(pictures(drawn).values())
    # that the last ones do come from the photos: each is nearly one of them, made as large
    originals = [Image.open(photo).convert("RGB") for photo in photos.iterdir()]
    for name in pictures(cut):
        picture = Image.open(cut.path / name)
        seen = np.asarray(picture.crop((4, 4, 20, 20)).resize((1, 1)), int).ravel()
        apart = [np.abs(_middle(original, picture.size) - seen).max() for original in originals]
        assert min(apart) < 20, name


def _middle(photo: Image.Image, size: tuple[int, int]) -> Any:
    scale = min(photo.width / size[0], photo.height / size[1])
    width, height = scale * size[0], scale * size[1]
    left, top = (photo.width - width) / 2, (photo.height - height) / 2
    part = photo.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    return np.asarray(part.crop((4, 4, 20, 20)).resize((1, 1)), int).ravel()


@pytest.mark.parametrize("kind", ["drawn", "images"])
def test_pictures_are_plain_small_png_that_exercise_resampling(kind: Pictures, photos: Path, tmp_path: Path) -> None:
    bundle = exported(tmp_path / "moe.mvmoe", images=photos, selftest=kind)
    shapes = set()
    for name, content in pictures(bundle).items():
        picture = Image.open(bundle.path / name)
        assert (picture.format, picture.mode, picture.info) == ("PNG", "RGB", {})
        assert b"secret" not in content and not picture.getexif()
        assert picture.size != (tiny.SIZE, tiny.SIZE)
        shapes.add((picture.width > picture.height, min(picture.size) > tiny.SIZE))
    assert len(shapes) >= 3  # wide and tall, larger and smaller than the input
    names = [file.path for file in bundle.manifest.files]
    assert len(names) == len(set(names)) and set(pictures(bundle)) < set(names)
    bundle.check()


@pytest.mark.parametrize(
    "config", [tiny.moe_config(), tiny.moe_config(k=2, experts=3, moe_layers=2, depth=3), tiny.moe_config(experts=9)],
    ids=["k1", "k2", "nine"],
)  # fmt: skip
def test_drawn_pictures_lead_to_every_expert_with_a_margin(config: ViTConfig) -> None:
    split = split_model(tiny.lively_model(config), tiny.SIZE)
    preprocessing = Preprocessing(tiny.SIZE)
    least = LEAST_MARGIN * 1e-4
    with torch.no_grad():
        chosen = selftest.choose(
            split, preprocessing, photos=[], photo_inputs=torch.zeros(0, 3, tiny.SIZE, tiny.SIZE), least=least
        )
        inputs = torch.from_numpy(np.stack([preprocess(picture, preprocessing) for picture in chosen]))
        routes = selftest.margins(split.of("trunk")[0].module(inputs)[1], split)
    assert split.routing is not None
    assert [expert for expert, _ in routes] == list(range(split.routing.experts))
    assert min(margin for _, margin in routes) >= least


def test_the_tolerance_is_that_of_the_arithmetic() -> None:
    """Core ML computes in half precision unless the weights are fp32, and the devices' engines round differently."""
    for precision in exporter_of("coreml").precisions:
        exact = precision.name == "fp32"
        assert (precision.selftest.logits <= 1e-4) == (precision.selftest.gate <= 1e-4) == exact, precision.name


@pytest.mark.parametrize(("least", "wide"), [(1e-3, 0.01), (0.06, 0.4)])
def test_a_pattern_is_changed_until_ten_least_margins_or_a_wide_one(
    least: float, wide: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many experts none is 0.4 ahead of the next, and twelve steps for each of 32 patterns take seconds."""
    asked: list[float] = []
    monkeypatch.setattr(selftest, "steer", lambda split, preprocessing, experts, wide: asked.append(wide) or [])
    split = split_model(tiny.lively_model(tiny.moe_config()), tiny.SIZE)
    found = Picture(Image.new("RGB", (1, 1)), 0, 0.5)
    monkeypatch.setattr(selftest, "_from_photos", lambda *_: [])
    monkeypatch.setattr(selftest, "_routed", lambda *_: [found])
    selftest.choose(
        split, Preprocessing(tiny.SIZE), photos=[], photo_inputs=torch.zeros(0, 3, tiny.SIZE, tiny.SIZE), least=least
    )
    assert asked == [pytest.approx(wide)]


def test_a_router_that_does_not_decide_gives_one_case() -> None:
    model = tiny.lively_model(tiny.moe_config())
    with torch.no_grad():
        model.router.linear.weight.zero_()
        model.router.linear.bias.zero_()
    split = split_model(model, tiny.SIZE)
    nothing = torch.zeros(0, 3, tiny.SIZE, tiny.SIZE)
    with torch.no_grad():
        assert len(selftest.choose(split, Preprocessing(tiny.SIZE), photos=[], photo_inputs=nothing, least=1e-3)) == 1


def test_without_a_selftest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = exported(tmp_path / "moe.mvmoe", selftest="none")
    assert bundle.manifest.selftest is None and not list(bundle.path.glob("selftest*"))
    assert bundle.manifest.version == VERSION
    with mvmoe_deploy.load(bundle.path, check="all") as runtime:
        assert runtime.selftest() is None
    assert inspect.main([str(bundle.path), "--selftest"]) == 2
    assert "carries no self-test; it was exported with --selftest none" in capsys.readouterr().err


@pytest.mark.parametrize("images", [None, tiny.inputs(4)], ids=["synthetic", "tensor"])
def test_pictures_cannot_be_cut_from_nothing(images: torch.Tensor | None, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cut from images of a folder; give one \(--images PATH\)"):
        exported(tmp_path / "moe.mvmoe", images=images, selftest="images")
    assert not list(tmp_path.iterdir())


def test_the_commands_option(
    moe_checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(moe_checkpoint), "--target", "onnx", "--images", str(photos), "--out"]
    assert export.main([*given, str(tmp_path / "cut.mvmoe"), "--selftest", "images"]) == 0
    said = capsys.readouterr().out
    assert "self-test: 4 pictures, " in said and "cut from photos: everyone who gets the bundle can see them" in said
    assert export.main([*given, str(tmp_path / "drawn.mvmoe"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bundle"] == str(tmp_path / "drawn.mvmoe")
    assert export.main([*given, str(tmp_path / "none.mvmoe"), "--selftest", "none"]) == 0
    assert "self-test: none" in capsys.readouterr().out
    cut, drawn = (pictures(open_bundle(tmp_path / f"{name}.mvmoe")) for name in ("cut", "drawn"))
    assert len(cut) == len(drawn) == tiny.EXPERTS and not set(cut.values()) & set(drawn.values())
    assert (
        export.main([str(moe_checkpoint), "--target", "onnx", "--out", str(tmp_path / "x"), "--selftest", "images"])
        == 2
    )
    assert "--images PATH" in capsys.readouterr().err
