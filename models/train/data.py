"""Decoded, labelled images in memory, and what models are given of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mvmoe_deploy.images import Preprocessing, evenly_spaced


@dataclass
class ImageSet:
    """Decoded, labelled images.

    Attributes:
        pixels: uint8 ``[n, 3, size, size]``, in memory or mapped from a file.
        labels: int64 ``[n]``, indices into ``class_ids``.
        class_ids: the class folders' names, sorted.
        skipped: images that could not be read, each with the reason.
        left_out: in words, what of the data set is not among these images: unreadable, hidden, no images.
    """

    pixels: Tensor
    labels: Tensor
    class_ids: list[str]
    skipped: list[str]
    left_out: list[str] = field(default_factory=list)

    def describe(self, split: str) -> str:
        """What was found, in a line."""
        left_out = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        classes = len(self.class_ids)
        return f"{split}: {len(self.labels):,} images of {classes} class{'es' * (classes != 1)}{left_out}"

    def sha256(self) -> str:
        """Of the pixels and labels, to tell one set from another."""
        digest = hashlib.sha256(self.pixels.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()

    def spaced(self, count: int) -> ImageSet:
        """``count`` of the images, evenly spaced, so that no class is left out; all where there are no more."""
        total = len(self.labels)
        if count >= total:
            return self
        rows = torch.from_numpy(evenly_spaced(total, count))
        return ImageSet(self.pixels[rows], self.labels[rows], self.class_ids, self.skipped, self.left_out)


def normaliser(preprocessing: Preprocessing, device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 ``[B, 3, S, S]`` → float32, as :func:`mvmoe_deploy.images.normalise` does for one image."""
    scale = torch.from_numpy(preprocessing.scale).to(device)[:, None, None]
    bias = torch.from_numpy(preprocessing.bias).to(device)[:, None, None]
    return lambda pixels: pixels * scale + bias
