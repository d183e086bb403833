"""The zoo's models for photos: how the dense one is made, and that both know what is on a photo."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

import mvmoe_deploy
from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.images import to_pixels
from mvmoe_deploy.models import ZOO, load_checkpoint
from mvmoe_deploy.models.architectures import timm_library
from mvmoe_deploy.models.train.data import normaliser
from mvmoe_deploy.models.zoo import photos

PHOTOS = Path(__file__).parents[3] / "docs" / "photos"
IDS = ["n01443537", "n02124075", "n07920052"]


def foreign_name(name: str) -> str:
    """timm's name of a weight → the package's, written down independently of the code under test."""
    outer = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    parts = name.split(".")
    if parts[0] != "blocks":
        return ".".join([outer[parts[0]], *parts[1:]])
    number = sum([1, 2, 2, 3, 3, 4, 1][: int(parts[1])]) + int(parts[2])
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    further = {
        "conv_pw": "_expand_conv",
        "bn1": "_bn0",
        "conv_dw": "_depthwise_conv",
        "bn2": "_bn1",
        "conv_pwl": "_project_conv",
        "bn3": "_bn2",
    }
    return ".".join([f"_blocks.{number}", (further if number else first)[parts[3]], *parts[4:]])


@pytest.fixture(scope="module")
def whole() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm_library.create("tf_efficientnet_lite0", "", classes=1000, image_size=64)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # so that no two norms can be exchanged unseen
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def weights(folder: Path, whole: torch.nn.Module, **changes: torch.Tensor) -> Path:
    state = {foreign_name(name): value for name, value in whole.state_dict().items()} | changes
    torch.save(state, folder / "lite0.pth", _use_new_zipfile_serialization=False)  # as the package's file
    return folder / "lite0.pth"


def test_the_dense_model_answers_as_the_published_one(
    whole: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for class_id in IDS:
        (tmp_path / "data" / "train" / class_id).mkdir(parents=True)
    (tmp_path / "data" / "classes.tsv").write_text(
        "n02124075\tEgyptian cat\nn07920052\tespresso\nn01443537\tgoldfish, x\n"
    )
    out = tmp_path / "dense.safetensors"
    argv = ["make", str(weights(tmp_path, whole)), "--data", str(tmp_path / "data"), "--out", str(out)]
    assert photos.main(argv) == 0
    model, header = load_checkpoint(out)
    assert header.class_ids == IDS and header.class_names == ["goldfish", "Egyptian cat", "espresso"]
    assert header.preprocessing.size == 224 and header.preprocessing.mean == (0.5, 0.5, 0.5)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected, found = whole(images)[:, [1, 285, 967]], model.eval()(images)
    assert (expected - found).abs().max() < 0.02 * expected.std()  # stored in fp16

    assert photos.main(argv) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_fc.bias": torch.zeros(10)}, "holds no classifier of 1000 classes"),
        ({"_blocks.16._bn0.weight": torch.zeros(1)}, "not the weights of timm:tf_efficientnet_lite0"),
        ({"_conv_stem.weight": torch.zeros(3)}, "'conv_stem.weight' has shape [3]"),
        ({"_conv_stem.weight": "text"}, "holds no state dict"),
    ],
)
def test_other_weights_are_refused(
    change: dict[str, torch.Tensor], reason: str, whole: torch.nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        photos.dense(weights(tmp_path, whole, **change), IDS, IDS)


def test_a_class_that_is_none_of_imagenets_is_named(whole: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'n00000000' is none of ImageNet's 1,000 classes"):
        photos.dense(weights(tmp_path, whole), ["n00000000"], ["nothing"])


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_the_zoo_knows_what_is_on_a_photo(name: str) -> None:
    path = ZOO / f"{name}.safetensors"
    assert path.stat().st_size <= 8_000_000
    model, header = load_checkpoint(path)
    images = [PHOTOS / "chelsea.jpg", PHOTOS / "coffee.jpg"]
    pixels = torch.stack([torch.from_numpy(to_pixels(image, header.preprocessing)) for image in images])
    x = normaliser(header.preprocessing, torch.device("cpu"))(pixels.permute(0, 3, 1, 2))
    with torch.no_grad():
        best = model.eval()(x).argmax(-1)
    assert [header.class_names[index] for index in best] == ["Egyptian cat", "espresso"]
    assert checkpoints.load(path).header.training["library"].startswith("timm ")


def test_photos_are_counted_by_the_ids_that_their_names_begin_with(
    dense_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = PHOTOS / "chelsea.jpg"
    with mvmoe_deploy.load(dense_path) as runtime:
        best = runtime.predict(photo).top[0].class_id
        other = next(each for each in runtime.bundle.manifest.class_ids if each != best)
    for name in (f"{best}_a", f"{best}_b", f"{other}_c"):
        shutil.copy(photo, tmp_path / f"{name}.jpg")
    assert photos.main(["count", str(dense_path), str(tmp_path)]) == 0
    assert capsys.readouterr().out == "2 of 3 photos right at once\n"
    assert photos.main(["count", str(dense_path), str(PHOTOS)]) == 2
    assert "holds no photo whose name begins with" in capsys.readouterr().err
