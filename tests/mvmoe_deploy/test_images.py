"""Decoding and preprocessing: every kind of image a phone or a stranger may hand over."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageCms, ImageFile, PngImagePlugin
from threads import together

from mvmoe_deploy import decoding
from mvmoe_deploy.decoding import decode
from mvmoe_deploy.errors import ImageError
from mvmoe_deploy.images import Preprocessing, evenly_spaced, normalise, preprocess, to_pixels
from mvmoe_deploy.models.train.data import normaliser

GREY = 200


def picture(size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    """A smooth colour picture, which JPEG keeps nearly as it is."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((255 * np.stack([x, y, (x + y) / 2], -1)).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(source: Any) -> np.ndarray:
    image = decode(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def uniform(array: np.ndarray, *value: int, within: int = 0) -> None:
    assert array.shape[2] == 3
    assert np.abs(array.astype(int) - np.array(value)).max() <= within


# what is valid after all gives the right answer


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "1", "LA", "I", "F", "HSV"])
def test_every_pillow_mode_becomes_rgb_of_the_same_brightness(mode: str) -> None:
    grey = Image.new("L", (7, 5), 255 if mode == "1" else GREY)
    if mode == "I":
        image = Image.fromarray(np.full((5, 7), GREY * 257, np.int32))
    elif mode == "F":
        image = Image.fromarray(np.full((5, 7), GREY, np.float32))
    else:
        image = grey.quantize() if mode == "P" else grey.convert("RGB").convert(mode)
    uniform(rgb(image), *(3 * [255 if mode == "1" else GREY]), within=2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("value", [0, 4096, 32768, 65535])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str, value: int) -> None:
    file = encoded(Image.fromarray(np.full((6, 6), value, np.uint16)), kind)
    uniform(rgb(file), *(3 * [round(value / 257)]))


@pytest.mark.parametrize(
    ("dtype", "value", "largest", "expected"),
    [
        (np.uint16, 100, 255, 100),  # 8 bits in 16
        (np.uint16, 2048, 4095, 128),  # 12 bits in 16
        (np.uint16, 100, 65535, 0),
        (np.int32, 100, 255, 100),
        (np.int32, 2048, 4095, 128),
        (np.int32, 257 * 100, 65535, 100),
        (np.float32, 0.5, 1, 128),
        (np.float32, 0.5, 255, 0),
        (np.float32, 100, 255, 100),
        (np.float32, 257 * 100, 65535, 100),
        (np.float32, 0, 0, 0),
    ],
)
@pytest.mark.parametrize("strip", [4, 1 << 22])
def test_wide_grey_is_scaled_from_the_smallest_range_that_holds_it(
    dtype: type, value: float, largest: float, expected: int, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_STRIP_PIXELS", strip)
    array = np.full((6, 6), value, dtype)
    array[5, 5] = largest
    for source in (Image.fromarray(array), encoded(Image.fromarray(array), "TIFF")):
        pixels = rgb(source)
        uniform(pixels[:5], expected, expected, expected)
        assert pixels[5, 5].tolist() == [255 if largest else 0] * 3


def test_a_pgm_file_says_what_its_largest_value_may_be() -> None:
    uniform(rgb(b"P5 2 1 65535\n" + bytes([10, 0, 10, 0])), 10, 10, 10)
    uniform(rgb(b"P5 2 1 1023\n" + struct.pack(">HH", 512, 512)), 128, 128, 128)


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (np.float32, np.nan, "has pixels that are NaN or infinite"),
        (np.float32, np.inf, "has pixels that are NaN or infinite"),
        (np.float32, -0.5, "has pixels down to -0.5, below 0"),
        (np.float32, 1e9, r"has pixels up to 1e\+09, above 65535"),
        (np.int32, -1, "has pixels down to -1, below 0"),
        (np.int32, 65536, "has pixels up to 65536, above 65535"),
    ],
)
def test_grey_values_without_a_meaning_are_refused(dtype: type, value: float, message: str, tmp_path: Path) -> None:
    array = np.zeros((6, 6), dtype)
    array[2, 3] = value
    file = tmp_path / "scan.tif"
    Image.fromarray(array).save(file)
    with pytest.raises(ImageError, match=rf"scan\.tif: {message}"):
        decode(file)


