"""Glyphs as a camera might see them: turned, sheared, bent, thickened or thinned, blurred, coarse, faint, noisy.

Everything about a sample's distortion follows from its random numbers (:mod:`.counter`). Characters stay bright on
dark: with both polarities small models learn nothing for their first 100,000 images.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from mvmoe_deploy.models.zoo.scripts.counter import draws, normal, uniform
from mvmoe_deploy.models.zoo.scripts.render import WHITE

SIZE = 32
"""Side of a sample, in pixels."""

SIGMAS = torch.linspace(0.25, 1.25, 16).tolist()
"""Blur, in pixels."""

COARSE = range(15, 25)
"""Sides of the coarse pictures that a quarter of the samples go through."""

NUMBERS = 80
"""Random numbers that a sample's distortion takes."""

_CONTROL = 4
_NOISE = 1 << 16


def distort(glyphs: Tensor, drawn: Tensor) -> Tensor:
    """Glyphs ``[B, 48, 48]``, uint8 → grey samples ``[B, 32, 32]`` in 0…1.

    Args:
        glyphs: pictures of :mod:`.render`.
        drawn: the samples' random int64 numbers, ``[B, NUMBERS]``.
    """
    u, n = uniform(drawn), normal(drawn)
    x = _moved(glyphs, u[:, :8], n[:, 8:10], n[:, 16:48])
    x = _optics(x, u[:, 10], u[:, 11], u[:, 12])
    # thin or thick: a threshold with a slope
    x = ((x - (0.42 + 0.14 * _signed(u[:, 13]))[:, None, None]) * torch.exp(u[:, 14])[:, None, None] + 0.5).clamp(0, 1)
    contrast = 0.5 + 0.5 * u[:, 15]
    dark = (1 - contrast) * u[:, 64]
    basis = _basis(glyphs.device)
    texture = basis @ (0.1 * n[:, 48:64]).view(-1, _CONTROL, _CONTROL) @ basis.T
    x = dark[:, None, None] + contrast[:, None, None] * x + texture
    return (x + _noise(drawn[:, 65]) * (0.08 * u[:, 66])[:, None, None]).clamp(0, 1)


def _signed(u: Tensor) -> Tensor:
    return 2 * u - 1


def _moved(glyphs: Tensor, u: Tensor, n: Tensor, bend: Tensor) -> Tensor:
    """Resampled through a random affine, perspective and smooth map, at the size of a sample."""
    size, turn, shear, far_x, far_y, x, y, _ = _signed(u).unbind(1)
    scale, aspect, angle = torch.exp(0.18 * size), torch.exp(0.10 * n[:, 0]), 0.16 * turn + 0.05 * n[:, 1]
    cos, sin, shear = angle.cos(), angle.sin(), 0.22 * shear
    first = torch.stack([cos * aspect, (shear * cos - sin) * aspect], -1)
    second = torch.stack([sin / aspect, (cos + shear * sin) / aspect], -1)
    matrix = torch.stack([first, second], -1) / scale[:, None, None]  # [B, 2, 2], points from the left
    points = _points(glyphs.device)  # [1024, 2]
    grid = points @ matrix / (1 + 0.12 * points @ torch.stack([far_x, far_y], -1)[:, :, None])
    grid = grid + 0.1 * torch.stack([x, y], -1)[:, None]
    basis = _basis(glyphs.device)
    field = basis @ (0.045 * bend).view(-1, 2, _CONTROL, _CONTROL) @ basis.T  # [B, 2, 32, 32]
    grid = grid.view(-1, SIZE, SIZE, 2) + field.permute(0, 2, 3, 1)
    return F.grid_sample(glyphs[:, None].float() / WHITE, grid, padding_mode="zeros", align_corners=False)[:, 0]


def _optics(x: Tensor, blur: Tensor, coarse: Tensor, side: Tensor) -> Tensor:
    """Blur, and for a quarter of the samples a coarser raster; both work on rows and columns alike."""
    first = (blur * len(SIGMAS)).long()
    second = (coarse < 0.25) * (1 + (side * len(COARSE)).long())  # 0: no raster
    matrix = _lenses(x.device)[first * (1 + len(COARSE)) + second]
    return matrix @ x @ matrix.mT


def _noise(drawn: Tensor) -> Tensor:
    """Fixed normal noise, of which each sample takes 1,024 numbers from a random place on: ``[B, 32, 32]``."""
    start = (drawn >> 24) & (_NOISE - 1)
    bank = _noise_bank(drawn.device)
    return bank[start[:, None] + torch.arange(SIZE * SIZE, device=drawn.device)].view(-1, SIZE, SIZE)


@functools.cache
def _noise_bank(device: torch.device) -> Tensor:
    return normal(draws(0, torch.arange(_NOISE + SIZE * SIZE), 1)[:, 0]).to(device)


@functools.cache
def _points(device: torch.device) -> Tensor:
    line = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2).to(device)


@functools.cache
def _basis(device: torch.device) -> Tensor:
    """``[32, 4]``: four control values → 32, on straight lines between them."""
    return (
        F.interpolate(torch.eye(_CONTROL)[None], size=SIZE, mode="linear", align_corners=True)[0]
        .T.contiguous()
        .to(device)
    )


@functools.cache
def _lenses(device: torch.device) -> Tensor:
    """``[16 · 11, 32, 32]``: each blur, followed by no raster or one of :data:`COARSE`."""
    eye = torch.eye(SIZE)
    rasters = [eye]
    for side in COARSE:
        down = F.adaptive_avg_pool1d(eye[None], side)[0].T  # [side, 32]
        up = F.interpolate(torch.eye(side)[None], size=SIZE, mode="linear", align_corners=False)[0].T
        rasters.append(up @ down)
    lenses = []
    for sigma in SIGMAS:
        kernel = torch.exp(-0.5 * (torch.arange(-2, 3) / sigma) ** 2)
        blur = F.conv1d(eye[:, None], (kernel / kernel.sum()).view(1, 1, 5), padding=2)[:, 0].T
        lenses += [raster @ blur for raster in rasters]
    return torch.stack(lenses).to(device)
