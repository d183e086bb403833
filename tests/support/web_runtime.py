"""The runtime for browsers, asked in node and in Chromium; the npm packages that this needs are installed once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mvmoe_deploy.files import atomic_directory
from mvmoe_deploy.web_engine import cache_folder

HERE = Path(__file__).parents[1] / "runtimes" / "web"
ROOT = Path(__file__).parents[2]
NODE, NPM = shutil.which("node"), shutil.which("npm")
SECONDS = 240.0


def npm_packages() -> Path:
    """The folder ``node_modules`` with the packages that the lockfile pins, outside the source tree.

    Skips the test, with the reason, where node or npm is missing or the packages cannot be had.
    """
    if not (NODE and NPM):
        pytest.skip("no node and npm on PATH (Debian: nodejs npm)")
    lock = (ROOT / "runtimes" / "web" / "package-lock.json").read_bytes()
    folder = cache_folder() / f"tests-{hashlib.sha256(lock).hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "tests.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # tests run in several processes
        if not folder.is_dir():
            with atomic_directory(folder) as temporary:
                _install(temporary)
    return folder / "node_modules"


def _install(folder: Path) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(ROOT / "runtimes" / "web" / name, folder)
    command = [NPM or "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm ci did not end in {SECONDS:g} s")
    if done.returncode:
        pytest.skip(f"npm ci failed: {done.stderr.strip()[-300:]}")


class Node:
    """A copy of the package beside its dependencies, and node to run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("src", "test"):
            shutil.copytree(ROOT / "runtimes" / "web" / name, folder / name)
        for name in ("package.json", "tsconfig.json"):
            shutil.copy(ROOT / "runtimes" / "web" / name, folder)
        for file in HERE.glob("*.mjs"):
            shutil.copy(file, folder)
        (folder / "node_modules").symlink_to(npm_packages())

    def run(self, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs node in the package's folder."""
        environment = {**os.environ, "NO_COLOR": "1"}
        return subprocess.run(
            [NODE or "node", *arguments], cwd=self.folder, input=given, capture_output=True, text=True,
            timeout=SECONDS, env=environment, check=False,
        )  # fmt: skip

    def ask(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers to requests, which answer.mjs describes."""
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        done = self.run("node.mjs", given=lines)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not done.stderr, done.stderr[-3000:]
        answers: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(answers) == len(requests)
        return answers
