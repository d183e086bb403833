"""``mvmoe-train compare``: trained models side by side on the same images."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mvmoe_deploy.cli.common import add_data_options, progress_bar, read_split, use_threads, val_share
from mvmoe_deploy.errors import DataError
from mvmoe_deploy.terminal import Cell, folded, markdown_table, table, unique

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mvmoe_deploy.checkpoint import Header
    from mvmoe_deploy.images import Preprocessing
    from mvmoe_deploy.models import Model
    from mvmoe_deploy.models.study.comparison import Row
    from mvmoe_deploy.models.study.evaluation import Predictions
    from mvmoe_deploy.models.train.data import Bar, ImageSet

    Candidate = tuple[str, Header, Model, Predictions]

HELP = "compare trained models on the same images: their accuracy, and what each needs on a device"

EXAMPLES = """\
The top-1 accuracy of each model stands beside the paired 95 % interval of its difference to the first model, and beside
the same difference in Mobile V-MoE's figure 3e.

examples:
  mvmoe-train compare dense.pt moe.pt --data tiny-imagenet-32
  mvmoe-train compare dense.pt super.pt random.pt end_to_end.pt vmoe.pt --data tiny-imagenet-32 --markdown
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument(
        "checkpoints",
        type=Path,
        nargs="+",
        metavar="CKPT",
        help="trained models; the others are compared with the first",
    )
    add_data_options(p)
    form = p.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument("--markdown", action="store_true", help="print the tables as Markdown")


def run(args: argparse.Namespace) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    from mvmoe_deploy.models.study.comparison import compare, recipe_differences

    use_threads(args.threads)
    read: dict[Preprocessing, ImageSet] = {}
    candidates = _candidates(args, read)
    rows = compare(candidates)
    images = len(candidates[0][3].labels)
    differing = recipe_differences(rows)
    said = _verdicts(candidates, rows, read)
    if args.json:
        result = {
            "images": images,
            "rows": [dataclasses.asdict(row) for row in rows],
            "recipes_differ_in": differing,
            "verdicts": said,
        }
        print(json.dumps(result, indent=1))
        return
    like_paper = len(candidates[0][1].class_ids) >= LEAST_CLASSES
    print(_printed([_accuracy(row, like_paper) for row in rows], ACCURACY, markdown=args.markdown), end="\n\n")
    print(_printed([_needs(row) for row in rows], NEEDS, markdown=args.markdown), end="\n\n")
    print(folded(NOTE.format(images=images, split=args.split, base=rows[0].name)))
    for field, values in differing.items():
        given = ", ".join(f"{name} {value}" for name, value in values.items())
        print(folded(f"recipes differ in {field}: {given}"))
    if unknown := [row.name for row in rows if not row.recipe]:
        print(folded(f"no recipe is recorded in {', '.join(unknown)}"))
    for name, sentences in said.items():
        print(folded(f"\n{name}: {' '.join(sentences)}"))


def _candidates(args: argparse.Namespace, read: dict[Preprocessing, ImageSet]) -> list[Candidate]:
    """The models with their predictions; ``read`` receives the images, which models of one preprocessing share."""
    from mvmoe_deploy.models import load_checkpoint
    from mvmoe_deploy.models.study.evaluation import predict

    loaded = [load_checkpoint(path) for path in args.checkpoints]
    first = loaded[0][1]
    candidates = []
    for path, name, (model, header) in zip(args.checkpoints, _names(args.checkpoints), loaded, strict=True):
        if header.class_ids != first.class_ids:
            raise DataError(f"{path}: knows other classes than {args.checkpoints[0]}; they cannot be compared")
        share = val_share(args, header)
        if share != val_share(args, first):
            raise DataError(f"{path}: has another --val-share than {args.checkpoints[0]}, so other validation images")
        preprocessing = header.preprocessing
        if preprocessing not in read:
            read[preprocessing] = read_split(
                args.data, args.split, preprocessing, first.class_ids, val_share=share, every_class=False
            )
        predictions = predict(model, read[preprocessing], preprocessing, progress=_bar(name))
        candidates.append((name, header, model, predictions))
    return candidates


def _bar(title: str) -> Bar:
    return lambda items, total: progress_bar(items, total, title)


