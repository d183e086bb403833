"""Measures how close training comes to what the processor could do.

It compares the images per second of ``mvmoe-train`` (which gathers, augments and normalises images and clips gradients)
with those of a bare loop of forward pass, backward pass and step on constant tensors of the same shape. Both train the
same model with the same optimiser, and take turns of a few steps each.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.bench.measure.latency import interleave
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models import build, config_from_name
from mvmoe_deploy.models.train.data import ImageSet
from mvmoe_deploy.models.train.recipe import Recipe
from mvmoe_deploy.models.train.trainer import Trainer, optimizers

BAR = 0.85
"""Least share of the bare loop's images per second that training must reach."""


@dataclass(frozen=True)
class Speed:
    """One model's training speed.

    Attributes:
        model: the model's name.
        patch: side of a patch, in pixels.
        images_per_second: images per second of training, median over the rounds.
        bare_images_per_second: images per second of the bare loop, median over the rounds.
        ratio: training's images per second divided by the bare loop's, median over the rounds.
        milliseconds: time of each round of training.
        bare_milliseconds: time of each round of the bare loop.
    """

    model: str
    patch: int
    images_per_second: float
    bare_images_per_second: float
    ratio: float
    milliseconds: list[float]
    bare_milliseconds: list[float]


def measure(model: str, patch: int, recipe: Recipe, steps: int, rounds: int, device: str) -> Speed:
    """Times ``steps`` steps of training and of the bare loop in turn.

    Args:
        model: a scale's name; it has 200 classes and images of 32 × 32 pixels.
        patch: side of a patch, in pixels.
        recipe: the training recipe; the bare loop uses its batch size and optimiser.
        steps: number of steps per round.
        rounds: number of rounds to keep.
        device: device to train on.
    """
    config = config_from_name(model, image_size=32, patch_size=patch, classes=200)
    torch.manual_seed(0)
    count = steps * recipe.batch
    ids = [str(index) for index in range(config.classes)]
    labels = torch.randint(config.classes, (count,))
    pixels = torch.randint(0, 256, (20 * count, 3, 32, 32), dtype=torch.uint8)  # more than the caches hold
    images = ImageSet(pixels, labels.repeat(20), ids, [])
    header = checkpoints.new_header(config.to_dict(), ids, ids, Preprocessing(size=32))
    trainer = Trainer(
        model=build(config),
        header=header,
        train=images,
        val=images,
        recipe=recipe,
        out=Path("unwritten.pt"),
        device=device,
    )  # only run() saves
    trainer.steps_per_epoch = steps
    bare = build(config).to(device).train()
    bare_optimizers = optimizers(bare, recipe)
    x = torch.randn(recipe.batch, 3, 32, 32, device=device)
    y = labels[: recipe.batch].to(device)

    def bare_loop(_: int) -> None:
        for _ in range(steps):
            for optimizer in bare_optimizers:
                optimizer.zero_grad(set_to_none=True)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = F.cross_entropy(bare(x).float(), y)
            torch.autograd.backward(loss)
            for optimizer in bare_optimizers:
                optimizer.step()
        float(loss.detach())  # waits for the device, as an epoch does

    samples = interleave({"training": lambda _: trainer.train_epoch(), "bare": bare_loop}, rounds).samples
    ratios = [b / t for t, b in zip(samples["training"], samples["bare"], strict=True)]
    training, base = (1e3 * count / statistics.median(samples[name]) for name in ("training", "bare"))
    return Speed(
        model=model,
        patch=patch,
        images_per_second=training,
        bare_images_per_second=base,
        ratio=statistics.median(ratios),
        milliseconds=samples["training"],
        bare_milliseconds=samples["bare"],
    )
