"""Data sets on disk: image folders and zips of them, and the tables that name and group their classes.

One rule says what a class is, for folders and zips alike. An image is ``CLASS/NAME`` or, as in Tiny ImageNet,
``CLASS/images/NAME``, or ``images/NAME`` beside a file ``val_annotations.txt`` that names its class. An image anywhere
else is refused. Hidden files, and files that are no images, are left out and counted.
"""

from __future__ import annotations

import codecs
import hashlib
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mvmoe_deploy.checkpoint import Header, Superclasses
from mvmoe_deploy.errors import DataError, ImageError, as_text, first_line
from mvmoe_deploy.imagefiles import HEAD, MAX_FILE_BYTES, claims_to_be_image, image_format, is_hidden, walk
from mvmoe_deploy.images import Preprocessing, to_pixels
from mvmoe_deploy.models.train.data import Bar, ImageSet

NO_IMAGE = "file that is no image", "files that are no images"
HIDDEN = "hidden file", "hidden files"
UNREADABLE = "unreadable image", "unreadable images"

ANNOTATIONS = "val_annotations.txt"
"""Name of Tiny ImageNet's table of (file name, class id, box), which lies beside its folder ``images``."""

ALL = -1


@dataclass(frozen=True)
class _File:
    """A file of a split, in a folder or a zip.

    Attributes:
        parts: the parts of the file's path inside the split.
        name: what errors call the file.
        read: returns that many bytes from the file's beginning, or :data:`ALL` of them; raises ImageError.
    """

    parts: tuple[str, ...]
    name: str
    read: Callable[[int], bytes]

    def is_image(self) -> bool:
        """Whether the file is an image by its content or its name, even if it is damaged or cannot be read here."""
        if claims_to_be_image(self.parts[-1]):
            return True
        try:
            return image_format(self.read(HEAD)) is not None
        except ImageError:
            return True  # the caller then reports it as unreadable


@dataclass(frozen=True)
class _Split:
    """What one split of a data set holds.

    Attributes:
        where: the folder or zip.
        images: images by class id; class ids are sorted, and images are sorted by path.
        left_out: descriptions of what else the split holds.
    """

    where: Path
    images: dict[str, list[_File]]
    left_out: list[str]


def read_images(
    data: Path,
    split: str,
    preprocessing: Preprocessing,
    class_ids: list[str] | None = None,
    *,
    skip_unreadable: bool = False,
    memory_limit: int = 4 << 30,
    val_share: float = 0.0,
    hold_out: int = 0,
    held_out_only: bool = False,
    every_class: bool = True,
    progress: Bar | None = None,
) -> ImageSet:
    """Reads a split of a data set, a folder ``data/split`` or a file ``data/split.zip``, at the model's size.

    Args:
        data: the data set's folder.
        split: ``train`` or ``val``.
        preprocessing: gives size, crop and interpolation; the pixels are not normalised yet.
        class_ids: the classes to expect; by default the classes found.
        skip_unreadable: leave out images that cannot be read instead of refusing the data set.
        memory_limit: decoded images that take more bytes than this go into a temporary file that is mapped into
            memory. The system can then drop pages when memory is short. The file vanishes with the process.
        val_share: if the data set has no ``val``, this share of each class of ``train`` (or of the class folders in
            ``data`` itself) becomes ``val``. It consists of the images whose names hash lowest, so that all runs,
            whatever their seed, and later evaluations see the same split.
        hold_out: number of images at the end of every class that are left out.
        held_out_only: read only the images that ``hold_out`` would leave out.
        every_class: refuse a split without images of some of the ``class_ids``, as training has to.
        progress: takes the iterator over images and its length, and returns it wrapped in a progress bar.

    Raises:
        DataError: there is no such data, an image lies in no class, a class is empty or unknown, an image cannot be
            read, a class has no more images than are held out, or there is no room for the temporary file.
    """
    with _open_split(data, split, val_share) as found:
        class_ids = list(found.images) if class_ids is None else class_ids
        _check_classes(found, class_ids, every_class)
        by_class = _held_out(found.images, hold_out, held_out_only) if hold_out else found.images
        files = [file for each in by_class.values() for file in each]
        pixels, errors = _decode(files, preprocessing, memory_limit, progress)
    index_of = {class_id: index for index, class_id in enumerate(class_ids)}
    labels = np.array([index_of[class_id] for class_id, each in by_class.items() for _ in each])
    skipped, left_out = list(errors.values()), found.left_out
    if skipped:
        count = f"{len(skipped)} {UNREADABLE[len(skipped) > 1]}"
        if not skip_unreadable:
            raise DataError(f"{skipped[0]} ({count} in {found.where}; --skip-unreadable leaves them out)")
        left_out = [f"{count} (first: {skipped[0]})", *left_out]
        kept = [index for index in range(len(files)) if index not in errors]
        labels = labels[kept]
        for place, index in enumerate(kept):  # in place, because a copy could be too large
            pixels[place] = pixels[index]
        pixels = pixels[: len(kept)]
    if empty := {index_of[class_id] for class_id in by_class} - set(labels.tolist()):
        raise DataError(f"{found.where}: class {class_ids[min(empty)]!r} has no readable image")
    return ImageSet(
        pixels=torch.from_numpy(pixels),
        labels=torch.from_numpy(labels),
        class_ids=class_ids,
        skipped=skipped,
        left_out=left_out,
    )


