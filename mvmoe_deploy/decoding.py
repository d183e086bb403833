"""Decoding and resampling, by Pillow: any image file or array becomes an upright RGB image of 8 bits per channel."""

from __future__ import annotations

import io
import math
import os
import stat
import threading
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mvmoe_deploy.errors import ImageError, first_line

MAX_PIXELS = 100_000_000
"""Largest image that is decoded (a 20,000 × 5,000 panorama); a larger one is refused from its header alone.

Decoding one takes up to a gigabyte.
"""

MAX_SIDE = 65_535
"""Longest side of an image that is decoded, in pixels: the largest that JPEG allows."""


ImageSource = str | Path | bytes | Image.Image | NDArray[np.uint8]

_warnings_lock = threading.Lock()
_RESAMPLING = {"bilinear": (Image.Resampling.BILINEAR, 1), "bicubic": (Image.Resampling.BICUBIC, 2)}
"""Pillow's filter, and how many source pixels it reaches to each side where nothing shrinks."""


def decode(source: ImageSource, name: str = "image") -> Image.Image:
    """Decodes to an upright RGB image.

    Every other kind of image is converted. Transparency, in whatever form, is laid over white. EXIF rotation is
    applied. Of several frames, the first is used. Colour profiles are ignored: values are taken to be sRGB. CMYK is
    converted without a profile. Grey values that are wider than 8 bits are scaled from the smallest of the ranges
    0…1 (floats only), 0…255, 0…4095 (12 bits) and 0…65535 that holds the largest of them.

    Args:
        source: a path, the bytes of a file, a PIL image, or a uint8 array ``[H, W, 3]``, ``[H, W, 4]``,
            ``[H, W, 1]`` or ``[H, W]``.
        name: what to call the image in errors, when it has no path.

    Raises:
        ImageError: no such file, not an image, damaged or truncated, above :data:`MAX_PIXELS` or :data:`MAX_SIDE`, or
            with values that are negative, not finite, or in no known range.
    """
    if isinstance(source, np.ndarray):
        return _rgb(_from_array(source, name), name)
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, (str, Path)):
        name = str(source)
        image = _open(source, name)
    elif isinstance(source, bytes):
        image = _open(io.BytesIO(source), name)
    else:
        raise ImageError(f"{name}: expected a path, a PIL image or a uint8 array, got {type(source).__name__}")
    _check_size(image.size, name)
    try:
        image.load()  # decodes the pixels, so this is where a truncated file shows
        _check_size(image.size, name)  # some files hold an image of a different size than their header says
        if not isinstance(source, Image.Image):
            _check_complete(image, source)
        return _rgb(image if _has_no_exif(image) else _upright(image), name)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise ImageError(f"{name}: the image is damaged or truncated ({_reason(error)})") from None


def resample(image: Image.Image, side: float, size: int, interpolation: str) -> Image.Image:
    """Resamples the centred square of ``side`` pixels to ``size`` × ``size``: first horizontally, then vertically.

    The order matters, since each pass rounds to bytes. In a single call, Pillow 13 resamples tall images vertically
    first, which earlier releases do not. Two calls fix the order.
    """
    filtered, reach = _RESAMPLING[interpolation]
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # Only the rows that the second pass reads are resampled, which keeps a 1 × 20,000 pixel image cheap.
    margin = math.ceil(reach * max(1.0, side / size)) + 1
    first, last = max(0, math.floor(top) - margin), min(image.height, math.ceil(top + side) + margin)
    if last - first < image.height:
        image = image.crop((0, first, image.width, last))
    across = image.resize((size, image.height), filtered, box=(left, 0, left + side, image.height))
    # Pillow rounds a box to float32; rounding before the shift selects the same rows as in the whole image.
    start, end = float(np.float32(top)) - first, float(np.float32(top + side)) - first
    return across.resize((size, size), filtered, box=(0, start, size, end))