def test_cielab_is_refused() -> None:
    with pytest.raises(ImageError, match="its colours are CIELAB"):
        decode(Image.new("LAB", (4, 4)))


def test_cmyk_jpeg() -> None:
    file = encoded(Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(file)).mode == "CMYK"
    uniform(rgb(file), 200, 40, 90, within=4)


def test_ycck_jpeg() -> None:
    """Four components that hold Y, Cb, Cr and K, inverted as Adobe has it; made by patching what Pillow writes."""
    y, cb, cr = Image.new("RGB", (16, 16), (255 - 200, 255 - 40, 255 - 90)).convert("YCbCr").split()
    channels = [*(each.point(lambda value: 255 - value) for each in (y, cb, cr)), Image.new("L", (16, 16), 0)]
    file = bytearray(encoded(Image.merge("CMYK", channels), "JPEG", quality=95))
    marker = file.index(b"\xff\xee\0\x0eAdobe")
    assert file[marker + 15] == 0
    file[marker + 15] = 2
    uniform(rgb(bytes(file)), 200, 40, 90, within=4)


def test_transparency_is_laid_over_white() -> None:
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    uniform(rgb(encoded(half, "PNG")), 127, 127, 127, within=1)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0])
    uniform(rgb(encoded(palette, "PNG", transparency=0)), 255, 255, 255)
    uniform(rgb(np.zeros((4, 4, 4), np.uint8)), 255, 255, 255)


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes, *more: tuple[bytes, bytes], interlaced: int = 0
) -> bytes:
    """A PNG as its specification has it, with kinds of pixels that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


TRANSPARENT_COLOURS = {  # two pixels, of which the first is transparent; then what the second is
    "1 bit": (png(2, 1, 1, 0, bytes([0, 0b10000000]), (b"tRNS", b"\0\1")), 0),
    "2 bits": (png(2, 1, 2, 0, bytes([0, 0b01100000]), (b"tRNS", b"\0\1")), 170),
    "4 bits": (png(2, 1, 4, 0, bytes([0, 0x3A]), (b"tRNS", b"\0\3")), 170),
    "8 bits": (png(2, 1, 8, 0, bytes([0, 3, 170]), (b"tRNS", b"\0\3")), 170),
    "16 bits": (png(2, 1, 16, 0, struct.pack(">BHH", 0, 7, 257 * 170), (b"tRNS", b"\0\7")), 170),
    "RGB": (png(2, 1, 8, 2, bytes([0, 9, 8, 7, 170, 170, 170]), (b"tRNS", struct.pack(">3H", 9, 8, 7))), 170),
    "RGB, 16 bits": (png(2, 1, 16, 2, struct.pack(">B6H", 0, 999, 8, 7, *3 * [257 * 170]), (b"tRNS", struct.pack(">3H", 999, 8, 7))), 170),
    "palette": (png(2, 1, 8, 3, bytes([0, 0, 1]), (b"PLTE", bytes([9, 9, 9, 170, 170, 170])), (b"tRNS", b"\0")), 170),
    "palette, in part": (png(2, 1, 8, 3, bytes([0, 0, 1]), (b"PLTE", bytes([9, 9, 9, 85, 85, 85])), (b"tRNS", b"\0\x80")), 170),
    "grey and opacity": (png(2, 1, 8, 4, bytes([0, 9, 0, 85, 128])), 170),
    "grey and opacity, 16 bits": (png(2, 1, 16, 4, struct.pack(">B4H", 0, 9, 0, 257 * 85, 257 * 128)), 170),
    "RGBA": (png(2, 1, 8, 6, bytes([0, 9, 9, 9, 0, 85, 85, 85, 128])), 170),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRANSPARENT_COLOURS)
@pytest.mark.parametrize("strip", [1, 1 << 22])
def test_transparency_of_every_kind_of_png(kind: str, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_STRIP_PIXELS", strip)
    file, second = TRANSPARENT_COLOURS[kind]
    pixels = rgb(file)
    uniform(pixels[:, :1], 255, 255, 255)
    uniform(pixels[:, 1:], second, second, second, within=1)


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_transparency_of_every_mode(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (80, 80, 80, 128))
    for step in {"La": ["LA", "La"], "RGBa": ["RGBa"]}.get(mode, [mode]):
        image = image.convert(step)
    uniform(rgb(image), 167, 167, 167, within=2)


def test_strips_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (37, 23, 4), dtype=np.uint8)
    palette = Image.fromarray(rgba[..., :3]).quantize(200)
    palette.info["transparency"] = bytes(range(200))
    for source in (Image.fromarray(rgba), palette):
        whole = rgb(source)
        monkeypatch.setattr(decoding, "_STRIP_PIXELS", 100)
        assert np.array_equal(rgb(source), whole)
        monkeypatch.undo()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_used(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (level, level, level)) for level in (200, 20)]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(file)).n_frames == 2
    uniform(rgb(file), 200, 200, 200)


def test_a_colour_profile_is_ignored() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    file = encoded(picture(), "PNG", icc_profile=profile)
    assert Image.open(io.BytesIO(file)).info["icc_profile"] == profile
    assert np.array_equal(rgb(file), np.asarray(picture()))


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>\0'


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("how", ["exif", "xmp", "set since"])
def test_an_orientation_is_found_wherever_it_stands(kind: str, how: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    if how == "xmp" and kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        options: dict[str, Any] = {"pnginfo": info}
    elif how == "xmp" and kind == "TIFF":
        options = {"tiffinfo": {700: XMP}}
    else:
        options = {"exif": {"exif": exif}, "xmp": {"xmp": XMP}}.get(how, {})
    source: Any = encoded(picture(), kind, **options)
    if how == "set since":
        source = Image.open(io.BytesIO(source))
        source.getexif()[0x0112] = 6
    assert decode(source).size == (30, 40)


def test_a_decoded_image_is_not_turned_again() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    once = decode(encoded(picture(), "PNG", exif=exif))
    assert once.size == (30, 40)
    assert decode(once).size == (30, 40)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int, kind: str) -> None:
    """The file holds a picture turned as its tag says, so that every reader sees the same upright picture."""
    upright = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(rgb(encoded(stored, kind, exif=exif, **options)), np.asarray(upright))


def damaged_exif(orientation: int) -> bytes:
    """EXIF data that can be read but, one entry being of the wrong type, not written again."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, orientation) + struct.pack("<HHI4s", 0x0100, 2, 4, b"abc\0")
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)


