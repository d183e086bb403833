"""One face's characters as small pictures: trimmed, scaled to one size and centred, so that only the shape differs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE = 48
"""Of a glyph's picture, in pixels."""

INK = 38
"""Longer side of what is drawn, in pixels."""

WHITE = 252
"""What a pixel full of ink has: seven levels of 36 above black, so that pictures compress well."""

_STEP = 36
_POINTS = 56
_LARGEST_UPSCALE = 1.6
_SHARED = 10


def render(path: Path, index: int, codes: Iterable[int]) -> tuple[NDArray[np.uint8], list[int]]:
    """Renders characters of one face, bright on dark.

    Empty pictures are left out, and so are pictures that many characters share: a font's sign for "no such character".

    Args:
        path: font file.
        index: index of the face in the file.
        codes: the code points to render, all of which the face has.

    Returns:
        Pictures ``[n, 48, 48]`` of 0…252, and their code points.
    """
    font = ImageFont.truetype(str(path), _POINTS, index=index, layout_engine=ImageFont.Layout.BASIC)
    pictures: dict[int, NDArray[np.uint8]] = {}
    owners: dict[bytes, list[int]] = {}
    for code in codes:
        picture = _picture(font, chr(code))
        if picture is not None:
            pictures[code] = picture
            owners.setdefault(picture.tobytes(), []).append(code)
    kept = sorted(code for alike in owners.values() if len(alike) < _SHARED for code in alike)
    stacked = np.stack([pictures[code] for code in kept]) if kept else np.zeros((0, SIDE, SIDE), np.uint8)
    return stacked, kept


def _picture(font: ImageFont.FreeTypeFont, text: str) -> NDArray[np.uint8] | None:
    try:
        left, top, right, bottom = font.getbbox(text)
        width, height = int(right - left), int(bottom - top)
        if not (3 < width < 300 and 3 < height < 300):
            return None
        drawn = Image.new("L", (width + 4, height + 4), 0)
        ImageDraw.Draw(drawn).text((2 - left, 2 - top), text, font=font, fill=255)
    except (OSError, ValueError):  # a damaged outline
        return None
    box = drawn.getbbox()
    if box is None:
        return None
    drawn = drawn.crop(box)
    if min(drawn.size) < 3:
        return None
    scale = min(INK / max(drawn.size), _LARGEST_UPSCALE)
    size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
    drawn = drawn.resize(size, Image.Resampling.BOX if scale < 0.6 else Image.Resampling.BILINEAR)
    whole = Image.new("L", (SIDE, SIDE), 0)
    whole.paste(drawn, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    grey = np.asarray(whole, np.float32)
    return (np.round(grey * (WHITE // _STEP / 255)) * _STEP).astype(np.uint8)
