"""Errors of other libraries, quoted within one line."""

from __future__ import annotations

import pytest

from mvmoe_deploy.errors import BundleError, first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one line"), "one line"),
        (RuntimeError("\n  what happened \nand a stack trace"), "what happened"),
        (TimeoutError(), "TimeoutError"),
        (KeyError(" \n "), "' \\n '"),
        (ValueError(" \n "), "ValueError"),
        (RuntimeError("\x1b[1;31mFAIL\x1b[m: a\tb\x07\u202e\nmore"), "FAIL: ab"),
        (RuntimeError("\x1b[0m\nthe reason"), "the reason"),
        (ValueError("x" * 1000), "x" * 300 + "…"),
    ],
)
def test_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_this_project_s_errors_are_one_line_that_can_be_printed() -> None:
    """A file may be called anything."""
    error = BundleError("a\x1b[31m.png\n\ud800: damaged, größer als 1 µm")
    assert str(error) == "a\\x1b[31m.png\\n\\ud800: damaged, größer als 1 µm"
    assert str(BundleError("plain")) == "plain"
    quoting = str(BundleError(f"manifest.json: path {'a' * 5000} is too long"))
    assert (len(quoting), quoting[:15], quoting[-8:]) == (2003, "manifest.json: ", "too long")
