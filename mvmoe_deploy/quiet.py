"""Keeps third-party libraries from printing to a user's terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops warnings and everything written to standard error, also by native code, until the block ends.

    Toolchains warn of libraries they do not find and processor files they cannot read, and draw progress bars. Real
    failures they raise as exceptions. Standard error belongs to the process, so other threads are silenced as well:
    use the block for imports and conversions only.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(), _nowhere(2):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _nowhere(descriptor: int) -> Iterator[None]:
    """Points a file descriptor at the null device; does nothing where it is not open."""
    try:
        kept = os.dup(descriptor)
    except OSError:
        yield
        return
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), descriptor)
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
