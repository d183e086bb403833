"""Makes the tables ``fonts.tsv`` and ``classes.tsv`` from font packages.

The tables say which faces are used, which are held out, and which characters are told apart.

Only somebody who changes the data set runs this; everybody else reads the tables. All rules are functions of the fonts:

- a face is used if its licence is one of :data:`~.licences.OPEN`; of a family one regular, one bold, one slanted face;
- families that draw characters pixel by pixel the same are one design, and held out together or not at all;
- of each script's designs about a seventh, and at least one, are held out for testing, and a tenth, at least one
  where there are enough, for validation; a design that is held out for one script is held out for all;
- a face is left out if nearly all its characters are drawn by enough other faces;
- characters that look the same in most fonts that have both are one class, and so are the two cases of a letter that
  look nearly the same;
- a class needs so many training faces and designs, and one design to test with.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.models.zoo.scripts.characters import SCRIPTS, candidates
from mvmoe_deploy.models.zoo.scripts.faces import Face, copyright_text, faces_in, font_files
from mvmoe_deploy.models.zoo.scripts.licences import OPEN, licence_of
from mvmoe_deploy.models.zoo.scripts.render import render
from mvmoe_deploy.models.zoo.scripts.tables import CharacterClass, FontRow

MIN_FACES = 6
MIN_DESIGNS = 4
"""Training faces, and designs among them, that a class needs."""

MIN_CHARACTERS = 15
"""Candidates that a face must have."""

SAME_DESIGN = 0.1
"""Share of common characters drawn identically from which two families are one design."""

ALIKE = 0.97
"""Correlation of two characters' pictures, both slightly blurred, from which they count as the same in one face."""

ALIKE_CASES = 0.92
"""Likewise of a letter's two cases, which differ in the thickness of strokes alone once both have one size."""

ENOUGH = {"train": 28, "val": 5, "test": 6}
"""Faces of a character after which no more are looked for."""

NEEDED = 30
"""A face is taken if so many of its characters, or a fifth of them, have not enough faces yet."""


@dataclass
class Surveyed:
    """A face, its licence, and its pictures: ``codes[i]`` looks like ``pictures[i]``."""

    face: Face
    licence: str
    pictures: NDArray[np.uint8]
    codes: list[int]


def survey(
    packages: Iterable[str],
    root: Path | None,
    workers: int = 1,
    progress: Callable[[Iterator[Any], int], Iterator[Any]] | None = None,
) -> tuple[list[FontRow], list[CharacterClass], dict[str, Counter[str]]]:
    """Applies the rules to packages.

    Args:
        packages: names of the Debian packages to look at.
        root: see :func:`~.faces.package_files`.
        workers: number of processes that render.
        progress: takes the iterator over faces and its length, and returns the iterator to use.

    Returns:
        The rows of both tables, and how many faces of each package have which licence.
    """
    scripts = candidates()
    chosen: list[tuple[Face, str, Path, list[int]]] = []
    licences: dict[str, Counter[str]] = {}
    for package in sorted(packages):
        found = _faces(package, root, licences, set(scripts))
        chosen.extend(_one_of_a_kind(found))
    with ProcessPoolExecutor(workers) as pool:
        results: Iterator[Any] = pool.map(_rendered, [(path, face.index, codes) for face, _, path, codes in chosen])
        if progress is not None:
            results = progress(results, len(chosen))
        surveyed = [
            Surveyed(face, licence, pictures, kept)
            for (face, licence, _, _), (pictures, kept) in zip(chosen, results, strict=True)
            if len(kept) >= MIN_CHARACTERS
        ]
    design = designs(surveyed)
    split = hold_out(surveyed, design, scripts)
    kept = enough([s.face for s in surveyed], [s.codes for s in surveyed], [split[d] for d in design])
    surveyed, design = [surveyed[i] for i in kept], [design[i] for i in kept]
    rows = [FontRow(s.face, split[design[i]], s.licence) for i, s in enumerate(surveyed)]
    training = [i for i in range(len(surveyed)) if split[design[i]] == "train"]
    merged = look_alikes([surveyed[i] for i in training], list(scripts))
    classes = _classes(merged=merged, surveyed=surveyed, design=design, split=split, scripts=scripts)
    return rows, classes, licences


