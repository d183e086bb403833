"""Decoding and preprocessing: every kind of image a phone or a stranger may hand over."""

from __future__ import annotations

import contextlib
import io
import struct
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
from PIL import Image
from threads import together

from mvmoe_deploy import images
from mvmoe_deploy.errors import ImageError
from mvmoe_deploy.images import Preprocessing, decode, normalise, preprocess, to_pixels
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
@pytest.mark.parametrize("value", [0, 100, 32768, 65535])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str, value: int) -> None:
    file = encoded(Image.fromarray(np.full((6, 6), value, np.uint16)), kind)
    uniform(rgb(file), *(3 * [round(value / 257)]))


def test_cmyk_jpeg() -> None:
    file = encoded(Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(file)).mode == "CMYK"
    uniform(rgb(file), 200, 40, 90, within=4)


def test_transparency_is_laid_over_white() -> None:
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    uniform(rgb(encoded(half, "PNG")), 127, 127, 127, within=1)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0])
    uniform(rgb(encoded(palette, "PNG", transparency=0)), 255, 255, 255)
    uniform(rgb(np.zeros((4, 4, 4), np.uint8)), 255, 255, 255)


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


def png_header(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that announces any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(10_001, 10_000), (20_000, 20_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_from_its_header(size: tuple[int, int]) -> None:
    """No warning either: between Pillow's own two limits it would print one."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded it"))
        with pytest.raises(ImageError, match=r"bomb: .*100,000,000 pixels|bomb: not an image"):
            decode(png_header(*size), "bomb")


def test_the_stated_limit_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1200)
    assert decode(picture((40, 30))).size == (40, 30)
    for source in (picture((41, 30)), np.asarray(picture((41, 30))), encoded(picture((41, 30)), "PNG")):
        with pytest.raises(ImageError, match=r"41 × 30 is more than 1,200 pixels"):
            decode(source)


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
    """Each opening changes them for a moment; unlocked, one thread restores what another had changed."""
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
