"""``mvmoe-bench``: FLOPs, bytes, memory, latency and accuracy of configurations against each other."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mvmoe_deploy.cli.common import command, parser, positive_int, thread_count
from mvmoe_deploy.errors import BackendError, ConfigError, ImageError

if TYPE_CHECKING:
    from mvmoe_deploy.bench.measure.run import Images, Plan
    from mvmoe_deploy.bench.results import Results

EXAMPLES = """\
examples:
  mvmoe-bench --device cpu                        the zoo's model against its dense baseline (about a minute)
  mvmoe-bench dense.pt birds.mvmoe --threads 2    ratios are to the first one
  mvmoe-bench --full --data DIR --json all.json   every baseline, sweeps, throughput, accuracy
  mvmoe-bench --suite paper --scales 12x192,6x64  random weights at the paper's scales, beside its figures
  mvmoe-bench --device android --help             on a phone or emulator; --device coreml on a Mac

more measurements, each with its own --help:
  mvmoe-bench figures      what this project holds itself to: export time, bytes, latency and memory ratios
  mvmoe-bench parity       every target at every precision against PyTorch, on labelled images
  mvmoe-bench executorch   what the ExecuTorch target's lowering buys
  mvmoe-bench training     images per second of mvmoe-train beside a bare training loop

with the JSON of earlier runs:
  mvmoe-bench report       tables, CSV, Markdown or a self-contained HTML page
  mvmoe-bench compare      what changed between two runs beyond the noise; fails on a regression, for CI
