"""``mvmoe-bench report``: an earlier run's JSON as tables or a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from mvmoe_deploy.bench.report.tables import csv_text, markdown, tables, text, write_text
from mvmoe_deploy.bench.results import Results, read_json, write_json
from mvmoe_deploy.cli.common import command, parser

EXAMPLES = """\
examples:
  mvmoe-bench report results.json                       the tables, on the terminal
  mvmoe-bench report results.json --html report.html    charts and tables in one page that needs no network
"""


def add_outputs(p: argparse.ArgumentParser) -> None:
    """Adds ``--csv``, ``--markdown`` and ``--html``; :func:`write_outputs` obeys them."""
    p.add_argument("--csv", type=Path, metavar="FILE", help="write a line per model, a column per figure")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    p.add_argument("--html", type=Path, metavar="FILE", help="write charts and tables as one self-contained page")


def write_outputs(results: Results, args: argparse.Namespace) -> None:
    """Writes what was asked for by the options of :func:`add_outputs`."""
    renderers: list[tuple[Path | None, Callable[[Results], str]]] = [
        (args.csv, csv_text),
        (args.markdown, markdown),
        (args.html, _html),
    ]
    for path, render in renderers:
        if path is not None:
            write_text(render(results), path)


def publish(results: Results, args: argparse.Namespace) -> None:
    """What a run ends with: ``--json`` first, since measuring took minutes, then the tables and the other outputs."""
    if args.json:
        write_json(results, args.json)
    print(show(results))
    write_outputs(results, args)


def show(results: Results) -> str:
    """All tables for the terminal."""
    return "\n\n".join(f"{table.title}\n{text(table)}" for table in tables(results))


def _html(results: Results) -> str:
    from mvmoe_deploy.bench.report.page import html  # imports matplotlib, which takes a second

    return html(results)


@command
def main(argv: list[str] | None = None) -> None:
    p = parser("Show the JSON of an earlier run: on the terminal, or as the files asked for.", EXAMPLES)
    p.prog = "mvmoe-bench report"
    p.add_argument("results", type=Path, metavar="RESULTS.json", help="written by mvmoe-bench --json")
    add_outputs(p)
    args = p.parse_args(argv)
    results = read_json(args.results)
    if not (args.csv or args.markdown or args.html):
        print(show(results))
    write_outputs(results, args)


if __name__ == "__main__":
    sys.exit(main())
