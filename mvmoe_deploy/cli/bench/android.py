"""``mvmoe-bench android``: bundles on an Android phone or emulator, over adb."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from mvmoe_deploy.cli.bench.outputs import add_measuring_outputs, publish
from mvmoe_deploy.cli.common import positive_int, progress_bar, thread_count

HELP = "measure bundles on an Android phone or emulator, over adb"
EXAMPLES = """\
examples:
  mvmoe-bench android moe.mvmoe --runner build/onnxruntime_perf_test --json phone.json
  mvmoe-bench android dense.mvmoe moe.mvmoe --runner cmake-out/executor_runner --serial emulator-5554

The runner is the engine's own, built for the phone: onnxruntime_perf_test for onnx bundles, executor_runner (ExecuTorch
1.3 or newer) for executorch bundles, which must be exported with --max-batch 1. docs/benchmarking.md says how.
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument(
        "bundles", type=Path, nargs="+", metavar="BUNDLE", help="bundles of one target; ratios are to the first"
    )
    p.add_argument(
        "--runner", type=Path, required=True, metavar="PATH", help="the engine's runner, built for the phone"
    )
    p.add_argument("--adb", default="adb", metavar="PATH", help="the adb program")
    p.add_argument("--serial", help="if there are several devices: a serial number of adb devices, or HOST:PORT")
    p.add_argument("--images", type=Path, metavar="PATH", help="image that trunks run on, or its folder")
    p.add_argument("--threads", type=thread_count, default=1, help="CPU threads")
    p.add_argument("--rounds", type=positive_int, default=100, help="runs of each piece that are kept")
    p.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds that one process may take")
    add_measuring_outputs(p)


def run(args: argparse.Namespace) -> None:
    """Prints and writes the results."""
    from mvmoe_deploy.bench.devices.android import find_device, measure
    from mvmoe_deploy.imagefiles import image_files

    adb = find_device(shutil.which(args.adb) or args.adb, args.serial)
    results = measure(
        adb,
        args.runner,
        args.bundles,
        threads=args.threads,
        runs=args.rounds,
        images=image_files(args.images) if args.images else [],
        timeout=args.timeout,
        progress=lambda items, total: progress_bar(items, total, "runs on the phone"),
    )
    publish(results, args)
