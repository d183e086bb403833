"""Running something in several threads at once, such that a deadlock fails a test instead of hanging pytest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

TIMEOUT = 20.0
"""Seconds within which everything that threads do in tests must end."""


def daemon(work: Callable[..., object], *args: object) -> threading.Thread:
    """A started thread that does not keep the process alive."""
    thread = threading.Thread(target=work, args=args, daemon=True)
    thread.start()
    return thread


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Runs ``work(0) … work(count - 1)`` at once and returns their results.

    Raises:
        AssertionError: a thread did not end in time.
        BaseException: the first exception that a thread raised.
    """
    barrier = threading.Barrier(count)
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def start(index: int) -> None:
        try:
            barrier.wait(TIMEOUT)
            results[index] = work(index)
        except BaseException as error:
            errors.append(error)

    threads = [daemon(start, index) for index in range(count)]
    end = time.monotonic() + TIMEOUT
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if errors:
        raise errors[0]
    alive = sum(thread.is_alive() for thread in threads)
    assert not alive, f"{alive} of {count} threads did not end within {TIMEOUT:g} s"
    return results
