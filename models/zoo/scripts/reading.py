"""Reads a picture of characters with a bundle: cuts it into lines and characters, and classifies each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvmoe_deploy.decoding import decode
from mvmoe_deploy.errors import BundleError, DataError, ImageError
from mvmoe_deploy.models.zoo.scripts.characters import name_of
from mvmoe_deploy.models.zoo.scripts.render import INK, SIDE
from mvmoe_deploy.models.zoo.scripts.sign import in_view
from mvmoe_deploy.models.zoo.scripts.tables import read_classes
from mvmoe_deploy.runtime import Runtime
from mvmoe_deploy.terminal import Cell, counted, table

APART = 0.3
"""Least gap between two characters, in heights of their line; narrower gaps are within a character."""

SHOWN = 4
"""Look-alikes of a character that a report shows, at most."""


@dataclass(frozen=True)
class Read:
    """One character of a picture.

    Attributes:
        line: its line, from 0.
        character: what the model takes it for; of look-alikes the one that stands for their class.
        alike: all characters of its class.
        name: such as ``cyrillic capital letter zhe``.
        script: such as ``cyrillic``.
        probability: that the model gives it.
        expert: that answered; None of a dense model.
        expert_name: what this expert is for.
        gate: the router's probability of it.
        loaded: bytes of weights that were loaded for it; 0 where its expert was resident.
    """

    line: int
    character: str
    alike: str
    name: str
    script: str
    probability: float
    expert: int | None
    expert_name: str | None
    gate: float | None
    loaded: int


def read(runtime: Runtime, picture: Path) -> list[Read]:
    """Classifies every character of a picture, line by line, from left to right.

    Args:
        runtime: of a bundle of the zoo's characters, with room for one expert.
        picture: characters of one brightness on a plain ground, brighter or darker, at least :data:`APART` apart.

    Raises:
        ImageError: the picture cannot be read, or shows nothing.
        BundleError: the bundle is of other classes.
    """
    classes = {each.id: each for each in read_classes()}
    if not set(runtime.bundle.manifest.class_ids) <= set(classes):
        raise BundleError(f"{runtime.bundle.path}: its classes are not the zoo's characters")
    found = []
    for number, line in enumerate(cut(decode(picture), picture.name)):
        for character in line:
            misses = runtime.stats().misses
            prediction = runtime.predict(character, top=1, name=picture.name)
            stats = runtime.stats()
            best, each = prediction.top[0], classes[prediction.top[0].class_id]
            found.append(
                Read(
                    line=number,
                    character=chr(each.first),
                    alike="".join(map(chr, each.codes)),
                    name=name_of(each.first),
                    script=each.script,
                    probability=best.probability,
                    expert=prediction.expert,
                    expert_name=prediction.expert_name,
                    gate=prediction.gate,
                    # with room for one expert, what is resident after a load is what was loaded
                    loaded=stats.resident_bytes if stats.misses > misses else 0,
                )
            )
    return found


def report(found: Sequence[Read], runtime: Runtime) -> str:
    """What was read as a table, and what that took in a sentence."""
    rows: list[list[Cell]] = [
        [
            " ".join(each.alike[:SHOWN]),
            each.name,
            each.script,
            f"{each.probability:.0%}",
            None if each.expert is None else f"{each.expert} ({each.expert_name})",
            each.gate if each.gate is None else f"{each.gate:.2f}",
            f"{each.loaded / 1e3:.1f} kB" if each.loaded else "-",
        ]
        for each in found
    ]
    headers = ["character", "read as", "script", "sure", "expert (is for)", "gate", "loaded"]
    return f"{table(rows, headers, right={3, 5, 6})}\n{_in_words(found, runtime)}"


def _in_words(found: Sequence[Read], runtime: Runtime) -> str:
    stats, pieces = runtime.stats(), runtime.bundle.manifest.pieces
    experts = [piece for piece in pieces if piece.expert is not None]
    if not experts:
        return f"{counted(len(found), 'character')}; weights in memory: {stats.fixed_bytes / 1e6:.2f} MB"
    everything = stats.fixed_bytes + sum(piece.weight_bytes for piece in experts)
    held = stats.fixed_bytes + stats.resident_bytes
    return (
        f"{counted(len(found), 'character')}, {len({each.expert for each in found})} of {len(experts)} experts, "
        f"{counted(stats.misses, 'load')}. Weights in memory: {held / 1e6:.2f} MB, of which the one resident expert "
        f"has {stats.resident_bytes / 1e3:.1f} kB; with all experts {everything / 1e6:.2f} MB."
    )


def right(found: Sequence[Read], text: str) -> int:
    """How many characters were read right, look-alikes counting as equal.

    Args:
        found: what was read.
        text: what the picture says, a line of it a line, in the order of reading.

    Raises:
        DataError: the text has other numbers of characters than the picture.
    """
    lines = [in_view(line) for line in text.split()]
    seen = [[each for each in found if each.line == number] for number in range(len(lines))]
    if [len(line) for line in lines] != [len(line) for line in seen] or len(found) != sum(map(len, seen)):
        raise DataError(f"the text has {len(''.join(lines))} characters, the picture {len(found)}, or in other lines")
    return sum(
        character in each.alike
        for line, read_line in zip(lines, seen, strict=True)
        for character, each in zip(line, read_line, strict=True)
    )


def cut(picture: Image.Image, name: str = "picture") -> list[list[NDArray[np.uint8]]]:
    """Lines of characters, each as training shows them: bright on dark, centred in a square, ``[S, S, 3]``.

    Raises:
        ImageError: the picture shows nothing.
    """
    ink = _ink(picture, name)
    lines = []
    for top, bottom in _runs(ink.max(1) > 0.5, max(2, len(ink) // 100)):
        line = ink[top:bottom]
        gap = max(1, round(APART * (bottom - top)))
        lines.append([_square(line[:, left:right]) for left, right in _runs(line.max(0) > 0.5, gap)])
    return lines


def _ink(picture: Image.Image, name: str) -> NDArray[np.float32]:
    """0 where the ground is, 1 where the ink is."""
    grey = np.asarray(picture.convert("L"), np.float32)
    ground = float(np.median(grey))
    strength: NDArray[np.float32] = np.abs(grey - ground)
    most = float(strength.max())
    if most < 32:
        raise ImageError(f"{name}: shows no characters on a plain ground")
    return np.divide(strength, most)


def _runs(marked: NDArray[np.bool_], gap: int) -> list[tuple[int, int]]:
    """Start and end of each run of marked places; runs less than ``gap`` apart are one."""
    places = np.flatnonzero(marked)
    breaks = np.flatnonzero(np.diff(places) > gap)
    starts, ends = [0, *(breaks + 1)], [*breaks, len(places) - 1]
    return [(int(places[start]), int(places[end]) + 1) for start, end in zip(starts, ends, strict=True)]


def _square(ink: NDArray[np.float32]) -> NDArray[np.uint8]:
    rows = np.flatnonzero(ink.max(1) > 0.5)
    ink = ink[rows[0] : rows[-1] + 1]
    side = round(max(ink.shape) * SIDE / INK)
    square = np.zeros((side, side), np.float32)
    top, left = (side - ink.shape[0]) // 2, (side - ink.shape[1]) // 2
    square[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return np.repeat((255 * square).round().astype(np.uint8)[..., None], 3, axis=2)
