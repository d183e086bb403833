"""``mvmoe-bench executorch``: what the ExecuTorch target's lowering buys."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from mvmoe_deploy.cli.common import positive_int, thread_count
from mvmoe_deploy.terminal import counted, table

HELP = "measure what the ExecuTorch target's lowering buys"
EXAMPLES = """\
The models have random weights, because speed does not depend on the weights. The candidates are timed in turn:

  routed / dense           one image through the trunk, the router and one tail, against the whole dense baseline
  rewritten / naive        the trunk as this project lowers it, against nn.LayerNorm and scaled_dot_product_attention
                           lowered as they are by ExecuTorch's documented calls, both for any batch up to 16
  … batch 1 only           the same for one image at a time, which suits the naive lowering best
  matrix products / naive  the trunk's convolution and linear layers alone: both lowerings run these in the same
                           kernels, so no rewrite can be faster
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument("--model", default="mvmoe_12x192", help="a Mobile V-MoE scale by name")
    p.add_argument("--rounds", type=positive_int, default=200, help="samples per candidate")
    p.add_argument("--threads", type=thread_count, default=1, help="CPU threads")
    p.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
    """Prints milliseconds (p50, p90, p99) per candidate, ratios of p50, and the delegation of each kind of piece."""
    from tqdm import tqdm

    from mvmoe_deploy.bench.selfcheck.lowering import measure_scale

    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=None, file=sys.stderr) as bar,
    ):
        report = measure_scale(args.model, Path(folder), args.rounds, args.threads, progress=bar.set_description_str)
    if args.json:
        about = {"model": args.model, "rounds": args.rounds, "threads": args.threads}
        print(json.dumps({**about, **report}, indent=1))
        return
    print(table([[name, *times.values()] for name, times in report["ms"].items()], ["ms", "p50", "p90", "p99"]))
    print()
    print(table([[name, ratio] for name, ratio in report["ratios"].items()], ["ratio of p50", args.model]))
    print(f"{counted(args.threads, 'thread')}, {args.rounds} interleaved rounds")
    for name, found in report["delegation"].items():
        left = ", ".join(f"{count} {operator}" for operator, count in found["undelegated"].items()) or "none"
        print(f"{name}: {found['delegated']} operators in {found['delegates']} delegates; outside: {left}")
