"""Writing files and folders so that a reader finds them whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mvmoe_deploy.errors import MvmoeError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Flags of Linux's ``renameat2``, which Python does not offer."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it is synced and renamed to ``path``, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _named(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _sync(temporary)
            temporary.chmod(0o666 & ~_umask())  # mkstemp makes files private
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Makes the system's errors name the final path instead of the temporary one, or of none.

    The error for a full disk comes from the write call, which knows no file name.
    """
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else ""
        if error.errno is None or (name and not name.startswith(str(path.parent / f".{path.name}."))):
            raise
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(error.errno, "already exists: another process wrote it", str(path)) from None
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def atomic_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling directory; on success it is renamed to ``path``, else removed.

    Hidden folders that a killed process left beside ``path`` are cleaned up first.

    Args:
        path: the final directory; it must not exist unless ``replace``.
        replace: replace an existing directory. Where the system can (Linux), the two are exchanged in one step.
            Elsewhere the old directory is moved aside first; if the process is killed between the two steps, ``path``
            is absent until the next call, which restores it.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean_up_after_the_killed(path)
    with _named(path), _temporary(path, ".tmp") as temporary:
        try:
            yield temporary
        except MvmoeError as error:  # it names what is being written, as _named lets errors of the system do
            error.args = tuple(str(arg).replace(temporary.name, path.name) for arg in error.args)
            raise
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        temporary.chmod(0o777 & ~_umask())
        if not (replace and path.exists()):
            temporary.rename(path)
        elif not _exchange(temporary, path):  # after an exchange, the old directory is the one that is removed below
            with _temporary(path, ".old.tmp") as aside:
                old = aside / path.name
                path.rename(old)
                try:
                    temporary.rename(path)
                except OSError:
                    old.rename(path)
                    raise


@contextlib.contextmanager
def _temporary(path: Path, suffix: str) -> Iterator[Path]:
    """Yields a new hidden directory beside ``path``; it is locked while in use and removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=suffix, dir=path.parent))
    try:
        with _lock(directory):
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[bool]:
    """Locks a directory until the block or the process ends; yields False if another process holds the lock."""
    if fcntl is None:
        yield False
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def _clean_up_after_the_killed(path: Path) -> None:
    """Removes temporary directories that no process uses any more, and restores an old directory moved aside."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), _lock(left) as abandoned:
            if abandoned and left.is_dir() and not left.is_symlink():
                if left.name.endswith(".old.tmp") and (left / path.name).exists() and not path.exists():
                    (left / path.name).rename(path)
                shutil.rmtree(left)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two directories in one step; False where this system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