def _faces(
    package: str, root: Path | None, licences: dict[str, Counter[str]], wanted: set[int]
) -> list[tuple[Face, str, Path, list[int]]]:
    found = []
    text = copyright_text(package, root)
    for name, path in font_files(package, root).items():
        licence = licence_of(text, name)
        licences.setdefault(package, Counter())[licence] += 1
        if licence in OPEN:
            for face, codes in faces_in(package, path):
                if len(codes & wanted) >= MIN_CHARACTERS:
                    found.append((face, licence, path, sorted(codes & wanted)))
    return found


def _one_of_a_kind(faces: list[tuple[Face, str, Path, list[int]]]) -> list[tuple[Face, str, Path, list[int]]]:
    """The first regular, bold and slanted face of each family."""
    kept: dict[tuple[str, str], tuple[Face, str, Path, list[int]]] = {}
    for entry in sorted(faces, key=lambda entry: (entry[0].family, entry[0].style, entry[0].file)):
        kept.setdefault((entry[0].family, _kind(entry[0].style)), entry)
    return [entry for (_, kind), entry in kept.items() if kind != "other"] or list(kept.values())[:1]


def _kind(style: str) -> str:
    style = style.lower()
    if "italic" in style or "oblique" in style or "slanted" in style:
        return "slanted" if "bold" not in style else "other"
    if style in ("", "regular", "book", "roman", "normal", "medium", "r", "w3", "rg"):
        return "regular"
    return "bold" if style in ("bold", "demibold", "semibold", "demi", "black") else "other"


def _rendered(job: tuple[Path, int, list[int]]) -> tuple[NDArray[np.uint8], list[int]]:
    try:
        return render(*job)
    except OSError:
        return np.zeros((0, 1, 1), np.uint8), []


def designs(surveyed: list[Surveyed]) -> list[int]:
    """A number for each face, equal for faces of one family or of families that draw alike."""
    families = sorted({s.face.family for s in surveyed})
    number = {family: index for index, family in enumerate(families)}
    parent = list(range(len(families)))
    drawn: defaultdict[tuple[int, bytes], set[int]] = defaultdict(set)
    for s in surveyed:
        for picture, code in zip(s.pictures, s.codes, strict=True):
            drawn[code, hashlib.md5(picture.tobytes()).digest()].add(number[s.face.family])
    common: Counter[tuple[int, int]] = Counter()
    total: Counter[int] = Counter()
    for s in surveyed:
        total[number[s.face.family]] += len(s.codes)
    for owners in drawn.values():
        if 1 < len(owners) < 12:
            ordered = sorted(owners)
            common.update((a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 :])
    for (a, b), count in common.items():
        if count >= SAME_DESIGN * min(total[a], total[b]):
            parent[_root(parent, a)] = _root(parent, b)
    return [_root(parent, number[s.face.family]) for s in surveyed]


def hold_out(surveyed: list[Surveyed], design: list[int], scripts: dict[int, str]) -> dict[int, str]:
    """``train``, ``val`` or ``test`` for each design."""
    counts = [Counter(scripts[code] for code in s.codes) for s in surveyed]
    most = {script: max(count[script] for count in counts) for script in SCRIPTS}
    covering: defaultdict[str, set[int]] = defaultdict(set)
    for count, d in zip(counts, design, strict=True):
        for script, n in count.items():
            if n >= most[script] / 3:  # what the best face has of the script
                covering[script].add(d)
    name = {
        d: s.face.family for s, d in sorted(zip(surveyed, design, strict=True), key=lambda pair: pair[0].face.family)
    }
    split: dict[int, str] = {}
    for script in sorted(SCRIPTS, key=lambda script: (len(covering[script]), script)):
        order = sorted(covering[script], key=lambda d: hashlib.md5(f"{name[d]}".encode()).digest())
        free = [d for d in order if d not in split]
        n = len(order)
        # the designs that cover a script are few for some scripts: test comes first, training keeps four
        for part, quota in (("test", max(1, round(n / 7))), ("val", round(n / 10) if n >= 7 else 0)):
            have = sum(split.get(d) == part for d in order)
            while have < quota and free and sum(split.get(d, "train") == "train" for d in order) > MIN_DESIGNS:
                split[free.pop(0)] = part
                have += 1
    return {d: split.get(d, "train") for d in set(design)}