def _check_classes(found: _Split, class_ids: list[str], every_class: bool) -> None:
    """Compares a split's classes with those that are expected, of the other split or of a model."""
    unknown, missing = sorted(set(found.images) - set(class_ids)), sorted(set(class_ids) - set(found.images))
    for odd, said in (
        (unknown, f"is none of the {len(class_ids)} that are expected"),
        (missing if every_class else [], f"is one of the {len(class_ids)} that are expected, and has no images here"),
    ):
        if odd:
            more = f" ({len(odd)} such classes)" if len(odd) > 1 else ""
            raise DataError(f"{found.where}: class {odd[0]!r} {said}{more}")


def _decode(
    files: list[_File], preprocessing: Preprocessing, memory_limit: int, progress: Bar | None
) -> tuple[NDArray[np.uint8], dict[int, str]]:
    """Decodes images in parallel.

    Returns:
        Pixels ``[n, 3, size, size]``, and the errors of those that cannot be read, by their index.
    """
    size = preprocessing.size
    pixels = _empty((len(files), 3, size, size), memory_limit)

    def decode(index: int) -> str | None:
        file = files[index]
        try:
            # storing channels first saves a transposition of every batch later
            pixels[index] = to_pixels(file.read(ALL), preprocessing, file.name).transpose(2, 0, 1)
            return None
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        results = pool.map(decode, range(len(files)))
        errors = list(progress(results, len(files)) if progress else results)
    return pixels, {index: error for index, error in enumerate(errors) if error}


def recorded_val_share(header: Header) -> float:
    """The ``val_share`` that a checkpoint was trained with; 0 if its data set had a ``val``."""
    share = header.training.get("val_share", 0.0)
    return float(share) if isinstance(share, int | float) and 0 < share < 1 else 0.0


def has_split(data: Path, split: str) -> bool:
    """Whether a data set has a folder or a zip for this split."""
    return (data / split).is_dir() or (data / f"{split}.zip").is_file()


