"""Augmentation of training images: random crops, mirror images, changed colours and mixtures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvmoe_deploy.models.train.recipe import Recipe

LOG_ASPECT = math.log(4 / 3)
"""Logarithm of a resampled crop's largest aspect ratio, which is 4/3 as in Inception's crops."""


@dataclass(frozen=True)
class View:
    """The random choices for each of n images. They do not depend on batches, so that a view can be computed again.

    Attributes:
        mirrored: whether the image is mirrored, boolean ``[n]``.
        shift: offset of a padded crop in rows and columns, int64 ``[n, 2]``; None if crops are resampled.
        window: width, height and centre (x, y) of a resampled crop ``[n, 4]``, in the coordinates of ``grid_sample``,
            in which an image spans -1 to 1; None if crops are padded.
        colours: factors of contrast, brightness and saturation ``[n, 3]``; None if colours are not changed.
        partner: index of the image that each image is mixed with, int64 ``[n]``; None without mixup.
        share: share of the image itself in its mixture ``[n]``; None without mixup.
    """

    mirrored: Tensor
    shift: Tensor | None
    window: Tensor | None
    colours: Tensor | None
    partner: Tensor | None = None
    share: Tensor | None = None

    def of(self, rows: Tensor) -> View:
        """The view of some of the images, without their mixtures: a partner can be any of the n images."""
        shift, window, colours = (
            None if part is None else part[rows] for part in (self.shift, self.window, self.colours)
        )
        return View(self.mirrored[rows], shift, window, colours)


def draw(count: int, recipe: Recipe, generator: torch.Generator) -> View:
    """Draws a random view of ``count`` images."""

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
    return View(mirrored=mirrored, shift=shift, window=window, colours=colours, partner=partner, share=share)


def augment(images: Tensor, view: View, recipe: Recipe) -> Tensor:
    """Augments a uint8 batch ``[B, 3, S, S]``, except for mixing its images; the shape stays the same.

    The result is uint8, or float32 in 0…255 if crops are resampled or colours change.
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
