"""``mvmoe-bench report``: an earlier run's JSON as tables, a picture or a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from mvmoe_deploy.cli.bench.outputs import add_report_outputs, write_reports

HELP = "show the results of an earlier run as tables on the terminal, or as files"
EXAMPLES = """\
examples:
  mvmoe-bench report results.json                       the tables, on the terminal
  mvmoe-bench report results.json --html report.html    charts and tables in one page that needs no network
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument("results", type=Path, metavar="RESULTS.json", help="results written by mvmoe-bench --json")
    add_report_outputs(p)


def run(args: argparse.Namespace) -> None:
    """Writes the files asked for, or prints the tables."""
    from mvmoe_deploy.bench.report.tables import terminal_text
    from mvmoe_deploy.bench.results import read_json

    results = read_json(args.results)
    if not write_reports(results, args):
        print(terminal_text(results))
