"""``mvmoe-bench measure``: compares FLOPs, bytes, memory, latency and accuracy of configurations on this machine."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mvmoe_deploy.cli.bench.outputs import add_measuring_outputs, publish
from mvmoe_deploy.cli.common import positive_int, share, thread_count
from mvmoe_deploy.errors import ConfigError

if TYPE_CHECKING:
    from mvmoe_deploy.bench.measure.run import Plan
    from mvmoe_deploy.bench.results import Results

HELP = "measure bundles, or checkpoints (exported first), against each other on this machine"
EXAMPLES = """\
examples:
  mvmoe-bench                                     the zoo's characters, routed and dense (about a minute)
  mvmoe-bench dense.pt moe.mvmoe --threads 2      ratios are to the first one
  mvmoe-bench --full --json all.json              every baseline, sweeps, throughput
  mvmoe-bench --suite paper --scales 12x192,6x64  random weights at the paper's scales, beside its figures
"""

FULL_BASELINES = "stock,dense-wide,all-experts,vmoe"


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    from mvmoe_deploy.bench.candidates.configuration import BASELINES, backend_names

    p.add_argument(
        "models", type=Path, nargs="*", metavar="BUNDLE|CKPT",
        help="what to measure (default: the two models of the zoo that read characters, on its 500 labelled images)",
    )  # fmt: skip
    p.add_argument(
        "--device", choices=["cpu"], default="cpu", help="other devices have commands of their own, such as android"
    )
    p.add_argument(
        "--suite", choices=["paper"], help="measure the 12 scales of the paper's figure 3a, with random weights"
    )
    p.add_argument("--scales", metavar="6x64,…", help="only these scales of the suite")
    p.add_argument(
        "--backends", default="onnxruntime", metavar="LIST",
        help=f"engines to run checkpoints with: some of {','.join(backend_names())}",
    )  # fmt: skip
    p.add_argument(
        "--baselines", default="", metavar="LIST",
        help=f"baselines to make from the first routed checkpoint: some of {','.join(BASELINES)}",
    )  # fmt: skip
    images = p.add_mutually_exclusive_group()
    images.add_argument("--images", type=Path, metavar="PATH", help="image or folder (default: synthetic ones)")
    images.add_argument(
        "--data", type=Path, metavar="DIR", help="labelled images, as for mvmoe-train; adds accuracy and routing"
    )
    p.add_argument(
        "--val-share", type=share, default=0.0, metavar="SHARE",
        help="if --data has no val: the share of each class that the models were validated on",
    )  # fmt: skip
    p.add_argument("--count", type=positive_int, default=1000, help="labelled images to use, evenly spaced")
    p.add_argument("--threads", type=thread_count, default=1, help="CPU threads")
    p.add_argument("--rounds", type=positive_int, default=100, help="least number of samples per row")
    p.add_argument("--min-seconds", type=float, default=3.0, metavar="S", help="least time per kind of latency")
    p.add_argument("--cold-starts", type=positive_int, default=5, metavar="N", help="processes started per row")
    p.add_argument("--memory-sweep", action="store_true", help="add memory after each further expert became resident")
    p.add_argument("--throughput", action="store_true", help="add images per second for batches of 1 to 64")
    p.add_argument(
        "--residency", action="store_true", help="add hit rate, latency and memory for 1 to E resident experts"
    )
    p.add_argument(
        "--full", action="store_true",
        help=f"the three options above, torch as a backend, the baselines {FULL_BASELINES}; 300 rounds, 10 cold starts",
    )  # fmt: skip
    add_measuring_outputs(p)


def run(args: argparse.Namespace) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    if args.suite and args.models:
        raise ConfigError("--suite measures the paper's scales: give it no models")
    if args.scales and not args.suite:
        raise ConfigError("--scales is for --suite paper")
    if args.full:
        args.memory_sweep = args.throughput = args.residency = True
        args.baselines = args.baselines or FULL_BASELINES
        args.backends = ",".join(dict.fromkeys([*_list(args.backends), "torch"]))
        args.rounds, args.cold_starts = max(args.rounds, 300), max(args.cold_starts, 10)
    with tempfile.TemporaryDirectory(prefix="mvmoe-bench-") as folder, _progress() as progress:
        results = _measure(args, Path(folder), progress)
    publish(results, args)


def _measure(args: argparse.Namespace, folder: Path, progress: _Progress) -> Results:
    from mvmoe_deploy import models
    from mvmoe_deploy.bench.candidates.prepare import prepare
    from mvmoe_deploy.bench.candidates.suite import choose_scales
    from mvmoe_deploy.bench.measure.images import choose_images
    from mvmoe_deploy.bench.measure.run import measure, measure_suite

    backends, baselines = _list(args.backends), _list(args.baselines)
    zoo = models.ZOO / "scripts"
    if not (args.models or args.suite or args.images or args.data):
        args.data = zoo / "sample"
    images, plan = choose_images(args.images, args.data, args.val_share), _plan(args)
    if args.suite:
        return measure_suite(
            scales=choose_scales(args.scales),
            images=images,
            plan=plan,
            folder=folder,
            backends=backends,
            baselines=baselines,
            progress=progress,
        )
    given = args.models or [zoo / "dense.safetensors", zoo / "moe.safetensors"]
    prepared = prepare(given, folder, backends, baselines, progress=lambda what: progress(what, 0, 1))
    return measure(prepared, images, plan, progress)


def _plan(args: argparse.Namespace) -> Plan:
    from mvmoe_deploy.bench.measure.run import Plan

    return Plan(
        threads=args.threads,
        rounds=args.rounds,
        min_seconds=args.min_seconds,
        cold_starts=args.cold_starts,
        memory_by_resident=args.memory_sweep,
        throughput=args.throughput,
        residency=args.residency,
        count=args.count,
    )


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


class _Progress:
    """One line that says what is being done, with a bar."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar = tqdm(disable=None, leave=False, file=sys.stderr)

    def __call__(self, what: str, done: int, total: int) -> None:
        self._bar.set_description_str(what, refresh=False)
        self._bar.total, self._bar.n = total, done
        self._bar.refresh()

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()


@contextlib.contextmanager
def _progress() -> Iterator[_Progress]:
    progress = _Progress()
    try:
        yield progress
    finally:
        progress.close()
