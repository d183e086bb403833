"""What the pages say can be done: links that lead somewhere, commands and flags that exist, files that are there."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import pkgutil
import re
import shlex
import string
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mvmoe_deploy import targets

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "models/zoo").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FOLDERS = ("mvmoe_deploy", "exporters", "models", "bench", "tests", "docs")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


class Parsed(BaseException):
    """Stands for the work that a command would do once its arguments are read."""


class Refused(BaseException):
    """A parser's error."""

    def __init__(self, parser: argparse.ArgumentParser, message: str) -> None:
        super().__init__(message)
        self.parser = parser


@pytest.fixture
def only_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end once they have read their arguments: with :class:`Parsed`, or :class:`Refused`."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        parse(self, *args, **options)
        raise Parsed

    def leave(self: argparse.ArgumentParser, status: int = 0, message: str | None = None) -> None:
        raise Refused(self, message or "") if status else Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "exit", leave)


def complaint(arguments: list[str], *, complete: bool) -> str | None:
    """What the command's parser says against the arguments; None where it takes them.

    Args:
        arguments: the command first, such as ``mvmoe-run``.
        complete: required arguments must be there as well; else only what is there must exist.
    """
    program, *rest = arguments
    try:
        import_module(f"mvmoe_deploy.cli.{program.removeprefix('mvmoe-')}").main(rest)
    except ModuleNotFoundError as error:
        return f"no such command ({error})"
    except Parsed:
        return None
    except Refused as refused:
        if complete or not re.search("are required|expected (at least )?one argument", str(refused)):
            return str(refused)
        flags = [argument.partition("=")[0] for argument in rest if re.match(r"--?[a-z]", argument)]
        unknown = [flag for flag in flags if flag not in refused.parser._option_string_actions]
        return f"unrecognized arguments: {' '.join(unknown)}" if unknown else None
    raise AssertionError(f"{shlex.join(arguments)} did not parse its arguments with argparse")


def fenced(text: str) -> Iterator[tuple[list[str], bool]]:
    """The ``mvmoe-…`` commands in a page's shell blocks, and whether they are complete.

    Variables that the page sets are put in; one that another page sets may hold required arguments.
    """
    variables: dict[str, str] = {}
    for language, block in FENCE.findall(text):
        if language != "sh":
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.fullmatch(r'(\w+)="(.*)"', line.strip()):
                variables[match[1]] = string.Template(match[2]).substitute(variables)
                continue
            for command in re.split(r"&&|\s\|\s", string.Template(line).safe_substitute(variables)):
                words = shlex.split(command, comments=True)
                if words and Path(words[0]).name.startswith("mvmoe-"):
                    known = [word for word in words[1:] if not word.startswith("$")]
                    yield [Path(words[0]).name, *known], len(known) == len(words) - 1


def inline(text: str) -> Iterator[tuple[list[str], bool]]:
    """Those named in running text, which may be shortened."""
    for command in re.findall(r"`(mvmoe-[a-z]+ [^`]*)`", FENCE.sub("", text)):
        yield shlex.split(" ".join(command.split())), False


@pytest.mark.parametrize("page", PAGES, ids=name_of)
@pytest.mark.usefixtures("only_parsing")
def test_documented_commands_parse(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = [
        f"{shlex.join(words)}: {reason}"
        for words, complete in itertools.chain(fenced(text), inline(text))
        if (reason := complaint(words, complete=complete))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.usefixtures("only_parsing")
def test_a_wrong_command_is_noticed() -> None:
    assert complaint(["mvmoe-run", "birds.mvmoe"], complete=True)
    assert complaint(["mvmoe-run", "birds.mvmoe", "--bogus"], complete=False) == "unrecognized arguments: --bogus"
    assert complaint(["mvmoe-run", "birds.mvmoe", "photo.jpg", "--top", "many"], complete=False)
    assert complaint(["mvmoe-cook", "birds.mvmoe"], complete=False)
    assert complaint(["mvmoe-run", "birds.mvmoe", "--max-resident", "1"], complete=False) is None
    (command,) = fenced('```sh\nwith="--top 3"\ncd x && mvmoe-run a.mvmoe $with b.jpg  # two\n```')
    assert command == (["mvmoe-run", "a.mvmoe", "--top", "3", "b.jpg"], True)
    assert next(fenced("```sh\nmvmoe-run $elsewhere b.jpg\n```")) == (["mvmoe-run", "b.jpg"], False)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8")))
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in local if target and not (page.parent / target).exists()]
    assert not missing, f"{name_of(page)} links to {missing}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_targets_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text))
    if not page.name.startswith("adding-"):  # those name files that the reader is to write
        real = (path for path in sorted(named) if not re.search("/[A-Z]+/", path))  # TARGET stands for any
        missing = [path for path in real if not (ROOT / path).exists()]
        assert not missing, f"{name_of(page)} names {missing}"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {
        target for line in re.findall(r"`?make ([a-z ]+?)(?:`|  |$)", text, re.MULTILINE) for target in line.split()
    }
    unknown = [
        target for target in targets if f"`make {target}" in text and not re.search(rf"^{target}:", makefile, re.M)
    ]
    assert not unknown, f"{name_of(page)} names make targets {unknown}"


def test_every_module_is_on_one_api_page() -> None:
    """But for commands, which their ``--help`` describes."""
    spec = importlib.util.spec_from_file_location("api_pages", ROOT / "docs" / "api_pages.py")
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md"))]
    shown = [name for page in pages for name in re.findall(r"^::: (\S+)", hook.on_page_markdown(page), re.MULTILINE)]
    everything = re.fullmatch(hook.LINE, "modules of mvmoe_deploy except cli")
    assert everything
    assert sorted(shown) == sorted(hook.modules(everything))
    assert {"mvmoe_deploy", "mvmoe_deploy.bundle", "mvmoe_deploy.exporters.split"} <= set(shown)


def test_the_table_of_targets_is_true() -> None:
    """Precisions and layouts as the exporters have them, the default first."""
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in re.findall(r"^\| `\w+` \|.*", page, re.MULTILINE)
    ]
    told = {name.strip("`"): (precisions, layouts) for name, precisions, layouts, *_ in rows}
    assert told.keys() == {
        name for name, target in targets.known().items() if target.exporter.startswith("mvmoe_deploy.")
    }
    for name, cells in told.items():
        exporter = pkgutil.resolve_name(targets.get(name).exporter)
        without_notes = [re.sub(r" \(.*?\)", "", cell).split(", ") for cell in cells]
        assert without_notes == [[precision.name for precision in exporter.precisions], list(exporter.layouts)], name
