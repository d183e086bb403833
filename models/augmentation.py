"""Random crops, mirror images and colours of training batches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from mvmoe_deploy.models.training import Recipe

LOG_ASPECT = math.log(4 / 3)
"""Resampled crops are at most this much wider or taller than square, as everywhere since Inception."""


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Augments a uint8 batch ``[B, 3, S, S]``; the same shape comes back.

    It stays uint8, or is float32 in 0…255 where crops are resampled or colours change.
    """
    mirrored = torch.zeros(len(images), dtype=torch.bool)
    if recipe.flip:
        mirrored = torch.rand(len(images), generator=generator) < 0.5
    if recipe.min_crop:
        images = _resampled_crops(images, mirrored, recipe.min_crop, generator)
    else:
        images = _padded_crops(images, mirrored, recipe.crop_padding, generator)
    return _other_colours(images.float(), recipe.jitter, generator) if recipe.jitter else images


def _padded_crops(images: Tensor, mirrored: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    batch, _, size, _ = images.shape
    device = images.device
    rows = torch.arange(size, device=device).repeat(batch, 1)
    columns = torch.where(mirrored.to(device)[:, None], size - 1 - rows, rows)
    if pad:
        images = F.pad(images, [pad] * 4)
        shift = torch.randint(0, 2 * pad + 1, (2, batch, 1), generator=generator).to(device)
        rows, columns = rows + shift[0], columns + shift[1]
    everything = torch.arange(batch, device=device)[:, None, None, None]
    channels = torch.arange(3, device=device)[None, :, None, None]
    return images[everything, channels, rows[:, None, :, None], columns[:, None, None, :]]


def _resampled_crops(images: Tensor, mirrored: Tensor, min_crop: float, generator: torch.Generator) -> Tensor:
    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(images)).uniform_(low, high, generator=generator)

    area, aspect = uniform(min_crop, 1), uniform(-LOG_ASPECT, LOG_ASPECT).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    # in grid_sample's coordinates an image spans -1 to 1
    window = torch.zeros(len(images), 2, 3)
    window[:, 0, 0], window[:, 1, 1] = torch.where(mirrored, -width, width), height
    window[:, 0, 2], window[:, 1, 2] = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(window.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def _other_colours(images: Tensor, jitter: float, generator: torch.Generator) -> Tensor:
    def factor() -> Tensor:
        share = torch.empty(len(images), 1, 1, 1).uniform_(1 - jitter, 1 + jitter, generator=generator)
        return share.to(images.device)

    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * factor() + mean * factor()  # contrast, brightness
    grey = images.mean(1, keepdim=True)
    return (grey + (images - grey) * factor()).clamp(0, 255)  # saturation