def test_damaged_metadata_does_not_spoil_an_image_that_is_whole() -> None:
    file = encoded(picture().transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=damaged_exif(6))
    assert np.abs(rgb(file).astype(int) - np.asarray(picture())).max() < 20


def test_a_1_by_1_image() -> None:
    pixels = to_pixels(Image.new("RGB", (1, 1), (10, 20, 30)), Preprocessing(size=32, crop=0.875))
    uniform(pixels, 10, 20, 30)


def test_an_image_20000_pixels_wide() -> None:
    wide = Image.new("RGB", (20_000, 50), (10, 20, 30))
    uniform(to_pixels(encoded(wide, "PNG"), Preprocessing(size=32)), 10, 20, 30)


def test_a_path_bytes_an_image_and_an_array_are_the_same_thing(tmp_path: Path) -> None:
    array = np.asarray(picture())
    file = tmp_path / "photo.png"
    picture().save(file)
    p = Preprocessing(size=16)
    for source in (file, str(file), file.read_bytes(), picture(), array, array[:, ::-1][:, ::-1]):
        assert np.array_equal(preprocess(source, p), preprocess(picture(), p))


def test_grey_arrays() -> None:
    flat = np.full((5, 6), 77, np.uint8)
    uniform(rgb(flat), 77, 77, 77)
    uniform(rgb(flat[:, :, None]), 77, 77, 77)