"""

BASELINES = "dense,stock,dense-wide,all-experts,vmoe"
FULL_BASELINES = "stock,dense-wide,all-experts,vmoe"


def build_parser() -> argparse.ArgumentParser:
    from mvmoe_deploy.bench.report.publish import add_outputs

    p = parser("Measure bundles (or checkpoints, exported first) against each other.", EXAMPLES)
    p.add_argument("models", type=Path, nargs="*", metavar="BUNDLE|CKPT", help="default: the zoo's two models")
    p.add_argument("--device", default="cpu", help="cpu; android (over adb) or coreml (on macOS) have their own --help")
    p.add_argument("--suite", choices=["paper"], help="the 12 scales of the paper's figure 3a, random weights")
    p.add_argument("--scales", metavar="6x64,…", help="only these scales of the suite")
    p.add_argument(
        "--backends", default="onnxruntime", metavar="LIST",
        help="of checkpoints: some of onnxruntime,executorch,coreml,torch",
    )  # fmt: skip
    p.add_argument(
        "--baselines", default="", metavar="LIST", help=f"made from the first routed checkpoint: some of {BASELINES}"
    )
    images = p.add_mutually_exclusive_group()
    images.add_argument("--images", type=Path, metavar="PATH", help="image or folder (default: synthetic ones)")
    images.add_argument(
        "--data", type=Path, metavar="DIR", help="labelled images, as mvmoe-train takes them: accuracy and routing too"
    )
    p.add_argument("--count", type=positive_int, default=1000, help="labelled images used, evenly spaced")
    p.add_argument("--threads", type=thread_count, default=1, help="CPU threads")
    p.add_argument("--rounds", type=positive_int, default=100, help="fewest samples per row")
    p.add_argument("--min-seconds", type=float, default=3.0, metavar="S", help="shortest time per kind of latency")
    p.add_argument("--cold-starts", type=positive_int, default=5, metavar="N", help="processes started per row")
    p.add_argument("--memory-sweep", action="store_true", help="memory after each further expert became resident")
    p.add_argument("--throughput", action="store_true", help="images per second for batches of 1 to 64")
    p.add_argument("--residency", action="store_true", help="hit rate, latency and memory for 1 to E resident experts")
    p.add_argument(
        "--full", action="store_true",
        help=f"all of the above three, torch as well, and the baselines {FULL_BASELINES}; 300 rounds, 10 cold starts",
    )  # fmt: skip
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything, raw samples included")
    add_outputs(p)
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw latency and memory")
    return p


MORE = {
    "figures": "selfcheck.bars",
    "parity": "selfcheck.parity",
    "executorch": "selfcheck.lowering",
    "training": "selfcheck.training_speed",
    "report": "report.publish",
    "compare": "report.changes",
}
DEVICES = {"android": "devices.android", "coreml": "devices.coreml"}
"""Measured by modules of their own, which have their own options."""


def _device(argv: list[str]) -> str:
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    p.add_argument("--device", default="cpu")
    return str(p.parse_known_args(argv)[0].device)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in MORE:
        return int(import_module(f"mvmoe_deploy.bench.{MORE[argv[0]]}").main(argv[1:]))
    if (device := _device(argv)) in DEVICES:
        return int(import_module(f"mvmoe_deploy.bench.{DEVICES[device]}").main(argv))
    return _measure_here(argv)


@command
def _measure_here(argv: list[str] | None) -> None:
    args = build_parser().parse_args(argv)
    if args.device != "cpu":
        raise BackendError(f"--device {args.device}: there are cpu, android and coreml")
    if args.suite and args.models:
        raise ConfigError("--suite measures the paper's scales: give it no models")
    if args.scales and not args.suite:
        raise ConfigError("--scales is for --suite paper")
    from mvmoe_deploy.bench.report.publish import publish

    if args.full:
        args.memory_sweep = args.throughput = args.residency = True
        args.baselines = args.baselines or FULL_BASELINES
        args.backends = ",".join(dict.fromkeys([*_list(args.backends), "torch"]))
        args.rounds, args.cold_starts = max(args.rounds, 300), max(args.cold_starts, 10)
    with tempfile.TemporaryDirectory(prefix="mvmoe-bench-") as folder, _progress() as progress:
        results = _measure(args, Path(folder), progress)
    publish(results, args)
    if args.plot:
        from mvmoe_deploy.bench.report.png import draw

        draw(results, args.plot)


def _measure(args: argparse.Namespace, folder: Path, progress: _Progress) -> Results:
    from mvmoe_deploy import models
    from mvmoe_deploy.bench.candidates.prepare import prepare
    from mvmoe_deploy.bench.candidates.suite import choose_scales, run_suite
    from mvmoe_deploy.bench.measure.run import measure

    backends, baselines = _list(args.backends), _list(args.baselines)
    images, plan = _images(args), _plan(args)
    if args.suite:
        return run_suite(choose_scales(args.scales), images, plan, folder, backends, baselines, progress)
    given = args.models or [models.ZOO / "dense.safetensors", models.ZOO / "moe.safetensors"]
    prepared = prepare(given, folder, backends, baselines, progress=lambda what: progress(what, 0, 1))
    return measure(prepared, images, plan, progress)


def _plan(args: argparse.Namespace) -> Plan:
    from mvmoe_deploy.bench.measure.run import Plan

    return Plan(
        args.threads,
        args.rounds,
        args.min_seconds,
        args.cold_starts,
        args.memory_sweep,
        args.throughput,
        args.residency,
        count=args.count,
    )


def _images(args: argparse.Namespace) -> Images:
    from mvmoe_deploy.bench.measure.run import Images
    from mvmoe_deploy.exporters.pipeline import SYNTHETIC_IMAGES, synthetic_pixels
    from mvmoe_deploy.imagefiles import image_files

    if args.data:
        return Images([], f"validation images of {args.data.name}", args.data)
    if not args.images:
        return Images(list(synthetic_pixels(256, SYNTHETIC_IMAGES)), "synthetic (seed 0)")
    files = image_files(args.images)
    if not files:
        raise ImageError(f"{args.images}: holds no images")
    return Images(files, f"{len(files)} of {args.images.name}")


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


if __name__ == "__main__":
    raise SystemExit(main())
