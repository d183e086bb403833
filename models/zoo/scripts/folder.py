"""A fixed set of samples as a data folder, for every command that takes ``--data``."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mvmoe_deploy.images import evenly_spaced
from mvmoe_deploy.models.zoo.scripts.dataset import Characters
from mvmoe_deploy.models.zoo.scripts.tables import FontRow


def write(
    samples: Characters,
    per_class: int,
    folder: Path,
    progress: Callable[[Iterator[Any], int], Iterator[Any]] | None = None,
) -> int:
    """Writes ``CLASS/NUMBER.png`` for the first samples of every class, and returns how many.

    Args:
        samples: the data set to take them from.
        per_class: samples of each class.
        folder: such as ``DIR/val``.
        progress: wraps the iterator over batches; it is called with that iterator and its length.
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


def write_zip(samples: Characters, fonts: list[FontRow], per_class: int, count: int, licence: str, path: Path) -> int:
    """Writes a zip of ``CLASS/NUMBER.png`` with some of the samples that :func:`write` writes, and returns how many.

    Args:
        samples: the data set to take them from.
        fonts: the table that their glyphs were rendered from.
        per_class: samples of each class to choose from.
        count: number of samples to write, evenly spaced over the classes.
        licence: only samples of faces under this licence are chosen.
        path: such as ``DIR/val.zip``.
    """
    numbers = samples.balanced(per_class)
    numbers = numbers[[fonts[face].licence == licence for face in samples.faces(numbers).tolist()]]
    numbers = numbers[evenly_spaced(len(numbers), count)]
    grey, labels = samples.grey(numbers)
    with zipfile.ZipFile(path, "w") as archive:
        for number, picture, label in zip(numbers.tolist(), grey.cpu(), labels.tolist(), strict=True):
            content = io.BytesIO()
            Image.fromarray(picture.numpy()).save(content, "PNG", optimize=True)
            # a fixed date, so that the same images are the same file
            archive.writestr(zipfile.ZipInfo(f"{samples.classes[label].id}/{number:07d}.png"), content.getvalue())
    return len(numbers)


def write_class_names(samples: Characters, path: Path) -> None:
    """Writes the ``classes.tsv`` of a data folder, with the id and the readable name of every class."""
    path.write_text("".join(f"{each.id}\t{each.name}\n" for each in samples.classes), encoding="utf-8")


def as_tensors(samples: Characters, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples that :func:`write` writes, in memory: images uint8 ``[n, 3, 32, 32]`` and labels int64 ``[n]``."""
    parts = [samples.batch(numbers) for numbers in samples.balanced(per_class).split(1000)]
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])
