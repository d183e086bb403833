"""The tables of the data set: ``fonts.tsv`` (faces, their split, their licence) and ``classes.tsv``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mvmoe_deploy.models.zoo.scripts.characters import name_of
from mvmoe_deploy.models.zoo.scripts.faces import Face

HERE = Path(__file__).parent
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class FontRow:
    """A face of the data set.

    Attributes:
        face: the face.
        split: ``train``, ``val`` or ``test``.
        licence: the licence, as read from the package's copyright file.
    """

    face: Face
    split: str
    licence: str


@dataclass(frozen=True)
class CharacterClass:
    """A class: characters that look the same.

    Attributes:
        first: code point that stands for it.
        codes: all its code points.
        script: script of the first code point.
    """

    first: int
    codes: list[int]
    script: str

    @property
    def id(self) -> str:
        """The class id, such as ``U+0041``."""
        return f"U+{self.first:04X}"

    @property
    def name(self) -> str:
        """Character, Unicode name and script: ``Ж cyrillic capital letter zhe (cyrillic)``."""
        return f"{chr(self.first)} {name_of(self.first)} ({self.script})"


def write_fonts(rows: Iterable[FontRow], path: Path) -> None:
    """Writes ``fonts.tsv``."""
    lines = [
        "\t".join((r.face.package, r.face.file, str(r.face.index), r.face.family, r.face.style, r.split, r.licence))
        for r in rows
    ]
    path.write_text("\n".join(["package\tfile\tindex\tfamily\tstyle\tsplit\tlicence", *lines, ""]), encoding="utf-8")


def read_fonts(path: Path = HERE / "fonts.tsv") -> list[FontRow]:
    """Reads ``fonts.tsv``."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        package, file, index, family, style, split, licence = line.split("\t")
        rows.append(
            FontRow(Face(package=package, file=file, index=int(index), family=family, style=style), split, licence)
        )
    return rows


def write_classes(classes: Iterable[CharacterClass], path: Path) -> None:
    """Writes ``classes.tsv``: id, readable name, script, all code points."""
    lines = ["\t".join((c.id, c.name, c.script, " ".join(f"U+{code:04X}" for code in c.codes))) for c in classes]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def read_classes(path: Path = HERE / "classes.tsv") -> list[CharacterClass]:
    """Reads ``classes.tsv``, in the order of the logits."""
    classes = []
    for line in path.read_text(encoding="utf-8").splitlines():
        first, _, script, codes = line.split("\t")
        classes.append(CharacterClass(int(first[2:], 16), [int(code[2:], 16) for code in codes.split()], script))
    return classes
