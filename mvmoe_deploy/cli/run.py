"""``mvmoe-run``: classify images with a bundle."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec

from mvmoe_deploy.cli.common import command, parser, positive_int
from mvmoe_deploy.runtime import Prediction, Stats, load

EXAMPLES = """\
examples:
  mvmoe-run birds.mvmoe photo.jpg
  mvmoe-run birds.mvmoe photos/*.jpg --top 3 --max-resident 2 --json
"""


def build_parser() -> argparse.ArgumentParser:
    p = parser("Classify images with a bundle, loading only the experts they are routed to.", EXAMPLES)
    p.add_argument("bundle", type=Path, help="directory written by mvmoe-export")
    p.add_argument("images", type=Path, nargs="+", metavar="image", help="image files")
    p.add_argument("--top", type=positive_int, default=5, help="classes to show per image")
    p.add_argument("--max-resident", type=positive_int, metavar="N", help="most tails in memory at once")
    p.add_argument("--memory-budget", metavar="SIZE", help="most bytes of tails in memory at once, such as 8MB")
    p.add_argument("--threads", type=positive_int, default=1, help="CPU threads")
    p.add_argument("--backend", help="engine to run with (default: the one for the bundle's target)")
    p.add_argument("--json", action="store_true", help="print predictions and statistics as JSON")
    return p


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    with load(
        args.bundle,
        memory_budget=args.memory_budget,
        max_resident=args.max_resident,
        threads=args.threads,
        backend=args.backend,
    ) as runtime:
        predictions: list[dict[str, Any]] = []
        for path in args.images:
            prediction = runtime.predict(path, args.top)
            if args.json:
                predictions.append({"image": str(path), **msgspec.to_builtins(prediction)})
            else:
                print(describe(path, prediction))
        stats = runtime.stats()
        if args.json:
            print(json.dumps({"predictions": predictions, "stats": msgspec.to_builtins(stats)}, indent=1))
        else:
            print(describe_stats(stats))


def describe(path: Path, prediction: Prediction) -> str:
    """One image's classes, route and timings as text."""
    width = max(len(score.label) for score in prediction.top)
    lines = [str(path)]
    lines += [f"  {score.label:<{width}}  {score.probability:6.1%}" for score in prediction.top]
    if prediction.expert is not None:
        lines.append(f"  expert {prediction.expert} ({prediction.expert_name}), gate {prediction.gate:.2f}")
    lines.append("  " + ", ".join(f"{what} {ms:.2f} ms" for what, ms in prediction.timings.items()))
    return "\n".join(lines)


def describe_stats(stats: Stats) -> str:
    """What stayed in memory, in a sentence."""
    if not stats.hits + stats.misses:
        return f"weights in memory: {stats.fixed_bytes / 1e6:.2f} MB"
    experts = ", ".join(map(str, stats.resident))
    return (
        f"weights in memory: {(stats.fixed_bytes + stats.resident_bytes) / 1e6:.2f} MB (trunk "
        f"{stats.fixed_bytes / 1e6:.2f}, resident experts {experts}: {stats.resident_bytes / 1e6:.2f}); "
        f"{stats.hits} hits, {stats.misses} loads, {stats.evictions} evictions"
    )


if __name__ == "__main__":
    raise SystemExit(main())