def test_a_given_image_is_not_changed() -> None:
    image = picture().convert("RGBA")
    before = image.tobytes()
    preprocess(image, Preprocessing(size=8))
    assert image.tobytes() == before


# preprocessing


def test_the_largest_centred_square_is_used() -> None:
    array = np.zeros((20, 60, 3), np.uint8)
    array[:, 20:40] = 255
    uniform(to_pixels(array, Preprocessing(size=20)), 255, 255, 255)


def test_crop_keeps_a_share_of_the_shorter_side() -> None:
    array = np.zeros((256, 256, 3), np.uint8)
    array[16:240, 16:240] = 255
    uniform(to_pixels(array, Preprocessing(size=224, crop=0.875)), 255, 255, 255)


def test_resampling_is_antialiased() -> None:
    """A fine chequerboard becomes grey; without antialiasing it would stay black or white."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    for interpolation in ("bilinear", "bicubic"):
        uniform(to_pixels(board, Preprocessing(size=16, interpolation=interpolation)), 128, 128, 128, within=2)


def test_an_image_of_the_right_size_is_taken_as_it_is() -> None:
    array = np.asarray(picture((16, 16)))
    assert np.array_equal(to_pixels(array, Preprocessing(size=16)), array)


def test_normalisation_is_the_documented_formula() -> None:
    p = Preprocessing(size=16, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    result = normalise(pixels, p)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    expected = (pixels / 255 - np.array(p.mean)) / np.array(p.std)
    np.testing.assert_allclose(result, expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_training_normalises_as_running_does() -> None:
    p = Preprocessing(size=16)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    trained = normaliser(p, torch.device("cpu"))(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    np.testing.assert_allclose(trained.numpy(), normalise(pixels, p), atol=1e-6)


# what is not valid is refused by name


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", bytes(1000)])
def test_a_file_that_is_no_image(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "notes.jpg"
    file.write_bytes(content)
    with pytest.raises(ImageError, match=r"notes\.jpg: not an image that can be read"):
        decode(file)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("PNG", {}), ("TIFF", {}), ("BMP", {}), ("WEBP", {})])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_truncated_image(kind: str, options: dict[str, Any], share: float, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = encoded(noise, kind, **options)
    file = tmp_path / "cut.img"
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImageError, match=r"cut\.img: (the image is damaged or truncated|not an image)"):
        decode(file)


def test_no_such_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.jpg: no such file"):
        decode(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="is a directory"):
        decode(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ImageError, match="is a pipe or a device"):
            decode(path)
    for odd, message in (
        ("x" * 5000, "File name too long"),
        ("a\0b", "embedded null"),
        (tmp_path / "none.jpg" / "x", "no such file"),
    ):
        with pytest.raises(ImageError, match=message):
            decode(odd)


def png_header(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that announces any size."""
    return png(width, height, 8, 2, bytes(10))


