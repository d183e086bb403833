"""``mvmoe-bench training``: how close the speed of training comes to that of a bare training loop."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from mvmoe_deploy.cli.common import positive_int, thread_count
from mvmoe_deploy.terminal import Cell, counted, table

HELP = "measure images per second of mvmoe-train beside a bare loop of forward pass, backward pass and step"
EXAMPLES = """\
Training gathers, augments and normalises images and clips gradients; the bare loop runs on tensors of the same shape
that never change. Both train the same model with the same optimiser, a few steps each in turn.
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument("--models", nargs="+", default=["vit_6x64", "vit_6x96"], metavar="NAME", help="scales to train")
    p.add_argument("--patch", type=positive_int, default=8, help="side of a patch, in pixels")
    p.add_argument("--batch", type=positive_int, default=256, help="images per step")
    p.add_argument("--min-crop", type=float, default=0.0, help="as for mvmoe-train; 0 is off")
    p.add_argument("--jitter", type=float, default=0.0, help="as for mvmoe-train; 0 is off")
    p.add_argument("--optimizer", help="optimiser of both loops (default: mvmoe-train's)")
    p.add_argument("--steps", type=positive_int, default=4, help="training steps per round")
    p.add_argument("--rounds", type=positive_int, default=20, help="rounds that are kept")
    p.add_argument("--threads", type=thread_count, help="CPU threads (default: all)")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the raw times into this file")


def run(args: argparse.Namespace) -> None:
    """Prints a row per model."""
    import torch

    from mvmoe_deploy.bench.selfcheck.training_speed import BAR, measure
    from mvmoe_deploy.files import atomic_file
    from mvmoe_deploy.models.train.recipe import Recipe

    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = {"optimizer": args.optimizer} if args.optimizer else {}
    recipe = Recipe(batch=args.batch, min_crop=args.min_crop, jitter=args.jitter, **chosen)
    speeds = []
    for model in args.models:
        print(f"{model} …", file=sys.stderr)
        speeds.append(measure(model, args.patch, recipe, steps=args.steps, rounds=args.rounds, device=args.device))
    rows: list[list[Cell]] = [
        [s.model, s.patch, s.images_per_second, s.bare_images_per_second, s.ratio, "yes" if s.ratio >= BAR else "NO"]
        for s in speeds
    ]
    print(table(rows, ["model", "patch", "images/s", "bare loop's", "ratio", f"at least {BAR}"]))
    threads = counted(torch.get_num_threads(), "thread")
    print(f"{args.rounds} rounds of {args.steps} steps each in turn, batch {args.batch}, {threads}")
    if args.json:
        with atomic_file(args.json) as temporary:
            temporary.write_text(json.dumps([asdict(speed) for speed in speeds], indent=1) + "\n")
