"""Makes a bundle's self-test: small pictures, one per expert where it can be, and what the bundle answers for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from mvmoe_deploy import selftest
from mvmoe_deploy.backends import Backend
from mvmoe_deploy.bundle import Bundle
from mvmoe_deploy.decoding import decode
from mvmoe_deploy.exporters.exporter import exporter_of
from mvmoe_deploy.exporters.split import SplitModel
from mvmoe_deploy.images import Preprocessing, evenly_spaced, preprocess
from mvmoe_deploy.runtime import Runtime, top_k

Pictures = Literal["drawn", "images", "none"]
"""Where the pictures of a self-test come from; see :func:`mvmoe_deploy.exporters.pipeline.export_model`."""

MOST_CASES = 32
CASES_WITHOUT_EXPERTS = 2

PHOTOS = 64
"""Most of the photos given that are looked at."""

PER_EXPERT = 3
"""Most photos per expert that are cut to a picture's size, which may change their route."""

LARGEST_SIDE = 96
"""Longest that a picture's shorter side is, in pixels, but for one picture: as PNG, photos are large."""

LEAST_MARGIN = 10.0
"""Least margin of a case's route, in tolerances of the gate: a device that departs by as much as it may still chooses
the same experts."""

WIDE_MARGIN = 0.4
WIDE_MARGINS = 10.0
"""A pattern need not be changed further at this margin, or at so many least margins if these are less: of many experts
none gets a gate that is 0.4 ahead of the next."""

CELLS = 8
"""Cells of a pattern, across and down."""

STEPS = 12
STEP = 0.08
"""How far a cell's colour moves in a step, of 0…1."""


@dataclass(frozen=True)
class Picture:
    """A picture that may become a case.

    Attributes:
        image: the picture.
        expert: the expert that PyTorch prefers for it.
        margin: the least difference between the probabilities of an expert chosen and the next.
    """

    image: Image.Image
    expert: int
    margin: float


def write_selftest(
    split: SplitModel, draft: Bundle, backend: Backend, photos: list[Path], photo_inputs: Tensor
) -> list[str]:
    """Writes the self-test's file and pictures into a bundle that has been verified.

    Args:
        split: the reference, which tells where pictures are routed.
        draft: the bundle as written.
        backend: the backend that verified it; what it answers is expected of others.
        photos: images to cut the pictures from; empty for patterns instead.
        photo_inputs: the photos preprocessed, ``[n, 3, S, S]``.

    Returns:
        The paths that were written, the self-test itself first.
    """
    manifest = draft.manifest
    tolerance = exporter_of(manifest.target).precision(manifest.precision).selftest
    pictures = choose(
        split, manifest.preprocessing, photos=photos, photo_inputs=photo_inputs, least=LEAST_MARGIN * tolerance.gate
    )
    runtime = Runtime(draft, backend, max_resident=1 if split.routing else None)
    cases = []
    for number, picture in enumerate(pictures):
        path = f"selftest_{number:02d}.png"
        picture.save(draft.path / path, optimize=True)
        answer = runtime.answer(draft.path / path)
        logits = answer.logits.astype("<f4").tobytes()
        cases.append(
            selftest.Case(image=path, pixels=answer.pixels, experts=answer.experts, gates=answer.gates, logits=logits)
        )
    selftest.write(draft.path, selftest.Selftest(tolerance, cases))
    return [selftest.FILE, *(case.image for case in cases)]


def choose(
    split: SplitModel, preprocessing: Preprocessing, photos: list[Path], photo_inputs: Tensor, least: float
) -> list[Image.Image]:
    """Pictures whose routes have wide margins, in the order of their experts: photos where they lead to an expert, or
    else patterns.

    Args:
        split: the reference.
        preprocessing: how images become the model's input.
        photos: images to cut pictures from.
        photo_inputs: the photos preprocessed, ``[n, 3, S, S]``.
        least: least margin; if no picture has it, the one with the widest is taken.
    """
    if split.routing is None:
        own = [_cut(decode(photo), number, preprocessing.size) for number, photo in enumerate(photos[:2])]
        drawn = [_as_picture(pattern, number, preprocessing) for number, pattern in enumerate(_patterns(2).numpy())]
        return (own + drawn)[:CASES_WITHOUT_EXPERTS]
    pictures = _routed(split, preprocessing, _from_photos(split, preprocessing.size, photos, photo_inputs))
    found = _widest(pictures, least)
    experts = range(min(split.routing.experts, MOST_CASES))
    missing = [expert for expert in experts if expert not in found]
    if missing:
        pictures += steer(split, preprocessing, missing, min(WIDE_MARGIN, WIDE_MARGINS * least))
        found = _widest(pictures, least) | found
    if not found:  # a router that hardly decides
        return [max(pictures, key=lambda picture: picture.margin).image]
    return [found[expert].image for expert in sorted(found)[:MOST_CASES]]


def _widest(pictures: list[Picture], least: float) -> dict[int, Picture]:
    """Of each expert the picture with the widest margin, if that is at least ``least``."""
    best: dict[int, Picture] = {}
    for picture in pictures:
        if picture.margin >= max(least, best[picture.expert].margin if picture.expert in best else 0):
            best[picture.expert] = picture
    return best


def _routed(split: SplitModel, preprocessing: Preprocessing, images: list[Image.Image]) -> list[Picture]:
    """Pictures with their routes in PyTorch."""
    if not images:
        return []
    inputs = torch.from_numpy(np.stack([preprocess(image, preprocessing) for image in images]))
    return [Picture(image, *route) for image, route in zip(images, _routes(split, inputs), strict=True)]


