"""docs/bundle-format.md: its code computes what the runtime computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from mvmoe_deploy.images import Preprocessing, normalise, to_pixels

PAGE = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def resample() -> Callable[..., Any]:
    """The page's function."""
    match = re.search(r"<!-- tested: resampling -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert match
    names: dict[str, Any] = {}
    exec(match[1], names)
    return names["resample"]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width", "size", "crop"),
    [
        (32, 32, 32, 1.0),  # as it is
        (32, 32, 32, 0.875),
        (48, 48, 48, 0.99999),
        (100, 75, 32, 1.0),
        (75, 100, 32, 1.0),
        (61, 211, 48, 0.875),  # wide
        (211, 61, 48, 0.875),  # tall, which Pillow 13 alone would take down first
        (2000, 40, 32, 0.95),
        (65, 40, 32, 1.0),
        (49, 40, 32, 1.0),
        (33, 3, 64, 1.0),  # enlarged
        (90, 20, 64, 0.5),  # made lower and wider
        (1, 1, 7, 1.0),
        (299, 1, 8, 0.3333),
        (300, 400, 224, 0.96),
    ],
)
def test_its_resampling_is_the_runtimes(
    height: int,
    width: int,
    size: int,
    crop: float,
    interpolation: Literal["bilinear", "bicubic"],
    resample: Callable[..., Any],
) -> None:
    image = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = to_pixels(image, Preprocessing(size=size, crop=crop, interpolation=interpolation))
    np.testing.assert_array_equal(resample(image, size, crop, interpolation), expected)


def test_its_formulas_are_the_runtimes() -> None:
    """Transparency for every value and alpha, 16-bit grey, and the rounding of the normalised values."""
    value, alpha = np.mgrid[0:256, 0:256].astype(np.uint8)
    seen = to_pixels(np.stack([value, value, value, alpha], -1), Preprocessing(size=256))
    v, a = value.astype(int), alpha.astype(int)
    np.testing.assert_array_equal(seen, np.repeat((v * a + 255 * (255 - a) + 127)[..., None] // 255, 3, -1))

    grey = np.arange(0, 65536, dtype=np.uint16).reshape(256, 256)
    seen = to_pixels(Image.fromarray(grey), Preprocessing(size=256))
    np.testing.assert_array_equal(seen, np.repeat(np.rint(grey / 257)[..., None], 3, -1))

    preprocessing = Preprocessing(size=1)
    for channel, (mean, std) in enumerate(zip(preprocessing.mean, preprocessing.std, strict=True)):
        pixels = np.arange(256, dtype=np.uint8)
        product = (pixels.astype(np.float32) * np.float32(1 / (255 * std))).astype(np.float32)
        expected = product + np.float32(-mean / std)
        images = np.repeat(pixels[:, None, None, None], 3, -1)
        np.testing.assert_array_equal(normalise(images, preprocessing)[:, channel, 0, 0], expected)
