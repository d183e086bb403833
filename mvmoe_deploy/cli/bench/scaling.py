"""``mvmoe-bench scaling``: what a bundle costs by its number of experts."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from mvmoe_deploy.cli.common import positive_int
from mvmoe_deploy.errors import CheckFailed
from mvmoe_deploy.terminal import markdown_table, table

HELP = "measure what a bundle costs by its number of experts: opening, first prediction, switch, memory, export"
EXAMPLES = """\
example:
  mvmoe-bench scaling --scales 6x64 --experts 10 200

Weights are random. The defaults export up to 1,000 experts at 12x192, which takes half an hour and 6 GB of disk. Exit
code 1: opening, memory or export at E = 200 misses its bar against E = 10.
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument("--scales", nargs="+", default=["6x64", "12x192"], metavar="NAME", help="such as 6x64 12x192")
    p.add_argument(
        "--experts", nargs="+", type=positive_int, default=[10, 50, 200, 1000], metavar="E", help="numbers of experts"
    )
    p.add_argument("--layout", default="", help="layout of the bundles (default: the target's)")
    p.add_argument("--rounds", type=positive_int, default=50, help="switches, and half as many processes")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def run(args: argparse.Namespace) -> None:
    """Prints a row per scale and number of experts; exit code 1 if a bar is missed."""
    import msgspec
    from tqdm import tqdm

    from mvmoe_deploy.bench.selfcheck import scaling

    rows: list[scaling.Row] = []
    with tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=None, file=sys.stderr) as bar:
        for scale in args.scales:
            with tempfile.TemporaryDirectory() as folder:
                rows += scaling.measure(
                    scale,
                    args.experts,
                    Path(folder),
                    layout=args.layout,
                    rounds=args.rounds,
                    progress=bar.set_description_str,
                )
    if args.json:
        print(json.dumps(msgspec.to_builtins(rows), indent=1))
    else:
        print((markdown_table if args.markdown else table)(scaling.table_of(rows), scaling.HEADERS))
    missed = scaling.missed(rows)
    if missed:
        raise CheckFailed("; ".join(missed))