@contextmanager
def _open_split(data: Path, split: str, val_share: float) -> Iterator[_Split]:
    """Opens a split and sorts its images into classes; a zip stays open while they are read."""
    divided = bool(val_share) and not has_split(data, "val")
    source = "train" if divided else split
    folder, archive = data / source, data / f"{source}.zip"
    if divided and not has_split(data, "train"):
        folder = data
    if folder.is_dir():
        found = _sort_out(folder, source, _files_of_folder(folder))
        yield _divide(found, split, val_share) if divided else found
    elif archive.is_file():
        try:
            opened = zipfile.ZipFile(archive)
        except Exception as error:  # zipfile raises many types of errors
            raise DataError(f"{archive}: not a readable zip file ({first_line(error)})") from None
        with opened:
            found = _sort_out(archive, source, _files_of_zip(archive, opened))
            yield _divide(found, split, val_share) if divided else found
    else:
        hint = "; --val-share 0.1 takes a tenth of each class instead" if split == "val" else ""
        raise DataError(f"{data}: has neither a folder {split}/ nor a file {split}.zip{hint}")


def _files_of_folder(folder: Path) -> list[_File]:
    def read(path: Path, count: int) -> bytes:
        try:
            if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
                raise ImageError(f"{path}: is not a regular file")
            with open(path, "rb") as file:
                _check_size(str(path), os.fstat(file.fileno()).st_size)
                return file.read(count)
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror}") from None

    try:
        paths = [(tuple(map(as_text, parts)), folder.joinpath(*parts)) for parts in walk(folder)]
    except ImageError as error:
        raise DataError(str(error)) from None
    return [_File(parts, _printable(as_text(str(path))), partial(read, path)) for parts, path in paths]


def _files_of_zip(path: Path, archive: zipfile.ZipFile) -> list[_File]:
    def read(entry: zipfile.ZipInfo, count: int) -> bytes:
        name = _printable(f"{path}:{entry.filename}")
        _check_size(name, entry.file_size)
        try:
            with archive.open(entry) as file:
                return file.read(count)
        except Exception as error:  # BadZipFile, zlib.error, EOFError, RuntimeError (encrypted), …
            raise ImageError(f"{name}: damaged in the zip file ({first_line(error)})") from None

    files: dict[tuple[str, ...], _File] = {}
    for entry in archive.infolist():
        # some programs on Windows write backslashes between folders
        *parts, last = entry.filename.replace("\\", "/").split("/")
        key = (*(part for part in parts if part not in ("", ".")), last)
        if key in files and last:
            raise DataError(f"{_printable(f'{path}:{entry.filename}')}: is in the zip file twice")
        files[key] = _File(key, _printable(f"{path}:{entry.filename}"), partial(read, entry))
    # As in a folder on disk, a folder's own entry matters only if the folder is empty.
    filled = {key[:depth] for key in files if key[-1] for depth in range(len(key))}
    return [file for key, file in sorted(files.items()) if key[-1] or (key[:-1] and key[:-1] not in filled)]


def _printable(name: str) -> str:
    """A name on one line, without characters that could control a terminal."""
    return "".join(character if character.isprintable() else "?" for character in name)


