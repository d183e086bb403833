"""Data sets on disk: image folders and zips of them, decoded once, and the tables that name and group their classes."""

from __future__ import annotations

import csv
import functools
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray

from mvmoe_deploy.checkpoint import Superclasses
from mvmoe_deploy.errors import DataError, ImageError
from mvmoe_deploy.images import Preprocessing, to_pixels
from mvmoe_deploy.models.train.data import ImageSet

IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass
class _Entry:
    """One image of a data set: its class, its name for errors, and how to read its bytes."""

    class_id: str
    name: str
    read: Callable[[], bytes]


def read_images(
    data: Path,
    split: str,
    preprocessing: Preprocessing,
    class_ids: list[str] | None = None,
    skip_unreadable: bool = False,
    memory_limit: int = 4 << 30,
    hold_out: int = 0,
    held_out_only: bool = False,
    progress: Callable[[Iterator, int], Iterator] | None = None,
) -> ImageSet:
    """Reads ``data/split/CLASS/*`` or ``data/split.zip`` and decodes every image to the model's size.

    Args:
        data: the data set's folder.
        split: ``train`` or ``val``.
        preprocessing: gives size, crop and interpolation; the pixels are not normalised yet.
        class_ids: the classes to expect; by default the folders found.
        skip_unreadable: leave out images that cannot be read instead of refusing the data set.
        memory_limit: decoded images that take more bytes than this go into a temporary file that is mapped into
            memory, so that the system may drop what it needs the memory for; it vanishes with the process.
        hold_out: the last images of every class, so many, are left out.
        held_out_only: instead, only these are read.
        progress: wraps the iterator over images, given it and its length (a progress bar).

    Raises:
        DataError: no such data, an empty or unknown class, an unreadable image, a class with no more images than are
            held out, or no room for the temporary file.
    """
    with _Split(data, split) as entries:
        found = sorted({entry.class_id for entry in entries})
        where = f"{data}/{split}"
        if class_ids is None:
            class_ids = found
        elif found != sorted(class_ids):
            odd = sorted(set(found) ^ set(class_ids))
            raise DataError(f"{where}: class {odd[0]!r} is in one of the two splits only ({len(odd)} such classes)")
        if hold_out:
            entries = _held_out(entries, hold_out, held_out_only)
        size = preprocessing.size
        pixels = _empty((len(entries), 3, size, size), memory_limit)

        def decode(index: int) -> str | None:
            try:
                # channels first here saves a transposition of every batch later
                pixels[index] = to_pixels(entries[index].read(), preprocessing, entries[index].name).transpose(2, 0, 1)
                return None
            except ImageError as error:
                return str(error)

        with ThreadPoolExecutor() as pool:
            results = pool.map(decode, range(len(entries)))
            errors = list(progress(results, len(entries)) if progress else results)
    skipped = [error for error in errors if error]
    if skipped and not skip_unreadable:
        raise DataError(
            f"{skipped[0]} ({len(skipped)} unreadable images in {where}; --skip-unreadable leaves them out)"
        )
    keep = np.array([error is None for error in errors], dtype=bool)
    index_of = {class_id: index for index, class_id in enumerate(class_ids)}
    labels = np.array([index_of[entry.class_id] for entry in entries])[keep]
    empty = [class_id for index, class_id in enumerate(class_ids) if index not in set(labels.tolist())]
    if empty:
        raise DataError(f"{where}: class {empty[0]!r} has no readable image")
    if skipped:
        kept = np.flatnonzero(keep)
        for place, index in enumerate(kept):  # in place: a copy of the rest could be too large
            pixels[place] = pixels[index]
        pixels = pixels[: len(kept)]
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels), class_ids, skipped)


def _held_out(entries: list[_Entry], count: int, only: bool) -> list[_Entry]:
    """The last ``count`` entries of every class, or all but these."""
    by_class: dict[str, list[_Entry]] = {}
    for entry in entries:
        by_class.setdefault(entry.class_id, []).append(entry)
    for class_id, each in by_class.items():
        if len(each) <= count:
            raise DataError(
                f"class {class_id} has {len(each)} images, holding out {count} would leave none to train on"
            )
    return [entry for each in by_class.values() for entry in (each[-count:] if only else each[:-count])]


def _empty(shape: tuple[int, ...], memory_limit: int) -> NDArray[np.uint8]:
    """An array for decoded images: in memory, or above the limit in a file without a name."""
    needed = math.prod(shape)
    if needed <= memory_limit:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:
        try:
            os.truncate(file.fileno(), needed)
            if hasattr(os, "posix_fallocate"):  # without it, a full disk would kill the process where it writes
                os.posix_fallocate(file.fileno(), 0, needed)
        except OSError as error:
            raise DataError(
                f"the decoded images take {needed / 1e9:.1f} GB, more than the limit of {memory_limit / 1e9:.1f} GB, "
                f"and {tempfile.gettempdir()} has no room for them ({error.strerror}); raise --memory-limit, or name a "
                "larger place in the environment variable TMPDIR"
            ) from None
        # the mapping outlives the file's name and handle
        return np.memmap(file, np.uint8, "r+", shape=shape)