@pytest.mark.parametrize("size", [(10_001, 10_000), (20_000, 20_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_from_its_header(size: tuple[int, int]) -> None:
    """Pillow's own warning, which it prints between its two limits, does not appear either."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded it"))
        with pytest.raises(ImageError, match=r"bomb: .*100,000,000 pixels|bomb: not an image"):
            decode(png_header(*size), "bomb")


def test_the_stated_limit_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1200)
    assert decode(picture((40, 30))).size == (40, 30)
    for source in (picture((41, 30)), np.asarray(picture((41, 30))), encoded(picture((41, 30)), "PNG")):
        with pytest.raises(ImageError, match=r"41 × 30 is more than 1,200 pixels"):
            decode(source)


def test_a_side_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow takes 2 GB for a column of 10⁸ pixels, and fails at such a row of colours."""
    row = np.broadcast_to(np.uint8(0), (1, 65_536, 3))
    for source in (row, row.transpose(1, 0, 2), png_header(65_536, 1), png_header(1, 65_536)):
        with pytest.raises(ImageError, match="has a side above 65,535 pixels"):
            decode(source)
    assert decode(np.zeros((1, 65_535), np.uint8)).size == (65_535, 1)


SHORT = {  # rows of 8 pixels of a picture of 8 × 8
    "PNG": png(8, 8, 8, 0, 5 * (b"\0" + bytes(range(1, 9)))),
    "PNG, half a byte each": png(8, 8, 4, 0, 7 * b"\0abcd"),
    "PNG, palette": png(8, 8, 8, 3, 7 * (b"\0" + bytes(range(1, 9))), (b"PLTE", bytes(range(27)))),
    "PNG, interlaced": png(8, 8, 8, 0, b"".join(rows * (b"\0" + columns * b"x") for columns, rows in [(1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]), interlaced=1),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*SHORT, "JPEG", "JPEG, grey"])
def test_a_stream_that_ends_early_and_well_is_refused(kind: str, tmp_path: Path) -> None:
    """Pillow reports no error for these files."""
    if kind in SHORT:
        content = SHORT[kind]
    else:
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        whole = encoded(noise.convert("L" if kind == "JPEG, grey" else "RGB"), "JPEG", quality=95)
        content = whole[: len(whole) * 2 // 3] + b"\xff\xd9"
    Image.open(io.BytesIO(content)).load()
    file = tmp_path / "short"
    file.write_bytes(content)
    for source in (file, content):
        with pytest.raises(ImageError, match=r"the image is damaged or truncated \(its data ends early\)"):
            decode(source)


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.new("RGBA", (9, 9)), "PNG"),
        encoded(Image.new("1", (9, 9)), "PNG"),
        encoded(Image.new("P", (9, 1)), "PNG"),
        encoded(Image.new("I;16", (1, 9)), "PNG"),
        png(8, 8, 8, 0, b"".join(rows * (b"\0" + columns * b"\0") for columns, rows in [(1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4)]), interlaced=1),
        png(1, 1, 8, 0, b"\0\0", interlaced=1),
        png(3, 2, 1, 0, b"\0\0\0\0"),
        encoded(Image.new("RGB", (40, 40), (128, 128, 128)), "JPEG"),
        encoded(Image.new("RGB", (40, 40), (128, 128, 128)), "JPEG", progressive=True),
        encoded(Image.new("L", (9, 9), 128), "JPEG"),
        encoded(Image.new("RGB", (9, 9), (128, 128, 128)), "JPEG") + b"\xff\xd9 more \xff\xd9",
    ],
)  # fmt: skip
def test_an_image_that_ends_in_black_or_grey_is_whole(content: bytes) -> None:
    assert decode(content).mode == "RGB"


def test_postscript_is_not_run() -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ImageError, match=r"not an image that can be read \(EPS\)"),
    ):
        patch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("ran it"))
        decode(encoded(picture(), "EPS"))


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


def test_heic_without_its_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    file = tmp_path / "photo.jpg"
    file.write_bytes(HEIC)
    for source in (file, HEIC):
        with pytest.raises(
            ImageError, match=r"not an image that can be read \(HEIC\): pip install 'mvmoe-deploy\[heic\]'"
        ):
            decode(source)