def _verdicts(
    candidates: list[Candidate], rows: Sequence[Row], images: dict[Preprocessing, ImageSet]
) -> dict[str, list[str]]:
    """What can be said of each model that routes images to super-classes' experts, where the first model is dense."""
    import torch

    from mvmoe_deploy.models.model import ImageRoutes
    from mvmoe_deploy.models.study.evaluation import predict
    from mvmoe_deploy.models.study.verdict import times_seen, traces, verdict

    _, _, first, dense = candidates[0]
    said: dict[str, list[str]] = {}
    for (name, header, model, predictions), row in zip(candidates, rows, strict=True):
        routing, superclasses, d = predictions.routing, header.superclasses, row.difference
        if first.config.routes or superclasses is None or d is None or not isinstance(routing, ImageRoutes):
            continue
        groups = torch.tensor(superclasses.of_class)
        forced = None
        if routing.chosen.shape[1] == 1:
            experts = groups[predictions.labels][:, None]
            forced = predict(
                model,
                images[header.preprocessing],
                header.preprocessing,
                progress=_bar(f"{name}, all sent right"),
                experts=experts,
            ).top[:, 0]
        found = traces(
            labels=predictions.labels,
            answers=predictions.top[:, 0],
            dense_answers=dense.top[:, 0],
            sent=routing.chosen[:, 0],
            groups=groups,
            interval=(d.low, d.high),
            forced_answers=forced,
        )
        said[name] = verdict(found, times_seen(header.training))
    return said


NOTE = (
    "{images:,} images of {split}. delta: percentage points over {base}, with its paired bootstrap interval over the "
    "images and the p of McNemar's exact test. expert MLPs: how many one image uses, mean / most, out of all; those of "
    "different layers count separately. MB: fp32 weights in memory for one image, mean / most, and for all images if "
    "none is loaded twice."
)
ACCURACY = ["model", "routing", "top-1 %", "delta", "95 % interval", "p", "paper delta", "router %", "samples"]
LEAST_CLASSES = 100
"""With fewer classes, figure 3e's differences are not shown: they are of ImageNet's 1,000 classes and would mislead."""
NEEDS = ["model", "routing", "MFLOPs", "params M", "active M", "expert MLPs", "MB, one image", "MB, all images"]


def _accuracy(row: Row, like_paper: bool) -> list[Cell]:
    d = row.difference
    return [
        row.name,
        row.routing,
        f"{100 * row.accuracy:.2f}",
        None if d is None else f"{d.points:+.2f}",
        None if d is None else f"{d.low:+.2f} … {d.high:+.2f}",
        None if d is None else f"{d.p_value:.2g}",
        None if row.paper_points is None or not like_paper else f"{row.paper_points:+.2f}",
        None if row.router_accuracy is None else f"{100 * row.router_accuracy:.1f}",
        row.training_images,
    ]


def _needs(row: Row) -> list[Cell]:
    n = row.needs
    return [
        row.name,
        row.routing,
        _millions(n.flops, 2),
        _millions(n.parameters, 3),
        _millions(n.active_parameters, 3),
        f"{n.touched:.2f} / {n.most_touched} of {n.expert_mlps}" if n.expert_mlps else None,
        None if n.image_bytes is None else f"{_millions(n.image_bytes, 2)} / {_millions(n.most_image_bytes, 2)}",
        _millions(n.all_bytes, 2),
    ]


def _millions(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value / 1e6:.{digits}f}"


def _printed(rows: list[list[Cell]], headers: list[str], *, markdown: bool) -> str:
    """A table without the columns that are empty for every model."""
    kept = [column for column in range(len(headers)) if any(row[column] is not None for row in rows)]
    cells = [[row[column] for column in kept] for row in rows]
    shown = [headers[column] for column in kept]
    right = set(range(2, len(kept)))
    return (markdown_table if markdown else table)(cells, shown, right=right)


def _names(paths: list[Path]) -> list[str]:
    """File names without their suffix, or the paths as given if two names are equal; numbered if a path is repeated."""
    stems = [path.stem for path in paths]
    return unique(stems if len(set(stems)) == len(stems) else list(map(str, paths)))
