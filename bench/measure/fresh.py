"""Runs measurements in a process of their own, because what a process did earlier affects them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from mvmoe_deploy.errors import BackendError

T = TypeVar("T")


def fresh_environment() -> dict[str, str]:
    """Variables for a fresh process, in which Python keeps its compiled files, as an installer does.

    Compiling at import takes time, and leaves megabytes of freed memory, in which a model would then find room that is
    not counted as its own.
    """
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def in_fresh_process(module: str, request: Any, result: type[T], what: str) -> T:
    """Runs ``python -m mvmoe_deploy.bench.MODULE`` with a request on standard input.

    Args:
        module: a module that calls :func:`answer`.
        request: any value that msgspec writes as JSON.
        result: type of the answer.
        what: name of the measurement in errors.

    Raises:
        BackendError: the process failed; its last line says why.
    """
    # A proportional set size counts only half of each page that this process maps too, such as the pages of a session
    # that verified an export and is still held by a reference cycle.
    gc.collect()
    # -P: the working directory may be the checkout, whose folder mvmoe_deploy lacks the packages beside it
    command = [sys.executable, "-P", "-m", f"mvmoe_deploy.bench.{module}"]
    done = subprocess.run(
        command, input=msgspec.json.encode(request), capture_output=True, check=False, env=fresh_environment()
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise BackendError(f"{what}: {lines[-1] if lines else f'exit status {done.returncode}'}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=result)


def answer(request: type[T], measure: Callable[[T], Any]) -> None:
    """Runs in the fresh process: reads a request from standard input, prints ``measure``'s result as the last line."""
    value = measure(msgspec.json.decode(sys.stdin.buffer.read(), type=request))
    print(msgspec.json.encode(value).decode())