def _routes(split: SplitModel, inputs: Tensor) -> list[tuple[int, float]]:
    """The best expert of each preprocessed image, and the margin of its route."""
    with torch.no_grad():
        return margins(torch.cat([_probabilities(split, part) for part in inputs.split(32)]), split)


def margins(probabilities: Tensor, split: SplitModel) -> list[tuple[int, float]]:
    """The best expert of each image by a router's probabilities ``[B, E]``, and the margin of its route."""
    assert split.routing is not None
    values = probabilities.detach().numpy()
    order = top_k(values, min(split.routing.k + 1, split.routing.experts))
    gates = np.take_along_axis(values, order, axis=1)
    gaps = -np.diff(gates, axis=1) if order.shape[1] > 1 else gates
    return list(zip(order[:, 0].tolist(), gaps.min(axis=1).tolist(), strict=True))


def _probabilities(split: SplitModel, inputs: Tensor) -> Tensor:
    """The router's probabilities ``[B, E]``, with their gradient."""
    result = split.of("trunk")[0].module(inputs)
    for router in split.of("router"):
        return router.module(result)  # type: ignore[no-any-return]
    return result[1]  # type: ignore[no-any-return]


def _from_photos(split: SplitModel, size: int, photos: list[Path], inputs: Tensor) -> list[Image.Image]:
    """Pictures cut from those photos that are routed with the widest margins, a few per expert."""
    if not photos:
        return []
    looked_at = evenly_spaced(len(photos), PHOTOS)
    routes = _routes(split, inputs[looked_at])
    taken: dict[int, int] = {}
    pictures = []
    for index in sorted(range(len(routes)), key=lambda index: -routes[index][1]):
        expert = routes[index][0]
        taken[expert] = taken.get(expert, 0) + 1
        if taken[expert] <= PER_EXPERT:
            pictures.append(_cut(decode(photos[looked_at[index]]), expert, size))
    return pictures


def picture_size(number: int, size: int) -> tuple[int, int]:
    """Width and height of a picture; together they exercise resampling: growing and shrinking, wide and tall.

    Args:
        number: which picture.
        size: side of the model's input.
    """
    larger = number == 0 or (number % 2 == 0 and size + size // 8 <= LARGEST_SIDE)
    short = size + size // 8 + 1 if larger else max(1, min(3 * size // 4, LARGEST_SIDE))
    long = short * 4 // 3 + 1
    return (long, short) if number % 4 < 2 else (short, long)


def _cut(image: Image.Image, number: int, size: int) -> Image.Image:
    """The largest centred part of a photo that has the shape of a picture, in its size; metadata is left behind."""
    wanted = picture_size(number, size)
    scale = min(image.width / wanted[0], image.height / wanted[1])
    width, height = scale * wanted[0], scale * wanted[1]
    left, top = (image.width - width) / 2, (image.height - height) / 2
    part = image.resize(wanted, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    return Image.fromarray(np.asarray(part))


def steer(split: SplitModel, preprocessing: Preprocessing, experts: list[int], wide: float) -> list[Picture]:
    """Pictures of random patterns that are changed step by step until the router sends one to each of the experts.

    A trained router sends whatever is not a photo to few of its experts. The patterns follow the gradient's sign of
    the logarithm of the wanted experts' probabilities. The pictures of all steps are returned.

    Args:
        split: the reference.
        preprocessing: how images become the model's input.
        experts: the experts wanted.
        wide: margin at which a pattern need not be changed further.
    """
    assert split.routing is not None
    k, count = split.routing.k, split.routing.experts
    wanted = torch.zeros(len(experts), count)
    for row, expert in enumerate(experts):
        for place in range(k):  # the next ones in falling order, so that the order has a margin as well
            wanted[row, (expert + place) % count] = 2.0**-place
    patterns = _patterns(len(experts))
    found: list[Picture] = []
    left = list(range(len(experts)))
    for _ in range(STEPS):
        pictures = [_as_picture(patterns[row].numpy(), experts[row], preprocessing) for row in left]
        inputs = torch.from_numpy(np.stack([preprocess(picture, preprocessing) for picture in pictures]))
        with torch.enable_grad():
            probabilities = _probabilities(split, inputs.requires_grad_())
        routes = margins(probabilities, split)
        found += [Picture(picture, *route) for picture, route in zip(pictures, routes, strict=True)]
        on_the_way = [route[0] != experts[row] or route[1] < wide for row, route in zip(left, routes, strict=True)]
        if not (any(on_the_way) and probabilities.requires_grad):
            break
        with torch.enable_grad():
            likelihood = (wanted[left] * probabilities.clamp(min=1e-30).log()).sum()
        (slope,) = torch.autograd.grad(likelihood, inputs)
        patterns[left] = (patterns[left] + STEP * adaptive_avg_pool2d(slope, CELLS).sign()).clamp(0, 1)
        left = [row for row, moves in zip(left, on_the_way, strict=True) if moves]
    return found


def _patterns(count: int) -> Tensor:
    """Random patterns ``[count, 3, CELLS, CELLS]`` of 0.2…0.8."""
    return 0.2 + 0.6 * torch.rand(count, 3, CELLS, CELLS, generator=torch.Generator().manual_seed(0))


def _as_picture(pattern: NDArray[np.float32], number: int, preprocessing: Preprocessing) -> Image.Image:
    """A pattern in the part of a picture that the model sees; the cells at its edge reach to the picture's edge."""
    width, height = picture_size(number, preprocessing.size)
    side = min(width, height) * preprocessing.crop
    across, down = (
        np.clip((np.arange(length) - (length - side) / 2) * CELLS / side, 0, CELLS - 1).astype(int)
        for length in (width, height)
    )
    pixels = np.rint(255 * pattern.transpose(1, 2, 0)[down[:, None], across]).astype(np.uint8)
    return Image.fromarray(pixels)
