"""``mvmoe-train capacity``: a trained V-MoE's accuracy against the capacity that its experts are given."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from mvmoe_deploy.cli.common import add_data_options, positive_int, read_split, use_threads, val_share
from mvmoe_deploy.errors import DataError
from mvmoe_deploy.terminal import table

FACTORS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.05]

HELP = "evaluate a trained V-MoE at several capacity factors, without and with Batch Priority Routing"

EXAMPLES = """\
Below a capacity factor of 1, the experts have fewer places than there are tokens. Tokens without a place skip the MLP.

example:
  mvmoe-train capacity vmoe.pt --data tiny-imagenet-32 --plot capacity.png
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument("checkpoint", type=Path, metavar="CKPT", help="a trained V-MoE")
    add_data_options(p)
    p.add_argument(
        "--factors",
        type=float,
        nargs="+",
        metavar="F",
        help=f"capacity factors (default: {' '.join(map(str, FACTORS))})",
    )
    p.add_argument("--batch", type=positive_int, default=500, help="images per batch; their tokens share the places")
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw the curve into this file")
    p.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    from tqdm import tqdm

    from mvmoe_deploy.models import load_checkpoint
    from mvmoe_deploy.models.study.capacity import capacity_curve
    from mvmoe_deploy.models.study.pictures import draw_capacity

    use_threads(args.threads)
    model, header = load_checkpoint(args.checkpoint)
    if model.config.capacity_factor is None:
        raise DataError(f"{args.checkpoint}: has no capacity; only a V-MoE's tokens compete for places")
    factors = sorted(args.factors or {*FACTORS, model.config.capacity_factor})
    images = read_split(
        args.data,
        args.split,
        header.preprocessing,
        header.class_ids,
        val_share=val_share(args, header),
        every_class=False,
    )
    with tqdm(total=2 * len(factors), desc="capacity", delay=2, disable=None, leave=False, file=sys.stderr) as bar:

        def progress(done: int) -> None:
            bar.update(done - bar.n)

        curve = capacity_curve(
            model=model,
            images=images,
            preprocessing=header.preprocessing,
            factors=factors,
            batch=args.batch,
            progress=progress,
        )
    if args.plot:
        draw_capacity(curve, args.plot, args.checkpoint.name)
    if args.json:
        print(json.dumps(dataclasses.asdict(curve), indent=1))
        return
    rows = [
        [
            f"{vanilla.factor:g}",
            None if vanilla.flops is None else f"{vanilla.flops / 1e6:.2f}",
            f"{vanilla.accuracy:.2%}",
            f"{bpr.accuracy:.2%}",
            f"{bpr.gain.points:+.2f} ({bpr.gain.low:+.2f} … {bpr.gain.high:+.2f})" if bpr.gain else None,
            f"{vanilla.overflow:.1%}",
        ]
        for vanilla, bpr in zip(curve.points[::2], curve.points[1::2], strict=True)
    ]
    print(table(rows, ["capacity", "MFLOPs, at most", "vanilla", "BPR", "gain (95 % interval)", "overflow"]))
    print(
        f"{curve.images:,} images in mixed batches of {curve.batch}, trained at {curve.trained_factor:g}; "
        "the gain is in percentage points, paired by image"
    )