def _open(source: str | Path | io.BytesIO, name: str) -> Image.Image:
    # Warning filters belong to the process: two threads that change them at once may leave them changed.
    with _warnings_lock, warnings.catch_warnings():
        # Pillow's own limit only warns at this size; _check_size is the limit here. Plugins warn of damaged metadata.
        warnings.simplefilter("ignore")
        try:
            image = _identify(source, name)
        except ImageError:
            raise
        except FileNotFoundError:
            raise ImageError(f"{name}: no such file") from None
        except IsADirectoryError:
            raise ImageError(f"{name}: is a directory, expected an image file") from None
        except Image.DecompressionBombError:
            raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels; make it smaller first") from None
        except Exception as error:  # Pillow's plugins raise whatever they stumble over
            raise ImageError(f"{name}: not an image that can be read ({_reason(error)})") from None
    if image.format == "EPS":  # a program, which Pillow would have Ghostscript run
        raise ImageError(f"{name}: not an image that can be read (EPS); convert it to PNG")
    _scale_transparency(image)
    return image


def _identify(source: str | Path | io.BytesIO, name: str) -> Image.Image:
    if not isinstance(source, io.BytesIO):
        kind_of_file = os.stat(source).st_mode
        if not stat.S_ISREG(kind_of_file) and not stat.S_ISDIR(kind_of_file):  # a pipe would wait for a writer
            raise ImageError(f"{name}: is a pipe or a device, expected an image file")
    try:
        return Image.open(source)
    except UnidentifiedImageError:
        from mvmoe_deploy.imagefiles import HEAD, image_format  # only where something is amiss

        if isinstance(source, io.BytesIO):
            head = source.getvalue()[:HEAD]
        else:
            with open(source, "rb") as file:
                head = file.read(HEAD)
        kind = image_format(head)
    if kind is None:
        raise ImageError(f"{name}: not an image that can be read")
    if kind != "HEIC":
        raise ImageError(f"{name}: not an image that can be read ({kind}, damaged or of an unsupported variant)")
    try:
        import pillow_heif
    except ImportError:
        raise ImageError(
            f"{name}: not an image that can be read (HEIC): pip install 'mvmoe-deploy[heic]', or convert it to JPEG"
        ) from None
    pillow_heif.register_heif_opener()
    return Image.open(source)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "damaged"  # its own message may hold an object's address
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width} × {height} is more than {MAX_PIXELS:,} pixels; make it smaller first")
    if max(size) > MAX_SIDE:
        raise ImageError(f"{name}: {width} × {height} has a side above {MAX_SIDE:,} pixels; make it smaller first")
    if width * height == 0:
        raise ImageError(f"{name}: the image is empty ({width} × {height})")


def _scale_transparency(image: Image.Image) -> None:
    """Pillow scales a PNG's samples to 8 bits, but not the colour that its tRNS chunk makes transparent."""
    colour = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    if colour is None or image.format != "PNG" or not tiles:
        return
    scales = {"L;2": 85, "L;4": 17}
    if tiles[0][3] == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif tiles[0][3] in scales:
        image.info["transparency"] = colour * scales[tiles[0][3]]


def _check_complete(image: Image.Image, source: str | Path | bytes) -> None:
    """Refuses a well-formed stream that ends early; Pillow fills its missing pixels with 0 or grey without an error.

    Raises:
        ValueError: the stream ends early.
    """
    right = image.width - 1
    if image.format == "PNG":
        # with interlacing, the missing row may be the last but one
        ends = [image.getpixel((right, row)) for row in range(max(0, image.height - 2), image.height)]
        black = any(end == 0 or (isinstance(end, tuple) and not any(end)) for end in ends)
        if black and not _png_is_complete(_content(source)):
            raise ValueError("its data ends early")
    elif image.format == "JPEG" and image.getpixel((right, image.height - 1)) in (128, (128, 128, 128)):
        # A decoder that is still waiting for data would use bytes that are added at the end.
        content = _content(source)
        end = content.rfind(b"\xff\xd9")
        longer = Image.open(io.BytesIO(content[:end] + bytes(range(1, 255)) * 4 + content[end:]))
        if longer.tobytes() != image.tobytes():
            raise ValueError("its data ends early")


