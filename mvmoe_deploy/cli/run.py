"""``mvmoe-run``: classify images with a bundle."""

from __future__ import annotations

import argparse
import glob
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from mvmoe_deploy.cli.common import command, parser, positive_int, thread_count
from mvmoe_deploy.errors import CheckFailed, ImageError
from mvmoe_deploy.imagefiles import MAX_FILE_BYTES, image_files
from mvmoe_deploy.runtime import Prediction, Runtime, Stats, load

EXAMPLES = """\
examples:
  mvmoe-run birds.mvmoe photo.jpg
  mvmoe-run birds.mvmoe photos/ 'more/*.heic' --top 3 --max-resident 2 --json
  curl -s https://example.org/photo.jpg | mvmoe-run birds.mvmoe -

An image that cannot be read is reported on standard error, and with --json also in its record. The other images are
still classified.
exit status: 0 all images were classified; 1 some could not be read, or the model's answer is impossible, such as NaN;
2 none could be read, or the bundle or an option is bad
"""

STDIN = "-"


def build_parser() -> argparse.ArgumentParser:
    p = parser("Classify images with a bundle, loading only the experts they are routed to.", EXAMPLES)
    p.add_argument("bundle", type=Path, help="directory written by mvmoe-export")
    p.add_argument(
        "images",
        nargs="+",
        metavar="image",
        help="image files, folders (with their sub-folders), quoted patterns such as 'photos/**/*.jpg', or - for one "
        "image on standard input",
    )
    p.add_argument("--top", type=positive_int, default=5, help="classes to show per image")
    p.add_argument("--max-resident", type=positive_int, metavar="N", help="largest number of tails in memory at once")
    p.add_argument(
        "--memory-budget", metavar="SIZE", help="largest total size of the tails in memory at once, such as 8MB"
    )
    p.add_argument("--threads", type=thread_count, default=1, help="CPU threads")
    p.add_argument("--backend", help="engine to run with (default: the one for the bundle's target)")
    p.add_argument("--digest", metavar="SHA256", help="refuse the bundle unless its manifest.json has this sha256")
    p.add_argument(
        "--trust", action="store_true", help="run graphs unchecked, even if no export of this project has such graphs"
    )
    p.add_argument("--json", action="store_true", help="print predictions and statistics as JSON")
    return p


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    names = [name for argument in args.images for name in _expand(argument)]
    with load(
        args.bundle,
        memory_budget=args.memory_budget,
        max_resident=args.max_resident,
        threads=args.threads,
        backend=args.backend,
        digest=args.digest,
        trust=args.trust,
    ) as runtime:
        records: list[dict[str, Any]] = []
        failed: list[ImageError] = []
        for name in names:
            try:
                prediction = _predict(runtime, name, args.top)
            except ImageError as error:
                records.append({"image": name, "error": str(error)})
                failed.append(error)
                if len(names) > 1:  # the error of a single image is printed once, at the end
                    print(f"error: {error}", file=sys.stderr)
                continue
            records.append({"image": name, **msgspec.to_builtins(prediction)})
            if not args.json:
                print(describe(name, prediction))
        stats = runtime.stats()
    if args.json:
        print(json.dumps({"predictions": records, "stats": msgspec.to_builtins(stats)}, indent=1))
    elif len(failed) < len(names):
        print(describe_stats(stats))
    if len(names) == 1 and failed:
        raise failed[0]
    if len(failed) == len(names):
        raise ImageError(f"none of the {len(names)} images can be read")
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(names)} images cannot be read")


def _expand(argument: str) -> list[str]:
    """The images that an argument names; if there are none, the argument itself, so that its error comes in order."""
    try:
        if argument == STDIN or Path(argument).is_file():
            return [argument]
        if Path(argument).is_dir():
            found = image_files(Path(argument))
        else:
            matches = sorted(glob.glob(argument, recursive=True))
            found = [file for match in matches for file in image_files(Path(match))]
    except (ImageError, OSError, ValueError):  # such as a path that is too long, or not a path at all
        found = []
    return list(map(str, found)) or [argument]


def _predict(runtime: Runtime, name: str, top: int) -> Prediction:
    if name == STDIN:
        content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ImageError(f"standard input: more than the {MAX_FILE_BYTES / 1e9:.1f} GB of an image")
        return runtime.predict(content, top, "standard input")
    if Path(name).is_dir():
        raise ImageError(f"{name}: holds no images")
    return runtime.predict(name, top)


def describe(name: str, prediction: Prediction) -> str:
    """One image's classes, route and timings as text."""
    width = max(len(score.label) for score in prediction.top)
    lines = [name]
    lines += [f"  {score.label:<{width}}  {score.probability:6.1%}" for score in prediction.top]
    if prediction.expert is not None:
        expert = f"expert {prediction.expert}"
        if prediction.expert_name and prediction.expert_name != expert:  # what it is for, where that is known
            expert += f" ({prediction.expert_name})"
        lines.append(f"  {expert}, gate {prediction.gate:.2f}")
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
