"""Errors of other libraries, quoted within one line."""

from __future__ import annotations

import pytest

from mvmoe_deploy.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one line"), "one line"),
        (RuntimeError("\n  what happened \nand a stack trace"), "what happened"),
        (TimeoutError(), "TimeoutError"),
        (KeyError(" \n "), "' \\n '"),
        (ValueError(" \n "), "ValueError"),
    ],
)
def test_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
