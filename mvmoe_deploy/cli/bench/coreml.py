"""``mvmoe-bench coreml``: Core ML bundles on a Mac."""

from __future__ import annotations

import argparse
from pathlib import Path

from mvmoe_deploy.cli.bench.outputs import add_measuring_outputs, publish
from mvmoe_deploy.cli.common import positive_int, thread_count

HELP = "measure Core ML bundles on a Mac, with the compute device that Core ML plans for each piece"
EXAMPLES = ""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument(
        "bundles", type=Path, nargs="+", metavar="BUNDLE", help="bundles of target coreml; ratios are to the first"
    )
    p.add_argument("--images", type=Path, metavar="PATH", help="image or folder (default: synthetic ones)")
    p.add_argument("--threads", type=thread_count, default=1, help="CPU threads of other engines than Core ML")
    p.add_argument("--rounds", type=positive_int, default=100, help="fewest samples per row")
    add_measuring_outputs(p)


def run(args: argparse.Namespace) -> None:
    """Prints and writes the results."""
    from mvmoe_deploy.bench.devices.coreml import measure

    publish(measure(args.bundles, args.images, threads=args.threads, rounds=args.rounds), args)
