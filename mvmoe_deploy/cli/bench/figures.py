"""``mvmoe-bench figures``: measures whether this project meets the bars that it holds itself to."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from mvmoe_deploy.cli.common import positive_int
from mvmoe_deploy.errors import CheckFailed
from mvmoe_deploy.terminal import Cell, table

HELP = "measure the bars that this project holds itself to: ratios of export time, bytes, latency and memory"
EXAMPLES = """\
The run takes about eight minutes. It uses random weights, because nothing measured here depends on what a model has
learned. Exit code 1: a figure misses its bar.
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument("--rounds", type=positive_int, default=1000, help="interleaved samples per latency figure")


def run(args: argparse.Namespace) -> None:
    """Prints the figures as a table; fails where one misses its bar."""
    from mvmoe_deploy.bench.selfcheck.bars import measure_all

    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory() as folder:
        for figure in measure_all(args.rounds, Path(folder)):
            print(f"{figure.what}: {figure.value:.3f}", file=sys.stderr)
            rows.append([figure.what, figure.value, figure.bar, "yes" if figure.met else "NO", figure.detail])
    print(table(rows, ["figure", "value", "bar", "met", "detail"]))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {args.rounds} rounds")
    missed = sum(row[3] == "NO" for row in rows)
    if missed:
        raise CheckFailed(f"{missed} of {len(rows)} figures miss their bar")
