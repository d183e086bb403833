"""``mvmoe-bench compare``: what changed between two runs beyond the noise."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mvmoe_deploy.errors import RegressionError

HELP = "compare two runs row by row, and fail on a regression beyond the noise (for CI)"
EXAMPLES = """\
examples:
  mvmoe-bench compare main.json branch.json
  mvmoe-bench compare main.json branch.json --fail-if "p50 > 1.05x" --fail-if "memory > 1.1x" --fail-if "top1 < 0.99x"

A factor is the second run's value divided by the first's. A condition holds only if the whole 95 % interval of the
factor lies beyond the limit. Exit code 1: a condition holds; 2: the files cannot be compared.
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    from mvmoe_deploy.bench.report.changes import METRICS

    metrics = "\n".join(f"  {name:<11} {metric.what}" for name, metric in METRICS.items())
    p.epilog = f"{EXAMPLES}\nmetrics:\n{metrics}"
    p.add_argument("before", type=Path, metavar="FIRST.json", help="results written by mvmoe-bench --json")
    p.add_argument("after", type=Path, metavar="SECOND.json", help="results to compare with them")
    p.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="CONDITION",
        help='exit with 1 if this holds, such as "p50 > 1.05x"; may be given several times',
    )
    p.add_argument("--json", action="store_true", help="print the comparison as JSON")


def run(args: argparse.Namespace) -> None:
    """Prints the changes; fails where a condition holds."""
    import msgspec

    from mvmoe_deploy.bench.report.changes import changes_table, check, compare, parse_limit, warnings
    from mvmoe_deploy.bench.results import read_json

    limits = [parse_limit(condition) for condition in args.fail_if]
    before, after = read_json(args.before), read_json(args.after)
    changes = compare(before, after)
    doubts, broken = warnings(before, after), check(changes, limits)
    if args.json:
        found = [{**msgspec.to_builtins(change), "significant": change.significant} for change in changes]
        print(json.dumps({"changes": found, "warnings": doubts, "failed": broken}, indent=1))
    else:
        for doubt in doubts:
            print(f"warning: {doubt}", file=sys.stderr)
        print(changes_table(changes))
    if broken:
        raise RegressionError("; ".join(broken))
