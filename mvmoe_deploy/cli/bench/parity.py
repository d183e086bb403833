"""``mvmoe-bench parity``: every target at every precision against PyTorch, on labelled images or others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mvmoe_deploy.cli.common import positive_int
from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.terminal import markdown_table, table

HELP = "compare every target at every precision with PyTorch, on labelled images or others"
EXAMPLES = """\
examples:
  mvmoe-bench parity                              the zoo's routed model that reads characters
  mvmoe-bench parity --checkpoint moe.pt --data DIR --markdown
  mvmoe-bench parity --checkpoint moe.pt --images PHOTOS --layouts
  mvmoe-bench parity --only onnx coreml:fp16
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument(
        "--checkpoint", type=Path, metavar="CKPT",
        help="a trained model (default: the zoo's routed one that reads characters)",
    )  # fmt: skip
    where = p.add_mutually_exclusive_group()
    where.add_argument(
        "--data", type=Path, metavar="DIR",
        help="folder with val/ or val.zip, as mvmoe-train takes it (default: 500 images of the zoo)",
    )  # fmt: skip
    where.add_argument("--images", type=Path, metavar="DIR", help="folder of images without labels; no accuracy then")
    p.add_argument("--layouts", action="store_true", help="every layout of a target, not its default alone")
    p.add_argument(
        "--only", nargs="+", default=[], metavar="TARGET", help="targets, or one precision of one as in onnx:int8"
    )
    p.add_argument("--count", type=positive_int, default=1000, help="images used, evenly spaced")
    p.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def run(args: argparse.Namespace) -> None:
    """Prints a row per target and precision."""
    from mvmoe_deploy.bench.selfcheck.parity import HEADERS, measure
    from mvmoe_deploy.models import ZOO

    if args.checkpoint and not (args.data or args.images):
        raise ConfigError("--checkpoint needs --data, labelled images of its classes, or --images")
    rows = measure(
        args.checkpoint or ZOO / "scripts" / "moe.safetensors",
        args.images or args.data or ZOO / "scripts" / "sample",
        args.count,
        progress=lambda what: print(what, file=sys.stderr),
        only=args.only,
        labelled=not args.images,
        layouts=args.layouts,
    )
    print((markdown_table if args.markdown else table)(rows, HEADERS))
