"""``mvmoe-bench layouts``: standalone and swappable tails of ONNX bundles, beside each other."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from mvmoe_deploy.cli.common import positive_int
from mvmoe_deploy.terminal import markdown_table, table

HELP = "measure the layouts of ONNX bundles beside each other: latency, switch, cold start, memory, bytes delivered"
EXAMPLES = """\
examples:
  mvmoe-bench layouts                             the paper's scales, with random weights
  mvmoe-bench layouts moe.pt other.safetensors
  mvmoe-bench layouts --scales 12x192 --keep DIR  exports are kept, and used by the next run
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument("checkpoints", nargs="*", type=Path, metavar="CKPT", help="routed models (default: --scales)")
    p.add_argument("--scales", metavar="LIST", help="such as 6x64,12x192 (default: the paper's twelve)")
    p.add_argument("--precision", default="", help="of the bundles (default: the target's)")
    p.add_argument("--rounds", type=positive_int, default=100, help="images, and a tenth as many fresh processes")
    p.add_argument("--keep", type=Path, metavar="DIR", help="folder for the exports; those in it are used again")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def run(args: argparse.Namespace) -> None:
    """Prints a row per model and layout."""
    import msgspec
    from tqdm import tqdm

    from mvmoe_deploy.bench.candidates.suite import choose_scales
    from mvmoe_deploy.bench.selfcheck import layouts
    from mvmoe_deploy.errors import as_text
    from mvmoe_deploy.terminal import unique

    models: dict[str, Path | None] = dict(
        zip(unique([as_text(path.stem) for path in args.checkpoints]), args.checkpoints, strict=True)
    )
    if args.scales or not models:
        models.update(dict.fromkeys(choose_scales(args.scales)))
    rows: list[layouts.Row] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=None, file=sys.stderr) as bar,
    ):
        for name, checkpoint in models.items():
            keep = args.keep or Path(folder)
            keep.mkdir(parents=True, exist_ok=True)
            rows += layouts.measure(
                name,
                checkpoint,
                keep,
                precision=args.precision,
                rounds=args.rounds,
                progress=bar.set_description_str,
            )
    if args.json:
        print(json.dumps(msgspec.to_builtins(rows), indent=1))
    else:
        print((markdown_table if args.markdown else table)(layouts.table_of(rows), layouts.HEADERS))
