"""Formats tables and text, for a terminal (no wider than the terminal) and as Markdown."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Collection, Sequence
from itertools import zip_longest

Cell = str | float | int | None

NARROWEST = 12
"""Least width in characters of a text column whose cells are wrapped."""

GAP = 2
"""Number of spaces between two columns."""

NUMERIC = re.compile(r"[-+−]?\d[\d.,e+−–…()/% -]*")
"""Matches a cell that is aligned right: a number, a percentage, or a value with its interval."""


def terminal_width() -> int | None:
    """Width in characters of the terminal that shows standard output; None for a file or a pipe.

    The environment variable COLUMNS overrides it, as it does in other programs.
    """
    if (columns := os.environ.get("COLUMNS", "")).isdigit() and int(columns):
        return int(columns)
    if sys.stdout is not None and sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return None


def number(value: Cell) -> str:
    """Formats a number with four significant digits and thousands separators, None as a dash, and text unchanged."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}"


def numeric_columns(rows: Sequence[Sequence[Cell]]) -> set[int]:
    """Indices of the columns to align right: all but the first whose cells are numbers, with or without an interval."""
    columns = list(zip(*rows, strict=True))
    return {column for column, cells in enumerate(columns) if column and all(map(_is_numeric, cells))}


def table(
    rows: Sequence[Sequence[Cell]],
    headers: Sequence[str],
    *,
    right: Collection[int] | None = None,
    width: int | None = None,
) -> str:
    """A table as plain text.

    If the table is wider than the terminal, its headers are wrapped. If that is not enough, its text cells are wrapped.
    If that is still not enough, it becomes several tables, each of which begins with the first column.

    Args:
        rows: the cells; every row is as long as the headers.
        headers: the column headers.
        right: columns to align right; by default :func:`numeric_columns`.
        width: longest line, in characters; by default :func:`terminal_width`.
    """
    width = width or terminal_width()
    aligned = numeric_columns(rows) if right is None else right
    columns = [
        _Column(header, [plain(number(row[index])) for row in rows], index in aligned)
        for index, header in enumerate(headers)
    ]
    if width is None or not columns:
        return _render(columns)
    return "\n\n".join(_render(part) for part in _fit(columns, width))


def counted(count: int, noun: str) -> str:
    """A count with its noun: ``1 thread``, ``2 threads``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def unique(names: Sequence[str]) -> list[str]:
    """The names, with a number added where several are the same."""
    return [
        name if names.count(name) == 1 else f"{name} #{list(names[: i + 1]).count(name)}"
        for i, name in enumerate(names)
    ]


def folded(text: str, width: int | None = None) -> str:
    """Wraps text to the terminal's width; a longer word, such as a path, is kept whole.

    What continues an indented line is indented by two more.
    """
    width = width or terminal_width()
    if width is None:
        return text
    return "\n".join(_folded(line, width) for line in text.split("\n"))


def markdown_table(
    rows: Sequence[Sequence[Cell]], headers: Sequence[str], *, right: Collection[int] | None = None
) -> str:
    """A table as Markdown; text cells are escaped so that they appear unchanged.

    Args:
        rows: the cells; every row is as long as the headers.
        headers: the column headers.
        right: columns to align right; by default :func:`numeric_columns`.
    """
    from tabulate import tabulate  # not needed to predict

    aligned = numeric_columns(rows) if right is None else right
    text: str = tabulate(
        [[markdown_text(number(cell)) for cell in row] for row in rows],
        [markdown_text(header) for header in headers],
        tablefmt="pipe",
        colalign=["right" if column in aligned else "left" for column in range(len(headers))] if rows else None,
        disable_numparse=True,
    )
    return text


def markdown_text(text: str) -> str:
    """Escapes every punctuation mark that has a meaning in Markdown, so that the text appears unchanged."""
    return "".join("\\" + c if c in "\\`*_{}[]<>#!|~&$@" else c for c in plain(text))


def plain(text: object) -> str:
    """Text on one line without control characters; names come from files that anybody may have written."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(str(text).split()))


