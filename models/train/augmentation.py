"""Training images as they are shown to a model: random crops, mirror images, colours and mixtures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvmoe_deploy.models.train.recipe import Recipe

LOG_ASPECT = math.log(4 / 3)
"""Resampled crops are at most this much wider or taller than square, as everywhere since Inception."""


@dataclass(frozen=True)
class View:
    """What is drawn at random for each of n images; it depends on no batch, so that a view can be had again.

    Attributes:
        mirrored: boolean ``[n]``.
        shift: of padded crops, rows and columns, int64 ``[n, 2]``; None where crops are resampled.
        window: of resampled crops, width, height and centre (x, y) in ``grid_sample``'s coordinates, in which an image
            spans -1 to 1, ``[n, 4]``; None where crops are padded.
        colours: factors of contrast, brightness and saturation ``[n, 3]``; None where colours stay.
        partner: the image that each is mixed with, int64 ``[n]``; None without mixup.
        share: of the image itself in the mixture ``[n]``; None without mixup.
    """

    mirrored: Tensor
    shift: Tensor | None
    window: Tensor | None
    colours: Tensor | None
    partner: Tensor | None = None
    share: Tensor | None = None

    def of(self, rows: Tensor) -> View:
        """The same for some of the images, but for their mixtures, which are with any of the n."""
        shift, window, colours = (
            None if part is None else part[rows] for part in (self.shift, self.window, self.colours)
        )
        return View(self.mirrored[rows], shift, window, colours)


def draw(count: int, recipe: Recipe, generator: torch.Generator) -> View:
    """Draws a view of ``count`` images."""

    def uniform(low: float, high: float, columns: int = 1) -> Tensor:
        return torch.empty(count, columns).uniform_(low, high, generator=generator)

    mirrored = torch.rand(count, generator=generator) < (0.5 if recipe.flip else 0.0)
    colours = uniform(1 - recipe.jitter, 1 + recipe.jitter, 3) if recipe.jitter else None
    shift = window = partner = share = None
    if recipe.min_crop:
        area, aspect = uniform(recipe.min_crop, 1), uniform(-LOG_ASPECT, LOG_ASPECT).exp()
        size = torch.cat([area * aspect, area / aspect], 1).sqrt().clamp(max=1)
        window = torch.cat([size, uniform(-1, 1, 2) * (1 - size)], 1)
    else:
        shift = torch.randint(0, 2 * recipe.crop_padding + 1, (count, 2), generator=generator)
    if recipe.mixup:
        partner = torch.randperm(count, generator=generator)
        share = torch._sample_dirichlet(torch.full((count, 2), recipe.mixup), generator=generator)[:, 0]
    return View(mirrored, shift, window, colours, partner, share)


def augment(images: Tensor, view: View, recipe: Recipe) -> Tensor:
    """Augments a uint8 batch ``[B, 3, S, S]``, but for mixing it; the same shape comes back.

    It stays uint8, or is float32 in 0…255 where crops are resampled or colours change.
    """
    if view.window is not None:
        images = _resampled_crops(images, view.mirrored, view.window)
    else:
        assert view.shift is not None
        images = _padded_crops(images, view.mirrored, view.shift, recipe.crop_padding)
    return images if view.colours is None else _other_colours(images.float(), view.colours)


def _padded_crops(images: Tensor, mirrored: Tensor, shift: Tensor, pad: int) -> Tensor:
    batch, _, size, _ = images.shape
    device = images.device
    rows = torch.arange(size, device=device).repeat(batch, 1)
    columns = torch.where(mirrored.to(device)[:, None], size - 1 - rows, rows)
    if pad:
        images = F.pad(images, [pad] * 4)
        shift = shift.to(device)
        rows, columns = rows + shift[:, :1], columns + shift[:, 1:]
    everything = torch.arange(batch, device=device)[:, None, None, None]
    channels = torch.arange(3, device=device)[None, :, None, None]
    return images[everything, channels, rows[:, None, :, None], columns[:, None, None, :]]


def _resampled_crops(images: Tensor, mirrored: Tensor, window: Tensor) -> Tensor:
    width, height, x, y = window.unbind(1)
    matrices = torch.zeros(len(images), 2, 3)
    matrices[:, 0, 0], matrices[:, 1, 1] = torch.where(mirrored, -width, width), height
    matrices[:, 0, 2], matrices[:, 1, 2] = x, y
    grid = F.affine_grid(matrices.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def _other_colours(images: Tensor, factors: Tensor) -> Tensor:
    contrast, brightness, saturation = factors.to(images.device)[:, :, None, None, None].unbind(1)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * contrast + mean * brightness
    grey = images.mean(1, keepdim=True)
    return (grey + (images - grey) * saturation).clamp(0, 255)
