"""``mvmoe-bench parity``: every target at every precision against PyTorch, on labelled images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mvmoe_deploy.cli.common import positive_int
from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.terminal import markdown_table, table

HELP = "compare every target at every precision with PyTorch, on labelled images"
EXAMPLES = """\
examples:
  mvmoe-bench parity                              the zoo's routed model that reads characters
  mvmoe-bench parity --checkpoint moe.pt --data DIR --markdown
  mvmoe-bench parity --only onnx coreml:fp16
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument(
        "--checkpoint", type=Path, metavar="CKPT",
        help="a trained model (default: the zoo's routed one that reads characters)",
    )  # fmt: skip
    p.add_argument(
        "--data", type=Path, metavar="DIR",
        help="folder with val/ or val.zip, as mvmoe-train takes it (default: 500 images of the zoo)",
    )  # fmt: skip
    p.add_argument(
        "--only", nargs="+", default=[], metavar="TARGET", help="targets, or one precision of one as in onnx:int8"
    )
    p.add_argument("--count", type=positive_int, default=1000, help="validation images used, evenly spaced")
    p.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def run(args: argparse.Namespace) -> None:
    """Prints a row per target and precision."""
    from mvmoe_deploy.bench.selfcheck.parity import HEADERS, measure
    from mvmoe_deploy.models import ZOO

    if args.checkpoint and not args.data:
        raise ConfigError("--checkpoint needs --data: labelled images of its classes")
    checkpoint = args.checkpoint or ZOO / "scripts" / "moe.safetensors"
    data = args.data or ZOO / "scripts" / "sample"
    rows = measure(checkpoint, data, args.count, progress=lambda what: print(what, file=sys.stderr), only=args.only)
    print((markdown_table if args.markdown else table)(rows, HEADERS))
