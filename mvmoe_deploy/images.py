"""From an image file to the model's input: the one implementation that training, verifying and running share."""

from __future__ import annotations

import io
import threading
import warnings
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvmoe_deploy.errors import ImageError

MAX_PIXELS = 100_000_000
"""Largest image that is decoded (a 20,000 × 5,000 panorama); a larger one is refused from its header alone."""

ImageSource = str | Path | bytes | Image.Image | NDArray[np.uint8]

_warnings_lock = threading.Lock()
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
Unit = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, msgspec.Meta(gt=0.0, le=1e3)]


class Preprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an image becomes the model's input.

    The largest centred square, times ``crop``, is resampled to ``size`` × ``size``; a value ``v`` of 0…255 in
    channel c then becomes ``(v / 255 - mean[c]) / std[c]``.

    Attributes:
        size: side of the model's input, in pixels.
        crop: share of the shorter side that is kept (torchvision's 224 / 256 is 0.875).
        interpolation: ``bilinear`` or ``bicubic``, with antialiasing.
        mean: per RGB channel, of values scaled to 0…1.
        std: per RGB channel, likewise.
    """

    size: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    crop: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 1.0
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[Unit, Unit, Unit] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)

    @property
    def scale(self) -> NDArray[np.float32]:
        """Per channel factor ``[3]`` that takes 0…255 to the model's input, before :attr:`bias` is added."""
        return (1 / (255 * np.asarray(self.std))).astype(np.float32)

    @property
    def bias(self) -> NDArray[np.float32]:
        """Per channel addend ``[3]``."""
        return (-np.asarray(self.mean) / np.asarray(self.std)).astype(np.float32)


def decode(source: ImageSource, name: str = "image") -> Image.Image:
    """Decodes to an upright RGB image.

    Grey, palette, CMYK and 16-bit images are converted, transparency is laid over white, and EXIF rotation is
    applied.

    Args:
        source: a path, the bytes of a file, a PIL image, or a uint8 array ``[H, W, 3]``, ``[H, W, 4]``,
            ``[H, W, 1]`` or ``[H, W]``.
        name: what to call it in errors, when it has no path.

    Raises:
        ImageError: no such file, not an image, truncated, or above :data:`MAX_PIXELS`.
    """
    if isinstance(source, np.ndarray):
        return _rgb(_from_array(source, name))
    if isinstance(source, Image.Image):
        _check_pixels(source.size, name)
        image = source
    elif isinstance(source, (str, Path)):
        name = str(source)
        try:
            image = _open(source, name)
        except FileNotFoundError:
            raise ImageError(f"{name}: no such file") from None
        except IsADirectoryError:
            raise ImageError(f"{name}: is a directory, expected an image file") from None
    elif isinstance(source, bytes):
        image = _open(io.BytesIO(source), name)
    else:
        raise ImageError(f"{name}: expected a path, a PIL image or a uint8 array, got {type(source).__name__}")
    try:
        return _rgb(_upright(image))  # decodes the pixels, so this is where a truncated file shows
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise ImageError(f"{name}: the image is damaged or truncated ({error})") from None


def to_pixels(source: ImageSource, preprocessing: Preprocessing, name: str = "image") -> NDArray[np.uint8]:
    """Decodes, crops and resamples to the model's size: uint8 RGB ``[size, size, 3]``.

    Raises:
        ImageError: see :func:`decode`.
    """
    image = decode(source, name)
    size = preprocessing.size
    side = min(image.size) * preprocessing.crop
    if image.size != (size, size) or side != size:
        left, top = (image.width - side) / 2, (image.height - side) / 2
        # resampling the box alone, not the whole image, keeps a 20,000 × 1 pixel image cheap
        image = image.resize(
            (size, size), _RESAMPLING[preprocessing.interpolation], box=(left, top, left + side, top + side)
        )
    return np.asarray(image)


def normalise(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """uint8 ``[..., size, size, 3]`` → float32 ``[..., 3, size, size]``, contiguous."""
    # channels first while the values are bytes: seven times faster than moving floats, or than scaling rows of three
    result = np.ascontiguousarray(np.moveaxis(pixels, -1, -3)).astype(np.float32)
    result *= preprocessing.scale[:, None, None]
    result += preprocessing.bias[:, None, None]
    return result


def denormalise(images: NDArray[np.float32], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The inverse of :func:`normalise`, but channels stay in front: float32 → uint8, both ``[..., 3, size, size]``.

    Raises:
        ImageError: the values are not those of an image with 8 bits per channel.
    """
    channels = (3, 1, 1)
    values = (images - preprocessing.bias.reshape(channels)) / preprocessing.scale.reshape(channels)
    pixels = np.rint(values)
    if not (np.abs(values - pixels) < 0.01).all() or pixels.min(initial=0) < 0 or pixels.max(initial=0) > 255:
        raise ImageError("the input is not a normalised 8-bit image, but this model takes pixels; pass a real image")
    return pixels.astype(np.uint8)


def preprocess(source: ImageSource, preprocessing: Preprocessing, name: str = "image") -> NDArray[np.float32]:
    """An image → the model's input, float32 ``[3, size, size]``.

    Raises:
        ImageError: see :func:`decode`.
    """
    return normalise(to_pixels(source, preprocessing, name), preprocessing)


def _open(source: str | Path | io.BytesIO, name: str) -> Image.Image:
    # The filters of warnings are the process's: two threads that change them at once may leave them changed.
    with _warnings_lock, warnings.catch_warnings():
        # Pillow's own limit only warns at this size; _check_pixels is the limit here
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(source)
        except (FileNotFoundError, IsADirectoryError):
            raise
        except Image.DecompressionBombError:
            raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels; make it smaller first") from None
        except (OSError, ValueError, SyntaxError) as error:
            raise ImageError(f"{name}: not an image that can be read ({error})") from None
    _check_pixels(image.size, name)
    return image


def _check_pixels(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width} × {height} is more than {MAX_PIXELS:,} pixels; make it smaller first")
    if width * height == 0:
        raise ImageError(f"{name}: the image is empty ({width} × {height})")


def _from_array(array: NDArray[np.uint8], name: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(f"{name}: expected a uint8 array, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ImageError(f"{name}: expected an array [H, W, 3], got {list(array.shape)}")
    _check_pixels((array.shape[1], array.shape[0]), name)
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
"""What undoes an EXIF orientation."""


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it also writes the other metadata back, which fails for many an image whose
    # metadata is damaged or odd and whose pixels are not.
    image.load()
    try:
        turn = _TURN.get(image.getexif().get(0x0112, 1))
    except Exception:  # Pillow's EXIF reader raises whatever it stumbles over
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips 16-bit grey to 255 instead of scaling it
        # (https://github.com/python-pillow/Pillow/issues/3011)
        values = np.asarray(image, dtype=np.float64)
        if image.mode != "F" or values.max(initial=0) > 255:
            values = values / 257
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def evenly_spaced(total: int, count: int) -> NDArray[np.int64]:
    """Indices of ``count`` of ``total`` things in order, first and last included; all of them where there are no more.

    Data sets are sorted by class, so that none is left out.
    """
    return np.linspace(0, total - 1, min(count, total)).astype(np.int64)
