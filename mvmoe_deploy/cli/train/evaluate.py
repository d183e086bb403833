"""``mvmoe-train evaluate``: accuracy of a checkpoint on labelled images."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from mvmoe_deploy.cli.common import add_data_options, read_split, use_threads, val_share
from mvmoe_deploy.errors import DataError

HELP = "evaluate a checkpoint on the validation images: top-1, top-5, router accuracy, load per expert"

EXAMPLES = """\
example:
  mvmoe-train evaluate models/zoo/moe.safetensors --data tiny-imagenet
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument("checkpoint", type=Path, metavar="CKPT", help="a trained model")
    add_data_options(p)
    p.add_argument("--capacity-factor", type=float, help="V-MoE: use this one instead of the checkpoint's")
    p.add_argument(
        "--order",
        choices=["vanilla", "bpr"],
        help="V-MoE: give places to tokens in this order instead of the checkpoint's",
    )
    p.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    from mvmoe_deploy.models import load_checkpoint
    from mvmoe_deploy.models.study.evaluation import evaluate

    use_threads(args.threads)
    model, header = load_checkpoint(args.checkpoint)
    if args.capacity_factor is not None or args.order is not None:
        if model.config.capacity_factor is None:
            raise DataError(f"{args.checkpoint}: has no capacity; --capacity-factor and --order are for a V-MoE")
        factor = model.config.capacity_factor if args.capacity_factor is None else args.capacity_factor
        model.set_capacity(factor, args.order)
    images = read_split(
        args.data,
        args.split,
        header.preprocessing,
        header.class_ids,
        val_share=val_share(args, header),
        every_class=False,
    )
    result = evaluate(model, images, header.preprocessing, header.superclasses)
    if args.json:
        print(json.dumps({"images": len(images.labels), **dataclasses.asdict(result)}))
        return
    print(f"{len(images.labels)} images: top-1 {result.accuracy:.2%}, top-5 {result.top5:.2%}")
    if result.router_accuracy is not None:
        print(f"router {result.router_accuracy:.2%}")
    if result.load:
        print("load per expert: " + " ".join(f"{share:.1%}" for share in result.load))