def shown_width(text: str) -> int:
    """Columns that a terminal needs for a text: two for a Han character, none for an accent that follows a letter."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


class _Column:
    """A column: its header, its cells as text, and its alignment."""

    def __init__(self, header: str, cells: list[str], right: bool) -> None:
        self.header, self.cells, self.right = header, cells, right

    @property
    def width(self) -> int:
        return max(shown_width(line) for text in (self.header, *self.cells) for line in text.split("\n"))

    def with_wrapped_header(self) -> _Column:
        """The column with its header wrapped onto about two lines, if the header is longer than the cells."""
        longest_cell = max(map(len, self.cells), default=0)
        return _Column(_wrapped(self.header, max(longest_cell, len(self.header) // 2 + 1)), self.cells, self.right)

    def wrapped(self, width: int, break_words: bool = False) -> _Column:
        """The column with header and cells wrapped to a width."""
        header, *cells = (_wrapped(text, width, break_words) for text in (self.header, *self.cells))
        return _Column(header, cells, self.right)


def _fit(columns: list[_Column], width: int) -> list[list[_Column]]:
    """Splits columns into one or several tables, none of them wider than ``width``."""
    if _total(columns) <= width:
        return [columns]
    narrower = [column.with_wrapped_header() for column in columns]
    if _total(narrower) <= width:
        return [narrower]
    wrapped = _wrap_texts(narrower, width)
    if _total(wrapped) <= width:
        return [wrapped]
    first, *rest = narrower
    if first.width > width // 2:
        first = first.wrapped(width // 2, break_words=True)
    parts: list[list[_Column]] = []
    for column in rest:
        if column.width > (room := width - first.width - GAP):
            column = column.wrapped(room, break_words=True)
        if not parts or _total([*parts[-1], column]) > width:
            parts.append([first])
        parts[-1].append(column)
    return parts or [[first.wrapped(width, break_words=True)]]


def _wrap_texts(columns: list[_Column], width: int) -> list[_Column]:
    """Narrows text columns, the widest first, until the table fits or no column can become narrower."""
    columns = list(columns)
    texts = {index for index, column in enumerate(columns) if not column.right}
    while (excess := _total(columns) - width) > 0 and texts:
        widest = max(texts, key=lambda index: columns[index].width)
        narrower = columns[widest].wrapped(max(NARROWEST, columns[widest].width - excess))
        if narrower.width >= columns[widest].width:
            texts.remove(widest)
        else:
            columns[widest] = narrower
    return columns


def _folded(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    more = f"{indent}  " if indent else ""
    return textwrap.fill(line, width, subsequent_indent=more, break_on_hyphens=False, break_long_words=False)


def _wrapped(text: str, width: int, break_words: bool = False) -> str:
    if not break_words:
        width = max(width, *map(len, text.split()), 1)
    return "\n".join(textwrap.wrap(text, max(1, width), break_on_hyphens=False))


def _total(columns: Sequence[_Column]) -> int:
    return sum(column.width for column in columns) + GAP * (len(columns) - 1)


def _render(columns: Sequence[_Column]) -> str:
    rows = [[column.header for column in columns], ["-" * column.width for column in columns]]
    rows += [list(cells) for cells in zip(*(column.cells for column in columns), strict=True)]
    lines = []
    for row in rows:
        for parts in zip_longest(*(cell.split("\n") for cell in row), fillvalue=""):
            padded = [_padded(part, column) for part, column in zip(parts, columns, strict=True)]
            lines.append((" " * GAP).join(padded).rstrip())
    return "\n".join(lines)


def _padded(text: str, column: _Column) -> str:
    padding = " " * (column.width - shown_width(text))
    return padding + text if column.right else text + padding


def _is_numeric(cell: Cell) -> bool:
    return not isinstance(cell, str) or NUMERIC.fullmatch(cell) is not None
