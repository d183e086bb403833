"""Tables fit the terminal, keep every cell, and show no control characters."""

from __future__ import annotations

import io
import sys

import pytest

from mvmoe_deploy.terminal import (
    Cell,
    folded,
    markdown_table,
    number,
    numeric_columns,
    shown_width,
    table,
    terminal_width,
    unique,
)

HEADERS = ["model", "p50 ms (95 %)", "p90 ms", "first image MB", "classes mostly sent there", "inputs"]
ROWS: list[list[Cell]] = [
    ["dense-wide 12x192 †", "31.05 (30.9–31.4)", 33.1, 5, None, "images[B,3,32,32]"],
    ["moe", "9.4 (9.3–9.5)", 1234.5, 12, 3, "tokens[B,17,192], probabilities[B,10], gate[B]"],
]


def words(text: str) -> set[str]:
    return set(text.split())


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 160])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(width: int) -> None:
    shown = table(ROWS, HEADERS, width=width)
    assert max(map(len, shown.splitlines())) <= width
    letters = "".join(shown.split())
    for row in ROWS:
        for cell in row:
            assert all(part in shown or part in letters or width < 60 for part in number(cell).split())
    if width >= 60:
        assert {word for header in HEADERS for word in header.split()} <= words(shown)


def test_a_table_that_fits_is_one_and_unwrapped() -> None:
    lines = table(ROWS, HEADERS, width=160).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert lines[0].split("  ")[0] == "model"


def test_headers_are_wrapped_first_then_texts_and_at_last_the_columns_part() -> None:
    headers, rows = ["model", "a long header of numbers"], [["moe", 1.0]]
    assert table(rows, headers, width=24).splitlines() == [
        "model  a long header",
        "          of numbers",
        "-----  -------------",
        "moe            1.000",
    ]
    lines = table(
        [["trunk", "images, of several shapes and kinds", 1]], ["piece", "inputs", "n"], width=30
    ).splitlines()
    assert len(lines) == 4 and lines[2].startswith("trunk  images, of several")
    parts = table([["moe", 11111111, 22222222, 33333333]], ["model", "x", "y", "z"], width=30).split("\n\n")
    assert [part.splitlines()[0].split() for part in parts] == [["model", "x", "y"], ["model", "z"]]
    assert all(part.splitlines()[2].startswith("moe") for part in parts)


def test_without_a_terminal_lines_are_as_long_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert terminal_width() is None
    assert len(table(ROWS, HEADERS).splitlines()) == 4
    monkeypatch.setenv("COLUMNS", "80")
    assert terminal_width() == 80
    assert max(map(len, table(ROWS, HEADERS).splitlines())) <= 80
    assert folded("a b c", 3) == "a b\nc" and folded("x\ny", 80) == "x\ny"
    assert folded("  a b c", 5) == "  a b\n    c"


def test_numbers_with_intervals_and_percentages_are_aligned_right() -> None:
    row: list[Cell] = ["5", "1.04 (1.03–1.06)", "33.1%", "+0.35 … +0.40", "2.1e-06", None, "12x192", "1 in 2", "–"]
    assert numeric_columns([row]) == {1, 2, 3, 4, 5}


def test_control_characters_do_not_reach_the_terminal() -> None:
    shown = table([["a\x1b[31m\nb", 1]], ["model", "n"])
    assert "\x1b" not in shown and len(shown.splitlines()) == 3


def test_markdown_shows_texts_as_they_are() -> None:
    shown = markdown_table([["a|b*", 3], ["c", None]], ["model", "n"])
    assert shown.splitlines() == [
        "| model   |   n |",
        "|:--------|----:|",
        "| a\\|b\\*  |   3 |",
        "| c       |   – |",
    ]


def test_characters_that_are_two_columns_wide_are_counted_as_two() -> None:
    assert [shown_width(text) for text in ("綱 鋼", "몰", "e\u0301", "Ж")] == [5, 2, 1, 1]
    lines = table([["綱 鋼", "a", 1], ["Ж", "b", 22]], ["for", "name", "n"]).splitlines()
    assert lines == ["for    name   n", "-----  ----  --", "綱 鋼  a      1", "Ж      b     22"]


def test_names_that_are_the_same_are_numbered() -> None:
    assert unique(["dense", "moe", "dense"]) == ["dense #1", "moe", "dense #2"]
