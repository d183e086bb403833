"""Sub-commands: which one runs, what the help shows, and how their errors end."""

from __future__ import annotations

import argparse

import pytest

from mvmoe_deploy.cli.common import Command, command_group
from mvmoe_deploy.errors import DataError


class Recorded:
    """A sub-command that notes what it was run with."""

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
    assert [name for name, part in parts.items() if part.declared] == [runs]  # no other part's imports are paid for


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