def image_files(folder: Path) -> list[Path]:
    """All image files in a folder and its sub-folders, sorted.

    Raises:
        DataError: no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())


class _Split:
    """The entries of a split, sorted by class and name; keeps a zip open while they are read."""

    def __init__(self, data: Path, split: str) -> None:
        self.archive: zipfile.ZipFile | None = None
        folder, archive = data / split, data / f"{split}.zip"
        self.where = folder
        if folder.is_dir():
            self.entries = [
                _Entry(directory.name, str(file), lambda file=file: _read_file(file))  # type: ignore[misc]
                for directory in sorted(folder.iterdir())
                if directory.is_dir()
                for file in self._images(directory)
            ]
        elif archive.is_file():
            self.where = archive
            try:
                self.archive = zipfile.ZipFile(archive)
            except (zipfile.BadZipFile, OSError) as error:
                raise DataError(f"{archive}: not a readable zip file ({error})") from None
            names = sorted(name for name in self.archive.namelist() if not name.endswith("/"))
            self.entries = [
                _Entry(PurePosixPath(name).parent.name, f"{archive}:{name}", functools.partial(self._read, name))
                for name in names
                if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and PurePosixPath(name).parent.name
            ]
        else:
            raise DataError(f"{data}: has neither a folder {split}/ nor a file {split}.zip")
        if not self.entries:
            raise DataError(f"{self.where}: no images found; expected CLASS/*.JPEG inside")

    def _images(self, directory: Path) -> list[Path]:
        files = sorted(file for file in directory.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise DataError(f"{directory}: class folder without images")
        return files

    def _read(self, name: str) -> bytes:
        assert self.archive is not None
        try:
            return self.archive.read(name)
        except Exception as error:  # BadZipFile, zlib.error, EOFError, RuntimeError where it is encrypted, …
            raise ImageError(f"{self.where}:{name}: damaged in the zip file ({error})") from None

    def __enter__(self) -> list[_Entry]:
        return self.entries

    def __exit__(self, *_: object) -> None:
        if self.archive is not None:
            self.archive.close()


def _read_file(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ImageError(f"{file}: {error.strerror}") from None


def read_class_names(data: Path, class_ids: list[str]) -> list[str]:
    """Readable class names from ``data/classes.tsv`` (id, name), where there is one; else the folder names.

    Only the first of several comma-separated synonyms is kept.

    Raises:
        DataError: the file lacks a class.
    """
    path = data / "classes.tsv"
    if not path.is_file():
        return list(class_ids)
    names = {row[0]: row[1] for row in _rows(path, 2)}
    missing = [class_id for class_id in class_ids if class_id not in names]
    if missing:
        raise DataError(f"{path}: has no name for class {missing[0]!r} ({len(missing)} missing)")
    return [names[class_id].split(",")[0].strip() for class_id in class_ids]


def read_superclasses(path: Path, class_ids: list[str]) -> Superclasses:
    """Reads a TSV of (class id, super-class name); further columns are ignored.

    Super-classes are numbered in the order of their names' first appearance.

    Raises:
        DataError: a class without a super-class, or in two, or an unknown class.
    """
    rows = _rows(path, 2)
    names = list(dict.fromkeys(row[1] for row in rows))
    of_class: dict[str, int] = {}
    for class_id, name, *_ in rows:
        if class_id not in class_ids:
            raise DataError(f"{path}: {class_id!r} is not a class of the data set")
        if of_class.get(class_id, names.index(name)) != names.index(name):
            raise DataError(f"{path}: class {class_id!r} stands in two super-classes")
        of_class[class_id] = names.index(name)
    missing = [class_id for class_id in class_ids if class_id not in of_class]
    if missing:
        raise DataError(f"{path}: class {missing[0]!r} has no super-class ({len(missing)} missing)")
    return Superclasses(names, [of_class[class_id] for class_id in class_ids])


def _rows(path: Path, columns: int) -> list[list[str]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable TSV file ({error})") from None
    for number, row in enumerate(rows, 1):
        if len(row) < columns or not all(cell.strip() for cell in row[:columns]):
            raise DataError(f"{path}: line {number} needs {columns} tab-separated columns, a class first")
    if not rows:
        raise DataError(f"{path}: is empty")
    return rows
