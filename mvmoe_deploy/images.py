"""From an image to the model's input: the one implementation that training, verifying and running share.

Pillow is imported only for what needs it (:mod:`.decoding`): an array of the model's own size needs no decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.errors import ImageError

if TYPE_CHECKING:
    from mvmoe_deploy.decoding import ImageSource

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
        std: per RGB channel, of values scaled to 0…1.
    """

    size: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    crop: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 1.0
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[Unit, Unit, Unit] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)

    @property
    def scale(self) -> NDArray[np.float32]:
        """Per-channel factor ``[3]`` that maps 0…255 to the model's input, before :attr:`bias` is added."""
        return (1 / (255 * np.asarray(self.std))).astype(np.float32)

    @property
    def bias(self) -> NDArray[np.float32]:
        """Per-channel offset ``[3]`` that is added after :attr:`scale`."""
        bias: NDArray[np.float32] = (-np.asarray(self.mean) / np.asarray(self.std)).astype(np.float32)
        return bias


def to_pixels(source: ImageSource, preprocessing: Preprocessing, name: str = "image") -> NDArray[np.uint8]:
    """Decodes, crops and resamples to the model's size: uint8 RGB ``[size, size, 3]``.

    Args:
        source: see :func:`mvmoe_deploy.decoding.decode`. An array of the result's shape is returned as it is, if
            nothing is cropped.
        preprocessing: the size, and how to crop and resample.
        name: what to call the image in errors, when it has no path.

    Raises:
        ImageError: see :func:`mvmoe_deploy.decoding.decode`.
    """
    size = preprocessing.size
    whole = preprocessing.crop == 1
    if whole and isinstance(source, np.ndarray) and source.shape == (size, size, 3) and source.dtype == np.uint8:
        return source
    from mvmoe_deploy.decoding import decode, resample  # Pillow takes a tenth of this package's import time

    image = decode(source, name)
    side = min(image.size) * preprocessing.crop
    if image.size != (size, size) or side != size:
        image = resample(image, side, size, preprocessing.interpolation)
    return np.asarray(image)


def normalise(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """uint8 ``[..., size, size, 3]`` → float32 ``[..., 3, size, size]``, contiguous."""
    # Channels are moved first while the values are bytes: seven times faster than moving floats or scaling rows of 3.
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
    pixels: NDArray[np.float32] = np.rint(values)
    if not (np.abs(values - pixels) < 0.01).all() or pixels.min(initial=0) < 0 or pixels.max(initial=0) > 255:
        raise ImageError("the input is not a normalised 8-bit image, but this model takes pixels; pass a real image")
    return pixels.astype(np.uint8)


def nearest_image(images: NDArray[np.float32], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """The normalised 8-bit image that is nearest to any input, both float32 ``[..., 3, size, size]``."""
    channels = (3, 1, 1)
    values = (images - preprocessing.bias.reshape(channels)) / preprocessing.scale.reshape(channels)
    pixels = np.rint(values).clip(0, 255).astype(np.uint8)
    return normalise(np.moveaxis(pixels, -3, -1), preprocessing)


def preprocess(source: ImageSource, preprocessing: Preprocessing, name: str = "image") -> NDArray[np.float32]:
    """An image → the model's input, float32 ``[3, size, size]``.

    Raises:
        ImageError: see :func:`mvmoe_deploy.decoding.decode`.
    """
    return normalise(to_pixels(source, preprocessing, name), preprocessing)


def evenly_spaced(total: int, count: int) -> NDArray[np.int64]:
    """``count`` evenly spaced indices below ``total``, ascending, with the first and the last; at most ``total``.

    Data sets are sorted by class, so even spacing leaves no class out.
    """
    return np.linspace(0, total - 1, min(count, total)).astype(np.int64)
