"""Font files by Debian package, and the faces in them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mvmoe_deploy.errors import DataError

SUFFIXES = (".ttf", ".otf", ".ttc")


@dataclass(frozen=True)
class Face:
    """One face of a font file.

    Attributes:
        package: name of the Debian package.
        file: the file's name, without folders; no package has two files of the same name.
        index: index of the face in the file; 0 unless the file is a collection.
        family: typographic family.
        style: such as ``Regular`` or ``Bold Italic``.
    """

    package: str
    file: str
    index: int
    family: str
    style: str


def package_files(package: str, root: Path | None = None) -> list[Path]:
    """A package's files; none if the package is not installed or unpacked.

    Args:
        package: Debian package.
        root: folder with one folder per package, each unpacked by ``dpkg-deb -x``; None for the installed packages.
    """
    if root is not None:
        folder = root / package
        return sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    try:
        listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataError("the system has no dpkg: unpack the font packages and name their folder with --fonts") from None
    if listed.returncode:
        return []
    return sorted(path for path in map(Path, listed.stdout.splitlines()) if path.is_file())


def font_files(package: str, root: Path | None = None) -> dict[str, Path]:
    """A package's font files by name; of two files of the same name, the first."""
    files: dict[str, Path] = {}
    for path in package_files(package, root):
        if path.suffix.lower() in SUFFIXES and not path.is_symlink():
            files.setdefault(path.name, path)
    return files


def copyright_text(package: str, root: Path | None = None) -> str:
    """The package's copyright file; empty where there is none."""
    base = Path("/") if root is None else root / package
    path = base / "usr/share/doc" / package / "copyright"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def faces_in(package: str, path: Path) -> Iterator[tuple[Face, set[int]]]:
    """The faces of a font file, each with the code points that it has; none if the file cannot be read."""
    from fontTools.ttLib import TTCollection, TTFont, TTLibError

    try:
        fonts = list(TTCollection(path, lazy=True)) if path.suffix.lower() == ".ttc" else [TTFont(path, lazy=True)]
        for index, font in enumerate(fonts):
            names = font["name"]
            family = names.getDebugName(16) or names.getDebugName(1) or path.stem
            style = names.getDebugName(17) or names.getDebugName(2) or ""
            face = Face(
                package=package,
                file=path.name,
                index=index,
                family=" ".join(family.split()),
                style=" ".join(style.split()),
            )
            yield face, set(font.getBestCmap() or ())
    except (TTLibError, OSError, KeyError, AssertionError, ValueError):
        return
