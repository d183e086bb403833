"""Which files are images, judged by their content or by their name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mvmoe_deploy.errors import ImageError

HEAD = 32
"""Number of bytes at the start of a file that :func:`image_format` needs."""

MAX_FILE_BYTES = 1 << 30
"""Largest file that is read. The largest image that is decoded takes 600 MB as a 16-bit TIFF."""

MAX_DEPTH = 32
"""Deepest nesting of folders that is searched for images."""

_CLAIMS = (
    r"\.(jpe?g?|jfif|a?png|gif|webp|bmp|dib|tiff?|hei[cf]|avif|j2k|jp2|jxl|p[bgpn]m|ico|dds|tga|qoi|psd|exr|svg"
    r"|dng|cr[23]|nef|raf)"
)
_MAGIC = [
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"GIF8[79]a", "GIF"),
    (rb"RIFF....WEBP", "WebP"),
    (rb"BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"),
    (rb"II[*+]\0|MM\0[*+]", "TIFF"),
    (rb"....ftyp(avif|avis|(mif1|msf1).{8,16}avi[fs])", "AVIF"),
    (rb"....ftyp(he[vi][cxms]|mif1|msf1)", "HEIC"),
    (rb"....ftypcrx |FUJIFILMCCD-RAW", "a camera's raw data"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a", "JPEG XL"),
    (rb"8BPS\0[\x01\x02]", "Photoshop"),
    (rb"\0\0\x01\0[^\0]\0.{3}\0", "an icon"),
    (rb"DDS \x7c\0\0\0", "DDS"),
    (rb"qoif", "QOI"),
    (rb"P[1-7]\s+[#\d]", "PPM"),
    (rb"\x76\x2f\x31\x01", "OpenEXR"),
]


def image_format(head: bytes) -> str | None:
    """The image format that a file's first :data:`HEAD` bytes show; None if the file is not an image."""
    # compiled when first used, which most runs never do
    return next((name for pattern, name in _MAGIC if re.match(pattern, head, re.DOTALL)), None)


def claims_to_be_image(name: str) -> bool:
    """Whether a file's name is that of an image; such a file is treated as an image, readable or not."""
    return re.fullmatch(_CLAIMS, os.path.splitext(name)[1], re.IGNORECASE) is not None


def is_hidden(part: str) -> bool:
    """Whether a file or folder of this name belongs to the system rather than to the user."""
    return part.startswith(".") or part == "__MACOSX"


def walk(folder: Path) -> Iterator[tuple[str, ...]]:
    """Yields all files below a folder as the parts of their relative paths; an empty folder's last part is empty.

    Links are followed, except to a folder that contains the link.

    Raises:
        ImageError: a folder cannot be read, or folders are nested more than :data:`MAX_DEPTH` deep.
    """

    def inside(place: Path, parts: tuple[str, ...], above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, ...]]:
        try:
            status = place.stat()
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            raise ImageError(f"{place}: the folder cannot be read ({error.strerror})") from None
        if len(parts) > MAX_DEPTH:
            raise ImageError(f"{place}: lies more than {MAX_DEPTH} folders deep")
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        if not entries and parts:
            yield (*parts, "")
        for entry in entries:
            if entry.is_dir():
                yield from inside(place / entry.name, (*parts, entry.name), above | {here})
            else:
                yield (*parts, entry.name)

    yield from inside(folder, (), frozenset())


def image_files(where: Path) -> list[Path]:
    """The images in a folder and its sub-folders, sorted and without hidden ones; for a file, the file itself.

    Raises:
        ImageError: no such file or folder.
    """
    if where.is_file():
        return [where]
    if not where.is_dir():
        raise ImageError(f"{where}: no such file or folder of images")
    paths = [where.joinpath(*parts) for parts in walk(where) if parts[-1] and not any(map(is_hidden, parts))]
    return [path for path in paths if claims_to_be_image(path.name) or image_format(head_of(path))]


def head_of(path: Path) -> bytes:
    """A file's first :data:`HEAD` bytes; empty if it is not a regular file or cannot be read."""
    try:
        if not path.is_file():  # a pipe would wait for a writer
            return b""
        with open(path, "rb") as file:
            return file.read(HEAD)
    except OSError:
        return b""