def enough(faces: list[Face], codes: list[list[int]], splits: list[str]) -> list[int]:
    """Indices of the faces to keep.

    In a fixed random order, each face is kept that has a character of which fewer than :data:`ENOUGH` were kept so far.
    """
    have: Counter[tuple[str, int]] = Counter()
    kept = []
    for index in sorted(range(len(faces)), key=lambda i: hashlib.md5(repr(faces[i]).encode()).digest()):
        split = splits[index]
        adds = sum(have[split, code] < ENOUGH[split] for code in codes[index])
        if adds >= min(NEEDED, len(codes[index]) / 5):
            kept.append(index)
            have.update((split, code) for code in codes[index])
    return sorted(kept)


def look_alikes(training: list[Surveyed], codes: list[int]) -> dict[int, int]:
    """Code point → the first of those that look like it."""
    place = {code: index for index, code in enumerate(codes)}
    alike: Counter[tuple[int, int]] = Counter()
    has = np.zeros((len(training), len(codes)), bool)
    for row, s in enumerate(training):
        has[row, [place[code] for code in s.codes]] = True
        blurred = _blurred(s.pictures)
        for start in range(0, len(blurred), 1000):
            near = blurred[start : start + 1000] @ blurred.T
            for a, b in zip(*np.nonzero(near > ALIKE_CASES), strict=True):
                first, second = s.codes[a + start], s.codes[b]
                if first < second and near[a, b] > (ALIKE_CASES if _cases(first, second) else ALIKE):
                    alike[first, second] += 1
    parent = list(range(len(codes)))
    for (a, b), count in sorted(alike.items()):
        both = int((has[:, place[a]] & has[:, place[b]]).sum())
        if both >= 2 and count > both / 2:
            first, second = sorted((_root(parent, place[a]), _root(parent, place[b])))
            parent[second] = first
    return {code: codes[_root(parent, place[code])] for code in codes}


def _cases(first: int, second: int) -> bool:
    return chr(first).lower() == chr(second).lower()


def _blurred(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures at half size, as vectors of mean 0 and length 1."""
    small = pictures.reshape(-1, 24, 2, 24, 2).mean((2, 4), dtype=np.float32)
    padded = np.pad(small, ((0, 0), (1, 1), (1, 1)))
    smooth = sum(
        padded[:, i : i + 24, j : j + 24] * (2 - abs(i - 1)) * (2 - abs(j - 1)) for i in range(3) for j in range(3)
    )
    flat = np.asarray(smooth, np.float32).reshape(len(pictures), -1)
    flat -= flat.mean(1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-6)
    return flat


def _classes(
    merged: dict[int, int],
    surveyed: list[Surveyed],
    design: list[int],
    split: dict[int, str],
    scripts: dict[int, str],
) -> list[CharacterClass]:
    faces: defaultdict[int, set[int]] = defaultdict(set)
    tested: set[int] = set()
    for index, s in enumerate(surveyed):
        for code in s.codes:
            if split[design[index]] == "train":
                faces[merged[code]].add(index)
            elif split[design[index]] == "test":
                tested.add(merged[code])
    members: defaultdict[int, list[int]] = defaultdict(list)
    for code, first in merged.items():
        members[first].append(code)
    return [
        CharacterClass(first, members[first], scripts[first])
        for first in dict.fromkeys(merged.values())
        if len(faces[first]) >= MIN_FACES
        and len({design[index] for index in faces[first]}) >= MIN_DESIGNS
        and first in tested
    ]


def _root(parent: list[int], index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index
