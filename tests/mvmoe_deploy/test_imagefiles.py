"""Which files are images: by what they hold, or what their name claims."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from mvmoe_deploy.errors import ImageError
from mvmoe_deploy.imagefiles import HEAD, MAX_DEPTH, claims_to_be_image, image_files, image_format

FORMATS = {"JPEG": "JPEG", "PNG": "PNG", "GIF": "GIF", "WEBP": "WebP", "BMP": "BMP", "TIFF": "TIFF", "AVIF": "AVIF",
           "JPEG2000": "JPEG 2000", "ICO": "an icon", "DDS": "DDS", "QOI": "QOI", "PPM": "PPM"}  # fmt: skip
SUFFIXES = (
    "jpg",
    "JPEG",
    "png",
    "tiff",
    "webp",
    "heic",
    "HEIF",
    "avif",
    "gif",
    "bmp",
    "jp2",
    "jxl",
    "svg",
    "dng",
    "jfif",
)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 100, 50)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_known_by_their_first_bytes(kind: str) -> None:
    if kind not in Image.SAVE:
        Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    assert image_format(encoded(kind)[:HEAD]) == FORMATS[kind]


def test_big_endian_tiff_and_what_pillow_cannot_write() -> None:
    for head, kind in (
        (b"MM\0*\0\0\0\x08", "TIFF"),
        (b"\0\0\0\x20ftypmif1\0\0\0\0mif1heicmiaf", "HEIC"),
        (b"\0\0\0\x20ftypmif1\0\0\0\0mif1miafavif", "AVIF"),
        (b"\0\0\0\x20ftyphevc\0\0\0\0", "HEIC"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"8BPS\0\1\0\0", "Photoshop"),
    ):
        assert image_format(head) == kind


@pytest.mark.parametrize(
    "head",
    [
        b"", b"\xff\xd8", b"BMW is a maker of cars, not of pictures", b"GIF, PNG and so on", b"P6 is a format", b"RIFF\0\0\0\0WAVEfmt ",
        b"\0\0\0\x20ftypmp42\0\0\0\0mp42isom", b"II* stars", b"%PDF-1.7", b"<html>", bytes(32), b"PK\3\4", b"\x7fELF",
    ],
)  # fmt: skip
def test_other_files_are_not_taken_for_images(head: bytes) -> None:
    assert image_format(head) is None


def test_names_that_claim_to_be_images() -> None:
    assert all(claims_to_be_image(f"x.{suffix}") for suffix in SUFFIXES)
    assert not any(map(claims_to_be_image, ["jpg", ".jpg", "x", "x.txt", "x.jpg.txt", "x.jpgs", "x.json"]))


def test_the_images_of_a_folder(tmp_path: Path) -> None:
    tree = {
        "b.txt": b"text",
        "a.jpg": b"no image",
        "c": encoded("PNG"),
        "c.d/e.PNG": b"",
        ".f/g.png": b"",
        ".h.png": b"",
        "__MACOSX/i.png": b"",
    }
    for name, content in tree.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "c.d" / "up").symlink_to(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path)] == ["a.jpg", "c", "c.d/e.PNG"]
    assert image_files(tmp_path / "b.txt") == [tmp_path / "b.txt"]  # asked for by name
    with pytest.raises(ImageError, match="none: no such file or folder of images"):
        image_files(tmp_path / "none")


def test_folders_nested_without_end_are_refused(tmp_path: Path) -> None:
    place = tmp_path.joinpath(*["d"] * (MAX_DEPTH + 1))
    place.mkdir(parents=True)
    with pytest.raises(ImageError, match=f"lies more than {MAX_DEPTH} folders deep"):
        image_files(tmp_path)
