"""``mvmoe-bench figures``: measures whether this project meets the bars that it holds itself to."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
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
    p.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
    """Prints the figures as a table; fails where one misses its bar."""
    from mvmoe_deploy.bench.selfcheck.bars import Figure, measure_all

    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        for figure in measure_all(args.rounds, Path(folder)):
            print(f"{figure.what}: {figure.value:.3f}", file=sys.stderr)
            figures.append(figure)
    if args.json:
        print(json.dumps([{**asdict(figure), "met": figure.met} for figure in figures], indent=1))
    else:
        rows: list[list[Cell]] = [
            [f.what, f.value, f.bar, "yes" if f.met else "NO", f.floor, f.detail] for f in figures
        ]
        print(table(rows, ["figure", "value", "bar", "met", "floor", "detail"]))
        print("floor: the same in bare onnxruntime sessions of the same graphs")
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {args.rounds} rounds")
    missed = sum(not figure.met for figure in figures)
    if missed:
        raise CheckFailed(f"{missed} of {len(figures)} figures miss their bar")
