"""Decoded, labelled images in memory, and their normalisation into a model's input."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mvmoe_deploy.images import Preprocessing, evenly_spaced

Bar = Callable[[Iterator[Any], int], Iterator[Any]]
"""Takes an iterator and its length, and returns the iterator wrapped in a progress bar."""


@dataclass
class ImageSet:
    """Decoded, labelled images.

    Attributes:
        pixels: uint8 ``[n, 3, size, size]``, in memory or mapped from a file.
        labels: int64 ``[n]``, indices into ``class_ids``.
        class_ids: the class folders' names, sorted.
        skipped: for each image that could not be read, its name and the reason.
        left_out: descriptions of what was left out of the data set: unreadable images, hidden files, files that are no
            images.
    """

    pixels: Tensor
    labels: Tensor
    class_ids: list[str]
    skipped: list[str]
    left_out: list[str] = field(default_factory=list)

    def describe(self, split: str) -> str:
        """One line that says what was found in a split and what was left out."""
        left_out = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        classes = len(self.class_ids)
        return f"{split}: {len(self.labels):,} images of {classes} class{'es' * (classes != 1)}{left_out}"

    def sha256(self) -> str:
        """The sha256 of the pixels and labels, which tells one set from another."""
        digest = hashlib.sha256(self.pixels.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()

    def spaced(self, count: int) -> ImageSet:
        """``count`` of the images, evenly spaced so that no class is left out; all images if there are no more."""
        total = len(self.labels)
        if count >= total:
            return self
        rows = torch.from_numpy(evenly_spaced(total, count))
        return ImageSet(
            pixels=self.pixels[rows],
            labels=self.labels[rows],
            class_ids=self.class_ids,
            skipped=self.skipped,
            left_out=self.left_out,
        )


def quick(x: Tensor) -> Tensor:
    """The same images ``[B, 3, S, S]`` with their channels last in memory, with which a CPU's convolutions run faster.

    EfficientNet-Lite0 took 8.6 ms per image instead of 12.7.
    """
    return x.contiguous(memory_format=torch.channels_last)


def images_per_batch(size: int) -> int:
    """How many images to run at once where no gradients are needed: 500 small ones, fewer if they are large.

    A convolutional network's first layers need a hundred bytes and more per pixel.

    Args:
        size: side of the images, in pixels.
    """
    return max(1, min(500, 500 * 64**2 // size**2))


def normaliser(preprocessing: Preprocessing, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Returns a function that normalises a batch as :func:`mvmoe_deploy.images.normalise` does one image.

    It maps uint8 ``[B, 3, S, S]`` to float32 of the same shape.
    """
    scale = torch.from_numpy(preprocessing.scale).to(device)[:, None, None]
    bias = torch.from_numpy(preprocessing.bias).to(device)[:, None, None]
    return lambda pixels: pixels * scale + bias
