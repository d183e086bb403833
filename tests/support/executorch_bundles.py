"""Small ExecuTorch bundles that several test modules use; lowering takes seconds, so each is made once."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from mvmoe_deploy import checkpoint
from mvmoe_deploy.bundle import Bundle, describe_files, open_bundle, write_manifest
from mvmoe_deploy.exporters.executorch.exporter import ExecuTorchOptions
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.exporters.split import SplitModel, split_model
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models import MobileVMoE, MobileVMoEConfig

SIZE = 16
CLASSES = 5


class Foreign(nn.Module):
    """A model made of none of this project's layers, with weights large enough to see in memory (8 MB)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.hidden = nn.Linear(8 * SIZE * SIZE, 1024)
        self.norm = nn.LayerNorm(1024)
        self.head = nn.Linear(1024, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(self.conv(images).relu().flatten(1)).relu()))


@functools.cache
def routed_model(k: int = 1) -> MobileVMoE:
    """Two blocks, three experts; every weight random, biases and norms too, so that no two are equal by chance."""
    torch.manual_seed(k)
    model = MobileVMoE(
        MobileVMoEConfig(
            image_size=SIZE, patch_size=8, width=32, depth=2, heads=2, classes=CLASSES, experts=3, moe_layers=1, k=k
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@functools.cache
def pieces(k: int = 1) -> SplitModel:
    """The routed model's pieces."""
    return split_model(routed_model(k), SIZE)


@functools.cache
def foreign_model() -> Foreign:
    torch.manual_seed(0)
    return Foreign().eval()


@functools.cache
def folder() -> Path:
    """Where the bundles are; removed with the process's other temporary files."""
    directory = tempfile.TemporaryDirectory()
    folder.keep = directory  # type: ignore[attr-defined]  # it is removed when this object goes
    return Path(directory.name)


@functools.cache
def bundle(name: str) -> Bundle:
    """An exported, verified bundle: ``separate``, ``packed`` (k = 2), ``int8`` (separate router), ``foreign`` or
    ``single`` (batches of one image)."""
    model, options = {
        "separate": (routed_model(), ExecuTorchOptions()),
        "packed": (routed_model(2), ExecuTorchOptions(layout="packed")),
        "int8": (routed_model(), ExecuTorchOptions(precision="int8", separate_router=True)),
        "foreign": (foreign_model(), ExecuTorchOptions()),
        "single": (routed_model(), ExecuTorchOptions(max_batch=1)),
    }[name]
    names = [f"class {index}" for index in range(CLASSES)]
    config = model.config.to_dict() if isinstance(model, MobileVMoE) else {"architecture": "foreign"}
    header = checkpoint.Header(checkpoint.FORMAT, checkpoint.VERSION, config, names, names, Preprocessing(SIZE))
    return export_model(model, header, "executorch", folder() / f"{name}.mvmoe", options=options)


def altered(original: Bundle, directory: Path, files: dict[str, bytes]) -> Bundle:
    """A copy with other contents in some files and a manifest that says these are right."""
    shutil.copytree(original.path, directory, dirs_exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    paths = [file.path for file in original.manifest.files]
    write_manifest(directory, msgspec.structs.replace(original.manifest, files=describe_files(directory, paths)))
    return open_bundle(directory)