def _content(source: str | Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def _png_is_complete(content: bytes) -> bool:
    """Whether a PNG's compressed data is as long as its header says."""
    import struct
    import zlib

    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", content[16:29])
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = [(0, 0, 1, 1)]
    if interlaced:  # Adam7: first column and row of each pass, and its steps
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    expected = 0
    for x, y, step_x, step_y in passes:
        columns, rows = max(0, -(-(width - x) // step_x)), max(0, -(-(height - y) // step_y))
        expected += rows * (1 + -(-columns * bits // 8)) if columns else 0
    unpacker, found, place = zlib.decompressobj(), 0, 8
    while place + 8 <= len(content) and found < expected:
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        packed = content[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        while packed and found < expected:
            found += len(unpacker.decompress(packed, 1 << 20))
            packed = unpacker.unconsumed_tail
        place += 12 + length
    return found >= expected


def _from_array(array: NDArray[np.uint8], name: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(f"{name}: expected a uint8 array, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ImageError(f"{name}: expected an array [H, W, 3], got {list(array.shape)}")
    _check_size((array.shape[1], array.shape[0]), name)
    return Image.fromarray(np.ascontiguousarray(array))


_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that undoes each EXIF orientation."""


_EXIF = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
"""Keys of ``Image.info`` under which Pillow keeps the orientation of a JPEG or PNG file."""


def _has_no_exif(image: Image.Image) -> bool:
    """Whether an image certainly has no orientation; asking Pillow takes a sixth of a small file's decoding time."""
    # an image that was not opened from a file has no format, and one that was may have been given EXIF data since
    opened = image.format in ("JPEG", "PNG") and getattr(image, "_exif", None) is None
    return opened and _EXIF.isdisjoint(image.info)


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it also writes the other metadata back, which fails for many images whose
    # metadata is damaged or unusual although their pixels are fine.
    try:
        turn = _TURN.get(image.getexif().get(0x0112, 1))
    except Exception:  # Pillow's EXIF reader raises whatever it stumbles over
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in set(turned.info) - {"transparency"}:  # else it would be turned again when it is decoded again
        del turned.info[key]
    return turned


_STRIP_PIXELS = 1 << 22
_KNOWN_RANGES = (255, 4095, 65535)


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and not isinstance(image.info.get("transparency"), tuple):
        return image
    wide = image.mode.startswith("I") or image.mode == "F"
    if image.mode == "LAB":
        raise ImageError(f"{name}: its colours are CIELAB, which is not supported; convert it to RGB")
    if not wide and not image.has_transparency_data:
        return image.convert("RGB")
    largest = _largest(image, name) if wide else 255
    # in strips: converting the largest image whole would take gigabytes
    rows = max(1, _STRIP_PIXELS // image.width)
    if rows >= image.height:
        return _over_white(image, largest)
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(_over_white(strip, largest), (0, top))
    return result


def _over_white(image: Image.Image, largest: int) -> Image.Image:
    """An image with transparency, or with grey values from 0 to ``largest`` that are wider than 8 bits, as RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips 16-bit grey to 255 instead of scaling it
        # (https://github.com/python-pillow/Pillow/issues/3011)
        values = np.asarray(image, np.float64)
        grey = (values * 255 / largest).round().clip(0, 255).astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("La", "RGBa"):  # colours that are premultiplied by their opacity
        image = image.convert(image.mode.upper())
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _largest(image: Image.Image, name: str) -> int:
    """White: the largest value that an image with grey values wider than 8 bits may have.

    Raises:
        ImageError: values that are negative, not finite, or above all known ranges.
    """
    rows = max(1, _STRIP_PIXELS // image.width)
    lowest, highest = math.inf, 0.0
    for top in range(0, image.height, rows):
        values = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        low, high = float(values.min()), float(values.max())  # NaN if there is one
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ImageError(f"{name}: has pixels that are NaN or infinite")
        lowest, highest = min(lowest, low), max(highest, high)
    if lowest < 0:
        raise ImageError(f"{name}: has pixels down to {lowest:g}, below 0; convert it to 8 bits")
    if image.format == "PPM":  # its header states the largest value, which Pillow scales to 65535
        return 65535
    ranges = (1, *_KNOWN_RANGES) if image.mode == "F" else _KNOWN_RANGES
    for largest in ranges:
        if highest <= largest:
            return largest
    raise ImageError(f"{name}: has pixels up to {highest:g}, above {ranges[-1]}; convert it to 8 or 16 bits")
