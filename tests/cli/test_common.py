"""Sub-commands: which one runs, what the help shows, and how their errors end."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import pytest

from mvmoe_deploy import __version__
from mvmoe_deploy.cli.common import Command, command, command_group, parser, positive_int
from mvmoe_deploy.errors import DataError


class Recorded:
    """A sub-command that records the arguments it was run with."""

    EXAMPLES = ""

    def __init__(self, name: str) -> None:
        self.HELP = f"{name}s things"
        self.declared = False
        self.seen: list[str] = []

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        self.declared = True
        parser.add_argument("items", nargs="*")
        parser.add_argument(f"--{self.HELP.split('s ')[0]}-option")

    def run(self, args: argparse.Namespace) -> None:
        self.seen = args.items
        if "bad" in args.items:
            raise DataError("bad: is no item")


@pytest.fixture
def parts() -> dict[str, Recorded]:
    return {"measure": Recorded("measure"), "report": Recorded("report")}


@pytest.fixture
def main(parts: dict[str, Recorded]) -> Command:
    return command_group("Does things.", parts, default="measure")


@pytest.mark.parametrize(
    ("argv", "runs", "items"),
    [
        (["report", "a"], "report", ["a"]),
        (["measure", "a"], "measure", ["a"]),
        (["a", "report"], "measure", ["a", "report"]),
        (["--measure-option", "x", "a"], "measure", ["a"]),
        (["measure", "report"], "measure", ["report"]),
    ],
)
def test_the_first_argument_names_the_command_and_the_default_is_meant_otherwise(
    argv: list[str], runs: str, items: list[str], parts: dict[str, Recorded], main: Command
) -> None:
    assert main(argv) == 0
    assert parts[runs].seen == items
    assert [name for name, part in parts.items() if part.declared] == [runs]  # no other imports are paid for


def test_the_help_of_all_takes_any_text(
    parts: dict[str, Recorded], main: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """argparse treats a % in help as a format."""
    parts["report"].HELP = "reports the 95 % interval"
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "reports the 95 % interval" in " ".join(capsys.readouterr().out.split())


def test_without_arguments_the_default_runs(parts: dict[str, Recorded], main: Command) -> None:
    assert main([]) == 0
    assert parts["measure"].declared


def test_help_lists_the_commands_and_shows_the_defaults_options(
    main: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "reports things" in shown and "--measure-option" in shown and "--report-option" not in shown


def test_help_of_one_command_is_its_own(main: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    shown = capsys.readouterr().out
    assert "--report-option" in shown and "--measure-option" not in shown


def test_an_error_is_one_line_and_exit_code_2(main: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "bad"]) == 2
    assert capsys.readouterr().err == "error: bad: is no item\n"


def test_every_command_says_its_version(main: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"mvmoe-deploy {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["report", "--none"], "error: unrecognized arguments: --none; "),
        (["report", "--report-option"], "error: argument --report-option: expected one argument; "),
    ],
)
def test_arguments_that_cannot_be_read_are_one_line(
    argv: list[str], message: str, main: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert err.startswith(message) and err.endswith(" --help says more\n") and err.count("\n") == 1


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many", ""])
def test_a_number_that_is_none_is_shown(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    p = parser("Counts.")
    p.add_argument("--count", type=positive_int)
    with pytest.raises(SystemExit):
        p.parse_args([f"--count={text}"])
    assert f"argument --count: must be a whole number of at least 1, is {text!r}; " in capsys.readouterr().err


PRINTS = """
import sys
from mvmoe_deploy.cli.common import command
@command
def main(argv):
    for _ in range(int(sys.argv[1])):
        print("dense † 1.04 (1.03–1.06) … é 日")
raise SystemExit(main())
"""


def run(lines: int, redirection: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command that prints characters beyond ASCII, in a process of its own."""
    script = [sys.executable, "-P", "-c", PRINTS, str(lines)]
    line = f'"$@" {redirection}'
    env = {**os.environ, **environment}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line, "bash", *script], capture_output=True, check=False, env=env
    )


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "dense † 1.04 (1.03–1.06) … é 日\n".encode()),
        ("latin-1", b"dense * 1.04 (1.03-1.06) ... \xe9 ?\n"),
        ("ascii", b"dense * 1.04 (1.03-1.06) ... ? ?\n"),
    ],
)
def test_characters_that_the_output_lacks_become_similar_ones(encoding: str, shown: bytes) -> None:
    done = run(1, "", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, b"")


@pytest.mark.parametrize(
    ("redirection", "codes", "stderr"),
    [
        (">&-", (0,), b""),
        (">&- 2>&- <&-", (0,), b""),
        ("| head -1", (0, 141), b""),  # 141 as SIGPIPE would give; 0 if all was written before head had ended
        (">/dev/full", (2,), b"error: No space left on device\n"),
    ],
)
def test_an_output_that_takes_nothing_gives_no_traceback(
    redirection: str, codes: tuple[int, ...], stderr: bytes
) -> None:
    done = run(10_000, redirection)
    assert done.returncode in codes
    assert done.stderr == stderr


def test_a_name_that_is_no_text_is_printed_as_it_is() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PRINTS.replace('"dense', 'sys.argv[2] + "dense'), "1", b"\xff"], capture_output=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith(b"\xffdense") and done.stderr == b""


@pytest.mark.parametrize("locale", ["ANSI_X3.4-1968", "UTF-8"])
def test_a_library_that_needs_another_locale(
    locale: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch reads its own templates in the locale's encoding. In UTF-8 such an error would be this project's."""

    @command
    def main(argv: list[str] | None = None) -> None:
        b"\xe2".decode("ascii")

    monkeypatch.setattr("locale.getpreferredencoding", lambda change: locale)
    if locale == "UTF-8":
        with pytest.raises(UnicodeDecodeError):
            main([])
        return
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("error: a library cannot work in this locale, whose encoding is ANSI")
