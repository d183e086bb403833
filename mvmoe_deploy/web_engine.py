"""The files of onnxruntime-web, which run bundles in a browser: found in a folder, or fetched once by npm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from mvmoe_deploy.bundle import sha256
from mvmoe_deploy.errors import BackendError
from mvmoe_deploy.files import atomic_directory

VERSION = "1.30.0"

FILES = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
    "ort-wasm-simd-threaded.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
    "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
}
"""The files that a browser needs, for the processor and for WebGPU, and their sha256."""

PROCESSOR = [name for name in FILES if "webgpu" not in name and "asyncify" not in name]
"""Those that every page needs; the others, twice as large, are for WebGPU."""

PACKAGE = f"onnxruntime-web@{VERSION}"
NPM_SECONDS = 600.0


def find(folder: Path | None = None) -> Path:
    """The folder that holds :data:`FILES`, each with its sha256.

    Args:
        folder: where they are, or the folder of the npm package that has them in ``dist``; by default the user's cache,
            which npm fills at the first call.

    Raises:
        BackendError: a file is missing or differs, or npm is not there or fails; the message says what to do.
    """
    if folder is not None:
        nested = folder / "dist"
        chosen = nested if nested.is_dir() else folder
        if problem := _problem(chosen):
            raise BackendError(f"{problem}; --engine takes the folder of {PACKAGE}")
        return chosen
    kept = cache_folder() / f"onnxruntime-web-{VERSION}"
    if kept.is_dir() and not _problem(kept):
        return kept
    _install(kept)
    return kept


def cache_folder() -> Path:
    """The folder of this project among the user's caches, as the system has it."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mvmoe-deploy"


def _problem(folder: Path) -> str | None:
    for name, digest in FILES.items():
        file = folder / name
        if not file.is_file():
            return f"{file}: no such file"
        if sha256(file) != digest:
            return f"{file}: is not that of onnxruntime-web {VERSION} (its sha256 differs)"
    return None


def _install(target: Path) -> None:
    """Has npm fetch the package, and keeps the files that are needed."""
    npm = shutil.which("npm")
    if npm is None:
        raise BackendError(
            f"a browser needs onnxruntime-web, and npm, which would fetch it, is not installed: install Node.js, or "
            f"unpack the npm package {PACKAGE} yourself and give its folder by --engine DIR"
        )
    print(f"fetching {PACKAGE} by npm into {target} (once) …", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="mvmoe-npm-") as folder:
        command = [npm, "pack", PACKAGE, "--ignore-scripts", "--silent", "--pack-destination", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=NPM_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise BackendError(f"npm pack {PACKAGE}: no answer in {NPM_SECONDS:g} s; try again") from None
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(packed) != 1:
            said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[0][:300]
            raise BackendError(f"npm pack {PACKAGE} failed ({said}); or give the package's folder by --engine DIR")
        with atomic_directory(target, replace=True) as temporary:
            _unpack(packed[0], temporary)
            if problem := _problem(temporary):
                raise BackendError(f"{problem}; npm delivered another package than {PACKAGE}")


def _unpack(archive: Path, folder: Path) -> None:
    """Writes those of :data:`FILES` that an npm package holds; nothing else in it is read."""
    with tarfile.open(archive) as package:
        for member in package:
            name = member.name.removeprefix("package/dist/")
            if member.isfile() and name in FILES and (content := package.extractfile(member)) is not None:
                with (folder / name).open("wb") as file:
                    shutil.copyfileobj(content, file)
