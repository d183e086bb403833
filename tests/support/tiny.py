"""Tiny models, checkpoints and data that tests are made of; every random number is seeded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mvmoe_deploy import bundle as bundles
from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy import models
from mvmoe_deploy.checkpoint import Checkpoint, Header, Superclasses
from mvmoe_deploy.images import Preprocessing, normalise

SIZE = 32
CLASSES = 6
EXPERTS = 4

DENSE: dict[str, Any] = {
    "architecture": "vit",
    "image_size": SIZE,
    "patch_size": 8,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "classes": CLASSES,
}
MOE: dict[str, Any] = {**DENSE, "architecture": "mobile_vmoe", "experts": EXPERTS, "moe_layers": 1, "k": 1}


def moe_config(**overrides: Any) -> models.MobileVMoEConfig:
    """A tiny Mobile V-MoE's config."""
    config = models.config_from_dict({**MOE, **overrides})
    assert isinstance(config, models.MobileVMoEConfig)
    return config


def vmoe_config(**overrides: Any) -> models.VMoEConfig:
    """A tiny V-MoE's config."""
    shape = {**DENSE, "architecture": "vmoe", "experts": EXPERTS, "placement": "last-1"}
    config = models.config_from_dict({**shape, **overrides})
    assert isinstance(config, models.VMoEConfig)
    return config


def dense_config(**overrides: Any) -> models.ViTConfig:
    """A tiny dense ViT's config."""
    return models.config_from_dict({**DENSE, **overrides})


def lively(model: models.ViT, seed: int = 0) -> models.ViT:
    """Gives every weight, biases and norms included, a value that matters, and spreads images over the experts.

    A fresh model has zero biases and a router that sends all images to one expert, so that much could be wrong
    unseen.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 if parameter.ndim < 2 or ("fc" in name and name.endswith("bias")) else 0.15
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
        if isinstance(model, models.MobileVMoE):
            tokens = model.trunk(inputs(24, model.config.image_size))
            router = model.router
            balance(router.linear, tokens[:, 0] if router.router_input == "class_token" else tokens.mean(1))
    return model.eval()


def balance(router: nn.Linear, features: Tensor) -> None:
    """Shifts and scales a router so that every expert gets some of the images, with gates that are neither 0 nor 1."""
    router.bias.zero_()
    logits = router(features)
    scale = 1.2 / (logits - logits.mean(0)).std(0).clamp(min=1e-3)
    router.weight.mul_(scale[:, None])
    router.bias.copy_(-logits.mean(0) * scale)


def lively_model(config: models.ViTConfig, seed: int = 0) -> models.ViT:
    """A model of this config with :func:`lively` weights."""
    return lively(models.build(config), seed)


def header_for(config: models.ViTConfig) -> Header:
    """A checkpoint header; the super-classes of a MoE are the class index modulo E."""
    ids = [f"n{index:04d}" for index in range(config.classes)]
    groups = None
    if isinstance(config, models.MobileVMoEConfig):
        names = [f"group {index}" for index in range(config.experts)]
        groups = Superclasses(names, [index % config.experts for index in range(config.classes)])
    return checkpoints.new_header(
        config.to_dict(), ids, [f"thing {index}" for index in range(config.classes)],
        Preprocessing(size=config.image_size), groups, {"note": "random weights"},
    )  # fmt: skip


def checkpoint_of(model: models.ViT) -> Checkpoint:
    """A checkpoint of a model in memory."""
    return Checkpoint(header_for(model.config), dict(model.state_dict()))


def images(count: int = 24, size: int = SIZE, seed: int = 1) -> NDArray[np.uint8]:
    """Coloured fields of different brightness and hue, ``[count, size, size, 3]``."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 4, 4, 3))
    fields = coarse.repeat(-(-size // 4), axis=1).repeat(-(-size // 4), axis=2)[:, :size, :size]
    return (fields + generator.integers(-20, 20, fields.shape)).clip(0, 255).astype(np.uint8)


def inputs(count: int = 24, size: int = SIZE, seed: int = 1) -> Tensor:
    """The same, preprocessed: float32 ``[count, 3, size, size]``."""
    return torch.from_numpy(normalise(images(count, size, seed), Preprocessing(size=size)))


def image_folder(root: Path, split: str, classes: int, per_class: int, size: int = 8, seed: int = 0) -> None:
    """Writes ``root/split/CLASS/*.png``: noise in a colour of the class, so that there is something to learn."""
    generator = np.random.default_rng([seed, len(split)])
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255],
                        [255, 255, 255], [128, 128, 128], [255, 128, 0]])  # fmt: skip
    for label in range(classes):
        folder = root / split / f"n{label:04d}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            noise = generator.integers(-60, 60, (size, size, 3))
            pixels = (colours[label] + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:03d}.png")


