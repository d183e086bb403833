"""Draws the images in images/: every kind of file that a runtime may be handed, small, and free for everybody to use.

    python tests/conformance/draw.py

The files are in the repository, because encoders differ between releases and all languages must see the same bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

FOLDER = Path(__file__).parent / "images"

Pixels = NDArray[np.uint8]


def drawing(width: int, height: int, seed: int) -> Pixels:
    """A coloured field with a disc and stripes, ``[H, W, 3]``: edges, which resampling shows, and smooth parts."""
    generator = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    ground, disc, stripe = generator.integers(0, 256, (3, 3))
    values = ground * (0.4 + 0.6 * x[..., None]) + (disc - ground) * 0.4 * y[..., None]
    values[np.hypot(x - 0.4, y - 0.5) < 0.28] = disc
    values[(np.floor(9 * (x + y)) % 4 == 0) & (x > 0.55)] = stripe
    return (values + generator.normal(0, 4, values.shape)).clip(0, 255).astype(np.uint8)


def png(pixels: NDArray[Any], depth: int, colour: int, *chunks: tuple[bytes, bytes], interlaced: bool = False) -> bytes:
    """A PNG as its specification has it, with kinds of pixels that Pillow does not write.

    Args:
        pixels: samples ``[H, W]`` or ``[H, W, channels]``, each below two to the power of the depth.
        depth: bits per sample.
        colour: the colour type of the PNG specification.
        chunks: further chunks, before the image's data.
        interlaced: whether to write the seven passes of Adam7.
    """
    height, width = pixels.shape[:2]
    passes = [(0, 0, 1, 1)]
    if interlaced:  # first column and row of each pass, and its steps
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = b""
    for x, y, step_x, step_y in passes:
        part = pixels[y::step_y, x::step_x].reshape(len(range(y, height, step_y)), -1)
        if depth == 16:
            packed = part.astype(">u2").view(np.uint8).reshape(len(part), -1)
        else:
            bits = np.unpackbits(part.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
            packed = np.packbits(bits.reshape(len(part), -1), axis=1)
        rows += b"".join(b"\0" + row.tobytes() for row in packed if row.size)
    return png_file(struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced), rows, *chunks)


def png_file(header: bytes, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of a header and rows of samples."""
    every = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in every
    )


def swapped_profile() -> bytes:
    """sRGB's colour profile with red and blue exchanged, so that a decoder which honours profiles cannot be missed."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")  # in the table of tags: name, place, size
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def exif(orientation: int) -> bytes:
    """EXIF data with an orientation."""
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def write() -> None:
    """Writes all images."""
    raw: dict[str, Callable[[], bytes]] = {}
    grey = drawing(61, 44, 10)[..., 0].astype(np.uint32)
    alpha = np.linspace(0, 255, 61).astype(np.uint8)[None, :].repeat(44, 0)
    palette = Image.fromarray(drawing(61, 44, 12)).quantize(200)
    indices = np.asarray(palette)
    colours = (b"PLTE", bytes((palette.getpalette() or [])[:600]))
    rgb = drawing(61, 44, 13)
    patch = drawing(61, 44, 15)
    patch[8:30, 20:41] = patch[8, 20]
    raw["png_grey1.png"] = lambda: png((grey > 128).astype(np.uint8), 1, 0)
    raw["png_grey2.png"] = lambda: png(grey >> 6, 2, 0)
    raw["png_grey4_trns.png"] = lambda: png(grey >> 4, 4, 0, (b"tRNS", struct.pack(">H", int(grey[5, 5] >> 4))))
    raw["png_grey16.png"] = lambda: png(grey * 257 - (grey > 9) * 77, 16, 0)
    raw["png_grey12_in_16.png"] = lambda: png(grey[:, ::-1] * 16, 16, 0)
    raw["png_grey_alpha.png"] = lambda: png(np.stack([grey, alpha], -1), 8, 4)
    raw["png_palette.png"] = lambda: png(indices, 8, 3, colours)
    raw["png_palette_trns.png"] = lambda: png(indices, 8, 3, colours, (b"tRNS", bytes(range(0, 200, 2))))
    raw["png_rgb_trns.png"] = lambda: png(patch, 8, 2, (b"tRNS", struct.pack(">3H", *patch[8, 20].tolist())))
    raw["png_rgb16.png"] = lambda: png(drawing(61, 44, 16).astype(np.uint32) * 256 + 200, 16, 2)
    raw["png_rgba.png"] = lambda: png(np.concatenate([rgb, alpha[..., None]], -1), 8, 6)
    raw["png_interlaced.png"] = lambda: png(drawing(61, 44, 14), 8, 2, interlaced=True)
    FOLDER.mkdir(exist_ok=True)
    for name, make in raw.items():
        (FOLDER / name).write_bytes(make())

    def save(name: str, image: Image.Image, **options: Any) -> None:
        image.save(FOLDER / name, **options)

    save("png_wide.png", Image.fromarray(drawing(300, 9, 20)), optimize=True)
    save("png_tall.png", Image.fromarray(drawing(7, 200, 21)), optimize=True)
    save("png_one_pixel.png", Image.new("RGB", (1, 1), (180, 40, 90)))
    save("png_input_size.png", Image.fromarray(drawing(32, 32, 22)), optimize=True)
    save("png_smaller.png", Image.fromarray(drawing(17, 13, 23)), optimize=True)
    save("png_exif6.png", Image.fromarray(drawing(61, 44, 24)), exif=exif(6), optimize=True)
    save("png_profile.png", Image.fromarray(drawing(61, 44, 25)), icc_profile=swapped_profile(), optimize=True)
    frames = [Image.fromarray(drawing(61, 44, seed)).quantize(64) for seed in (26, 27)]
    save("gif_animated.gif", frames[0], save_all=True, append_images=frames[1:], duration=50)
    save("webp_lossless.webp", Image.fromarray(drawing(61, 44, 28)), lossless=True)
    save("webp_alpha.webp", Image.fromarray(np.concatenate([drawing(61, 44, 29), alpha[..., None]], -1)), lossless=True)
    save("bmp.bmp", Image.fromarray(drawing(41, 30, 30)))
    save("jpeg_progressive.jpg", Image.fromarray(drawing(61, 44, 31)), progressive=True, quality=92)
    save("jpeg_cmyk.jpg", Image.fromarray(drawing(61, 44, 32)).convert("CMYK"), quality=92)
    for orientation in range(1, 9):
        image = Image.fromarray(drawing(61, 44, 40 + orientation))
        save(f"jpeg_exif{orientation}.jpg", image, exif=exif(orientation), quality=92)
    refused()


def refused() -> None:
    """Files that have to be refused, before they take memory or time."""
    row = bytes(1 + 3 * 65536)
    files = {
        "refused_bomb.png": png_file(struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0), b"\0"),
        "refused_long_side.png": png_file(struct.pack(">IIBBBBB", 65536, 1, 8, 2, 0, 0, 0), row),
        "refused_empty.png": b"",
        "refused_text.png": b"This is no image.\n",
        "refused_truncated.png": png(drawing(61, 44, 50), 8, 2)[:3000],
    }
    for name, content in files.items():
        (FOLDER / name).write_bytes(content)


if __name__ == "__main__":
    write()
