"""The images that models are measured on, decoded once for each preprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.bench.candidates.configuration import Configuration
from mvmoe_deploy.bench.measure.accuracy import Labelled, labels_for, read_labelled
from mvmoe_deploy.decoding import ImageSource
from mvmoe_deploy.errors import ImageError, as_text
from mvmoe_deploy.images import Preprocessing, evenly_spaced, to_pixels

MAX_IMAGES = 256
"""Largest number of decoded images that models are shown in turn; more would only take memory."""


@dataclass(frozen=True)
class Images:
    """The images that the models are shown.

    Attributes:
        sources: real images, or synthetic ones.
        what: description of the images.
        data: a folder with labelled validation images, for accuracies; if given, the models are shown these images.
        val_share: if ``data`` has no validation split, the share of each class that the models were validated on.
    """

    sources: Sequence[ImageSource]
    what: str
    data: Path | None = None
    val_share: float = 0.0


def choose_images(folder: Path | None, data: Path | None = None, val_share: float = 0.0) -> Images:
    """Chooses labelled images if there are any, else the images of a folder, else synthetic ones.

    Raises:
        ImageError: the folder holds no images.
        DataError: there is no such folder.
    """
    from mvmoe_deploy.exporters.pipeline import SYNTHETIC_IMAGES, synthetic_pixels
    from mvmoe_deploy.imagefiles import image_files

    if data:
        return Images([], f"validation images of {as_text(data.name)}", data, val_share)
    if not folder:
        return Images(list(synthetic_pixels(256, SYNTHETIC_IMAGES)), "synthetic (seed 0)")
    files = image_files(folder)
    if not files:
        raise ImageError(f"{folder}: holds no images")
    return Images(files, f"{len(files)} of {as_text(folder.name)}")


class Shown:
    """The images in the form that each preprocessing needs.

    Args:
        images: the chosen images.
        count: largest number of labelled images to use.
        folder: folder in which files for fresh processes are written.
    """

    def __init__(self, images: Images, count: int, folder: Path) -> None:
        self.what = images.what
        self._images, self._count, self._folder = images, count, folder
        self._pixels: dict[Preprocessing, NDArray[np.uint8]] = {}
        self._files: dict[Preprocessing, Path] = {}
        self._labelled: dict[Preprocessing, Labelled] = {}

    def labelled(self, preprocessing: Preprocessing) -> Labelled | None:
        """The labelled images, or None if there are none."""
        if self._images.data is not None and preprocessing not in self._labelled:
            self._labelled[preprocessing] = read_labelled(
                self._images.data, preprocessing, self._count, self._images.val_share
            )
        return self._labelled.get(preprocessing)

    def pixels(self, preprocessing: Preprocessing) -> NDArray[np.uint8]:
        """Images ``[n, S, S, 3]``, resampled beforehand, since the photos' size says nothing about the models."""
        if preprocessing not in self._pixels:
            labelled = self.labelled(preprocessing)
            if labelled is not None:
                self._pixels[preprocessing] = labelled.pixels[evenly_spaced(len(labelled.pixels), MAX_IMAGES)]
            else:
                sources = self._images.sources
                rows = evenly_spaced(len(sources), MAX_IMAGES)
                self._pixels[preprocessing] = np.stack([to_pixels(sources[row], preprocessing) for row in rows])
        return self._pixels[preprocessing]

    def file(self, preprocessing: Preprocessing) -> Path:
        """A file with :meth:`pixels`, for a fresh process to read."""
        if preprocessing not in self._files:
            self._files[preprocessing] = self._folder / f"pixels-{len(self._files)}.npy"
            np.save(self._files[preprocessing], self.pixels(preprocessing))
        return self._files[preprocessing]

    def super_classes(self, c: Configuration) -> list[int] | None:
        """For each image in :meth:`pixels`, the expert of its super-class; None without labels or super-classes."""
        labelled = self.labelled(c.preprocessing)
        if labelled is None or not c.class_experts:
            return None
        labels = labels_for(c, labelled)
        return [c.class_experts[labels[row]] for row in evenly_spaced(len(labels), MAX_IMAGES)]
