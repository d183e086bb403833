"""Makes a bundle's self-test: small pictures, one per expert where it can be, and what the bundle answers for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mvmoe_deploy import selftest
from mvmoe_deploy.backends import Backend
from mvmoe_deploy.bundle import Bundle
from mvmoe_deploy.exporters.exporter import exporter_of
from mvmoe_deploy.exporters.split import SplitModel
from mvmoe_deploy.exporters.verify import reference_probabilities
from mvmoe_deploy.images import Preprocessing, decode, evenly_spaced, preprocess
from mvmoe_deploy.runtime import Runtime, top_k

PHOTOS = 64
"""Most of the photos given that are looked at."""

PER_EXPERT = 3
"""Most photos per expert that are cut to a picture's size, which may change their route."""

DRAWN = 64
"""Number of pictures that are drawn where photos do not lead to every expert."""

CASES_WITHOUT_EXPERTS = 2

LARGEST_SIDE = 96
"""Longest that a picture's shorter side is, in pixels, but for one picture: as PNG, photos are large."""

MARGIN = 10.0
"""Least margin between the last expert chosen and the next, in tolerances of the gate: a device that departs by as much
as it may still chooses the same."""


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
    split: SplitModel, draft: Bundle, backend: Backend, photos: list[Path], photo_inputs: Tensor | None
) -> list[str]:
    """Writes the self-test's file and pictures into a bundle that has been verified.

    Args:
        split: the reference, which tells where pictures are routed.
        draft: the bundle as written.
        backend: the backend that verified it; what it answers is expected of others.
        photos: images to cut the pictures from; empty to draw them.
        photo_inputs: the photos preprocessed, ``[n, 3, S, S]``.

    Returns:
        The paths that were written, the self-test itself first.
    """
    manifest = draft.manifest
    tolerance = exporter_of(manifest.target).precision(manifest.precision).selftest
    least = MARGIN * tolerance.gate
    experts = split.routing.experts if split.routing else CASES_WITHOUT_EXPERTS
    pictures = _from_photos(split, manifest.preprocessing, photos, photo_inputs)
    found = widest(pictures, least)
    if len(found) < experts:
        drawn = [draw(number, manifest.preprocessing.size) for number in range(DRAWN if split.routing else experts)]
        pictures += _routed(split, manifest.preprocessing, drawn)
        found = widest(pictures, least) | found
    if not found:  # a router that hardly decides
        found = {0: max(pictures, key=lambda picture: picture.margin)}
    runtime = Runtime(draft, backend, max_resident=1 if split.routing else None)
    cases, paths = [], [selftest.FILE]
    for number, (_, picture) in enumerate(sorted(found.items())[:experts]):
        path = f"selftest_{number:02d}.png"
        picture.image.save(draft.path / path, optimize=True)
        answer = runtime.answer(draft.path / path)
        logits = answer.logits.astype("<f4").tobytes()
        cases.append(selftest.Case(path, answer.pixels, answer.experts, answer.gates, logits))
        paths.append(path)
    selftest.write(draft.path, selftest.Selftest(tolerance, cases))
    return paths


def widest(pictures: list[Picture], least: float) -> dict[int, Picture]:
    """Of each expert the picture with the widest margin, if that is at least ``least``."""
    best: dict[int, Picture] = {}
    for picture in pictures:
        if picture.margin >= max(least, best[picture.expert].margin if picture.expert in best else 0):
            best[picture.expert] = picture
    return best


def _routed(split: SplitModel, preprocessing: Preprocessing, pictures: list[Image.Image]) -> list[Picture]:
    """Pictures with their routes; those for a dense model are numbered as if each had an expert of its own."""
    if not pictures:
        return []
    if split.routing is None:
        return [Picture(image, number, np.inf) for number, image in enumerate(pictures)]
    inputs = torch.from_numpy(np.stack([preprocess(image, preprocessing) for image in pictures]))
    return [Picture(image, *route) for image, route in zip(pictures, _routes(split, inputs), strict=True)]


def _routes(split: SplitModel, inputs: Tensor) -> list[tuple[int, float]]:
    """The best expert of each preprocessed image, and the margin of its route."""
    assert split.routing is not None
    k = split.routing.k
    probabilities = np.concatenate([reference_probabilities(split, part) for part in inputs.split(32)])
    order = top_k(probabilities, min(k + 1, split.routing.experts))
    gates = np.take_along_axis(probabilities, order, axis=1)
    gaps = -np.diff(gates, axis=1) if order.shape[1] > 1 else gates
    return list(zip(order[:, 0].tolist(), gaps.min(axis=1).tolist(), strict=True))


def _from_photos(
    split: SplitModel, preprocessing: Preprocessing, photos: list[Path], inputs: Tensor | None
) -> list[Picture]:
    """Pictures cut from those photos that are routed with the widest margins."""
    if inputs is None or not photos:
        return []
    chosen = evenly_spaced(len(photos), PHOTOS).tolist()
    if split.routing is None:
        ranked = [(number, number) for number in range(min(len(chosen), CASES_WITHOUT_EXPERTS))]
    else:
        routes = _routes(split, inputs[chosen])
        by_margin = sorted(range(len(chosen)), key=lambda index: -routes[index][1])
        ranked = [(routes[index][0], index) for index in by_margin]
    pictures, taken = [], dict.fromkeys(range(len(ranked)), 0)
    for expert, index in ranked:
        taken[expert] = taken.get(expert, 0) + 1
        if taken[expert] <= PER_EXPERT:
            pictures.append(cut(decode(photos[chosen[index]]), picture_size(expert, preprocessing.size)))
    return _routed(split, preprocessing, pictures)


def picture_size(number: int, size: int) -> tuple[int, int]:
    """Width and height of a picture, so that together they exercise resampling: growing and shrinking, wide and tall.

    Args:
        number: which picture.
        size: side of the model's input.
    """
    larger = number == 0 or (number % 2 == 0 and size + size // 8 <= LARGEST_SIDE)
    short = size + size // 8 + 1 if larger else max(1, min(3 * size // 4, LARGEST_SIDE))
    long = short * 4 // 3 + 1
    return (long, short) if number % 4 < 2 else (short, long)


def cut(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred part of a photo that has the size's shape, made that size; metadata is left behind."""
    scale = min(image.width / size[0], image.height / size[1])
    width, height = scale * size[0], scale * size[1]
    left, top = (image.width - width) / 2, (image.height - height) / 2
    part = image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    return Image.fromarray(np.asarray(part))


def draw(number: int, size: int) -> Image.Image:
    """Draws a picture: shapes in random colours over a gradient; small as PNG, and different for every number."""
    generator = np.random.default_rng(number)
    width, height = picture_size(number, size)
    ends = generator.integers(0, 256, (2, 3))
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    along = (x if number % 3 else y)[:, :, None]
    image = Image.fromarray((ends[0] + along * (ends[1] - ends[0])).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    for _ in range(int(generator.integers(0, 7))):
        corners = generator.uniform(-0.2, 1.2, (2, 2)) * (width, height)
        box = [*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()]
        colour = tuple(generator.integers(0, 256, 3).tolist())
        (canvas.ellipse if generator.random() < 0.5 else canvas.rectangle)(box, fill=colour)
    return image
