"""Glyphs, rendered once into a folder outside the project: :class:`~.dataset.Characters` makes samples from them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.errors import DataError
from mvmoe_deploy.models.zoo.scripts.faces import font_files
from mvmoe_deploy.models.zoo.scripts.render import SIDE, render
from mvmoe_deploy.models.zoo.scripts.tables import SPLITS, CharacterClass, FontRow

FORMAT = 1


@dataclass
class Glyphs:
    """All glyphs, sorted by split, class, and the faces' order in ``fonts.tsv``.

    Attributes:
        pictures: uint8 ``[n, 48, 48]``, mapped from a file.
        classes: what the labels stand for.
        label: label of each glyph, int32 ``[n]``.
        face: row of the table of fonts that each glyph comes from, int32 ``[n]``.
        start: first glyph of each split (in the order of :data:`~.tables.SPLITS`) and class, int64 ``[3, C]``.
        count: number of glyphs of each split and class, int64 ``[3, C]``; 0 where no held-out face has the class.
        sha256: hash of the pictures and labels.
    """

    pictures: NDArray[np.uint8]
    classes: list[CharacterClass]
    label: NDArray[np.int32]
    face: NDArray[np.int32]
    start: NDArray[np.int64]
    count: NDArray[np.int64]
    sha256: str


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/mvmoe-deploy/scripts``, by default in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mvmoe-deploy" / "scripts"


def build(
    folder: Path,
    fonts: list[FontRow],
    classes: list[CharacterClass],
    root: Path | None = None,
    workers: int = 1,
    progress: Callable[[Iterator[Any], int], Iterator[Any]] | None = None,
) -> Glyphs:
    """Renders every glyph of the tables and opens the result. The folder appears whole or not at all.

    Args:
        folder: folder to write; one that exists is replaced.
        fonts: the table of fonts.
        classes: the table of classes.
        root: folder with unpacked packages; None for the installed ones.
        workers: number of processes that render.
        progress: takes the iterator over faces and its length, and returns the iterator to use.

    Raises:
        DataError: packages or font files are missing; the message names the packages.
    """
    paths = locate(fonts, root)
    class_of = {code: index for index, each in enumerate(classes) for code in each.codes}
    jobs = [(path, row.face.index, class_of) for path, row in zip(paths, fonts, strict=True)]
    pictures, labels, faces = [], [], []
    with ProcessPoolExecutor(workers) as pool:
        results: Iterator[Any] = pool.map(_render_face, jobs)
        for index, (each, label) in enumerate(progress(results, len(jobs)) if progress else results):
            pictures.append(each)
            labels.append(label)
            faces.append(np.full(len(label), index, np.int32))
    label, face = np.concatenate(labels), np.concatenate(faces)
    split = np.array([SPLITS.index(row.split) for row in fonts], np.int32)[face]
    order = np.lexsort((face, label, split))
    label, face, split = label[order], face[order], split[order]
    stacked = np.concatenate(pictures)
    del pictures
    key = split.astype(np.int64) * len(classes) + label
    count = np.bincount(key, minlength=len(SPLITS) * len(classes))
    start = np.cumsum(count) - count
    digest = hashlib.sha256(label.tobytes())
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        written = np.lib.format.open_memmap(temporary / "glyphs.npy", "w+", np.uint8, (len(order), SIDE, SIDE))
        for low in range(0, len(order), 10_000):
            part = stacked[order[low : low + 10_000]]
            written[low : low + 10_000] = part
            digest.update(part.tobytes())
        written.flush()
        np.savez(temporary / "index.npz", label=label, face=face, start=start, count=count)
        meta = {"format": FORMAT, "tables": tables_sha256(fonts, classes), "sha256": digest.hexdigest()}
        (temporary / "meta.json").write_text(json.dumps(meta))
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return load(folder, fonts, classes)


def load(folder: Path, fonts: list[FontRow], classes: list[CharacterClass]) -> Glyphs:
    """Opens a folder that :func:`build` made.

    Raises:
        DataError: there is no such folder, or it was rendered from other tables.
    """
    command = "render the glyphs first: python -m mvmoe_deploy.models.zoo.scripts render"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        pictures = np.load(folder / "glyphs.npy", mmap_mode="c")
        index = np.load(folder / "index.npz")
    except (OSError, ValueError):
        raise DataError(f"{folder}: no rendered glyphs; {command}") from None
    if meta.get("format") != FORMAT or meta.get("tables") != tables_sha256(fonts, classes):
        raise DataError(f"{folder}: rendered from other tables of fonts and classes; {command}")
    shape = (len(SPLITS), len(classes))
    start, count = index["start"].reshape(shape), index["count"].reshape(shape)
    return Glyphs(
        pictures=pictures,
        classes=classes,
        label=index["label"],
        face=index["face"],
        start=start,
        count=count,
        sha256=meta["sha256"],
    )


def locate(fonts: Iterable[FontRow], root: Path | None = None) -> list[Path]:
    """Finds the font file of each row.

    Raises:
        DataError: packages or files are missing; the message names the packages.
    """
    by_package: defaultdict[str, list[FontRow]] = defaultdict(list)
    fonts = list(fonts)
    for row in fonts:
        by_package[row.face.package].append(row)
    found: dict[str, dict[str, Path]] = {package: font_files(package, root) for package in by_package}
    missing = sorted(
        package for package, rows in by_package.items() if any(row.face.file not in found[package] for row in rows)
    )
    if missing:
        raise DataError(f"{len(missing)} font packages are missing: apt-get install {' '.join(missing)}")
    return [found[row.face.package][row.face.file] for row in fonts]


def tables_sha256(fonts: list[FontRow], classes: list[CharacterClass]) -> str:
    """Hash of everything in the tables that decides what is rendered."""
    text = json.dumps([[repr(row.face), row.split] for row in fonts] + [each.codes for each in classes])
    return hashlib.sha256(text.encode()).hexdigest()


def _render_face(job: tuple[Path, int, dict[int, int]]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    from fontTools.ttLib import TTFont

    path, index, class_of = job
    has = set(TTFont(path, fontNumber=index, lazy=True).getBestCmap() or ())
    pictures, codes = render(path, index, sorted(has & set(class_of)))
    return pictures, np.array([class_of[code] for code in codes], np.int32)