def write_superclasses(path: Path, classes: int, experts: int) -> Path:
    """A TSV that puts class c into group c modulo E."""
    path.write_text("".join(f"n{label:04d}\tgroup {label % experts}\n" for label in range(classes)), encoding="utf-8")
    return path


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Changes a bundle's manifest in place, and its sha256 with it."""
    file = bundle / bundles.MANIFEST
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))
    record_digest(bundle)


def record_digest(bundle: Path) -> None:
    """Writes the sha256 that a bundle's manifest has now."""
    digest = bundles.sha256(bundle / bundles.MANIFEST)
    (bundle / bundles.MANIFEST_DIGEST).write_text(f"{digest}  {bundles.MANIFEST}\n")


def rehash(bundle: Path) -> None:
    """Makes the manifest agree with files that were altered: what an attacker, or a bug in the exporter, would do."""

    def edit(manifest: dict[str, Any]) -> None:
        for entry in manifest["files"]:
            entry["bytes"] = (bundle / entry["path"]).stat().st_size
            entry["sha256"] = bundles.sha256(bundle / entry["path"])

    edit_manifest(bundle, edit)


def copy_of(bundle: Path, folder: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundle, folder / bundle.name))


class ConvRouted(nn.Module):
    """A small conv net with per-image routing that is no ViT; BatchNorm makes the exporter fold weights.

    Offers only what k = 1 needs of the protocol.
    """

    experts, k, moe_layers = 3, 1, 1

    def __init__(self, classes: int = CLASSES, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=4, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.router = nn.Linear(width, self.experts)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            for _ in range(self.experts)
        )
        self.mix = nn.Conv2d(width, 16, 1)
        self.head = nn.Linear(16, classes)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for tensor in [*self.parameters(), *(b for b in self.buffers() if b.is_floating_point())]:
                tensor.copy_(0.2 + torch.rand(tensor.shape, generator=generator))
            for parameter in (self.router.weight, self.head.weight, self.mix.weight):
                parameter.sub_(0.7)
            balance(self.router, self.eval().stem(inputs()).mean((2, 3)))

    def trunk_module(self) -> nn.Module:
        return self.stem

    def router_module(self) -> nn.Module:
        return PooledRouter(self.router)

    def tail_module(self, expert: int) -> nn.Module:
        return ConvTail(self.branches[expert], self.mix, self.head)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        gates, chosen = self.router_module()(features).max(-1)
        tails = [self.tail_module(int(expert)) for expert in chosen]
        return torch.cat([tail(features[[i]], gates[[i]]) for i, tail in enumerate(tails)])


class PooledRouter(nn.Module):
    """Features → probabilities ``[B, E]``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features.mean((2, 3))).softmax(-1)


class ConvTail(nn.Module):
    """Features and gate → logits."""

    def __init__(self, branch: nn.Module, mix: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.branch, self.mix, self.head = branch, mix, head

    def forward(self, features: Tensor, gate: Tensor) -> Tensor:
        x = features + self.branch(features) * gate[:, None, None, None]
        return self.head(self.mix(x).mean((2, 3)))