def test_heic_with_its_extra(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = picture() if orientation == 1 else picture().transpose(Image.Transpose.ROTATE_90)
        pillow_heif.from_pillow(stored).save(tmp_path / "photo", format="HEIF", quality=95, exif=exif.tobytes())
        for source in (tmp_path / "photo", (tmp_path / "photo").read_bytes()):
            assert np.abs(rgb(source).astype(int) - np.asarray(picture())).max() < 20
    with pytest.raises(ImageError, match=r"not an image that can be read|the image is damaged"):
        decode((tmp_path / "photo").read_bytes()[:-400])


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"\xff\x0a" + bytes(40), "JPEG XL"), (b"\0\0\0\x18ftypcrx \0\0\0\0" + bytes(40), "a camera's raw data")],
)
def test_a_format_that_cannot_be_read_is_named(content: bytes, kind: str) -> None:
    with pytest.raises(ImageError, match=rf"not an image that can be read \({kind}, "):
        decode(content)


@pytest.mark.parametrize(
    "error", [NotImplementedError("Unimplemented DXGI format 95"), struct.error("x"), KeyError(7), MemoryError()]
)
def test_whatever_a_plugin_raises_is_an_error_of_ours(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.dds"
    picture().save(file)

    def fail(*_: object) -> None:
        raise error

    for where, name in ((Image, "open"), (ImageFile.ImageFile, "load")):
        with monkeypatch.context() as patch, pytest.raises(ImageError, match=r"x\.dds: .*(read|damaged)"):
            patch.setattr(where, name, fail)
            decode(file)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "expected a uint8 array, got float32"),
        (np.zeros((4, 4, 3), np.int64), "got int64"),
        (np.zeros((3, 8, 8), np.uint8), r"expected an array \[H, W, 3\], got \[3, 8, 8\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"got \[1, 4, 4, 3\]"),
        (np.zeros(4, np.uint8), r"got \[4\]"),
        (np.zeros((4, 4, 2), np.uint8), r"got \[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), "is empty"),
        (np.zeros((4, 0), np.uint8), "is empty"),
        ([[1, 2], [3, 4]], "got list"),
        (None, "got NoneType"),
    ],
)
def test_an_array_of_another_kind(array: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode(array)


DAMAGED = [
    encoded(picture(), "JPEG", exif=damaged_exif(6)),
    encoded(picture(), "PNG"),
    encoded(picture().quantize(), "GIF"),
    encoded(picture(), "WEBP"),
    encoded(picture(), "BMP"),
    encoded(Image.fromarray(np.full((6, 6), 999, np.uint16)), "TIFF"),
    *(encoded(picture(), kind) for kind in ("DDS", "ICO", "ICNS", "JPEG2000", "PPM", "QOI", "SGI", "TGA", "PCX")),
    HEIC,
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_whatever_bytes_are_damaged_it_decodes_or_says_so(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(DAMAGED)))
    for _ in range(data.draw(st.integers(1, 4))):
        # headers lie at the front, where damage tells most
        place = data.draw(st.integers(0, min(len(content), 250) - 1))
        content[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        assert decode(bytes(content)).mode == "RGB"


def test_many_threads_leave_the_warning_filters_as_they_were(tmp_path: Path) -> None:
    """Each opening changes the filters for a moment; without a lock, one thread restores what another had changed."""
    file = tmp_path / "x.png"
    Image.new("RGB", (4, 4)).save(file)
    before, real = list(warnings.filters), Image.open
    inside, most = 0, 0

    def slow(source: object) -> Image.Image:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.005)
        inside -= 1
        return real(source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", slow)
        together(16, lambda _: decode(file))
    assert most == 1
    assert warnings.filters == before


@pytest.mark.parametrize(
    ("total", "count", "rows"),
    [(10, 4, [0, 3, 6, 9]), (3, 5, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (5, 2, [0, 4]), (5, 1, [0]), (1, 1, [0])],
)
def test_images_are_picked_evenly_with_the_first_and_the_last(total: int, count: int, rows: list[int]) -> None:
    assert evenly_spaced(total, count).tolist() == rows