def _check_size(name: str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ImageError(f"{name}: takes {size / 1e9:.1f} GB, more than the {MAX_FILE_BYTES / 1e9:.1f} GB of an image")


def _sort_out(where: Path, split: str, files: list[_File]) -> _Split:
    """Sorts a split's files into classes, and lists what is left out.

    Raises:
        DataError: there are no images, a class has none, or an image lies in no class.
    """
    top = {file.parts[0] for file in files if not any(map(is_hidden, file.parts))}
    if top == {split} and not any(file.parts == (split,) for file in files):
        # the split (train.zip) holds nothing but a folder of its own name (train)
        files = [replace(file, parts=file.parts[1:]) if file.parts[0] == split else file for file in files]
    hidden, seen = _partition(files, lambda file: any(map(is_hidden, file.parts)))
    folders = {file.parts[0] for file in files if len(file.parts) > 1 and not is_hidden(file.parts[0])}
    tables = [file for file in seen if file.parts == (ANNOTATIONS,)]
    class_of = _annotations(tables[0]) if tables and "images" in folders else {}
    images, others = _partition([file for file in seen if file.parts[-1]], _File.is_image)
    by_class: dict[str, list[_File]] = {}
    for file in images:
        match file.parts:
            case ("images", name) if class_of:
                if name not in class_of:
                    raise DataError(f"{file.name}: {ANNOTATIONS} does not name its class")
                class_id = class_of[name]
            case (class_id, _) | (class_id, "images", _) if class_id != "images":
                pass
            case _:
                raise DataError(
                    f"{file.name}: lies in no class; expected CLASS/NAME, CLASS/images/NAME, or images/NAME with "
                    f"{ANNOTATIONS} beside images"
                )
        by_class.setdefault(class_id, []).append(file)
    if not by_class:
        there = f", but {_count(others, *NO_IMAGE)}" if others else ""
        raise DataError(f"{where}: no images found{there}; expected CLASS/*.JPEG inside")
    if class_of:
        folders = (folders - {"images"}) | set(class_of.values())
    if missing := sorted(folders - set(by_class)):
        raise DataError(f"{where}: {missing[0]}: class folder without images")
    others = [file for file in others if file not in tables]
    left_out = [_count(each, *what) for each, what in ((others, NO_IMAGE), (hidden, HIDDEN)) if each]
    if absent := sorted(set(class_of) - {file.parts[-1] for file in images}):
        left_out.append(f"{len(absent)} named in {ANNOTATIONS} but missing (first: {absent[0]})")
    return _Split(where, {class_id: by_class[class_id] for class_id in sorted(by_class)}, left_out)


def _partition(files: list[_File], is_so: Callable[[_File], bool]) -> tuple[list[_File], list[_File]]:
    """Divides files into those that satisfy a predicate and the others."""
    answers = [(file, is_so(file)) for file in files]
    return [file for file, answer in answers if answer], [file for file, answer in answers if not answer]


def _count(files: list[_File], one: str, many: str) -> str:
    return f"{len(files)} {one if len(files) == 1 else many} (first: {files[0].name})"


def _annotations(table: _File) -> dict[str, str]:
    """Reads the class id of each file name from ``val_annotations.txt``."""
    try:
        content = table.read(ALL)
    except ImageError as error:
        raise DataError(str(error)) from None
    class_of: dict[str, str] = {}
    for number, (name, class_id, *_) in _rows(table.name, content, 2):
        if class_of.setdefault(name, class_id) != class_id:
            raise DataError(f"{table.name}: line {number}: {name!r} has another class further up")
    return class_of


def _divide(found: _Split, split: str, share: float) -> _Split:
    """Keeps the ``val`` images of every class, or the others; :func:`read_images` says which they are."""
    images = {}
    for class_id, files in found.images.items():
        if len(files) < 2:
            raise DataError(f"{found.where}: class {class_id!r} has one image, too few for train and val")
        count = min(max(1, round(share * len(files))), len(files) - 1)
        val = set(sorted(files, key=_hash)[:count])
        images[class_id] = [file for file in files if (file in val) == (split == "val")]
    return replace(found, images=images)


def _hash(file: _File) -> bytes:
    """A hash of the image's name alone, which is the same wherever the data set lies, in a folder or a zip."""
    return hashlib.sha256(os.fsencode(file.parts[-1])).digest()


def _held_out(images: dict[str, list[_File]], count: int, only: bool) -> dict[str, list[_File]]:
    """The last ``count`` images of every class, or all but these."""
    for class_id, each in images.items():
        if len(each) <= count:
            raise DataError(
                f"class {class_id} has {len(each)} images, holding out {count} would leave none to train on"
            )
    return {class_id: each[-count:] if only else each[:-count] for class_id, each in images.items()}


def _empty(shape: tuple[int, ...], memory_limit: int) -> NDArray[np.uint8]:
    """An array for decoded images, in memory or, above the limit, in a file without a name."""
    needed = math.prod(shape)
    if needed <= memory_limit:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:
        try:
            os.truncate(file.fileno(), needed)
            if hasattr(os, "posix_fallocate"):  # otherwise a full disk would kill the process on writing
                os.posix_fallocate(file.fileno(), 0, needed)
        except OSError as error:
            raise DataError(
                f"the decoded images take {needed / 1e9:.1f} GB, more than the limit of {memory_limit / 1e9:.1f} GB, "
                f"and {tempfile.gettempdir()} has no room for them ({error.strerror}); raise --memory-limit, or name a "
                "larger place in the environment variable TMPDIR"
            ) from None
        # the mapping outlives the file's name and handle
        return np.memmap(file, np.uint8, "r+", shape=shape)


def read_class_names(data: Path, class_ids: list[str]) -> list[str]:
    """Readable class names from ``data/classes.tsv`` (id, name) or, if there is no such file, the class ids.

    Of several comma-separated synonyms, only the first is kept.

    Raises:
        DataError: the file lacks a class, or names one twice.
    """
    path = data / "classes.tsv"
    if not path.is_file():
        return list(class_ids)
    names: dict[str, str] = {}
    for number, (class_id, synonyms, *_) in _rows(str(path), _read_table(path), 2):
        name = next((each.strip() for each in synonyms.split(",") if each.strip()), "")
        if not name:
            raise DataError(f"{path}: line {number}: class {class_id!r} has no name")
        if names.setdefault(class_id, name) != name:
            raise DataError(f"{path}: line {number}: class {class_id!r} has another name further up")
    missing = [class_id for class_id in class_ids if class_id not in names]
    if missing:
        raise DataError(f"{path}: has no name for class {missing[0]!r} ({len(missing)} missing)")
    return [names[class_id] for class_id in class_ids]


def read_superclasses(path: Path, class_ids: list[str]) -> Superclasses:
    """Reads a TSV of (class id, super-class name); further columns are ignored.

    Super-classes are numbered in the order in which their names first appear.

    Raises:
        DataError: a class has no super-class or more than one, or is unknown.
    """
    of_class: dict[str, int] = {}
    names: list[str] = []
    for number, (class_id, name, *_) in _rows(str(path), _read_table(path), 2):
        if class_id not in class_ids:
            raise DataError(f"{path}: line {number}: {class_id!r} is not a class of the data set")
        if name not in names:
            names.append(name)
        if of_class.setdefault(class_id, names.index(name)) != names.index(name):
            raise DataError(f"{path}: line {number}: class {class_id!r} stands in two super-classes")
    missing = [class_id for class_id in class_ids if class_id not in of_class]
    if missing:
        raise DataError(f"{path}: class {missing[0]!r} has no super-class ({len(missing)} missing)")
    return Superclasses(names, [of_class[class_id] for class_id in class_ids])


def _read_table(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: not a readable TSV file ({error.strerror})") from None


def _rows(name: str, content: bytes, columns: int) -> list[tuple[int, list[str]]]:
    """The rows of a TSV file, each with its line number, without blank lines.

    A spreadsheet or an editor on Windows may have written the file. A byte order mark is therefore dropped, lines may
    end in any way, and cells lose surrounding spaces and a spreadsheet's quotes.

    Raises:
        DataError: the file is not UTF-8, has no rows, or has a row with an empty cell in its first ``columns``.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise DataError(f"{name}: not a readable TSV file: it seems to be UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not a readable TSV file ({error}); save it as UTF-8") from None
    rows = []
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        row = [_unquoted(cell.strip()) for cell in line.split("\t")]
        if not any(row):
            continue
        if len(row) < columns or not all(row[:columns]):
            raise DataError(f"{name}: line {number} needs {columns} tab-separated columns, a class first")
        rows.append((number, row))
    if not rows:
        raise DataError(f"{name}: is empty")
    return rows


def _unquoted(cell: str) -> str:
    """A cell without the quotes that a spreadsheet puts around it; it doubles the quotes inside."""
    inner = cell[1:-1].replace('""', "")
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner:
        return cell[1:-1].replace('""', '"').strip()
    return cell
