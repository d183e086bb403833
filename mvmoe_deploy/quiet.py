"""Keeping other people's libraries from talking on a user's terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops warnings and whatever is written to standard error, by native code too, until the block ends.

    Toolchains warn of libraries they do not find and processor files they cannot read, and draw progress bars; what
    goes wrong they raise. Standard error is the process's, so other threads are silenced as well: keep the block to
    imports and conversions.
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
