"""``mvmoe-bench parity``: every target at every precision against PyTorch, on labelled images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mvmoe_deploy.cli.common import positive_int
from mvmoe_deploy.terminal import markdown_table, table

HELP = "compare every target at every precision with PyTorch, on labelled images"
EXAMPLES = """\
example:
  mvmoe-bench parity --data tiny-imagenet-32 --markdown
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument("--checkpoint", type=Path, metavar="CKPT", help="a trained model (default: the zoo's routed one)")
    p.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder with val/ or val.zip, as mvmoe-train takes it"
    )
    p.add_argument("--count", type=positive_int, default=1000, help="validation images used, evenly spaced")
    p.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def run(args: argparse.Namespace) -> None:
    """Prints a row per target and precision."""
    from mvmoe_deploy.bench.selfcheck.parity import HEADERS, measure
    from mvmoe_deploy.models import ZOO

    checkpoint = args.checkpoint or ZOO / "moe.safetensors"
    rows = measure(checkpoint, args.data, args.count, progress=lambda what: print(what, file=sys.stderr))
    print((markdown_table if args.markdown else table)(rows, HEADERS))
