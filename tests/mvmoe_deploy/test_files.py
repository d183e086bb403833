"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mvmoe_deploy import files
from mvmoe_deploy.files import atomic_directory, atomic_file


def full_disk(_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("hello")
        assert not path.exists()
        assert temporary.suffix == ".tmp"
    assert path.read_text() == "hello"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("")
    with atomic_directory(tmp_path / "d"):
        pass
    assert (tmp_path / "a").stat().st_mode == plain.stat().st_mode
    (tmp_path / "plain_d").mkdir()
    assert (tmp_path / "d").stat().st_mode == (tmp_path / "plain_d").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_a_file_that_cannot_be_synced_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk may show only when the file is synced."""
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"), atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("half")
    with pytest.raises(OSError, match="No space"), atomic_directory(tmp_path / "d") as directory:
        (directory / "x").write_text("half")
    assert not list(tmp_path.iterdir())


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "d"
    with atomic_directory(path) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "x").write_text("1")
        assert not path.exists()
    assert (path / "sub" / "x").read_text() == "1"
    assert [p.name for p in path.parent.iterdir()] == ["d"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_failed_directory_leaves_the_old_one_and_no_litter(tmp_path: Path, replace: bool) -> None:
    path = tmp_path / "d"
    path.mkdir()
    (path / "x").write_text("old")
    with pytest.raises(ValueError, match="stop"), atomic_directory(path, replace) as directory:
        (directory / "x").write_text("new")
        raise ValueError("stop")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert (path / "x").read_text() == "old"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    path = tmp_path / "d"
    path.mkdir()
    (path / "old").write_text("")
    with atomic_directory(path, replace=True) as directory:
        (directory / "new").write_text("")
        assert (path / "old").exists()
    assert [p.name for p in path.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_directory_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with (
        pytest.raises(OSError, match="already exists: another process wrote it"),
        atomic_directory(path) as directory,
    ):
        (directory / "x").write_text("ours")
        path.mkdir()
        (path / "x").write_text("theirs")
    assert (path / "x").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_the_old_directory_comes_back_where_the_new_one_cannot_be_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d"
    path.mkdir()
    (path / "x").write_text("old")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp" and target == path:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"), atomic_directory(path, replace=True) as directory:
        (directory / "x").write_text("new")
    assert (path / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


KILLED = """
import os, sys
from pathlib import Path
from typing import Any
from mvmoe_deploy import files
path, moment = Path(sys.argv[1]), sys.argv[2]
files._exchange = lambda a, b: False
with files.atomic_directory(path, replace=True) as directory:
    (directory / "x").write_text("new")
    if moment == "writing":
        os._exit(9)
    real = Path.rename
    def rename(self, target):
        if target == path:
            os._exit(9)
        return real(self, target)
    Path.rename = rename
"""


@pytest.mark.skipif(os.name == "nt", reason="no locks of folders")
@pytest.mark.parametrize("moment", ["writing", "between the renames"])
def test_what_a_killed_process_left_is_put_right_by_the_next(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "d"
    path.mkdir()
    (path / "x").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), moment], check=False)
    assert done.returncode == 9
    assert len(list(tmp_path.iterdir())) == 2 if moment == "writing" else not path.exists()
    with pytest.raises(ValueError, match="stop"), atomic_directory(path, replace=True):
        assert (path / "x").read_text() == "old"  # there again, and stays if this fails too
        raise ValueError("stop")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert (path / "x").read_text() == "old"


def test_what_another_process_works_on_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with atomic_directory(path) as first:
        (first / "x").write_text("first")
        with atomic_directory(tmp_path / "d", replace=True) as second:
            (second / "x").write_text("second")
            assert (first / "x").exists()
        (tmp_path / "d").rename(tmp_path / "e")
    assert (path / "x").read_text() == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "e"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_two_directories_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    assert files._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()
    assert not files._exchange(tmp_path / "a", tmp_path / "absent")


@pytest.mark.parametrize("write", [atomic_file, atomic_directory])
def test_errors_name_what_is_written_and_not_a_temporary(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "birds"
    with pytest.raises(OSError, match="No space left on device") as caught, write(path):
        raise OSError(28, "No space left on device")  # as a write says it
    assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as caught, write(path) as temporary:
        (temporary / "none" / "x").read_bytes() if temporary.is_dir() else temporary.unlink()
    assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as caught, write(path):
        (tmp_path / "another").read_bytes()
    assert caught.value.filename == str(tmp_path / "another")  # its own
    with pytest.raises(OSError, match="too long") as caught, write(tmp_path / ("x" * 250)):
        pass
    assert caught.value.filename == str(tmp_path / ("x" * 250))
    assert not list(tmp_path.iterdir())
