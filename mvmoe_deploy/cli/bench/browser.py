"""``mvmoe-bench browser``: bundles in the browser of a phone that opens a page."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from mvmoe_deploy.cli.bench.outputs import add_measuring_outputs, publish
from mvmoe_deploy.cli.common import positive_int
from mvmoe_deploy.cli.serving import add_server_options, print_address

HELP = "measure bundles in the browser of any phone that opens the address shown"
EXAMPLES = """\
examples:
  mvmoe-bench --device browser dense.mvmoe moe.mvmoe --json phone.json     scan the code with a phone, and tap Start
  mvmoe-bench --device browser dense.mvmoe moe.mvmoe --host 127.0.0.1      in this machine's browser

The page tests first whether the phone computes what the bundles expect. Nothing is installed on it, and nothing leaves
the local network.
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="onnx bundles; ratios are to the first")
    p.add_argument("--images", type=Path, metavar="PATH", help="image or folder (default: synthetic ones)")
    p.add_argument("--rounds", type=positive_int, default=100, help="samples per kind of latency")
    p.add_argument("--cold-starts", type=positive_int, default=5, metavar="N", help="starts per bundle")
    p.add_argument(
        "--threads", type=positive_int, default=1,
        help="threads of the engine; browsers give more than one only by HTTPS or from localhost",
    )  # fmt: skip
    p.add_argument("--provider", choices=["wasm", "webgpu"], default="wasm", help="processor or graphics")
    p.add_argument("--no-memory", action="store_true", help="do not ask for memory, for which Chrome needs a minute")
    p.add_argument(
        "--timeout", type=float, default=1800.0, metavar="S", help="seconds without a word from a browser to wait"
    )
    add_server_options(p)
    add_measuring_outputs(p)


def run(args: argparse.Namespace) -> None:
    """Prints the address, waits for a phone, prints and writes the results."""
    from tqdm import tqdm

    from mvmoe_deploy import web_engine
    from mvmoe_deploy.bench.devices.browser import Plan, ReportHandler, measuring_site, results_of, wait_for_report
    from mvmoe_deploy.bench.measure.images import choose_images
    from mvmoe_deploy.cli.serving import open_with_options

    plan = Plan(
        rounds=args.rounds,
        cold_starts=args.cold_starts,
        threads=args.threads,
        provider=args.provider,
        memory=not args.no_memory,
    )
    images = choose_images(args.images)
    with tempfile.TemporaryDirectory(prefix="mvmoe-bench-") as folder:
        site, configurations = measuring_site(
            args.bundles, images, plan=plan, engine=web_engine.find(args.engine), folder=Path(folder)
        )
        server = open_with_options(site, args, ReportHandler)
        print("scan the code, or open this address on a phone in the same network, and tap Start")
        print_address(server, args)
        with tqdm(disable=None, leave=False, bar_format="{desc} {bar} {percentage:.0f}%") as bar:

            def progress(what: str, done: int, total: int) -> None:
                bar.set_description_str(what, refresh=False)
                bar.total, bar.n = total, done
                bar.refresh()

            report = wait_for_report(server, args.timeout, progress)
    publish(results_of(report, configurations, plan, images.what), args)
