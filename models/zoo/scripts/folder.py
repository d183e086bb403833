"""A fixed set of samples as a data folder, for every command that takes ``--data``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mvmoe_deploy.models.zoo.scripts.dataset import Characters


def write(
    samples: Characters,
    per_class: int,
    folder: Path,
    progress: Callable[[Iterator[Any], int], Iterator[Any]] | None = None,
) -> int:
    """Writes ``CLASS/NUMBER.png`` for the first samples of every class, and returns how many.

    Args:
        samples: where from.
        per_class: samples of each class.
        folder: such as ``DIR/val``.
        progress: wraps the iterator over batches, given it and its length.
    """
    parts = samples.balanced(per_class).split(1000)
    batches: Iterator[Any] = iter(parts)
    written = 0
    for numbers in progress(batches, len(parts)) if progress else batches:
        grey, labels = samples.grey(numbers)
        for number, picture, label in zip(numbers.tolist(), grey.cpu(), labels.tolist(), strict=True):
            path = folder / samples.classes[label].id / f"{number:07d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.numpy()).convert("RGB").save(path)
            written += 1
    return written


def write_class_names(samples: Characters, path: Path) -> None:
    """Writes ``classes.tsv`` of a data folder: id and readable name."""
    path.write_text("".join(f"{each.id}\t{each.name}\n" for each in samples.classes), encoding="utf-8")


def as_tensors(samples: Characters, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same samples in memory: uint8 ``[n, 3, 32, 32]`` and labels int64 ``[n]``."""
    parts = [samples.batch(numbers) for numbers in samples.balanced(per_class).split(1000)]
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])
