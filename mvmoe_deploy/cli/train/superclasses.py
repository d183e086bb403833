"""``mvmoe-train superclasses``: group classes by what a dense model confuses."""

from __future__ import annotations

import argparse
from pathlib import Path

from mvmoe_deploy.cli.common import add_data_options, positive_int, read_split, use_threads, val_share
from mvmoe_deploy.errors import DataError

HELP = "group the classes that a dense model confuses into super-classes"

EXAMPLES = """\
example:
  mvmoe-train superclasses dense.pt --data tiny-imagenet-32 --experts 10 --out superclasses.tsv
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument("checkpoint", type=Path, metavar="CKPT", help="a trained dense model, or a teacher")
    add_data_options(p, any_split=False)
    p.add_argument("--experts", type=positive_int, default=10, help="number of super-classes")
    p.add_argument(
        "--out", type=Path, required=True, metavar="TSV", help="table to write: class id, super-class, class name"
    )
    p.add_argument(
        "--hold-out",
        type=int,
        metavar="N",
        help="images per class to measure confusion on (default: those held out when the model was trained)",
    )
    p.add_argument("--slack", type=float, default=1.5, help="largest group, as a multiple of the mean size")
    p.add_argument("--seed", type=int, default=0, help="seed of the clustering")
    p.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw the confusion matrix by group (default: beside --out)"
    )
    p.add_argument("--force", action="store_true", help="replace existing files")


def run(args: argparse.Namespace) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    from mvmoe_deploy.files import atomic_file
    from mvmoe_deploy.models import load_checkpoint
    from mvmoe_deploy.models.study.pictures import draw_confusion
    from mvmoe_deploy.models.study.superclasses import confusion, group, suggest_names

    plot = args.plot or args.out.with_suffix(".png")
    for path in (args.out, plot):
        if path.exists() and not args.force:
            raise DataError(f"{path}: exists already; --force replaces it")
    use_threads(args.threads)
    model, header = load_checkpoint(args.checkpoint)  # a dense baseline, or its teacher, which confuses less
    if model.config.routes is not None:
        raise DataError(f"{args.checkpoint}: is already routed; super-classes come from a dense model")
    held_out = args.hold_out if args.hold_out is not None else header.training.get("held_out_per_class", 0)
    if not held_out:
        raise DataError(
            f"{args.checkpoint}: was trained without held-out images; train with --hold-out N, "
            "or give --hold-out N here to use training images, on which it confuses less"
        )
    images = read_split(
        args.data,
        "train",
        header.preprocessing,
        header.class_ids,
        val_share=val_share(args, header),
        hold_out=held_out,
        held_out_only=True,
    )
    matrix = confusion(model, images, header.preprocessing)
    groups = group(matrix, args.experts, args.slack, args.seed)
    names = suggest_names(matrix, groups, header.class_names)
    lines = [
        f"{class_id}\t{names[index]}\t{class_name}"
        for class_id, class_name, index in zip(header.class_ids, header.class_names, groups, strict=True)
    ]
    with atomic_file(args.out) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for index, name in enumerate(names):
        members = [header.class_names[c] for c in range(len(groups)) if groups[c] == index]
        print(f"{index}: {name} ({len(members)})\n   {', '.join(members)}")
    draw_confusion(matrix=matrix, groups=groups, group_names=names, class_names=header.class_names, path=plot)
    print(f"wrote {args.out} and {plot}")
